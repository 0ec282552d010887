"""fastbn behind PyTorch's batch norm: the same results as torch's own, seen from every side."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn  # noqa: E402
import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402

F = torch.nn.functional
native = torch.ops.aten.native_batch_norm
native_backward = torch.ops.aten.native_batch_norm_backward

pytestmark = pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels")

SHAPES = ((9, 5), (4, 3, 11), (4, 6, 5, 7), (2, 3, 4, 5, 6), (8, 32, 28, 28), (2, 3, 1, 1), (3, 1, 4, 4), (1, 4, 3, 3))
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
OPEN = "strides of axes of one element, or gaps in channels_last, leave the order of memory open"


def short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def _off_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and the other tests want the processors too
    fastbn.torch.report(reset=True)
    yield
    fastbn.torch.disable()
    torch.set_num_threads(threads)
    assert not fastbn.torch.is_enabled()


def taken() -> int:
    return sum(fastbn.torch.report().taken.values())


def reasons() -> list[str]:
    return [reason for _, reason in fastbn.torch.report().declined]


def laid_out(a: Any, order: str) -> Any:
    """The same values in another order of memory."""
    if order == "last":
        return a.contiguous(memory_format=LAST[a.dim()]) if a.dim() in LAST else a.transpose(1, -1).contiguous().transpose(1, -1)
    if order == "turned":
        return a.transpose(0, -1).contiguous().transpose(0, -1)
    if order == "sliced":
        return torch.stack([a, -a], -1)[..., 0]
    return a.contiguous()


def step(x: Any, dy: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, eps: float = 1e-5) -> dict[str, Any]:
    """All that a step of training with one batch norm makes."""
    x, weight, bias = (None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias))
    mean, var = (None if t is None else t.clone() for t in (mean, var))
    y = F.batch_norm(x, mean, var, weight, bias, training, 0.1, eps)
    y.backward(dy)
    grads = {"dx": x.grad, "dweight": None if weight is None else weight.grad, "dbias": None if bias is None else bias.grad}
    return {"y": y.detach(), **grads, "mean": mean, "var": var}


def near(got: Any, want: Any, true: Any, name: str = "") -> None:
    """As torch's result seen from outside, and no further from the truth than twice that is."""
    if want is None:
        assert got is None, name
        return
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), name
    if got.numel() == 0:
        return
    size = max(1.0, true.abs().max().item())
    few = 64 if got.dtype == torch.float64 else 4  # in float64 the truth is no better than the results
    allowed = 2 * (want.double() - true).abs().max().item() + few * torch.finfo(got.dtype).eps * size
    assert (got.double() - true).abs().max().item() <= allowed, name


def double(*tensors: Any) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "parameters"), DTYPES, ids=lambda dtype: short(dtype))
def test_results_are_those_of_torch(shape: tuple[int, ...], dtype: Any, parameters: Any) -> None:
    torch.manual_seed(0)
    channels = shape[1]
    x, dy = (2 * torch.randn(shape) + 3).to(dtype), torch.randn(shape).to(dtype)
    weight, bias, mean = (torch.randn(channels).to(parameters) for _ in range(3))
    var = (torch.rand(channels) + 0.5).to(parameters)
    cases = [
        (order, *switches)
        for order in ("contiguous", "last", "turned", "sliced")
        for switches in itertools.product((True, False), repeat=3)
        if any(switches[::2])  # inference needs statistics
    ]
    for order, training, affine, tracked in cases:
        arrays = laid_out(x, order), laid_out(dy, order)
        vectors = (weight, bias) if affine else (None, None), (mean, var) if tracked else (None, None)
        given = *arrays, *vectors[0], *vectors[1]
        want, true = step(*given, training), step(*double(*given), training)
        with fastbn.torch.enabled():
            got = step(*given, training)
        for name in got:
            near(got[name], want[name], true[name], f"{name} {order} {training=} {affine=} {tracked=}")
    assert taken() == 2 * len(cases)
    assert reasons() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("orders", list(itertools.permutations(("contiguous", "last", "turned", "sliced"), 2)), ids="-".join)
def test_a_gradient_in_another_order_of_memory_than_x_is_taken(orders: tuple[str, str], training: bool, dtype: Any) -> None:
    torch.manual_seed(1)
    x, dy = torch.randn(4, 6, 5, 7).to(dtype), torch.randn(4, 6, 5, 7).to(dtype)
    vectors = [t.to(dtype) for t in (torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5)]
    given = laid_out(x, orders[0]), laid_out(dy, orders[1]), *vectors
    want, true = step(*given, training), step(*double(*given), training)
    with fastbn.torch.enabled():
        got = step(*given, training)
    for name in got:
        near(got[name], want[name], true[name], name)
    assert (taken(), reasons()) == (2, [])


