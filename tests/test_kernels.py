"""What all kernel modules have in common, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import os
import pickle
import platform
import subprocess
import sys
import warnings
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from truth import of_whole_calls
from ways import DIRECT, is_direct, pinned_by_environment, take_the_checked_way

import fastbn
from fastbn import core, reference
from fastbn.activations import Epilogue, lookup
from fastbn.dispatch import TABLE, Kernel
from fastbn.dtypes import DTYPES
from fastbn.kernels.protocol import Affine, Running, Statistics

MODULES = [k for k in TABLE if k.level is not None and not k.unusable()]
OPERATIONS = ["stats", "normalize", "grad_sums", "grad_input"]
needs_simd = pytest.mark.skipif(not MODULES, reason="built without a compiler")


def names(kernel: Kernel) -> set[str]:
    return {name for name in dir(kernel.module()) if not name.startswith("_")}


@needs_simd
def test_all_modules_export_the_same_names() -> None:
    assert len({frozenset(names(kernel)) for kernel in MODULES}) == 1
    assert {*OPERATIONS, "inference", "forward", "backward", "connect", "prepared"} <= names(MODULES[0])
    assert all(hasattr(reference, operation) for operation in OPERATIONS)


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
@pytest.mark.parametrize("shape", [(3, 5, 7), (9, 33, 1), (2, 64, 100)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_whole_calls_equal_composed_ones(kernel: Kernel, shape: tuple[int, int, int], dtype: str) -> None:
    """The algebra in C and the one in NumPy give the same bits."""
    module = kernel.module()
    assert of_whole_calls(module, shape, np.dtype(dtype)) == of_whole_calls(core.ComposedKernel(module), shape, np.dtype(dtype))


@needs_simd
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5), (4, 1, 6), (3, 40), (1, 7, 2, 3), (2, 6, 7, 4000)])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_plain_calls_equal_checked_ones(
    name: str, shape: tuple[int, ...], layout: str, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    rng = np.random.default_rng(0)
    x, dy = (rng.normal(2, 3, shape).astype(dtype) for _ in range(2))
    axis = 1 if layout == "channels_first" else -1
    compute = np.float64 if dtype == np.float64 else np.float32
    w, b, m, v = (rng.uniform(0.5, 2, shape[axis]).astype(compute) for _ in range(4))

    def step() -> list[bytes]:
        found: list[Any] = []
        for vectors in ((w, b), (None, b), (None, None)):
            out = np.empty_like(x) if given else None
            running = m.copy(), v.copy()
            found.append(fastbn.batch_norm(x, m, v, *vectors, layout=layout, out=out))
            found.append(fastbn.batch_norm_elemt(x, m, v, *vectors, layout=layout))
            found.append(fastbn.batch_norm(x, *running, *vectors, training=True, layout=layout))
            y, saved = fastbn.batch_norm_forward(x, *vectors, *running, layout=layout, momentum=0.3, out=out)
            assert (y is out) == given
            found += [y.copy(), *running, saved.mean, saved.mean_lo, saved.invstd, saved.scale, saved.shift, saved.count]
            found += [*fastbn.batch_norm_backward(dy, x, saved, out=out)[:3]]
        return [np.asarray(a).tobytes() for a in found]

    plain = step()
    take_the_checked_way(monkeypatch)
    assert step() == plain


def test_a_pin_chooses_whose_door_a_plain_array_takes(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pinned kernel is not ten times slower than one that was chosen."""
    x, v = np.ones((4, 3), np.float32), np.ones(3, np.float32)
    calls, frozen = core.whole_calls(kernel), fastbn.FrozenBatchNorm(v, v)
    has_door = core.library is not None and (kernel in MODULES or hasattr(calls, "direct_calls"))
    assert is_direct(fastbn.batch_norm_forward, x) == has_door
    with fastbn.use_kernel("reference"):
        assert not is_direct(fastbn.batch_norm_forward, x)
        frozen(x)
    assert np.array_equal(frozen(x), fastbn.batch_norm(x, v, v))
    if has_door:
        monkeypatch.setattr(core, "calls_of", lambda *_: pytest.fail("the longer way was taken"))
        frozen(x)
        fastbn.batch_norm_forward(x)


