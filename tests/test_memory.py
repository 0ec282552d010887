"""Recycled outputs: who shares memory with whom and when, how much there is, and threads, forks and finalizers."""

from __future__ import annotations

import copy
import errno
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import fastbn
from fastbn import memory
from fastbn.dtypes import DTYPES

MIB = 1 << 20


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty pool of 64 MiB; outputs that other tests left alive are not counted."""
    memory.release()
    monkeypatch.setattr(memory, "_limit", 64 * MIB)
    monkeypatch.setattr(memory, "_lent", {})
    yield
    memory.release()


def new(mib: float = 4) -> np.ndarray:
    return memory.empty_like(np.broadcast_to(np.float32(0), (int(mib * MIB) // 4,)), "C")


def address(y: np.ndarray) -> int:
    return y.ctypes.data


def run(script: str, timeout: float = 120, **environment: str) -> str:
    """Run a script in a process of its own, which must end well, in time and without complaint; return what it prints."""
    prelude = """
        import gc, os, sys, threading, time
        import numpy as np
        from fastbn import memory
        x = np.broadcast_to(np.float32(0), (1 << 20,))
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(script)
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


# What comes out is what NumPy would make.


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("order", ["K", "C"])
def test_dtypes(name: str, order: Any) -> None:
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    x = np.ones((3, 5, 131, 1021), dtype).transpose(0, 2, 3, 1)
    y, z = memory.empty_like(x, order), np.empty_like(x, order=order)
    assert memory.statistics()["in_use"] >= y.nbytes
    assert (type(y), y.shape, y.strides, y.dtype) == (np.ndarray, z.shape, z.strides, dtype)
    assert address(y) % 64 == 0
    flags = ("WRITEABLE", "ALIGNED", "C_CONTIGUOUS", "F_CONTIGUOUS", "WRITEBACKIFCOPY")
    assert [y.flags[flag] for flag in flags] == [z.flags[flag] for flag in flags]
    y[...] = x
    assert (y == x).all()
    y.flags.writeable = False
    y.flags.writeable = True


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from([1, 2, -1])), min_size=1, max_size=5), st.randoms(), st.sampled_from("KC"))
def test_memory_order(monkeypatch: pytest.MonkeyPatch, axes: list[tuple[int, int]], random: Any, order: Any) -> None:
    """Any shape, with axes of length 0 and 1, any order of the axes, with gaps and backwards."""
    monkeypatch.setattr(memory, "SMALLEST", 8)
    x = np.zeros([length for length, _ in axes])[tuple(slice(None, None, step) for _, step in axes)]
    x = x.transpose(random.sample(range(x.ndim), x.ndim))
    y, z = memory.empty_like(x, order), np.empty_like(x, order=order)
    assert (y.shape, y.strides) == (z.shape, z.strides)


def test_small_outputs_are_numpys_own() -> None:
    x = np.zeros(MIB - 1, np.uint8)
    assert memory.empty_like(x).flags.owndata
    assert not memory.empty_like(np.append(x, x[:1])).flags.owndata


def test_subclass_gives_a_plain_array() -> None:
    x = np.ma.zeros((512, 1024))
    assert type(memory.empty_like(x)) is np.ndarray


# Who has the memory.


def test_memory_is_recycled() -> None:
    y = new()
    first = address(y)
    assert address(new()) != first
    del y
    y = new()
    assert address(y) == first
    assert memory.statistics()["idle"] == 4 * MIB


def test_sizes_that_differ_a_little_share() -> None:
    first = address(new(4))
    assert address(new(3.8)) == first
    assert address(new(3.7)) != first
    assert address(new(4.1)) != first


@pytest.mark.parametrize("mib", [1, 1.01, 1.9, 2, 37.7, 63])
def test_a_buffer_is_big_enough(mib: float) -> None:
    y = new(mib)
    y[...] = 1
    assert y.nbytes <= memory.statistics()["in_use"] <= y.nbytes * 9 / 8