@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (2, 3, 5, 1), (1, 3, 4, 4), (4, 1, 3, 3), (4, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("stride", [0, 1, 7, 1000])
def test_strides_of_axes_of_size_1_mean_nothing(shape: tuple[int, ...], stride: int) -> None:
    torch.manual_seed(2)
    x, dy = torch.randn(shape), torch.randn(shape)
    want = step(x.double(), dy.double(), None, None, None, None, True)
    for order in ("contiguous", "last"):
        strides = [stride if n == 1 else s for n, s in zip(shape, laid_out(dy, order).stride(), strict=True)]
        strange = [torch.empty_strided(shape, strides).copy_(a) for a in (x, dy)]
        for given in ((x, strange[1]), (strange[0], dy), strange):
            with fastbn.torch.enabled():
                got = step(*given, None, None, None, None, True)
            torch.testing.assert_close(got["dx"].double(), want["dx"], rtol=1e-4, atol=1e-5)
    assert reasons() == []


def strided(shape: tuple[int, ...], order: tuple[int, ...], gaps: int, of_ones: int | None) -> Any:
    """A tensor with its axes in an order of memory, the innermost one with gaps, and strange strides where an axis has one element."""
    strides, step = [0] * len(shape), gaps
    for axis in reversed(order):
        strides[axis], step = step, step * shape[axis]
    strides = [of_ones if n == 1 and of_ones is not None else s for n, s in zip(shape, strides, strict=True)]
    return torch.randn(10_000).as_strided(shape, strides)


@pytest.mark.parametrize("of_ones", [None, 0, 1, 4, 1000])
@pytest.mark.parametrize("gaps", [1, 2])
@pytest.mark.parametrize(
    "shape", [(2, 4, 3, 5), (2, 4, 1, 6), (1, 4, 1, 6), (1, 4, 3, 2), (6, 8, 1, 1), (2, 1, 3, 6), (1, 4, 1, 3, 2)], ids=str
)
def test_strides_are_torchs_whatever_those_of_x_are(shape: tuple[int, ...], gaps: int, of_ones: int | None) -> None:
    """Also of slices of channels_last, and where torch's versions differ."""
    torch.manual_seed(3)
    last, turned = (0, *range(2, len(shape)), 1), tuple(reversed(range(len(shape))))
    weight, groups = torch.ones(shape[1]), min(2, shape[1])
    for order, of_dy in itertools.product((tuple(range(len(shape))), last, turned), repeat=2):
        x, dy = strided(shape, order, gaps, of_ones).requires_grad_(), strided(shape, of_dy, gaps, of_ones)
        for call in (
            lambda x: F.batch_norm(x, None, None, weight, training=True),
            lambda x: F.batch_norm(x, weight, weight),
            lambda x: F.group_norm(x, groups, weight),
            lambda x: F.layer_norm(x, x.shape[2:]),
            lambda x: F.instance_norm(x, None, None, weight) if x[0, 0].numel() > 1 else x,
        ):
            want, got = [], []
            for found in (want, got):
                with fastbn.torch.enabled() if found is got else contextlib.nullcontext():
                    found += [call(x), *torch.autograd.grad(call(x), x, dy)]
            assert got[0].stride() == want[0].stride()
            # With axes of one element torch's own gradient of a batch norm, which is that of instance norm, may be wrong.
            assert 1 in shape or got[1].stride() == want[1].stride()
            usual = torch.empty(shape).copy_(x.detach()).requires_grad_()
            want[1] = torch.autograd.grad(call(usual), usual, torch.empty(shape).copy_(dy))[0]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert taken() > 0


def test_slices_of_channels_last_stay_channels_last() -> None:
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)[:, :4]
    with fastbn.torch.enabled():
        assert F.batch_norm(x, None, None, training=True).is_contiguous(memory_format=torch.channels_last)
    assert (taken(), reasons()) == (1, [])
    assert fastbn.torch.explain(x) == "taken: float32, copied to channels last first, 60 x 4 x 1 (outer x channels x inner)"


