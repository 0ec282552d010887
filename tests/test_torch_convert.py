"""Models whose batch norms are converted: the same models, with the same results."""

from __future__ import annotations

import builtins
import collections
import copy
import dataclasses
import inspect
import io
import itertools
import operator
import os
import pickle
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy
import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402
from fastbn.torch import fused, parts  # noqa: E402
from fastbn.torch.conversion import Converted  # noqa: E402

nn = torch.nn
F = torch.nn.functional

pytestmark = pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels")


@pytest.fixture(autouse=True)
def _small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(fused, "SMALLEST", 0)
    fastbn.torch.report(reset=True)
    torch.manual_seed(0)
    yield
    fastbn.torch.disable()
    torch.set_num_threads(threads)


def taken() -> int:
    return sum(fastbn.torch.report().taken.values())


def step(model: Any, *inputs: Any) -> list[Any]:
    """Output, gradients and buffers after one step of a copy."""
    twin = copy.deepcopy(model)
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    y = twin(*leaves)
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    return [y.detach(), *(x.grad for x in leaves), *(p.grad for p in twin.parameters()), *twin.buffers()]


def same(model: Any, *inputs: Any) -> Any:
    """Convert a model, whose step must stay as near to that in float64; return what became of its layers."""
    wide = copy.deepcopy(model).double()
    true = step(wide, *(x.double() if x.is_floating_point() else x for x in inputs))
    want = step(model, *inputs)
    keys = list(model.state_dict())
    found = fastbn.torch.convert(model)
    got = step(model, *inputs)
    assert list(model.state_dict()) == keys
    for a, b, c in zip(got, want, true, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.numel():
            assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
            few = (256 if a.dtype == torch.float64 else 16) * torch.finfo(a.dtype).eps if a.is_floating_point() else 0
            allowed = 1.5 * (b.double() - c).abs().max() + few * max(1.0, c.double().abs().max())
            assert (a.double() - c).abs().max() <= allowed
    return found


CHECKPOINT = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


class Body(nn.Module):
    """A convolution, batch norms, and what a test does with them."""

    def __init__(self, after: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.after = after
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Any) -> Any:
        return self.after(self, x)


def image(*size: int) -> Any:
    return torch.randn(*(size or (2, 3, 5, 6)))


MODULES = {
    "ReLU": nn.ReLU(), "ReLU in place": nn.ReLU(inplace=True), "ReLU6": nn.ReLU6(), "LeakyReLU": nn.LeakyReLU(0.3, inplace=True),
    "Hardswish": nn.Hardswish(), "SiLU": nn.SiLU(inplace=True), "GELU": nn.GELU(), "GELU tanh": nn.GELU(approximate="tanh"),
    "Sigmoid": nn.Sigmoid(), "Tanh": nn.Tanh(),
}  # fmt: skip
FUNCTIONS = {
    "F.relu": F.relu, "torch.relu": torch.relu, "relu": lambda z: z.relu(), "relu_": lambda z: z.relu_(), "torch.relu_": torch.relu_,
    "F.relu in place": lambda z: F.relu(z, inplace=True), "F.relu positional": lambda z: F.relu(z, True), "F.relu6": F.relu6,
    "F.leaky_relu": lambda z: F.leaky_relu(z, 0.2), "F.leaky_relu_": lambda z: F.leaky_relu_(z, negative_slope=0.2),
    "F.hardswish": F.hardswish, "F.silu": F.silu, "F.gelu": F.gelu, "F.gelu tanh": lambda z: F.gelu(z, approximate="tanh"),
    "F.sigmoid": F.sigmoid, "torch.sigmoid": torch.sigmoid, "sigmoid": lambda z: z.sigmoid(), "tanh": lambda z: z.tanh(),
    "torch.tanh": torch.tanh, "tanh_": lambda z: z.tanh_(),
}  # fmt: skip
SUMS = {
    "+": lambda a, b: a + b, "other side": lambda a, b: b + a, "torch.add": torch.add, "add": lambda a, b: a.add(b),
    "add_": lambda a, b: a.add_(b), "+=": operator.iadd,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_an_activation_layer_is_fused(name: str, training: bool) -> None:
    model = sequential(nn.BatchNorm2d(4), copy.deepcopy(MODULES[name]), nn.Conv2d(4, 2, 1)).train(training)
    found = same(model, image())
    assert [(layer.path, layer.fused, layer.why) for layer in found] == [("1", (type(MODULES[name]).__name__,), "")]
    assert taken() == 2


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_function_is_fused(name: str) -> None:
    function = FUNCTIONS[name]
    found = same(Body(lambda m, x: function(m.bn(m.conv(x)))), image())
    assert len(found[0].fused) == 1
    assert taken() == 2


@pytest.mark.parametrize("activation", ["none", "ReLU in place", "relu_", "F.relu6", "LeakyReLU", "SiLU"])
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_fused(name: str, activation: str) -> None:
    add, act = SUMS[name], {"none": nn.Identity(), **MODULES, **FUNCTIONS}[activation]
    model = Body(lambda m, x: m.act(add(m.bn(m.conv(x)), m.bn2(m.other(x)))), act=act if isinstance(act, nn.Module) else nn.Identity())
    if not isinstance(act, nn.Module):
        model.after = lambda m, x: act(add(m.bn(m.conv(x)), m.bn2(m.other(x))))
    found = same(model, image())
    assert found[0].fused[:1] == ("add",)
    alone = activation in ("none", "SiLU")  # SiLU's derivative needs the residual, which torch does not keep
    assert len(found[0].fused) == (1 if alone else 2)
    assert found[1].why == ("add_ follows" if name == "add_" else "the other side of the sum is fused")
    assert taken() == 4


def hooked(model: Any, path: str) -> Any:
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    return model


def sequential(*layers: Any) -> Any:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), *layers)


LEFT = {
    "nothing": (lambda: sequential(nn.BatchNorm2d(4)), "the model's output follows"),
    "another layer": (lambda: sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2)), "MaxPool2d follows"),
    "dropout": (lambda: sequential(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU()), "Dropout follows"),
    "read twice": (lambda: Body(lambda m, x: (z := m.bn(m.conv(x))).relu() * z), "what it returns is read 2 times"),
    "added to itself": (lambda: Body(lambda m, x: (z := m.bn(m.conv(x))) + z), "add follows"),
    "a scaled sum": (lambda: Body(lambda m, x: torch.add(m.bn(m.conv(x)), m.other(x), alpha=2)), "add follows"),
    "a number": (lambda: Body(lambda m, x: m.bn(m.conv(x)) + 1), "add follows"),
    "into the other side": (lambda: Body(lambda m, x: m.other(x).add_(m.bn(m.conv(x)))), "add_ follows"),
    "called twice": (lambda: Body(lambda m, x: m.bn(m.conv(x)).relu() + m.bn(m.other(x)).relu()), "it is called several times"),
    "an input others read": (
        lambda: Body(lambda m, x: (m.bn(z := m.conv(x)), z.mul(2))[0].relu()), "its input may change before what follows is computed",
    ),
    "an input of unknown memory": (
        lambda: Body(lambda m, x: (m.bn(m.conv(x)[:]), x.mul(2))[0].relu()), "its input may change before what follows is computed",
    ),
    "kept": (
        lambda: Body(lambda m, x: (m.__dict__.update(seen=[z := m.bn(m.conv(x))]), z.relu())[1]), "the model's code keeps what it returns",
    ),
    "kept deep inside": (
        lambda: Body(lambda m, x: (m.__dict__.update(seen={"z": [z := m.bn(m.conv(x))]}), z.relu())[1]),
        "the model's code keeps what it returns",
    ),
    "hooks": (lambda: hooked(sequential(nn.BatchNorm2d(4), nn.ReLU()), "1"), "it has hooks"),
    "a hooked activation": (lambda: hooked(sequential(nn.BatchNorm2d(4), nn.ReLU()), "2"), "2 has hooks"),
    "hooks around": (lambda: hooked(nn.Sequential(sequential(nn.BatchNorm2d(4)), nn.ReLU()), "0"), "0 has hooks"),
    "synchronized": (lambda: sequential(nn.SyncBatchNorm(4), nn.ReLU()).eval(), "it is synchronized"),
    "running statistics": (lambda: sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()), "it has running statistics"),
    "a part by itself": (
        lambda: Body(lambda m, x: m.bn(m.conv(x)).relu() if x.sum() < 1e9 else x, bn=nn.Sequential(nn.BatchNorm2d(4))),
        "the output of bn follows",
    ),
    "untraceable": (lambda: Body(lambda m, x: m.bn(m.conv(x)).relu() if x.sum() < 1e9 else x), "what calls it cannot be traced"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "why"), LEFT.values(), ids=LEFT.keys())
def test_what_is_not_fused_has_a_reason(make: Callable[[], Any], why: str) -> None:
    found = same(make(), image())
    assert (found[0].fused, found[0].why) == ((), why)


def test_a_layer_that_was_never_called_is_left() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    assert fastbn.torch.convert(model)[0].why == "it was never called"
    model(image())
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)