HOLDERS: dict[str, Callable[[np.ndarray], object]] = {
    "slice": lambda y: y[5:7],
    "reshape": lambda y: y.reshape(2, -1).T,
    "dtype": lambda y: y.view(np.uint8)[1:],
    "subclass": lambda y: y.view(np.recarray),
    "memoryview": memoryview,
    "part of a memoryview": lambda y: memoryview(y)[8:],
    "frombuffer": lambda y: np.frombuffer(y, np.int32),
    "ndarray": lambda y: np.ndarray(4, np.int32, y),
    "ctypes": lambda y: np.ctypeslib.as_ctypes(y),
    "dlpack": np.from_dlpack,
    "pickle": pickle.PickleBuffer,
    "base": lambda y: y.base,
    "slice of base": lambda y: y.base[5:7],
    "strided base": lambda y: np.lib.stride_tricks.as_strided(y.base, (5,), subok=True),
    "iterator": lambda y: y.flat,
    "cycle": lambda y: [y],
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_views_keep_the_buffer(hold: Callable[[np.ndarray], object]) -> None:
    y = new()
    first = address(y)
    held = hold(y)
    del y
    assert address(new()) != first
    assert memory.statistics()["in_use"] == 4 * MIB
    if isinstance(held, list):
        held.append(held)
    del held
    gc.collect()
    assert memory.statistics() | {"hits": 0, "misses": 0} == {"in_use": 0, "idle": 8 * MIB, "limit": 64 * MIB, "hits": 0, "misses": 0}
    assert first in {address(new()), *map(address, (new(), new()))}


def test_what_a_finalizer_brings_back_keeps_the_buffer() -> None:
    """The garbage collector tells of the end of what it finds in a cycle before finalizers run, which may go on using it."""
    alive: list[Any] = []

    class Job:
        def __init__(self, memory: Any) -> None:
            self.memory, self.itself = memory, self

        def __del__(self) -> None:
            alive.append(self.memory)

    y = memory.empty_like(np.ones((1024, 1024), np.float32))
    y[...] = 1
    Job(y.base)
    del y
    gc.collect()
    other = memory.empty_like(np.ones((1024, 1024), np.float32))
    assert not np.shares_memory(alive[0], other)


def test_copies_do_not_give_the_buffer_back() -> None:
    y = new()
    loan = y.base
    assert loan is not None
    copies = [loan.copy(), copy.copy(loan), copy.deepcopy(loan), loan[1:].copy(), np.empty_like(loan), loan + 1]
    copies.append(pickle.loads(pickle.dumps(loan)))  # noqa: S301
    del copies
    assert (memory.statistics()["in_use"], memory.statistics()["idle"]) == (4 * MIB, 0)
    del loan, y
    assert (memory.statistics()["in_use"], memory.statistics()["idle"]) == (0, 4 * MIB)


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_outputs_of_the_library_are_recycled(order: str) -> None:
    x = np.ones((4, 32, 64, 64), np.float32)
    if order == "NHWC":
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    ones = np.ones(32, np.float32)
    first = address(fastbn.batch_norm(x, ones, ones))
    y, saved = fastbn.batch_norm_forward(x)
    assert address(y) == first
    assert y.strides == x.strides
    del y
    gradients = fastbn.batch_norm_backward(x, x, saved)
    assert gradients.dx is not None
    assert address(gradients.dx) == first
    assert memory.statistics()["in_use"] == x.nbytes


# How much there is.


def test_idle_memory_is_bounded() -> None:
    held = [new(mib) for mib in (8, 16, 24, 8, 16, 24, 40)]
    while held:
        held.pop(0)
        assert memory.statistics()["idle"] <= 64 * MIB
    assert memory.statistics()["idle"] >= 40 * MIB


def test_idle_for_longest_goes_first() -> None:
    a, b, c = new(16), new(24), new(16)
    first, third = address(a), address(c)
    del a, b
    a = new(16)
    assert address(a) == first  # now b is idle for longest
    del c
    assert memory.statistics()["idle"] == 40 * MIB
    new(20)  # all together 76 MiB: too much
    assert memory.statistics()["idle"] == 36 * MIB
    assert address(new(16)) == third
    misses = memory.statistics()["misses"]
    new(24)
    assert memory.statistics()["misses"] == misses + 1


def test_idle_for_longest_goes_first_among_equals() -> None:
    held = [new(16) for _ in range(4)]
    third, fourth = map(address, held[2:])
    while held:
        held.pop(0)
    new(24)  # leaves room for two of them
    a, b = new(16), new(16)
    assert (address(a), address(b)) == (fourth, third)


def test_memory_beyond_the_limit_is_not_recycled() -> None:
    held = [new(40), new(40)]
    assert memory.statistics()["in_use"] == 80 * MIB
    del held[:]
    assert memory.statistics()["in_use"] == 0
    assert memory.statistics()["idle"] == 40 * MIB


def test_outputs_above_the_limit_are_numpys_own() -> None:
    assert new(65).flags.owndata
    assert not new(64).flags.owndata


def test_release() -> None:
    y = new(8)
    held, view = new(4), y[:5]
    del y
    assert memory.release() == 0
    held[...] = 3
    del view
    assert memory.release() == 8 * MIB
    assert memory.statistics()["idle"] == 0
    assert (held == 3).all()


def test_statistics() -> None:
    before = memory.statistics()
    y = new(8)
    new(4)
    new(4)
    after = memory.statistics()
    assert y.nbytes == after["in_use"] == 8 * MIB
    assert (after["idle"], after["limit"]) == (4 * MIB, 64 * MIB)
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (1, 2)
    assert fastbn.show_config()["memory"] == after


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle memory goes before an output fails for want of memory."""
    new(4)
    real, failures = memory.mmap.mmap, [1, 2, 3]

    def fail(*args: Any, **keywords: Any) -> Any:
        if failures:
            failures.pop()
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(*args, **keywords)

    monkeypatch.setattr(memory.mmap, "mmap", fail)
    with pytest.raises(MemoryError, match="output of 8388608 bytes"):
        new(8)
    assert memory.statistics()["idle"] == 0
    new(8)
    assert memory.statistics()["idle"] == 8 * MIB


LIMITED = """
    import resource
    import numpy as np
    import fastbn
    x, out = np.ones((1 << 24, 1), np.float32), np.zeros((1 << 24, 1), np.float32)
    x[::2] = 0
    stats, mask = fastbn.batch_norm_stats(x), np.ones(1, bool)
    mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    fastbn.batch_norm_forward(x[:8], mask=mask, stats=stats)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20),) * 2)
    try:
        fastbn.batch_norm_forward(x, None, None, mean, var, mask=mask, stats=stats, out=out)  # whose mask of x is 16 MiB
    except MemoryError:
        print(out.any(), mean, var)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_the_mask_that_a_backward_needs_is_copied_before_anything_is_written() -> None:
    assert run(LIMITED, FASTBN_NUM_THREADS="1") == "False [0.] [1.]\n"


