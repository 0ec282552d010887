"""Instance, group, layer and RMS norms of models that are converted: one operation with the activation after them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn.torch  # noqa: E402
from fastbn.torch import fused, parts  # noqa: E402

nn = torch.nn
F = torch.nn.functional


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(fused, "SMALLEST", 0)
    monkeypatch.setattr(parts, "LEAST", dict.fromkeys(parts.LEAST, 0))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the fused operation was called with."""
    calls: list[Any] = []
    normalize = parts.normalize
    monkeypatch.setattr(parts, "normalize", lambda a, keep: calls.append(a) or normalize(a, keep=keep))
    return calls


def step(model: Any, x: Any) -> list[Any]:
    """Output and gradients of one step of a copy."""
    twin, leaf = copy.deepcopy(model), x.detach().clone().requires_grad_()
    y = twin(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    return [y.detach(), leaf.grad, *(p.grad for p in twin.parameters())]


def same(model: Any, x: Any) -> Any:
    """Convert a model, whose step must stay as near to that in float64; return what became of its layers."""
    true, want = step(copy.deepcopy(model).double(), x.double()), step(model, x)
    found = fastbn.torch.convert(model)
    for a, b, c in zip(step(model, x), want, true, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        few = (256 if a.dtype == torch.float64 else 16) * torch.finfo(a.dtype).eps
        assert (a.double() - c).abs().max() <= 1.5 * (b.double() - c).abs().max() + few * max(1.0, c.abs().max())
    return found


LAYERS: dict[str, Callable[[], Any]] = {
    "InstanceNorm": lambda: nn.InstanceNorm2d(6),
    "affine InstanceNorm": lambda: nn.InstanceNorm2d(6, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(3, 6, eps=1e-3),
    "GroupNorm of all": lambda: nn.GroupNorm(1, 6, affine=False),
}
ACTIVATIONS: dict[str, Callable[[], Any]] = {
    "ReLU": nn.ReLU, "ReLU6": nn.ReLU6, "LeakyReLU": lambda: nn.LeakyReLU(0.3, inplace=True), "Hardswish": nn.Hardswish, "SiLU": nn.SiLU,
    "GELU": nn.GELU, "GELU tanh": lambda: nn.GELU(approximate="tanh"), "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh,
}  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_norm_is_fused_with_the_activation_after_it(layer: str, act: str, ran: list[Any]) -> None:
    for order, dtype in itertools.product((torch.contiguous_format, torch.channels_last), (torch.float32, torch.float64)):
        model = nn.Sequential(nn.Conv2d(3, 6, 1), LAYERS[layer](), ACTIVATIONS[act](), nn.Conv2d(6, 2, 1)).to(dtype)
        found = same(model, torch.randn(2, 3, 5, 7).to(dtype).contiguous(memory_format=order))
        assert (found[0].fused, found[0].why, found[0].converted) == ((type(model[2]).__name__,), "", True)
    assert len(ran) == 4


ROWS: dict[str, Callable[[], Any]] = {
    "LayerNorm": lambda: nn.LayerNorm(6, eps=1e-3),
    "LayerNorm of two axes": lambda: nn.LayerNorm((5, 6), bias=False),
    "plain LayerNorm": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "RMSNorm of two axes": lambda: nn.RMSNorm((5, 6), eps=1e-3),
    "plain RMSNorm": lambda: nn.RMSNorm(6, elementwise_affine=False),
}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layer", ROWS)
def test_a_norm_of_rows_is_fused_with_the_activation_after_it(layer: str, act: str, ran: list[Any]) -> None:
    for dtype in (torch.float32, torch.float64):
        model = nn.Sequential(nn.Linear(4, 6), ROWS[layer](), ACTIVATIONS[act](), nn.Linear(6, 3)).to(dtype)
        found = same(model, torch.randn(3, 5, 4).to(dtype))
        assert (found[0].fused, found[0].why, found[0].converted) == ((type(model[2]).__name__,), "", True)
    assert [a.kind for a in ran] == ["layer_norm" if "Layer" in layer else "rms_norm"] * 2


def test_an_rms_norm_runs_alone_where_nothing_can_follow(ran: list[Any]) -> None:
    """Torch's own is several operations, which `enable` cannot take: so it is converted whatever follows."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 3), nn.LayerNorm(3)), torch.randn(7, 4)
    own, (first, second) = copy.deepcopy(model), same(model, x)
    assert (first.fused, first.why, first.converted) == ((), "Linear follows", True)
    assert (second.fused, second.why, second.converted) == ((), "the model's output follows", False)
    assert [a.kind for a in ran] == ["rms_norm"]
    assert "fastbn=rms_norm" in repr(model)
    seen: list[Any] = []
    model[1].register_forward_hook(lambda *given: seen.append(given[-1]))
    model(x)
    assert (len(ran), type(seen[0])) == (2, torch.Tensor)
    (layer,) = fastbn.torch.convert(nn.Sequential(nn.RMSNorm(6), nn.ReLU()), fuse=False)
    assert (layer.fused, layer.why, layer.converted) == ((), "it was not asked for", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), own(x))
    assert len(ran) == 2  # what torch.compile makes of it is one loop
    assert fastbn.torch.revert(model) == 1
    assert (repr(model), type(model[1])) == (repr(own), nn.RMSNorm)


def test_rows_of_sixteen_bits_have_the_dtype_that_torch_gives_them(ran: list[Any]) -> None:
    """Root mean squares with parameters of 32 bits are of 32 bits."""
    for layer, mixed in ((nn.LayerNorm(6), 2), (nn.RMSNorm(6), 1)):
        ran.clear()
        for dtype, parameters in itertools.product((torch.float16, torch.bfloat16), (torch.float32, None)):
            model, x = nn.Sequential(copy.deepcopy(layer), nn.SiLU()).to(parameters or dtype), torch.randn(4, 6).to(dtype).requires_grad_()
            own, true = copy.deepcopy(model), copy.deepcopy(model).double()(x.double())
            fastbn.torch.convert(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch says that it has no fused operator for the mixture
                got, want = model(x), own(x)
            assert got.dtype is want.dtype
            assert (got.double() - true).abs().max() <= (want.double() - true).abs().max() + torch.finfo(dtype).eps
        assert len(ran) == 2 * mixed


def test_code_of_ones_own_around_rows_is_fused_and_never_runs_apart(ran: list[Any]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), RowsAct(6), RootAct(6), RowsTwice(6), nn.ReLU()), torch.randn(7, 4)
    found = same(model, x)
    assert [(layer.fused, layer.converted) for layer in found] == [(("silu",), True), (("gelu",), True), ((), False)]
    assert [a.kind for a in ran] == ["layer_norm", "rms_norm"]


@pytest.mark.parametrize("base", [nn.LayerNorm, nn.RMSNorm])
def test_rows_of_a_length_that_changes_stay_one_graph(base: Any) -> None:
    """Code that takes the shape of a row from its input: neither specialized by torch.compile, nor refused by torch.export."""

    class OfInput(base):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            called = F.layer_norm if base is nn.LayerNorm else F.rms_norm
            return F.silu(called(x, x.shape[1:], None, eps=self.eps))

    model = nn.Sequential(nn.Conv1d(2, 4, 1), OfInput(6, elementwise_affine=False, eps=1e-3))
    own, graphs, dim = copy.deepcopy(model), [], torch.export.Dim
    fastbn.torch.convert(model)
    sizes = {0: dim("batch", min=2, max=64), 2: dim("width", min=2, max=64)}
    exported = torch.export.export(model, (torch.randn(3, 2, 5),), dynamic_shapes=(sizes,), strict=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph, dynamic=True)
    for width in (5, 7, 9):
        x = torch.randn(4, 2, width)
        for m in (compiled, exported.module()):
            torch.testing.assert_close(m(x), own(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert any(str(node.target).startswith("fastbn.") for node in exported.graph.nodes)
    torch.compiler.reset()


@pytest.mark.parametrize("layer", [lambda: RowsAct(6), lambda: RootAct(6), lambda: GroupAct(2, 4)])
def test_code_of_ones_own_is_one_node_of_a_graph(layer: Callable[[], Any]) -> None:
    """And not one without the activation beside it, which nobody reads, but an exported model computes."""
    model, x, graphs = nn.Sequential(nn.Conv1d(2, 4, 1), layer()), torch.randn(3, 2, 6), []
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph.graph) or graph)
    torch.testing.assert_close(compiled(x), own(x), rtol=1e-5, atol=1e-5)
    exported = [torch.export.export(model, (x,), strict=strict) for strict in (True, False)]
    for graph in (*graphs, *(e.graph for e in exported)):
        assert sum(str(node.target).startswith(("fastbn.", "torch.ops.fastbn.")) for node in graph.nodes) == 1
    for e in exported:
        torch.testing.assert_close(e.module()(x), own(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


class GroupAct(nn.GroupNorm):
    def forward(self, x: Any) -> Any:
        return F.silu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps))


class RowsAct(nn.LayerNorm):
    def forward(self, x: Any) -> Any:
        return F.silu(F.layer_norm(x, [*self.normalized_shape], self.weight, self.bias, self.eps))


class RootAct(nn.RMSNorm):
    def forward(self, x: Any) -> Any:
        return F.gelu(super().forward(x))


class RowsTwice(nn.RMSNorm):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


def test_functions_and_code_of_ones_own_are_fused(ran: list[Any]) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.flag = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), False

        def forward(self, x: Any) -> Any:
            z = self.norm(self.conv(x))
            return z if self.flag else F.silu(z, inplace=True)

    model, x = Block(), torch.randn(2, 3, 4, 4)
    assert same(model, x)[0].fused == ("silu",)
    assert len(ran) == 1
    model.flag = True
    assert type(model(x)) is torch.Tensor
    torch.testing.assert_close(model(x), F.group_norm(model.conv(x), 2))
    assert len(ran) == 3  # where nothing follows, alone


def test_volumes_in_channels_last_stay_where_they_lie(ran: list[Any]) -> None:
    model = nn.Sequential(nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(inplace=True))
    x = torch.randn(2, 4, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    same(model, x)
    y = model(x)
    y.square().sum().backward()
    for tensor in (ran[0].x, y, x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d)


def test_sixteen_bits_with_parameters_of_thirty_two(ran: list[Any]) -> None:
    model, x = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), torch.randn(2, 4, 5, 5).half()
    want = model.double()(x.double())
    model.float()
    fastbn.torch.convert(model)
    y = model(x)
    assert (y.dtype, len(ran)) == (torch.float16, 1)
    assert (y.double() - want).abs().max() < 2e-3


LEFT: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: nn.Sequential(nn.InstanceNorm2d(4)), "the model's output follows"),
    "another layer": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.MaxPool2d(2)), "MaxPool2d follows"),
    "running statistics": (lambda: nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()), "it has running statistics"),
    "a hook": (lambda: hooked(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())), "it has hooks"),
    "own code": (lambda: nn.Sequential(Twice(2, 4), nn.ReLU()), "mul follows"),
    "own code that branches": (lambda: nn.Sequential(Branches(2, 4), nn.ReLU()), "the code of Branches is not understood"),
    "own code of an instance norm": (lambda: nn.Sequential(Own(4), nn.ReLU()), "the code of Own is not understood"),
    "own code with a sum": (lambda: nn.Sequential(Sum(2, 4)), "add follows"),
}


def hooked(model: Any) -> Any:
    model[0].register_forward_hook(lambda *_: None)
    return model


class Twice(nn.GroupNorm):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class Branches(nn.GroupNorm):
    def forward(self, x: Any) -> Any:
        return super().forward(x) if x.sum() < 1e9 else x


class Sum(nn.GroupNorm):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + x.mul(2)


class Own(nn.InstanceNorm2d):
    def forward(self, x: Any) -> Any:
        return super().forward(x)


class GroupNormAct(nn.GroupNorm):
    """As other packages have them: a layer whose own code normalizes, and does more."""

    def __init__(self, groups: int, channels: int, act: Any) -> None:
        super().__init__(groups, channels)
        self.drop, self.act, self.fast = nn.Identity(), act, False

    def forward(self, x: Any) -> Any:
        if self.fast:
            x = F.group_norm(x.half(), self.num_groups, self.weight.half(), self.bias.half(), self.eps).float()
        else:
            x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))


class Renamed(nn.GroupNorm):
    def forward(self, x: Any) -> Any:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


@pytest.mark.parametrize(("make", "why"), LEFT.values(), ids=LEFT.keys())
def test_what_is_left_has_a_reason(make: Callable[[], Any], why: str, ran: list[Any]) -> None:
    model = make()
    (layer,) = same(model, torch.randn(2, 4, 4, 4))
    assert (layer.fused, layer.why, layer.converted, ran) == ((), why, False, [])


def test_what_is_unusual_is_what_torch_makes_of_it(ran: list[Any]) -> None:
    """Of images and of rows: other shapes, dtypes and layouts, nothing at all; and rows that are not dense."""
    images = nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(4, 4)
    bad = torch.randn(2, 5, 4, 4), torch.randn(1, 4, 1, 1), torch.randn(4), torch.randn(2, 4, 4, 4).double(), torch.ones(2, 4, 3, 3).long()
    good = torch.randn(4, 3, 3), torch.randn(2, 4, 3, 3).to_sparse(), torch.randn(0, 4, 3, 3)
    rows = nn.LayerNorm(6), nn.RMSNorm(6)
    dense = torch.randn(5, 7), torch.ones(5, 6).long(), torch.randn(5, 6).to_sparse(), torch.randn(0, 6), torch.randn(6)
    strided = torch.randn(6, 5).t(), torch.randn(5, 12)[:, ::2]
    for layer, x in (*itertools.product(images, (*bad, *good)), *itertools.product(rows, (*dense, *strided))):
        model = nn.Sequential(layer, nn.ReLU())
        own, found = copy.deepcopy(model), []
        fastbn.torch.convert(model)
        for m in (model, own):
            try:
                found.append(m(x))
            except Exception as error:  # noqa: PERF203
                found.append((type(error), str(error).splitlines()[:1]))
        assert found[0] == found[1] if isinstance(found[1], tuple) else torch.equal(*found)
    assert ran == []


@pytest.mark.parametrize("name", ["affine InstanceNorm", "GroupNorm", "LayerNorm", "RMSNorm"])
def test_parameters_and_what_is_saved_may_be_views(name: str, ran: list[Any]) -> None:
    def spread(t: Any) -> Any:
        """The same values, with gaps in between."""
        return torch.stack([t, t + 1], -1)[..., 0]

    make = {"LayerNorm": lambda: nn.LayerNorm(6), "RMSNorm": lambda: nn.RMSNorm(6)}.get(name) or LAYERS[name]
    x, numbers, found = torch.randn(2, 6, 6, 6), [torch.rand_like(p) for p in make().parameters()], []
    for arranged, saved in ((torch.clone, torch.clone), (spread, torch.clone), (torch.clone, spread)):
        model = nn.Sequential(make(), nn.SiLU())
        fastbn.torch.convert(model)
        for p, values in zip(model.parameters(), numbers, strict=True):
            p.data = arranged(values)
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda t: t):
            y = model(leaf)
        y.square().sum().backward()
        found.append([y, leaf.grad, *(p.grad for p in model.parameters())])
    assert len(ran) == 3
    torch.testing.assert_close(found[1:], found[:1] * 2)


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), nn.GroupNorm(3, 6)])
def test_parameters_of_two_dtypes_are_refused_by_torch(layer: Any, ran: list[Any]) -> None:
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for dtype, weight, bias in itertools.product(dtypes[1:], dtypes, dtypes):
        model = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
        model[0].weight.data, model[0].bias.data = layer.weight.to(weight), layer.bias.to(bias)
        fastbn.torch.convert(model)
        fits = weight is bias and weight in (torch.float32, dtype)
        with contextlib.nullcontext() if fits else pytest.raises(RuntimeError, match="scalar type"):
            model(torch.randn(4, 6, dtype=dtype))
    assert len(ran) == 4


def test_an_eps_that_fastbn_refuses_is_left_to_torch(ran: list[Any]) -> None:
    x = torch.randn(2, 4, 6)
    for layer in (nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.LayerNorm(6), nn.RMSNorm(6)):
        for eps in (-1e-3, float("inf"), float("nan"), 10**400):
            layer.eps = eps
            model = nn.Sequential(layer, nn.ReLU())
            own, found = copy.deepcopy(model), []
            fastbn.torch.convert(model)
            for m in (model, own):
                try:
                    found.append(m(x))
                except Exception as error:  # noqa: PERF203
                    found.append((type(error), str(error).splitlines()[:1]))
            assert found[0] == found[1] if isinstance(found[1], tuple) else torch.equal(found[0].nan_to_num(), found[1].nan_to_num())
    assert ran == []


def test_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    for layer in (nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.LayerNorm((4, 3)), nn.RMSNorm(3)):
        model = nn.Sequential(layer, nn.SiLU()).double()
        fastbn.torch.convert(model)
        x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(model, (x,))
        assert torch.autograd.gradgradcheck(model, (x,))


def test_an_instance_norm_has_second_derivatives_of_many_gradients_at_once() -> None:
    """As torch's, which is a batch norm: torch's group norm has none."""
    plain = nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.SiLU()).double()
    model, x = copy.deepcopy(plain), torch.randn(2, 4, 3, dtype=torch.float64)
    fastbn.torch.convert(model)
    got, want = (torch.autograd.functional.hessian(lambda x, m=m: m(x).pow(2).sum(), x, vectorize=True) for m in (model, plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Identity()])
def test_an_rms_norm_that_learns_keeps_no_input_that_needs_no_gradient(act: Any) -> None:
    """As torch's, so that an inference tensor can be its input, and one that is changed in place before the backward."""
    model = nn.Sequential(nn.RMSNorm(6), act)
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    with torch.inference_mode():
        x = torch.randn(4, 6)
    for m in (own, model):
        z = x.clone()
        y = m(x) + m(z)
        z += 1
        y.square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, own[0].weight.grad)


def test_gradients_of_a_layer_that_is_called_on_its_own_output() -> None:
    plain = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()).double()
    model, x = copy.deepcopy(plain), torch.randn(2, 4, 3, dtype=torch.float64)
    fastbn.torch.convert(model)
    want, got = (torch.autograd.grad(m(m(x)).pow(2).sum(), [*m.parameters()], create_graph=True) for m in (plain, model))
    torch.testing.assert_close(got, want)


def test_gradients_whose_memory_does_not_hold_them() -> None:
    """Through a conjugate comes a view of the opposite numbers, and nothing from a tensor that is known to be zero."""
    plain = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    model, x, factor = copy.deepcopy(plain), torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(2, 4, 5, 5) * (1 + 2j)
    fastbn.torch.convert(model)
    found = []
    for one in (plain, model):
        y = one(x)
        y.register_hook(lambda dy: found.append(dy.is_neg()))
        loss = (torch.complex(torch.zeros_like(y), y).conj() * factor).real.sum()
        found.append(torch.autograd.grad(loss, x)[0])
        found.append(torch.autograd.grad(one(x), x, torch._efficientzerotensor(x.shape))[0])
    assert (found[0], found[3]) == (True, True)
    torch.testing.assert_close(found[4], found[1])
    assert not found[5].any()


def test_reverted_copied_and_pickled(ran: list[Any]) -> None:
    model, x = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), torch.randn(2, 4, 4, 4)
    want, shown, keys = model(x), repr(model), list(model.state_dict())
    fastbn.torch.convert(model)
    assert "fastbn=group_norm + activation" in repr(model)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own
        before = len(ran)
        torch.testing.assert_close(twin(x), want)
        assert (len(ran), list(twin.state_dict())) == (before + 1, keys)
        assert fastbn.torch.revert(twin) == 1
        assert (repr(twin), type(twin), type(twin[0])) == (shown, nn.Sequential, nn.GroupNorm)
        assert torch.equal(twin(x), want)


