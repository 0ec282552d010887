"""Every mistake is answered with the name of the argument, what was expected and what came; and nothing is modified."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Any

import numpy as np
import pytest
from truth import same_bits
from ways import pinned_by_environment

import fastbn

pytestmark = pytest.mark.usefixtures("kernel")

F32 = np.float32
X = np.arange(2 * 4 * 3 * 3, dtype=F32).reshape(2, 4, 3, 3)
SQUARE = np.zeros((4, 4), F32)
ZEROS, ONES, EIGHT = np.zeros(4, F32), np.ones(4, F32), np.zeros(8, F32)


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def saved() -> fastbn.Saved:
    return fastbn.batch_norm_forward(X)[1]


def overlapping() -> Any:
    """An `out` that is one row ahead of x, in one buffer."""
    buffer = np.zeros((3, 4, 3, 3), F32)
    return buffer[:-1], buffer[1:]


Case = tuple[type[Exception], Sequence[str], Callable[[], object]]

# What must be said whatever the function: the mistake, the exception, what the message holds.
INPUTS: dict[str, tuple[type[Exception], Sequence[str], dict[str, Any]]] = {
    "x-list": (TypeError, ["x must be a numpy.ndarray", "list"], {"x": X.tolist()}),
    "x-none": (TypeError, ["x must be a numpy.ndarray", "NoneType"], {"x": None}),
    "x-int": (TypeError, ["x must have dtype float32, float64, float16, bfloat16", "int64"], {"x": X.astype(np.int64)}),
    "x-complex": (TypeError, ["x must have dtype", "complex64"], {"x": X.astype(np.complex64)}),
    "x-bool": (TypeError, ["x must have dtype", "bool"], {"x": X > 1}),
    "x-longdouble": (TypeError, ["x must have dtype", f"got {np.dtype(np.longdouble)}"], {"x": X.astype(np.longdouble)}),
    "x-big-endian": (TypeError, ["x must have dtype", "native byte order", ">f4"], {"x": X.astype(">f4")}),
    "x-vector": (ValueError, ["x must have at least 2 axes", "got 1"], {"x": ZEROS}),
    "x-scalar": (ValueError, ["x must have at least 2 axes", "got 0"], {"x": np.array(1, F32)}),
    "layout-unknown": (ValueError, ["layout must be one of NC, NCL, NCHW", "channels_last", "got 'NWHC'"], {"layout": "NWHC"}),
    "layout-lower-case": (ValueError, ["layout must be one of", "got 'nchw'"], {"layout": "nchw"}),
    "layout-empty": (ValueError, ["layout must be one of", "got ''"], {"layout": ""}),
    "layout-number": (ValueError, ["layout must be one of", "got 1"], {"layout": 1}),
    "layout-rank": (ValueError, ["layout 'NCL' is for arrays with 3 axes", "x has 4"], {"layout": "NCL"}),
}
PARAMETERS = {
    "weight-shape": (ValueError, ["x has 4 channels on axis 1", "weight has shape (8,)"], {"weight": EIGHT}),
    "weight-axes": (ValueError, ["x has 4 channels on axis 1", "weight has shape (4, 1, 1)"], {"weight": ONES[:, None, None]}),
    "weight-scalar": (ValueError, ["x has 4 channels on axis 1", "weight has shape ()"], {"weight": 1.0}),
    "weight-complex": (TypeError, ["weight must hold real numbers", "complex64"], {"weight": ONES + 1j}),
    "weight-bool": (TypeError, ["weight must hold real numbers", "bool"], {"weight": ONES > 0}),
    "weight-text": (TypeError, ["weight must hold real numbers", "<U1"], {"weight": ["1", "2", "3", "4"]}),
    "bias-shape": (ValueError, ["x has 4 channels on axis 1", "bias has shape (8,)"], {"bias": EIGHT}),
    "bias-complex": (TypeError, ["bias must hold real numbers", "complex64"], {"bias": ONES + 1j}),
    "bias-last": (
        ValueError,
        ["x has 4 channels on axis 3", "bias has shape (8,)"],
        {"x": X.reshape(2, 3, 3, 4), "bias": EIGHT, "layout": "NHWC"},
    ),
}
OUT = {
    "out-list": (TypeError, ["out must be a numpy.ndarray", "list"], {"out": X.tolist()}),
    "out-shape": (ValueError, ["out must have the shape of x", "(2, 4, 3, 3)", "(2, 4, 9)"], {"out": np.zeros((2, 4, 9), F32)}),
    "out-dtype": (TypeError, ["out must have the dtype of x", "float32", "float64"], {"out": X.astype(np.float64)}),
    "out-read-only": (ValueError, ["out is read-only"], {"out": read_only(X)}),
    "out-repeats": (
        ValueError,
        ["out has several elements in one place of memory", "(2, 4, 3, 3)", "strides"],
        {"out": np.lib.stride_tricks.as_strided(np.zeros(4, F32), X.shape, (0, 4, 0, 0))},
    ),
    "out-overlap": (ValueError, ["out overlaps x in part"], dict(zip(("x", "out"), overlapping(), strict=True))),
    "out-transposed": (ValueError, ["out overlaps x in part"], {"x": SQUARE, "out": SQUARE.T}),
    "out-reversed": (ValueError, ["out overlaps x in part"], {"x": SQUARE, "out": SQUARE[::-1]}),
}
NUMBERS = {
    "eps-text": (TypeError, ["eps must be a number", "'1e-5'"], {"eps": "1e-5"}),
    "eps-none": (TypeError, ["eps must be a number", "None"], {"eps": None}),
    "eps-bool": (TypeError, ["eps must be a number", "True"], {"eps": True}),
    "eps-array": (TypeError, ["eps must be a number", "array"], {"eps": ONES}),
    "momentum-none": (TypeError, ["momentum must be a number", "None"], {"momentum": None}),
    "momentum-text": (TypeError, ["momentum must be a number", "'0.1'"], {"momentum": "0.1"}),
}
MASKS = {
    "mask-list": (TypeError, ["mask must be a numpy.ndarray", "list"], {"mask": [True]}),
    "mask-int": (TypeError, ["mask must be boolean", "int64"], {"mask": np.ones((2, 3, 3), np.int64)}),
    "mask-shape": (
        ValueError,
        ["mask must broadcast to (2, 3, 3)", "without the channel axis", "(2, 4, 3, 3)"],
        {"mask": np.ones(X.shape, np.bool_)},
    ),
    "mask-short": (ValueError, ["mask must broadcast to (2, 3, 3)", "(2,)"], {"mask": np.ones(2, np.bool_)}),
}
UPDATED = {
    "running_mean-list": (TypeError, ["running_mean must be a numpy.ndarray", "list"], {"running_mean": [0.0] * 4}),
    "running_var-list": (TypeError, ["running_var must be a numpy.ndarray", "list"], {"running_var": [0.0] * 4}),
    "running_mean-shape": (ValueError, ["x has 4 channels on axis 1", "running_mean has shape (8,)"], {"running_mean": EIGHT}),
    "running_var-shape": (ValueError, ["x has 4 channels on axis 1", "running_var has shape (8,)"], {"running_var": EIGHT}),
    "running_mean-int": (
        TypeError,
        ["running_mean is updated in place", "floating dtype", "int64"],
        {"running_mean": np.zeros(4, np.int64)},
    ),
    "running_var-read-only": (ValueError, ["running_var is updated in place", "read-only"], {"running_var": read_only(ONES)}),
    "one-value": (
        ValueError,
        ["Expected more than 1 value per channel when training", "(1, 4, 1, 1)"],
        {"x": np.zeros((1, 4, 1, 1), F32)},
    ),
    "one-in-mask": (
        ValueError,
        ["Expected more than 1 value per channel when training", "(2, 4, 3, 3)", "1 True"],
        {"mask": np.eye(1, 18, dtype=np.bool_).reshape(2, 3, 3)},
    ),
    "running_mean-in-x": (
        ValueError,
        ["running_mean and x share memory", "the call writes running_mean"],
        {"x": SQUARE, "running_mean": SQUARE[0]},
    ),
    "running_var-in-x": (
        ValueError,
        ["running_var and x share memory", "the call writes running_var"],
        {"x": SQUARE, "running_var": SQUARE[0]},
    ),
    "none-in-mask": (ValueError, ["Expected more than 1 value per channel", "0 True"], {"mask": np.zeros((2, 3, 3), np.bool_)}),
}
GIVEN = {
    "no-mean": (ValueError, ["running_mean and running_var must be given when training is False"], {"running_mean": None}),
    "no-var": (ValueError, ["running_mean and running_var must be given when training is False"], {"running_var": None}),
    "mean-shape": (ValueError, ["x has 4 channels on axis 1", "running_mean has shape (8,)"], {"running_mean": EIGHT}),
    "var-shape": (ValueError, ["x has 4 channels on axis 1", "running_var has shape (8,)"], {"running_var": EIGHT}),
    "var-complex": (TypeError, ["running_var must hold real numbers", "complex64"], {"running_var": ONES.astype(np.complex64)}),
}

FORWARD = INPUTS | PARAMETERS | OUT | NUMBERS | MASKS


def params(table: dict[str, Any]) -> list[Any]:
    return [pytest.param(*row, id=name) for name, row in table.items()]


def fails(error: type[Exception], holds: Sequence[str], call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for part in holds:
        assert part in str(caught.value)


def attempt(function: Callable[..., object], error: type[Exception], holds: Sequence[str], wrong: dict[str, Any], **right: Any) -> None:
    """Call with one mistake, and see that what could have been written to was not."""
    arguments: dict[str, Any] = {"x": X, "running_mean": ZEROS.copy(), "running_var": ONES.copy()} | right | wrong
    arrays = {name: (a, a.copy()) for name, a in arguments.items() if isinstance(a, np.ndarray)}
    fails(error, holds, lambda: function(**arguments))
    for a, before in arrays.values():
        np.testing.assert_array_equal(a, before)


@pytest.mark.parametrize(("error", "holds", "wrong"), params(FORWARD | UPDATED))
def test_training(error: type[Exception], holds: Sequence[str], wrong: dict[str, Any]) -> None:
    attempt(fastbn.batch_norm_forward, error, holds, wrong, **({} if "out" in wrong else {"out": np.full_like(wrong.get("x", X), 7)}))
    attempt(fastbn.batch_norm, error, holds, wrong, training=True)


@pytest.mark.parametrize(("error", "holds", "wrong"), params(FORWARD | GIVEN))
def test_inference(error: type[Exception], holds: Sequence[str], wrong: dict[str, Any]) -> None:
    attempt(fastbn.batch_norm, error, holds, wrong, **({} if "out" in wrong else {"out": np.full_like(wrong.get("x", X), 7)}))
    attempt(fastbn.batch_norm_forward, error, holds, wrong, training=False)


@pytest.mark.parametrize(("error", "holds", "wrong"), params(INPUTS | MASKS))
def test_stats(error: type[Exception], holds: Sequence[str], wrong: dict[str, Any]) -> None:
    fails(error, holds, lambda: fastbn.batch_norm_stats(**({"x": X} | wrong)))


STATISTICS = {
    "mean-shape": (ValueError, ["x has 4 channels on axis 1", "mean has shape (8,)"], {"mean": EIGHT}),
    "mean-none": (ValueError, ["mean must not be None", "x has 4 channels on axis 1"], {"mean": None}),
    "invstd-shape": (ValueError, ["x has 4 channels on axis 1", "invstd has shape (8,)"], {"invstd": EIGHT}),
    "invstd-complex": (TypeError, ["invstd must hold real numbers", "complex"], {"invstd": ONES + 1j}),
}


@pytest.mark.parametrize(("error", "holds", "wrong"), params(INPUTS | PARAMETERS | OUT | STATISTICS))
def test_elemt(error: type[Exception], holds: Sequence[str], wrong: dict[str, Any]) -> None:
    out = {} if "out" in wrong else {"out": np.full_like(wrong.get("x", X), 7)}
    arguments = {"x": X, "mean": ZEROS, "invstd": ONES} | out | wrong
    before = np.copy(arguments["out"])
    fails(error, holds, lambda: fastbn.batch_norm_elemt(**arguments))
    np.testing.assert_array_equal(arguments["out"], before)


DY = {
    "dy-list": (TypeError, ["dy must be a numpy.ndarray", "list"], {"dy": X.tolist()}),
    "dy-shape": (ValueError, ["dy must have the shape of x", "(2, 4, 3, 3)", "(2, 4, 9)"], {"dy": X.reshape(2, 4, 9)}),
    "dy-dtype": (TypeError, ["dy must have the dtype of x", "float32", "float64"], {"dy": X.astype(np.float64)}),
}
SUMS = {
    "sum_dy-shape": (ValueError, ["x has 4 channels on axis 1", "sum_dy has shape (8,)"], {"sum_dy": EIGHT}),
    "sum_dy_xmu-shape": (ValueError, ["x has 4 channels on axis 1", "sum_dy_xmu has shape (8,)"], {"sum_dy_xmu": EIGHT}),
    "weight-shape": (ValueError, ["x has 4 channels on axis 1", "weight has shape (8,)"], {"weight": EIGHT}),
    "count-float": (TypeError, ["count must be an int", "18.0"], {"count": 18.0}),
    "count-bool": (TypeError, ["count must be an int", "True"], {"count": True}),
    "count-zero": (ValueError, ["count must be at least 1", "got 0"], {"count": 0}),
}


@pytest.mark.parametrize(("error", "holds", "wrong"), params(INPUTS | DY | STATISTICS))
def test_backward_reduce(error: type[Exception], holds: Sequence[str], wrong: dict[str, Any]) -> None:
    fails(error, holds, lambda: fastbn.batch_norm_backward_reduce(**({"dy": X, "x": X, "mean": ZEROS, "invstd": ONES} | wrong)))


@pytest.mark.parametrize(("error", "holds", "wrong"), params(INPUTS | DY | STATISTICS | SUMS | OUT))
def test_backward_elemt(error: type[Exception], holds: Sequence[str], wrong: dict[str, Any]) -> None:
    like = wrong.get("x", X) if "out" in wrong else X
    right = {"dy": np.ones_like(like), "x": X, "mean": ZEROS, "invstd": ONES, "weight": None}
    right |= {"sum_dy": ZEROS, "sum_dy_xmu": ZEROS, "count": 18}
    fails(error, holds, lambda: fastbn.batch_norm_backward_elemt(**(right | wrong)))


BACKWARD: dict[str, Case] = {
    "saved-tuple": (
        TypeError,
        ["saved must be what batch_norm_forward returned", "tuple"],
        lambda: fastbn.batch_norm_backward(X, X, fastbn.batch_norm_forward(X)),  # type: ignore[arg-type]
    ),
    "saved-dtype": (
        TypeError,
        ["saved is of a forward whose x had dtype float32", "x has dtype float64"],
        lambda: fastbn.batch_norm_backward(X.astype(np.float64), X.astype(np.float64), saved()),
    ),
    "saved-channels": (
        ValueError,
        ["saved is of a forward whose x had shape (2, 4, 3, 3)", "x has shape (2, 3, 3, 3)"],
        lambda: fastbn.batch_norm_backward(X[:, :3], X[:, :3], saved()),
    ),
    "saved-mask": (
        ValueError,
        ["saved is of a forward whose x had shape (2, 4, 3, 3)", "x has shape (1, 4, 3, 3)"],
        lambda: fastbn.batch_norm_backward(X[:1], X[:1], fastbn.batch_norm_forward(X, mask=np.ones((2, 3, 3), np.bool_))[1]),
    ),
    "saved-layout": (
        ValueError,
        ["saved is of a forward whose x had shape (2, 4, 3, 3)", "x has shape (4, 4)"],
        lambda: fastbn.batch_norm_backward(SQUARE, SQUARE, fastbn.batch_norm_forward(X, layout="NHWC")[1]),
    ),
    "wrt-unknown": (
        ValueError,
        ["wrt may name 'x', 'weight', 'bias' and 'residual'", "got 'gamma'"],
        lambda: fastbn.batch_norm_backward(X, X, saved(), wrt=["x", "gamma"]),
    ),
    "wrt-joined": (ValueError, ["wrt may name", "got 'x,weight'"], lambda: fastbn.batch_norm_backward(X, X, saved(), wrt="x,weight")),
    "out-without-dx": (
        ValueError,
        ["out is where dx goes", "wrt does not name 'x'"],
        lambda: fastbn.batch_norm_backward(X, X, saved(), wrt=["bias"], out=np.zeros_like(X)),
    ),
    "out-overlaps-dy": (
        ValueError,
        ["out overlaps dy in part"],
        lambda: _backward_overlap("dy"),
    ),
    "out-overlaps-x": (ValueError, ["out overlaps x in part"], lambda: _backward_overlap("x")),
    **{
        f"{name}": (error, holds, lambda wrong=wrong: fastbn.batch_norm_backward(**({"dy": X, "x": X, "saved": saved()} | wrong)))
        for name, (error, holds, wrong) in (DY | {k: v for k, v in OUT.items() if "x" not in v[2]}).items()
    },
}


def _backward_overlap(which: str) -> object:
    a, out = overlapping()
    arguments = {"dy": X, "x": X} | {which: a}
    return fastbn.batch_norm_backward(**arguments, saved=saved(), out=out)


@pytest.mark.parametrize(("error", "holds", "call"), params(BACKWARD))
def test_backward(error: type[Exception], holds: Sequence[str], call: Callable[[], object]) -> None:
    fails(error, holds, call)


def layer(**arguments: Any) -> fastbn.BatchNorm2d:
    return fastbn.BatchNorm2d(4, **arguments)


LAYERS: dict[str, Case] = {
    "num_features-float": (TypeError, ["num_features must be an int", "4.0"], lambda: fastbn.BatchNorm1d(4.0)),  # type: ignore[arg-type]
    "num_features-zero": (ValueError, ["num_features must be at least 1", "got 0"], lambda: fastbn.BatchNorm1d(0)),
    "dtype-int": (TypeError, ["dtype must be one of float32, float64", "int32"], lambda: layer(dtype=np.int32)),
    "eps-text": (TypeError, ["eps must be a number", "'small'"], lambda: layer(eps="small")),
    "momentum-text": (TypeError, ["momentum must be a number", "'slow'"], lambda: layer(momentum="slow")),
    "layout-unknown": (ValueError, ["layout must be one of", "'HWC'"], lambda: layer(layout="HWC")),
    "layout-rank": (ValueError, ["layout 'NCL' is for arrays with 3 axes", "4"], lambda: layer(layout="NCL")),
    "x-list": (TypeError, ["x must be a numpy.ndarray", "list"], lambda: layer()(X.tolist())),
    "x-axes-1d": (ValueError, ["BatchNorm1d", "2 or 3 axes", "(2, 4, 3, 3)"], lambda: fastbn.BatchNorm1d(4)(X)),
    "x-axes-2d": (ValueError, ["BatchNorm2d", "4 axes", "(4, 4)"], lambda: layer()(SQUARE)),
    "x-axes-3d": (ValueError, ["BatchNorm3d", "5 axes", "(2, 4, 3, 3)"], lambda: fastbn.BatchNorm3d(4)(X)),
    "x-dtype": (TypeError, ["x must have the dtype of the layer", "float32", "float64"], lambda: layer()(X.astype(np.float64))),
    "x-channels": (ValueError, ["x has 3 channels on axis 3", "num_features=4"], lambda: layer(layout="NHWC")(X)),
    "one-value": (ValueError, ["Expected more than 1 value per channel when training"], lambda: fastbn.BatchNorm1d(4)(ZEROS[None])),
    "backward-first": (RuntimeError, ["backward needs a forward before it"], lambda: layer().backward(X)),
    "freeze": (ValueError, ["track_running_stats=False", "no running statistics"], lambda: layer(track_running_stats=False).freeze()),
    "state-missing": (
        KeyError,
        ["state_dict lacks ['running_mean', 'running_var']\""],  # and of keys too many, no word
        lambda: layer().load_state_dict({"weight": ONES, "bias": ONES}),
    ),
    "state-unknown": (KeyError, ["dict has unknown ['gamma']"], lambda: layer().load_state_dict(layer().state_dict() | {"gamma": ONES})),
    "state-shape": (
        ValueError,
        ["bias must have shape (4,)", "(8,)"],
        lambda: layer().load_state_dict(layer().state_dict() | {"bias": EIGHT}),
    ),
    "frozen-mean": (ValueError, ["running_mean must have shape (C,)", "(4, 4)"], lambda: fastbn.FrozenBatchNorm(SQUARE, ONES)),
    "frozen-var": (ValueError, ["running_mean has 4 channels", "running_var has shape (8,)"], lambda: fastbn.FrozenBatchNorm(ZEROS, EIGHT)),
    "frozen-no-var": (ValueError, ["running_var must not be None", "has 4 channels"], lambda: fastbn.FrozenBatchNorm(ZEROS, None)),
    "frozen-weight": (
        ValueError,
        ["running_mean has 4 channels", "weight has shape (1,)"],
        lambda: fastbn.FrozenBatchNorm(ZEROS, ONES, ONES[:1]),
    ),
    "frozen-eps": (TypeError, ["eps must be a number", "None"], lambda: fastbn.FrozenBatchNorm(ZEROS, ONES, eps=None)),
    "frozen-channels": (ValueError, ["x has 3 channels on axis 1", "layer has 4"], lambda: fastbn.FrozenBatchNorm(ZEROS, ONES)(X[:, :3])),
    "frozen-x": (TypeError, ["x must have dtype", "int64"], lambda: fastbn.FrozenBatchNorm(ZEROS, ONES)(X.astype(np.int64))),
    "frozen-layout": (ValueError, ["layout must be one of", "'HWC'"], lambda: fastbn.FrozenBatchNorm(ZEROS, ONES, layout="HWC")(X)),
    "frozen-out": (ValueError, ["out is read-only"], lambda: fastbn.FrozenBatchNorm(ZEROS, ONES)(X, out=read_only(X))),
}


@pytest.mark.parametrize(("error", "holds", "call"), params(LAYERS))
def test_layers(error: type[Exception], holds: Sequence[str], call: Callable[[], object]) -> None:
    fails(error, holds, call)


DISPATCH: dict[str, Case] = {
    "kernel": (ValueError, ["kernel must be one of", "reference", "got 'simd_v9'"], lambda: fastbn.use_kernel("simd_v9").__enter__()),
    "explain-op": (
        ValueError,
        ["op must be one of stats, normalize, forward, backward", "'train'"],
        lambda: fastbn.explain("train", X),
    ),
    "explain-layout": (ValueError, ["layout 'NC' is for arrays with 2 axes"], lambda: fastbn.explain("stats", X, "NC")),
    "explain-dtype": (TypeError, ["x must have dtype float32", "int64"], lambda: fastbn.explain("stats", X.astype(np.int64))),
    "merge": (
        ValueError,
        ["merge needs statistics of 4 channels", "got 3"],
        lambda: fastbn.batch_norm_stats(X).merge(fastbn.batch_norm_stats(X[:, :3])),
    ),
}


@pytest.mark.parametrize(("error", "holds", "call"), params(DISPATCH))
def test_dispatch(error: type[Exception], holds: Sequence[str], call: Callable[[], object]) -> None:
    fails(error, holds, call)


def test_a_failed_forward_leaves_the_layer_as_it_was() -> None:
    bn = layer()
    bn(X)
    before = bn.state_dict()
    for wrong in (X[:, :3], X.astype(np.float64), SQUARE, np.zeros((1, 4, 1, 1), F32)):
        with pytest.raises((TypeError, ValueError)):
            bn(wrong)
    with pytest.raises(ValueError, match="read-only"):
        bn(X, out=read_only(X))
    for key, value in bn.state_dict().items():
        same_bits(value, before[key])


@pytest.mark.parametrize("key", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
@pytest.mark.parametrize("wrong", [EIGHT, np.array("text")], ids=["shape", "text"])
def test_a_failed_load_loads_nothing(key: str, wrong: Any) -> None:
    bn = layer()
    state = {name: value + 1 for name, value in bn.state_dict().items()}
    with pytest.raises((TypeError, ValueError)):
        bn.load_state_dict(state | {key: np.broadcast_to(wrong, state[key].shape) if wrong.dtype.kind == "U" else wrong})
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, state[name] - 1)


def test_the_kernel_is_checked_before_anything_is_modified() -> None:
    mean, x = ZEROS.copy(), X.copy()
    with pinned_by_environment("simd_v9"), pytest.raises(ValueError, match=r"FASTBN_KERNEL must be one of .*, got 'simd_v9'"):
        Context().run(fastbn.batch_norm, x, mean, None, training=True, out=x)  # outside of the fixture's pin
    same_bits(mean, ZEROS)
    same_bits(x, X)


LAST = np.zeros((2, 3, 3, 4), F32)  # channels last
FORGOTTEN: dict[str, Callable[..., object]] = {
    "batch_norm": lambda x: fastbn.batch_norm(x, ZEROS, ONES),
    "batch_norm_forward": lambda x: fastbn.batch_norm_forward(x, ONES, ZEROS),
    "running": lambda x: fastbn.batch_norm_forward(x, None, None, ZEROS.copy(), ONES.copy()),
    "stats": lambda x: fastbn.batch_norm_forward(x, stats=fastbn.Stats.identity(4)),
    "batch_norm_elemt": lambda x: fastbn.batch_norm_elemt(x, mean=ZEROS, invstd=ONES),
    "batch_renorm": lambda x: fastbn.batch_renorm(x, ZEROS.copy(), ONES.copy()),
    "group_norm": lambda x: fastbn.group_norm(x, 1, ONES),
    "BatchNorm2d": lambda x: layer()(x),
    "BatchRenorm2d": lambda x: fastbn.BatchRenorm2d(4)(x),
    "InstanceNorm2d": lambda x: fastbn.InstanceNorm2d(4)(x),
    "GroupNorm": lambda x: fastbn.GroupNorm(2, 4)(x),
    "FrozenBatchNorm": lambda x: fastbn.FrozenBatchNorm(ZEROS, ONES)(x),
}


@pytest.mark.parametrize("call", FORGOTTEN.values(), ids=FORGOTTEN)
def test_a_forgotten_layout_is_asked_for_where_another_axis_fits(call: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"x has 3 channels on axis 1 .*4.*; axis 3 has 4: did you mean layout='channels_last'\?$"):
        call(LAST)
    with pytest.raises(ValueError, match=r"x has 3 channels on axis 1 [^;]*$"):
        call(LAST[..., :2])


def test_a_wrong_layout_is_asked_for_too_and_one_that_fits_is_not() -> None:
    with pytest.raises(ValueError, match=r"x has 3 channels on axis 3 .*; axis 1 has 4: did you mean layout='channels_first'\?$"):
        fastbn.batch_norm(X, ZEROS, ONES, layout="NHWC")
    with pytest.raises(ValueError, match=r"x has 4 channels on axis 1 but weight has shape \(2, 2\)$"):
        fastbn.batch_norm(np.zeros((2, 4, 3, 4), F32), ZEROS, ONES, np.ones((2, 2)))


@pytest.mark.parametrize("kind", [fastbn.BatchNorm1d, fastbn.BatchNorm3d, fastbn.InstanceNorm2d, fastbn.GroupNorm, fastbn.LayerNorm])
def test_a_constructor_without_arguments_names_nothing_private(kind: type) -> None:
    with pytest.raises(TypeError, match=r"^[A-Z]\w+Norm\w*\.__init__\(\) missing"):
        kind()


@pytest.mark.parametrize("make", [layer, lambda: fastbn.GroupNorm(2, 4), lambda: fastbn.InstanceNorm2d(4)], ids=["batch", "group", "image"])
def test_why_there_is_no_backward(make: Callable[[], Any]) -> None:
    bn, x = make(), X.copy()
    with pytest.raises(RuntimeError, match="backward needs a forward before it: call the layer first"):
        bn.backward(X)
    bn(x)
    with pytest.raises(RuntimeError, match="call the layer first"):
        copy.deepcopy(bn).backward(X)
    bn.activation = "relu"
    bn(x, out=x)
    with pytest.raises(RuntimeError, match="which the output has overwritten: pass separate memory as out="):
        bn.backward(X)


def test_a_layer_in_eval_has_no_backward_where_its_sum_was_written_over_the_input() -> None:
    bn, x = layer(activation="relu").eval(), X.copy()
    bn(x, X, out=x)
    with pytest.raises(RuntimeError, match="which the output has overwritten: pass separate memory as out="):
        bn.backward(X)


def test_merge_takes_nothing_but_statistics() -> None:
    with pytest.raises(TypeError, match="merge takes Stats, got int"):
        fastbn.Stats.merge(1)  # type: ignore[arg-type]


def test_a_tensor_is_told_where_tensors_are_taken() -> None:
    tensor = type("Tensor", (), {"__module__": "torch"})()
    with pytest.raises(TypeError, match=r"x must be a numpy.ndarray, got Tensor; fastbn.torch is for tensors$"):
        fastbn.batch_norm(tensor, ZEROS, ONES)


MANY, LONG = 10**5000, np.zeros((30, 30))  # more digits than Python shows, and an array whose repr has many lines
SHOWN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "axis": ("axis must be", lambda v: fastbn.batch_norm_stats(X, axis=v)),
    "axis and layout": ("give axis or layout", lambda v: fastbn.batch_norm_stats(X, axis=v, layout="NC")),
    "layout": ("layout must be", lambda v: fastbn.batch_norm_stats(X, layout=v)),
    "activation": ("activation must be", lambda v: fastbn.FrozenBatchNorm([0.0], [1.0], activation=v)),
    "slope": ("activation: the slope", lambda v: fastbn.FrozenBatchNorm([0.0], [1.0], activation=("leaky_relu", v))),
    "gelu": ("activation takes a parameter", lambda v: fastbn.FrozenBatchNorm([0.0], [1.0], activation=("gelu", v))),
    "forward": ("forward must be", lambda v: fastbn.Activation(v)),
    "dtype": ("dtype must be", lambda v: fastbn.LayerNorm(3, dtype=v)),
    "kernel": ("kernel must be", lambda v: fastbn.use_kernel(v).__enter__()),
    "dtypes": ("dtypes must be", lambda v: fastbn.warmup(v)),
    "layouts": ("layouts must be", lambda v: fastbn.warmup(["float32"], [v])),
    "op": ("op must be", lambda v: fastbn.explain(v, X)),
    "wrt": ("wrt may name", lambda v: fastbn.layer_norm_backward(X, X, fastbn.layer_norm_forward(X, X.shape[-1])[1], wrt=[[v]])),
}


@pytest.mark.parametrize("value", [MANY, LONG, [MANY]], ids=["digits", "array", "both"])
@pytest.mark.parametrize("argument", SHOWN)
def test_an_error_shows_what_came_in_one_line(argument: str, value: Any) -> None:
    begins, call = SHOWN[argument]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(value)
    assert str(caught.value).startswith(begins)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320
