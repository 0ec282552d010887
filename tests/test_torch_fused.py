"""Batch norm with a residual and an activation in one operation of PyTorch's."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn.torch  # noqa: E402
from fastbn import checks  # noqa: E402
from fastbn.dispatch import select  # noqa: E402
from fastbn.torch import fused, operators  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels")

ACTIVATIONS = (None, *operators.ALONE, ("leaky_relu", 0.3))


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(fused, "SMALLEST", 0)
    fastbn.torch.report(reset=True)
    yield
    torch.set_num_threads(threads)


def taken() -> int:
    return sum(fastbn.torch.report().taken.values())


def composed(x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, activation: Any) -> Any:
    found = operators.IDENTITY if activation is None else checks.activation(activation)
    return operators.Arguments(x, residual, weight, bias, mean, var, training, 0.1, 1e-5, found).composed()


def ours(x: Any, residual: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, activation: Any) -> Any:
    return fastbn.torch.batch_norm(x, mean, var, weight, bias, training, activation=activation, residual=residual)


def step(f: Callable[..., Any], given: list[Any], dy: Any, training: bool, activation: Any, dtype: Any) -> list[Any]:
    leaves = [None if t is None else t.to(dtype).detach().clone().requires_grad_() for t in given[:4]]
    running = [None if t is None else t.to(dtype).clone() for t in given[4:]]
    y = f(*leaves, *running, training, activation)
    y.backward(dy.to(dtype))
    return [y.detach(), *(None if t is None else t.grad for t in leaves), *running]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_results_are_those_of_the_composition(dtype: Any, activation: Any) -> None:
    calls = 0
    switch = True, False
    for residual, training, order, affine in itertools.product(switch, switch, ("contiguous", "last", "turned"), switch):
        torch.manual_seed(0)
        x, r, dy = (torch.randn(4, 6, 5, 7).to(dtype) for _ in range(3))
        vectors = [t.to(dtype) for t in (torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5)]
        x = torch.where(x == vectors[2].reshape(6, 1, 1), x + 1, x)  # there z is 0, and torch's rounded one on either side of the kink
        if order == "last":
            x = x.contiguous(memory_format=torch.channels_last)
        if order == "turned":
            x, dy = x.transpose(0, 3).contiguous().transpose(0, 3), dy.contiguous(memory_format=torch.channels_last)
        given = [x, r if residual else None, *(vectors[:2] if affine else (None, None)), *vectors[2:]]
        want, true = (step(composed, given, dy, training, activation, wide) for wide in (dtype, torch.float64))
        got = step(ours, given, dy, training, activation, dtype)
        calls += 2 * (residual or activation is not None)
        for a, b, c in zip(got, want, true, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
                few = 64 if dtype == torch.float64 else 4
                allowed = 2 * (b.double() - c).abs().max() + few * torch.finfo(dtype).eps * max(1.0, c.abs().max())
                assert (a.double() - c).abs().max() <= allowed, (residual, training, order, affine)
    assert taken() == calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_the_same_whichever_are_wanted(activation: Any, training: bool) -> None:
    """Behind a convolution that does not learn, that of the residual alone."""
    torch.manual_seed(1)
    given = [torch.randn(4, 6, 5, 7), torch.randn(4, 6, 5, 7), torch.randn(6), torch.randn(6)]
    running, dy = (torch.randn(6), torch.rand(6) + 0.5), torch.randn(4, 6, 5, 7)
    for wanted in itertools.product((True, False), repeat=4):
        results = []
        for f in (composed, ours):
            leaves = [t.clone().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
            y = f(*leaves, *(t.clone() for t in running), training, activation)
            if any(wanted):
                y.backward(dy)
            results.append([y, *(t.grad for t in leaves)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_tensors_whose_memory_holds_other_numbers_are_taken_as_what_they_are(training: bool) -> None:
    """Parts of a conjugate are negated when they are read, and derivatives may be zeros without memory."""
    torch.manual_seed(2)
    given = [torch.randn(4, 6, 5, 7), torch.randn(4, 6, 5, 7), torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5]
    for i, t in enumerate(given[: 4 if training else 6]):  # torch itself loses what it moves of others
        for odd in (torch.complex(t, -t).conj().imag, torch._efficientzerotensor(t.shape)):
            results = []
            for f, x in ((composed, odd + 0), (ours, odd)):
                rest = [x if j == i else other.clone() for j, other in enumerate(given)]
                results.append([f(*rest, training, "relu"), *rest[4:]])
            torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_second_derivatives_of_one_image_in_channels_last(training: bool, activation: str) -> None:
    torch.manual_seed(1)
    x, dy = (torch.randn(1, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    given = [x, None, torch.rand(3) + 0.5, torch.randn(3), torch.randn(3), torch.rand(3) + 0.5]
    results = []
    for f, dtype in ((ours, torch.float32), (composed, torch.float64)):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in given[:4]]
        y = f(*leaves, *(t.to(dtype) for t in given[4:]), training, activation)
        asked = leaves[0], leaves[2]
        first = torch.autograd.grad(y, asked, dy.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), asked)
        results.append([t.double() for t in (*first, *second)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives_are_those_of_finite_differences(training: bool, activation: Any) -> None:
    torch.manual_seed(1)
    x, r = (torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def f(*leaves: Any) -> Any:
        return ours(*leaves, torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), training, activation)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself deprecates
        assert torch.autograd.gradcheck(f, (x, r, weight, bias))
        assert torch.autograd.gradgradcheck(f, (x, r, weight, bias))


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_tensors_of_which_one_depends_on_another(training: bool, activation: Any) -> None:
    """As in a loop over a layer, or with its own input as what is added: a gradient is of one argument alone."""
    torch.manual_seed(3)
    x, mean, var = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    leaves = [t.requires_grad_() for t in (x, torch.rand(3, dtype=torch.float64) + 0.5, torch.rand(3, dtype=torch.float64))]

    def found(f: Callable[..., Any], odd: bool, recorded: bool) -> Any:
        x, weight, bias = leaves
        first = x * weight[:, None]
        if odd:  # which the kernels do not take
            first = torch.complex(first, -first).conj().imag
        y = f(first, first.tanh(), weight, bias, mean.clone(), var.clone(), training, activation)
        return torch.autograd.grad((y * x.detach()).sum(), leaves, create_graph=recorded)

    for odd, recorded in itertools.product((True, False), repeat=2):
        torch.testing.assert_close(found(ours, odd, recorded), found(composed, odd, recorded))


def test_operators_pass_torchs_check() -> None:
    torch.manual_seed(2)
    x, w, m, v = torch.randn(4, 3, 5, 5), torch.randn(3), torch.zeros(3), torch.ones(3)
    last, ops = x.contiguous(memory_format=torch.channels_last), operators.compiled()
    utils = ("test_schema", "test_faketensor")
    _, mean, invstd = ops.batch_norm_forward(x, w, w, m, v, True, 0.1, 1e-5, None, 1, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (
            (x, w, w, m, v, True, 0.1, 1e-5, x.clone(), 1, 0.0),
            (x, w, None, m, v, False, 0.1, 1e-5, None, 7, 0.0),
            (last, None, None, None, None, True, 0.1, 1e-5, None, 3, 0.1),
            (x.bfloat16(), w, w, m, v, True, 0.1, 1e-5, None, 1, 0.0),
        ):
            torch.library.opcheck(ops.batch_norm_forward.default, given, test_utils=utils)
        for given in (
            (x, x, w, None, None, mean, invstd, True, 1e-5, [True] * 3, w, None, 1, 0.0, True, False),
            (x, last, w, m, v, None, None, False, 1e-5, [True, False, True], w, x.clone(), 7, 0.0, False, False),
        ):
            torch.library.opcheck(ops.batch_norm_backward.default, given, test_utils=utils)


def test_what_is_not_taken_is_composed() -> None:
    big = 1e200 * torch.randn(4, 3, 5, dtype=torch.float64)
    given = [big, None, None, None, None, None]
    got, want = (step(f, given, big, True, "relu", torch.float64) for f in (ours, composed))
    for a, b in zip(got, want, strict=True):
        assert a is b is None or torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(ours(*given, True, "relu"), composed(*given, True, "relu"))
    x = torch.randn(4, 3, 5)
    for call in (
        lambda f: torch.vmap(lambda a: f(a, None, None, None, None, None, True, "relu"))(torch.stack([x, 2 * x])),
        lambda f: torch.func.jvp(lambda a: f(a, None, None, None, None, None, True, "relu"), (x,), (x.square(),)),
        lambda f: torch.func.grad(lambda a: f(a, None, None, None, None, None, True, "silu").sum())(x),
        lambda f: f(x[:, :, ::2], None, None, None, None, None, True, "tanh"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch itself deprecates
            torch.testing.assert_close(call(ours), call(composed))


def test_without_gradients_nothing_is_kept() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    with torch.no_grad():
        y = ours(x, None, None, None, None, None, True, "relu")
    assert (y.requires_grad, y.grad_fn) == (False, None)
    with torch.inference_mode():
        assert ours(x, x, None, None, torch.zeros(3), torch.ones(3), False, None).is_inference()
    assert taken() == 2


def test_small_tensors_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.randn(4, 3, 5)
    assert torch.equal(ours(x, None, None, None, None, None, True, "relu"), composed(x, None, None, None, None, None, True, "relu"))
    assert taken() == 0


def test_bad_arguments_are_refused() -> None:
    x = torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match="rleu"):
        ours(x, None, None, None, None, None, True, "rleu")
    for residual in (x[:2], x.double()):
        with pytest.raises(ValueError, match="residual must have the shape, dtype and device of input"):
            ours(x, residual, None, None, None, None, True, None)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ours(x[:1, :, :1], None, None, None, None, None, True, "relu")
    with pytest.raises(RuntimeError, match="must be defined in evaluation mode"):
        ours(x, None, None, None, None, None, False, "relu")
    with pytest.raises(RuntimeError, match="should contain 3 elements not 2"):
        ours(x, None, None, None, torch.zeros(2), torch.ones(2), True, "relu")


def bad() -> Iterator[tuple[str, dict[str, Any]]]:
    """What F.batch_norm refuses, or does not take everywhere."""
    x, ones = torch.linspace(-1, 1, 300).reshape(4, 3, 5, 5), torch.ones(3)
    for name in ("running_mean", "running_var", "weight", "bias"):
        of_floats = ones[:2], torch.ones(4), torch.ones(3, 1), torch.ones(()), ones.to_sparse(), ones.to("meta"), ones.requires_grad_()
        for bad in (*of_floats, *(ones.detach().to(d) for d in (torch.float64, torch.bfloat16, torch.int64)), [1.0] * 3, 1.0, None):
            yield name, {name: bad}
    yield "no statistics", {"running_mean": None, "running_var": None}
    others = x[:1, :, :1, :1], x[:0], x[:, :0], x[:, :2], x[0, 0], x[0, 0, 0], x[..., None, None], x.to("meta"), x.to_sparse()
    for bad in (*others, *(x.to(d) for d in (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64))):
        yield "input", {"input": bad}
    for bad in (0, 0.0, -1.0, float("nan"), float("inf"), None, "1", torch.tensor(1e-5)):
        yield "eps", {"eps": bad}
    for bad in (None, "1", 2, torch.tensor(0.1)):
        yield "momentum", {"momentum": bad}
    for bad in (None, 1, "1", torch.tensor(True)):
        yield "training", {"training": bad}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_unusual_is_what_torch_makes_of_it(training: bool, mode: Any) -> None:
    """Value for value, and error for error: its class, and its text."""
    for name, given in bad():
        found = []
        for call in (torch.nn.functional.batch_norm, fastbn.torch.batch_norm):
            arguments: dict[str, Any] = {"running_mean": torch.ones(3), "running_var": torch.ones(3), "weight": torch.ones(3)}
            arguments = {"input": torch.linspace(-1, 1, 300).reshape(4, 3, 5, 5), "training": training, **arguments, **given}
            for key, t in arguments.items():
                arguments[key] = t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
            try:
                with mode():
                    y = call(**arguments, activation="relu") if call is fastbn.torch.batch_norm else call(**arguments).relu()
            except Exception as error:
                found.append((type(error), str(error).splitlines()[:1]))
            else:
                found.append((y, *(arguments[key] for key in ("running_mean", "running_var"))))
        for a, b in zip(*found, strict=True):
            if isinstance(b, torch.Tensor) and b.device.type == "cpu" and not b.is_sparse:
                torch.testing.assert_close(a, b, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")
            elif not isinstance(b, torch.Tensor):
                assert a == b, name


@pytest.mark.slow
def test_compiled_and_exported_models_hold_the_composition() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = torch.nn.BatchNorm2d(3)

        def forward(self, x: Any) -> Any:
            bn = self.bn
            return ours(x, x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, "relu")

    model, x = Model(), torch.randn(2, 3, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()  # there is a limit to what one function is compiled for, in all tests
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        exported = torch.export.export(model.eval(), (x,))
        torch.testing.assert_close(exported.module()(x), model(x))


def test_operators_of_graphs_pass_torchs_check() -> None:
    torch.manual_seed(3)
    x, r, w, b = (torch.randn(size, requires_grad=True) for size in ((4, 3, 5, 5), (4, 3, 5, 5), (3,), (3,)))
    m, v = torch.zeros(3), torch.ones(3)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (
            (x, r, w, b, m, v, True, 0.1, 1e-5, "relu", 0.0),
            (x, None, w, b, m, v, False, 0.1, 1e-5, "silu", 0.0),
            (x, r, w, None, m, v, False, 0.1, 1e-5, "identity", 0.0),
            (last, r, None, None, None, None, True, 0.1, 1e-5, "gelu", 0.0),
            (x.detach().bfloat16(), None, w, b, m, v, True, 0.1, 1e-5, "leaky_relu", 0.1),
        ):
            torch.library.opcheck(torch.ops.fastbn.batch_norm.default, given)


def _zero_is_taken() -> bool:
    """Whether PyTorch's own inference takes an eps of 0, which 2.10 refuses."""
    v = torch.ones(1)
    try:
        torch.nn.functional.batch_norm(torch.ones(1, 1), v, v, eps=0.0)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("activation", operators.ALONE)
