"""The layers, step by step beside PyTorch's."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
from truth import forward, near, near_gradient, problem, rng, same_bits

import fastbn
from fastbn import reference
from fastbn.layout import Array

pytestmark = pytest.mark.usefixtures("kernel")

LAYERS = {
    "1d-nc": (fastbn.BatchNorm1d, (12, 7)),
    "1d-ncl": (fastbn.BatchNorm1d, (4, 7, 9)),
    "2d": (fastbn.BatchNorm2d, (3, 7, 5, 6)),
    "3d": (fastbn.BatchNorm3d, (2, 7, 3, 4, 5)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.3, "eps": 1e-3},
    "cumulative": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "plain": {"affine": False},
    "no-bias": {"bias": False},
    "plain-untracked": {"affine": False, "track_running_stats": False},
}
each_layer = pytest.mark.parametrize(("kind", "shape"), LAYERS.values(), ids=LAYERS)
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # small tensors, and the other tests want the processors too
    return torch


def pair(kind: Any, torch: Any, options: dict[str, Any], channels: int = 7) -> tuple[Any, Any]:
    """A layer and PyTorch's of the same name, with the same parameters."""
    module = getattr(torch.nn, kind.__name__)
    if missing := options.keys() - inspect.signature(module).parameters.keys():
        pytest.skip(f"this PyTorch has no {missing}")
    ours, theirs = kind(channels, **options), module(channels, **options)
    if ours.affine:
        r = rng(1)
        state = {"weight": r.uniform(0.5, 2.0, channels), "bias": r.standard_normal(channels)}
        state = {key: value for key, value in state.items() if key in ours.state_dict()}
        ours.load_state_dict(ours.state_dict() | state)
        theirs.load_state_dict(theirs.state_dict() | {k: torch.tensor(v) for k, v in state.items()})
    return ours, theirs


def alike(ours: Array | None, theirs: Any) -> None:
    assert ours is not None
    theirs = theirs.detach().numpy()
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)


def step(ours: Any, theirs: Any, torch: Any, shape: tuple[int, ...], seed: int) -> None:
    """One forward and backward of both, compared."""
    p = problem(shape, seed=seed)
    x = torch.tensor(p.x, requires_grad=True)
    y = theirs(x)
    alike(ours(p.x), y)
    theirs.zero_grad()
    y.backward(torch.tensor(p.dy))
    gradients = ours.backward(p.dy)
    alike(gradients.dx, x.grad)
    for gradient, parameter in ((gradients.dweight, theirs.weight), (gradients.dbias, theirs.bias)):
        if parameter is None:
            assert gradient is None
        else:
            alike(gradient, parameter.grad)


def same_state(ours: Any, theirs: Any) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].shape == tuple(theirs[key].shape)
        alike(ours[key], theirs[key])


@each_option
@each_layer
def test_as_torch(kind: Any, shape: tuple[int, ...], options: dict[str, Any], torch: Any) -> None:
    ours, theirs = pair(kind, torch, options)
    same_state(ours, theirs)
    for seed in range(4):
        step(ours, theirs, torch, shape, seed)
        same_state(ours, theirs)
    assert ours.eval() is ours
    theirs.eval()
    for seed in (4, 5):
        step(ours, theirs, torch, shape, seed)
        same_state(ours, theirs)
    assert ours.train() is ours
    theirs.train()
    step(ours, theirs, torch, shape, 6)
    same_state(ours, theirs)


def test_several_steps_of_descent_as_torch(torch: Any) -> None:
    ours, theirs = pair(fastbn.BatchNorm2d, torch, {})
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    for seed in range(5):
        x = problem((3, 7, 5, 6), seed=seed).x
        y = theirs(torch.tensor(x))
        optimizer.zero_grad()
        (y**3).mean().backward()
        optimizer.step()
        y = ours(x)
        gradients = ours.backward(3 * y**2 / y.size)
        ours.weight -= np.float32(0.05) * gradients.dweight
        ours.bias -= np.float32(0.05) * gradients.dbias
        same_state(ours, theirs)