@pytest.mark.parametrize("mask", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_only_gradients_that_are_wanted_are_returned(mask: tuple[bool, ...], training: bool) -> None:
    torch.manual_seed(3)
    x, dy, weight, mean, var = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
    saved = native(x, weight, None, mean.clone(), var.clone(), training, 0.1, 1e-5)[1:]
    want = native_backward(dy, x, weight, mean, var, *saved, training, 1e-5, list(mask))
    with fastbn.torch.enabled():
        got = native_backward(dy, x, weight, mean, var, *saved, training, 1e-5, list(mask))
    assert taken() == 1
    for a, b, wanted in zip(got, want, mask, strict=True):
        assert (a is not None) == (b is not None) == wanted
        if wanted:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_digits_that_the_mean_rounds_away_reach_the_backward() -> None:
    torch.manual_seed(4)
    x, dy = 1e6 + torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8)
    true = step(*double(x, dy, None, None, None, None), True)
    torchs = step(x, dy, None, None, None, None, True)
    with fastbn.torch.enabled():
        ours = step(x, dy, None, None, None, None, True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):  # these copy the vector alone
            without = step(x, dy, None, None, None, None, True)

    def error(found: dict[str, Any], name: str) -> float:
        return float((found[name].double() - true[name]).abs().max())

    assert error(ours, "y") < 1e-5 < error(torchs, "y")
    assert error(ours, "dx") < 1e-5 < error(torchs, "dx")
    assert error(without, "dx") <= 2 * error(torchs, "dx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_saved_vectors_that_were_changed_are_taken_as_they_are(dtype: Any) -> None:
    """What lies behind them belongs to what they were."""
    x, dy = torch.randn(8, 3, 6).to(dtype), torch.randn(8, 3, 6).to(dtype)
    with fastbn.torch.enabled():
        _, mean, invstd = native(x, None, None, None, None, True, 0.1, 1e-5)
        assert mean.untyped_storage().nbytes() > mean.nbytes
        for vector in (mean, invstd):
            vector[1] += 0.5
        got = native_backward(dy, x, None, None, None, mean, invstd, True, 1e-5, [True, False, False])[0]
        fresh = native_backward(dy, x, None, None, None, mean.clone(), invstd.clone(), True, 1e-5, [True, False, False])[0]
    assert torch.equal(got, fresh)
    want = native_backward(*double(dy, x), None, None, None, *double(mean, invstd), True, 1e-5, [True, False, False])[0]
    torch.testing.assert_close(got.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ["contiguous", "last"])
def test_gradients_are_those_of_finite_differences(training: bool, order: str) -> None:
    torch.manual_seed(5)
    x = laid_out(torch.randn(3, 2, 2, 3, dtype=torch.float64), order).requires_grad_()
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def f(x: Any, weight: Any, bias: Any) -> Any:
        return F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    with fastbn.torch.enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself deprecates
        assert torch.autograd.gradcheck(f, (x, weight, bias), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, (x, weight, bias))
    assert taken() > 0


def operators() -> list[Any]:
    """PyTorch's own samples of the operators that come to fastbn."""
    pytest.importorskip("expecttest", reason="needs expecttest, as torch.testing does")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    names = {f"{name}batch_norm" for name in ("native_", "nn.functional.")} | {"nn.functional.instance_norm", "_batch_norm_with_update"}
    found = [op for op in op_db if op.name in names]
    assert {op.name for op in found} == names
    return found


def called(op: Any, sample: Any, dtype: Any = None) -> list[Any]:
    """What an operator returns for a sample, the gradients of its inputs, and these, which it may have changed."""

    def own(a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        return a.detach().clone().to(dtype or a.dtype).requires_grad_(a.requires_grad)

    given = [own(sample.input), *map(own, sample.args)]
    named = {name: own(a) for name, a in sample.kwargs.items()}
    inputs = [a for a in (*given, *named.values()) if isinstance(a, torch.Tensor)]
    out = op.op(*given, **named)
    out = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
    if out[0].requires_grad:
        out[0].backward(torch.linspace(-1, 1, out[0].numel(), dtype=out[0].dtype).reshape(out[0].shape))
    return [*(t.detach() for t in out), *(a.grad for a in inputs), *(a.detach() for a in inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_torchs_own_samples_have_torchs_results(dtype: Any) -> None:
    for op in operators():
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            want, true = called(op, sample), called(op, sample, torch.float64)
            with fastbn.torch.enabled():
                got = called(op, sample)
            assert len(got) == len(want) == len(true)
            for a, b, c in zip(got, want, true, strict=True):
                near(a, b, c, f"{op.name} {sample}")
    assert taken() > 50


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=short)
def test_torchs_own_inputs_of_layers_have_torchs_results(dtype: Any, training: bool) -> None:
    pytest.importorskip("expecttest", reason="needs expecttest, as torch.testing does")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db

    def called(inputs: Any, kind: Any, lazy: bool, wide: bool = False) -> list[Any]:
        torch.manual_seed(0)
        made = inputs.constructor_input
        layer = kind(*made.args[lazy:], **{**made.kwargs, "device": "cpu", "dtype": dtype}).train(training)
        args = [a.detach().clone().requires_grad_() for a in inputs.forward_input.args]
        with torch.no_grad():
            layer(*args)  # a lazy one learns how many channels there are
        if wide:
            layer, args = layer.double(), [a.detach().double().requires_grad_() for a in args]
        y = layer(*args)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        return [y.detach(), *(a.grad for a in args), *(p.grad for p in layer.parameters()), *(b for b in layer.buffers() if b.dim())]

    names = {f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (1, 2, 3)}
    infos = [info for info in module_db if info.module_cls.__name__ in names]
    assert len(infos) == len(names)
    for info, lazy in itertools.product(infos, (False, True)):
        if lazy and "Instance" in info.name:
            continue  # these take the wrong dimension for the channels of a single image
        kind = getattr(torch.nn, f"Lazy{info.module_cls.__name__}") if lazy else info.module_cls
        for inputs in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training):
            want, true = called(inputs, kind, lazy), called(inputs, kind, lazy, wide=True)
            with fastbn.torch.enabled():
                got = called(inputs, kind, lazy)
            for a, b, c in zip(got, want, true, strict=True):
                near(a, b, c, f"{kind} {inputs.constructor_input} {training}")
    assert taken() > 50


BAD = {
    "dtype": lambda x, o: native(x.int(), None, None, None, None, True, 0.1, 1e-5),
    "complex": lambda x, o: native(x + 0j, None, None, None, None, True, 0.1, 1e-5),
    "parameters": lambda x, o: native(x, o.double(), None, None, None, True, 0.1, 1e-5),
    "dimension": lambda x, o: native(x.flatten(), None, None, None, None, True, 0.1, 1e-5),
    "empty": lambda x, o: native(x[:0], None, None, None, None, True, 0.1, 1e-5),
    "no channels": lambda x, o: native(x[:, :0], None, None, None, None, True, 0.1, 1e-5),
    "half of the statistics": lambda x, o: native(x, None, None, o, None, True, 0.1, 1e-5),
    "other dtype of the gradient": lambda x, o: native_backward(x.double(), x, o, o, o, o, o, True, 1e-5, [True] * 3),
    "another number of gradients": lambda x, o: native_backward(x, x, o, o, o, o, o, True, 1e-5, [True] * 2),
    "sparse": lambda x, o: native(x, o.to_sparse(), None, None, None, True, 0.1, 1e-5),
    "few values": lambda x, o: F.batch_norm(x[:1, :, 0, 0], None, None, training=True),
    "channels": lambda x, o: F.batch_norm(x, torch.ones(4), torch.ones(4)),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_errors_are_those_of_torch(call: Callable[[Any, Any], Any]) -> None:
    x, ones = torch.randn(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(Exception) as want:  # noqa: PT011  whatever it is
        call(x, ones)
    with fastbn.torch.enabled(), pytest.raises((RuntimeError, ValueError)) as got:
        call(x, ones)
    said = str(got.value).splitlines()[0]
    assert said in {str(want.value).splitlines()[0], "PyTorch's own batch norm failed, and has written why to the standard error"}
    assert said == str(want.value).splitlines()[0] or torch.__version__ < "2.13"
    assert taken() == 0


SHARED = "running statistics share memory with another tensor"
LEFT = {
    "eps": (lambda x, v: native(x, None, None, None, None, True, 0.1, 0.0), "eps is not positive"),
    "range": (lambda x, v: native(x.double() * 1e200, None, None, None, None, True, 0.1, 1e-5), "values are at the ends of the range"),
    "one vector for both": (lambda x, v: (*native(x, None, None, v, v, True, 0.1, 1e-5), v), SHARED),
    "weight is moved": (
        lambda x, v: (*native(x, v, None, v, v.clone(), True, 0.1, 1e-5), v),
        SHARED,
    ),
    "x is moved": (
        lambda x, v: (*native(x, None, None, x[0, 0, 0, :3], v, True, 0.1, 1e-5), x),
        SHARED,
    ),
    "dimensions": (
        lambda x, v: native(x.reshape(2, 3, *[1] * 14, 20), None, None, None, None, True, 0.1, 1e-5),
        "x has too few dimensions or more than 16, or another tensor is unlike x",
    ),
    "far": (lambda x, v: native_backward(x, x, v, v, v, v, v * 1e38, True, 1e-5, [True] * 3), "values are at the ends of the range"),
}


@pytest.mark.parametrize(("call", "reason"), LEFT.values(), ids=LEFT.keys())
def test_what_is_left_to_torch_is_what_torch_computes(call: Callable[[Any, Any], Any], reason: str) -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 3, 4, 5)
    want = call(x.clone(), torch.ones(3))
    with fastbn.torch.enabled():
        got = call(x.clone(), torch.ones(3))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (taken(), reasons()) == (0, [reason])


def test_infinite_values_and_nan_give_what_torch_gives() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(4, 3, 5)
        x[2, 1, 3] = bad
        want = F.batch_norm(x, None, None, training=True)
        with fastbn.torch.enabled():
            got = F.batch_norm(x, None, None, training=True)
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_parameters_of_any_stride_are_taken_and_moved() -> None:
    x = torch.randn(5, 3, 4)
    apart = torch.randn(3, 4)
    vectors = apart[:, 0], torch.ones(1).expand(3), torch.zeros(6)[::2], torch.ones(6)[::2]
    given = x, torch.randn(5, 3, 4), *vectors
    want, true = step(*given, True), step(*double(*given), True)
    running = torch.zeros(6), torch.ones(6)
    with fastbn.torch.enabled():
        got = step(*given, True)
        F.batch_norm(x, running[0][::2], running[1][::2], training=True)
    for name in got:
        near(got[name], want[name], true[name], name)
    torch.testing.assert_close(running[0][::2], got["mean"])
    assert torch.equal(running[0][1::2], torch.zeros(3))
    assert torch.equal(running[1][1::2], torch.ones(3))
    assert reasons() == []


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (partial(torch.nn.BatchNorm1d, 4), (6, 4)),
        (partial(torch.nn.BatchNorm1d, 4, affine=False), (6, 4, 3)),
        (partial(torch.nn.BatchNorm2d, 4, momentum=None), (2, 4, 3, 5)),
        (partial(torch.nn.BatchNorm2d, 4, track_running_stats=False), (2, 4, 3, 5)),
        (partial(torch.nn.BatchNorm3d, 4, eps=1e-3), (2, 4, 3, 2, 5)),
        (torch.nn.LazyBatchNorm2d, (2, 4, 3, 5)),
        (partial(torch.nn.InstanceNorm2d, 4, affine=True, track_running_stats=True), (2, 4, 3, 5)),
        (partial(torch.nn.InstanceNorm1d, 4), (2, 4, 9)),
    ],
    ids=str,
)
def test_layers_are_torchs_own(layer: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(7)
    ours, theirs = layer(), layer()
    theirs.load_state_dict(ours.state_dict())
    for training in (True, True, False):
        x = torch.randn(shape)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for module, given, on in ((ours, inputs[0], True), (theirs, inputs[1], False)):
            module.train(training).zero_grad()
            if on:
                with fastbn.torch.enabled():
                    module(given).square().sum().backward()
            else:
                module(given).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert taken() == 6


def test_transformations_of_functions_come_through() -> None:
    torch.manual_seed(8)
    x, t = torch.randn(4, 2, 3, 5, dtype=torch.float64), torch.randn(4, 2, 3, 5, dtype=torch.float64)

    def f(a: Any) -> Any:
        return F.batch_norm(a, None, None, training=True)

    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.vmap(f)(x),
        "jvp": lambda: torch.func.jvp(f, (x,), (t,)),
        "grad": lambda: torch.func.grad(lambda a: f(a).pow(3).sum())(x),
        "trace": lambda: torch.jit.trace(f, (x,))(t),
        "inference": lambda: torch.inference_mode()(f)(x),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(f)(x),
        "checkpoint": lambda: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
        "copy on write": lambda: f(torch._lazy_clone(x)),
        "negative": lambda: f(torch._neg_view(x)),
    }
    for name, call in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch itself deprecates
            want = call()
            with fastbn.torch.enabled():
                got = call()
        torch.testing.assert_close(got, want, msg=name)


def test_outputs_are_as_free_as_torchs() -> None:
    with fastbn.torch.enabled():
        x = torch.randn(2, 3, 4, 5, requires_grad=True)
        y = F.batch_norm(x, None, None, training=True)
        y.sum().backward()
        _, mean, invstd = native(x.detach(), None, None, None, None, True, 0.1, 1e-5)
    for tensor in (y, x.grad, mean, invstd):
        assert tensor.untyped_storage().resizable()
        assert (tensor._version, tensor._base) == (0, None)
    mean.resize_(100)
    buffer = torch.zeros(3)
    with fastbn.torch.enabled():
        F.batch_norm(x, buffer, torch.ones(3), training=True)
    assert buffer.abs().max() > 0
    assert buffer._version == 0  # as torch's own kernel does


@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (8, 512, 4, 4)], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "last"])
def test_results_are_the_same_bits_for_any_number_of_threads(order: str, shape: tuple[int, ...]) -> None:
    """Of few rows, too, whose channels torch's threads share where one thread takes them row by row."""
    torch.manual_seed(9)
    x, dy, one, zero = laid_out(torch.randn(shape), order), laid_out(torch.randn(shape), order), torch.ones(shape[1]), torch.zeros(shape[1])
    found = []
    with fastbn.torch.enabled():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(step(x, dy, one, zero, zero.clone(), one.clone(), True))
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)


