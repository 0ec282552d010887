"""fastbn's layers in the places where torch puts models: scripts, threads, copies, other processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs fastbn[torch]")

import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402

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


def test_frozen_layers_stay_frozen_in_scripts() -> None:
    model, x = small(), torch.randn(2, 3, 4, 4)
    fastbn.torch.freeze(model)
    script = torch.jit.script(model).train()
    torch.testing.assert_close(script(x), model(x))
    assert not model[1].running_mean.any()