@pytest.mark.parametrize(
    "after",
    [
        lambda m, x: m.bn(m.conv(x)).relu() if m.training else m.bn(m.conv(x)),
        lambda m, x: (m.bn(m.conv(x)) * 2, m.bn(m.conv(x)).relu())[m.training],
        lambda m, x: m.act(m.bn(m.conv(x))) + (0 if m.training else m.bn(m.conv(x))),
        lambda m, x: m.bn(m.conv(x)).relu() if m.training else torch.cat([m.bn(m.conv(x)), x], 1),
        lambda m, x: m.bn(m.conv(x)).relu() if m.training else m.bn(m.conv(x))[:, 1:].clone(),
        lambda m, x: m.bn(m.conv(x)).relu() if m.training else (z := m.bn(m.conv(x))).add(z).sigmoid() / z.shape[0] - z.mean(),
        lambda m, x: m.bn(m.conv(x)).relu() if m.training else 3.0 - (-m.bn(m.conv(x))).clamp(min=0),
        lambda m, x: m.bn(m.conv(x)) + m.other(x) if m.training else (z := m.bn(m.conv(x))).add_(z),
        lambda m, x: (m.bn(m.conv(x)) + m.other(x)).relu() if m.training else (z := m.bn(m.conv(x))).add_(z).relu() + z,
    ],
)
def test_where_other_code_runs_than_was_found_the_result_is_the_models(after: Callable[..., Any]) -> None:
    """As code does that asks for the mode, which torch.fx does not see."""
    model, x = Body(after, act=nn.GELU()), image()
    same(model, x)
    same(model.eval(), x)
    for training in (True, False):
        own = copy.deepcopy(model.train(not training))
        fastbn.torch.convert(model)
        for got, want in zip(step(model.train(training), x), step(own.train(training), x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        fastbn.torch.revert(model)


def test_a_model_may_be_changed_after_it_was_converted() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), image()
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    for layer in (nn.GELU(), nn.Identity(), nn.Softmax(1), nn.PReLU(), nn.LeakyReLU(2.0), nn.Hardtanh(-1, 1), nn.Hardtanh(0, 6)):
        model[2] = own[2] = layer
        torch.testing.assert_close(step(model, x), step(own, x))
    seen: list[Any] = []
    for m in (model, own):
        m[2] = nn.ReLU()
        m[1].register_forward_hook(lambda _, __, output: seen.append(output))
    torch.testing.assert_close(step(model, x), step(own, x))
    assert all(type(y) is torch.Tensor for y in seen)
    torch.testing.assert_close(*seen)


def test_hooks_that_come_later_see_tensors() -> None:
    model, x, seen = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), image(), []
    want = model[1](model[0](x))
    model[1].reset_running_stats()
    fastbn.torch.convert(model)
    model[2].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(x)
    torch.testing.assert_close(seen[0] + 0, want)
    assert seen[0].shape == want.shape
    torch.testing.assert_close(model[1].running_mean, 0.1 * model[0](x).mean((0, 2, 3)))  # it moved once


def test_reverted_models_are_what_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.InstanceNorm2d(4))
    before = {name: {**m.__dict__} for name, m in model.named_modules()}
    classes, tensors, shown = [type(m) for m in model.modules()], [id(t) for t in model.state_dict(keep_vars=True).values()], repr(model)
    for times in range(1, 3):
        for _ in range(times):
            found = fastbn.torch.convert(model)
            assert [(layer.path, layer.converted) for layer in found] == [("1", True), ("3", True), ("4", False)]
        assert isinstance(model[1], nn.BatchNorm2d)
        assert type(model[1]).__name__ == "BatchNorm2d"
        assert "fastbn=batch_norm + activation" in repr(model)
        assert [id(t) for t in model.state_dict(keep_vars=True).values()] == tensors
        assert fastbn.torch.revert(model) == 2
        assert fastbn.torch.revert(model) == 0
        assert [type(m) for m in model.modules()] == classes
        assert {name: m.__dict__ for name, m in model.named_modules()} == before
        assert repr(model) == shown


class Joint:
    def __init__(self) -> None:
        self.others: list[Any] = []


def test_finding_what_follows_changes_nothing() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.calls, self.seen = nn.BatchNorm2d(3), 0, None
            self.features: dict[str, list[Any]] = {"inputs": []}
            self.joint = Joint()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            self.calls += 1
            self.count.add_(1)
            self.seen = x
            self.noise = torch.rand(1) + random.random() + numpy.random.rand()  # noqa: NPY002, S311  as old code does
            self.features["inputs"].append(x)
            self.joint.others.append({"x": x})
            self.joint.mean = x.mean()
            return self.bn(x).relu() + self.count

    def states() -> Any:
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()  # noqa: NPY002

    model = Model()
    state, before = copy.deepcopy(model.state_dict()), states()
    assert fastbn.torch.convert(model)[0].fused == ("relu",)
    assert (model.calls, model.seen, hasattr(model, "noise")) == (0, None, False)
    assert (model.features, vars(model.joint)) == ({"inputs": []}, {"others": []})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert states() == before


def copies(model: Any) -> Iterator[Any]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))  # noqa: S301  our own
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)
    twin = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    twin.load_state_dict(model.state_dict())
    fastbn.torch.convert(twin)
    yield twin


def test_copies_and_pickles_are_converted_and_apart() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), image()
    fastbn.torch.convert(model)
    for twin in copies(model):
        assert isinstance(twin[1], Converted)
        before = taken()
        torch.testing.assert_close(step(twin, x), step(model, x))
        assert taken() == before + 4
        assert fastbn.torch.revert(twin) == 1
        assert type(twin[1]) is nn.BatchNorm2d
        assert isinstance(model[1], Converted)
    assert copy.copy(model[1]).weight is model[1].weight


def test_a_pickle_is_read_by_a_process_that_has_imported_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    fastbn.torch.convert(model)
    code = "import pickle, sys; m = pickle.load(sys.stdin.buffer); print(type(m[0]).__mro__[1].__name__, m[0].num_features)"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(model), capture_output=True, check=True)
    assert done.stdout.decode().split() == ["Converted", "3"]


@pytest.mark.parametrize("order", ["contiguous", "channels last", "3d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_and_orders_of_memory(dtype: Any, order: str) -> None:
    if order == "3d":
        model = nn.Sequential(nn.Conv3d(3, 4, 1, bias=False), nn.BatchNorm3d(4), nn.SiLU(), nn.BatchNorm3d(4), nn.ReLU())
        x = image(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    else:
        model = sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4), nn.ReLU())
        x = image()
        x = x.contiguous(memory_format=torch.channels_last if order == "channels last" else torch.contiguous_format)
    same(model.to(dtype), x.to(dtype))
    assert taken() == 4
    norms = nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4, track_running_stats=False)
    rows = nn.Sequential(nn.Linear(5, 4, bias=False), norms[0], nn.ReLU(), norms[1], nn.Tanh())
    same(rows.to(dtype), torch.randn(7, 5).to(dtype))
    assert taken() == 8