@pytest.mark.parametrize("order", ["contiguous", "last"])
def test_statistics_move_once_where_torch_computes_what_several_threads_had_begun(order: str) -> None:
    torch.manual_seed(9)
    x = torch.randn(8, 512, 4, 4, dtype=torch.float64)
    x[:, 300] *= 1e200
    x = laid_out(x, order)
    torch.set_num_threads(2)
    expected, found = ([torch.zeros(512, dtype=x.dtype), torch.ones(512, dtype=x.dtype)] for _ in range(2))
    F.batch_norm(x, *expected, training=True)
    with fastbn.torch.enabled():
        F.batch_norm(x, *found, training=True)
    assert fastbn.torch.report().declined  # it was torch's own in the end
    torch.testing.assert_close(found, expected)


def test_enabling_is_told_and_undone() -> None:
    x = torch.randn(2, 3, 4)
    assert not fastbn.torch.is_enabled()
    fastbn.torch.disable()
    for _ in range(3):
        fastbn.torch.enable()
    assert fastbn.torch.is_enabled()
    F.batch_norm(x, None, None, training=True)
    fastbn.torch.disable()
    assert not fastbn.torch.is_enabled()
    F.batch_norm(x, None, None, training=True)
    header = "     calls  what fastbn computed, or why it did not"
    assert str(fastbn.torch.report()).splitlines() == [header, "         1  forward, float32, contiguous"]


