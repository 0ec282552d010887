"""What fastbn says of a PyTorch model, and what it makes of one: summary, folding, freezing."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

from torch.nn.utils import prune  # noqa: E402

import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402
from fastbn.torch import parts  # noqa: E402

nn = torch.nn
needs_kernels = pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels")


def lived(model: Any) -> Any:
    """A model whose batch norms have seen something, in evaluation mode."""
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            with torch.no_grad():
                for name, spread in (("weight", 1.0), ("bias", 1.0), ("running_mean", 1.0)):
                    if getattr(layer, name) is not None:
                        getattr(layer, name).normal_(0, spread)
                if layer.running_var is not None:
                    layer.running_var.uniform_(0.5, 2)
    return model.eval()


FOLDED: dict[str, tuple[Callable[[], list[Any]], tuple[int, ...], dict[str, str]]] = {
    "convolution": (lambda: [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()], (2, 3, 7, 8), {"1": "0"}),
    "without bias": (lambda: [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=0.1)], (2, 3, 7, 8), {"1": "0"}),
    "groups": (lambda: [nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)], (2, 4, 9), {"1": "0"}),
    "three dimensions": (lambda: [nn.Conv3d(2, 4, 2, stride=2), nn.BatchNorm3d(4, affine=False)], (2, 2, 6, 4, 4), {"1": "0"}),
    "transposed": (lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5), {"1": "0"}),
    "transposed, three": (lambda: [nn.ConvTranspose3d(4, 2, 2, bias=False), nn.BatchNorm3d(2)], (2, 4, 3, 3, 3), {"1": "0"}),
    "linear": (lambda: [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()], (3, 5), {"1": "0"}),
    "before a convolution": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], (2, 4, 6, 6), {"0": "1"}),
    "mirrored": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")], (2, 4, 6, 6), {"0": "1"}),
    "both sides": (lambda: [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)], (2, 3, 6, 6), {"0": "1", "2": "1"}),
    "synchronized": (lambda: [nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)], (2, 3, 7, 8), {"1": "0"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_model_computes_the_same(name: str, dtype: Any) -> None:
    layers, shape, folded = FOLDED[name]
    model = lived(nn.Sequential(*layers())).to(dtype)
    x, before = torch.randn(shape, dtype=dtype), copy.deepcopy(model.state_dict())
    want = model(x)
    found = fastbn.torch.fold(model)
    assert (found.folded, found.left) == (folded, {})
    torch.testing.assert_close(found.model(x), want)
    assert not any(isinstance(layer, nn.modules.batchnorm._NormBase) for layer in found.model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    assert all(parameter.dtype == dtype for parameter in found.model.parameters())


COMPUTED: dict[str, Callable[[Any], Any]] = {
    "pruned convolution": lambda m: prune.l1_unstructured(m[0], "weight", 0.5),
    "pruned batch norm": lambda m: prune.l1_unstructured(m[1], "weight", 0.5),
    "weight_norm": lambda m: torch.nn.utils.weight_norm(m[0]),
    "spectral_norm": lambda m: torch.nn.utils.spectral_norm(m[0]),
    "kept outputs": lambda m: m[0].register_forward_hook(lambda layer, _, y: setattr(layer, "seen", [y])),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_models_that_hold_what_was_computed_are_copied(name: str) -> None:
    """torch refuses to copy a tensor that belongs to a graph."""
    model = lived(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 7, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        COMPUTED[name](model)
    want = model(x)
    found = fastbn.torch.fold(model)
    assert (found.folded, list(found.left)) == ({"4": "3"}, ["1"])
    torch.testing.assert_close(found.model(x), want)
    torch.testing.assert_close(model(x), want)
    if hasattr(select("float32").module(), "kernels"):
        fastbn.torch.benchmark(model, x, seconds=0)


@pytest.mark.parametrize("name", FOLDED)
def test_a_model_is_folded_on_the_device_where_it_lies(name: str) -> None:
    layers, _, folded = FOLDED[name]
    found = fastbn.torch.fold(nn.Sequential(*layers()).to("meta").eval())
    assert (found.folded, found.left) == (folded, {})
    assert all(parameter.is_meta for parameter in found.model.parameters())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        return self.bn(self.b(self.bn(self.a(x))))


class Twice(Shared):
    def forward(self, x: Any) -> Any:
        x = self.a(x)
        return self.bn(x) + x


class SharedConvolution(Shared):
    def forward(self, x: Any) -> Any:
        return self.bn(self.a(self.a(x)))


class Reads(Shared):
    def forward(self, x: Any) -> Any:
        return self.bn(self.a(x)) + self.a.weight.sum()


class ReadsAll(Shared):
    def forward(self, x: Any) -> Any:
        return self.bn(self.a(x)) + torch.cat([p.flatten() for p in self.parameters()]).sum()


class ReadsState(Shared):
    def forward(self, x: Any) -> Any:
        return self.bn(self.a(x)) + self.state_dict()["a.weight"].sum()


class Untraceable(Shared):
    def forward(self, x: Any) -> Any:
        return self.bn(self.a(x)) if x.sum() > 0 else x


class Parts(nn.Module):
    """One part can be traced, the whole cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.bn = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        return self.bn(self.part(x)) if x.shape[0] > 0 and bool(x.sum() < 1e9) else x


class PartAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.BatchNorm2d(3))

    def forward(self, x: Any) -> Any:
        return self.part(x).relu() if bool(x.sum() < 1e9) else x


def hooked() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda *_: None)
    return model


class Scaled(torch.Tensor):
    """Small integers and a scale, as packages keep weights that they have quantized."""

    @staticmethod
    def __new__(cls, integers: Any, scale: float) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers: Any, scale: float) -> None:
        self.integers, self.scale = integers, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].integers, args[0].scale)
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda t: t.integers * t.scale, (args, kwargs or {}))
        return func(*args, **kwargs)


def scaled(layer: Any) -> Any:
    layer.weight = nn.Parameter(Scaled((layer.weight.detach() * 64).to(torch.int8), 1 / 64), requires_grad=False)
    return layer


LEFT = {
    "activation": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)), "2", "it stands between ReLU and the output"),
    "padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)),
        "0",
        "the Conv2d after it pads what it returns with zeros",
    ),
    "before a transposed one": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 3)),
        "0",
        "it stands before a ConvTranspose2d",
    ),
    "shared": (Shared, "bn", "it is shared by several calls"),
    "read twice": (Twice, "bn", "what the Conv2d before it returns is read elsewhere, too"),
    "shared convolution": (SharedConvolution, "bn", "the Conv2d before it is shared by several calls"),
    "weights are read": (Reads, "bn", "the model's code reads the weights of the Conv2d beside it"),
    "all weights are read": (ReadsAll, "bn", "the model's code reads its tensors"),
    "the state is read": (ReadsState, "bn", "the model's code reads its tensors"),
    "another number of dimensions": (
        lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm2d(3)),
        "1",
        "the Linear beside it takes another number of dimensions",
    ),
    "untraceable": (Untraceable, "bn", "what calls it cannot be traced"),
    "hooks": (hooked, "1", "the Conv2d beside it has hooks"),
    "instance norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3, track_running_stats=True)),
        "1",
        "it normalizes each image by itself",
    ),
    "no statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
        "1",
        "it has no running statistics",
    ),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
        "1",
        "it stands between ParametrizedConv2d and the output",
    ),
    "weights of a class": (
        lambda: nn.Sequential(scaled(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)),
        "1",
        "the Conv2d beside it has a weight of class Scaled",
    ),
    "alone": (lambda: nn.BatchNorm2d(3), "", "it stands between the input and the output"),
    "a part by itself": (PartAlone, "part.0", "it stands between the input of part and the output of part"),
}


@pytest.mark.parametrize(("make", "path", "why"), LEFT.values(), ids=LEFT.keys())
def test_what_is_not_folded_has_a_reason(make: Callable[[], Any], path: str, why: str) -> None:
    model, x = lived(make()), torch.randn(2, 3, 5, 5)
    found = fastbn.torch.fold(model)
    assert (found.folded, found.left) == ({}, {path: why})
    torch.testing.assert_close(found.model(x), model(x))
    assert fastbn.torch.summary(model)[0].fold == why


