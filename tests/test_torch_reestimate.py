"""fastbn.torch.update_bn against the float64 statistics of everything that comes into a layer, and beside torch's own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")

import fastbn.torch  # noqa: E402
from fastbn import Estimate, Stats  # noqa: E402

nn = torch.nn


def network() -> Any:
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(3, 8, 3), bn=nn.BatchNorm2d(8), relu=nn.ReLU(), drop=nn.Dropout(0.5), conv2=nn.Conv2d(8, 6, 3),
        bn2=nn.BatchNorm2d(6), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), bn3=nn.BatchNorm1d(6), head=nn.Linear(6, 4),
    )  # fmt: skip
    return nn.Sequential(layers)


def batches(far: float = 10.0) -> list[Any]:
    """Of uneven sizes, as the last one of a loader is; the data drift, as sorted data do."""
    torch.manual_seed(1)
    return [torch.randn(n, 3, 9, 9) * (1 + i) + far + 3 * i for i, n in enumerate((12, 12, 12, 2))]


def truth(model: Any, data: list[Any]) -> dict[str, tuple[Any, Any]]:
    """Mean and unbiased variance of what comes into each batch norm, each batch normalized by itself, without dropout."""
    model = copy.deepcopy(model).double().eval()
    into: dict[str, list[Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.training = True
            into[name] = []
            layer.register_forward_pre_hook(lambda _, x, name=name: into[name].append(x[0].detach().transpose(0, 1).flatten(1)))
    for x in data:
        model(x.double())
    return {name: (torch.cat(v, 1).mean(1), torch.cat(v, 1).var(1)) for name, v in into.items()}


def off(model: Any, want: dict[str, tuple[Any, Any]]) -> float:
    """How far off, at most: means in standard deviations, variances relative."""
    worst = 0.0
    for name, (mean, var) in want.items():
        layer = model.get_submodule(name)
        worst = max(worst, float(((layer.running_mean - mean).abs() / var.sqrt()).max()), float((layer.running_var / var - 1).abs().max()))
    return worst


def test_they_are_those_of_the_whole_data_set_where_torchs_own_are_not() -> None:
    model, data = network().double(), [x.double() for x in batches()]
    want, theirs = truth(model, data), copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k and "tracked" not in k}
    modes = {name: (module.training, module.__dict__.keys()) for name, module in model.named_modules()}
    found = fastbn.torch.update_bn(model, data)
    assert found is not None
    assert off(model, want) < 1e-12
    assert (found.batches, found.layers["bn3"].count, int(model.bn.num_batches_tracked)) == (4, 38, 4)
    assert {name: (module.training, module.__dict__.keys()) for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    theirs.drop.p = 0.0  # it measures with dropout, too
    assert fastbn.torch.update_bn(theirs, data, exact=False) is None
    assert off(theirs, want) > 0.3


def test_in_float32_they_are_within_1e_6() -> None:
    model, data = network(), batches()
    fastbn.torch.update_bn(model, data)
    # What comes into later layers was computed in float32; the first one's input is the same convolution's.
    with torch.no_grad():
        z = torch.cat([model.conv(x) for x in data]).double().transpose(0, 1).flatten(1)
    assert off(model, {"bn": (z.mean(1), z.var(1))}) < 1e-6
    assert off(model, truth(model, data)) < 2e-5


class Called(nn.Module):
    """Takes names, counts its ends."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.last, self.ended = nn.BatchNorm1d(3), nn.BatchNorm1d(3), 0

    def forward(self, pixels: Any, scale: Any = 1.0, *, shift: Any = 0.0) -> Any:
        try:
            y = self.last(self.bn(input=pixels * scale + shift))
        except Exception as error:  # as models do
            raise AssertionError from error
        self.ended += 1
        return y


class Pair(NamedTuple):
    pixels: Any
    label: Any