def test_blocks_nest_and_end_with_an_exception() -> None:
    with fastbn.torch.enabled(), fastbn.torch.enabled():
        pass
    assert not fastbn.torch.is_enabled()
    with pytest.raises(KeyError), fastbn.torch.enabled():
        raise KeyError
    assert not fastbn.torch.is_enabled()
    fastbn.torch.enable()
    with fastbn.torch.enabled():
        fastbn.torch.disable()
        assert fastbn.torch.is_enabled()
    assert not fastbn.torch.is_enabled()


def test_enabling_a_thousand_times_leaves_nothing() -> None:
    x = torch.randn(2, 3, 4)
    for _ in range(1000):
        fastbn.torch.enable()
        F.batch_norm(x, None, None, training=True)
        fastbn.torch.disable()
    assert fastbn.torch.report().taken == {("forward", "float32", "contiguous"): 1000}


def test_threads_may_call_while_another_one_enables_and_disables() -> None:
    torch.manual_seed(10)
    x, dy = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6)
    want, wrong, stop = step(x, dy, None, None, None, None, True), [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            got = step(x, dy, None, None, None, None, True)
            if not torch.allclose(got["dx"], want["dx"], atol=1e-5) or not torch.allclose(got["y"], want["y"], atol=1e-5):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            with fastbn.torch.enabled():
                step(x, dy, None, None, None, None, True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert taken() >= 600


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120)


def test_nothing_is_printed() -> None:
    call = "torch.nn.BatchNorm1d(3)(torch.randn(4, 3))"
    done = _python(f"import torch, fastbn.torch as t; t.enable(); {call}; t.disable(); print(t.report())")
    header = "     calls  what fastbn computed, or why it did not"
    assert (done.stdout, done.stderr) == (f"{header}\n         1  forward, float32, contiguous\n", "")


def test_a_report_without_calls_says_whether_fastbn_is_enabled() -> None:
    fastbn.torch.report(reset=True)
    assert str(fastbn.torch.report()) == "no calls: fastbn is not enabled, fastbn.torch.enable() does it"
    with fastbn.torch.enabled():
        assert str(fastbn.torch.report()) == "no calls"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_the_child_of_a_fork_computes_as_well() -> None:
    """Torch's own team of threads does not survive a fork: there its kernels would wait for ever."""
    done = _python(
        "import os, torch, fastbn.torch as t\n"
        "torch.set_num_threads(2); t.enable()\n"
        "x = torch.randn(8, 32, 20, 20, generator=torch.Generator().manual_seed(0))\n"
        "f = lambda: torch.nn.functional.batch_norm(x, None, None, training=True)\n"
        "y = f(); pid = os.fork()\n"
        "if pid == 0: os._exit(0 if f().numpy().tobytes() == y.numpy().tobytes() else 1)\n"
        "print(os.waitpid(pid, 0)[1], torch.equal(f(), y))\n"
    )
    assert (done.stdout, done.stderr) == ("0 True\n", "")


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(RuntimeError, match=r"needs PyTorch 2\.10 or newer, this is 2\.9\.1\+cpu: pip install -U torch"):
        fastbn.torch.enable()
    with pytest.raises(RuntimeError, match="newer"), fastbn.torch.enabled():
        pass
    assert not fastbn.torch.is_enabled()


def test_a_foreign_build_of_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Door:
        is_on = staticmethod(lambda: False)
        attach = staticmethod(lambda kernels: "torch_parallel_for, torch_library_impl")

    monkeypatch.setattr("fastbn.torch.override._door", lambda: Door)
    with pytest.raises(RuntimeError, match=r"lacks torch_parallel_for, torch_library_impl: fastbn\.torch needs the stable C interface"):
        fastbn.torch.enable()


def test_the_door_stays_shut_before_kernels_are_attached_that_have_all_calls() -> None:
    """Torch's functions are found then; C would call what was not found."""
    done = _python(
        "import torch, fastbn.torch._door as door\n"
        "from fastbn.kernels import _jobs\n"
        "for call in (door.start, door.define_operators, lambda: door.attach(_jobs.kernels(print, print))):\n"
        "    try: call()\n"
        "    except (RuntimeError, ValueError) as error: print(error)\n"
        "print(door.is_on(), door.takes_parts())\n"
    )
    assert (done.returncode, done.stdout.splitlines()[2:]) == (0, ["these kernels have no calls over parts", "False False"])


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="changes a name in a binary")


