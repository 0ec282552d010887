"""fastbn's layers in the places where torch puts models: scripts, threads, copies, other processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402
from fastbn.torch import fused, parts  # noqa: E402

nn = torch.nn

pytestmark = [
    pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
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
    for module in (fused, parts):
        monkeypatch.setattr(module, "SMALLEST", 0)


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
