"""A function of the user's as activation, inside PyTorch."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")
numba: Any = pytest.importorskip("numba", reason="numba is not installed (pip install 'fastbn[numba]')")

import fastbn.torch  # noqa: E402
from fastbn.kernels.numba_math import like, sigmoid  # noqa: E402

F = torch.nn.functional
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "own_activation_torch.py"


@numba.njit
def swish(z: float) -> Any:
    return z * sigmoid(z)


@numba.njit
def slope(z: float) -> Any:
    s = sigmoid(z)
    return s * (like(z, 1) + z * (like(z, 1) - s))


SWISH = fastbn.Activation(swish, slope)  # as F.silu


def given(dtype: Any = torch.float32, *, last: bool = False, seed: int = 0) -> list[Any]:
    """The input, a residual, weight, bias, running statistics, and a gradient."""
    torch.manual_seed(seed)
    arrays = [torch.randn(4, 6, 9, 7) * 2 + 1 for _ in range(3)]
    if last:
        arrays = [a.contiguous(memory_format=torch.channels_last) for a in arrays]
    vectors = [torch.rand(6) + 0.5 for _ in range(4)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, residual, dy = (a.to(dtype) for a in arrays)
    return [x, residual, *(v.to(wide) for v in vectors), dy]


def step(activation: Any, values: list[Any], training: bool, residual: bool, affine: bool) -> list[Any]:
    x, r, w, b, m, v, dy = (t.detach().clone(memory_format=torch.preserve_format) for t in values)
    leaves = [x, r if residual else None, *((w, b) if affine else (None, None))]
    for t in leaves:
        if t is not None:
            t.requires_grad_()
    x, r, w, b = leaves
    y = fastbn.torch.batch_norm(x, m, v, w, b, training, activation=activation, residual=r)
    y.backward(dy)
    return [y.detach(), *(None if t is None else t.grad for t in leaves), m, v]


FORMS = [(True, False, True), (False, True, False)]  # training, residual, affine


@pytest.mark.parametrize(
    ("dtype", "last", "forms"),
    [(torch.float32, False, FORMS), (torch.bfloat16, True, FORMS[:1])],
    ids=str,
)
def test_results_are_those_of_the_same_function_of_torchs(dtype: Any, last: bool, forms: list[tuple[bool, bool, bool]]) -> None:
    """Each dtype is compiled for itself, so not all forms of all."""
    values = given(dtype, last=last)
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-12}.get(dtype, 4e-2)
    for training, residual, affine in forms:
        mine, its = (step(f, values, training, residual, affine) for f in (SWISH, "silu"))
        for a, b in zip(mine, its, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
                assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def test_memory_that_holds_other_numbers_than_the_tensor_is_not_read() -> None:
    """Imaginary parts of conjugates are views of the opposite numbers."""
    x, residual, w, b, *_, dy = given()
    found = []
    for of in (torch.neg, torch._neg_view):
        leaf = x.clone().requires_grad_()
        y = fastbn.torch.batch_norm(of(leaf), None, None, of(w), of(b), True, activation=SWISH, residual=of(residual))
        found += [y, torch.autograd.grad(y, leaf, of(dy))[0]]
    assert all(torch.equal(a, b) for a, b in zip(found[:2], found[2:], strict=True))


def test_gradients_are_those_of_differences() -> None:
    x, residual, w, b, m, v, _ = (t[:2, :3, :2] if t.dim() == 4 else t[:3] for t in given(torch.float64))
    inputs = tuple(t.clone().requires_grad_() for t in (x, residual, w, b))
    for training in (True, False):

        def f(x: Any, r: Any, w: Any, b: Any, training: bool = training) -> Any:
            return fastbn.torch.batch_norm(x, m.clone(), v.clone(), w, b, training, activation=SWISH, residual=r)

        assert torch.autograd.gradcheck(f, inputs)


def test_only_what_is_wanted_is_computed() -> None:
    x, residual, w, b, m, v, dy = given()
    w.requires_grad_()
    y = fastbn.torch.batch_norm(x, m, v, w, b, True, activation=SWISH, residual=residual)
    (dw,) = torch.autograd.grad(y, w, dy, retain_graph=True)
    assert torch.equal(dw, torch.autograd.grad(y, w, dy)[0])
    assert x.grad is None


def test_a_function_alone_serves_what_needs_no_gradient() -> None:
    x, _, w, b, m, v, _ = given()
    expected = F.silu(F.batch_norm(x, m, v, w, b))
    assert torch.allclose(fastbn.torch.batch_norm(x, m, v, w, b, activation=swish), expected, atol=1e-6)
    w.requires_grad_()
    with torch.no_grad():
        assert torch.allclose(fastbn.torch.batch_norm(x, m, v, w, b, activation=swish), expected, atol=1e-6)
    before = m.clone()
    with pytest.raises(ValueError, match=r"a gradient needs the derivative of Activation\(swish, None\)"):
        fastbn.torch.batch_norm(x, m, v, w, b, True, activation=swish)
    assert torch.equal(m, before)


def test_torch_sees_what_changed() -> None:
    """Running statistics are moved where torch counts it, and an input that was written over since is an error."""
    x, _, w, b, m, v, dy = given()
    x = x.requires_grad_() * 1
    version = m._version
    y = fastbn.torch.batch_norm(x, m, v, w, b, True, activation=SWISH)
    assert m._version > version
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_an_error_moves_neither_running_statistic() -> None:
    x, _, w, b, m, v, _ = given()
    with pytest.raises(RuntimeError, match="single memory location"):
        fastbn.torch.batch_norm(x, m, v[:1].expand(6), w, b, True, activation=SWISH)
    assert torch.equal(m, given()[4])


def test_running_statistics_of_inference_mode_are_moved_as_by_torch() -> None:
    x, _, w, b, m, v, _ = given()
    with torch.inference_mode():
        kept = v.clone()
    F.batch_norm(x, m.clone(), v, w, b, True)
    fastbn.torch.batch_norm(x, m, kept, w, b, True, activation=SWISH)
    torch.testing.assert_close(kept.clone(), v)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_that_require_gradients_are_refused_as_by_torch(training: bool) -> None:
    x, _, w, b, m, v, _ = given()
    v.requires_grad_()
    with pytest.raises(RuntimeError, match="running_var"):
        F.batch_norm(x, m, v, w, b, training)
    with pytest.raises(ValueError, match=r"running_var requires a gradient, .*: pass running_var.detach\(\)"):
        fastbn.torch.batch_norm(x, m, v, w, b, training, activation=SWISH)
    assert torch.equal(m, given()[4])


def test_a_second_derivative_is_refused() -> None:
    x, _, w, b, m, v, _ = given()
    x.requires_grad_()
    y = fastbn.torch.batch_norm(x, m, v, w, b, True, activation=SWISH)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_torch_compile_goes_around_it() -> None:
    values = given()
    x, _, w, b, m, v, _ = values

    def f(x: Any, m: Any, v: Any) -> Any:
        return fastbn.torch.batch_norm(x * 2, m, v, w, b, True, activation=SWISH) + 1

    expected = f(x, m.clone(), v.clone())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(f, backend="eager")(x, m.clone(), v.clone()), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_what_has_no_memory_is_refused() -> None:
    x, _, _, _, m, v, _ = given()

    def f(x: Any) -> Any:
        return fastbn.torch.batch_norm(x, m.to(x.device), v.to(x.device), activation=SWISH)

    cases = [
        ("on meta", lambda: f(x.to("meta"))),
        ("torch.func's transforms", lambda: torch.func.vmap(f)(x[None])),
        ("torch.func's transforms", lambda: torch.func.grad(lambda x: f(x).sum())(x)),
        ("where torch records", lambda: torch.fx.experimental.proxy_tensor.make_fx(f)(x)),
        ("torch.int64", lambda: f(x.long())),
        ("torch.sparse_coo", lambda: f(x.to_sparse())),
    ]
    for why, call in cases:
        with pytest.raises(TypeError, match=f"own runs on strided floating-point tensors of the CPU, and not .*{why}"):
            call()
    with pytest.raises(TypeError, match=r"torch\.jit traces"):
        torch.jit.trace(f, x, check_trace=False)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(TypeError, match="forward-mode"):
        f(torch.autograd.forward_ad.make_dual(x, x))
    with pytest.raises(Exception, match="own runs on strided"):
        torch.export.export(torch.nn.Sequential(type("L", (torch.nn.Module,), {"forward": lambda _, x: f(x)})()), (x,))


def test_many_gradients_at_once_are_refused() -> None:
    x, _, w, b, m, v, dy = given()
    x.requires_grad_()
    y = fastbn.torch.batch_norm(x, m, v, w, b, True, activation=SWISH)
    with pytest.raises(TypeError, match="is_grads_batched and vectorize must be False"):
        torch.autograd.grad(y, x, torch.stack([dy, dy]), is_grads_batched=True)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weight": 3}, "weight has shape"), ({"x": (6,)}, "at least 2 dimensions"), ({"mean": None}, "running_mean and running_var"),
        ({"eps": -1.0}, "eps"), ({"momentum": "a", "training": True}, "momentum"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_and_nothing_is_moved(change: dict[str, Any], error: str) -> None:
    x, _, w, b, m, v, _ = given()
    before = m.clone()
    x = torch.ones(change["x"]) if "x" in change else x
    w = w[: change["weight"]] if "weight" in change else w
    mean = None if "mean" in change else m
    options = {name: change[name] for name in ("eps", "momentum", "training") if name in change}
    with pytest.raises((TypeError, ValueError), match=error):
        fastbn.torch.batch_norm(x, mean, v, w, b, activation=SWISH, **options)
    assert torch.equal(m, before)


def test_a_layer_with_mish_learns_as_one_of_torchs() -> None:
    example = runpy.run_path(str(EXAMPLE))
    losses = example["train"](example["mish_layer"](), steps=8), example["train"](example["torch_layer"](), steps=8)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_parameters_may_change_before_the_backward_which_keeps_what_it_needs_of_them() -> None:
    x, residual, *vectors, dy = given()
    found = []
    for change in (0, 1):
        weight, bias, mean, var = (t.clone() for t in vectors)
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        y = fastbn.torch.batch_norm(leaves[0], mean, var, *leaves[2:], True, activation=SWISH, residual=leaves[1])
        with torch.no_grad():
            for t in leaves[2:]:
                t += change
        y.backward(dy)
        found.append([t.grad for t in leaves])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