PEAK = """
    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) << 10
    def use(mib):
        y = memory.empty_like(np.broadcast_to(np.uint8(0), (mib << 20,)), "C")
        y.fill(1)
        return y
    before = peak()
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@linux
def test_peak_memory_of_a_loop() -> None:
    """One output at a time: one buffer."""
    grown = int(run(PEAK + "    for _ in range(50): use(32)\n    print(peak() - before)"))
    assert 30 * MIB < grown < 40 * MIB


@linux
def test_peak_memory_is_bounded() -> None:
    """Many sizes: what is in use and the pool's limit."""
    script = "    for i in range(60): use(8 + i % 17)\n    print(peak() - before)"
    assert int(run(PEAK + script, FASTBN_POOL_BYTES=str(1 << 40))) > 150 * MIB
    assert int(run(PEAK + script, FASTBN_POOL_BYTES=str(64 * MIB))) < (64 + 24 + 12) * MIB


@linux
def test_released_memory_is_the_systems() -> None:
    script = """
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    before = resident()
    held = [use(16) for _ in range(4)]
    assert resident() - before > 60 << 20
    del held
    assert resident() - before > 60 << 20
    assert memory.release() == 64 << 20
    assert resident() - before < 4 << 20
    """
    run(PEAK + script, FASTBN_POOL_BYTES=str(64 * MIB))


