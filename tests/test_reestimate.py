"""Running statistics found anew: for NumPy's layers; `test_torch_reestimate` has PyTorch's models."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from processes import Member, together
from truth import rng, same_bits

import fastbn
from fastbn import Estimate, Stats, sync
from fastbn.layout import Array


class Net:
    """Two layers, and something after them that need not run."""

    def __init__(self, **options: Any):
        r = rng(5)
        self.first, self.second = r.standard_normal((6, 5)).astype("f"), r.standard_normal((5, 4)).astype("f")
        self.layers = {"a": fastbn.BatchNorm1d(5, **options), "b": fastbn.BatchNorm1d(4, activation="relu")}
        self.ended = 0

    def __call__(self, x: Array) -> Array:
        self.layers["a"].eval()  # as models do that know of training alone
        y = self.layers["b"](self.layers["a"](x @ self.first) @ self.second)
        self.ended += 1
        return y


def data(seed: int = 0, far: float = 30.0) -> list[Array]:
    """Batches of uneven sizes, whose means drift."""
    r = rng(seed)
    return [(r.standard_normal((n, 6)) + far + i).astype("f") for i, n in enumerate((64, 3, 17, 2, 40))]


def truth(net: Net, batches: list[Array]) -> dict[str, tuple[Array, Array]]:
    """Mean and unbiased variance of all that comes into each layer, in float64."""
    into: dict[str, list[Array]] = {"a": [], "b": []}
    for x in batches:
        z = x @ net.first
        into["a"].append(z)
        y = fastbn.batch_norm_forward(z, net.layers["a"].weight, net.layers["a"].bias)[0]
        into["b"].append(y @ net.second)
    joined = {name: np.concatenate(parts).astype(float) for name, parts in into.items()}
    return {name: (v.mean(0), v.var(0, ddof=1)) for name, v in joined.items()}


def check(net: Net, want: dict[str, tuple[Array, Array]]) -> None:
    for name, (mean, var) in want.items():
        layer = net.layers[name]
        assert (abs(layer.running_mean - mean) <= 1e-6 * (np.sqrt(var) + abs(mean))).all()
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-6)


def test_batches_may_come_to_other_layers_and_more_often_than_the_first() -> None:
    """As sequences of other lengths, and networks of several exits do."""
    layers = [fastbn.BatchNorm1d(1), fastbn.BatchNorm1d(1)]

    def forward(batch: tuple[Array, int]) -> None:
        x, steps = batch
        for _ in range(steps):
            layers[0](x)
        if steps > 1:
            layers[1](x)

    x = np.array([[1.0], [5.0]], np.float32)
    found = fastbn.update_bn(layers, [(x, 1), (x + 1, 2), (x + 2, 3)], forward)
    assert [stats.count for stats in found.layers.values()] == [12, 4]
    assert layers[0].running_mean == pytest.approx((3 + 2 * 4 + 3 * 5) / 6)
    assert layers[1].running_mean == pytest.approx(4.5)


def test_they_are_those_of_the_whole_data_set() -> None:
    net, batches = Net(), data()
    for layer in net.layers.values():
        layer.eval()
    before = [layer.__dict__.keys() for layer in net.layers.values()]
    found = fastbn.update_bn(net.layers, iter(batches), net)
    check(net, truth(net, batches))
    assert net.ended == 1  # the first batch; the others end at the last layer
    assert (found.batches, found.layers["a"].count) == (5, 126)
    assert [layer.__dict__.keys() for layer in net.layers.values()] == before
    for layer in net.layers.values():
        assert (layer.training, layer.track_running_stats, int(layer.num_batches_tracked)) == (False, True, 5)
        with pytest.raises(RuntimeError, match="backward needs a forward"):
            layer.backward(np.ones((2, layer.num_features), "f"))


def test_a_run_goes_on_where_another_ended_and_machines_merge() -> None:
    batches, whole, parts = data(), Net(), [Net() for _ in range(3)]
    fastbn.update_bn(whole.layers, batches, whole)
    kept: list[Estimate] = []
    first = fastbn.update_bn(parts[0].layers, batches[:2], parts[0], progress=kept.append)
    assert [estimate.batches for estimate in kept] == [1, 2]
    assert kept[-1] == first
    fastbn.update_bn(parts[0].layers, batches[2:], parts[0], start=pickle.loads(pickle.dumps(first)))  # noqa: S301  our own
    second = fastbn.update_bn(parts[1].layers, batches[2:], parts[1])
    merged = fastbn.update_bn(parts[2].layers, [], parts[2], start=first.merge(second))
    assert merged.batches == 5
    for net in parts[::2]:
        for name, layer in net.layers.items():
            np.testing.assert_allclose(layer.running_mean, whole.layers[name].running_mean, rtol=1e-6)
            np.testing.assert_allclose(layer.running_var, whole.layers[name].running_var, rtol=1e-6)


def test_processes_merge_at_the_end() -> None:
    batches, whole = data(), Net()
    fastbn.update_bn(whole.layers, batches, whole)

    def work(rank: int, communicator: Member) -> Any:
        net = Net()
        found = fastbn.update_bn(net.layers, [batches[:1], [], batches[1:]][rank], net, communicator=communicator)
        return found, net

    found, messages = together(3, work)
    assert [kind for kind, _ in messages] == ["all_gather", "all_reduce"]
    for estimate, net in found:
        assert estimate == found[0][0]
        assert estimate.batches == 5
        for name, layer in net.layers.items():
            same_bits(layer.running_mean, found[0][1].layers[name].running_mean)
            np.testing.assert_allclose(layer.running_var, whole.layers[name].running_var, rtol=1e-6)


def test_it_stops_when_the_means_are_known() -> None:
    net, seen = Net(), []

    def endless() -> Any:
        r = rng(1)
        while True:
            seen.append(1)
            yield r.standard_normal((50, 6)).astype("f")

    fastbn.update_bn(net.layers, endless(), net, tolerance=0.02)
    assert 20 < len(seen) < 200  # 2,500 values give an error of 0.02, and it takes the worst of nine channels
    few: list[int] = []
    fastbn.update_bn(net.layers, (few.append(1) or np.tile(data()[0], (2, 1)) for _ in range(99)), net, tolerance=0.5)
    assert len(few) == 8  # no spread is told from fewer


def test_layers_that_are_called_twice_frozen_or_masked() -> None:
    bn, frozen, plain = fastbn.BatchNorm1d(3), fastbn.BatchNorm1d(3).freeze(), fastbn.BatchNorm1d(3, track_running_stats=False)
    shared = fastbn.BatchNorm2d(2, layout="NHWC", correction=0)
    r = rng(2)
    x, image = r.standard_normal((8, 3)).astype("f"), r.standard_normal((2, 4, 4, 2)).astype("f")
    mask = r.random((2, 4, 4)) < 0.5

    def forward(scale: float) -> None:
        plain(frozen(bn(x * np.float32(scale))))
        shared(shared(image), mask=mask)

    found = fastbn.update_bn([bn, frozen, plain, shared], [1.0, 3.0], forward)
    assert list(found.layers) == ["0", "3"]
    assert found.layers["3"].count == 2 * (32 + mask.sum())
    np.testing.assert_allclose(bn.running_var, np.concatenate([x, 3 * x]).var(0, ddof=1), rtol=1e-6)
    first, second = image.reshape(-1, 2), fastbn.batch_norm_forward(image, layout="NHWC")[0][mask]
    np.testing.assert_allclose(shared.running_var, np.concatenate([first, second] * 2).astype(float).var(0), rtol=1e-6)
    assert not frozen.running_mean.any()
    assert int(frozen.num_batches_tracked) == 0


def test_an_estimate_is_a_value() -> None:
    layers = {"a": ONE.layers["a"]}
    estimate = Estimate(layers, np.uint8(200))
    layers["b"] = Stats.identity(1)
    assert estimate == Estimate({"a": ONE.layers["a"]}, 200)
    assert len({estimate, copy.deepcopy(estimate), pickle.loads(pickle.dumps(estimate)), ONE}) == 2  # noqa: S301  our own
    assert type(estimate.batches) is int
    assert estimate.merge(estimate).batches == 400


def test_a_layer_that_skips_bad_batches_does_so_here() -> None:
    bn, x = fastbn.BatchNorm1d(3, skip_nonfinite=True), np.arange(12, dtype="f").reshape(4, 3)
    found = fastbn.update_bn([bn], [x, np.full_like(x, np.nan), x], bn)
    assert found.layers["0"].count == 8
    np.testing.assert_allclose(bn.running_mean, x.mean(0))
    assert np.isfinite(bn.running_var).all()
    with pytest.raises(ValueError, match="and 0 came"):
        fastbn.update_bn([bn], [np.full_like(x, np.inf)], bn)


def test_a_line_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    net = Net()
    fastbn.update_bn(net.layers, data(), net, progress=True)
    assert capsys.readouterr().err.startswith("\rupdate_bn: 1 of 5 batches, 0 s\rupdate_bn: 2 of 5")
    fastbn.update_bn(net.layers, iter(data()), net, progress=True)
    assert capsys.readouterr().err.endswith("update_bn: 5 batches, 0 s\n")
    with pytest.raises(TypeError):
        fastbn.update_bn(net.layers, [*data(), "no batch"], net, progress=True)
    assert capsys.readouterr().err.endswith("update_bn: 5 of 6 batches, 0 s\n")


def test_a_line_that_nobody_can_read_ends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        net = Net()
        monkeypatch.setattr("sys.stderr", stream)
        assert fastbn.update_bn(net.layers, data(), net, progress=True).batches == 5
    assert capsys.readouterr().out == ""


def fails(net: Net) -> Callable[[Array], Array]:
    def forward(x: Array) -> Array:
        net(x)
        raise OSError("the disk is gone")

    return forward


ONE = Estimate({"a": Stats(1, np.zeros(5), np.zeros(5))}, 1)
ERRORS: dict[str, tuple[type[Exception], str, Callable[[Net], object]]] = {
    "layers": (TypeError, "layers must be a sequence or a mapping", lambda n: fastbn.update_bn(n.layers["a"], [], n)),  # type: ignore[arg-type]
    "layer": (TypeError, "must hold BatchNorm1d.* got int for '0'", lambda n: fastbn.update_bn([3], [], n)),  # type: ignore[list-item]
    "forward": (TypeError, "forward must be a function of a batch", lambda n: fastbn.update_bn(n.layers, [], None)),  # type: ignore[arg-type]
    "batches": (TypeError, "the batches must be an iterable, got int", lambda n: fastbn.update_bn(n.layers, 3, n)),  # type: ignore[arg-type]
    "scalar": (TypeError, "the batches must be an iterable, got ndarray", lambda n: fastbn.update_bn(n.layers, np.array(0), n)),
    "start": (TypeError, "start must be an Estimate", lambda n: fastbn.update_bn(n.layers, [], n, start={})),  # type: ignore[arg-type]
    "tolerance": (ValueError, "tolerance must be a finite number of at least 0", lambda n: fastbn.update_bn(n.layers, [], n, tolerance=-1)),
    "progress": (TypeError, "progress must be True or False", lambda n: fastbn.update_bn(n.layers, [], n, progress="yes")),  # type: ignore[arg-type]
    "communicator": (TypeError, "communicator must have", lambda n: fastbn.update_bn(n.layers, [], n, communicator=3)),  # type: ignore[arg-type]
    "none": (ValueError, "no batch reached a batch norm", lambda n: fastbn.update_bn(n.layers, [], n)),
    "nowhere": (ValueError, "no batch reached a batch norm", lambda n: fastbn.update_bn(n.layers, [], n, communicator=sync.Alone())),
    "stranger": (ValueError, "start has a layer 'c', which is none of the model's",
                 lambda n: fastbn.update_bn(n.layers, [], n, start=Estimate({"c": Stats.identity(3)}))),
    "channels": (ValueError, "layer 'a' has 5 channels, but those of start are 3",
                 lambda n: fastbn.update_bn(n.layers, [], n, start=Estimate({"a": Stats.identity(3)}))),
    "one value": (ValueError, "layer 'a' needs at least 2 values per channel, and 1 came",
                  lambda n: fastbn.update_bn(n.layers, [], n, start=ONE)),
    "empty": (ValueError, "layer 'a' needs at least 2 values per channel, and 0 came",
              lambda n: fastbn.update_bn(n.layers, [], n, start=Estimate({"a": Stats.identity(5)}))),
    "one row": (ValueError, "Expected more than 1 value per channel", lambda n: fastbn.update_bn(n.layers, [data()[0][:1]], n)),
    "user": (OSError, "the disk is gone", lambda n: fastbn.update_bn(n.layers, data(), fails(n))),
    "Estimate-list": (TypeError, "layers must be a mapping of names to Stats, got list", lambda n: Estimate([ONE])),  # type: ignore[arg-type]
    "Estimate-batches": (TypeError, "batches must be an int, got 1.0", lambda n: Estimate({}, 1.0)),  # type: ignore[arg-type]
    "Estimate": (TypeError, "layers must be a mapping of names to Stats, got int for 'a'", lambda n: Estimate({"a": 3})),  # type: ignore[dict-item]
    "merge": (TypeError, "merge takes Estimates, got int", lambda n: ONE.merge(3)),  # type: ignore[arg-type]
    "merge-channels": (ValueError, "5 channels for layer 'a', got 3", lambda n: ONE.merge(Estimate({"a": Stats.identity(3)}))),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_after_an_error_the_layers_are_as_before(name: str) -> None:
    error, message, call = ERRORS[name]
    net = Net()
    net.layers["a"].eval()
    before = {key: (layer.state_dict(), layer.__dict__.copy()) for key, layer in net.layers.items()}
    with pytest.raises(error, match=message):
        call(net)
    for key, layer in net.layers.items():
        assert layer.__dict__ == before[key][1]
        for name_, v in layer.state_dict().items():
            same_bits(np.atleast_1d(v), np.atleast_1d(before[key][0][name_]))


def test_one_array_in_place_of_batches_is_said() -> None:
    bn, x = fastbn.BatchNorm2d(3), np.ones((2, 3, 4, 4), np.float32)
    said = r"takes arrays with 4 axes, but x has shape \(3, 4, 4\) \(the batches were what one array of shape \(2, 3, 4, 4\) has on its"
    with pytest.raises(ValueError, match=said):
        fastbn.update_bn([bn], x, bn)
    assert fastbn.update_bn([bn], x[None], bn).batches == 1
    with pytest.raises(ValueError, match=r"but x has shape \(3, 4, 4\)$"):
        fastbn.update_bn([bn], list(x), bn)
    with pytest.raises(KeyError, match="own"):
        fastbn.update_bn([bn], x, lambda _: {}["own"])


@pytest.mark.parametrize("key", ["running_mean", "running_var", "num_batches_tracked"])
def test_statistics_that_cannot_be_written_are_said_before_a_batch_runs(key: str) -> None:
    first, second = fastbn.BatchNorm1d(3), fastbn.BatchNorm1d(3)
    getattr(second, key).setflags(write=False)
    with pytest.raises(ValueError, match=f"{key} of layer 'last' is .*read-only"):
        fastbn.update_bn({"first": first, "last": second}, iter(()), pytest.fail)
    assert not first.running_mean.any()


def test_statistics_in_16_bits_overflow_without_an_error() -> None:
    bn, x = fastbn.BatchNorm1d(1), np.array([[-1e4], [1e4]], np.float32)
    bn.running_var = bn.running_var.astype(np.float16)
    with np.errstate(all="raise"):
        fastbn.update_bn([bn], [x], bn)
    assert (bn.running_mean.tolist(), bn.running_var.tolist(), int(bn.num_batches_tracked)) == ([0.0], [np.inf], 1)


class Turned(fastbn.BatchNorm1d):
    """Of data with channels on the last axis, in parts, of which each is a batch."""

    def forward(self, x: Array, *args: Any, **options: Any) -> Array:
        turned = [super(Turned, self).forward(np.ascontiguousarray(part.swapaxes(1, 2)), *args, **options) for part in np.split(x, 2)]
        return np.concatenate(turned).swapaxes(1, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_a_layers_own_code_makes_of_its_input_counts(dtype: Any) -> None:
    x = (rng(0).normal(size=(6, 4, 4)) * 2 + np.arange(4)).astype(dtype)
    bn, last = Turned(4, dtype=dtype), fastbn.BatchNorm1d(4, dtype=dtype)
    fastbn.update_bn([bn, last], [x], lambda x: last(np.ascontiguousarray(bn(x))))
    np.testing.assert_allclose(bn.running_mean, x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(bn.running_var, x.var((0, 1), ddof=1), rtol=1e-5)
    assert last.running_mean is not None
    np.testing.assert_allclose(last.running_mean, bn(x).mean((0, 2)), rtol=1e-4, atol=1e-5)


def test_statistics_that_a_layer_is_called_with_count() -> None:
    bn, given = fastbn.BatchNorm1d(1), Stats(10, [3.0], [2.0])
    fastbn.update_bn([bn], [np.zeros((4, 1), np.float32)], lambda x: bn(x, stats=given))
    assert (bn.running_mean, bn.running_var) == (3.0, np.float32(2 * 10 / 9))