def test_a_pinned_kernel_that_cannot_run_is_named_after_the_arguments_were_checked() -> None:
    x = np.ones((4, 3), np.float32)
    with pinned_by_environment("simd_v9"):
        with pytest.raises(ValueError, match="eps"):
            fastbn.batch_norm_forward(x, eps=-1.0)
        with pytest.raises(ValueError, match="FASTBN_KERNEL must be one of"):
            fastbn.batch_norm_forward(x)


PLAIN_ACTIVATIONS = [None, "relu", ("leaky_relu", 0.3), "hardswish", "silu", "gelu"]


@needs_simd
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("activation", PLAIN_ACTIVATIONS, ids=lambda a: str(a).strip("()"))
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 2, 3), (3, 2, 1, 0)], ids=lambda o: "".join(map(str, o)))
def test_plain_calls_equal_checked_ones_in_any_memory_order(
    name: str, activation: Any, residual: bool, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With activation, residual, given statistics and any gradients: none of them takes the longer way."""
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    rng = np.random.default_rng(0)
    shape = (3, 5, 4, 6)
    x, dy, r = (np.ascontiguousarray(rng.normal(1, 3, shape).transpose(order)).astype(dtype).transpose(np.argsort(order)) for _ in range(3))
    compute = np.float64 if dtype == np.float64 else np.float32
    w, b, m, v = (rng.uniform(0.5, 2, 5).astype(compute) for _ in range(4))
    after = {"activation": activation, "residual": r if residual else None}

    def step() -> list[bytes]:
        found: list[Any] = []
        for training in (True, False):
            running = m.copy(), v.copy()
            found += [fastbn.batch_norm(x, *running, w, b, training, **after), *running]
            y, saved = fastbn.batch_norm_forward(x, w, b, *running, training, **after)
            found += [y, saved.mean, saved.invstd, saved.scale, saved.shift, saved.count]
            for wrt in (("x", "weight", "bias"), ("x",), ("weight",), ("bias", "x"), ("x", "residual"), ("weight", "residual")):
                if (residual or "residual" not in wrt) and (activation is None or wrt != ("weight", "residual")):
                    gradients = fastbn.batch_norm_backward(dy, x, saved, wrt=wrt)
                    assert gradients.dx is None or gradients.dx.strides == x.strides
                    found += [a for a in gradients if a is not None]
        found += [fastbn.batch_norm_elemt(x, m, v, w, None, **after)]
        statistics = fastbn.batch_norm_stats(x)
        found += [statistics.mean, statistics.var, statistics.mean_lo, statistics.var_lo, statistics.count]
        frozen = fastbn.FrozenBatchNorm(m, v, w, b, activation=activation)
        return [np.asarray(a).tobytes() for a in (*found, frozen(x, after["residual"]), frozen(x, after["residual"]))]

    with monkeypatch.context() as patch:
        take_the_checked_way(patch)
        checked = step()
    monkeypatch.setattr(fastbn.functional, "_request", None)
    assert step() == checked


def infers_directly(x: Any, mean: Any, var: Any, out: Any = None, axis: Any = None, eps: Any = 1e-5) -> bool:
    return is_direct(fastbn.batch_norm, x, mean, var, eps=eps, axis=axis, out=out)


def trains_directly(x: Any, weight: Any, running: tuple[Any, Any], momentum: Any, correction: Any = 1, eps: Any = 1e-5) -> bool:
    numbers = {"momentum": momentum, "correction": correction, "eps": eps}
    return is_direct(fastbn.batch_norm_forward, x, weight, None, *running, **numbers)


def goes_back_directly(x: Any, dy: Any, vectors: Any, count: int = 8) -> bool:
    saved = fastbn.batch_norm_forward(x)[1]
    saved.__dict__["made"] = vectors, count, True, x.shape, x.dtype, 1, None, None, False
    return is_direct(fastbn.batch_norm_backward, dy, x, saved)


@needs_simd
def test_plain_calls_leave_what_is_not_plain_to_others() -> None:
    x, w = np.ones((2, 3, 4), np.float32), np.ones(3, np.float32)
    vectors, none = np.ones((5, 3), np.float32), (None, None)
    assert infers_directly(x, w, w)
    assert infers_directly(np.asfortranarray(x), w, w)
    for a in (x[:, :, ::2], x[:0], x.view(np.recarray), x[:, :, ::-1], np.broadcast_to(x[:1], x.shape), [1.0]):
        assert not infers_directly(a, w, w)
    for v in (None, [1.0] * 3, w.astype(np.float64), np.ones(4, np.float32), np.ones(6, np.float32)[::2], np.ones((1, 3), np.float32)):
        assert not infers_directly(x, v, w)
        assert not infers_directly(x, w, v)
        assert v is None or not trains_directly(x, v, none, 0.1)
    locked = x.copy()
    locked.flags.writeable = False
    both = np.ones(25, np.float32)
    shifted = both[1:].reshape(2, 3, 4)
    for out in (locked, x[:1], np.ones((2, 3, 4)), shifted, np.asfortranarray(x)):
        assert not infers_directly(both[:24].reshape(2, 3, 4), w, w, out)
    assert not infers_directly(x, w, w, eps=1)
    assert is_direct(fastbn.batch_norm, x, w, w, threads=3)
    assert is_direct(fastbn.batch_norm_forward, x, threads=1)
    assert is_direct(fastbn.batch_norm_backward, x, x, fastbn.batch_norm_forward(x)[1], threads=2)
    assert is_direct(fastbn.batch_norm_stats, x, threads=2)
    assert trains_directly(x, None, none, 0.1)
    assert not trains_directly(x, None, none, 1)
    assert not trains_directly(x[:1, :, :1].copy(), None, none, 0.1)
    fixed = w.copy()
    fixed.flags.writeable = False
    assert not trains_directly(x, None, (fixed, None), 0.1)
    for shared in ((w, w), (x[0, 0, :3], None), (None, w)):
        assert not trains_directly(x, w, shared, 0.1)
    assert goes_back_directly(x, x, vectors)
    assert not goes_back_directly(x, x, vectors, 7)
    for dy in (None, x[:1], np.asfortranarray(x), x.astype(np.float64)):
        assert not goes_back_directly(x, dy, vectors)


@needs_simd
def test_a_direct_call_is_the_function_behind_it() -> None:
    """To whoever looks: by its name, signature, documentation, as a method, in a pickle and in a copy."""
    assert len(DIRECT) == 5 + 4 * 3  # of batch norm, and of four norms
    for name in DIRECT:
        function = getattr(fastbn, name)
        behind = function.__wrapped__
        assert (function.__name__, function.__qualname__, function.__module__) == (name, name, behind.__module__)
        assert function.__doc__ == behind.__doc__
        assert inspect.signature(function) == inspect.signature(behind)
        assert inspect.getfullargspec(function) == inspect.getfullargspec(behind)
        assert (function.__code__, function.__kwdefaults__) == (behind.__code__, behind.__kwdefaults__)
        assert inspect.isroutine(function)
        assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function  # noqa: S301
        assert name in repr(function)
    bound = type("Layer", (), {"call": fastbn.batch_norm_stats})()
    with pytest.raises(TypeError, match="Layer"):
        bound.call()


@needs_simd
def test_a_direct_call_takes_arguments_as_python_does() -> None:
    x, v = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(3, np.float32)
    mean, var, weight, bias = (np.arange(3, dtype=np.float32) * k + k for k in range(1, 5))
    want = fastbn.batch_norm.__wrapped__(x, mean, var, weight, bias, False, 0.1, 1e-5)
    named = {"running_mean": mean, "running_var": var, "weight": weight, "bias": bias}
    for order in itertools.permutations(named):
        assert np.array_equal(fastbn.batch_norm(x, **{name: named[name] for name in order}), want)
        assert is_direct(fastbn.batch_norm, x, **{name: named[name] for name in order})
    assert np.array_equal(fastbn.batch_norm(x, mean, bias=bias, running_var=var, weight=weight), want)
    made = {"".join(["run", "ning_mean"]): mean}  # a name that no program's text holds
    assert np.array_equal(fastbn.batch_norm(x, **made, running_var=var, weight=weight, bias=bias), want)
    assert np.array_equal(functools.partial(fastbn.batch_norm, running_var=var, running_mean=mean)(x, weight=weight, bias=bias), want)
    for args, kwargs, said in (
        ((), {}, "missing 3 required"), ((x,), {}, "missing 2 required"), ((x, v), {"x": x}, "multiple values"),
        ((x, v, v), {"training": False, "gamma": v}, "unexpected keyword"), ((x, *[v] * 8), {}, "takes from 3 to 8"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=said):
            fastbn.batch_norm(*args, **kwargs)


@needs_simd
def test_an_array_that_becomes_another_while_the_axis_is_read_is_taken_as_what_it_became() -> None:
    x, v = np.ones((3, 4, 5), np.float32), np.ones(40, np.float32)

    class Axis(int):
        def __int__(self) -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy 2.5, which still does it
                x.shape = (6, 10)
            return 2

    with pytest.raises((IndexError, ValueError)):
        fastbn.batch_norm(x, v, v, axis=Axis(2))


@pytest.mark.parametrize("forward", [fastbn.batch_norm_forward, fastbn.instance_norm_forward])
def test_a_residual_is_copied_after_it_was_checked(forward: Any) -> None:
    """One that NumPy repeats may be larger than the memory."""
    residual = np.broadcast_to(np.float32(1), (1 << 20, 1 << 20, 4))
    with pytest.raises(ValueError, match="residual must have the shape of x"):
        forward(np.ones((2, 3, 4), np.float32), activation="relu", residual=residual)


@needs_simd
def test_modules_check_their_arguments() -> None:
    """What a wrong call from Python could do to memory is refused."""
    module = MODULES[0].module()
    x = np.ones((2, 3, 4), np.float32)
    w = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="C-contiguous"):
        module.stats(x[:, :, ::2])
    with pytest.raises(ValueError, match="not empty"):
        module.stats(x[:0])
    with pytest.raises(ValueError, match="one shape and dtype"):
        module.normalize(x, np.ones((2, 3, 5), np.float32), w, w, w)
    with pytest.raises(ValueError, match="one shape and dtype"):
        module.normalize(x, np.ones((2, 3, 4)), w, w, w)
    with pytest.raises(ValueError, match="vector of 3 channels"):
        module.normalize(x, x, w, np.ones(3), w)
    with pytest.raises(ValueError, match="vector of 3 channels"):
        module.normalize(x, x, w, w, np.ones(4, np.float32))
    with pytest.raises(TypeError, match="no SIMD kernel for dtype int32"):
        module.stats(np.ones((2, 3, 4), np.int32))


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_environment_pins_a_kernel(kernel: Kernel) -> None:
    code = "import numpy as np, fastbn; print(fastbn.explain('stats', np.ones((2, 3, 4), 'f')))"
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "FASTBN_KERNEL": kernel.name}, capture_output=True, text=True)
    assert f"kernel {kernel.name}" in result.stdout


@needs_simd
def test_explain_names_tiles_and_traffic() -> None:
    x = np.ones((32, 64, 56, 56), np.float32)
    with fastbn.use_kernel(MODULES[0].name):
        text = fastbn.explain("forward", x)
    for word in ("forward_ncsp_f32", "threads", "tiles", "units", "streaming", "traffic"):
        assert word in text


def _grouped(function: Any, **groups: tuple[str | None, ...]) -> Any:
    """A call whose groups of arguments are given one by one; or as a whole, by a group's name."""

    def call(**given: Any) -> Any:
        made = {name: tuple(None if member is None else given.pop(member) for member in members) for name, members in groups.items()}
        return function(**made | given)

    call.groups = tuple(groups)  # type: ignore[attr-defined]
    return call


def _doors(module: Any, dtype: Any = np.float32) -> dict[str, tuple[Any, dict[str, Any], set[str]]]:
    """Every door of a module, the arguments of a right call, and those of them that may be None."""
    compute = np.float64 if dtype == np.float64 else np.float32
    x, dy, out = (np.random.default_rng(i).normal(size=(4, 3, 5)).astype(dtype) for i in range(3))
    mean, scale, shift, low, weight, bias = (np.random.default_rng(i).uniform(0.5, 2, 3).astype(compute) for i in range(6))
    running_mean, running_var = np.zeros(3, compute), np.ones(3, compute)
    running = {"running_mean": running_mean, "running_var": running_var}
    given = {"weight": weight, "bias": bias, "eps": 1e-5, "threads": 1}
    train = {**given, **running, "momentum": 0.1, "correction": 1}
    back = {"mean": mean, "mean_lo": low, "invstd": scale, "scale": scale, "threads": 1}
    return {
        "stats": (module.stats, {"x": x, "threads": 1}, set()),
        "normalize": (module.normalize, {"x": x, "y": out, "mean": mean, "scale": scale, "shift": shift, "threads": 1}, set()),
        "grad_sums": (module.grad_sums, {"dy": dy, "x": x, "mean": mean, "threads": 1}, set()),
        "grad_input": (
            _grouped(module.grad_input, line=("g0", "g1")),
            {"dy": dy, "x": x, "dx": out, "mean": mean, "scale": scale, "g0": shift, "g1": shift, "threads": 1},
            set(),
        ),
        "inference": (
            _grouped(module.inference, given=("mean", "mean_lo", "spread", "eps"), affine=("weight", "bias")),
            {"x": x, "y": out, "mean": mean, "mean_lo": low, "spread": scale, **given},
            {"mean_lo", "weight", "bias", "eps"},
        ),
        "forward": (
            _grouped(module.forward, affine=("weight", "bias"), running=("running_mean", "running_var", "momentum", "correction")),
            {"x": x, "y": out, **train, "compute": np.dtype(compute)},
            {"weight", "bias", "compute", *running},
        ),
        "backward": (
            _grouped(module.backward, kept=("mean", "mean_lo", "invstd", None)),
            {"dy": dy, "x": x, "dx": out, **back},
            {"dx", "mean_lo"},
        ),
    }


ARRAYS = ("x", "y", "dx", "dy")
WRITTEN = ("y", "dx", "running_mean", "running_var")


def _unaligned(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raw = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    assert not raw.flags.aligned
    return raw


def _wrong(name: str, a: Any) -> list[Any]:
    """What a caller may not give in place of an array."""
    locked = a.copy()
    locked.flags.writeable = False
    strided = np.repeat(a, 2, axis=-1)[..., ::2]
    other = np.float32 if a.dtype == np.float64 else np.float64
    wrong: list[Any] = [a.tolist(), 1.0, "x", object(), a[None], a[:0], strided, _unaligned(a)]
    wrong += [a.astype(a.dtype.newbyteorder()), a.astype(np.int32), a.astype(complex), a.astype(object)]
    wrong += [a.astype(other)] if name not in ("x", "running_mean", "running_var") else []
    wrong += [a[..., :-1].copy()] if name != "x" else []  # another x may fit the others
    return wrong + ([locked] if name in WRITTEN else [])


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
@pytest.mark.parametrize("door", ["stats", "normalize", "grad_sums", "grad_input", "inference", "forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_doors_refuse_what_they_cannot_take(kernel: Kernel, door: str, dtype: str) -> None:
    """None or a wrong array in the place of each argument: an error, and never a crash or a result."""
    call, right, may_be_none = _doors(kernel.module(), np.dtype(dtype))[door]
    call(**right)
    before = {name: np.copy(right[name]) for name in WRITTEN if name in right}
    for name, value in right.items():
        if name in ("threads", "eps", "momentum", "correction", "compute"):
            continue
        for wrong in [] if value is None else _wrong(name, value):
            with pytest.raises((TypeError, ValueError)):
                call(**{**right, name: wrong})
        if name not in may_be_none:
            with pytest.raises((TypeError, ValueError)):
                call(**{**right, name: None})
    for group in getattr(call, "groups", ()):
        for wrong in (None, 1, (), (None,) * 5):
            with pytest.raises((TypeError, ValueError)):
                call(**right, **{group: wrong})
    for name, a in before.items():
        np.testing.assert_array_equal(right[name], a)
    for name in may_be_none - {"dx", "eps", "compute"}:
        call(**{**right, name: None})


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_doors_of_gradients_need_the_parameters_of_an_activation(kernel: Kernel) -> None:
    module = kernel.module()
    w = np.ones(3, np.float32)
    for door in ("grad_sums", "grad_input", "backward"):
        call, right, _ = _doors(module)[door]
        call(**right, epilogue=Epilogue(lookup("silu"), None, w, w))
        for wrong in ((None, w), (w, None), (w, w[:2]), (w.astype(np.float64), w), (_unaligned(w), w)):
            with pytest.raises((TypeError, ValueError)):
                call(**right, epilogue=Epilogue(lookup("silu"), None, *wrong))
        for arrays in ({"residual": right["x"][:2]}, {"dresidual": right["x"].astype(np.float64)}):
            with pytest.raises(ValueError, match="one shape and dtype"):
                call(**right, epilogue=Epilogue(lookup("silu"), scale=w, shift=w)._replace(**arrays))
    for epilogue in (1, (), Epilogue("relu"), Epilogue(object())):  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError)):
            module.normalize(**_doors(module)["normalize"][1], epilogue=epilogue)


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_any_number_of_threads_is_taken(kernel: Kernel) -> None:
    for call, right, _ in _doors(kernel.module()).values():
        for threads in (0, -1, 2**29, 2**30, 2**31, 2**64, 10**400, -(10**400)):
            call(**{**right, "threads": threads})
        for wrong in (None, "2", 1.5j):
            with pytest.raises(TypeError):
                call(**{**right, "threads": wrong})
    x = np.ones((8, 64, 40, 64), np.float32)
    with fastbn.use_kernel(kernel.name), fastbn.num_threads(fastbn.threads.MOST_THREADS):
        assert not fastbn.batch_norm_stats(x).var.any()


@needs_simd
def test_plain_calls_leave_wrong_vectors_to_others() -> None:
    """C reads them without looking."""
    x, w = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32), np.ones(3, np.float32)
    vectors = np.ones((5, 3), np.float32)
    for wrong in (vectors[:4], vectors[:, :2], vectors.astype(">f4"), vectors.astype(float), np.ones((10, 3), np.float32)[::2], w):
        assert not goes_back_directly(x, x, wrong)
    assert not infers_directly(_unaligned(x), w, w)
    assert not trains_directly(x, _unaligned(w), (None, None), 0.1)
    y, saved = fastbn.batch_norm_forward(x)
    for name in ("mean", "invstd", "scale"):
        with pytest.raises((TypeError, ValueError)):
            fastbn.batch_norm_backward(y, x, dataclasses.replace(saved, **{name: None}))


@needs_simd
def test_unaligned_vectors_give_the_same_bits() -> None:
    x, w = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32), np.linspace(1, 2, 3, dtype=np.float32)
    for training in (False, True):
        one, other = (w.copy(), w + 1), (_unaligned(w), _unaligned(w + 1))
        want = fastbn.batch_norm(x, *one, w, w, training)
        np.testing.assert_array_equal(fastbn.batch_norm(x, *other, _unaligned(w), _unaligned(w), training), want)
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
@pytest.mark.parametrize("plain", [False, True], ids=["checked", "plain"])
@pytest.mark.parametrize("wide", [False, True], ids=["own type", "double"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_running_statistics_in_double_keep_their_digits(kernel: Kernel, plain: bool, wide: bool, dtype: str) -> None:
    """And the correction says what the sum of squares is divided by."""
    module = kernel.module()
    x = np.random.default_rng(0).normal(3, 2, (6, 4, 7)).astype(dtype)
    compute = np.dtype(np.float64 if dtype == "float64" else np.float32)
    kept = np.dtype(np.float64) if wide else compute
    _, mean, var = reference.batch_norm_stats(x)
    for correction in (0, 1):
        running = np.linspace(0, 1, 4).astype(kept), np.linspace(1, 2, 4).astype(kept)
        batch = mean, var * 42 / (42 - correction)
        want = [0.75 * r.astype(np.float64) + 0.25 * b for r, b in zip(running, batch, strict=True)]
        if plain:
            with fastbn.use_kernel(kernel.name):
                assert trains_directly(x, None, running, 0.25, correction)
        else:
            module.forward(x, np.empty_like(x), Affine(), 1e-5, Running(*running, 0.25, correction), compute, 1)
        for r, truth in zip(running, want, strict=True):
            # In double, the statistics are not rounded to float: only their sums are.
            np.testing.assert_allclose(r, truth, rtol=2e-7 if kept == np.float32 else 5e-8 if compute == np.float32 else 1e-14)


@needs_simd
def test_one_value_per_channel_is_enough_without_a_correction() -> None:
    x, var = np.array([[1.0, 2.0]]), np.ones(2)
    assert not trains_directly(x, None, (None, var), 0.5, 1)
    assert trains_directly(x, None, (None, var.copy()), 0.5, 0)
    y, _ = fastbn.batch_norm_forward(x, running_var=var, momentum=0.5, correction=0)
    np.testing.assert_array_equal(y, [[0, 0]])
    np.testing.assert_array_equal(var, [0.5, 0.5])


@needs_simd
def test_a_prepared_call_checks_its_sample() -> None:
    doors = core.whole_calls(MODULES[0])
    w, x = np.ones(3, np.float32), np.ones((2, 3, 4), np.float32)
    assert doors.prepared(w, w, w, None, x, 1) is not None
    for wrong in ((None, w, w, None, x, 1), (w, None, w, None, x, 1), (w, w, w[:2], None, x, 1), (w, w, w, None, None, 1),
                  (w, w, w, None, x, -1), (w, w, w, None, x, 7), (w, w, w, None, w, 0), (w, w, w, "relu", x, 1)):  # fmt: skip
        with pytest.raises((TypeError, ValueError)):
            doors.prepared(*wrong)


@needs_simd
@pytest.mark.parametrize("wrong", [(), (1,), (1, True, 2), None, 3], ids=str)
def test_doors_count_the_members_of_what_they_are_given(wrong: Any) -> None:
    """C would read a tuple's members beyond its end."""
    doors, x, v = core.whole_calls(MODULES[0]), np.ones((2, 3, 4), np.float32), np.ones(6, np.float32)
    rows, saved = x.reshape(2, 1, 3, 4), fastbn.batch_norm_forward(x)[1]
    saved.__dict__["made"] = wrong
    for call in (
        lambda: fastbn.batch_norm_backward(x, x, saved),
        lambda: doors.parts_forward(rows, rows.copy(), (None, None), 1e-5, wrong, 1),
        lambda: doors.parts_backward(rows, rows, rows.copy(), (v, v, v, None), (None, None), wrong, 1),
        lambda: doors.parts_backward(rows, rows, rows.copy(), wrong, (None, None), (1, True), 1),
    ):
        with pytest.raises((AttributeError, IndexError, TypeError, ValueError)):
            call()


@needs_simd
def test_a_backward_needs_deviations_and_no_variance() -> None:
    x, w = np.ones((2, 3, 4), np.float32), np.ones(3, np.float32)
    for kernel in MODULES:
        with pytest.raises(ValueError, match="deviations"):
            kernel.module().backward(x, x, x.copy(), Statistics(w, None, w, 1e-5), w, 1)


@needs_simd
def test_memory_that_is_not_like_the_input_is_written_by_no_door() -> None:
    from fastbn.kernels import _calls

    calls = _calls.Calls(MODULES[0].module().kernels)  # type: ignore[attr-defined]
    w, x = np.ones(3, np.float32), np.ones((2, 3, 4), np.float32)
    direct = _calls.Direct(fastbn.batch_norm.__wrapped__, _library(calls_of=lambda *_: calls))
    given = {"composed": None, "part": None, "epilogue": None, "finish_parts": None, "threads_of": lambda *_: 1, "small": 0}
    for memory, axis in ((x[:1], 1), (None, 1), (np.broadcast_to(w[0], x.shape), 1), (np.empty_like(x), -1), (np.empty_like(x), 3)):
        calls.connect(**given, axis_of=lambda *_, axis=axis: axis, memory_for=lambda _, memory=memory: memory)
        with suppress(TypeError, ValueError):
            assert np.array_equal(direct(x, w, w, layout="NCL"), fastbn.batch_norm(x, w, w))


def _library(**changes: Any) -> Any:
    from fastbn.kernels import _calls

    usual = {
        "pin": ContextVar("pin"), "calls_of": None, "activations": ({}, None, int), "copied": None, "steps": (0.0,) * len(DTYPES),
        "results": (fastbn.Saved, fastbn.results.SavedParts, fastbn.Gradients, None),
    }  # fmt: skip
    return _calls.Library(**usual | changes)


@needs_simd
@pytest.mark.parametrize(
    "changes",
    [
        {"steps": ()}, {"steps": None}, {"activations": None}, {"activations": ({}, None)}, {"activations": (None, None, int)},
        {"results": (int, int, int, None)}, {"results": (None, None, tuple, None)}, {"results": ()},
    ],
    ids=str,
)  # fmt: skip
def test_the_direct_path_refuses_what_it_could_not_run_with(changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        _library(**changes)


@needs_simd
def test_only_functions_with_a_door_become_direct() -> None:
    from fastbn.kernels import _calls

    def batch_norm(x: Any, gamma: Any) -> None:
        pass

    def other(x: Any) -> None:
        pass

    batch_norm.__qualname__, other.__qualname__ = "batch_norm", "other"
    with pytest.raises(ValueError, match="no parameter of a door is called 'gamma'"):
        _calls.Direct(batch_norm, _library())
    with pytest.raises(ValueError, match="no door for other"):
        _calls.Direct(other, _library())
    for wrong in ((None, None), (batch_norm, None), (3, _library())):
        with pytest.raises((AttributeError, TypeError)):
            _calls.Direct(*wrong)
    empty = _calls.Direct.__new__
    with pytest.raises(TypeError):
        empty(_calls.Direct)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", ["flush to zero", "round up"])
@pytest.mark.parametrize("kernel", MODULES, ids=lambda k: k.name)
def test_whole_calls_run_in_the_default_floating_point_mode(kernel: Kernel, mode: str, threads: int) -> None:
    """Their sums are merged, their parameters folded and the running statistics moved in it, too; the caller's is kept."""
    from test_pool import MODES, UPWARD, FloatEnvironment, pool  # skips where there is no pool

    if platform.machine() not in UPWARD or sys.platform != "linux":
        pytest.skip("knows Linux on x86-64 and aarch64 alone")
    module, r = core.whole_calls(kernel), np.random.default_rng(0)
    one, small, third = np.ones(32, np.float32), np.full(32, 1e-38, np.float32), np.full(32, 1 / 3)

    def step(x: Any, eps: float) -> list[bytes]:
        y, dx, running = np.empty_like(x), np.empty_like(x), [small.copy(), third.copy()]
        saved = module.forward(x, y, Affine(None, one), eps, Running(*running, 0.1, 1), np.dtype(np.float32), threads)
        kept = Statistics(*saved[:3])
        sums = module.backward(x, x, dx, kept, saved[3], threads)
        found = [y, *saved, *running, *sums, dx, *module.stats(x, threads), *module.backward(x, x, None, kept, None, threads)]
        running = [small.copy(), third.copy()]
        y, own = fastbn.batch_norm_forward(x, one, None, *running, momentum=0.1, eps=eps)
        found += [y, own.mean, own.mean_lo, own.invstd, own.scale, own.shift, *running, *fastbn.batch_norm_backward(x, x, own)[:3]]
        found += [fastbn.batch_norm(x, *saved[:2], one, one, eps=eps)]
        # A NaN's sign is that of the operand which the compiler puts first, and has no meaning.
        return [np.where(np.isnan(a), np.nan, a).tobytes() for a in found]

    for size, eps in ((1.0, 1e-5), (1e-39, 0.0), (1e-39, 1e-5)):
        for shape in ((6, 32, 25), (150, 32, 1)):
            x = (r.normal(3, 2, shape) * size).astype(np.float32)
            with fastbn.use_kernel(kernel.name):
                want, environment = step(x, eps), FloatEnvironment()
            try:
                MODES[mode](environment)
                before = pool.set_float_mode()
                pool.set_float_mode(before)
                with fastbn.use_kernel(kernel.name):
                    found = step(x, eps)
                after = pool.set_float_mode(before)
            finally:
                environment.restore()
            assert [i for i, (a, b) in enumerate(zip(found, want, strict=True)) if a != b] == []
            assert after & ~0x3F == before & ~0x3F