def test_limit_from_the_environment() -> None:
    assert run("print(memory.limit(), memory.statistics()['limit'])", FASTBN_POOL_BYTES="3M") == f"{3 * MIB} {3 * MIB}\n"


def test_zero_turns_recycling_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limit", 0)
    before = memory.statistics()
    assert new().flags.owndata
    assert memory.statistics() == before


@pytest.mark.parametrize(("group", "limit"), [(None, 1 << 28), (1 << 30, 1 << 25), (1 << 40, 1 << 28)])
def test_default_limit(monkeypatch: pytest.MonkeyPatch, group: int | None, limit: int) -> None:
    """A 32nd of the machine's memory, or of the group's if that is less."""
    monkeypatch.setattr(memory, "_limit", None)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 21, "SC_PAGE_SIZE": 1 << 12}.__getitem__)
    monkeypatch.setattr(memory, "group_limit", lambda: group)
    assert memory.limit() == limit


def test_default_limit_of_a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limit", None)
    monkeypatch.setattr(memory, "_available", lambda: 1 << 40)
    assert memory.limit() == 1 << 30


# Idle memory is given back after a while.


def test_a_look_gives_back_what_was_idle_for_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(memory.time, "monotonic", lambda: now)
    held = [new(4), new(4), new(8)]
    del held[1:]
    memory._look()  # learns of what died, and cannot know when
    assert memory.statistics()["idle"] == 12 * MIB
    now += memory.PERIOD / 2
    new(4)  # one of them is used again
    now += memory.PERIOD / 2
    memory._look()
    assert memory.statistics()["idle"] == 4 * MIB
    now += memory.PERIOD
    memory._look()
    assert memory.statistics() | {"hits": 0, "misses": 0} == {"in_use": 4 * MIB, "idle": 0, "limit": 64 * MIB, "hits": 0, "misses": 0}


def test_a_buffer_in_use_again_and_again_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(memory.time, "monotonic", lambda: now)
    first = address(new())
    for _ in range(10):
        now += 0.9 * memory.PERIOD
        memory._look()
        assert address(new()) == first


@linux
def test_a_burst_is_given_back_though_no_call_follows() -> None:
    """The thread that does it ends, starts again with the next buffer, in the child of a fork too, and holds up no exit."""
    script = """
    memory.PERIOD = 0.05
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    def burst():
        before = resident()
        held = [use(16) for _ in range(4)]
        assert resident() - before > 60 << 20
        del held
        until = time.monotonic() + 60
        while (resident() - before > 4 << 20 or memory._next_look) and time.monotonic() < until:
            time.sleep(0.01)
        assert resident() - before < 4 << 20
        assert memory._next_look == 0
    burst()
    burst()
    use(16)  # so that there is a thread, which the child does not have
    pid = os.fork()
    if pid == 0:
        try:
            burst()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    memory.PERIOD = 1000
    kept = use(16)
    """
    run(PEAK + script, FASTBN_POOL_BYTES=str(64 * MIB))


IN_SUBINTERPRETER = """
    import sys
    if sys.version_info < (3, 13):
        import _xxsubinterpreters as interpreters
        one, execute = interpreters.create(isolated=False), interpreters.run_string
    else:
        import _interpreters as interpreters
        one, execute = interpreters.create("legacy"), interpreters.exec
    work = "y = memory.empty_like(np.empty((1 << 20), np.float32)); memory._look(); y = None; memory._look()"
    error = execute(one, f"import numpy as np; from fastbn import memory; {work}")
    interpreters.destroy(one)
    print("destroyed", error)
"""