@pytest.mark.parametrize(("weight", "mean"), [(400.0, 0.0), (1.0, 500.0), (float("nan"), 0.0)])
@pytest.mark.parametrize("first", [False, True])
def test_what_a_dtype_cannot_hold_is_not_folded(weight: float, mean: float, first: bool) -> None:
    bn = nn.BatchNorm2d(1)
    layers = [bn, nn.Conv2d(1, 1, 1)] if first else [nn.Conv2d(1, 1, 1), bn]
    model = nn.Sequential(*layers).eval().half()
    with torch.no_grad():
        layers[first].weight.fill_(1.0)  # type: ignore[operator, union-attr]
        layers[not first].weight.fill_(weight)  # type: ignore[operator, union-attr]
        bn.running_var.zero_()  # type: ignore[union-attr]
        bn.running_mean.fill_(mean)  # type: ignore[union-attr]
    found = fastbn.torch.fold(model)
    why = "the Conv2d beside it cannot hold the folded numbers in float16"
    assert (found.folded, found.left) == ({}, {str(int(not first)): why})
    assert fastbn.torch.summary(model)[0].fold == why
    x = torch.full((1, 1, 1, 1), mean or 1e-3).half()
    torch.testing.assert_close(found.model(x), model(x), equal_nan=True)


def test_a_model_in_training_mode_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert fastbn.torch.fold(model).left == {"1": "it is in training mode"}
    fastbn.torch.freeze(model)
    assert fastbn.torch.fold(model.train()).folded == {"1": "0"}


def test_parts_of_a_model_that_cannot_be_traced_are_folded() -> None:
    model, x = lived(Parts()), torch.randn(2, 3, 5, 5)
    found = fastbn.torch.fold(model)
    assert found.folded == {"part.1": "part.0"}
    assert found.left == {"bn": "what calls it cannot be traced"}
    torch.testing.assert_close(found.model(x), model(x))
    assert str(found) == "part.1: folded into part.0\nbn: left, what calls it cannot be traced"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize(
    ("layers", "taken", "other"),
    [
        ((nn.Linear(4, 4), nn.BatchNorm1d(4)), (2, 4), (2, 4, 4)),
        ((nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)), (2, 3, 4), (3, 4)),
        ((nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1)), (2, 3, 4), (3, 3)),
        ((nn.Conv2d(3, 4, 1), fastbn.torch.SyncBatchNorm(4)), (2, 3, 4, 4), (3, 4, 4)),
    ],
    ids=["linear", "convolution", "convolution after it", "any dimensions"],
)
def test_a_batch_norm_was_folded_for_the_dimensions_in_which_both_agree_on_channels(layers: Any, taken: Any, other: Any) -> None:
    """Batch norm takes the second axis for the channels, a linear layer the last one, a convolution without a batch the first one."""
    model, x = lived(nn.Sequential(*layers)), torch.randn(taken)
    found = fastbn.torch.fold(model).model
    model(torch.randn(other))
    with pytest.raises(ValueError, match=f"folded for inputs of {len(taken)} dimensions, got {len(other)}"):
        found(torch.randn(other))
    for same in (found, torch.fx.symbolic_trace(found), torch.jit.script(found), copy.deepcopy(found)):
        torch.testing.assert_close(same(x), model(x))


class Asks(Shared):
    def forward(self, x: Any) -> Any:
        dtype = next(self.parameters()).dtype
        return self.bn(self.a(x.to(dtype))) * self.bn.num_features + self.bn.eps * self.bn.momentum + self.bn.affine


def test_a_batch_norm_that_was_folded_can_be_asked_for_its_numbers() -> None:
    model, x = lived(Asks()), torch.randn(2, 3, 5, 5)
    found = fastbn.torch.fold(model)
    assert found.folded == {"bn": "a"}
    torch.testing.assert_close(found.model(x), model(x))