def test_batches_come_in_many_forms() -> None:
    x = torch.randn(10, 3)
    want = Called()
    fastbn.torch.update_bn(want, [x, x])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(10)), batch_size=5)
    for data in (loader, [(x, 0), [x]], [Pair(x, 1)] * 2, [{"pixels": x, "labels": 3}] * 2, [({"pixels": x, "id": 1}, 2)] * 2):
        model = Called()
        fastbn.torch.update_bn(model, data)
        assert model.ended == 1
        torch.testing.assert_close(model.bn.running_mean, want.bn.running_mean)
    model = Called()
    fastbn.torch.update_bn(model, [{"pixels": x, "shift": 2.0, "scale": 0.0}, {"pixels": x}])
    torch.testing.assert_close(model.bn.running_mean, (2 + x.mean(0)) / 2)
    fastbn.torch.update_bn(model, [7, 8], forward=lambda m, batch: m(x, float(batch)))
    torch.testing.assert_close(model.bn.running_mean, 7.5 * x.mean(0))


def test_a_run_goes_on_where_another_ended_and_stops_when_the_means_are_known() -> None:
    data, whole, part = batches(), network(), network()
    fastbn.torch.update_bn(whole, data)
    told: list[Estimate] = []
    first = fastbn.torch.update_bn(part, data[:2], progress=told.append)
    assert told[-1] == first
    fastbn.torch.update_bn(part, data[2:], start=first)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(part.get_buffer(name), buffer, rtol=1e-6, atol=1e-6)
    seen = []
    fastbn.torch.update_bn(nn.BatchNorm1d(3), (seen.append(1) or torch.randn(100, 3) for _ in range(500)), tolerance=0.02)
    assert 8 <= len(seen) < 100


def test_frozen_layers_and_others_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3))
    fastbn.torch.freeze(model[0])
    found = fastbn.torch.update_bn(model, [torch.randn(6, 3, 4)])
    assert found is not None
    assert list(found.layers) == ["1"]
    assert not model[0].running_mean.any()
    model[1].weight.requires_grad_()
    assert model(torch.randn(6, 3, 4)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_and_orders_of_memory(dtype: Any) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).to(dtype)
    x = (torch.randn(5, 3, 4, 4) + 20).to(dtype).contiguous(memory_format=torch.channels_last)
    fastbn.torch.update_bn(model, [x])
    want = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[0].running_var.double(), want.var(1), rtol=2**-8 if dtype == torch.bfloat16 else 1e-12, atol=0)
    assert model[0].running_mean.dtype == dtype


def test_data_that_are_views_of_the_opposite_numbers() -> None:
    model, x = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(5, 3, 4, 4) + 20
    fastbn.torch.update_bn(model, [torch._neg_view(x)])
    torch.testing.assert_close(model[0].running_mean, -x.mean((0, 2, 3)))


def test_a_default_device_hinders_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    data = [torch.tensor([[1.0], [3.0]])]
    with torch.device("meta"):
        fastbn.torch.update_bn(model, data)
    assert (float(model[0].running_mean), int(model[0].num_batches_tracked)) == (2, 1)


def test_a_compiled_model_is_run_uncompiled() -> None:
    model, want = network(), network()
    fastbn.torch.update_bn(want, batches())

    def never(*arguments: Any) -> Any:
        raise AssertionError("it was compiled")

    fastbn.torch.update_bn(torch.compile(model, backend=never), batches())
    inner = network()
    inner.compile(backend=never)
    fastbn.torch.update_bn(inner, batches())
    for other in (model, inner):
        assert torch.equal(other.bn2.running_var, want.bn2.running_var)


class Moves(nn.BatchNorm1d):
    """Moves its statistics whatever its attributes say."""

    def forward(self, input: Any) -> Any:  # noqa: A002  torch's name
        self.running_mean.add_(1)
        return super().forward(input)


def test_a_layer_that_moves_by_itself_is_as_before_after_an_error() -> None:
    model = Moves(3)
    for wrong in ("no tensor", torch.ones(4, 3, dtype=torch.int64)):
        with pytest.raises((AttributeError, RuntimeError)) as error:  # torch's own
            fastbn.torch.update_bn(model, [torch.randn(4, 3), wrong])
        assert "fastbn" not in str(error.traceback[-1].path)
    assert not model.running_mean.any()
    x = torch.randn(4, 3)
    fastbn.torch.update_bn(model, [x])
    torch.testing.assert_close(model.running_mean, x.mean(0))


def raises() -> Any:
    yield batches()[0]
    raise OSError("the disk is gone")


