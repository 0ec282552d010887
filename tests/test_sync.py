"""A batch in parts, one a process, gives what one process gives on the whole. Here threads stand for processes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import Member, as_one, cuts, joined, together
from truth import SHAPES, axis_of, near, near_gradient, near_gradients, problem, rng, same_bits

import fastbn
from fastbn import Stats, sync
from fastbn.layout import Array

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])


def real(dtype: str) -> Any:
    return pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("after", [None, "relu", "silu with a residual", "a mask", "silu with a mask", "in place"])
@DTYPES
def test_parts_give_what_the_whole_gives(layout: str, ranks: int, after: Any, dtype: str) -> None:
    axis = axis_of(layout)
    p = problem((9, *SHAPES[layout][1:]), real(dtype), axis, mean=5.0)
    residual = problem(p.x.shape, real(dtype), axis, seed=3).x if after and "residual" in after else None
    mask = rng(4).random(np.delete(p.x.shape, axis)) < 0.6 if after and "mask" in after else None
    if mask is not None:
        mask[1] = False
    activation = None if after in (None, "a mask") else "leaky_relu" if after == "in place" else after.split()[0]
    options: dict[str, Any] = {"layout": layout, "activation": activation}
    wrt = ("x", "weight", "bias", *(["residual"] if residual is not None else []))
    moved = p.mean.copy(), p.var.copy()
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *moved, residual=residual, mask=mask, **options)
    g = fastbn.batch_norm_backward(p.dy, p.x, saved, wrt=wrt)

    def work(rank: int, communicator: Member) -> Any:
        cut = cuts(9, ranks)[rank]
        x, dy, own = p.x[cut].copy(), p.dy[cut].copy(), (p.mean.copy(), p.var.copy())
        r, m = (None if a is None else a[cut] for a in (residual, mask))
        out = x if after == "in place" else None
        found, kept = sync.batch_norm_forward(
            x, p.weight, p.bias, *own, residual=r, mask=m, out=out, communicator=communicator, **options
        )
        back: dict[str, Any] = {"from_output": True, "out": dy} if out is not None else {}
        return found.copy(), sync.batch_norm_backward(dy, x, kept, communicator=communicator, wrt=wrt, **back), own

    found, messages = together(ranks, work)
    channels = p.x.shape[axis]
    digits = 8 if dtype == "float64" else 4
    assert messages == [("all_gather", 8 + 4 * digits * channels), ("all_reduce", 16 * channels)]
    ys, gradients, statistics = zip(*found, strict=True)
    as_one(joined(ys), y)
    for rank in range(ranks):
        for own, first, whole in zip(statistics[rank], statistics[0], moved, strict=True):
            same_bits(own, first)
            np.testing.assert_allclose(own, whole, rtol=1e-6)
    truth = [None if v is None else v.astype(np.float64) for v in g]
    if dtype == "bfloat16" and (after == "relu" or after == "in place"):  # a rounded y may lie on the other side of 0
        return
    as_one(joined([v.dx for v in gradients]), truth[0], np.max(np.abs(truth[0])))  # type: ignore[arg-type]
    if residual is not None:
        as_one(joined([v.dresidual for v in gradients]), truth[3])
    count = np.sqrt(p.x.size / channels)
    as_one(np.sum([v.dweight for v in gradients], 0), truth[1], count)
    as_one(np.sum([v.dbias for v in gradients], 0), truth[2], count)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_layers_share_a_batch(layout: str) -> None:
    axis = axis_of(layout)
    p = problem((9, *SHAPES[layout][1:]), np.float32, axis)
    whole = fastbn.BatchNorm2d(4, layout=layout, activation="silu")  # type: ignore[arg-type]
    ys = [whole(p.x) for _ in range(2)]
    g = whole.backward(p.dy)

    def work(rank: int, communicator: Member) -> Any:
        bn = fastbn.BatchNorm2d(4, layout=layout, activation="silu", communicator=communicator)  # type: ignore[arg-type]
        x = p.x[cuts(9, 4)[rank]]
        y = [bn(x) for _ in range(2)][1]
        back = bn.backward(p.dy[cuts(9, 4)[rank]])
        twin = copy.deepcopy(bn)
        assert twin.communicator is communicator
        twin(x)
        bn.eval()(x)
        bn.backward(p.dy[cuts(9, 4)[rank]])  # asks nobody
        return y, back, bn.state_dict()

    found, messages = together(4, work)
    assert [kind for kind, _ in messages] == ["all_gather"] * 2 + ["all_reduce", "all_gather"]
    as_one(joined([y for y, *_ in found]), ys[1])
    as_one(joined([back.dx for _, back, _ in found]), g.dx)
    for *_, state in found:
        for key, v in state.items():
            same_bits(np.atleast_1d(v), np.atleast_1d(found[0][2][key]))
            np.testing.assert_allclose(v, whole.state_dict()[key], rtol=1e-6)


def test_a_bad_batch_on_one_process_leaves_the_statistics_of_all_alone() -> None:
    def work(rank: int, communicator: Member) -> Any:
        bn = fastbn.BatchNorm1d(3, skip_nonfinite=True, communicator=communicator)
        x = rng(rank).standard_normal((4, 3)).astype(np.float32)
        bn(x)
        before = bn.state_dict()
        x[0, rank] = np.inf if rank == 1 else x[0, rank]
        bn(x)
        return before, bn.state_dict(), bn.num_batches_skipped

    for before, after, skipped in together(3, work)[0]:
        assert skipped == 1
        for key, v in after.items():
            same_bits(np.atleast_1d(v), np.atleast_1d(before[key]))


def test_a_batch_that_is_empty_everywhere_moves_nothing() -> None:
    def work(rank: int, communicator: Member) -> Any:
        bn = fastbn.BatchNorm1d(3, communicator=communicator)
        y = bn(np.zeros((0, 3), np.float32))
        return y, bn.backward(y), bn.state_dict()

    for y, g, state in together(2, work)[0]:
        assert y.shape == g.dx.shape == (0, 3)
        assert not g.dweight.any()
        assert (state["running_mean"].any(), state["num_batches_tracked"]) == (False, 0)


def test_one_value_in_all_is_too_few_on_every_process() -> None:
    def work(rank: int, communicator: Member) -> Any:
        with pytest.raises(ValueError, match="got stats with a count of 1"):
            sync.batch_norm_forward(np.ones((1 - rank, 3)), communicator=communicator)

    together(2, work)


@pytest.mark.parametrize("correction", [0, 1])
def test_masks_that_leave_no_value_are_refused_on_every_process(correction: int) -> None:
    """One without data, too: it would wait for the others in the backward."""

    def work(rank: int, communicator: Member) -> Any:
        x = np.ones((4 * rank, 3))
        with pytest.raises(ValueError, match="got stats with a count of 0"):
            sync.batch_norm_forward(x, mask=np.zeros(len(x), np.bool_), correction=correction, communicator=communicator)

    together(2, work)


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=st.integers(0, 99), far=st.sampled_from([0.0, 1e6, 1e9]))
def test_any_cut_of_a_batch_gives_the_same(sizes: list[int], seed: int, far: float) -> None:
    n = sum(sizes)
    if n < 2:
        return
    x, dy = rng(seed).standard_normal((2, n, 3))
    x += far
    y, saved = fastbn.batch_norm_forward(x)
    g = fastbn.batch_norm_backward(dy, x, saved)
    edges = np.cumsum([0, *sizes])

    def work(rank: int, communicator: Member) -> Any:
        cut = slice(edges[rank], edges[rank + 1])
        own, kept = sync.batch_norm_forward(x[cut], communicator=communicator)
        return own, sync.batch_norm_backward(dy[cut], x[cut], kept, communicator=communicator)

    found, _ = together(len(sizes), work)
    np.testing.assert_allclose(joined([own for own, _ in found]), y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(joined([back.dx for _, back in found]), g.dx, rtol=0, atol=1e-11 * abs(saved.invstd).max())


@DTYPES
def test_merging_over_processes_is_merging_in_the_order_of_the_ranks(dtype: str) -> None:
    x = (1e3 + rng().standard_normal((3, 2, 8, 3))).astype(real(dtype))
    parts = [[fastbn.batch_norm_stats(layer) for layer in rank] for rank in x]
    found, messages = together(3, lambda rank, c: sync.merge(parts[rank], c))
    assert [kind for kind, _ in messages] == ["all_gather"]
    for merged in found:
        assert merged == found[0]
        for layer, s in enumerate(merged):
            assert (s.count, s.mean.dtype) == (24, np.float64)
            want = parts[0][layer].merge(*(p[layer] for p in parts[1:]))
            np.testing.assert_allclose(s.mean + s.mean_lo, want.mean.astype(float) + want.mean_lo, rtol=1e-13)
            np.testing.assert_allclose(s.var, want.var.astype(float) + want.var_lo, rtol=1e-12)
    own = together(3, lambda rank, c: sync.batch_norm_stats(x[rank, 0], c))[0]
    whole = parts[0][0].merge(parts[1][0], parts[2][0])
    assert own[0] == own[1] == own[2]
    np.testing.assert_allclose(own[0].mean, whole.mean.astype(float) + whole.mean_lo, rtol=1e-13)
    np.testing.assert_allclose(own[0].var, whole.var.astype(float) + whole.var_lo, rtol=1e-12)


def test_alone_is_the_communicator_of_one_process() -> None:
    p = problem((6, 4, 3))
    y, saved = sync.batch_norm_forward(p.x, p.weight, p.bias, communicator=sync.Alone())
    want, kept = fastbn.batch_norm_forward(p.x, p.weight, p.bias)
    near(y, want.astype(np.float64))
    back = sync.batch_norm_backward(p.dy, p.x, saved, communicator=sync.Alone())
    near_gradients(back, tuple(np.asarray(v, np.float64) for v in fastbn.batch_norm_backward(p.dy, p.x, kept)[:3]))  # type: ignore[arg-type]
    empty = Stats(5, np.ones(0), np.ones(0))
    assert sync.merge([], sync.Alone()) == []
    assert sync.merge([empty], sync.Alone()) == [empty]
    many = Stats(2**53, [0.0], [1.0])
    assert sync.merge([many], sync.Alone()) == [many]


def test_a_communicator_is_of_its_process() -> None:
    bn = fastbn.BatchNorm1d(3, communicator=sync.Alone())
    assert copy.copy(bn).communicator is bn.communicator
    assert "communicator=" in repr(bn)
    with pytest.raises(TypeError, match=r"fastbn\.sync\.Alone belongs to its process and cannot be pickled"):
        pickle.dumps(bn)
    bn.communicator = None
    assert pickle.loads(pickle.dumps(bn)).communicator is None  # noqa: S301  our own


class Wrong(sync.Alone):
    """Returns something else."""

    def __init__(self, gathered: Any, reduced: Any = None):
        self.gathered, self.reduced = gathered, reduced

    def all_gather(self, array: Array) -> Any:
        return array[None] if self.gathered is None else self.gathered(array)

    def all_reduce(self, array: Array) -> Any:
        return self.reduced(array)


def backward(communicator: Any) -> Any:
    x = np.ones((2, 3))
    return sync.batch_norm_backward(x, x, sync.batch_norm_forward(x, communicator=communicator)[1], communicator=communicator)


X = np.ones((2, 3))
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "none": (TypeError, "must have the methods all_gather and all_reduce, got None", lambda: sync.batch_norm_stats(X, None)),  # type: ignore[arg-type]
    "layer": (TypeError, "communicator must have the methods", lambda: fastbn.BatchNorm1d(3, communicator=3)),  # type: ignore[arg-type]
    "backward": (TypeError, "communicator must have the methods", lambda: sync.batch_norm_backward(X, X, None, communicator=3)),  # type: ignore[arg-type]
    "saved": (TypeError, "saved must be what", lambda: sync.batch_norm_backward(X, X, None, communicator=sync.Alone())),  # type: ignore[arg-type]
    "no parts": (TypeError, "parts must be a sequence of Stats, got NoneType", lambda: sync.merge(None, sync.Alone())),  # type: ignore[arg-type]
    "scalar": (TypeError, "parts must be a sequence of Stats, got ndarray", lambda: sync.merge(np.array(0), sync.Alone())),  # type: ignore[arg-type]
    "parts": (TypeError, "parts must be a sequence of Stats, got int in it", lambda: sync.merge([3], sync.Alone())),  # type: ignore[list-item]
    "flat": (ValueError, r"all_gather must return a float64 array of shape \(ranks, 13\), got float64 and \(13,\)",
             lambda: sync.batch_norm_stats(X, Wrong(lambda a: a))),
    "narrow": (ValueError, "got float32 and", lambda: sync.batch_norm_stats(X, Wrong(lambda a: a[None].astype(np.float32)))),
    "no count": (ValueError, "begins with a count, got nan there", lambda: sync.batch_norm_stats(X, Wrong(lambda a: a[None] * np.nan))),
    "half": (ValueError, "begins with a count, got 0.5 there", lambda: sync.batch_norm_stats(X, Wrong(lambda a: a[None] / 4))),
    "nobody": (ValueError, r"got float64 and \(0, 13\)", lambda: sync.batch_norm_stats(X, Wrong(lambda a: a[None][:0]))),
    "nothing": (ValueError, r"all_reduce must return a float64 array of shape \(2, 3\), got object and \(\)",
                lambda: backward(Wrong(None, lambda a: None))),
    "axes": (ValueError, "must have at least 2 axes", lambda: sync.batch_norm_stats(np.ones(3), sync.Alone())),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name: str) -> None:
    error, message, call = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_what_a_communicator_raises_goes_through_and_nothing_is_moved() -> None:
    def fail(array: Array) -> Array:
        raise ConnectionError("rank 3 is gone")

    mean, var, dy = np.zeros(3), np.ones(3), np.ones((2, 3))
    with pytest.raises(ConnectionError, match="rank 3 is gone"):
        sync.batch_norm_forward(X, None, None, mean, var, communicator=Wrong(fail))
    assert not mean.any()
    lost = Wrong(None, fail)
    _, saved = sync.batch_norm_forward(X, communicator=lost)
    with pytest.raises(ConnectionError, match="rank 3 is gone"):
        sync.batch_norm_backward(dy, X, saved, communicator=lost, out=dy)
    assert (dy == 1).all()


@pytest.mark.parametrize(
    ("dtype", "std"), [*(("float32", std) for std in (1e-30, 1e-20, 1e20, 1e30)), ("float64", 1e-150), ("float64", 1e150)]
)
def test_values_at_the_ends_of_the_range_over_processes(dtype: str, std: float) -> None:
    p = problem((16, 4, 3), dtype)
    x = (p.x * std).astype(dtype)
    eps = 0.0 if std < 1 else 1e-5
    y, saved = fastbn.batch_norm_forward(x, p.weight, p.bias, eps=eps)
    g = fastbn.batch_norm_backward(p.dy, x, saved)

    def work(rank: int, communicator: Member) -> Any:
        cut = slice(8 * rank, 8 * rank + 8)
        own, kept = sync.batch_norm_forward(x[cut], p.weight, p.bias, eps=eps, communicator=communicator)
        return own, sync.batch_norm_backward(p.dy[cut], x[cut], kept, communicator=communicator).dx

    ys, dxs = zip(*together(2, work)[0], strict=True)
    near(joined(ys), y.astype(np.float64))
    assert g.dx is not None
    near_gradient(joined(dxs), g.dx.astype(np.float64))


def test_far_means_keep_their_digits_over_processes() -> None:
    x = (1e6 + rng().standard_normal((64, 4))).astype(np.float32)
    truth = x.astype(np.float64)
    truth = (truth - truth.mean(0)) / np.sqrt(truth.var(0) + 1e-5)
    found, _ = together(4, lambda rank, c: sync.batch_norm_forward(x[rank * 16 : rank * 16 + 16], communicator=c)[0])
    near(joined(found), truth)