def _with_another_name(tmp_path: Path, name: str, code: str, heard: str = "") -> str:
    """What a process prints whose compiled part asks torch for a function that it does not have; it writes nothing else than `heard`."""
    import fastbn.torch._door as door

    binary = Path(door.__file__).read_bytes()
    old, new = f"{name}\0".encode(), f"{name[:-1]}?\0".encode()
    assert old in binary
    file = tmp_path / Path(door.__file__).name
    file.write_bytes(binary.replace(old, new))
    done = _python(
        "import importlib.util, sys, torch, fastbn.torch as t\n"
        f"spec = importlib.util.spec_from_file_location('fastbn.torch._door', {str(file)!r})\n"
        "sys.modules['fastbn.torch._door'] = door = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(door)\n"
        f"{code}"
    )
    assert (done.returncode, heard in done.stderr, bool(done.stderr)) == (0, True, bool(heard)), done.stderr
    return done.stdout


@on_linux
@pytest.mark.parametrize("name", ["torch_parallel_for", "aoti_torch_empty_strided"])
def test_a_torch_without_a_needed_function_is_refused(name: str, tmp_path: Path) -> None:
    code = (
        "for call in (t.enable, lambda: t.convert(torch.nn.BatchNorm1d(3))):\n"
        "    try: call()\n"
        "    except RuntimeError as e: print(e)\n"
        "y = torch.nn.BatchNorm1d(3)(torch.randn(4, 3)); print(t.is_enabled(), y.shape)\n"
    )
    *errors, last = _with_another_name(tmp_path, name, code).splitlines()
    message = (
        f"this build of PyTorch {torch.__version__} lacks {name[:-1]}?: fastbn.torch needs the stable C interface of the builds that "
        "`pip install torch` brings"
    )
    assert (errors, last) == ([message, message], "False torch.Size([4, 3])")