def test_the_order_of_memory_of_weights_stays() -> None:
    model = lived(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))).to(memory_format=torch.channels_last)
    assert fastbn.torch.fold(model).model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_norm_that_has_several_names_is_folded_under_all() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.second, self.more = self.first, nn.ModuleDict({"third": self.first})

        def forward(self, x: Any) -> Any:
            return self.more["third"](self.conv(x))

    model, x = lived(Named()), torch.randn(2, 3, 5, 5)
    found = fastbn.torch.fold(model)
    assert found.folded == {"first": "conv"}
    torch.testing.assert_close(found.model(x), model(x))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in found.model.modules())


@pytest.mark.parametrize("shared", ["by the model", "by another part", "a batch norm"])
def test_what_parts_of_a_model_share_is_not_folded(shared: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.part = nn.Sequential(nn.Sequential(self.conv, self.bn), nn.ReLU())
            self.other = nn.Sequential(self.bn if shared == "a batch norm" else self.conv, nn.BatchNorm2d(3))
            if shared == "by another part":
                del self.conv
            if shared != "a batch norm":
                del self.bn

        def forward(self, x: Any) -> Any:
            if x.sum() > 1e9:
                return x
            return self.part(x) + (self.conv(x) if shared == "by the model" else self.other(x))

    model, x = lived(Branches()), torch.randn(2, 3, 5, 5)
    found = fastbn.torch.fold(model)
    assert not found.folded
    torch.testing.assert_close(found.model(x), model(x))


def test_summary_says_of_a_model_in_training_what_can_be_folded_in_inference() -> None:
    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.aside = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Any) -> Any:
            z = self.bn(self.conv(x))
            return z * torch.ones([1] * len(z.shape)) if self.training else z  # torch.fx knows no len

    class Auxiliary(Depth):
        def forward(self, x: Any) -> Any:
            z = self.bn(self.conv(x))
            return (z, self.aside(z)) if self.training else z

    for model, before in ((Depth(), "unknown"), (Auxiliary(), "BatchNorm2d")):
        model.conv.eval()
        modes = [module.training for module in model.modules()]
        bn, aside = fastbn.torch.summary(model)
        assert (bn.before, bn.mode, aside.before) == ("Conv2d", "train", before)
        assert fastbn.torch.fold(copy.deepcopy(model).eval()).folded == {"bn": "conv"}
        assert (bn.fold, aside.fold) == ("folds into conv", "what calls it cannot be traced")
        assert [module.training for module in model.modules()] == modes


def test_summary_lists_every_normalization_layer() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.ReLU(), nn.InstanceNorm2d(4), nn.LazyBatchNorm2d(),
    )  # fmt: skip
    with torch.no_grad():
        model[1].weight[1] = 0
        model[1].running_var[2] = 7
    fastbn.torch.freeze(model[1])
    found = fastbn.torch.summary(model)
    assert [(layer.path, layer.kind, layer.channels) for layer in found] == [
        ("1", "BatchNorm2d", 4),
        ("3", "InstanceNorm2d", 4),
        ("4", "LazyBatchNorm2d", 0),
    ]
    first = found[0]
    assert (first.eps, first.momentum, first.mode, first.variance, first.dead) == (1e-3, None, "frozen", (1.0, 7.0), 1)
    assert (first.before, first.after, first.fold) == ("Conv2d", "ReLU", "folds into 0")
    assert [layer.fold for layer in found[1:]] == ["it normalizes each image by itself", "it was never called"]
    printed = str(found).splitlines()
    assert printed[0].split()[:3] == ["path", "kind", "channels"]
    assert printed[1].split()[:6] == ["1", "BatchNorm2d", "4", "0.001", "average", "frozen"]
    assert printed[-1] == "3 layers, 8 channels, 1 can be folded"
    assert str(fastbn.torch.summary(nn.ReLU())) == "the model has no normalization layers"


