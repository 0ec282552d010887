"""Functions of the user's as activations."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from math import erf, exp, log1p, tanh
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from truth import problem, rng, same_bits, within

import fastbn
from fastbn import reference
from fastbn.dispatch import KERNELS

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_activation.py"


@pytest.fixture(scope="module")
def example() -> Any:
    pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")
    specification = importlib.util.spec_from_file_location("own_activation", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mish(example: Any, dtype: Any, axis: int) -> None:
    p = problem((3, 4, 5, 6), dtype, axis)
    residual = rng(1).standard_normal(p.x.shape).astype(dtype)
    layout = "NCHW" if axis == 1 else "NHWC"
    activation = fastbn.Activation(example.mish, example.mish_derivative)
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, activation=activation, residual=residual)
    _, mean, var = reference.batch_norm_stats(p.x, axis)
    z = reference.batch_norm(p.x, mean, var, p.weight, p.bias, 1e-5, axis) + residual
    t = np.vectorize(lambda v: tanh(log1p(exp(v))))(z)
    slope = t + z * (1 - t * t) / (1 + np.exp(-z))
    small = 1e-6 if dtype == np.float32 else 1e-13
    within(y, z * t, small * np.maximum(1, np.abs(z)))
    got = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=("x", "weight", "bias", "residual"))
    truth = reference.batch_norm_backward(p.dy * slope, p.x, mean, var, p.weight, 1e-5, axis)
    for gradient, want in zip(got, (*truth, p.dy * slope), strict=True):
        assert gradient is not None
        within(gradient, want, 10 * small * max(1.0, float(np.abs(want).max())))
    with fastbn.num_threads(3):
        same_bits(y, fastbn.batch_norm_forward(p.x, p.weight, p.bias, layout=layout, activation=activation, residual=residual)[0])


@pytest.mark.parametrize("size", [1e200, 1e-300])
@pytest.mark.parametrize("kind", ["batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"])
def test_of_inputs_at_the_ends_of_the_range(example: Any, kind: str, size: float) -> None:
    x = np.clip(rng(2).standard_normal((2, 4, 12)), -1, 1)
    residual = rng(3).standard_normal(x.shape)
    own = {"batch_norm": (None, None, None, None, True), "group_norm": (2,), "layer_norm": (12,), "rms_norm": (12,)}.get(kind, ())

    def call(x: Any) -> Any:
        return getattr(fastbn, kind)(x, *own, eps=0.0, activation=example.mish, residual=residual)

    within(call(x * size), call(x), 1e-12)


def test_layers_and_a_plain_function(example: Any) -> None:
    p = problem((2, 3, 4, 4))
    layer = fastbn.BatchNorm2d(3, activation=example.swish(1.0))
    within(layer(p.x), fastbn.batch_norm_forward(p.x, activation="silu")[0].astype(np.float64), 1e-6)
    assert layer.backward(p.dy).dx is not None
    frozen = fastbn.FrozenBatchNorm(p.mean, p.var, activation=example.mish)
    for _ in range(2):
        same_bits(frozen(p.x), fastbn.batch_norm(p.x, p.mean, p.var, activation=example.mish))


def test_errors(example: Any) -> None:
    x = np.ones((4, 3), np.float32)
    _, saved = fastbn.batch_norm_forward(x, activation=example.mish)
    with pytest.raises(ValueError, match=r"the backward needs the derivative of Activation\(mish, None\)"):
        fastbn.batch_norm_backward(x, x, saved)
    import numba
    import numba.cuda

    cuda, cfunc = numba.cuda.jit(lambda z: z, device=True), numba.cfunc("float64(float64)")(lambda z: z)
    for other in (abs, numba.vectorize(lambda z: z), cuda, cfunc):
        with pytest.raises(TypeError, match=r"activation must be .*, a function compiled by numba.njit, or a fastbn.Activation, got .*<"):
            fastbn.batch_norm_forward(x, activation=other)
        with pytest.raises(TypeError, match=r"forward must be a function compiled by numba.njit"):
            fastbn.Activation(other)
    running = np.zeros(3, np.float32), np.ones(3, np.float32)
    for other in (lambda z: z.real(), lambda z, slope: z, lambda z: "z"):
        with pytest.raises(TypeError, match="activation cannot be compiled by Numba for float32: "):
            fastbn.batch_norm_forward(x, None, None, *running, activation=numba.njit(other))
    said = r"activation cannot be compiled by Numba for float32: forward: .*(\n.*)?(attribute 'real_part'|name 'nothing' is|Cannot bind)"
    for other in (lambda z: z.real_part, lambda z: nothing(z), lambda z, slope: z):  # type: ignore[name-defined]  # noqa: F821
        with pytest.raises(TypeError, match=said) as wrong:
            fastbn.batch_norm_forward(x, activation=numba.njit(other))
        assert len(str(wrong.value)) < 2000
        assert "\x1b" not in str(wrong.value), "colors are for a terminal"
    no_number = r"activation cannot be compiled by Numba for float32: (.|\n)*it must give one real number, not "
    for other in (lambda z: np.array([z, z]), lambda z: z + 1j, lambda z: (z, z), lambda z: None):
        with pytest.raises(TypeError, match=no_number) as caught:
            fastbn.batch_norm_forward(x, None, None, *running, activation=numba.njit(other))
        assert len(str(caught.value)) < 200
    with pytest.raises(TypeError, match=r"activation cannot be compiled by Numba for float32: forward: .*float16"):
        fastbn.batch_norm_forward(x, activation=numba.njit(lambda z: np.float16(z)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_objects = numba.jit(lambda z: z, forceobj=True)
    with pytest.raises(TypeError, match=r"forward: numba.njit made no code of it that takes float32"):
        fastbn.batch_norm_forward(x, activation=of_objects)
    positive = numba.njit(lambda z: z if z > 0 else None)
    same_bits(fastbn.batch_norm_elemt(x, [0.0] * 3, [1.0] * 3, activation=positive), x)
    with pytest.raises(TypeError, match=r"must give one real number, but gave None for -1"):
        fastbn.batch_norm_elemt(-x, [0.0] * 3, [1.0] * 3, activation=positive)
    _, saved = fastbn.batch_norm_forward(x, activation=fastbn.Activation(example.mish, numba.njit(lambda z: np.empty(0))))
    with pytest.raises(TypeError, match=no_number):
        fastbn.batch_norm_backward(x, x, saved)
    assert not running[0].any()
    with pytest.raises(TypeError, match="activation cannot be compiled by Numba for float32: "):  # what half precision is computed in
        fastbn.batch_norm_forward(x.astype(np.float16), activation=numba.njit(lambda z: "z"))
    with fastbn.use_kernel("reference"), pytest.raises(RuntimeError, match="it takes no functions of the user's"):
        fastbn.batch_norm_forward(x, activation=example.mish)


def test_a_function_that_is_no_vectors_says_nothing_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")

    def inverse(z: float) -> float:
        if z == 0:
            raise ZeroDivisionError("no inverse of 0")
        return 1 / z

    for shape in ((4, 3), (4, 3, 5), (40, 3), (2, 3, 40)):
        x = np.full(shape, 2, np.float32)
        same_bits(fastbn.batch_norm_elemt(x, [0.0] * 3, [1.0] * 3, activation=numba.njit(inverse)), 1 / x)
    for called in (erf, log1p):  # of the C library: LLVM has no vectors of them
        y = fastbn.batch_norm_elemt(x, [0.0] * 3, [1.0] * 3, activation=numba.njit(lambda z, called=called: called(z)))
        within(y, np.full_like(x, called(2)), 1e-6)
    assert capfd.readouterr() == ("", "")


def test_a_division_by_zero_does_not_depend_on_who_compiled_the_function_first() -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")
    x = np.zeros((4, 3), np.float32)
    for called_before in (True, False):
        inverse = numba.njit(lambda z: 1 / z)
        if called_before:
            assert inverse(np.float32(2)) == 0.5
        assert np.isposinf(fastbn.batch_norm_forward(x, activation=inverse)[0]).all()
        with pytest.raises(ZeroDivisionError):
            inverse(np.float32(0))
    with pytest.raises(ZeroDivisionError):  # its own options hold
        fastbn.batch_norm_forward(x, activation=numba.njit(error_model="python", locals={"a": numba.int64})(lambda a: 1 / a))


@pytest.mark.filterwarnings("ignore:.*First-class function type feature is experimental")
@pytest.mark.parametrize("called_before", [True, False])
def test_functions_that_it_calls_divide_as_it_does(called_before: bool) -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")
    inverse = numba.njit(lambda z: 1 / z)
    if called_before:
        assert inverse(np.float32(2)) == 0.5
    space = {"inverse": inverse}
    exec("def by_name(z): return [inverse(w) for w in (z,)][0]", space)  # noqa: S102  globals of its own
    module, several = types.ModuleType("module"), (inverse, np.float64)
    module.inner = module  # type: ignore[attr-defined]  # they may know each other
    module.inverse = inverse  # type: ignore[attr-defined]
    ways: tuple[Callable[..., Any], ...] = (
        space["by_name"], lambda z: inverse(z), lambda z, call=inverse: call(z),
        lambda z: module.inverse(z), lambda z: module.inner.inverse(z), lambda z: several[0](z),
    )  # fmt: skip
    for function in ways:
        y, _ = fastbn.batch_norm_forward(np.zeros((4, 3), np.float32), activation=numba.njit(function))
        assert np.isposinf(y).all()
    with pytest.raises(ZeroDivisionError):
        inverse(np.float32(0))


def test_a_function_may_call_itself() -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")

    space = {"numba": numba}
    code = "@numba.njit\ndef fraction(z):\n    if z >= 1:\n        return fraction(z - 1)\n    return z"
    exec(code, space)  # noqa: S102  globals of its own
    fraction: Any = space["fraction"]
    x = np.arange(12.0).reshape(4, 3) / 4
    for _ in range(2):  # for the second, compiled by the user, too
        same_bits(fastbn.batch_norm_elemt(x, [0.0] * 3, [1.0] * 3, activation=fraction), x % 1)
        assert fraction(2.5) == 0.5


def test_it_starts_no_threads_of_numbas() -> None:
    """In the layer that everybody has, several launches at once end the process."""
    pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")
    code = """