ERRORS: dict[str, tuple[Any, ...]] = {
    "model": (TypeError, r"model must be a torch\.nn\.Module", lambda m: fastbn.torch.update_bn(3, [])),
    "loader": (TypeError, "the batches must be an iterable, got int", lambda m: fastbn.torch.update_bn(m, 3)),
    "exact": (TypeError, "exact must be True or False", lambda m: fastbn.torch.update_bn(m, [], exact=2)),
    "options": (ValueError, "takes no other options", lambda m: fastbn.torch.update_bn(m, [], exact=False, tolerance=0.1)),
    "no layer": (ValueError, "no batch norm with running", lambda m: fastbn.torch.update_bn(nn.ReLU(), [])),
    "lazy": (ValueError, "the model is a lazy batch norm", lambda m: fastbn.torch.update_bn(nn.LazyBatchNorm1d(), [])),
    "meta": (ValueError, "bn lies on the meta device", lambda m: fastbn.torch.update_bn(copy.deepcopy(m).to("meta"), batches())),
    "nothing": (ValueError, "no batch reached a batch norm", lambda m: fastbn.torch.update_bn(m, [])),
    "one": (ValueError, "Expected more than 1 value", lambda m: fastbn.torch.update_bn(m, [batches()[0][:1]])),
    "empty": (ValueError, "layer 'bn' needs at least 2 values per channel, and 0", lambda m: fastbn.torch.update_bn(m, [batches()[0][:0]])),
    "one axis": (ValueError, "expected 2D or 3D input", lambda _: fastbn.torch.update_bn(nn.BatchNorm1d(3), [torch.ones(3)])),
    "disk": (OSError, "the disk is gone", lambda m: fastbn.torch.update_bn(m, raises())),
    "start": (ValueError, "layer 'bn' has 8 channels", lambda m: fastbn.torch.update_bn(m, [], start=Estimate({"bn": Stats.identity(3)}))),
}


@pytest.mark.parametrize("name", ERRORS)
def test_after_an_error_the_model_is_as_before(name: str) -> None:
    error, message, call = ERRORS[name]
    model = network()
    model.bn2.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    with pytest.raises(error, match=message):
        call(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert model.bn.track_running_stats
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert np.isfinite(float(model.bn.running_var.sum()))


@pytest.mark.parametrize("last", range(1, 6))
def test_an_interrupt_while_statistics_are_written_leaves_the_old_ones(last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, copy_ = network(), torch.Tensor.copy_
    before = copy.deepcopy(model.state_dict())
    batch = batches()[0]
    written: list[Any] = []

    def interrupted(self: Any, *values: Any) -> Any:
        written.extend([self] if any(self is buffer for buffer in model.buffers()) else [])
        if len(written) == last:
            written.append(None)
            raise KeyboardInterrupt
        return copy_(self, *values)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fastbn.torch.update_bn(model, [batch, batch])
    monkeypatch.undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Turned(nn.BatchNorm1d):
    """For channels on the last axis, as packages have it."""

    def forward(self, x: Any) -> Any:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Split(nn.BatchNorm2d):
    """Each part of a batch by itself, one of them by another layer."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.other = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        first, second, third = x.split([4, 2, 4])
        return torch.cat([super().forward(first), self.other(second), super().forward(third)])


class ByHand(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.var((0, 2, 3), keepdim=True).sqrt()


@pytest.mark.parametrize("converted", [False, True])
def test_what_a_layers_own_code_makes_of_its_input_counts(converted: bool) -> None:
    model = nn.Sequential(Turned(4), nn.ReLU(), nn.Unflatten(1, (2, 2)), Split(2), ByHand(2))
    x = torch.randn(10, 4, 4) * 2 + torch.arange(4.0)
    if converted:
        fastbn.torch.convert(model)
    fastbn.torch.update_bn(model, [x])
    assert all("forward" not in module.__dict__ for module in model.modules())
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 1)))
    torch.testing.assert_close(model[0].running_var, x.transpose(1, 2).transpose(0, 1).flatten(1).var(1))
    z = model[0].train()(x).relu().unflatten(1, (2, 2)).detach()
    torch.testing.assert_close(model[3].running_mean, torch.cat([z[:4], z[6:]]).mean((0, 2, 3)))
    torch.testing.assert_close(model[3].other.running_mean, z[4:6].mean((0, 2, 3)))
    torch.testing.assert_close(model[4].running_mean, model[3](z).detach().mean((0, 2, 3)))