def test_frozen_layers_stay_so_through_train_copies_and_pickles() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False)))
    assert fastbn.torch.freeze(model) == 2
    assert fastbn.torch.freeze(model) == 0
    state = copy.deepcopy(model.state_dict())
    for frozen in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own
        frozen.train()(torch.randn(5, 3) + 2)
        assert all(torch.equal(value, state[name]) for name, value in frozen.state_dict().items())
        assert not any(parameter.requires_grad for parameter in frozen[0].parameters())
        assert fastbn.torch.unfreeze(frozen) == 2
        assert fastbn.torch.unfreeze(frozen) == 0
        assert all(parameter.requires_grad for parameter in frozen[0].parameters())
        frozen.train()(torch.randn(5, 3) + 2)
        assert not torch.equal(frozen[0].running_mean, state["0.running_mean"])


@pytest.mark.parametrize("at_once", [True, False])
def test_parameters_that_frozen_layers_share_learn_again(at_once: bool) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    for part in [model] if at_once else model:
        fastbn.torch.freeze(part)
    assert not any(p.requires_grad for p in model.parameters())
    for part in [model] if at_once else model:
        fastbn.torch.unfreeze(part)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight", "1.bias"]


@pytest.mark.parametrize("last", [1, 2, 3, 4])
@pytest.mark.parametrize("function", [fastbn.torch.freeze, fastbn.torch.unfreeze])
def test_what_an_interrupt_leaves_frozen_can_be_unfrozen(function: Any, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), itertools.count(1)
    model[0].bias.requires_grad_(False)
    if function is fastbn.torch.unfreeze:
        fastbn.torch.freeze(model)
    requires = torch.Tensor.requires_grad_

    def interrupted(self: Any, *value: Any) -> Any:
        if next(calls) == last:
            raise KeyboardInterrupt
        return requires(self, *value)

    monkeypatch.setattr(torch.Tensor, "requires_grad_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        function(model)
    monkeypatch.undo()
    fastbn.torch.unfreeze(model)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(layer.training and not layer._forward_pre_hooks for layer in model)


def test_parameters_of_frozen_layers_may_go_on_learning() -> None:
    model = nn.BatchNorm2d(3)
    model.bias.requires_grad_(False)
    fastbn.torch.freeze(model, parameters=False)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
    model.train()(torch.randn(2, 3, 4, 4)).sum().backward()
    assert model.weight.grad is not None
    fastbn.torch.unfreeze(model)
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)


@needs_kernels
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_benchmark_times_both_sides_and_leaves_everything_as_it_was(training: bool, fuse: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train(training)
    state = copy.deepcopy(model.state_dict())
    for enabled in (False, True):
        if enabled:
            fastbn.torch.enable()
        try:
            found = fastbn.torch.benchmark(model, torch.randn(2, 3, 8, 8), seconds=0, fuse=fuse)
            assert type(model[1]) is nn.BatchNorm2d
            assert fastbn.torch.is_enabled() == enabled
            before = sum(fastbn.torch.report().taken.values())
            model.eval()(torch.randn(2, 3, 8, 8))
            assert (sum(fastbn.torch.report().taken.values()) > before) == enabled
        finally:
            fastbn.torch.disable()
        model.train(training)
        assert (found.steps, found.declined) == (6, {})
        assert found.step.keys() == found.batch_norm.keys() == {"torch", "fastbn"}
        assert all(found.batch_norm[side] > 0 for side in found.step)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm1d(4), nn.LayerNorm(6), nn.RMSNorm(6)])
def test_a_benchmark_counts_norms_of_parts_on_both_sides(norm: Any, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "LEAST", dict.fromkeys(parts.LEAST, 0))
    model = nn.Sequential(nn.Conv1d(3, 4, 1), norm, nn.ReLU()).train(training)
    found = fastbn.torch.benchmark(model, torch.randn(2, 3, 6), seconds=0, fuse=True)
    assert all(found.batch_norm[side] > 0 for side in found.step)