@on_linux
def test_without_torchs_own_kernels_of_layer_and_group_norm_these_stay_torchs(tmp_path: Path) -> None:
    name = "_ZN2at3cpu17native_group_normERKNS_6TensorERKSt8optionalIS1_ES7_lllld"
    code = (
        "m = torch.nn.Sequential(torch.nn.GroupNorm(1, 3), torch.nn.BatchNorm1d(3), torch.nn.LayerNorm(5)); t.enable()\n"
        "m(torch.randn(4, 3, 5)).sum().backward(); print(t.explain(m)); print(t.report())\n"
    )
    found = _with_another_name(tmp_path, name, code)
    assert found.count("lacks the functions that fastbn would leave calls to") == 2
    assert [line.split(None, 1)[1] for line in found.splitlines()[4:]] == ["forward, float32, contiguous", "backward, float32, contiguous"]


@on_linux
@pytest.mark.parametrize("name", ["torch_delete_stable_ivalue", "torch_exception_get_what_without_backtrace"])
def test_an_older_torch_without_newer_functions_is_enough(name: str, tmp_path: Path) -> None:
    code = (
        "t.enable(); layer = torch.nn.BatchNorm1d(3)\n"
        "layer(torch.randn(4, 3)).sum().backward()\n"
        "try: torch.native_batch_norm(torch.ones(2, 3, dtype=torch.int), None, None, None, None, True, 0.1, 1e-5)\n"
        "except RuntimeError as e: print(str(e).splitlines()[0])\n"
        "print(t.report())\n"
    )
    older = torch.__version__ < "2.13"  # it writes what is wrong, and has no function that says it
    heard = "not implemented for 'Int'" if older else ""
    error, *found = _with_another_name(tmp_path, name, code, heard).splitlines()
    assert ("PyTorch's own batch norm failed, and has written why" in error) == (older or name.startswith("torch_exception"))
    assert [line.split(None, 1)[1] for line in found[1:]] == [
        "forward, float32, contiguous",
        "backward, float32, contiguous",
        "forward, left to torch: x has another dtype than float32, float64, bfloat16 and float16",
    ]


