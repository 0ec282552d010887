"""fastbn's layers in the places where torch puts models: scripts, threads, copies, other processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402
from fastbn.torch import fused, parts  # noqa: E402

nn = torch.nn

pytestmark = [
    pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),  # of PyTorch 2.14
]


def small(*layers: Any) -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 1), *(layers or (nn.BatchNorm2d(4), nn.ReLU())))


def converted(model: Any) -> Any:
    fastbn.torch.convert(model)
    return model


def adapting(model: Any) -> Any:
    fastbn.torch.adapt(model)
    return model


REVERT = r"a converted model: call fastbn\.torch\.revert\(model\) first"
SCRIPTED = {
    "a batch norm": (lambda: converted(nn.BatchNorm2d(4)), REVERT),
    "a sequence": (lambda: converted(small()), REVERT),
    "a group norm": (lambda: converted(small(nn.GroupNorm(2, 4), nn.ReLU())), REVERT),
    "adapting": (lambda: adapting(small()), r"a layer that adapts: call fastbn\.torch\.Adaptation\(model\)\.revert\(\) first"),
    "synchronized": (lambda: fastbn.torch.convert_sync_batchnorm(small()), r"fastbn\.torch\.SyncBatchNorm: load the state_dict"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), SCRIPTED.values(), ids=SCRIPTED.keys())
def test_scripts_of_what_they_cannot_hold_are_refused_clearly(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile {message}"):
        torch.jit.script(model)
    fastbn.torch.revert(model)
    fastbn.torch.Adaptation(model).revert()
    if not any(isinstance(m, fastbn.torch.SyncBatchNorm) for m in model.modules()):
        torch.jit.script(model)


@pytest.fixture
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SMALLEST", 0)
    monkeypatch.setattr(parts, "LEAST", dict.fromkeys(parts.LEAST, 0))


@pytest.mark.usefixtures("small_tensors_too")
def test_graphs_with_shapes_and_numbers_that_change() -> None:
    """Slopes are no constants there."""
    model = small(nn.BatchNorm2d(4), nn.LeakyReLU(0.1)).eval()
    twin = converted(copy.deepcopy(model))
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=True)
    for count in (2, 3, 5):
        x = torch.randn(count, 3, 4, 4)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.usefixtures("small_tensors_too")
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=lambda m: type(m).__name__)
def test_many_gradients_at_once(norm: Any) -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for them."""
    model = small(norm, nn.SiLU())
    twin, x, found = converted(copy.deepcopy(model)), torch.randn(2, 3, 4, 4), []
    for m in (model, twin):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        dy = torch.arange(3 * y.numel()).reshape(3, *y.shape).sin()
        found.append(torch.autograd.grad(y, [leaf, *m.parameters()], dy, is_grads_batched=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_frozen_layers_stay_frozen_in_scripts() -> None:
    model, x = small(), torch.randn(2, 3, 4, 4)
    fastbn.torch.freeze(model)
    script = torch.jit.script(model).train()
    torch.testing.assert_close(script(x), model(x))
    assert not model[1].running_mean.any()


def exported(model: Any) -> Any:
    return torch.export.export(model, (torch.randn(2, 3, 5, 5),)).module()


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([small()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Uncalled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.other = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (5,))


SCRIPT, GRAPH = "in what torch.jit compiled", "in a graph"
UNSEEN: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "a script": (lambda: torch.jit.script(small()), {"": SCRIPT}),
    "a script with a list": (lambda: nn.Sequential(torch.jit.script(Lists())), {"0": SCRIPT}),
    "a scripted layer": (lambda: small(torch.jit.script(nn.BatchNorm2d(4)), nn.ReLU()), {"1": SCRIPT}),
    "a traced part": (lambda: nn.Sequential(torch.jit.trace(small().eval(), torch.randn(2, 3, 5, 5)), nn.ReLU()), {"0": SCRIPT}),
    "a graph": (lambda: exported(small()), {"": GRAPH}),
    "a part that is a graph": (lambda: nn.Sequential(nn.Sequential(exported(small(nn.GroupNorm(2, 4)).eval()))), {"0.0": GRAPH}),
    "a traced part with a module that nothing calls": (lambda: nn.Sequential(torch.jit.trace(Uncalled(), torch.randn(2, 3, 5, 5))), {}),
    "no normalization": (lambda: nn.Sequential(torch.jit.script(nn.ReLU()), exported(nn.Conv2d(3, 4, 1))), {}),
    "a graph of layers": (lambda: torch.fx.symbolic_trace(small()), {}),
}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch.export in PyTorch 2.13
@pytest.mark.parametrize(("make", "unseen"), UNSEEN.values(), ids=UNSEEN.keys())
def test_normalizations_that_are_no_layers_are_named(make: Callable[[], Any], unseen: dict[str, str]) -> None:
    model, x = make(), torch.randn(2, 3, 5, 5)
    lines = {path: f"calls of normalizations that are no layers, {where}: 1" for path, where in unseen.items()}
    found = fastbn.torch.fold(model)
    assert {path: why for path, why in found.left.items() if path in lines} == lines
    want = model(x)
    for listed in (fastbn.torch.summary(model), fastbn.torch.convert(model)):
        assert listed.unseen == copy.copy(listed).unseen == lines
        for path, line in lines.items():
            assert str(listed).endswith(f"\n{path or 'the model'}: {line}")
            told = f"{path or 'the model'}: {line}, taken as those of layers; RMS norm is left to torch"
            assert told in fastbn.torch.explain(model).splitlines()
            assert f"{path or 'the model'}: left, {line}" in str(found).splitlines()
    torch.testing.assert_close(model(x), want)
    fastbn.torch.freeze(model)
    with fastbn.torch.enabled():
        fastbn.torch.report(reset=True)
        model(x)
        assert not lines or sum(fastbn.torch.report().taken.values()) == 1


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("make", [torch.jit.script, torch.fx.symbolic_trace, lambda m: torch.jit.trace(m, torch.randn(2, 5)), exported])
def test_rms_norms_that_are_no_layers_are_named_and_left_to_torch(make: Callable[[Any], Any]) -> None:
    model = nn.Sequential(make(Root()))
    assert list(fastbn.torch.convert(model).unseen) == ["0"]
    assert fastbn.torch.explain(model).endswith("RMS norm is left to torch")


class Doubled(nn.Module):
    def forward(self, w: Any) -> Any:
        return 2 * w


def parametrized(layer: Any, name: str = "weight") -> Any:
    nn.utils.parametrize.register_parametrization(layer, name, Doubled())
    return layer


@pytest.mark.usefixtures("small_tensors_too")
@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(4), lambda: nn.GroupNorm(2, 4)])
def test_what_is_derived_from_a_converted_layer_stays_when_that_is_reverted(norm: Callable[[], Any]) -> None:
    own, x = small(norm(), nn.ReLU()), torch.randn(2, 3, 5, 5)
    model = converted(copy.deepcopy(own))
    for m in (own, model):
        parametrized(m[1])
    want = own(x)
    torch.testing.assert_close(model(x), want)
    assert fastbn.torch.revert(model) == 1
    assert "fastbn" not in str(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    assert fastbn.torch.convert(model)[0].why == f"Parametrized{type(norm()).__name__} was derived from the class of a converted layer"
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
    torch.testing.assert_close(model(x), want)
    fastbn.torch.revert(model)
    assert type(model[1]) is type(norm())


@pytest.mark.usefixtures("small_tensors_too")
def test_a_class_around_that_of_a_converted_container_stays() -> None:
    class Sharded:
        """As torch's fully_shard makes them, of a container's class."""

    own, x = nn.Sequential(small()), torch.randn(2, 3, 5, 5)
    model = converted(copy.deepcopy(own))
    kind = type(model[0])
    model[0].__class__ = type("ShardedSequential", (Sharded, kind), {})
    for fuse in (False, True):
        torch.testing.assert_close(model(x), own(x))
        fastbn.torch.revert(model)
        assert isinstance(model[0], Sharded)
        torch.testing.assert_close(model(x), own(x), rtol=0, atol=0)
        assert fastbn.torch.convert(model, fuse=fuse)[0].fused == (("ReLU",) if fuse else ())
    torch.testing.assert_close(model(x), own(x))


def test_a_converted_layer_that_adapts_is_pickled_and_goes_on_when_it_is_reverted() -> None:
    model, x = converted(small().eval()), torch.randn(2, 3, 5, 5)
    plain = model(x)
    adaptation = fastbn.torch.adapt(model, prior=0)
    want = model(x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301  our own
        torch.testing.assert_close(twin(x), want, rtol=0, atol=0)
    assert fastbn.torch.fold(model).left == {"1": "AdaptedBatchNorm2d has a forward of its own"}
    fastbn.torch.revert(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    adaptation.revert()
    torch.testing.assert_close(model(x), plain)
    fastbn.torch.revert(model)
    assert type(model[1]) is nn.BatchNorm2d


def pruned(layer: Any) -> Any:
    from torch.nn.utils import prune

    prune.identity(layer, "weight")
    return layer


@pytest.mark.parametrize("change", [parametrized, pruned, lambda layer: parametrized(parametrized(layer), "bias")])
def test_a_batch_norm_whose_weight_is_computed_is_frozen(change: Callable[[Any], Any]) -> None:
    model = small(change(nn.BatchNorm2d(4)))
    parameters = [*model[1].parameters()]
    parameters[0].requires_grad_(False)
    assert fastbn.torch.freeze(model) == 1
    assert not any(p.requires_grad for p in parameters)
    model.train()(torch.randn(2, 3, 5, 5)).sum().backward()
    assert model[1].num_batches_tracked == 0
    assert fastbn.torch.unfreeze(model) == 1
    assert [p.requires_grad for p in parameters] == [False, True]


def test_a_parametrized_batch_norm_is_not_synchronized() -> None:
    model = small(nn.BatchNorm2d(4), parametrized(nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="2 cannot be converted: it is parametrized"):
        fastbn.torch.convert_sync_batchnorm(model)
    assert type(model[1]) is nn.BatchNorm2d


def test_a_converted_layer_that_was_parametrized_since_is_what_it_is_called() -> None:
    """Its class is derived from ours, but the code is torch's."""
    own, x = small(), torch.randn(2, 3, 4, 4)
    model = converted(copy.deepcopy(own))
    for m in (own, model):
        parametrized(m[1])
    assert fastbn.torch.summary(model)[0].fold == "it is parametrized"
    assert fastbn.torch.fold(model.eval()).left == {"1": "it is parametrized"}
    with pytest.raises(ValueError, match="1 cannot be converted: it is parametrized"):
        fastbn.torch.convert_sync_batchnorm(model)
    with fastbn.torch.adapt(model), fastbn.torch.adapt(own.eval()):
        torch.testing.assert_close(model(x), own(x))
    torch.testing.assert_close(model(x), own(x))


class Parallel(nn.parallel.DistributedDataParallel):
    """As packages derive them, with a forward of named arguments."""

    sent: ClassVar[list[None]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x)
        return y

    def _sync_buffers(self) -> None:
        self.sent.append(None)
        super()._sync_buffers()


def sharded(model: Any) -> Any:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "data parallel, in a model": lambda m: nn.Sequential(nn.parallel.DistributedDataParallel(m)),
    "a class of somebody else": Parallel,
    "the same in a model": lambda m: nn.Sequential(Parallel(m)),
    "sharded": sharded,
    "sharded, in a model": lambda m: nn.Sequential(sharded(m)),
}


@pytest.mark.usefixtures("small_tensors_too")
@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_what_shares_a_model_between_processes_is_looked_through_and_not_called(wrap: Callable[[Any], Any]) -> None:
    """Looking at a model on one process alone would wait for the others, or leave what was gathered for a stand-in."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        own, x = small(), torch.randn(2, 3, 5, 5)
        model = wrap(copy.deepcopy(own))
        Parallel.sent.clear()
        assert fastbn.torch.summary(model)[0].before == "Conv2d"
        assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
        assert not Parallel.sent
        y = model(x)
        y.sum().backward()
        torch.testing.assert_close(y, own(x))
        fastbn.torch.revert(model)
        torch.testing.assert_close(model(x), own(x))
    finally:
        torch.distributed.destroy_process_group()


def test_values_in_no_memory_of_this_process_are_refused() -> None:
    from torch.distributed.tensor import distribute_module, distribute_tensor

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model, x = distribute_module(small().eval(), mesh), distribute_tensor(torch.randn(2, 3, 5, 5), mesh)
        with pytest.raises(TypeError, match="in this process's memory, where a DTensor has none"):
            fastbn.torch.update_bn(model, [x])
        with fastbn.torch.adapt(model), pytest.raises(TypeError, match="where a DTensor has none"):
            model(x)
    finally:
        torch.distributed.destroy_process_group()


def patched(model: Any, path: str, after: Any = torch.tanh) -> Any:
    """A model of which one module has a forward of its own, as packages give to modules that they wrap."""
    module = model.get_submodule(path)
    forward = module.forward
    module.forward = lambda x: after(forward(x))
    return model


PATCHED = {
    "a convolution": ("0", "the Conv2d beside it has a forward of its own", "", ("ReLU",)),
    "a batch norm": ("1", "BatchNorm2d has a forward of its own", "it has a forward of its own", ()),
    "an activation": ("2", "", "ReLU follows", ()),
    "the model": ("", "what calls it cannot be traced", "what calls it cannot be traced", ()),
}


@pytest.mark.usefixtures("small_tensors_too")
@pytest.mark.parametrize(("path", "left", "why", "fused"), PATCHED.values(), ids=PATCHED.keys())
def test_a_forward_of_an_objects_own_is_what_runs(path: str, left: str, why: str, fused: tuple[str, ...]) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        made = small().eval()
        made[1].running_mean.uniform_(-1, 1)
        return patched(made, path)

    x = torch.randn(2, 3, 5, 5)
    want = model()(x)
    folded = fastbn.torch.fold(model())
    assert folded.left == ({"1": left} if left else {})
    torch.testing.assert_close(folded.model(x), want)
    twin = model()
    found = fastbn.torch.convert(twin)[0]
    assert (found.why, found.fused) == (why, fused)
    torch.testing.assert_close(twin(x), want)


def test_a_whole_model_with_a_forward_of_its_own_is_not_folded_by_that_of_its_class() -> None:
    model = small().eval()
    model[1].running_mean.uniform_(-1, 1)
    model.forward = lambda x: model[1](model[0](x).tanh())
    folded = fastbn.torch.fold(model)
    assert folded.left == {"1": "what calls it cannot be traced"}


class Hooked(nn.Module):
    """Sequences with hooks, of which one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.bn = small(nn.Identity()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        return (self.bn(self.first(x)) + self.inner(self.inner(self.first(x)))).relu()


@pytest.mark.parametrize("backward", [False, True])
def test_hooks_of_containers_are_called_by_nobody_but_the_model(backward: bool) -> None:
    model, x, seen = Hooked(), torch.randn(2, 3, 4, 4), []
    for part in (model.first, model.inner):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(type(inputs[0])))
        part.register_forward_hook(lambda _, __, output: 2 * output)
        if backward:
            part.register_full_backward_hook(lambda *_: None)
    with torch.no_grad():
        model.bn.running_mean.fill_(3)
    want = model.eval()(x)
    seen.clear()
    assert [layer.before for layer in fastbn.torch.summary(model)] == ["Conv2d", "Sequential"]
    folded = fastbn.torch.fold(model)
    assert folded.left == {"inner.1": "it is shared by several calls", "bn": "it stands between Sequential and add"}
    reasons = [layer.why for layer in fastbn.torch.convert(model)]
    assert reasons == ["it is called several times", "its input may change before what follows is computed"]
    assert not seen
    for one in (model, folded.model):
        torch.testing.assert_close(one(x), want)


def test_a_container_with_hooks_is_converted_and_folded_inside() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    inner.register_forward_hook(lambda _, __, output: 2 * output)
    model, x = nn.Sequential(inner, nn.ReLU()).eval(), torch.randn(2, 3, 4, 4)
    want, folded = model(x), fastbn.torch.fold(model)
    assert folded.folded == {"0.1": "0.0", "0.4": "0.3"}
    assert [(layer.fused, layer.why) for layer in fastbn.torch.convert(model)] == [(("ReLU",), ""), ((), "0 has hooks")]
    for one in (model, folded.model):
        torch.testing.assert_close(one(x), want)


class Shifted(nn.BatchNorm2d):
    """Does something else beside its forward."""

    calls = 0

    def __call__(self, x: Any) -> Any:
        type(self).calls += 1
        y = super().__call__(x)
        return y if torch.is_grad_enabled() else y + 1


@pytest.mark.usefixtures("small_tensors_too")
def test_a_layer_with_a_call_of_its_own_is_called() -> None:
    model, x = small(Shifted(4), nn.ReLU()).eval(), torch.randn(2, 3, 4, 4)
    want = model(x)
    assert fastbn.torch.fold(model).left == {"1": "Shifted has a __call__ of its own"}
    with pytest.raises(ValueError, match="Shifted has a __call__ of its own"):
        fastbn.torch.adapt(model)
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
    before = type(model[1]).calls
    torch.testing.assert_close(model(x), want)
    assert type(model[1]).calls == before + 1
    with torch.no_grad():
        assert (model(x) >= want).all()
