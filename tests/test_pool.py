"""The thread pool under ThreadSanitizer, fork, concurrent callers, signals and interpreter exit."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn.layout import Array

pool = pytest.importorskip("fastbn.kernels._pool", reason="built without a compiler")
ROOT = Path(__file__).parent.parent


def run(script: str, timeout: float = 120, **environment: str) -> str:
    """Run a script in a process of its own, which must end well and in time; return what it prints."""
    prelude = """
        import os, sys, threading, numpy as np, fastbn
        x = np.random.default_rng(0).normal(5, 2, (8, 64, 40, 40)).astype(np.float32)
        w, b = np.linspace(1, 2, 64, dtype=np.float32), np.linspace(-1, 1, 64, dtype=np.float32)

        def step(x=x):
            y, saved = fastbn.batch_norm_forward(x, w, b)
            gradients = fastbn.batch_norm_backward(y, x, saved)
            return b"".join(a.tobytes() for a in (y, gradients.dx, gradients.dweight, saved.invstd))

        def child(work):
            "Fork; return what is 0 if the work in the child returned True."
            pid = os.fork()
            if pid == 0:
                ok = False
                try:
                    ok = work()
                finally:
                    os._exit(not ok)
            return os.waitpid(pid, 0)[1]

        fastbn.set_num_threads(3)
        expected = step()
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(script)
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_fork_many() -> None:
    """200 children of a process whose pool runs each start a pool of their own."""
    run("""
        from fastbn.kernels._pool import workers
        assert workers() == 2
        def work():
            return workers() == 0 and step() == expected and workers() == 2
        assert not any(child(work) for _ in range(200))
        assert step() == expected
    """)


def test_fork_nested() -> None:
    run("""
        def work(depth):
            return step() == expected and (depth == 0 or child(lambda: work(depth - 1)) == 0) and step() == expected
        assert child(lambda: work(4)) == 0
    """)


def test_fork_while_another_thread_computes() -> None:
    run("""
        stop = threading.Event()
        wrong = []
        def compute():
            while not stop.is_set():
                wrong.append(step() != expected)
        other = threading.Thread(target=compute)
        other.start()
        failed = [child(lambda: step() == expected) for _ in range(100)]
        stop.set()
        other.join()
        assert not any(failed) and not any(wrong) and len(wrong) > 1
    """)


def test_multiprocessing_fork() -> None:
    run("""
        import multiprocessing
        with multiprocessing.get_context("fork").Pool(4) as processes:
            results = processes.starmap(step, [()] * 40)
        assert all(r == expected for r in results)
    """)


def test_preloaded_server() -> None:
    """Warm up, fork workers, and let every worker serve requests in threads, as gunicorn --preload does."""
    run("""
        import socket
        from concurrent.futures import ThreadPoolExecutor
        listener = socket.create_server(("127.0.0.1", 0))
        bn = fastbn.FrozenBatchNorm(w, w, w, b)
        answer = bn(x).tobytes()[:64]
        def serve():
            def handle(connection):
                with connection:
                    connection.recv(16)
                    connection.sendall(bn(x).tobytes()[:64])
            with ThreadPoolExecutor(4) as threads:
                for _ in range(25):
                    threads.submit(handle, listener.accept()[0])
            return True
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                try:
                    serve()
                finally:
                    os._exit(0)
            pids.append(pid)
        def request(_):
            with socket.create_connection(listener.getsockname()) as connection:
                connection.sendall(b"x")
                got = b""
                while len(got) < 64:
                    got += connection.recv(64)
                return got
        with ThreadPoolExecutor(8) as clients:
            assert all(got == answer for got in clients.map(request, range(75)))
        assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    """)