@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["plain"], OPTIONS["cumulative"]], ids=["default", "plain", "cumulative"])
def test_state_goes_to_torch_and_back(options: dict[str, Any], torch: Any) -> None:
    ours, theirs = pair(fastbn.BatchNorm2d, torch, options)
    for seed in range(3):
        ours(problem((3, 7, 5, 6), seed=seed).x)
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in ours.state_dict().items()})
    same_state(ours, theirs)
    theirs(torch.tensor(problem((3, 7, 5, 6), seed=3).x))
    fresh = fastbn.BatchNorm2d(7, **options)
    fresh.load_state_dict(theirs.state_dict())
    for key, value in fresh.state_dict().items():
        np.testing.assert_array_equal(value, theirs.state_dict()[key].numpy())
    assert fresh.num_batches_tracked == 4


def test_a_layer_without_a_bias_is_taken_over_and_printed() -> None:
    bn = fastbn.BatchNorm2d(7, bias=False)
    assert "bias=False" in repr(bn)
    for same in (bn, fastbn.BatchNorm2d.from_torch(bn)):
        assert same.state_dict().keys() == fastbn.BatchNorm2d(7).state_dict().keys() - {"bias"}
    with pytest.raises(TypeError, match="bias must be True or False, got None"):
        fastbn.BatchNorm2d(7, bias=None)  # type: ignore[arg-type]


def test_state_is_a_copy() -> None:
    bn = fastbn.BatchNorm1d(3)
    state = bn.state_dict()
    for value in state.values():
        value += 1
    assert bn.num_batches_tracked == 0
    assert not bn.bias.any()
    bn.load_state_dict(state)
    state["bias"][:] = 7
    np.testing.assert_array_equal(bn.bias, [1, 1, 1])


def test_old_states_do_not_count_batches() -> None:
    bn = fastbn.BatchNorm1d(3)
    bn(problem((4, 3)).x)
    state = bn.state_dict()
    del state["num_batches_tracked"]
    bn.load_state_dict(state)
    assert bn.num_batches_tracked == 1


def test_cumulative_average_is_the_mean_of_the_batches() -> None:
    bn = fastbn.BatchNorm1d(3, momentum=None, dtype=np.float64)
    xs = [problem((8, 3), np.float64, mean=i, seed=i).x for i in range(5)]
    for x in xs:
        bn(x)
    np.testing.assert_allclose(bn.running_mean, np.mean([x.mean(0) for x in xs], axis=0), rtol=1e-13)
    np.testing.assert_allclose(bn.running_var, np.mean([x.var(0, ddof=1) for x in xs], axis=0), rtol=1e-13)
    assert bn.num_batches_tracked == 5


@pytest.mark.parametrize(("layout", "shape"), [("NLC", (4, 9, 7)), ("NHWC", (3, 5, 6, 7)), ("NDHWC", (2, 3, 4, 5, 7))])
def test_channels_last(layout: str, shape: tuple[int, ...]) -> None:
    kind = {3: fastbn.BatchNorm1d, 4: fastbn.BatchNorm2d, 5: fastbn.BatchNorm3d}[len(shape)]
    p = problem(shape, axis=-1)
    for name in (layout, "channels_last"):
        last, first = kind(7, layout=name), kind(7)
        near(last(p.x), forward(p.x, axis=-1))
        first(np.ascontiguousarray(np.moveaxis(p.x, -1, 1)))
        np.testing.assert_allclose(last.running_var, first.running_var, rtol=1e-6)