@pytest.mark.skipif(memory._pool is None, reason="needs the compiled pool, which knows the interpreters")
def test_a_subinterpreter_can_end() -> None:
    """A thread that is left there would abort the process."""
    # NumPy warns that it is in one.
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(IN_SUBINTERPRETER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "destroyed None\n"), done.stderr


def test_where_no_thread_can_start_calls_give_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    now = 1000.0
    monkeypatch.setattr(memory.time, "monotonic", lambda: now)
    monkeypatch.setattr(memory, "_next_look", 0.0)
    monkeypatch.setattr(memory._thread, "start_new_thread", refuse)
    new(8)
    now += 3 * memory.PERIOD
    new(4)  # finds the larger one dead
    now += 3 * memory.PERIOD
    new(4)
    assert memory.statistics()["idle"] == 4 * MIB


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("files", "group"),
    [
        ({"a/b/memory.max": "max", "a/memory.max": "3000"}, "0::/a/b"),
        ({"memory/a/memory.limit_in_bytes": "3000", "memory/memory.limit_in_bytes": "9223372036854771712"}, "2:cpu:/x\n3:memory:/a"),
        ({"memory.max": "3000"}, "0::/kubepods/pod1"),
        ({"memory/memory.limit_in_bytes": "3000"}, "4:memory:/docker/0123"),
        ({"memory.max": "max"}, "0::/"),
        ({}, None),
    ],
    ids=["v2", "v1", "container v2", "container v1", "no limit", "no groups"],
)
def test_group_limit(tmp_path: Path, files: dict[str, str], group: str | None) -> None:
    for name, text in files.items():
        write((tmp_path / "fs" / name).parent, **{Path(name).name: text + "\n"})
    if group is not None:
        write(tmp_path, cgroup=group + "\n")
    expected = 3000 if any(text == "3000" for text in files.values()) else None
    assert memory.group_limit(str(tmp_path / "fs"), str(tmp_path / "cgroup")) == expected


# Threads, finalizers, signals, forks, exit.


def test_no_python_code_runs_where_an_output_dies() -> None:
    """An interrupt that arrived there would be ignored."""
    calls: list[Any] = []
    y = new()
    sys.setprofile(lambda frame, event, arg: calls.append((event, arg)))
    try:
        del y
    finally:
        sys.setprofile(None)
    assert [event for event, _ in calls if event == "call"] == []
    assert memory.statistics()["idle"] == 4 * MIB


@pytest.fixture
def busy_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_never_share_a_live_buffer(monkeypatch: pytest.MonkeyPatch, busy_switching: None) -> None:
    """Buffers of a few sizes are taken, filled, passed on and checked, under a limit that keeps evicting."""
    monkeypatch.setattr(memory, "_limit", 6 * MIB)
    wrong: list[object] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        held: list[np.ndarray] = []
        for step in range(300):
            y = new(float(rng.choice([1, 1.25, 1.5])))[::256]
            y[...] = 1000 * number + step
            held.append(y)
            if len(held) > 3:
                y = held.pop(int(rng.integers(3)))
                if not (y == y[0]).all() or y[0] // 1000 != number:
                    wrong.append(y)
            if step % 50 == 0:
                memory.release()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    statistics = memory.statistics()
    assert statistics["in_use"] == 0
    assert statistics["idle"] <= 6 * MIB


class Finalizer:
    """Part of a cycle; its finalizer makes an output while another is being made or dies."""

    ran = 0

    def __init__(self) -> None:
        self.me = self
        self.y = new(1)

    def __del__(self) -> None:
        Finalizer.ran += 1
        new(1)[0] = 2
        self.y[0] = 2