@pytest.mark.slow
def test_concurrent_callers() -> None:
    """Eight threads, all operations, different shapes, for 30 seconds: every result is that of a quiet call."""
    shapes = [
        (8, 64, 28, 28), (1, 3, 200, 200), (16, 100, 7, 7), (4, 17, 33, 31),
        (1, 256, 28, 28), (64, 300, 1, 1), (2, 2, 5, 5), (3, 48, 40, 40),
    ]  # fmt: skip
    until = time.monotonic() + 30
    wrong: list[str] = []
    rounds = [0] * len(shapes)

    def step(x: np.ndarray, layout: str) -> list[np.ndarray]:
        y, saved = fastbn.batch_norm_forward(x, layout=layout)
        gradients = fastbn.batch_norm_backward(y, x, saved)
        stats = fastbn.batch_norm_stats(x, layout=layout)
        frozen = fastbn.batch_norm(x, stats.mean, stats.var, layout=layout)
        return [a for a in (y, frozen, stats.var, *gradients) if a is not None]

    def work(index: int) -> None:
        layout = "NHWC" if index % 2 else "NCHW"
        x = np.random.default_rng(index).normal(index, 1, shapes[index]).astype(np.float64 if index == 4 else np.float32)
        with fastbn.num_threads(1):
            expected = step(x, layout)
        with fastbn.num_threads(1 + index % 4):
            while time.monotonic() < until:
                rounds[index] += 1
                if not all(np.array_equal(a, e) for a, e in zip(step(x, layout), expected, strict=True)):
                    wrong.append(f"{shapes[index]} {layout}")

    callers = [threading.Thread(target=work, args=(i,)) for i in range(len(shapes))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []
    assert min(rounds) > 2


def test_exit_while_computing() -> None:
    """The interpreter ends although a daemon thread is inside a call."""
    run(
        """
        threading.Thread(target=lambda: [step() for _ in range(10_000)], daemon=True).start()
    """,
        timeout=60,
    )


def test_interrupt_leaves_things_usable() -> None:
    script = """
        import signal, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of a background job may ignore it
        def interrupt():
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            while True:
                step()
        except KeyboardInterrupt:
            pass
        assert step() == expected
        print("usable")
    """
    assert "usable" in run(script)


def test_workers_block_signals() -> None:
    """A signal reaches the thread that Python handles it in, never a worker."""
    with fastbn.num_threads(3):
        fastbn.batch_norm_stats(np.ones((8, 64, 40, 40), np.float32))
    masks = [
        int(line.split()[1], 16)
        for status in Path("/proc/self/task").glob("*/status")
        for line in status.read_text().splitlines()
        if line.startswith("SigBlk") and int(status.parent.name) != os.getpid()
    ]
    blocked = [mask for mask in masks if mask >> (signal.SIGINT - 1) & 1]
    assert len(blocked) >= pool.workers() >= 2


def test_idle_workers_cost_nothing() -> None:
    """10 ms after a call, no thread of the pool uses the processor."""
    script = """
        import time
        from pathlib import Path
        def used():
            tasks = [t for t in Path("/proc/self/task").iterdir() if int(t.name) != os.getpid()]
            return {t.name: (t / "schedstat").read_text().split()[0] for t in tasks}
        for _ in range(20):
            step()
        time.sleep(0.01)
        before = used()
        time.sleep(0.5)
        assert len(before) >= 2 and used() == before, (before, used())
    """
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel has no schedstat")
    run(script, OPENBLAS_NUM_THREADS="1")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_cores_of_the_process_may_change_between_calls() -> None:
    """Of the calling thread, of all threads, to one core and back; in a child too."""
    run("""
        import time
        everywhere = os.sched_getaffinity(0)
        def everybody():
            return [int(task) for task in os.listdir("/proc/self/task")]
        def right():
            time.sleep(0.002)  # the workers sleep
            return step() == expected
        def work():
            for _ in range(5):
                for cores in ({core} for core in sorted(everywhere)[:3]), [everywhere]:
                    for chosen in cores:
                        os.sched_setaffinity(0, chosen)
                        assert right() and right()
                        for thread in everybody():
                            os.sched_setaffinity(thread, chosen)
                        assert right() and right()
                        assert os.sched_getaffinity(0) == chosen
            return True
        assert work() and child(work) == 0 and work()
    """)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_have_a_name() -> None:
    found = run("""
        from pathlib import Path
        print(*sorted(comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")))
    """)
    assert found.split().count("fastbn") == 2


def test_workers_sleep_and_waking_them_is_measured() -> None:
    run("""
        import time
        from fastbn.kernels import _pool
        assert 0 <= _pool.awake() <= _pool.workers() == 2

        def wait():
            for _ in range(1000):
                time.sleep(0.01)
                if _pool.awake() == 0:
                    return
            raise AssertionError("the workers do not sleep")

        wait()
        before = _pool.waking()
        for _ in range(50):
            time.sleep(0.01)
            step()
        wait()  # a worker may come after its call is done, and is measured then
        after = _pool.waking()
        assert before.keys() == after.keys() == {"cost", "delay", "worth"}
        assert abs(after["worth"] - 2 * (after["cost"] + after["delay"])) < 1e-12  # seconds, of whole nanoseconds
        assert fastbn.show_config()["waking"] == after
        assert f"woken for {after['worth'] * 1e6:.0f} us of work" in fastbn.explain("forward", x)
        assert "woken" not in fastbn.explain("forward", x[:1, :, :2])
        assert all(0 < seconds <= 1e-2 for seconds in (*before.values(), *after.values()))
    """)


def test_more_threads_than_can_start() -> None:
    """Where threads cannot be started, the call runs on those there are."""
    run("""
        import resource
        count = len(os.listdir("/proc/self/task"))
        resource.setrlimit(resource.RLIMIT_NPROC, (count, count))
        os.setuid(65534) if os.getuid() == 0 else None
        fastbn.set_num_threads(64)
        assert step() == expected
    """)


def test_scratch_memory_goes_with_its_thread() -> None:
    """100 threads one after the other, each with 900 KB of it."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    run("""
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        x = np.ones((4, 8000), np.float32)
        def once():
            thread = threading.Thread(target=fastbn.batch_norm_forward, args=(x,))
            thread.start()
            thread.join()
        once()
        before = resident()
        for _ in range(100):
            once()
        assert resident() - before < 10 << 20, resident() - before
    """)


def test_released_memory_includes_scratch_memory() -> None:
    fastbn.release_memory()
    fastbn.batch_norm_stats(np.ones((4, 5000), np.float32))
    assert fastbn.release_memory() >= 5000 * 8
    assert fastbn.release_memory() == 0


class FloatEnvironment:
    """The floating-point environment of this thread, through the C library."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.before = (ctypes.c_uint32 * 64)()
        self.library.fegetenv(self.before)

    def round(self, direction: int) -> None:
        assert self.library.fesetround(direction) == 0

    def flush(self) -> None:
        """Let subnormal numbers count as zero, and be made zero."""
        changed = (ctypes.c_uint32 * 64)(*self.before)
        if platform.machine() == "x86_64":
            changed[7] |= 0x8040
        else:
            changed[0] |= 1 << 24
        self.library.fesetenv(changed)

    def restore(self) -> None:
        self.library.fesetenv(self.before)


UPWARD = {"x86_64": 0x800, "aarch64": 0x400000}
MODES: dict[str, Callable[[FloatEnvironment], None]] = {
    "flush to zero": FloatEnvironment.flush,
    "round up": lambda environment: environment.round(UPWARD[platform.machine()]),
}


@pytest.mark.skipif(platform.machine() not in UPWARD or sys.platform != "linux", reason="knows Linux on x86-64 and aarch64 alone")
@pytest.mark.parametrize("change", MODES.values(), ids=MODES)
@pytest.mark.parametrize("n", [1, 2])
def test_the_callers_floating_point_mode_changes_nothing(n: int, change: Callable[[FloatEnvironment], None]) -> None:
    """Sixty equal calls give the result of the default mode, and leave the caller's as it is."""
    x = (np.random.default_rng(0).normal(size=(4, 64, 40, 40)) * 1e-39).astype(np.float32)
    mean, ones = np.full(64, 1e-40, np.float32), np.ones(64, np.float32)
    with fastbn.num_threads(n):
        expected = fastbn.batch_norm(x, mean, ones, eps=0.0)
        environment = FloatEnvironment()
        try:
            change(environment)
            mode = pool.set_float_mode()
            pool.set_float_mode(mode)
            results = [fastbn.batch_norm(x, mean, ones, eps=0.0) for _ in range(60)]
            after = pool.set_float_mode(mode)
        finally:
            environment.restore()
    assert after & ~0x3F == mode & ~0x3F != pool.set_float_mode() & ~0x3F
    assert all(np.array_equal(result.view(np.int32), expected.view(np.int32)) for result in results)


def _every_result(x: Array, dy: Array, mask: Array, vectors: list[Array]) -> list[bytes]:
    """The bits of all kinds of calls; some go through NumPy."""
    wide, half = ([v.astype(dtype) for v in vectors[:2]] for dtype in (np.float64, np.float16))
    stats = fastbn.batch_norm_stats(x)
    found: list[Any] = [stats.mean, stats.var, stats.mean_lo, *stats.merge(stats).to_arrays()]
    kinds: tuple[dict[str, Any], ...] = ({}, {"mask": mask}, {"activation": "relu", "residual": dy}, {"training": False})
    for running, options in zip((wide, half, wide, wide), kinds, strict=True):
        y, saved = fastbn.batch_norm_forward(x, *vectors[2:], *running, **options)
        found += [y, *running, saved.invstd, saved.scale, saved.shift]
        found += [fastbn.batch_norm_backward(dy, x, saved, wrt=wrt) for wrt in ("x", "weight", "bias")]
    frozen = fastbn.FrozenBatchNorm(*vectors)
    found += [frozen(x), frozen.scale, frozen.shift, fastbn.batch_norm(x, *vectors), fastbn.batch_norm_elemt(x, *vectors)]
    found += fastbn.batch_norm_backward_reduce(dy, x, *vectors[:2])
    found.append(fastbn.batch_norm_backward_elemt(dy, x, *vectors[:2], None, *vectors[2:], 48))
    for norm, first in ((fastbn.instance_norm_forward, wide), (fastbn.group_norm_forward, (1,))):
        found.append(norm(x, *first, *vectors[2:])[0])
    for norm in (fastbn.layer_norm_forward, fastbn.rms_norm_forward):
        y, saved = norm(x, x.shape[-1])
        found += [y, saved.invstd]
    for variant, before, backward in (
        (fastbn.batch_channel_norm_forward, vectors[:1], fastbn.batch_channel_norm_backward),
        (fastbn.batch_renorm_forward, (), fastbn.batch_renorm_backward),
        (fastbn.ghost_batch_norm_forward, (), fastbn.ghost_batch_norm_backward),
    ):
        y, saved = variant(x, *wide, *before, *vectors[2:], True)
        found += [y, *wide, *backward(dy, x, saved)]
    flat = [a for one in found for a in (one if isinstance(one, tuple) else (one,)) if a is not None]
    return [np.asarray(a).tobytes() for a in flat]


@pytest.mark.skipif(platform.machine() not in UPWARD or sys.platform != "linux", reason="knows Linux on x86-64 and aarch64 alone")
@pytest.mark.parametrize("change", MODES.values(), ids=MODES)
@pytest.mark.usefixtures("kernel")
def test_no_call_depends_on_the_callers_floating_point_mode(change: Callable[[FloatEnvironment], None]) -> None:
    x, dy = np.random.default_rng(0).normal(3, 2, size=(2, 4, 5, 6, 7)).astype(np.float32)
    x[:, 0] *= np.float32(1e-38)
    given = x, dy, x[:, 1] > 3, [np.linspace(0.1 + i, 1.7 + i, 5) for i in range(4)]
    expected = _every_result(*given)
    environment = FloatEnvironment()
    try:
        change(environment)
        found = _every_result(*given)
    finally:
        environment.restore()
    assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b] == []