def test_dtypes(dtype: np.dtype[Any]) -> None:
    p = problem((3, 7, 5, 6), dtype)
    bn = fastbn.BatchNorm2d(7, dtype=dtype)
    y = bn(p.x)
    near(y, forward(p.x))
    assert y.dtype == dtype
    compute = np.float64 if dtype == np.float64 else np.float32
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert bn.state_dict()[key].dtype == compute
    assert bn.backward(p.dy).dx.dtype == dtype


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_frozen_in_training(training: bool) -> None:
    p = problem((3, 7, 5, 6))
    bn = fastbn.BatchNorm2d(7)
    bn.load_state_dict({"weight": p.weight, "bias": p.bias, "running_mean": p.mean, "running_var": p.var})
    assert bn.freeze() is bn
    bn.train(training)
    before = bn.state_dict()
    near(bn(p.x), reference.batch_norm(p.x, p.mean, p.var, p.weight, p.bias))
    for key, value in bn.state_dict().items():
        same_bits(value, before[key])
    gradients = bn.backward(p.dy)
    near_gradient(gradients.dx, reference.batch_norm_backward(p.dy, p.x, p.mean, p.var, p.weight, training=False)[0])
    assert gradients.dweight is gradients.dbias is None
    assert bn.backward(p.dy, wrt=("weight", "bias")).dx is None
    assert bn.freeze(False) is bn
    bn.train()
    near(bn(p.x), forward(p.x, p.weight, p.bias))
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("with_weight", [True, False], ids=["weight", "no-weight"])
@pytest.mark.parametrize("layout", [None, "NHWC"])
def test_frozen_layer_is_inference(layout: str | None, with_weight: bool, with_bias: bool, dtype: np.dtype[Any]) -> None:
    p = problem((3, 7, 5, 6) if layout is None else (3, 5, 6, 7), dtype, 1 if layout is None else -1)
    weight, bias = p.weight if with_weight else None, p.bias if with_bias else None
    frozen = fastbn.FrozenBatchNorm(p.mean, p.var, weight, bias, eps=1e-3, layout=layout)
    y = fastbn.batch_norm(p.x, p.mean, p.var, weight, bias, eps=1e-3, layout=layout)
    near(frozen(p.x), reference.batch_norm(p.x, p.mean, p.var, weight, bias, 1e-3, p.axis))
    same_bits(frozen(p.x), y)
    x = p.x.copy()
    assert frozen(x, out=x) is x
    same_bits(x, y)
    assert frozen(p.x[:0]).shape == p.x[:0].shape


def test_frozen_layer_is_the_layer_in_eval() -> None:
    bn = fastbn.BatchNorm2d(7)
    for seed in range(3):
        bn(problem((3, 7, 5, 6), seed=seed).x)
    state = bn.state_dict()
    frozen = fastbn.FrozenBatchNorm(state["running_mean"], state["running_var"], state["weight"], state["bias"])
    x = problem((3, 7, 5, 6), seed=3).x
    same_bits(frozen(x), bn.eval()(x))


def test_frozen_layer_keeps_its_statistics() -> None:
    p = problem((3, 7, 5))
    mean = p.mean.copy()
    frozen = fastbn.FrozenBatchNorm(mean, p.var)
    y = frozen(p.x)
    mean += 1
    same_bits(frozen(p.x), y)


@pytest.mark.parametrize("alias", [lambda x: x, lambda x: x[:], lambda x: x.view()], ids=["itself", "slice", "view"])
def test_in_place_leaves_nothing_for_backward(alias: Any) -> None:
    p = problem((3, 7, 5, 6))
    bn, other = (fastbn.BatchNorm2d(7, activation="relu") for _ in range(2))
    x = p.x.copy()
    bn(x, out=alias(x))
    same_bits(x, other(p.x))
    same_bits(bn.running_var, other.running_var)
    with pytest.raises(RuntimeError, match="backward needs the input of the forward before it, which the output has overwritten"):
        bn.backward(p.dy)
    out = np.empty_like(p.x)
    assert bn(p.x, out=out) is out
    dy = p.dy.copy()
    assert bn.backward(dy, out=dy).dx is dy


def test_masks() -> None:
    p = problem((3, 7, 5, 6))
    mask = rng(4).random((3, 5, 6)) < 0.5
    bn = fastbn.BatchNorm2d(7)
    near(bn(p.x, mask=mask), forward(p.x, mask=mask))
    np.testing.assert_allclose(bn.running_mean, 0.1 * reference.batch_norm_stats(p.x, 1, mask)[1], rtol=1e-5, atol=1e-7)


def test_an_empty_batch_is_not_counted() -> None:
    bn = fastbn.BatchNorm2d(7)
    before = bn.state_dict()
    assert bn(np.empty((0, 7, 5, 6), np.float32)).shape == (0, 7, 5, 6)
    for key, value in bn.state_dict().items():
        same_bits(value, before[key])


def test_repr_names_the_arguments() -> None:
    bn = fastbn.BatchNorm2d(7, eps=0.5, momentum=None, affine=False, layout="NHWC")
    assert repr(bn) == "BatchNorm2d(7, eps=0.5, momentum=None, affine=False, track_running_stats=True, layout='NHWC', activation=None)"
    assert eval(repr(bn).replace("BatchNorm2d", "fastbn.BatchNorm2d")).layout == "NHWC"  # noqa: S307
    assert repr(fastbn.FrozenBatchNorm([0.0], [1.0])) == "FrozenBatchNorm(1 channels, eps=1e-05, layout=None, activation=None)"


