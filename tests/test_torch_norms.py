"""Layer, group and instance norm of PyTorch's by fastbn: the same results as torch's own, seen from every side."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

from test_torch import DTYPES, OPEN, _off_afterwards, called, double, laid_out, near, reasons, short, taken  # noqa: E402, F401

import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402

F = torch.nn.functional
layer_norm, layer_backward = torch.ops.aten.native_layer_norm, torch.ops.aten.native_layer_norm_backward
group_norm, group_backward = torch.ops.aten.native_group_norm, torch.ops.aten.native_group_norm_backward

pytestmark = pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels")

ORDERS = ("contiguous", "last", "turned", "sliced")
LEFT = "values are at the ends of the range, a weight is nearly 0, or rows have one element or more than a million"

# Shape, and what is normalized: the last axes or, a number, groups of channels.
CASES = (
    ((6, 32), (32,)),
    ((3, 5, 33), (33,)),
    ((2, 3, 4, 5), (4, 5)),
    ((24,), (24,)),
    ((2, 197, 48), (48,)),
    ((2, 3, 4, 5), (3, 4, 5)),
    ((3, 6, 5, 7), 2),
    ((3, 6, 5, 7), 6),
    ((2, 6, 5, 7), 1),
    ((2, 4, 11), 2),
    ((2, 4, 3, 4, 5), 2),
    ((2, 32, 16, 16), 8),
    ((1, 4, 1, 6), 2),
    ((4, 12), 1),
)


def step(x: Any, dy: Any, kind: Any, weight: Any, bias: Any, eps: float = 1e-5) -> dict[str, Any]:
    """All that a step of training with one layer makes."""
    x, weight, bias = (None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias))
    y = F.group_norm(x, kind, weight, bias, eps) if isinstance(kind, int) else F.layer_norm(x, kind, weight, bias, eps)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, **{f"d{i}": t.grad for i, t in enumerate((weight, bias)) if t is not None}}


def parameters(shape: tuple[int, ...], kind: Any, dtype: Any) -> list[Any]:
    sizes = (shape[1],) if isinstance(kind, int) else kind
    return [torch.randn(sizes).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(("dtype", "of_vectors"), DTYPES, ids=short)
@pytest.mark.parametrize(("shape", "kind"), CASES, ids=str)
def test_results_are_those_of_torch(shape: tuple[int, ...], kind: Any, dtype: Any, of_vectors: Any) -> None:
    torch.manual_seed(0)
    x, dy = (2 * torch.randn(shape) + 3).to(dtype), torch.randn(shape).to(dtype)
    vectors, calls = parameters(shape, kind, of_vectors), 0
    orders = ORDERS if x.dim() > 1 else ("contiguous", "sliced")
    for order, of_dy, affine in itertools.product(orders, ("same", "contiguous"), (True, False)):
        given = laid_out(x, order), laid_out(dy, order if of_dy == "same" else of_dy), kind, *(vectors if affine else (None, None))
        want, true = step(*given), step(*double(*given[:2]), kind, *double(*given[3:]))
        with fastbn.torch.enabled():
            got = step(*given)
        calls += 2
        for name in got:
            near(got[name], want[name], true[name], f"{name} {order} {of_dy} {affine=}")
    left = fastbn.torch.report().declined
    assert taken() + sum(left.values()) == calls
    assert {reason for _, reason in left} <= ({OPEN} if shape == (1, 4, 1, 6) else set())  # it depends on what torch's `clone` does


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_operators_return_what_torchs_return(dtype: Any) -> None:
    """The saved vectors, too."""
    torch.manual_seed(1)
    x = torch.randn(3, 8, 4, 5).to(dtype)
    calls: list[Callable[[Any], Any]] = [
        lambda x: layer_norm(x, (5,), None, None, 1e-5),
        lambda x: layer_norm(x, (4, 5), None, None, 1e-5),
        lambda x: layer_norm(x, (4, 5), torch.ones(4, 5, dtype=x.dtype), None, 1e-5),
        lambda x: layer_norm(x, (3, 8, 4, 5), None, None, 1e-5),
        lambda x: group_norm(x, None, None, 3, 8, 20, 4, 1e-5),
        lambda x: group_norm(x.contiguous(memory_format=torch.channels_last), None, None, 3, 8, 20, 2, 1e-5),
        lambda x: group_norm(x, torch.ones(8, dtype=x.dtype), None, 3, 8, 20, 8, 1e-5),
    ]
    if dtype.itemsize == 2:
        calls += [
            lambda x: layer_norm(x, (5,), torch.ones(5), None, 1e-5),
            lambda x: group_norm(x, None, torch.ones(8), 3, 8, 20, 4, 1e-5),
        ]
    for call in calls:
        with fastbn.torch.enabled():
            got = call(x)
        true = call(x.float() if dtype.itemsize == 2 else x.double())
        for a, b, c in zip(got, call(x), true, strict=True):
            near(a, b, c.double())
    assert taken() == len(calls)


@pytest.mark.parametrize("mask", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("kind", ["layer", "group", "group last"])
def test_only_gradients_that_are_wanted_are_returned(kind: str, mask: tuple[bool, ...]) -> None:
    torch.manual_seed(2)
    x, dy = (laid_out(torch.randn(3, 4, 5, 6), "last" if "last" in kind else "contiguous") for _ in range(2))
    if kind == "layer":
        weight, bias = torch.randn(6), torch.randn(6)
        saved = layer_norm(x, (6,), weight, bias, 1e-5)[1:]
        call: Callable[[Any], Any] = lambda mask: layer_backward(dy, x, (6,), *saved, weight, bias, list(mask))  # noqa: E731
    else:
        weight = torch.randn(4)
        saved = group_norm(x, weight, None, 3, 4, 30, 2, 1e-5)[1:]
        call = lambda mask: group_backward(dy, x, *saved, weight, 3, 4, 30, 2, list(mask))  # noqa: E731
    want = call((True, True, True))  # without dx torch's own group norm crashes
    with fastbn.torch.enabled():
        got = call(mask)
    assert taken() == 1
    for a, b, wanted in zip(got, want, mask, strict=True):
        assert (a is not None) == wanted
        if wanted:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kind", "order"),
    [((32, 256), (256,), "contiguous"), ((4, 6, 16, 16), 3, "contiguous"), ((4, 6, 16, 16), 3, "last")],
    ids=str,
)
def test_digits_that_the_mean_rounds_away_reach_the_backward(shape: tuple[int, ...], kind: Any, order: str) -> None:
    torch.manual_seed(3)
    x, dy = laid_out(1e6 + torch.randn(shape), order), laid_out(torch.randn(shape), order)
    true = step(*(t.contiguous() for t in double(x, dy)), kind, None, None)  # of channels last torch's own loses digits, in float64 too
    with fastbn.torch.enabled():
        ours = step(x, dy, kind, None, None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):  # these copy the vector alone
            without = step(x, dy, kind, None, None)

    def error(found: dict[str, Any], name: str) -> float:
        return float((found[name].double() - true[name]).abs().max())

    assert error(ours, "y") < 1e-5
    assert error(ours, "dx") < 1e-5
    assert 1e-5 < error(without, "dx") < 0.1
    assert taken() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_saved_vectors_that_were_changed_are_taken_as_they_are(dtype: Any) -> None:
    """What lies behind them belongs to what they were."""
    x, dy, mask = torch.randn(3, 4, 8).to(dtype), torch.randn(3, 4, 8).to(dtype), [True, False, False]
    with fastbn.torch.enabled():
        for call, backward in (
            (lambda: layer_norm(x, (8,), None, None, 1e-5), lambda m, r: layer_backward(dy, x, (8,), m, r, None, None, mask)),
            (lambda: group_norm(x, None, None, 3, 4, 8, 2, 1e-5), lambda m, r: group_backward(dy, x, m, r, None, 3, 4, 8, 2, mask)),
        ):
            _, mean, rstd = call()
            assert mean.untyped_storage().nbytes() > mean.nbytes
            for vector in (mean, rstd):
                vector[1] += 0.5
            assert torch.equal(backward(mean, rstd)[0], backward(mean.clone(), rstd.clone())[0])
    assert taken() == 6


@pytest.mark.parametrize("order", ["contiguous", "last"])
@pytest.mark.parametrize("kind", [(3,), (2, 3), 2, 4], ids=str)
def test_gradients_are_those_of_finite_differences(kind: Any, order: str) -> None:
    torch.manual_seed(4)
    x = laid_out(torch.randn(3, 4, 2, 3, dtype=torch.float64), order).requires_grad_()
    weight, bias = (t.requires_grad_() for t in parameters((3, 4, 2, 3), kind, torch.float64))

    def f(x: Any, weight: Any, bias: Any) -> Any:
        return F.group_norm(x, kind, weight, bias) if isinstance(kind, int) else F.layer_norm(x, kind, weight, bias)

    with fastbn.torch.enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself deprecates
        further = order == "contiguous" or not isinstance(kind, int)  # torch has neither of group norm in channels last
        assert torch.autograd.gradcheck(f, (x, weight, bias), check_forward_ad=further)
        if further:
            assert torch.autograd.gradgradcheck(f, (x, weight, bias))
    assert taken() > 0
    assert reasons() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=short)
def test_torchs_own_samples_have_torchs_results(dtype: Any) -> None:
    pytest.importorskip("expecttest", reason="needs expecttest, as torch.testing does")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    names = {"native_layer_norm", *(f"nn.functional.{name}_norm" for name in ("layer", "group", "instance", "rms"))}
    found = [op for op in op_db if op.name in names]
    assert {op.name for op in found} == names
    for op in found:
        before = taken()
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            want, true = called(op, sample), called(op, sample, torch.float64)
            with fastbn.torch.enabled():
                got = called(op, sample)
            for a, b, c in zip(got, want, true, strict=True):
                near(a, b, c, f"{op.name} {sample}")
        assert (taken() > before) == ("rms" not in op.name), op.name  # which is no operator of its own on the CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_torchs_own_inputs_of_layers_have_torchs_results(dtype: Any) -> None:
    pytest.importorskip("expecttest", reason="needs expecttest, as torch.testing does")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db

    def results(inputs: Any, kind: Any, wide: bool = False) -> list[Any]:
        torch.manual_seed(0)
        made = inputs.constructor_input
        layer = kind(*made.args, **{**made.kwargs, "device": "cpu", "dtype": dtype})
        args = [a.detach().clone().requires_grad_() for a in inputs.forward_input.args]
        if wide:
            layer, args = layer.double(), [a.detach().double().requires_grad_() for a in args]
        y = layer(*args)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        return [y.detach(), *(a.grad for a in args), *(p.grad for p in layer.parameters())]

    infos = [info for info in module_db if info.module_cls in (torch.nn.LayerNorm, torch.nn.GroupNorm)]
    assert len(infos) == 2
    for info in infos:
        before = taken()
        for inputs in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
            want, true = results(inputs, info.module_cls), results(inputs, info.module_cls, wide=True)
            with fastbn.torch.enabled():
                got = results(inputs, info.module_cls)
            for a, b, c in zip(got, want, true, strict=True):
                near(a, b, c, f"{info.name} {inputs.constructor_input}")
        assert taken() > before


BAD: dict[str, Callable[[Any, Any], Any]] = {
    "rows": lambda x, o: F.layer_norm(x, (4,)),
    "no rows": lambda x, o: layer_norm(x, (), None, None, 1e-5),
    "many axes": lambda x, o: layer_norm(x, (1,) * 20, None, None, 1e-5),
    "dtype": lambda x, o: F.layer_norm(x.int(), (5,)),
    "complex": lambda x, o: F.layer_norm(x + 0j, (5,)),
    "weight": lambda x, o: F.layer_norm(x, (5,), o),
    "bias": lambda x, o: F.layer_norm(x, (5,), None, o),
    "dtype of the weight": lambda x, o: F.layer_norm(x, (5,), torch.ones(5).double()),
    "groups": lambda x, o: F.group_norm(x, 3),
    "no groups": lambda x, o: F.group_norm(x, 0),
    "weight of channels": lambda x, o: F.group_norm(x, 2, torch.ones(3)),
    "dtype of the bias": lambda x, o: F.group_norm(x, 2, o, o.double()),
    "dtype of a group norm": lambda x, o: F.group_norm(x.int(), 2),
    "another number of gradients": lambda x, o: group_backward(x, x, o, o, o, 2, 4, 15, 2, [True] * 2),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD.keys())
def test_errors_are_those_of_torch(call: Callable[[Any, Any], Any]) -> None:
    x, ones = torch.randn(2, 4, 3, 5), torch.ones(4)
    with pytest.raises(Exception) as want:  # noqa: PT011  whatever it is
        call(x, ones)
    with fastbn.torch.enabled(), pytest.raises(want.type) as got:
        call(x, ones)
    assert taken() == 0
    if "gradients" not in str(want.value) and "elements" not in str(got.value):
        assert str(got.value).splitlines()[0] == str(want.value).splitlines()[0]


OTHERS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "eps": (lambda x, v: layer_norm(x, (5,), None, None, 0.0), "eps is not positive"),
    "eps of groups": (lambda x, v: group_norm(x, v, v, 2, 4, 15, 2, -0.0), "eps is not positive"),
    "range": (lambda x, v: layer_norm(x.double() * 1e200, (5,), None, None, 1e-5), LEFT),
    "one element": (lambda x, v: layer_norm(x[..., :1], (1,), None, None, 1e-5), LEFT),
    "long rows": (lambda x, v: layer_norm(x[0, 0, 0, 0].expand(1, 1 << 21), (1 << 21,), None, None, 1e-5), LEFT),
    "one value in each group": (lambda x, v: group_norm(x[:, :, 0, 0].contiguous(), v, None, 2, 4, 1, 4, 1e-5), LEFT),
    "weight of 0": (
        lambda x, v: group_backward(x, x, torch.zeros(2, 2), torch.ones(2, 2), v * 0, 2, 4, 15, 2, [True] * 3),
        LEFT,
    ),
    "sizes": (
        lambda x, v: group_norm(x, v, v, 1, 4, 30, 2, 1e-5),
        "x has too few dimensions or more than 16, or another tensor is unlike x",
    ),
    "more axes than most tensors have": (
        lambda x, v: [t.reshape(-1) for t in layer_norm(x.reshape(*[1] * 70, 24, 5), (*[1] * 68, 24, 5), None, None, 1e-5)],
        "x has too few dimensions or more than 16, or another tensor is unlike x",
    ),
    "empty": (lambda x, v: layer_norm(x[:0], (5,), None, None, 1e-5), "x is empty"),
    "empty groups": (lambda x, v: group_norm(x[:0], v, v, 0, 4, 15, 2, 1e-5), "x is empty"),
    "no weight": (
        lambda x, v: layer_backward(x, x, (5,), torch.zeros(2, 4, 3, 1), torch.ones(2, 4, 3, 1), None, torch.ones(5), [True, False, True]),
        "a tensor that is needed is absent",
    ),
}


@pytest.mark.parametrize(("call", "reason"), OTHERS.values(), ids=OTHERS.keys())
def test_what_is_left_to_torch_is_what_torch_computes(call: Callable[[Any, Any], Any], reason: str) -> None:
    torch.manual_seed(6)
    x = torch.randn(2, 4, 3, 5)
    want = call(x.clone(), torch.ones(4))
    with fastbn.torch.enabled():
        got = call(x.clone(), torch.ones(4))
    for a, b in zip(got, want, strict=True):
        assert a is b is None or (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert (taken(), reasons()) == (0, [reason])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_stay_in_their_part(bad: float) -> None:
    x = torch.randn(4, 6, 5, 5)
    x[2, 1, 3, 3] = bad
    for kind in ((5,), 3):
        want = step(x, x.nan_to_num(0, 0, 0), kind, None, None)["y"]
        with fastbn.torch.enabled():
            got = step(x, x.nan_to_num(0, 0, 0), kind, None, None)["y"]
        assert torch.equal(got.isnan(), want.isnan())
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "layer": lambda a: F.layer_norm(a, (5,)),
    "group": lambda a: F.group_norm(a, 2),
    "instance": lambda a: F.instance_norm(a),
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_transformations_of_functions_come_through(f: Callable[[Any], Any]) -> None:
    torch.manual_seed(8)
    x, t = torch.randn(4, 2, 4, 5, dtype=torch.float64), torch.randn(4, 2, 4, 5, dtype=torch.float64)
    calls: dict[str, Callable[[], Any]] = {
        "vmap": lambda: torch.vmap(lambda a: f(a[None])[0])(x),
        "jvp": lambda: torch.func.jvp(f, (x,), (t,)),
        "grad": lambda: torch.func.grad(lambda a: f(a).pow(3).sum())(x),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(lambda a: f(a[None]).pow(3).sum()))(x),
        "trace": lambda: torch.jit.trace(f, (x,))(t),
        "inference": lambda: torch.inference_mode()(f)(x),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(f)(x),
        "checkpoint": lambda: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False),
        "copy on write": lambda: f(torch._lazy_clone(x)),
        "negative": lambda: f(torch._neg_view(x)),
        "graph": lambda: torch.fx.experimental.proxy_tensor.make_fx(f, tracing_mode="fake")(x)(x),
    }
    for name, call in calls.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch itself deprecates
            want = call()
            with fastbn.torch.enabled():
                got = call()
        torch.testing.assert_close(got, want, msg=name)
    with fastbn.torch.enabled():
        assert f(x.to("meta")).shape == x.shape


def test_outputs_are_as_free_as_torchs() -> None:
    with fastbn.torch.enabled():
        x = torch.randn(2, 4, 4, 5, requires_grad=True)
        y, z = F.layer_norm(x, (5,)), F.group_norm(x, 2)
        gradients = [torch.autograd.grad(t.sum(), x)[0] for t in (y, z)]
        saved = *layer_norm(x.detach(), (5,), None, None, 1e-5)[1:], *group_norm(x.detach(), None, None, 2, 4, 20, 2, 1e-5)[1:]
    for tensor in (y, z, *gradients, *saved):
        assert tensor.untyped_storage().resizable()
        assert (tensor._version, tensor._base) == (0, None)


def test_parameters_of_any_stride_are_taken() -> None:
    x, dy = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    for kind, n in (((4,), 4), (3, 3)):
        vectors = torch.randn(n, 2)[:, 0], torch.ones(1).expand(n)
        want, true = step(x, dy, kind, *vectors), step(*double(x, dy), kind, *double(*vectors))
        with fastbn.torch.enabled():
            got = step(x, dy, kind, *vectors)
        for name in got:
            near(got[name], want[name], true[name], name)
    assert reasons() == []


def test_results_are_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(9)
    for kind, order in (((32,), "contiguous"), (8, "contiguous"), (8, "last"), (32, "last")):
        x, dy = laid_out(torch.randn(5, 32, 32, 32), order), laid_out(torch.randn(5, 32, 32, 32), order)
        found = []
        with fastbn.torch.enabled():
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(step(x, dy, kind, torch.ones(32), torch.zeros(32)))
        for other in found[1:]:
            assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_threads_may_call_at_once_while_another_one_enables_and_disables() -> None:
    torch.manual_seed(10)
    x, dy = torch.randn(4, 8, 6, 6), torch.randn(4, 8, 6, 6)
    kinds, wrong, stop = ((6,), 4), [], threading.Event()
    want = [step(x, dy, kind, None, None) for kind in kinds]

    def work() -> None:
        while not stop.is_set():
            for kind, right in zip(kinds, want, strict=True):
                got = step(x, dy, kind, None, None)
                wrong.extend(name for name in got if not torch.allclose(got[name], right[name], atol=1e-5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            with fastbn.torch.enabled():
                step(x, dy, kinds[0], None, None)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert taken() >= 200


def test_enabling_is_counted_and_undone() -> None:
    layers = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.LayerNorm(5), torch.nn.InstanceNorm1d(4))
    x = torch.randn(2, 4, 5)
    with fastbn.torch.enabled():
        layers(x).sum().backward()
    layers(x).sum().backward()
    assert str(fastbn.torch.report()).splitlines()[1:] == [
        "         1  forward, float32, contiguous",
        "         1  backward, float32, contiguous",
        "         1  layer norm forward, float32, contiguous",
        "         1  layer norm backward, float32, contiguous",
        "         1  group norm forward, float32, contiguous",
        "         1  group norm backward, float32, contiguous",
    ]


def test_layers_are_named_wherever_batch_norms_are() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.ReLU(), torch.nn.LayerNorm((6, 6)))
    assert fastbn.torch.explain(model).splitlines() == ["1: GroupNorm(2, 4): taken, float32", "3: LayerNorm(36): taken, float32"]
    assert fastbn.torch.explain(torch.nn.LayerNorm(5, device="meta")) == "the model: LayerNorm(5): left to torch: it lies on meta"
    found = fastbn.torch.summary(model)
    assert [(layer.path, layer.kind, layer.channels, layer.mode, layer.before, layer.after, layer.fold) for layer in found] == [
        ("1", "GroupNorm", 4, "-", "Conv2d", "ReLU", "it normalizes each image by itself"),
        ("3", "LayerNorm", 36, "-", "ReLU", "the output", "it normalizes each row by itself"),
    ]
    model.append(torch.nn.RMSNorm(6))
    assert fastbn.torch.explain(model).splitlines()[2] == (
        "4: RMSNorm(6): left to torch, whose operator of it has no backward on the CPU; `convert` takes it"
    )
    found = fastbn.torch.summary(model)
    assert (found[2].kind, found[2].channels, found[2].eps, found[2].fold) == ("RMSNorm", 6, None, "it normalizes each row by itself")
    assert "of dtype" in str(found)
    timed = fastbn.torch.benchmark(model, torch.randn(2, 3, 8, 8), seconds=0)
    assert min(timed.batch_norm.values()) > 0
    assert timed.declined == {}