import numba, numpy as np, fastbn
@numba.njit(parallel=True)
def fourfold(z):
    s = z - z
    for _ in numba.prange(4):
        s += z
    return s
x = np.ones((64, 8, 32, 32), np.float32)
with fastbn.num_threads(4):
    y = fastbn.batch_norm_elemt(x, [0.0] * 8, [1.0] * 8, activation=fourfold)
assert (y == 4).all()
"""
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_function_may_call_fastbn_itself() -> None:
    """What the call around it keeps in its thread's memory is not what the calls within use."""
    numba = pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")
    within_it, seen = rng(2).standard_normal((4, 500)).astype(np.float32), []

    def call() -> None:
        seen.append(fastbn.batch_norm_stats(within_it))
        fastbn.release_memory()

    @numba.njit
    def calls(z: Any) -> Any:
        with numba.objmode():
            call()
        return z

    x = rng(1).standard_normal((2, 40, 8)).astype(np.float32)
    plain, stats = fastbn.batch_norm_forward(x, activation=("leaky_relu", 1.0))[0], fastbn.batch_norm_stats(within_it)
    for threads in (1, 1, 2):  # the second call takes another door
        with fastbn.num_threads(threads):
            within(fastbn.batch_norm_forward(x, activation=calls)[0], plain, 1e-6)
    assert all(one == stats for one in seen)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr("fastbn.activations.find_spec", lambda name: None)
    with pytest.raises(TypeError, match='did you mean "tanh"'):
        fastbn.batch_norm_forward(np.ones((2, 3)), activation=np.tanh)
    with pytest.raises(TypeError, match=r"Numba, which compiles functions, is not installed \(pip install numba\)"):
        fastbn.batch_norm_forward(np.ones((2, 3)), activation=lambda z: z)


def test_where_numba_may_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")
    monkeypatch.setattr(numba.core.config, "DISABLE_JIT", 1)
    function = numba.njit(lambda z: z)
    for call in (lambda: fastbn.Activation(function), lambda: fastbn.batch_norm_forward(np.ones((2, 3)), activation=function)):
        with pytest.raises(TypeError, match=r"got <function .*; NUMBA_DISABLE_JIT is set, with which numba.njit compiles nothing"):
            call()


def test_only_numba_takes_functions() -> None:
    assert [name for name, kernel in KERNELS.items() if kernel.custom] == ["numba"]


def test_what_a_user_writes_down_at_an_activation_says_nothing_to_the_kernels(example: Any) -> None:
    x = rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    activation = fastbn.Activation(example.mish, example.mish_derivative)
    want = fastbn.batch_norm_forward(x, activation=activation)[0]
    activation.code = 1  # type: ignore[attr-defined]  # the number of relu
    same_bits(fastbn.batch_norm_forward(x, activation=activation)[0], want)