@pytest.mark.parametrize("skip", [False, True], ids=["usual", "skip_nonfinite"])
@pytest.mark.parametrize("key", ["running_mean", "running_var", "num_batches_tracked"])
def test_read_only_statistics_are_said_before_anything_is_written(key: str, skip: bool) -> None:
    bn, p, out = fastbn.BatchNorm1d(7, skip_nonfinite=skip), problem((12, 7)), np.zeros((12, 7), np.float32)
    getattr(bn, key).setflags(write=False)
    for call in (lambda: bn(p.x, out=out), bn.reset_running_stats, bn.reset_parameters):
        bn.weight[...] = 3.0
        before = bn.state_dict()
        with pytest.raises(ValueError, match=f"{key} .*is read-only"):
            call()
        assert not out.any()
        for name, v in bn.state_dict().items():
            same_bits(np.atleast_1d(v), np.atleast_1d(before[name]))


def test_what_a_layer_has_in_place_of_an_array_is_named_when_a_state_is_loaded() -> None:
    bn = fastbn.BatchNorm1d(7)
    state = bn.state_dict()
    for number in (3, bn.num_batches_tracked + 1):
        bn.num_batches_tracked = number
        for call in (bn.state_dict, lambda: bn.load_state_dict(state), bn.reset_running_stats):
            with pytest.raises(TypeError, match=r"num_batches_tracked of the layer must be a numpy\.ndarray, got int"):
                call()


def test_statistics_that_may_skip_a_batch_share_no_memory() -> None:
    bn, p, out = fastbn.BatchNorm1d(7, skip_nonfinite=True), problem((12, 7)), np.zeros((12, 7), np.float32)
    bn.running_mean = out[0]
    with pytest.raises(ValueError, match="out and running_mean share memory"):
        bn(p.x, out=out)
    bn.running_mean = bn.running_var
    with pytest.raises(ValueError, match="running_mean and running_var share memory"):
        bn(p.x)


def test_a_frozen_batch_norm_stays_as_it_was_made() -> None:
    """What was set would be printed, and not computed with."""
    frozen = fastbn.FrozenBatchNorm(np.zeros(3), np.ones(3))
    for name, value in {"eps": 3.0, "activation": "relu", "activaton": "relu", "axis": 1}.items():
        with pytest.raises(AttributeError, match=f"folded when it was made, and {name} cannot be set: make another one"):
            setattr(frozen, name, value)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(frozen)))  # noqa: S301
    assert repr(twin) == repr(frozen)


class _Named(fastbn.FrozenBatchNorm):
    def __init__(self, *vectors: Any, name: str):
        self.name = name
        super().__init__(*vectors)


def test_a_subclass_of_a_frozen_batch_norm_has_attributes_of_its_own() -> None:
    frozen = _Named([0.0], [4.0], name="first")
    frozen.name = "last"
    x = rng().normal(size=(2, 1)).astype("f")
    y = frozen(x)
    for twin in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):  # noqa: S301
        assert twin.name == "last"
        same_bits(twin(x), y)
    del frozen.name
    assert not hasattr(frozen, "name")


@pytest.mark.parametrize("kind", [fastbn.FrozenBatchNorm, lambda *vectors: _Named(*vectors, name="")], ids=["itself", "subclass"])
@pytest.mark.parametrize("name", ["eps", "layout", "axis", "activation", "num_features", "scale", "shift", "running_var", "weight"])
def test_what_a_frozen_batch_norm_computes_with_is_neither_set_nor_deleted(kind: Any, name: str) -> None:
    frozen = kind([0.0], [1.0])
    before = repr(frozen), frozen.scale
    for change, what in ((lambda: setattr(frozen, name, None), "set"), (lambda: delattr(frozen, name), "deleted")):
        with pytest.raises(AttributeError, match=f"{name} cannot be {what}"):
            change()
    assert (repr(frozen), frozen.scale) == before


@pytest.mark.parametrize("residual", [False, True])
def test_a_parameter_may_be_a_tuple_in_eval(residual: bool) -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    plain, other = (fastbn.BatchNorm2d(3, activation="relu").eval() for _ in range(2))
    plain.weight, other.weight = np.array([1, 2, 3], np.float32), (1.0, 2.0, 3.0)  # type: ignore[assignment]
    for layer in (plain, other):
        layer(x, x if residual else None)
    np.testing.assert_array_equal(other.backward(x)[0], plain.backward(x)[0])  # type: ignore[arg-type]
