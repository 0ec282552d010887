"""Statistics as one value: the laws of merging, what goes in and comes out, and calls that are given them.

The truth is found in long double from all values together. Digits that `mean` and `var` round away count as well where
a test says so.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from other_process import run
from truth import SHAPES, axis_of, backward, near, near_gradient, near_gradients, problem, rng, same_bits

import fastbn
from fastbn import Stats
from fastbn.layout import Array

LD = np.longdouble
both = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


class Truth(NamedTuple):
    """Statistics in long double; the mean as an offset from a value near it, where long double has digits to spare."""

    origin: Array
    offset: Array
    var: Array


def of_the_whole(x: Array) -> Truth:
    near = x.astype(LD) - x[0]
    mean = near.mean(0)
    return Truth(x[0].astype(LD), mean, np.square(near - mean).mean(0))


def of_parts(parts: Sequence[Stats]) -> Truth:
    """Of all that was in the parts, from what these say: nothing but the merging can be off."""
    counts = np.array([s.count for s in parts], LD)[:, None] / sum(s.count for s in parts)
    origin = parts[0].mean.astype(LD)
    means, variances = (np.array(v) for v in zip(*(all_digits(s, origin) for s in parts), strict=True))
    mean = (counts * means).sum(0)
    return Truth(origin, mean, (counts * (variances + np.square(means - mean))).sum(0))


def all_digits(s: Stats, origin: Any = 0.0) -> tuple[Array, Array]:
    return (s.mean.astype(LD) - origin) + s.mean_lo, s.var.astype(LD) + s.var_lo


def check(s: Stats, truth: Truth, rtol: float, means: float = 0.0) -> None:
    """Within rtol of the variance, and of the standard deviation for the mean; `means` is allowed relative to the mean."""
    mean, var = all_digits(s, truth.origin)
    np.testing.assert_array_less(abs(mean - truth.offset), rtol * np.sqrt(truth.var) + means * abs(s.mean) + 1e-300)
    np.testing.assert_array_less(abs(var - truth.var), rtol * truth.var + 1e-300)
    for high, low in ((s.mean, s.mean_lo), (s.var, s.var_lo)):
        assert (abs(low) <= 0.5 * np.spacing(abs(high)) * (1 + 1e-6)).all(), "the high part alone is not the nearest there is"


def chain(parts: Sequence[Stats]) -> Stats:
    found = parts[0]
    for part in parts[1:]:
        found = found.merge(part)
    return found


def pairs(parts: Sequence[Stats]) -> Stats:
    while len(parts) > 1:
        parts = [parts[i].merge(*parts[i + 1 : i + 2]) for i in range(0, len(parts), 2)]
    return parts[0]


def any_tree(parts: Sequence[Stats], random: Random) -> Stats:
    left = list(parts)
    while len(left) > 1:
        some = [left.pop(random.randrange(len(left))) for _ in range(random.randint(2, len(left)))]
        left.append(some[0].merge(*some[1:]))
    return left[0]


# The laws of merging


# A float32 of 1e9 has a last place of 64, which an x with std 1 would vanish in.
@both
@pytest.mark.parametrize(("mean", "std"), [(0, 1), (3, 1e-3), (1e6, 1), (1e9, 1), (1e15, 1)], ids=str)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=9), seed=st.integers(0, 99), random=st.randoms(use_true_random=False))
def test_any_split_and_any_tree_gives_the_whole(dtype: Any, mean: float, std: float, sizes: list[int], seed: int, random: Random) -> None:
    n = sum(sizes)
    x = (mean + std * rng(seed).standard_normal((n, 3)) * (1 if dtype == np.float64 else max(1, mean / 1e6))).astype(dtype)
    parts = [fastbn.batch_norm_stats(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    for merged in (Stats.merge(*parts), chain(parts), chain(parts[::-1]), pairs(parts), any_tree(parts, random)):
        assert merged.count == n
        if n:
            check(merged, of_the_whole(x), 1e-6 if dtype == np.float32 else 1e-13, means=1e-14 if dtype == np.float32 else 1e-25)


@both
def test_the_order_does_not_matter_and_the_same_order_gives_the_same_bits(dtype: Any) -> None:
    x = (1e3 + rng().standard_normal((60, 3))).astype(dtype)
    parts = [fastbn.batch_norm_stats(x[i : i + 6]) for i in range(0, 60, 6)]
    assert Stats.merge(*parts) == Stats.merge(*parts)
    for seed in range(5):
        check(Stats.merge(*rng(seed).permutation(np.array(parts))), of_parts(parts), 1e-14, means=1e-14)


@both
def test_the_empty_batch_is_the_zero_of_merge(dtype: Any) -> None:
    zero, s = Stats.identity(3, dtype), fastbn.batch_norm_stats(rng().standard_normal((5, 3)).astype(dtype))
    for merged in (zero.merge(s), s.merge(zero), zero.merge(zero, s, zero), s.merge()):
        assert merged == s
    assert zero.merge(zero) == zero == fastbn.batch_norm_stats(np.ones((0, 3), dtype))
    assert zero.count == 0
    # What has no values says nothing, not even its dtype.
    assert Stats.identity(3, np.float64).merge(s).mean.dtype == dtype


@both
def test_batches_of_one_value_merge(dtype: Any) -> None:
    x = (7 + rng().standard_normal((40, 3))).astype(dtype)
    ones = [Stats(1, row, np.zeros(3, dtype)) for row in x]
    for merged in (chain(ones), Stats.merge(*ones), pairs(ones)):
        check(merged, of_the_whole(x), 1e-12 if dtype == np.float32 else 1e-14)  # these are exact in themselves


def in_a_row(times: int, dtype: Any, rtol: float) -> None:
    """Merge a few batches again and again: the statistics stay theirs, and one last place lost each time would show."""
    x = (1e4 + rng().standard_normal((50, 2))).astype(dtype)
    parts = [fastbn.batch_norm_stats(x[i : i + 5]) for i in range(0, 50, 5)]
    found = Stats.identity(2, dtype)
    for i in range(times):
        found = found.merge(parts[i % 10])
    assert found.count == 5 * times
    check(found, of_parts(parts), rtol)


@both
def test_ten_thousand_merges_in_a_row_lose_nothing(dtype: Any) -> None:
    in_a_row(10**4, dtype, 1e-9)


@pytest.mark.slow
def test_a_million_merges_in_a_row_stay_within_1e_6() -> None:
    script = "import numpy; from test_stats import in_a_row; in_a_row(10**6, numpy.float32, 1e-6); print('done')"
    done = run([sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    assert done.stdout == "done\n", done.stderr


def test_a_shift_of_all_values_leaves_the_variance_alone() -> None:
    x = rng().integers(0, 100, (40, 3)).astype(np.float64)
    for shift in (0, 2**20, 10**9, 10**15):
        parts = [fastbn.batch_norm_stats(x[i : i + 4] + shift) for i in range(0, 40, 4)]
        for merged in (chain(parts), Stats.merge(*parts), pairs(parts)):
            check(merged, of_the_whole(x)._replace(origin=x[0] + LD(shift)), 1e-14)


@pytest.mark.parametrize(
    ("few", "many", "var"),
    [
        (Stats(1, [1e160], [0.0]), Stats(10**18, [0.0], [1.0]), 1e302),
        (Stats(1, np.float32([3e19]), np.float32([0])), Stats(2**24, np.float32([0]), np.float32([1])), 9e38 / 2**24),
        (Stats(10**30, [0.0], [1.0]), Stats(10**30, [2.0], [1.0]), 2.0),
    ],
    ids=["float64", "float32", "counts"],
)
def test_products_that_overflow_do_not_where_the_variance_is_finite(few: Stats, many: Stats, var: float) -> None:
    for merged in (few.merge(many), many.merge(few), Stats.identity(1).merge(many, few)):
        np.testing.assert_allclose(merged.var, var, rtol=1e-6 if few.var.dtype == np.float32 else 1e-13)


def test_means_whose_difference_overflows_merge() -> None:
    far = Stats(2, [1.5e308, -1.5e308, 1.0], [0.0, 0.0, 0.0]), Stats(2, [-1.5e308, -1.7e308, 3.0], [0.0, 0.0, 0.0])
    merged = far[0].merge(far[1])
    np.testing.assert_allclose(merged.mean, [0.0, -1.6e308, 2.0], rtol=1e-15, atol=1e300)
    assert np.array_equal(merged.var, [np.inf, np.inf, 1.0])
    assert np.isfinite([merged.mean_lo, merged.var_lo]).all()


def test_one_channel_that_is_not_finite_leaves_the_others_alone() -> None:
    x = rng().standard_normal((8, 4))
    x[2, 1], x[3, 2] = np.inf, np.nan
    merged = fastbn.batch_norm_stats(x[:4]).merge(fastbn.batch_norm_stats(x[4:]))
    assert not np.isfinite(merged.mean[1:3]).any()
    assert np.isnan(merged.var[1:3]).all()
    check(Stats(8, merged.mean[::3], merged.var[::3], merged.mean_lo[::3], merged.var_lo[::3]), of_the_whole(x[:, ::3]), 1e-14)


@pytest.mark.parametrize("integer", [np.int8, np.int32, np.int64, np.uint8, np.uint32])
def test_counts_of_any_integer_type_become_ints_that_do_not_overflow(integer: Any) -> None:
    most = integer(min(np.iinfo(integer).max, 2**63 - 1))
    s = Stats(most, [0.0], [1.0])
    assert type(s.count) is int
    merged = s.merge(s, s, s)
    assert type(merged.count) is int
    assert merged.count == 4 * int(most)
    assert merged.var == 1
    assert pickle.loads(pickle.dumps(merged)) == merged  # noqa: S301  our own


@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_counts_without_axes_are_ints_and_booleans_are_none(integer: Any) -> None:
    assert type(Stats(np.array(3, integer), [0.0], [1.0]).count) is int  # type: ignore[arg-type]
    assert type(Stats.running([0.0], [1.0], np.array(3, integer)).count) is int  # type: ignore[arg-type]
    for wrong in (np.array([3], integer), np.array(True), np.bool_(True), np.timedelta64(3, "s"), "3", None):
        with pytest.raises(TypeError, match="count must be an int"):
            Stats(wrong, [0.0], [1.0])


def test_merging_float32_with_float64_gives_float64_in_any_order() -> None:
    a, b = Stats(2, np.float32([1]), np.float32([1])), Stats(2, [1 + 1e-12], [1.0])
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).mean == 1 + 5e-13
    assert a.merge(b).mean.dtype == np.float64


# What goes in and comes out


@both
def test_concat_joins_channels(dtype: Any) -> None:
    x = (1e5 + rng().standard_normal((20, 5))).astype(dtype)
    whole = Stats.merge(fastbn.batch_norm_stats(x[:7]), fastbn.batch_norm_stats(x[7:]))
    halves = [Stats.merge(fastbn.batch_norm_stats(x[:7, c]), fastbn.batch_norm_stats(x[7:, c])) for c in (slice(2), slice(2, 5))]
    assert Stats.concat(halves) == whole
    assert Stats.concat(half for half in halves) == whole
    assert Stats.concat([whole]) == whole
    assert Stats.concat([whole, Stats(20, np.float32([1]), np.float32([0]))]).mean.dtype == dtype


def variants() -> list[Stats]:
    many = fastbn.batch_norm_stats((1e6 + rng().standard_normal((9, 3))).astype(np.float32))
    exact = Stats(4, [1.0, np.nan, -0.0], [0.0, np.inf, 2.0])
    return [many, many.merge(exact), exact, Stats.identity(3), Stats(3, np.ones(0), np.ones(0)), Stats(1, [1.0], [0.0], [1e-20])]


@pytest.mark.parametrize("s", variants(), ids=range(6))
def test_copies_are_equal_and_hash_alike(s: Stats) -> None:
    copies = [pickle.loads(pickle.dumps(s, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]  # noqa: S301  our own
    copies += [copy.copy(s), copy.deepcopy(s), Stats.from_arrays(s.to_arrays()), Stats(s.count, s.mean, s.var, s.mean_lo, s.var_lo)]
    for other in copies:
        assert other == s
        assert other.mean.dtype == s.mean.dtype
        assert not other.mean.flags.writeable
    assert len({s, *copies}) == 1


def test_counts_that_have_added_up_can_be_carried() -> None:
    most = Stats(10**30, [1.0], [4.0])
    merged = most.merge(most, most)
    assert pickle.loads(pickle.dumps(merged)) == copy.deepcopy(merged) == merged  # noqa: S301  our own
    np.testing.assert_allclose(merged.standard_error, 2 / np.sqrt(3e30))


def test_a_batch_of_any_count_has_gradients() -> None:
    x = rng().standard_normal((6, 3)).astype(np.float32)
    part = fastbn.batch_norm_stats(x)
    whole = Stats(10**30, part.mean, part.var).merge(Stats(10**30, part.mean, part.var))
    saved = fastbn.batch_norm_forward(x, stats=whole)[1]
    assert saved.count == 2 * 10**30
    got = fastbn.batch_norm_backward(x, x, saved, wrt=("weight", "bias"))
    want = fastbn.batch_norm_backward(x, x, fastbn.batch_norm_forward(x)[1])
    np.testing.assert_allclose(got.dweight, want.dweight, rtol=1e-6)  # type: ignore[arg-type]
    sums = fastbn.batch_norm_backward_reduce(x, x, saved.mean, saved.invstd)
    dx = fastbn.batch_norm_backward_elemt(x, x, saved.mean, saved.invstd, None, *sums, whole.count)
    np.testing.assert_allclose(dx, x * saved.invstd, rtol=1e-6)  # what the part adds to the means of the whole is nothing


def test_what_differs_is_not_equal() -> None:
    s = Stats(2, [1.0], [0.5])
    others = [Stats(3, [1.0], [0.5]), Stats(2, [1.5], [0.5]), Stats(2, [1.0], [0.0]), Stats(2, [1.0], [0.5], [1e-20])]
    others += [Stats(2, [1.0], [0.5], None, [1e-20]), Stats(2, [1.0, 1.0], [0.5, 0.5]), Stats(2, np.float32([1]), np.float32([0.5]))]
    assert len({s, *others}) == 8
    assert s != (2, [1.0], [0.5])
    assert Stats(0, np.ones(0), np.ones(0)) != Stats(0, np.float32([]), np.float32([]))


def test_nan_is_nan_and_zero_is_zero_whatever_their_bits() -> None:
    a, b = Stats(2, [np.nan, 0.0], [np.nan, 0.0]), Stats(2, [-np.nan, -0.0], [-np.nan, -0.0], [-0.0, -0.0])
    assert a.mean.tobytes() != b.mean.tobytes()
    assert a == b
    assert hash(a) == hash(b)


def test_stats_cannot_be_changed_and_share_no_memory() -> None:
    mean = np.ones(3)
    s = Stats(2, mean, mean)
    before = hash(s)
    mean[:] = 5
    assert hash(s) == before
    for name in ("mean", "var", "mean_lo", "var_lo"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(s, name)[0] = 7
        with pytest.raises(AttributeError):
            setattr(s, name, mean)
    for a in (s.mean, s.vectors):
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            a.setflags(write=True)
    assert not hasattr(s, "__dict__")
    for a in (*s.to_arrays(), *s.to_running()):
        a[...] = 9  # these are new
    assert hash(s) == before


def test_a_pickle_holds_little_but_the_numbers() -> None:
    s = fastbn.batch_norm_stats(rng().standard_normal((9, 512)).astype(np.float32))
    assert len(pickle.dumps(s)) < 4 * 4 * 512 + 600
    plain = Stats(9, s.mean, s.var)
    assert len(pickle.dumps(plain)) < 2 * 4 * 512 + 500


def test_arrays_are_plain_and_known_by_their_order() -> None:
    s = Stats(3, np.float32([1, 2]), np.float32([3, 4]), np.float32([1e-9, 0]))
    arrays = s.to_arrays()
    assert [type(a) for a in arrays] == [np.ndarray] * 5
    assert [a.dtype.name for a in arrays] == ["int64", *["float32"] * 4]
    assert all(a.flags.c_contiguous and a.ndim == 1 for a in arrays)
    assert Stats.from_arrays(list(arrays)) == s
    assert Stats.from_arrays([a.astype(a.dtype.newbyteorder()) for a in arrays]) == s
    assert Stats.from_arrays([3.0, [1, 2], [3, 4]]) == Stats(3, [1, 2], [3, 4])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_running_statistics_make_the_round_trip(dtype: str) -> None:
    mean, var = rng().standard_normal(5).astype(dtype), rng().uniform(0.5, 2, 5).astype(dtype)
    for count in (2, 3, 1000, 10**12):
        for unbiased in (True, False):
            s = Stats.running(mean, var, count, unbiased=unbiased)
            again = s.to_running(unbiased=unbiased)
            assert s.count == count
            np.testing.assert_array_equal(again[0], mean)
            np.testing.assert_allclose(again[1], var, rtol=0 if dtype != "float64" else 4e-16)
    np.testing.assert_allclose(Stats.running(mean, var, 3).var.astype(float), var.astype(float) * 2 / 3, rtol=1e-7)
    assert Stats.running(mean, var, 0) == Stats.identity(5, dtype)


@both
def test_running_statistics_are_those_of_a_layer_that_saw_the_batch(dtype: Any) -> None:
    x = rng().standard_normal((11, 3)).astype(dtype)
    for unbiased, correction in ((True, 1), (False, 0)):
        bn = fastbn.BatchNorm1d(3, momentum=1.0, correction=correction, dtype=dtype)
        bn(x)
        mean, var = fastbn.batch_norm_stats(x).to_running(unbiased=unbiased)
        np.testing.assert_allclose(mean, bn.running_mean, rtol=1e-6)
        np.testing.assert_allclose(var, bn.running_var, rtol=1e-6)


@both
def test_the_standard_error_is_that_of_the_mean(dtype: Any) -> None:
    x = rng().standard_normal((50, 3)).astype(dtype)
    error = fastbn.batch_norm_stats(x).standard_error
    assert error.dtype == dtype
    np.testing.assert_allclose(error, x.astype(float).std(0, ddof=1) / np.sqrt(50), rtol=1e-6)
    assert np.isinf(fastbn.batch_norm_stats(x[:1]).standard_error).all()
    assert np.isinf(Stats.identity(3).standard_error).all()


# Batches one after the other


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
def test_an_iterable_of_batches_gives_the_statistics_of_all(layout: str, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    x = problem((7, *SHAPES[layout][1:]), dtype, axis).x
    whole = fastbn.batch_norm_stats(x, layout=layout)
    alive: list[Array] = []

    def read() -> Any:
        for cut in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 7)):
            alive.append(x[cut].copy())
            yield alive.pop()

    for batches in (read(), list(read()), tuple(read()), iter(list(read()))):
        found = fastbn.batch_norm_stats(batches, layout=layout)
        assert found.count == whole.count
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-6)
        np.testing.assert_allclose(found.var, whole.var, rtol=1e-6)
    assert fastbn.batch_norm_stats([x], layout=layout) == whole


def test_an_error_while_batches_are_read_is_the_readers() -> None:
    def read() -> Any:
        yield np.ones((2, 3))
        raise ValueError("the disk is gone")

    with pytest.raises(ValueError, match=r"^the disk is gone$"):
        fastbn.batch_norm_stats(read())


# Calls with statistics that are known


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_known_statistics_give_what_training_gives(layout: str, correction: int, activation: Any, dtype: np.dtype[Any]) -> None:
    axis = axis_of(layout)
    p = problem(SHAPES[layout], dtype, axis, mean=20.0)
    moved = [(p.mean.copy(), p.var.copy()) for _ in range(3)]
    options: dict[str, Any] = {"layout": layout, "correction": correction, "activation": activation}
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *moved[0], **options)
    s = fastbn.batch_norm_stats(p.x, layout=layout)
    y1, saved1 = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *moved[1], stats=s, **options)
    x = p.x.copy()
    assert fastbn.batch_norm(x, *moved[2], p.weight, p.bias, True, stats=s, out=x, **options) is x
    near(y1, y.astype(np.float64))
    same_bits(x, y1)
    assert (saved1.training, saved1.count) == (True, s.count)
    for mean, var in moved[1:]:
        np.testing.assert_allclose(mean, moved[0][0], rtol=1e-6)
        np.testing.assert_allclose(var, moved[0][1], rtol=1e-6)
    if dtype.itemsize > 2 or activation is None:  # a rounded y may lie on the other side of 0
        expected = fastbn.batch_norm_backward(p.dy, p.x, saved)
        near_gradients(
            fastbn.batch_norm_backward(p.dy, p.x, saved1), tuple(np.asarray(g, np.float64) for g in expected[:3])  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
@both
def test_parts_of_a_batch_give_what_the_whole_gives(layout: str, dtype: Any) -> None:
    """As several processes would; the third has nothing."""
    axis = axis_of(layout)
    p = problem(SHAPES[layout], dtype, axis, mean=5.0)
    whole = p.mean.copy(), p.var.copy()
    y = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *whole, layout=layout)[0]
    cuts = [slice(0, 1), slice(1, None), slice(0, 0)]
    xs, dys = [p.x[cut] for cut in cuts], [p.dy[cut] for cut in cuts]
    s = Stats.merge(*(fastbn.batch_norm_stats(x, layout=layout) for x in xs))
    ys, saves, sums = [], [], []
    for x, dy in zip(xs, dys, strict=True):
        own = p.mean.copy(), p.var.copy()
        y1, saved1 = fastbn.batch_norm_forward(x, p.weight, p.bias, *own, layout=layout, stats=s)
        np.testing.assert_allclose(own[0], whole[0], rtol=1e-6)
        np.testing.assert_allclose(own[1], whole[1], rtol=1e-6)
        with pytest.raises(ValueError, match=r"of which x has \d+.*batch_norm_backward_reduce.*batch_norm_backward_elemt"):
            fastbn.batch_norm_backward(dy, x, saved1)
        ys.append(y1)
        saves.append(saved1)
        sums.append(fastbn.batch_norm_backward_reduce(dy, x, all_digits(s)[0].astype(float), saved1.invstd, layout=layout))
    near(np.concatenate(ys), y.astype(np.float64))
    dx, dweight, dbias = backward(p.dy, p.x, p.weight, axis=axis)
    totals = [np.sum([part[i] for part in sums], 0, dtype=np.float64) for i in (0, 1)]
    parts = [
        fastbn.batch_norm_backward_elemt(dy, x, all_digits(s)[0].astype(float), s1.invstd, p.weight, *totals, s.count, layout=layout)
        for x, dy, s1 in zip(xs, dys, saves, strict=True)
    ]
    near_gradient(np.concatenate(parts), dx)
    local = [fastbn.batch_norm_backward(dy, x, s1, wrt=("weight", "bias")) for x, dy, s1 in zip(xs, dys, saves, strict=True)]
    assert all(g.dx is None for g in local)
    near_gradient(np.sum([g.dweight for g in local], 0), dweight, np.sqrt(s.count))
    near_gradient(np.sum([g.dbias for g in local], 0), dbias, np.sqrt(s.count))


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC"])
@both
def test_with_a_mask_the_statistics_are_those_of_what_counts(layout: str, dtype: Any) -> None:
    axis = axis_of(layout)
    p = problem((7, *SHAPES[layout][1:]), dtype, axis, mean=5.0)
    shape = [n for i, n in enumerate(p.x.shape) if i != axis % p.x.ndim]
    mask = rng(3).random(shape) < 0.6
    mask[1] = False  # what the second part has
    options: dict[str, Any] = {"layout": layout, "activation": "silu"}
    moved = [(p.mean.copy(), p.var.copy()) for _ in range(2)]
    y, saved = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *moved[0], mask=mask, **options)
    s = fastbn.batch_norm_stats(p.x, layout=layout, mask=mask)
    y1, saved1 = fastbn.batch_norm_forward(p.x, p.weight, p.bias, *moved[1], mask=mask, stats=s, **options)
    near(y1, y.astype(np.float64))
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-6)
    want = fastbn.batch_norm_backward(p.dy, p.x, saved)
    truth = tuple(np.asarray(g, np.float64) for g in want[:3])
    near_gradients(fastbn.batch_norm_backward(p.dy, p.x, saved1), truth)  # type: ignore[arg-type]
    for cut in (slice(0, 1), slice(1, 2), slice(2, None)):
        part, saved2 = fastbn.batch_norm_forward(p.x[cut], p.weight, p.bias, mask=mask[cut], stats=s, **options)
        near(part, y[cut].astype(np.float64))
        with pytest.raises(ValueError, match="the gradient of x needs sums over all of them"):
            fastbn.batch_norm_backward(p.dy[cut], p.x[cut], saved2)


def test_a_layer_takes_known_statistics() -> None:
    p = problem((6, 3, 4), mean=5.0)
    layers = [fastbn.BatchNorm1d(3) for _ in range(2)]
    s = fastbn.batch_norm_stats(p.x)
    near(layers[1](p.x, stats=s), layers[0](p.x).astype(np.float64))
    for key, v in layers[0].state_dict().items():
        np.testing.assert_allclose(layers[1].state_dict()[key], v, rtol=1e-6)
    near_gradients(layers[1].backward(p.dy), tuple(np.asarray(g, np.float64) for g in layers[0].backward(p.dy)[:3]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stats are of the batch, and training is False"):
        layers[0].eval()(p.x, stats=s)
    layers[1](p.x[:2], stats=s)
    with pytest.raises(ValueError, match=r"fastbn\.sync\.batch_norm_backward"):
        layers[1].backward(p.dy[:2])


def test_statistics_of_nothing_move_nothing() -> None:
    mean, var = np.full(3, 5.0), np.full(3, 6.0)
    y, saved = fastbn.batch_norm_forward(np.ones((0, 3)), None, None, mean, var, stats=Stats.identity(3, np.float64))
    assert y.shape == (0, 3)
    assert saved.count == 0
    assert (mean == 5).all()
    assert (var == 6).all()


def test_statistics_in_the_other_dtype_are_used_to_all_their_digits() -> None:
    x = (1e6 + rng().standard_normal((30, 3))).astype(np.float32)
    truth = fastbn.batch_norm_forward(x.astype(np.float64))[0]
    near(fastbn.batch_norm_forward(x, stats=fastbn.batch_norm_stats(x.astype(np.float64)))[0], truth)
    y = fastbn.batch_norm_forward(x.astype(np.float64), stats=fastbn.batch_norm_stats(x))[0]
    np.testing.assert_allclose(y, truth, rtol=1e-6, atol=1e-6)


# What is refused

X = np.ones((4, 3), np.float32)
S = Stats(4, np.float32([1, 1, 1]), np.float32([1, 1, 1]))
MASK = np.array([False, True, True, False])
ERRORS: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "count-type": (TypeError, "count must be an int, got 2.0", lambda: Stats(2.0, [1.0], [1.0])),  # type: ignore[arg-type]
    "count-bool": (TypeError, "count must be an int, got True", lambda: Stats(True, [1.0], [1.0])),
    "count-negative": (ValueError, "count must be at least 0, got -1", lambda: Stats(-1, [1.0], [1.0])),
    "count-huge": (ValueError, "count must be at most 10+, got an int of 3322 bits", lambda: Stats(10**1000, [1.0], [1.0])),
    "mean-text": (TypeError, "mean must hold real numbers", lambda: Stats(1, ["a"], [1.0])),  # type: ignore[list-item]
    "mean-complex": (TypeError, "mean must hold real numbers", lambda: Stats(1, [1j], [1.0])),
    "mean-axes": (ValueError, r"mean must have shape \(C,\), got \(1, 1\)", lambda: Stats(1, [[1.0]], [1.0])),
    "mean-number": (ValueError, r"mean must have shape \(C,\), got \(\)", lambda: Stats(1, 1.0, 1.0)),
    "var-shape": (ValueError, r"mean has 1 channels but var has shape \(2,\)", lambda: Stats(1, [1.0], [1.0, 2.0])),
    "var-negative": (ValueError, "var must not be negative, but of channel 1 it is -2", lambda: Stats(1, [1.0, 1.0], [1.0, -2.0])),
    "var-none": (TypeError, "var must hold real numbers, got None", lambda: Stats(1, [1.0], None)),  # type: ignore[arg-type]
    "mean_lo-shape": (ValueError, r"mean has 1 channels but mean_lo has shape \(2,\)", lambda: Stats(1, [1.0], [1.0], [1.0, 2.0])),
    "var_lo-negative": (ValueError, r"var \+ var_lo must not be negative, but of channel 0 it is -1",
                        lambda: Stats(1, [1.0], [0.0], None, [-1.0])),
    "var_lo-text": (TypeError, "var_lo must hold real numbers", lambda: Stats(1, [1.0], [1.0], None, ["a"])),  # type: ignore[list-item]
    "identity-channels": (ValueError, "channels must be at least 0, got -1", lambda: Stats.identity(-1)),
    "identity-dtype": (TypeError, "dtype must be one of", lambda: Stats.identity(1, np.int32)),
    "merge-type": (TypeError, "merge takes Stats, got int", lambda: S.merge(3)),  # type: ignore[arg-type]
    "merge-channels": (ValueError, "merge needs statistics of 3 channels, got 2", lambda: S.merge(Stats.identity(2))),
    "concat-counts": (ValueError, "concat needs statistics with one count, got 4 and 5", lambda: Stats.concat([S, Stats(5, [1.0], [1.0])])),
    "concat-type": (TypeError, "concat takes an iterable of Stats, got int in it", lambda: Stats.concat([S, 3])),  # type: ignore[list-item]
    "concat-scalar": (TypeError, "concat takes an iterable of Stats, got ndarray$", lambda: Stats.concat(np.array(0))),
    "concat-one": (TypeError, "concat takes an iterable of Stats, got Stats$", lambda: Stats.concat(S)),  # type: ignore[arg-type]
    "concat-none": (ValueError, "concat needs at least one Stats", lambda: Stats.concat([])),
    "running-one": (ValueError, "unbiased variance needs a count of at least 2, got 1", lambda: Stats.running([1.0], [1.0], 1)),
    "running-count": (TypeError, "count must be an int", lambda: Stats.running([1.0], [1.0], None)),  # type: ignore[arg-type]
    "running-switch": (TypeError, "unbiased must be True or False", lambda: Stats.running([1.0], [1.0], 4, unbiased="no")),  # type: ignore[arg-type]
    "to_running-one": (ValueError, "unbiased variance needs a count of at least 2, got 1", lambda: Stats(1, [1.0], [0.0]).to_running()),
    "to_running-none": (ValueError, "no values have no mean", lambda: Stats.identity(1).to_running(unbiased=False)),
    "to_arrays-count": (OverflowError, r"count must be below 2\*\*63", lambda: Stats(2**63, [1.0], [0.0]).to_arrays()),
    "from_arrays-few": (ValueError, "arrays must be count, mean, var, mean_lo and var_lo, got 2", lambda: Stats.from_arrays([1, [1.0]])),
    "from_arrays-scalar": (TypeError, "arrays must be an iterable of arrays, got ndarray", lambda: Stats.from_arrays(np.array(0))),
    "from_arrays-number": (TypeError, "arrays must be an iterable of arrays, got int", lambda: Stats.from_arrays(3)),  # type: ignore[arg-type]
    "from_arrays-count": (ValueError, r"count must have one element, got shape \(2,\)", lambda: Stats.from_arrays([[1, 2], [1.0], [1.0]])),
    "from_arrays-half": (TypeError, "count must be an int, got 1.5", lambda: Stats.from_arrays([[1.5], [1.0], [1.0]])),
    "batches-mask": (ValueError, "mask goes with a single array", lambda: fastbn.batch_norm_stats([X], mask=np.ones(4, np.bool_))),
    "batches-none": (ValueError, "x is an iterable without any array", lambda: fastbn.batch_norm_stats(iter([]))),
    "batches-type": (TypeError, "item 1 of x: x must be a numpy.ndarray, got list", lambda: fastbn.batch_norm_stats([X, [1.0]])),  # type: ignore[list-item]
    "batches-channels": (ValueError, "item 1 of x: x has 2 channels .* before it have 3", lambda: fastbn.batch_norm_stats([X, X[:, :2]])),
    "batches-text": (TypeError, "x must be a numpy.ndarray, got str", lambda: fastbn.batch_norm_stats("text")),  # type: ignore[arg-type]
    "batches-dict": (TypeError, "x must be a numpy.ndarray, got dict", lambda: fastbn.batch_norm_stats({"x": X})),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_expected_and_what_came(name: str) -> None:
    error, message, call = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "stats must be a Stats, as batch_norm_stats returns, got tuple", {"stats": (4, [1.0], [1.0])}),
        (ValueError, "x has 3 channels on axis 1 but stats have 2", {"stats": Stats.identity(2)}),
        (ValueError, "they count 1 values .* has 2 at True positions", {"stats": Stats(1, S.mean, S.var), "mask": MASK}),
        (ValueError, "more than 1 value .* a count of 0", {"stats": Stats.identity(3), "mask": np.zeros(4, np.bool_)}),
        (ValueError, "they count 3 values per channel, but x has 4", {"stats": Stats(3, S.mean, S.var)}),
        (ValueError, "they count 0 values per channel, but x has 4", {"stats": Stats.identity(3)}),
        (ValueError, "more than 1 value .* got stats with a count of 1", {"x": X[:1], "stats": Stats(1, S.mean, S.var)}),
        (ValueError, "stats are of the batch, and training is False", {"stats": S, "training": False}),
    ],
    ids=["type", "channels", "mask", "masked out", "fewer", "none", "one", "training"],
)  # fmt: skip
def test_statistics_that_are_not_of_the_batch_are_refused(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    mean, var, out = np.ones(3), np.ones(3), np.ones_like(options.get("x", X))
    given = {"x": X, "running_mean": mean, "running_var": var, "training": True, "out": out} | options
    for call in (fastbn.batch_norm, fastbn.batch_norm_forward):
        with pytest.raises(error, match=message):
            call(**given)
    assert all((a == 1).all() for a in (mean, var, out))


def test_counts_that_have_added_up_beyond_the_limit_are_concatenated() -> None:
    stats = Stats(10**30, [1.0], [2.0]).merge(Stats(1, [1.0], [2.0]))
    both = Stats.concat([stats, stats])
    assert (both.count, both.mean.tolist(), both.var.tolist()) == (10**30 + 1, [1.0, 1.0], [2.0, 2.0])


def test_a_pickle_of_the_other_byte_order_is_the_same_value() -> None:
    stats = fastbn.batch_norm_stats(rng().normal(size=(5, 3)))
    make, given, (count, vectors) = stats.__reduce__()
    other = make(*given)
    other.__setstate__((count, vectors.astype(vectors.dtype.newbyteorder())))
    assert other == stats
    assert other.merge(other) == stats.merge(stats)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_what_is_not_finite_is_the_same_in_any_order(order: list[int], value: float) -> None:
    x = rng().normal(size=(30, 2))
    x[0, 0] = value
    for ends in ((3, 10), (20, 25), (10, 20)):
        parts = np.split(x, ends)
        first, *others = (fastbn.batch_norm_stats(parts[i]) for i in order)
        merged = first.merge(*others)
        np.testing.assert_array_equal(merged.mean[0], value)
        assert np.isnan(merged.var[0])
        np.testing.assert_allclose(merged.mean[1], x[:, 1].mean(), rtol=1e-12)