@pytest.mark.parametrize("eps", [1e-5, 0.0] if _zero_is_taken() else [1e-5])
def test_a_graphs_gradients_lie_in_memory_as_it_was_told_whatever_the_order_of_dy(eps: float, activation: str) -> None:
    """An eps of 0 is left to torch's own operators."""
    torch.manual_seed(4)
    last = torch.randn(2, 4, 7, 5).contiguous(memory_format=torch.channels_last)
    v = torch.rand(4) + 0.5
    for x, dy in ((last.contiguous(), last), (last, last.contiguous())):
        y = torch.ops.fastbn.batch_norm(x, x, v, v, v, v, False, 0.1, eps, activation, 0.01)[0]
        kept = (None, y) if activation in operators.FROM_OUTPUT else (x, None)
        given = dy, x, *kept, v, v, v, v, v, v, False, eps, activation, 0.01, [True] * 4
        dx, dresidual, *_ = torch.ops.fastbn.batch_norm_gradients(*given)
        assert dx.stride() == dresidual.stride() == y.stride() == x.stride()


def test_a_graph_with_an_activation_of_another_version_is_refused() -> None:
    x, numbers = torch.ones(2, 3, 4, 4), (None, None, None, None, True, 0.1, 1e-5)
    for call in (
        lambda: torch.ops.fastbn.batch_norm(x, None, *numbers, "mish", 0.0),
        lambda: torch.ops.fastbn.group_norm(x, None, None, 3, 1e-5, "mish", 0.0),
    ):
        with pytest.raises(ValueError, match=r"activation must be one of identity, relu, .*, got 'mish'"):
            call()