def test_garbage_collection_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_limit", 4 * MIB)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            y = new(1)
            y[:] = 1
            Finalizer()
            z = new(1)
            z[:] = 1
            assert (y == 1).all()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    del y, z
    assert Finalizer.ran == 300
    assert memory.statistics()["in_use"] == 0
    assert memory.statistics()["idle"] <= 4 * MIB


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")
def test_signals_in_the_middle() -> None:
    handled = []

    def handler(*_: object) -> None:
        new(1)[0] = 2
        handled.append(1)
        signal.setitimer(signal.ITIMER_REAL, 1e-4)  # one at a time: on a slow machine a repeating one would nest

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 1e-4)
    try:
        stop = time.monotonic() + 0.5
        while time.monotonic() < stop:
            y = new(1)
            y[:8] = 1
            z = new(1)
            z[:8] = 1
            assert (y[:8] == 1).all()
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    del y, z
    assert handled
    assert memory.statistics()["in_use"] == 0


def test_a_ticket_that_was_lost_is_found() -> None:
    """An interrupt may arrive between two operations of which the first took the ticket of a dead output from its list."""
    y = new()
    del y
    memory._returned.clear()
    assert (memory.statistics()["in_use"], memory.statistics()["idle"]) == (0, 4 * MIB)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")
def test_handlers_that_raise_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is raised, nothing stays lent, and there is no more idle memory than there may be."""
    monkeypatch.setattr(memory, "_limit", 6 * MIB)

    def handler(*_: object) -> None:
        raise TimeoutError

    def use(step: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 1e-6 + step % 50 * 1e-6)
        for i in range(100):
            new(1 + i % 3 / 4)[0] = 1
        memory.release()
        until = time.monotonic() + 60
        while time.monotonic() < until:  # the interrupt may still be under way
            pass

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        for step in range(2000):
            with pytest.raises(TimeoutError):
                use(step)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert memory.statistics()["in_use"] == 0
    assert memory.statistics()["idle"] <= 6 * MIB


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_while_threads_allocate() -> None:
    """Children start with nothing idle, do not hang, and do not write into what the parent holds."""
    run("""
        stop = threading.Event()
        def churn():
            while not stop.is_set():
                memory.empty_like(x)[::1024] = 1
        others = [threading.Thread(target=churn, daemon=True) for _ in range(3)]
        for other in others:
            other.start()
        mine = memory.empty_like(x)
        mine[:] = 7
        memory.empty_like(np.broadcast_to(x, (2, len(x))), "C")  # a size that stays idle
        for _ in range(30):
            pid = os.fork()
            if pid == 0:
                ok = memory.statistics()["idle"] == 0 and (mine == 7).all()
                mine[:] = 8
                y = memory.empty_like(x)
                at = y.ctypes.data
                y[:] = 9
                del y
                os._exit(not (ok and memory.empty_like(x).ctypes.data == at))
            assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        for other in others:
            other.join()
        assert (mine == 7).all()
        assert memory.statistics()["idle"] > 0
    """)


def test_exit_with_outputs_alive() -> None:
    """In a global, a cycle, another module, a default argument, a class, and a thread that never ends."""
    run("""
        import builtins, json
        builtins.modules = memory, json
        json.names, json.kept = vars(memory), memory.empty_like(x)  # dies when the names of memory are gone
        y = memory.empty_like(x)
        cycle = [memory.empty_like(x)]
        cycle.append(cycle)
        builtins.kept = memory.kept = sys.kept = memory.empty_like(x)
        def f(y=memory.empty_like(x)): pass
        class Keeper:
            kept = memory.empty_like(x)
            def __del__(self):
                self.kept = memory.empty_like(x)
        keeper = builtins.keeper = Keeper()
        def forever():
            while True:
                memory.empty_like(x)
        threading.Thread(target=forever, daemon=True).start()
        time.sleep(0.05)
    """)
