"""How many threads there are, and that their number never changes a bit."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ways import take_the_checked_way

import fastbn
from fastbn import core, sync, threads
from fastbn.activations import Epilogue, lookup
from fastbn.dispatch import TABLE, Kernel
from fastbn.kernels.protocol import Affine, Calls, Running, Statistics

# Awkward sizes: one channel, one image, few channels, planes of several tiles, rows that are gathered, short last rows.
SHAPES = [
    (2, 3, 1, 1), (1, 1, 211, 307), (1, 3, 181, 211), (3, 2, 129, 131), (5, 17, 7, 7), (33, 65, 3, 3),
    (300, 24, 2, 2), (4, 100, 13, 11), (1, 67, 31, 33), (700, 129, 1, 1), (6, 1000, 2, 3), (5, 640, 4, 4),
]  # fmt: skip
MODULES = [k for k in TABLE if k.level is not None and not k.unusable()]


def arrays(shape: tuple[int, ...], layout: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(sum(shape))
    kind: Any = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    x, dy = (rng.normal(3, 2, shape).astype(kind) for _ in range(2))
    if layout == "NHWC":
        x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, dy))
    return x, dy


def as_pattern(a: np.ndarray, layout: str) -> np.ndarray:
    return a.reshape(a.shape[0], a.shape[1], -1) if layout == "NCHW" else a.reshape(-1, a.shape[-1], 1)


def everything(kernel: Kernel, shape: tuple[int, ...], layout: str, dtype: str, n: int, in_place: bool = False) -> list[bytes]:
    """All operations of a kernel on n threads, whatever the size; outputs start as NaN."""
    x, dy = (as_pattern(a, layout) for a in arrays(shape, layout, dtype))
    module = kernel.module()
    compute = np.dtype(np.float64 if dtype == "float64" else np.float32)
    channels = shape[1]
    weight, bias, mean = (np.linspace(low, low + 2, channels, dtype=compute) for low in (0.5, -1, 2))

    def output(source: np.ndarray) -> np.ndarray:
        return source.copy() if in_place else np.full_like(x, np.nan)

    normal, forward, input_gradient, whole_gradient = output(x), output(x), output(dy), output(dy)
    stats = module.stats(x, n)
    module.normalize(normal if in_place else x, normal, mean, weight, bias, n)
    saved = module.forward(forward if in_place else x, forward, Affine(weight, bias), 1e-5, Running(None, None, 0.1, 1), compute, n)
    sums = module.grad_sums(dy, x, mean, n)
    module.grad_input(input_gradient if in_place else dy, x, input_gradient, mean, weight, (bias, weight), n)
    totals = module.backward(whole_gradient if in_place else dy, x, whole_gradient, Statistics(*saved[:3]), weight, n)
    return [a.tobytes() for a in (*stats, normal, *saved, forward, *sums, input_gradient, *totals, whole_gradient)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_same_bits(kernel: Kernel, shape: tuple[int, ...], layout: str, dtype: str) -> None:
    """1, 2, 3, 5, 7 and 16 threads, in place or not."""
    expected = everything(kernel, shape, layout, dtype, 1)
    for n in (2, 3, 5, 7, 16):
        assert everything(kernel, shape, layout, dtype, n) == expected, n
    assert everything(kernel, shape, layout, dtype, 3, in_place=True) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "shape", [(3, 48, 40, 44), (1, 24, 40, 44), (5, 48, 13, 15), (5, 48, 3, 5), (33, 48, 3, 7)], ids=lambda s: "x".join(map(str, s))
)
@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_same_bits_for_other_caches(kernel: Kernel, shape: tuple[int, ...], layout: str, dtype: str) -> None:
    """Caches change the units of work, not the result: tiny ones, which also turn on streaming stores, and huge ones."""
    from fastbn.kernels import _plan as plans

    expected = everything(kernel, shape, layout, dtype, 1)
    try:
        for caches in ((1 << 10, 4 << 10, 16 << 10), (1 << 20, 1 << 26, 1 << 30)):
            plans.set_caches(*caches)
            assert everything(kernel, shape, layout, dtype, 3) == expected
    finally:
        plans.set_caches(*fastbn.cpu.caches())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("dims", [(5, 48, 195), (5, 48, 15), (3, 40, 49), (7, 30, 2), (60, 48, 1)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_same_bits_for_other_caches_with_an_activation(kernel: Kernel, dims: tuple[int, int, int], dtype: str, activation: str) -> None:
    """And with a residual: the whole calls, and a gradient with two outputs, in rows and in planes of a part of a block and of many."""
    from fastbn.kernels import _plan as plans

    rng = np.random.default_rng(0)
    compute = np.dtype("float64" if dtype == "float64" else "float32")
    kind: Any = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    x, dy, residual = (rng.normal(0.1, 1, dims).astype(kind) for _ in range(3))
    weight, bias = (rng.normal(1, 0.2, dims[1]).astype(compute) for _ in range(2))
    module: Any = kernel.module()

    def results(n: int) -> list[bytes]:
        y, dx, dresidual = (np.full_like(x, 7) for _ in range(3))
        after = Epilogue(lookup(activation), residual)
        saved = module.forward(x, y, Affine(weight, bias), 1e-5, Running(None, None, 0.1, 1), compute, n, after)
        after = after._replace(scale=saved[3], shift=saved[4], dresidual=dresidual)
        totals = module.backward(dy, x, dx, Statistics(*saved[:3]), saved[3], n, after)
        return [a.tobytes() for a in (*saved, y, *totals, dx, dresidual)]

    expected = results(1)
    try:
        for caches in ((1 << 10, 4 << 10, 16 << 10), (1 << 20, 1 << 26, 1 << 30)):
            plans.set_caches(*caches)
            assert results(3) == expected
    finally:
        plans.set_caches(*fastbn.cpu.caches())


@pytest.mark.parametrize("groups", [1, 3, 24])
@pytest.mark.parametrize("shape", [(20, 24, 2, 2), (13, 24, 5, 7), (2, 24, 16, 13)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_same_bits_for_other_caches_of_norms_of_parts(kernel: Kernel, shape: tuple[int, ...], groups: int) -> None:
    from fastbn.kernels import _plan as plans

    x, dy = arrays(shape, "NCHW", "float32")
    weight, bias = (np.linspace(low, low + 2, shape[1], dtype=np.float32) for low in (0.5, -1))

    def results(n: int) -> list[bytes]:
        y, saved = fastbn.group_norm_forward(x, groups, weight, bias, threads=n)
        gradients = fastbn.group_norm_backward(dy, x, saved, threads=n)
        return [a.tobytes() for a in (y, *gradients) if a is not None]

    with fastbn.use_kernel(kernel.name):
        expected = results(1)
        try:
            plans.set_caches(1 << 8, 1 << 9, 1 << 10)
            assert results(3) == expected
        finally:
            plans.set_caches(*fastbn.cpu.caches())


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_same_bits_on_every_isa(shape: tuple[int, ...], layout: str, dtype: str) -> None:
    """All ISAs with a fused multiply-add give the same bits."""
    fused = [k for k in MODULES if k.name != "simd_v2"]
    if len(fused) < 2:
        pytest.skip("fewer than two ISA levels with a fused multiply-add can run here")
    expected = everything(fused[0], shape, layout, dtype, 2)
    for kernel in fused[1:]:
        assert everything(kernel, shape, layout, dtype, 2) == expected, kernel.name


def test_public_functions_same_bits() -> None:
    x = np.random.default_rng(0).normal(1, 2, (4, 40, 33, 35)).astype(np.float32)
    results = set()
    for n in (1, 2, 5):
        with fastbn.num_threads(n):
            y, saved = fastbn.batch_norm_forward(x)
            results.add(y.tobytes() + fastbn.batch_norm_backward(x, x, saved).dx.tobytes())  # type: ignore[union-attr]
    assert len(results) == 1


def test_num_threads_is_scoped() -> None:
    before = fastbn.get_num_threads()
    with fastbn.num_threads(5):
        assert fastbn.get_num_threads() == 5
        with fastbn.num_threads(2):
            assert fastbn.get_num_threads() == 2
        assert fastbn.get_num_threads() == 5
    assert fastbn.get_num_threads() == before


@pytest.mark.parametrize("n", [3, np.int64(3), np.uint8(3), np.array(3)], ids=lambda n: type(n).__name__)
def test_any_integer_is_a_number_of_threads(n: Any) -> None:
    with fastbn.num_threads(n):
        assert type(fastbn.get_num_threads()) is int
        assert fastbn.get_num_threads() == 3


def test_a_million_threads_are_as_many_as_there_can_be() -> None:
    """The largest number that is taken works; in a process of its own, because the pool never shrinks."""
    pytest.importorskip("fastbn.kernels._pool", reason="built without a compiler")
    run("""
    from fastbn.kernels import _pool
    x = np.random.default_rng(0).normal(size=(64, 64, 40, 40)).astype(np.float32)
    expected = fastbn.batch_norm_stats(x).var
    fastbn.set_num_threads(1 << 20)
    assert np.array_equal(fastbn.batch_norm_stats(x).var, expected)
    source, copy = np.arange(1 << 18), np.zeros(1 << 18, int)
    _pool.copy(source, copy, 1200)
    assert np.array_equal(source, copy)
    assert _pool.workers() <= 255
    """)


@pytest.mark.parametrize(
    ("n", "error"),
    [
        (0, ValueError), (-1, ValueError), (np.int8(0), ValueError),
        ((1 << 20) + 1, ValueError), (2**31, ValueError), (10**5000, ValueError),
        (2.0, TypeError), (True, TypeError), (np.True_, TypeError), ("2", TypeError), (None, TypeError), (np.array([1, 2]), TypeError),
    ],
    ids=lambda value: repr(value)[:20] if not isinstance(value, int) or value < 2**32 else "enormous",
)  # fmt: skip
def test_wrong_number_of_threads(n: Any, error: type[Exception]) -> None:
    before = fastbn.get_num_threads()
    with pytest.raises(error, match=r"n must be an int.*, got "):
        fastbn.set_num_threads(n)
    with pytest.raises(error, match=r"n must be an int.*, got "), fastbn.num_threads(n):
        pass
    assert fastbn.get_num_threads() == before


def run(code: str, **environment: str) -> str:
    """What a script prints, in a process without limits on its threads but those given."""
    clean = {key: value for key, value in os.environ.items() if key not in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS")}
    script = "import os\nimport numpy as np\nimport fastbn\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], env=clean | environment, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def default(code: str = "", **environment: str) -> int:
    """Default number of threads of a new process, after `code`."""
    return int(run(code + "\nprint(fastbn.get_num_threads())", **environment))


def test_default_follows_affinity() -> None:
    assert default("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})") == 1


def test_default_follows_the_environment() -> None:
    assert default(FASTBN_NUM_THREADS="1") == 1
    assert default(FASTBN_NUM_THREADS="1000") == default()


SIX = {"affinity": 6, "quota": None, "FASTBN_NUM_THREADS": None}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Six processors, no quota, nothing set."""
    monkeypatch.setattr(threads, "_default", None)
    monkeypatch.setattr(threads, "_threads", None)
    monkeypatch.setattr(threads, "settings", threads.settings._replace(num_threads=None))
    monkeypatch.setattr(threads, "quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return monkeypatch


@pytest.mark.parametrize(("quota", "n"), [(None, 6), (6.5, 6), (2.5, 3), (1.0, 1), (0.1, 1)])
def test_default_is_the_quota_rounded_up(machine: pytest.MonkeyPatch, quota: float | None, n: int) -> None:
    machine.setattr(threads, "quota", lambda: quota)
    assert fastbn.get_num_threads() == n


@pytest.mark.parametrize(("text", "n"), [("1", 1), ("4,2", 4), (" 3 , 1", 3), ("100", 6), ("1048576", 6)])
def test_openmps_variable_bounds_the_default(machine: pytest.MonkeyPatch, text: str, n: int) -> None:
    machine.setenv("OMP_NUM_THREADS", text)
    assert fastbn.get_num_threads() == n
    with fastbn.num_threads(5):
        assert fastbn.get_num_threads() == 5


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1.5", ",2", "٣", "1" * 5000])
def test_openmps_variable_is_ignored_where_openmp_would(machine: pytest.MonkeyPatch, text: str) -> None:
    machine.setenv("OMP_NUM_THREADS", text)
    assert fastbn.get_num_threads() == 6
    assert threads.limits() == SIX | {"OMP_NUM_THREADS": None}


def test_fastbns_variable_wins_over_openmps(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("OMP_NUM_THREADS", "1")
    machine.setattr(threads, "settings", threads.settings._replace(num_threads=3))
    assert fastbn.get_num_threads() == 3
    assert threads.limits() == SIX | {"FASTBN_NUM_THREADS": 3, "OMP_NUM_THREADS": None}


def test_a_new_process_follows_openmps_variable() -> None:
    assert default(OMP_NUM_THREADS="1") == 1


def test_threadpoolctl_limits_and_restores() -> None:
    """Before and after fastbn is imported, in blocks of ours, and in this thread only."""
    pytest.importorskip("threadpoolctl")
    pytest.importorskip("fastbn.kernels._pool", reason="built without a compiler")
    run("""
    import threading
    import threadpoolctl
    from fastbn import threads
    (ours,) = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "fastbn"] or [None]
    assert ours is None
    threads.register_with_threadpoolctl()
    threads.register_with_threadpoolctl()
    fastbn.set_num_threads(5)
    (ours,) = [i for i in threadpoolctl.threadpool_info() if i["user_api"] == "fastbn"]
    assert (ours["num_threads"], ours["version"]) == (5, fastbn.__version__)
    with threadpoolctl.threadpool_limits(2):
        assert fastbn.get_num_threads() == 2
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(fastbn.get_num_threads()))
        thread.start()
        thread.join()
        assert elsewhere == [5]
        with fastbn.num_threads(4):
            assert fastbn.get_num_threads() == 4
        assert fastbn.get_num_threads() == 2
    with fastbn.num_threads(3):
        with threadpoolctl.threadpool_limits({"fastbn": 1}):
            assert fastbn.get_num_threads() == 1
        assert fastbn.get_num_threads() == 3
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        assert fastbn.get_num_threads() == 5
    fastbn.set_num_threads(6)
    assert fastbn.get_num_threads() == 6
    """)
    clean = {key: value for key, value in os.environ.items() if key != "FASTBN_NUM_THREADS"}
    code = "import threadpoolctl, fastbn\nwith threadpoolctl.threadpool_limits(1): print(fastbn.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], env=clean, check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"


def test_default_is_read_again_after_fork() -> None:
    code = """
import os, fastbn
before = fastbn.get_num_threads()
pid = os.fork()
if pid == 0:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os._exit(fastbn.get_num_threads() != 1)
assert os.waitpid(pid, 0)[1] == 0 and fastbn.get_num_threads() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_quota_v2(tmp_path: Path) -> None:
    """The smallest limit on the way to the root counts."""
    write(tmp_path / "fs" / "a" / "b", cpu__max="max 100000\n")
    write(tmp_path / "fs" / "a", cpu__max="150000 100000\n")
    write(tmp_path / "fs", cpu__max="300000 100000\n")
    write(tmp_path, cgroup="0::/a/b\n")
    assert threads.quota(str(tmp_path / "fs"), str(tmp_path / "cgroup")) == 1.5


def test_quota_v1(tmp_path: Path) -> None:
    write(tmp_path / "fs" / "cpu,cpuacct" / "docker", cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    write(tmp_path, cgroup="3:cpu,cpuacct:/docker\n2:memory:/docker\n")
    assert threads.quota(str(tmp_path / "fs"), str(tmp_path / "cgroup")) == 2.5


@pytest.mark.parametrize("text", ["", "100000", "many 100000", "100000 0", "100000 100000 1"])
def test_a_quota_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path / "fs", cpu__max=text)
    write(tmp_path, cgroup="0::/\n")
    assert threads.quota(str(tmp_path / "fs"), str(tmp_path / "cgroup")) is None


def test_the_name_of_a_group_may_be_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"gr\xfcn\x0b")
    write(tmp_path / "fs" / name, cpu__max="150000 100000\n")
    (tmp_path / "cgroup").write_bytes(b"strange\n0::/" + os.fsencode(name) + b"\n")
    assert threads.quota(str(tmp_path / "fs"), str(tmp_path / "cgroup")) == 1.5


def test_quota_of_a_container(tmp_path: Path) -> None:
    """Inside a container the group's own files are at the mount's root, whatever the path says."""
    write(tmp_path / "fs", cpu__max="50000 100000\n")
    write(tmp_path, cgroup="0::/kubepods/pod1\n")
    assert threads.quota(str(tmp_path / "fs"), str(tmp_path / "cgroup")) == 0.5


@pytest.mark.parametrize("text", ["max 100000", "-1"])
def test_no_quota(tmp_path: Path, text: str) -> None:
    write(tmp_path / "fs", cpu__max=text)
    assert threads.quota(str(tmp_path / "fs"), str(tmp_path / "nothing")) is None


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("shape", [(40, 48, 1), (600, 3, 1), (33, 20, 9), (3, 5, 200), (3, 96, 700)], ids=str)
@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_same_bits_wherever_the_output_starts(kernel: Kernel, shape: tuple[int, int, int], dtype: str) -> None:
    """Stores are aligned to cache lines, so the cuts move with the address; values do not."""
    module, compute = kernel.module(), np.dtype(np.float64 if dtype == "float64" else np.float32)
    x = np.random.default_rng(0).normal(1, 2, shape).astype(dtype)
    w = np.linspace(0.5, 2, shape[1], dtype=compute)
    size = x.size
    results = set()
    for start in range(0, 36, 5):
        memory = np.full(size + 64, np.nan, dtype)
        y = memory[start : start + size].reshape(shape)
        module.normalize(x, y, w, w, w, 2)
        assert np.isnan(memory[:start]).all()
        assert np.isnan(memory[start + size :]).all()
        results.add(y.tobytes())
    assert len(results) == 1


X = np.random.default_rng(0).normal(1, 2, (4, 6, 5)).astype(np.float32)
SAVED, OF_X = fastbn.batch_norm_forward(X)[1], fastbn.batch_norm_stats(X)
ZERO, ONE = np.zeros(6, np.float32), np.ones(6, np.float32)
LAYER, FROZEN = fastbn.BatchNorm1d(6), fastbn.FrozenBatchNorm(ZERO, ONE)
GHOSTS, RENORM = ({"training": True, "virtual_batch_size": 2}, {"training": True})
OF_GHOSTS = fastbn.ghost_batch_norm_forward(X, None, None, **GHOSTS)[1]
OF_RENORM = fastbn.batch_renorm_forward(X, ZERO.copy(), ONE.copy(), **RENORM)[1]
OF_GIVEN = fastbn.instance_norm_forward(X, ZERO, ONE, use_input_stats=False)[1]
CALLS: dict[str, Any] = {
    "batch_norm": lambda **n: fastbn.batch_norm(X, ZERO, ONE, **n),
    "batch_norm in training": lambda **n: fastbn.batch_norm(X, None, None, training=True, **n),
    "batch_norm_forward": lambda **n: fastbn.batch_norm_forward(X, **n)[0],
    "batch_norm_forward with a mask": lambda **n: fastbn.batch_norm_forward(X, mask=X[:, 0] > 1, **n)[0],
    "batch_norm_forward with stats": lambda **n: fastbn.batch_norm_forward(X, stats=OF_X, **n)[0],
    "batch_norm_backward": lambda **n: fastbn.batch_norm_backward(X, X, SAVED, **n).dx,
    "batch_norm_stats": lambda **n: fastbn.batch_norm_stats(X, **n).mean,
    "batch_norm_stats of several": lambda **n: fastbn.batch_norm_stats([X, X], **n).mean,
    "batch_norm_elemt": lambda **n: fastbn.batch_norm_elemt(X, ZERO, ONE, **n),
    "batch_norm_backward_reduce": lambda **n: fastbn.batch_norm_backward_reduce(X, X, ZERO, ONE, **n)[1],
    "batch_norm_backward_elemt": lambda **n: fastbn.batch_norm_backward_elemt(X, X, ZERO, ONE, None, ONE, ONE, 20, **n),
    "sync.batch_norm_stats": lambda **n: sync.batch_norm_stats(X, sync.Alone(), **n).mean,
    "sync.batch_norm_forward": lambda **n: sync.batch_norm_forward(X, communicator=sync.Alone(), **n)[0],
    "sync.batch_norm_backward": lambda **n: sync.batch_norm_backward(X, X, SAVED, communicator=sync.Alone(), **n).dx,
    "BatchNorm1d": lambda **n: LAYER(X, **n),
    "BatchNorm1d.backward": lambda **n: (LAYER(X, **n), LAYER.backward(X, **n))[1].dx,
    "FrozenBatchNorm": lambda **n: FROZEN(X, **n),
    "ghost_batch_norm": lambda **n: fastbn.ghost_batch_norm(X, None, None, **GHOSTS, **n),
    "ghost_batch_norm_backward": lambda **n: fastbn.ghost_batch_norm_backward(X, X, OF_GHOSTS, **n).dx,
    "batch_renorm_backward": lambda **n: fastbn.batch_renorm_backward(X, X, OF_RENORM, **n).dx,
    "instance_norm_backward in evaluation": lambda **n: fastbn.instance_norm_backward(X, X, OF_GIVEN, **n).dx,
    "batch_renorm": lambda **n: fastbn.batch_renorm(X, ZERO.copy(), ONE.copy(), **RENORM, **n),
    "instance_norm in evaluation": lambda **n: fastbn.instance_norm(X, ZERO, ONE, use_input_stats=False, **n),
}  # fmt: skip


class Watched:
    """Whole calls that note how many threads each of them is given."""

    def __init__(self, calls: Any, given: list[int]):
        self.calls, self.given = calls, given

    def __getattr__(self, name: str) -> Any:
        prescribed = getattr(Calls, name, None)  # others ask whether there is such a call
        function = getattr(self.calls, name)
        if prescribed is None:
            return function

        def call(*args: Any) -> Any:
            self.given.append(inspect.signature(prescribed).bind(None, *args).arguments["threads"])
            return function(*args)

        return call


@pytest.mark.parametrize("name", CALLS)
def test_a_call_says_how_many_threads_it_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the array is; the bits are those of a call that says nothing."""
    alone, given, calls_of = CALLS[name](), list[int](), core.calls_of
    assert CALLS[name](threads=3).tobytes() == alone.tobytes()
    take_the_checked_way(monkeypatch)
    monkeypatch.setattr(core, "calls_of", lambda *of: Watched(calls_of(*of), given))
    assert CALLS[name](threads=3).tobytes() == alone.tobytes()
    assert set(given) == ({3} if "mask" not in name else set())  # with a mask, whole calls are made of operations
    for wrong, error in ((0, ValueError), (-1, ValueError), (2**20 + 1, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^threads must be"):
            CALLS[name](threads=wrong)


@pytest.mark.parametrize("name", [name for name in CALLS if "mask" not in name])
def test_a_direct_call_hands_on_how_many_threads_it_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the Numba kernels see it, which are asked for each new number."""
    pytest.importorskip("numba")
    jobs = pytest.importorskip("fastbn.kernels._jobs", reason="built without a compiler")
    from fastbn.kernels import numba as kernel

    original, given = kernel._template, list[int]()

    def watched(kind: int, shape: Any, storage: str, threads: int, *rest: Any) -> Any:
        given.append(threads)
        return original(kind, shape, storage, threads, *rest)

    monkeypatch.setattr(kernel, "_template", watched)
    with fastbn.use_kernel("numba"):
        jobs.forget()
        CALLS[name](threads=3)
        jobs.forget()
    assert set(given) == {3}