def test_modes_of_torch() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)), image()
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    for mode in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        for training in (True, False):
            with mode():
                got, want = model.train(training)(x), own.train(training)(x)
            assert (got.requires_grad, got.is_inference(), got.dtype) == (want.requires_grad, want.is_inference(), want.dtype)
            torch.testing.assert_close(got, want)
    torch.testing.assert_close(model.state_dict(), own.state_dict())
    model.train(), own.train()  # type: ignore[unused-ignore]
    for m in (model, own):
        for p in m[1].parameters():
            p.requires_grad_(False)
    torch.testing.assert_close(step(model, x), step(own, x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_hinders_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a mode of torch's, which sees all functions, and changes those that make tensors."""
    monkeypatch.setattr(parts, "LEAST", dict.fromkeys(parts.LEAST, 0))
    ran, normalize = [], parts.normalize
    monkeypatch.setattr(parts, "normalize", lambda a, keep: ran.append(a) or normalize(a, keep=keep))
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.GroupNorm(1, 3), nn.SiLU(), nn.RMSNorm(6)), image()
    own, found = copy.deepcopy(model), []
    fastbn.torch.convert(model)
    for m in (own, model):
        leaf = x.clone().requires_grad_()
        with torch.device(device):
            y = m(leaf)
            y.square().mean().backward()
        found.append((y, leaf.grad, [p.grad for p in m.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert (taken(), len(ran)) == (2, 2)


def test_what_begins_without_gradients_has_none() -> None:
    class Model(Body):
        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                z = self.bn(self.conv(x))
            return z.relu() * self.bn2.weight.sum()

    same(Model(lambda: None), image())


MODES_BETWEEN: dict[str, Callable[..., Any]] = {
    "inference": lambda z, y: (keep_in(torch.inference_mode(), z), y.relu())[1],
    "a gradient": lambda z, y: (torch.func.grad(lambda w: (w * z).sum())(torch.ones(())), y.relu())[1],
    "a batch": lambda z, y: torch.func.vmap(lambda w: (w * z.relu()).sum())(torch.ones(3)) * y.mean(),
    "a checkpoint": lambda z, y: CHECKPOINT(torch.relu, y),
    "saved in another way": lambda z, y: keep_in(torch.autograd.graph.saved_tensors_hooks(torch.zeros_like, lambda t: t), z) + y.relu(),
}


def keep_in(context: Any, z: Any) -> Any:
    with context:
        return z.sigmoid().detach()


@pytest.mark.parametrize("name", MODES_BETWEEN)
@pytest.mark.parametrize("added", [False, True])
def test_what_waits_is_computed_in_the_mode_in_which_it_began(name: str, added: bool) -> None:
    def body(m: Any, x: Any) -> Any:
        z = m.bn(m.conv(x))
        y = z + m.other(x) if added else z
        return MODES_BETWEEN[name](y, y) if m.flag else y.relu()

    model, own = Body(body, flag=False), Body(body, flag=True)
    own.load_state_dict(model.state_dict())
    assert fastbn.torch.convert(model)[0].fused[-1] == "relu"
    model.flag, x = True, image()
    for got, want in zip(step(model, x), step(own, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_transforms_of_functorch_compute_as_torch_does() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval(), image(2, 2, 3, 5, 5)
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    parameters = dict(own.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in (
            lambda m: torch.vmap(m)(x),
            lambda m: torch.func.jvp(m, (x[0],), (x[1],)),
            lambda m: torch.func.grad(lambda p: torch.func.functional_call(m, p, (x[0],)).sum())(parameters),
            lambda m: torch.func.jacrev(lambda a: m(a).sum((1, 2, 3)))(x[0]),
            lambda m: torch.jit.trace(m, x[0])(x[1]),
        ):
            torch.testing.assert_close(call(model), call(own))


def test_first_and_second_derivatives_are_those_of_finite_differences() -> None:
    model = Body(lambda m, x: F.relu(m.bn(m.conv(x)) + m.bn2(m.other(x))) + F.silu(m.bn3(m.conv(x))), bn3=nn.BatchNorm2d(4)).double()
    fastbn.torch.convert(model)
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself deprecates
        assert torch.autograd.gradcheck(model, (x,))
        assert torch.autograd.gradgradcheck(model, (x,))
    assert taken() > 0


class BatchNormAct(nn.BatchNorm2d):
    """As other packages have them: a layer whose own code normalizes, and does more."""

    def __init__(self, channels: int, act: Any) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Any) -> Any:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        of_batch = self.training or (self.running_mean is None and self.running_var is None)
        mean, var = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, var, self.weight, self.bias, of_batch, momentum, self.eps)
        return self.act(self.drop(x))


class Branches(BatchNormAct):
    def forward(self, x: Any) -> Any:
        return super().forward(x) if x.sum() < 1e9 else x


def test_layers_of_other_packages_that_activate_are_fused() -> None:
    model = sequential(BatchNormAct(4, nn.SiLU()), BatchNormAct(4, nn.Identity()), nn.ReLU(), BatchNormAct(4, nn.Softmax(1)))
    model.append(Branches(4, nn.ReLU()))
    found = same(model, image())
    assert [layer.fused for layer in found] == [("SiLU",), ("ReLU",), (), ()]
    assert [layer.why for layer in found[2:]] == ["Softmax follows", "the code of Branches is not understood"]
    assert taken() == 6
    x = image()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  our own
        torch.testing.assert_close(step(twin, x), step(model, x))
    assert fastbn.torch.revert(model) == 3
    assert type(model[1]) is BatchNormAct


class SumAct(nn.BatchNorm2d):
    def forward(self, x: Any, shortcut: Any = None, *, scale: Any = 1.0) -> Any:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.relu(y if shortcut is None else y + shortcut) * scale


class GroupSumAct(nn.GroupNorm):
    def forward(self, x: Any, shortcut: Any = 0.0, *, scale: Any = 1.0) -> Any:
        return F.silu(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)) * scale + shortcut


class Second(nn.BatchNorm2d):
    def forward(self, scale: Any, x: Any) -> Any:
        return scale * F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training))


ARGUMENTS: list[Callable[..., Any]] = [
    lambda f, x: f(x), lambda f, x: f(x, x), lambda f, x: f(x=x), lambda f, x: f(shortcut=x, x=x), lambda f, x: f(x, scale=2.0),
]  # fmt: skip


@pytest.mark.parametrize("call", ARGUMENTS)
@pytest.mark.parametrize("make", [lambda: SumAct(3), lambda: GroupSumAct(1, 3)])
def test_layers_with_code_of_their_own_are_called_with_its_arguments(
    make: Callable[[], Any], call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LEAST", dict.fromkeys(parts.LEAST, 0))
    model = Body(lambda m, x: call(m.own, x), own=make())
    own, x = copy.deepcopy(model), image()
    signature = inspect.signature(own.own.forward)
    assert same(model, x)[-1].fused
    assert inspect.signature(model.own.forward) == signature
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model.own))):  # noqa: S301  our own
        found = call(getattr(made, "own", made), x)
    torch.testing.assert_close(found, call(own.own, x))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model.eval(), backend="eager")(x), own.eval()(x))
    torch.compiler.reset()


def test_a_layer_that_normalizes_another_argument_than_its_first_is_left() -> None:
    found = same(Body(lambda m, x: m.own(2.0, m.other(x)), own=Second(4)), image())
    assert found[-1].why == "the code of Second is not understood"


def test_a_subclass_with_torchs_own_code_is_fused() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3), nn.ReLU())
    assert same(model, image())[0].fused == ("ReLU",)
    assert isinstance(model[0], Mine)


@pytest.mark.parametrize("graph", [False, True])
def test_a_subclass_with_numbers_that_are_computed_is_fused(graph: bool) -> None:
    class Mine(nn.BatchNorm2d):
        # By other names: for PyTorch 2.10's graphs `vars(self)["eps"]` is the property again, without an end.
        eps = property(lambda self: 1e4 * self.own_eps, lambda self, value: setattr(self, "own_eps", value))
        momentum = property(lambda self: 5 * self.own_momentum, lambda self, value: setattr(self, "own_momentum", value))

    model, x = nn.Sequential(Mine(3), nn.ReLU()), image()
    own = copy.deepcopy(model)
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
    torch.compiler.reset()  # there is a limit to what one function is compiled for, in all tests
    call = torch.compile(model, backend="eager") if graph else model
    torch.testing.assert_close(call(x), own(x))
    torch.testing.assert_close(model.state_dict(), own.state_dict())


def test_a_subclass_that_computes_every_attribute_is_fused() -> None:
    class Doubled(nn.BatchNorm2d):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return 2 * found if name == "momentum" else found

    class Shifted(nn.BatchNorm2d):
        def __getattr__(self, name: str) -> Any:
            found = super().__getattr__(name)
            return found + self.shift if name == "weight" and "shift" in vars(self) else found

    for kind in (Doubled, Shifted):
        model = nn.Sequential(kind(3), nn.ReLU())
        model[0].shift = 1
        found = same(model, image())
        assert found[0].fused == ("ReLU",)


def test_parts_of_a_model_that_cannot_be_traced_are_fused() -> None:
    model = Body(lambda m, x: m.part(x) if x.sum() < 1e9 else x, part=sequential(nn.BatchNorm2d(4), nn.ReLU()))
    found = same(model, image())
    assert {layer.path: layer.fused for layer in found}["part.1"] == ("ReLU",)


def test_optional_arguments_are_what_they_are_by_default() -> None:
    class Model(Body):
        def forward(self, x: Any, features: bool = False) -> Any:
            z = self.bn(self.conv(x))
            return z if features else z.relu()

    model = Model(lambda: None)
    own = copy.deepcopy(model)
    assert fastbn.torch.convert(model)[0].fused == ("relu",)
    x = image()
    for features in (True, False):
        torch.testing.assert_close(model(x, features), own(x, features))
    torch.testing.assert_close(model.state_dict(), own.state_dict())


def test_of_further_arguments_there_are_none_by_default() -> None:
    """Blocks of diffusers take some that were once used, and ask how many came."""

    class Model(Body):
        def forward(self, x: Any, *others: Any, **named: Any) -> Any:
            z = self.bn(self.conv(x))
            if len(others) > 0 or named.get("scale") is not None:
                z = z * (others[0] if others else named["scale"])
            return z.relu()

    model = Model(lambda: None)
    own = copy.deepcopy(model)
    assert fastbn.torch.convert(model)[0].fused == ("relu",)
    x = image()
    for others, named in (((), {}), ((2.0,), {}), ((), {"scale": -1.0})):
        torch.testing.assert_close(model(x, *others, **named), own(x, *others, **named))
    torch.testing.assert_close(model.state_dict(), own.state_dict())


def test_layers_alone_are_computed_by_whoever_is_shorter() -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), image()
    found = fastbn.torch.convert(model, fuse=False)
    assert (found[0].fused, found[0].why) == ((), "it was not asked for")
    y = model(x)
    assert (taken(), type(y.grad_fn).__name__) == (1, "ReluBackward0")
    with fastbn.torch.enabled():
        model(x)
        assert type(model[0](x).grad_fn).__name__ == "NativeBatchNormBackward0"
    assert taken() == 3