def test_without_what_is_compiled_there_is_a_clear_error() -> None:
    done = _python(
        "import sys, fastbn.torch as t\n"
        "t.disable(); sys.modules['fastbn.torch._door'] = None\n"
        "try: t.enable()\n"
        "except RuntimeError as e: print(e, t.is_enabled())\n"
    )
    assert done.stderr == ""
    assert done.stdout.startswith("fastbn.torch needs fastbn's compiled part, which this installation lacks (")
    assert done.stdout.endswith(" False\n")


def test_kernels_that_are_not_compiled_are_refused() -> None:
    with fastbn.use_kernel("reference"), pytest.raises(RuntimeError, match="needs fastbn's compiled kernels, but 'reference' would run"):
        fastbn.torch.enable()
    assert not fastbn.torch.is_enabled()


def test_a_pinned_kernel_runs() -> None:
    torch.manual_seed(11)
    x, dy = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6)
    found = []
    for kernel in [k for k in fastbn.dispatch.TABLE if k.level is not None and k.unusable() is None]:
        with fastbn.use_kernel(kernel.name), fastbn.torch.enabled():
            found.append(step(x, dy, None, None, None, None, True))
    for other in found:
        torch.testing.assert_close(other, found[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # by what torch.compile imports
def test_explain_says_what_would_happen() -> None:
    x = torch.ones(8, 64, 4, 4)
    lines = {
        fastbn.torch.explain(x): "taken: float32, contiguous, 8 x 64 x 16 (outer x channels x inner)",
        fastbn.torch.explain(laid_out(x, "last")): "taken: float32, channels last, 128 x 64 x 1 (outer x channels x inner)",
        fastbn.torch.explain(x.transpose(0, 1)): "taken: float32, copied to a contiguous one first, 64 x 8 x 16 (outer x channels x inner)",
        fastbn.torch.explain(x.int()): "left to torch: its dtype is int32",
        fastbn.torch.explain(x.flatten()): "left to torch: it has 1 dimensions",
        fastbn.torch.explain(x[:0]): "left to torch: it is empty",
        fastbn.torch.explain(x.to("meta")): "left to torch: it lies on meta",
        fastbn.torch.explain(x.to_sparse()): "left to torch: its layout is sparse_coo",
        fastbn.torch.explain(torch.nested.as_nested_tensor(x)): "left to torch: it is nested",
        fastbn.torch.explain(torch.nn.ReLU()): "the model has no normalization layers",
        fastbn.torch.explain(torch.nn.BatchNorm1d(3).double()): "the model: BatchNorm1d(3): taken, float64",
        fastbn.torch.explain(torch.nn.BatchNorm1d(3, device="meta")): "the model: BatchNorm1d(3): left to torch: it lies on meta",
        fastbn.torch.explain(torch.nn.InstanceNorm1d(3)): "the model: InstanceNorm1d(3): taken",
        fastbn.torch.explain(torch.nn.LazyBatchNorm1d()): "the model: LazyBatchNorm1d(0): unknown before its first call",
        fastbn.torch.explain(torch.nn.SyncBatchNorm(3)): "the model: SyncBatchNorm(3): left to torch, which synchronizes it",
    }
    assert list(lines) == list(lines.values())
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor or a torch.nn.Module, got int"):
        fastbn.torch.explain(3)  # type: ignore[arg-type]
    compiled = fastbn.torch.explain(torch.compile(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))).splitlines()
    assert [line.partition(":")[0] for line in compiled] == ["_orig_mod.0", "compiled"]


@pytest.mark.slow
def test_memory_does_not_grow() -> None:
    """Also where calls are declined, copied or fail."""
    resource = pytest.importorskip("resource")
    layers = [torch.nn.BatchNorm2d(16), torch.nn.BatchNorm2d(16).bfloat16()]
    tensors = [torch.randn(4, 16, 8, 8), torch.randn(4, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)]
    bad = torch.randn(4, 16, 8, 8).double()

    def steps(n: int) -> None:
        for i in range(n):
            layer, x = layers[i % 2], tensors[i % 2].clone().requires_grad_()
            y = layer(x)
            y.sum().backward()  # an expanded gradient, which is copied
            native(bad * 1e300, None, None, None, None, True, 0.1, 1e-5)
            if i % 100 == 0:  # torch collects a backtrace, which takes long
                with pytest.raises(RuntimeError):
                    native(x, bad[0, :, 0, 0], None, None, None, True, 0.1, 1e-5)

    with fastbn.torch.enabled():
        steps(2000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        steps(10_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB; a tensor's handle in each step would be 1 MiB