@needs_kernels
def test_a_benchmark_changes_neither_inputs_nor_random_numbers() -> None:
    class Model(nn.Sequential):
        def forward(self, batch: Any) -> Any:
            batch["x"].detach().add_(1)
            return super().forward(batch["x"])

    model = Model(nn.Dropout(), nn.BatchNorm1d(3))
    x, numbers = torch.ones(4, 3, requires_grad=True), torch.get_rng_state()
    fastbn.torch.benchmark(model, {"x": x}, seconds=0)
    assert x.grad is None
    assert torch.equal(x, torch.ones(4, 3))
    assert torch.equal(numbers, torch.get_rng_state())


def test_the_verdict_of_a_benchmark() -> None:
    def of(torchs: float, ours: float, noise: float, share: float = 1.0, steps: int = 20) -> str:
        return str(fastbn.torch.Benchmark({"torch": torchs, "fastbn": ours}, {"torch": share, "fastbn": share}, noise, steps, {}).verdict)

    assert of(12, 10, 0.05) == "a step is 1.20 times as fast with fastbn"
    assert of(10, 12, 0.05) == "a step is 0.83 times as fast with fastbn: leave it to torch"
    assert of(10, 10.2, 0.05) == "no difference beyond the noise of 5 %"
    assert of(10, 5, 0.05, 0.0) == "no normalization ran on the CPU"
    assert of(10, 5, 0.05, steps=6) == "too few to say more: give it more seconds, for 20 steps or more"
    assert of(10, 5, 0.6).startswith("times differ by more than 50 % from step to step")


@needs_kernels
def test_benchmark_refuses_what_it_cannot_time() -> None:
    with pytest.raises(ValueError, match="seconds must be a finite number of at least 0, got -1"):
        fastbn.torch.benchmark(nn.ReLU(), seconds=-1)
    with pytest.raises(ValueError, match="returns no floating-point tensor that requires a gradient"):
        fastbn.torch.benchmark(nn.Identity(), torch.ones(2, dtype=torch.long), seconds=0)
    frozen = nn.BatchNorm1d(3).requires_grad_(False)
    with pytest.raises(ValueError, match=r"that requires a gradient, .* after model\.eval\(\) it is timed without a backward"):
        fastbn.torch.benchmark(frozen, torch.ones(2, 3), seconds=0)
    assert fastbn.torch.benchmark(frozen.eval(), torch.ones(2, 3), seconds=0).steps
    assert not fastbn.torch.is_enabled()


@dataclasses.dataclass
class Answer:
    score: Any
    name: str = ""


@needs_kernels
def test_a_model_that_returns_a_dataclass_is_timed() -> None:
    class Model(nn.BatchNorm1d):
        def forward(self, input: Any) -> Any:  # noqa: A002  torch's name
            return Answer(super().forward(input))

    assert fastbn.torch.benchmark(Model(3), torch.randn(4, 3), seconds=0).batch_norm["torch"] > 0


@needs_kernels
def test_benchmark_counts_what_is_left_to_torch() -> None:
    model = nn.BatchNorm2d(3).double()
    found = fastbn.torch.benchmark(model, 1e152 * torch.randn(2, 3, 8, 8, dtype=torch.float64), seconds=0)
    assert found.declined == {("forward", "values are at the ends of the range"): 1, ("backward", "values are at the ends of the range"): 1}
    assert str(found).splitlines()[-1] == "1 a step, backward, left to torch: values are at the ends of the range"


@pytest.mark.parametrize("function", ["benchmark", "summary", "fold", "freeze", "unfreeze"])
def test_what_is_no_module_is_refused(function: str) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        getattr(fastbn.torch, function)(torch.ones(3))


@pytest.mark.parametrize("function", ["fold", "freeze", "benchmark"])
def test_lazy_layers_that_were_never_called_are_named_and_nothing_is_changed(function: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    name = "2 is a LazyBatchNorm2d" if function == "freeze" else "1 is a LazyConv2d"
    with pytest.raises(ValueError, match=f"model must have been called once, but {name} that never was"):
        getattr(fastbn.torch, function)(model)
    assert model[0].training
    assert model[0].weight.requires_grad
    assert not model[0]._forward_pre_hooks
    model(torch.randn(2, 3, 4, 4))
    assert fastbn.torch.freeze(model) == 2