def test_small_tensors_go_through_torchs_own_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "SMALLEST", 512 << 10)
    model, x = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), image()
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    for got, want in zip(step(model, x), step(own, x), strict=True):
        assert torch.equal(got, want)
    assert taken() == 0


def test_errors_are_torchs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    bad = (
        torch.randn(2, 4, 5, 5),
        torch.randn(2, 3),
        torch.randn(1, 3, 1, 1),
        torch.ones(2, 3, 4, 4, dtype=torch.int),
        torch.randn(2, 3, 4, 4).double(),
    )
    for x in bad:
        found = []
        for m in (model, own):
            with pytest.raises((ValueError, RuntimeError)) as error:
                m(x)
            found.append((error.type, str(error.value)))
        assert found[0] == found[1]


def test_an_input_of_one_dimension_is_refused_by_torch() -> None:
    """By a subclass that lets all dimensions come."""

    class Any1d(nn.BatchNorm1d):
        def _check_input_dim(self, input: Any) -> None:  # noqa: A002  torch's name
            pass

    model = nn.Sequential(Any1d(3), nn.ReLU())
    fastbn.torch.convert(model)
    with pytest.raises(RuntimeError, match="running_mean should contain 0 elements not 3"):
        model(torch.randn(3))


ORDERS: dict[str, Callable[[], Any]] = {
    "contiguous": lambda: image(2, 4, 5, 6),
    "channels last": lambda: image(2, 4, 5, 6).to(memory_format=torch.channels_last),
    "transposed": lambda: image(2, 4, 6, 5).transpose(2, 3),
    "images inside": lambda: image(4, 2, 5, 6).transpose(0, 1),
    "gaps": lambda: image(2, 8, 5, 6)[:, ::2],
}


@pytest.mark.parametrize("first", ["bn", "other"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("of_other", ORDERS)
def test_a_sum_has_the_order_of_memory_of_its_first_tensor(first: str, order: str, of_other: str) -> None:
    class Model(Body):
        def forward(self, x: Any, r: Any) -> Any:
            return F.relu(self.bn(x) + r if first == "bn" else r + self.bn(x))

    before = taken()
    assert same(Model(lambda: None), ORDERS[order](), ORDERS[of_other]())[0].fused == ("add", "relu")
    assert taken() == before + 2 or first == "other"


def test_gradients_of_an_evaluation_are_those_of_its_own_statistics() -> None:
    """Those of torch's own batch norm are of what the running statistics have become since."""
    model, x, grads = sequential(nn.BatchNorm2d(4), nn.ReLU()), image(), []
    fastbn.torch.convert(model)
    for moved in (False, True):
        twin, leaf = copy.deepcopy(model).eval(), x.clone().requires_grad_()
        y = twin(leaf).square().sum()
        if moved:
            twin.train()(3 * x + 1)
        y.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("changed", ["input", "added", "added in place"])
def test_changes_in_place_between_are_noticed(changed: str) -> None:
    class Model(Body):
        def forward(self, x: Any) -> Any:
            z, r = self.conv(x), self.other(x)
            y = self.bn(z)
            if changed == "added in place":
                y += r
            if changed == "added":
                y = y + r
            if self.training is None:
                (z if changed == "input" else r).mul_(2)
            return y.relu()

    model = Model(lambda: None)
    assert fastbn.torch.convert(model)[0].fused[-1] == "relu"
    model(image())
    model.bn.training, model.training = True, None
    with pytest.raises(RuntimeError, match="changed in place before what follows it was computed"):
        model(image())


OVERWRITTEN: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "a method": (lambda m, z: F.leaky_relu(z, 0.1).mul_(2), ("add",)),
    "a layer": (lambda m, z: m.drop(F.relu6(z)), ("add",)),
    "an option": (lambda m, z: F.dropout(m.leaky(z), 0.5, m.training, inplace=True), ("add",)),
    "only read": (lambda m, z: F.leaky_relu(z, 0.1) * 2, ("add", "leaky_relu")),
}


@pytest.mark.parametrize(("after", "fused"), OVERWRITTEN.values(), ids=OVERWRITTEN.keys())
def test_what_is_overwritten_after_a_sum_and_an_activation_is_not_kept(after: Callable[..., Any], fused: tuple[str, ...]) -> None:
    """PyTorch keeps the input of these activations, and lets the output be changed."""
    model = Body(lambda m, x: after(m, m.bn(m.conv(x)) + m.other(x)), drop=nn.Dropout(0.0, inplace=True), leaky=nn.LeakyReLU(0.1))
    assert fastbn.torch.convert(model)[0].fused == fused
    model(image()).sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_changes_of_a_layers_tensors_between_are_noticed(name: str, training: bool) -> None:
    class Model(Body):
        def forward(self, x: Any) -> Any:
            y = self.bn(self.conv(x))
            if self.training is None:
                with torch.no_grad():
                    getattr(self.bn, name).mul_(2)
            z = y.relu()
            if self.training == "later":
                with torch.no_grad():
                    getattr(self.bn, name).mul_(2)
                z = z + y
            return z

    model = Model(lambda: None)
    assert fastbn.torch.convert(model)[0].fused == ("relu",)
    model.bn.training, model.training = training, None
    with pytest.raises(RuntimeError, match="a parameter or a statistic of a normalization was changed in place before what follows it"):
        model(image())
    if training and "running" in name:  # which have done what they are for
        model.training = "later"
        want = copy.deepcopy(model)
        fastbn.torch.revert(want)
        x = image()
        torch.testing.assert_close(model(x), want(x))
        torch.testing.assert_close([*model.buffers()], [*want.buffers()])


def test_a_thousand_switches_leave_nothing() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), image()
    own = copy.deepcopy(model)
    for _ in range(1000):
        fastbn.torch.convert(model)
        fastbn.torch.revert(model)
    assert model.__dict__.keys() == own.__dict__.keys()
    assert model[1].__dict__.keys() == own[1].__dict__.keys()
    for got, want in zip(step(model, x), step(own, x), strict=True):
        assert torch.equal(got, want)


def test_summaries_folding_and_freezing_of_a_converted_model() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), image()
    model(x)
    fastbn.torch.convert(model)
    assert fastbn.torch.summary(model)[0].fold == "folds into 0"
    folded = fastbn.torch.fold(model.eval())
    assert folded.folded == {"1": "0"}
    torch.testing.assert_close(folded.model(x), model(x))
    assert fastbn.torch.freeze(model) == 1
    before = model[1].running_mean.clone()
    model.train()(x)
    assert torch.equal(model[1].running_mean, before)
    assert taken() > 0
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    torch.testing.assert_close(synced(x), model.eval()(x))


def test_converted_layers_adapt_and_are_synchronized() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval(), image()
    same = copy.deepcopy(model)
    fastbn.torch.convert(model)
    with fastbn.torch.adapt(model), fastbn.torch.adapt(same):
        torch.testing.assert_close(model(x), same(x))
    fastbn.torch.update_bn(model, [x])
    fastbn.torch.update_bn(same, [x])
    torch.testing.assert_close(model.eval()(x), same.eval()(x))
    synced = fastbn.torch.convert_sync_batchnorm(model)
    assert type(synced[1]) is fastbn.torch.SyncBatchNorm
    assert not [key for key in synced[1].__dict__ if key.startswith("_fastbn")]
    torch.testing.assert_close(synced(x), same(x))


def test_torch_fx_sees_a_layer_of_torchs() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    fastbn.torch.convert(model)
    graph = torch.fx.symbolic_trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = image()
    assert torch.equal(graph(x), model(x))


def test_a_module_that_lets_nobody_set_attributes_is_converted() -> None:
    class Closed(Body):
        closed = False

        def __setattr__(self, name: str, value: Any) -> None:
            if self.closed:
                raise AttributeError(name)
            super().__setattr__(name, value)

    model = Closed(lambda m, x: m.bn(m.conv(x)).relu())
    Closed.closed = True
    assert same(model, image())[0].fused == ("relu",)
    assert fastbn.torch.revert(model) == 2
    assert type(model) is Closed


def test_what_is_no_module_is_refused() -> None:
    for function in (fastbn.torch.convert, fastbn.torch.revert):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
            function(torch.ones(3))


def test_the_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8), nn.InstanceNorm2d(8))
    assert str(fastbn.torch.convert(model)).splitlines() == [
        "path  kind            channels  keeps  fused with  why not",
        "1     BatchNorm2d     8         input  ReLU",
        "3     BatchNorm2d     8         input  alone       InstanceNorm2d follows",
        "4     InstanceNorm2d  8         input  left        the model's output follows",
        "3 layers, 2 converted, 1 fused",
    ]
    assert str(fastbn.torch.convert(nn.ReLU())) == "the model has no normalization layers"