@pytest.mark.parametrize("activation", [None, "relu", "relu6", ("leaky_relu", 0.3), "silu"], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_bias_may_change_before_the_backward_as_for_torchs_own(activation: Any, with_residual: bool, training: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(4, 3, 5, 6, dtype=torch.float64) for _ in range(2)] + [torch.rand(3, dtype=torch.float64) for _ in range(4)]
    found = []
    for f in (composed, ours):
        x, residual, weight, bias = leaves = [t.clone().requires_grad_() for t in given[:4]]
        y = f(x, residual if with_residual else None, weight, bias, *(t.clone() for t in given[4:]), training, activation)
        with torch.no_grad():
            bias += 1
        if f is ours and activation == "silu":  # a second derivative depends on it
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.square().sum().backward()
            return
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (dx * given[0]).sum().backward(inputs=leaves if with_residual else [x, weight, bias])
        found.append([dx.detach(), *(t.grad for t in leaves if t.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_bias_of_a_group_norm_may_change_before_the_backward() -> None:
    torch.manual_seed(0)
    given = torch.randn(4, 6, 160, 160), torch.rand(6), torch.rand(6)
    found = []
    for convert in (False, True):
        model = torch.nn.Sequential(torch.nn.GroupNorm(6, 6), torch.nn.ReLU())
        with torch.no_grad():
            model[0].weight.copy_(given[1])
            model[0].bias.copy_(given[2])
        if convert:
            fastbn.torch.convert(model)
        x = given[0].clone().requires_grad_()
        y = model(x)
        with torch.no_grad():
            model[0].bias += 1
        y.square().sum().backward()
        found.append([x.grad, model[0].weight.grad, model[0].bias.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