def test_the_operator_passes_torchs_check() -> None:
    x, w, b = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself deprecates
        for given in (
            (x, w, b, 4, 1e-5, "leaky_relu", 0.1),
            (last, None, None, 2, 1e-5, "silu", 0.0),
            (x, w, None, 1, 1e-3, "identity", 0.0),
        ):
            torch.library.opcheck(torch.ops.fastbn.group_norm.default, given)
        for operator in (torch.ops.fastbn.layer_norm, torch.ops.fastbn.rms_norm):
            bias = None if operator is torch.ops.fastbn.rms_norm else w.detach().requires_grad_()
            torch.library.opcheck(operator.default, (x, torch.randn(3, requires_grad=True), None, [3], 1e-5, "silu", 0.0))
            torch.library.opcheck(operator.default, (x, None, None, [3, 3], 1e-3, "relu", 0.0))
            rows = torch.randn(5, 4, requires_grad=True)
            torch.library.opcheck(operator.default, (rows, w, bias, [4], 1e-5, "identity", 0.0))
        torch.library.opcheck(torch.ops.fastbn.rms_norm.default, (rows, w, None, [4], None, "gelu", 0.0))


@pytest.mark.parametrize("layer", [lambda: nn.InstanceNorm2d(4, affine=True), lambda: nn.LayerNorm(5), lambda: nn.RMSNorm((5, 5))])
def test_compiled_and_exported_models_hold_one_node(layer: Callable[[], Any]) -> None:
    model, x, graphs = nn.Sequential(nn.Conv2d(3, 4, 1), layer(), nn.LeakyReLU()), torch.randn(2, 3, 5, 5), []
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)

    def backend(graph: Any, given: Any) -> Any:
        graphs.append(graph.graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, given)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()  # there is a limit to what one function is compiled for, in all tests
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        got, want = compiled(x), own(x)
        torch.testing.assert_close(got, want)
        for y in (got, want):
            y.square().sum().backward()
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(exported.module()(x), want)
    for p, q in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    for graph in (graphs[0], exported.graph):
        assert sum(str(node.target).startswith("fastbn.") for node in graph.nodes) == 1
    torch._dynamo.reset()


def test_layers_of_other_packages_are_fused(ran: list[Any]) -> None:
    acts = [GroupNormAct(2, 4, act) for act in (nn.SiLU(), nn.Identity(), nn.Softmax(1))]
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), *acts[:2], nn.ReLU(), Renamed(4, 4), nn.GELU(), acts[2]), torch.randn(2, 3, 4, 4)
    found = same(model, x)
    assert [layer.fused for layer in found] == [("SiLU",), ("ReLU",), ("GELU",), ()]
    assert [layer.converted for layer in found] == [True, True, True, False]
    assert len(ran) == 3
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own
        torch.testing.assert_close(step(twin, x), step(model, x), rtol=0, atol=0)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), want)
        model[1].fast = True  # another way through the same code, on which something else follows
        torch.testing.assert_close(model(x), want, rtol=0.01, atol=0.01)
    assert fastbn.torch.revert(model) == 3
    assert type(model[1]) is GroupNormAct