def kept_bytes(model: Any, x: Any) -> int:
    """Bytes of the memory that a forward keeps for the backward."""
    seen: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_input_is_had_from_the_output(order: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = fastbn.torch.convert
    monkeypatch.setattr(fastbn.torch, "convert", lambda model: convert(model, inplace_abn=True))
    x = image(8, 3, 9, 9).to(dtype).contiguous(memory_format=order)
    for layers, saved in (
        ([nn.BatchNorm2d(4), nn.LeakyReLU(0.1)], True),
        ([nn.BatchNorm2d(4), nn.LeakyReLU(0.1, inplace=True)], True),
        ([nn.BatchNorm2d(4, affine=False)], True),
        ([nn.BatchNorm2d(4)], True),
        ([nn.BatchNorm2d(4), nn.ReLU()], False),
    ):
        model = sequential(*layers, nn.Conv2d(4, 4, 1, bias=False)).to(dtype)
        if model[1].affine:
            with torch.no_grad():
                model[1].weight.copy_(torch.tensor([0.5, -2.0, 1.0, 0.1]))
                model[1].bias.copy_(torch.tensor([0.1, -1.0, 0.0, 1.0]))
        before = kept_bytes(copy.deepcopy(model), x)
        assert same(model, x)[0].keeps == ("output" if saved else "input")
        assert (before - kept_bytes(model, x) > 0.9 * 8 * 4 * 9 * 9 * dtype.itemsize) == saved


def test_what_cannot_be_had_from_the_output_keeps_the_input() -> None:
    model, x = sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.Conv2d(4, 2, 1)), image()
    with torch.no_grad():
        model[1].weight[2], model[1].weight[3], model[1].bias[3] = 0, 1e-3, 1e5
    own = copy.deepcopy(model)
    assert fastbn.torch.convert(model, inplace_abn=True)[0].keeps == "output"
    torch.testing.assert_close(step(model, x), step(own, x))
    model[2].negative_slope = own[2].negative_slope = 0.0
    torch.testing.assert_close(step(model, x), step(own, x))
    torch.testing.assert_close(step(model.eval(), x), step(own.eval(), x))
    torch.testing.assert_close(step(model.double().train(), 1e200 * x.double()), step(own.double().train(), 1e200 * x.double()))


@torch.fx.wrap
def handed_through(x: Any) -> Any:
    """What torch.fx does not look into; it may return its input."""
    return x


def test_an_output_that_others_change_is_not_kept() -> None:
    for after in (
        lambda m, x: F.leaky_relu(m.bn(m.conv(x))).add_(1),
        lambda m, x: operator.iadd(F.leaky_relu(m.bn(m.conv(x))), m.other(x)),
        lambda m, x: m.bn(m.conv(x)).exp_(),
        lambda m, x: m.drop(F.leaky_relu(m.bn(m.conv(x)))),
        lambda m, x: F.dropout(F.leaky_relu(m.bn(m.conv(x))), 0.0, inplace=True),
        lambda m, x: operator.iadd(handed_through(F.leaky_relu(m.bn(m.conv(x)))), m.other(x)),
        lambda m, x: handed_through(F.leaky_relu(m.bn(m.conv(x)))) * 2,
        lambda m, x: operator.imul(m.hand(F.leaky_relu(m.bn(m.conv(x)))), m.other(x)),
        lambda m, x: F.leaky_relu(m.bn(m.conv(x))).flatten(1).view(-1).mul_(2),
        lambda m, x: m.bn(m.conv(x)).transpose(1, 2)[:, 1:].relu_(),
    ):
        model = Body(after, drop=nn.Dropout(0.0, inplace=True), hand=nn.Identity())
        own, x = copy.deepcopy(model), image()
        assert fastbn.torch.convert(model, inplace_abn=True)[0].keeps == "input"
        torch.testing.assert_close(step(model, x), step(own, x), rtol=1e-4, atol=1e-4)
    model = Body(lambda m, x: operator.iadd(m.inner(x), m.other(x)) if x.sum() > -1e9 else x, inner=Body(lambda m, x: m.bn(m.conv(x))))
    own, x = copy.deepcopy(model), image()
    assert fastbn.torch.convert(model, inplace_abn=True)[-1].keeps == "input"
    torch.testing.assert_close(step(model, x), step(own, x), rtol=1e-4, atol=1e-4)
    model = Body(lambda m, x: m.bn(m.conv(x)))
    fastbn.torch.convert(model, inplace_abn=True)
    y = model(image())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.mul_(2).sum().backward()


def test_second_derivatives_need_the_input() -> None:
    model, x = sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1)), image().requires_grad_()
    fastbn.torch.convert(model, inplace_abn=True)
    with pytest.raises(
        RuntimeError,
        match=r"second derivatives need the input of a batch norm, which was not kept: fastbn\.torch\.convert\(inplace_abn=False\)",
    ):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.bn, self.bn2, self.bn3, self.relu = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Any) -> Any:
        z = self.bn2(self.conv(self.relu(self.bn(self.conv(x)))))
        z += x
        return self.bn3(F.relu(z))


def operators(graph: Any) -> list[str]:
    """What a graph calls of fastbn's and of batch norm and activations."""
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [name for name in names if "batch_norm" in name or "relu" in name]


@pytest.mark.parametrize("early", [True, False])
def test_compiled_models_hold_one_node_for_each(early: bool) -> None:
    model, x, graphs = Small(), image(), []
    own = copy.deepcopy(model)

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph.graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, _)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if early:
            torch.compiler.reset()  # there is a limit to what one function is compiled for, in all tests
            compiled = torch.compile(model, backend=backend, fullgraph=True)
            compiled(x), own(x)
        fastbn.torch.convert(model)
        if not early:
            torch.compiler.reset()  # there is a limit to what one function is compiled for, in all tests
            compiled = torch.compile(model, backend=backend, fullgraph=True)
        graphs.clear()
        for training in (True, False):
            model.train(training), own.train(training)
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            for m, leaf in zip((compiled, own), leaves, strict=True):
                m(leaf).square().sum().backward()
            torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.state_dict(), own.state_dict())
        assert operators(graphs[0]) == ["fastbn.batch_norm"] * 3
        before = taken()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), own(x))
        assert taken() == before + 3
        fastbn.torch.revert(model)
        torch.testing.assert_close(compiled(x), own(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_a_compiler_may_compute_a_node_again_in_the_backward(budget: float) -> None:
    model, x, found = Small(), image(), []
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    torch.compiler.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for m in (torch.compile(model, backend="aot_eager_decomp_partition"), own):
            leaf = x.clone().requires_grad_()
            y = m(leaf)
            y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
            found.append([leaf.grad, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), own.state_dict())
    torch._dynamo.reset()


def test_exported_models_hold_one_node_for_each() -> None:
    model, x = Small().eval(), image()
    fastbn.torch.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert operators(exported.graph) == ["fastbn.batch_norm.default"] * 3
        more = image(5, 3, 5, 6)
        torch.testing.assert_close(exported.module()(more), model(more))
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(more), model(more))
        strict = torch.export.export(model, (x,), strict=True)
        torch.testing.assert_close(strict.module()(x), model(x))


def test_what_is_exported_for_onnx_holds_torchs_operators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Small().eval(), nn.Sequential(nn.GroupNorm(1, 3), nn.ReLU(), nn.RMSNorm(6), nn.SiLU())
    monkeypatch.setattr(parts, "LEAST", dict.fromkeys(parts.LEAST, 0))
    for m in (model, images):
        fastbn.torch.convert(m)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # as inside of torch.onnx.export
    for m in (model, images):
        exported, x = torch.export.export(m, (image(),)), image()
        assert "fastbn" not in str(exported.graph)
        torch.testing.assert_close(exported.module()(x), m(x))


class Doubled(nn.parallel.DistributedDataParallel):
    def forward(self, *given: Any) -> Any:
        return 2 * super().forward(*given)


def test_wrappers_that_average_gradients_over_processes() -> None:
    model, x = Small(), image()
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        for m in (nn.parallel.DistributedDataParallel(model), own):
            m(x).square().sum().backward()
        assert fastbn.torch.convert(nn.parallel.DistributedDataParallel(own))[0].path == "module.bn"
        parts = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        folded = fastbn.torch.fold(nn.parallel.DistributedDataParallel(parts).eval()).model  # no buffer is left
        torch.testing.assert_close(folded(x), parts(x))
        doubled = Doubled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4))).eval()
        torch.testing.assert_close(fastbn.torch.fold(doubled).model(x), doubled(x))
    finally:
        torch.distributed.destroy_process_group()
    for p, q in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


def test_checkpointed_parts_are_computed_again() -> None:
    class Model(Body):
        def forward(self, x: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=self.reentrant)

    for reentrant in (True, False):
        model = Model(lambda: None, part=sequential(nn.BatchNorm2d(4), nn.ReLU()))
        model.reentrant = reentrant
        before = taken()
        same(model, image())
        assert taken() == before + 3