def test_bits_that_the_processor_knows_nothing_of_are_left_out() -> None:
    """They would end the process."""
    before = pool.set_float_mode()
    pool.set_float_mode(0xFFFFFFFF)
    pool.set_float_mode()
    pool.set_float_mode(before)
    with pytest.raises((OverflowError, TypeError)):
        pool.set_float_mode("up")


def test_a_copy_goes_to_no_memory_that_is_not_to_be_written() -> None:
    """Nor does it copy Python's objects, which nobody would count; a few bytes for many threads are copied."""
    fixed, source = np.frombuffer(bytes(64), np.uint8), np.ones(64, np.uint8)
    objects = np.array([object()])
    for wrong in ((source, fixed), (objects, objects.copy()), (source[:8], np.empty(1, object)), (source, None), (source, source[1:])):
        with pytest.raises((TypeError, ValueError)):
            pool.copy(*wrong, 1)
    assert not fixed.any()
    pool.copy(source, to := np.zeros(64, np.uint8), 1000)
    assert to.all()


def test_second_interpreter() -> None:
    """A sub-interpreter either works or refuses to import; it does not crash."""
    pytest.importorskip("_xxsubinterpreters")
    run("""
        import _xxsubinterpreters as interpreters
        i = interpreters.create()
        try:
            interpreters.run_string(i, "import fastbn.kernels._pool")
        except interpreters.RunFailedError:
            pass
        interpreters.destroy(i)
        assert step() == expected
    """)


def compiler() -> list[str]:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler")
    return shlex.split(found)  # CXX may be several words


def test_thread_sanitizer(tmp_path: Path) -> None:
    kernels = ROOT / "fastbn" / "kernels"
    program = tmp_path / "pool_test"
    subprocess.run(
        [
            *compiler(), "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{kernels}", "-o", program,
            ROOT / "tests" / "pool_test.cpp", kernels / "pool.cpp", kernels / "scratch.cpp",
        ],
        check=True,
    )  # fmt: skip
    # Who is woken, and where, other processes may disturb: one undisturbed run of a few will do. A race never will.
    printed = []
    while len(printed) < 4 and not any("wrong: 0" in text for text in printed):
        result = subprocess.run([program], capture_output=True, text=True, timeout=120)
        assert "WARNING: ThreadSanitizer" not in result.stderr
        printed.append(result.stdout)
    assert "wrong: 0" in printed[-1], printed
    assert result.returncode == 0, result.stderr