BODIES: dict[str, Callable[..., Any]] = {
    "closure": lambda m, x: CHECKPOINT(lambda z: m.bn(m.conv(z)).relu(), x),
    "closure with a sum": lambda m, x: CHECKPOINT(lambda z: (m.bn(m.conv(z)) + m.other(z)).relu(), x),
    "method": lambda m, x: CHECKPOINT(m.inner, x),
    "code of a part": lambda m, x: CHECKPOINT(m.part.forward, x),
    "part": lambda m, x: CHECKPOINT(m.part, x),
    "lambda": lambda m, x: CHECKPOINT(lambda z: m.part(z), x),
    "saved elsewhere": lambda m, x: m.saved(x),
}


class Checkpointed(Body):
    def inner(self, x: Any) -> Any:
        return self.bn(self.conv(x)).relu()

    def saved(self, x: Any) -> Any:
        with torch.autograd.graph.save_on_cpu():
            z = self.bn(self.conv(x))
        return z.relu()


@pytest.mark.parametrize("body", BODIES)
def test_checkpoints_in_a_modules_own_code(body: str) -> None:
    """A checkpoint runs its part again outside of the module's call, and refuses to find other operations there."""
    model = Checkpointed(BODIES[body], part=sequential(nn.BatchNorm2d(4), nn.ReLU()))
    found = {layer.path: layer for layer in same(model, image())}
    assert bool(found["part.1"].fused) == (body in ("part", "lambda"))
    repeated = "a checkpoint runs it again outside of its module's call"
    assert (found["part.1" if body == "code of a part" else "bn"].why == repeated) == (body not in ("part", "lambda", "saved elsewhere"))


@pytest.mark.parametrize("body", BODIES)
def test_checkpoints_that_were_not_foreseen(body: str) -> None:
    """As where a package has a switch for them."""
    plain = {"method": lambda m, x: m.inner(x), "code of a part": lambda m, x: m.part(x)}
    without = plain.get(body, lambda m, x: m.bn(m.conv(x)).relu())
    part = sequential(nn.BatchNorm2d(4), nn.ReLU())
    model = Checkpointed(lambda m, x: (BODIES[body] if m.flag else without)(m, x), part=part, flag=False)
    own, x = copy.deepcopy(model), image()
    assert any(layer.fused for layer in fastbn.torch.convert(model))
    model.flag = own.flag = True
    for got, want in zip(step(model, x), step(own, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_every_activation_may_be_in_a_compiled_graph() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(MODULES.values())
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in (*MODULES, *FUNCTIONS))

        def forward(self, x: Any) -> Any:
            return [act(norm(x)) for act, norm in zip([*self.layers, *FUNCTIONS.values()], self.norms, strict=True)]

    model, x = Model(), image()
    own = copy.deepcopy(model)
    assert all(layer.fused for layer in fastbn.torch.convert(model))
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), own(x))
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_holds_checkpoints_whole(dynamic: bool) -> None:
    part, again = (Body(lambda m, x: (m.bn(m.conv(x)) + m.bn2(m.other(x))).relu()) for _ in range(2))
    model = Body(lambda m, x: CHECKPOINT(m.part, x).sum() + m.again(x), part=part, again=again)
    own, x, steps = copy.deepcopy(model), image(), []
    assert any(layer.fused == ("add", "relu") for layer in fastbn.torch.convert(model))
    for m in (model, own):
        torch.compiler.reset()
        leaf = x.clone().requires_grad_()
        torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=dynamic)(leaf).square().sum().backward()
        steps.append([leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_an_export_that_ends_with_an_error_leaves_nothing_open() -> None:
    model, x = Body(lambda m, x: (z := m.bn(m.conv(x)), 1 / 0 if m.flag else z.relu())[1], flag=False).eval(), image()
    fastbn.torch.convert(model)
    model.flag = True
    with pytest.raises(ZeroDivisionError):
        torch.export.export(model, (x,), strict=False)
    z = image(2, 4, 5, 6)
    torch.testing.assert_close(torch.export.export(model.bn, (z,), strict=False).module()(z), model.bn(z))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_converted_models_run_in_children() -> None:
    code = (
        "import os, torch, fastbn.torch\n"
        "from torch import nn\n"
        "torch.set_num_threads(2)\n"
        "m = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()).eval(); fastbn.torch.convert(m)\n"
        "torch.set_grad_enabled(False); x = torch.randn(8, 64, 32, 32); y = m(x); pid = os.fork()\n"
        "if pid == 0: os._exit(0 if m(x).numpy().tobytes() == y.numpy().tobytes() else 1)\n"
        "print(os.waitpid(pid, 0)[1])\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, i): return m(x)[0]\n"
        "print(all(torch.equal(b[0], y[0]) for b in torch.utils.data.DataLoader(Data(), num_workers=1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("0\nTrue\n", "")


def test_torchs_own_inputs_of_layers_have_torchs_results() -> None:
    pytest.importorskip("expecttest", reason="needs expecttest, as torch.testing does")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_modules import module_db
    names = {f"BatchNorm{n}d" for n in (1, 2, 3)}
    infos = [info for info in module_db if info.module_cls.__name__ in names]
    assert len(infos) == 3
    for info, training, act in itertools.product(infos, (True, False), (nn.Identity(), nn.ReLU())):
        for inputs in info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=True, training=training):
            made = inputs.constructor_input
            layer = info.module_cls(*made.args, **made.kwargs).train(training)
            same(nn.Sequential(layer, act), *inputs.forward_input.args)
    assert taken() > 50


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "unet"])
def test_gradients_of_whole_networks_are_as_near_to_float64(name: str, order: Any) -> None:
    models = pytest.importorskip("bench.torch_models").MODELS
    model, x = models[name](8).to(memory_format=order), image(4, 3, 64, 64).contiguous(memory_format=order)

    def gradients(model: Any, x: Any) -> Any:
        twin = copy.deepcopy(model).to(x.dtype)
        twin(x).square().mean().backward()
        return torch.cat([p.grad.double().flatten() for p in twin.parameters()])

    exact, torchs = gradients(model, x.double()), gradients(model, x)
    found = fastbn.torch.convert(model)
    ours = gradients(model, x)
    assert taken() == 2 * len(found)
    assert (ours - exact).norm() <= 1.5 * (torchs - exact).norm()


def pair(after: Callable[..., Any], **modules: Any) -> tuple[Any, Any]:
    """A converted model, of which a relu is known to follow, and what it was."""
    model = Body(after, act=nn.ReLU(), flag=False, kept=[], **modules)
    own = copy.deepcopy(model)
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
    return model, own


def agree(got: Any, want: Any) -> None:
    """Tensors of the same values, in the same containers."""
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got.requires_grad == want.requires_grad
    elif isinstance(want, list | tuple | frozenset | collections.deque):
        for a, b in zip(got, want, strict=True):
            agree(a, b)
    elif isinstance(want, dict):
        agree([*got.values()], [*want.values()])
    elif hasattr(want, "__dict__"):
        agree(vars(got), vars(want))
    else:
        assert got == want


def common(m: Any, x: Any) -> Any:
    return m.act(m.bn(m.conv(x)))


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: m.forward(x),
        lambda m, x: m.bn(m.conv(x)),
        lambda m, x: m.bn.forward(m.conv(x)),
        lambda m, x: nn.Sequential(m.conv, m.bn, nn.Tanh())(x),
        lambda m, x: torch.fx.symbolic_trace(m)(x),
        lambda m, x: torch.func.functional_call(m, dict(m.named_parameters()), (x,)),
        lambda m, x: torch.compile(lambda y: m.bn(m.conv(y)), backend="eager")(x),
        lambda m, x: torch.compile(m.forward, backend="eager")(x),
        lambda m, x: [t.forward(x) for t in (m, copy.deepcopy(m))],
    ],
)
def test_whoever_calls_a_part_gets_tensors(call: Callable[..., Any]) -> None:
    model, own = pair(common)
    x = image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself deprecates
        agree(call(model, x), call(own, x))
    agree([*model.buffers()], [*own.buffers()])


class Holder:
    def __init__(self, z: Any) -> None:
        self.z = [z]


@dataclasses.dataclass(frozen=True)
class Frozen:
    z: Any


IN_GRAPHS = {
    "it": lambda m, z: z,
    "containers": lambda m, z: (z, {"z": [z]}),
    "nothing": lambda m, z: m.conv.weight * 2,
    "read twice": lambda m, z: m.act(z.detach()) + z,
    "in place": lambda m, z: z.relu_() + z,
    "a list": lambda m, z: torch.cat([z, z[:, 1:]], 1),
    "items": lambda m, z: [a.sum() for a in z],
    "length": lambda m, z: z * len(z),
}
ELSEWHERE = IN_GRAPHS | {
    "a dataclass": lambda m, z: Frozen(z),
    "an object": lambda m, z: Holder(z),
    "kept in a list": lambda m, z: m.kept.append(z) or m.act(z),
    "kept in a queue": lambda m, z: setattr(m, "last", collections.deque([z], 3)) or m.act(z),
    "a frozen set": lambda m, z: frozenset([z]),
    "kept": lambda m, z: setattr(m, "last", z) or m.act(z),
    "data": lambda m, z: setattr(z, "data", z.data * 2) or z,
}


@pytest.mark.parametrize(("name", "graph"), [*((n, False) for n in ELSEWHERE), *((n, True) for n in IN_GRAPHS)])
def test_nothing_that_waits_leaves_a_model(name: str, graph: bool) -> None:
    """Also where the code goes a way that nobody has foreseen; and what it drops has moved the statistics."""
    other = ELSEWHERE[name]
    model, own = pair(lambda m, x: (z := m.bn(m.conv(x)), other(m, z) if m.flag else m.act(z))[1])
    x, found = image(), []
    for m in (model, own):
        m.flag = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if graph else "error")  # what torch itself deprecates
            y = (torch.compile(m, backend="eager") if graph else m)(x)
        found.append([y, m.kept, m.__dict__.get("last"), *m.buffers()])
    agree(*found)


class Own(nn.BatchNorm2d):
    """A layer whose own code activates, or does something else with its input and what it has normalized."""

    other: Any = None

    def forward(self, x: Any) -> Any:
        z = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)
        return F.relu(z) if self.other is None else self.other(x, z)


class Asks(nn.Module):
    """Does something else with a tensor than with a stand-in for one."""

    def __init__(self, asks: Callable[[Any], bool]) -> None:
        super().__init__()
        self.conv, self.bn, self.asks = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), asks

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        if self.asks(y):
            y = y * 2
        y = self.bn(y)
        if self.asks(y):
            y = y * 2
        return torch.relu(y)


ASKS: dict[str, Callable[[Any], bool]] = {
    "for one class": lambda y: isinstance(y, torch.Tensor),
    "for several": lambda y: isinstance(y, (str, torch.Tensor)),
    "by PyTorch's function": torch.is_tensor,
}


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS.keys())
def test_where_code_asks_whether_something_is_a_tensor_nothing_waits_or_is_folded(asks: Callable[[Any], bool]) -> None:
    usual, model, x = builtins.isinstance, Asks(asks), image()
    own = copy.deepcopy(model)
    own(x), model(x)
    assert fastbn.torch.fold(model.eval()).left == {"bn": "what calls it cannot be traced"}
    found = fastbn.torch.convert(model.train())
    assert found[0].fused == ()
    torch.testing.assert_close(model(x), own(x))
    assert builtins.isinstance is usual


def test_code_that_asks_for_something_else_is_fused_still() -> None:
    model = Asks(lambda y: isinstance(y, (list, tuple)))
    assert fastbn.torch.convert(model)[0].fused == ("relu",)


def owns(monkeypatch: pytest.MonkeyPatch, other: Callable[..., Any]) -> tuple[Any, Any]:
    """A converted model with such a layer, and what it was; they go another way since."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), Own(4))
    own = copy.deepcopy(model)
    assert fastbn.torch.convert(model)[0].fused == ("relu",)
    monkeypatch.setattr(Own, "other", other)
    return model, own


IN_A_LAYER: dict[str, Callable[..., Any]] = {
    "its input": lambda bn, x, z: x,
    "what waits": lambda bn, x, z: z,
    "both": lambda bn, x, z: [x, {"z": z}],
    "an input that is kept": lambda bn, x, z: setattr(bn, "last", [x]) or F.relu(z),
    "what waits and is kept": lambda bn, x, z: setattr(bn, "last", z) or F.relu(z),
    "nothing": lambda bn, x, z: bn.weight * 2,
}


@pytest.mark.parametrize("name", IN_A_LAYER)
def test_nothing_that_waits_leaves_a_layers_own_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = owns(monkeypatch, IN_A_LAYER[name])
    x, found = image(), []
    for m in (model, own):
        y = m(x)
        found.append([y, m[1].__dict__.get("last"), *m.buffers()])
    agree(*found)


def test_an_error_in_a_layers_own_code_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, own), x = owns(monkeypatch, lambda bn, x, z: 1 / 0), image()
    for m in (model, own):
        with pytest.raises(ZeroDivisionError):
            m(x)
    monkeypatch.setattr(Own, "other", None)
    agree([model(x), *model.buffers()], [own(x), *own.buffers()])


@pytest.mark.parametrize("graph", [False, True])
def test_what_a_model_keeps_and_returns_may_hold_itself(graph: bool) -> None:
    def other(m: Any, z: Any) -> Any:
        if graph:
            return {"z": z, "same": [held := [z], held]}
        found: dict[str, Any] = {"z": (pair := (z, [z])), "again": [pair, pair]}
        return found | {"self": [found]}

    model, own = pair(lambda m, x: (z := m.bn(m.conv(x)), other(m, z) if m.flag else m.act(z))[1])
    torch.compiler.reset()  # there is a limit to what one function is compiled for, in all tests
    x, found = image(), []
    for m in (model, own):
        one, two, loop = Joint(), Joint(), []
        one.others, two.others = [two], [one]
        loop.append(loop)
        m.flag, m.skeleton, m.loop = True, [one, two], loop
        y = (torch.compile(m, backend="eager") if graph else m)(x)
        found.append([y["z"], *y["same"]] if graph else [y["z"], *y["again"], y["self"][0]["z"]])
    agree(*found)


def test_what_waits_can_be_shown_copied_and_kept() -> None:
    seen: list[Any] = []

    def other(m: Any, z: Any) -> Any:
        file = io.BytesIO()
        torch.save(z.detach(), file)
        file.seek(0)
        seen.append((repr(z), f"{z.sum():.1f}", numpy.asarray(z.detach()), 2 * numpy.float32(1) * z, torch.from_dlpack(z.detach())))
        return copy.deepcopy(z) if not z.requires_grad else z, pickle.loads(pickle.dumps(z)), torch.load(file), copy.copy(z)  # noqa: S301

    model, own = pair(lambda m, x: (z := m.bn(m.conv(x)), other(m, z) if m.flag else m.act(z))[1])
    x = image()
    with torch.no_grad():
        for m in (model, own):
            m.flag = True
            seen.append(m(x))
    agree(seen[1], seen[3])
    for got, want in zip(seen[0][1:], seen[2][1:], strict=True):
        numpy.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-1) if not isinstance(got, str) else None
    assert seen[0][0].startswith("tensor(")


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, z: Any) -> Any:
        return z.round()

    @staticmethod
    def backward(_: Any, dy: Any) -> Any:
        return 3 * dy


class Rounding(nn.Module):
    def forward(self, z: Any) -> Any:
        return Rounded.apply(z)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, seen: m.act.register_forward_pre_hook(lambda _, x: seen.extend(x)),
        lambda m, seen: m.bn.register_forward_hook(lambda _, x, y: seen.append(y)),
        lambda m, seen: m.register_forward_hook(lambda _, x, y: seen.append(y), prepend=True),
        lambda m, seen: m.inner.register_forward_hook(lambda _, x, y: seen.append(y)),
        lambda m, seen: m.act.register_full_backward_hook(lambda _, dx, dy: seen.extend(dx)),
        lambda m, seen: m.inner.register_full_backward_pre_hook(lambda _, dy: seen.extend(dy)),
        lambda m, seen: setattr(m.act, "forward", lambda z: seen.append(z) or Rounded.apply(z)),
        lambda m, seen: setattr(m, "act", Rounding()),
    ],
)
def test_hooks_and_modules_that_come_later_see_tensors(change: Callable[..., Any]) -> None:
    model = Body(lambda m, x: m.act(m.inner(m.conv(x))), act=nn.ReLU())
    model.inner = nn.Sequential(model.bn)
    own, x, found = copy.deepcopy(model), image(), []
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
    for m in (model, own):
        seen: list[Any] = []
        change(m, seen)
        y = m(x)
        y.sum().backward()
        found.append([y, *seen, *(p.grad for p in (m.conv.weight, m.bn.weight, m.bn.bias))])
    agree(*found)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("name", ["drop", "act"])
@pytest.mark.parametrize("hook", [True, False])
def test_hooks_and_modules_that_come_later_into_a_layers_own_code_see_tensors(name: str, hook: bool, outside: bool) -> None:
    own = nn.Sequential(*((BatchNormAct(3, nn.Identity()), nn.ReLU()) if outside else (BatchNormAct(3, nn.ReLU()),)))
    model, x, found = copy.deepcopy(own), image(), []
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
    for m in (model, own):
        seen: list[Any] = []
        if hook:
            m[0].get_submodule(name).register_forward_pre_hook(lambda _, x, seen=seen: seen.extend(x))
        else:
            setattr(m[0], name, Rounding())
        found.append([m(x), *seen])
    agree(*found)


def test_an_error_leaves_nothing_open() -> None:
    model, own = pair(lambda m, x: (z := m.bn(m.conv(x)), 1 / 0 if m.flag else m.act(z))[1])
    x, found = image(), []
    for m in (model, own):
        m.flag = True
        with pytest.raises(ZeroDivisionError):
            m(x)
        m.flag = False
        found.append([m.bn(m.conv(x)), m(x), *m.buffers()])
    agree(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_in_a_function_of_autograds_is_not_fused(reentrant: bool) -> None:
    class Clipped(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, z: Any) -> Any:
            return z.relu()

        @staticmethod
        def backward(_: Any, dy: Any) -> Any:
            return 3 * dy

    for model in (
        Body(lambda m, x: Clipped.apply(m.bn(m.conv(x)))),
        Body(lambda m, x: torch.utils.checkpoint.checkpoint(torch.relu, m.bn(m.conv(x)), use_reentrant=reentrant)),
    ):
        assert same(model, image())[0].fused == ()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a checkpoint that is traced
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_layer_that_gives_its_input_to_a_function_of_autograds_is_left(reentrant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(bn: Any, x: Any, z: Any) -> Any:
        if reentrant is None:
            return F.relu(z) + Rounded.apply(x)
        return F.relu(z) + torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=reentrant)

    monkeypatch.setattr(Own, "other", other)
    found = same(nn.Sequential(nn.Conv2d(3, 4, 1), Own(4)), image())
    assert found[0].why == "its own code gives its input to an autograd.Function or a checkpoint"


NOT_FORESEEN = r"an autograd.Function was given .* fastbn\.torch\.revert\(model\)"


def test_a_function_of_autograds_that_was_not_foreseen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(lambda m, x: (z := m.bn(m.conv(x)), Rounded.apply(z) if m.flag else m.act(z))[1])
    model.flag = True
    with pytest.raises(RuntimeError, match=NOT_FORESEEN):
        model(image())
    model, _ = owns(monkeypatch, lambda bn, x, z: Rounded.apply(bn.given(x, z)))
    for given in (lambda bn, x, z: x, lambda bn, x, z: z):
        monkeypatch.setattr(Own, "given", given, raising=False)
        with pytest.raises(RuntimeError, match=NOT_FORESEEN):
            model(image())


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_without_gradients_in_a_checkpoint_is_no_function_of_autograds(reentrant: bool, monkeypatch: Any) -> None:
    def other(bn: Any, x: Any, z: Any) -> Any:
        with torch.no_grad():
            scale = x.abs().max() + z.abs().max()
        return F.relu(z) * scale

    model, own = owns(monkeypatch, other)
    x = image()
    for m in (model, own):
        m.forward = partial(torch.utils.checkpoint.checkpoint, partial(nn.Sequential.forward, m), use_reentrant=reentrant)
    agree(step(model, x), step(own, x))


@pytest.mark.parametrize("read", [lambda bn: bn.running_mean.clone(), lambda bn: bn.weight.data.mul_(2)])
def test_statistics_that_are_read_at_once_have_moved(read: Callable[..., Any]) -> None:
    model = Body(lambda m, x: (z := m.bn(m.conv(x)), read(m.bn), z.relu())[1:])
    own, x = copy.deepcopy(model), image()
    assert fastbn.torch.convert(model)[0].why == "its tensors are read before what follows is computed"
    agree(model(x), own(x))


def test_an_activation_that_layers_share_is_fused() -> None:
    act = nn.ReLU()
    found = same(nn.Sequential(sequential(nn.BatchNorm2d(4), act), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)), image())
    assert [layer.fused for layer in found] == [("ReLU",), ("ReLU",)]


def test_layers_that_are_frozen_later_are_fused() -> None:
    model, own = pair(common)
    x = image()
    for m in (model, own):
        fastbn.torch.freeze(m)
    torch.testing.assert_close(step(model, x), step(own, x))
    assert taken() == 2


def test_parts_of_a_converted_sequence_are_whole_by_themselves() -> None:
    model, x = sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Tanh()), image()
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    for part in (lambda m: m[:2], lambda m: m[:3], lambda m: type(m)(*m[2:]), lambda m: nn.Sequential(*m, nn.Sigmoid())):
        got, want = (step(part(m), x if part(m)[0] is m[0] else m[0](x)) for m in (model, own))
        agree(got, want)
    assert type(type(model[1])(4)(model[0](x))) is torch.Tensor
    agree(pickle.loads(pickle.dumps(model[:2]))(x), own[:2](x))  # noqa: S301  our own


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.insert(2, nn.Tanh()),
        lambda m: m.__setitem__(1, nn.BatchNorm2d(4)),
        lambda m: m.__setitem__(1, nn.InstanceNorm2d(4)),
        lambda m: m.__delitem__(2),
        lambda m: m._modules.update({"1": m._modules.pop("1")}),
        lambda m: setattr(m[2], "negative_slope", 2),
        lambda m: fastbn.torch.freeze(m),
        lambda m: setattr(m[2], "forward", torch.tanh),
        lambda m: m.append(nn.Dropout(0.0)),
    ],
)
def test_a_sequence_that_was_changed_is_what_it_is_now(change: Callable[..., Any]) -> None:
    model, x = sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.5)), image()
    own = copy.deepcopy(model)
    fastbn.torch.convert(model)
    for m in (model, own):
        change(m)
    x = torch.randn(2, 4, 5, 6) if type(own[0]) is not nn.Conv2d else x
    agree(step(model, x), step(own, x))


def test_a_sequence_with_an_order_of_its_own_runs_in_it() -> None:
    class Backwards(nn.Sequential):
        def __iter__(self) -> Any:
            return reversed(self._modules.values())

    assert same(Backwards(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(3, 4, 1)), image())[0].fused == ("ReLU",)
    assert same(Backwards(nn.GELU(), nn.BatchNorm2d(3), nn.Tanh()), image())[0].fused == ("GELU",)


def test_graphs_are_converted_and_may_be_changed() -> None:
    model, x = torch.fx.symbolic_trace(Body(lambda m, x: F.relu(m.bn(m.conv(x)))).train()), image()
    own = copy.deepcopy(model)
    assert fastbn.torch.convert(model)[0].fused == ("relu",)
    before = taken()
    agree(step(model, x), step(own, x))
    model(x)
    assert taken() == before + 3  # in the copy, a graph of torch's own, batch norm alone
    for m in (model, own):
        next(node for node in m.graph.nodes if node.target is F.relu).target = torch.tanh
        next(node for node in m.graph.nodes if node.target is torch.tanh).kwargs = {}
        m.recompile()
    own.bn.load_state_dict(model.bn.state_dict())
    agree(model(x), own(x))
    fastbn.torch.revert(model)
    own.bn.load_state_dict(model.bn.state_dict())
    agree(model(x), own(x))


def test_a_model_that_makes_itself_in_pickles_and_lists_its_classes() -> None:
    classes = []

    class Model(Body):
        def __init_subclass__(cls, *, name: str) -> None:
            classes.append(name)

        def __reduce__(self) -> Any:
            return sequential, (nn.Identity(),)

    model = Model(common, act=nn.ReLU())
    assert fastbn.torch.convert(model)[0].fused == ("ReLU",)
    assert (classes, type(model).__name__, type(pickle.loads(pickle.dumps(model)))) == ([], "Model", nn.Sequential)  # noqa: S301
    fastbn.torch.revert(model)
    assert type(model) is Model


def test_what_convert_and_fold_return_says_that_it_is_no_model() -> None:
    """``model = convert(model)`` is how others are written."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.ones(2, 3, 5, 5)
    with pytest.raises(TypeError, match="the table that convert returned, not the model: convert changes the model in place"):
        fastbn.torch.convert(model)(x)
    with pytest.raises(TypeError, match="the result of fold, not a model: call its attribute model"):
        fastbn.torch.fold(model.eval())(x)


def test_a_model_that_cannot_be_converted_stays_as_it_was() -> None:
    """A register of classes may take no two of one name."""

    class Register(type):
        names: ClassVar[set[str]] = set()

        def __new__(cls, name: str, *rest: Any) -> Any:
            if name in cls.names:
                raise TypeError(f"there is a {name}")
            cls.names.add(name)
            return super().__new__(cls, name, *rest)

    class Sealed(nn.BatchNorm2d, metaclass=Register):
        pass

    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Sealed(3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 4, 4)
    want, kinds, held = model(x), [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    with pytest.raises(TypeError, match="there is a Sealed"):
        fastbn.torch.convert(model)
    assert ([type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]) == (kinds, held)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("activation", ["ReLU", "LeakyReLU", "SiLU", "Identity"])
@pytest.mark.parametrize("norm", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm"])
def test_a_gradient_penalty_reaches_the_parameters_that_it_reaches_in_torch(norm: str, activation: str) -> None:
    """Where torch's gradient of a bias is zeros, None would be an error."""
    arguments: Any = {"BatchNorm2d": (4,), "GroupNorm": (2, 4), "InstanceNorm2d": (4, 1e-5, 0.1, True), "LayerNorm": ([4, 80, 80],)}
    model = torch.nn.Sequential(getattr(torch.nn, norm)(*arguments[norm]), getattr(torch.nn, activation)()).double()
    converted = copy.deepcopy(model)
    fastbn.torch.convert(converted)
    x = torch.randn(48, 4, 80, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def penalty(net: Any) -> list[Any]:
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(given).sum(), given, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))

    for ours, theirs in zip(penalty(converted), penalty(model), strict=True):
        assert (ours is None) is (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)
