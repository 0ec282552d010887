"""What rows say of fastbn: the best peer of a row, how many times as fast fastbn is, and summaries of that.

A row is held against the best of its peers, not against one of them. With outputs given, that is the best of all; with new
outputs, the best of those that make new ones. What lies in another memory than the row's (blocked layouts) does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import exp, log, nan
from typing import NamedTuple

from bench.measure import Row
from bench.peers import BY_NAME
from fastbn.benchmark import TENSORS, WIDE

STEPS = (1, 2, 5)  # how many times as fast: what the shares of rows are counted for


def peers(row: Row, fresh: bool = False) -> list[str]:
    """The names of those that a row is compared with."""
    known = (BY_NAME.get(name) for name in row.times)
    return [c.name for c in known if c is not None and c.kind == "peer" and (c.fresh or not fresh)]


def best(row: Row, fresh: bool = False) -> str:
    """The name of the best peer, or nothing where there is none."""
    return min(peers(row, fresh), key=row.median, default="")


def over_best(row: Row, fresh: bool = False) -> float:
    """How many times as fast as the best peer fastbn is; NaN where there is none."""
    name = best(row, fresh)
    return row.ratio(name, "fastbn fresh" if fresh else "fastbn") if name else nan


def gigabytes(row: Row, name: str = "fastbn") -> float:
    """GB/s, each tensor counted once."""
    return TENSORS[row.op] * row.nbytes / row.median(name) / 1e9


def mean(values: Iterable[tuple[float, int]]) -> float:
    """Geometric mean of values and their weights, without those that are NaN."""
    known = [(value, weight) for value, weight in values if value == value]
    total = sum(weight for _, weight in known)
    return exp(sum(weight * log(value) for value, weight in known) / total) if total else nan


class Summary(NamedTuple):
    """One operation on all layers of a network: geometric means of ratios, in which a shape counts as often as the network has it.

    Attributes
    ----------
    over_best, least : float
        How many times as fast as the best peer; the mean, and the row where that is least.
    at_least : tuple of float
        Share of rows that are at least 1, 2 and 5 times as fast.
    fresh : float
        As `over_best`, with new outputs.
    """

    network: str
    layout: str
    dtype: str
    op: str
    layers: int
    rows: int
    over_best: float
    least: float
    at_least: tuple[float, ...]
    fresh: float
    to_copy: float
    to_limit: float
    gigabytes: float
    error: float


def shares(rows: Sequence[Row], fresh: bool = False) -> tuple[float, ...]:
    """The shares of rows that are at least 1, 2 and 5 times as fast as the best peer."""
    found = [ratio for row in rows if (ratio := over_best(row, fresh)) == ratio]
    return tuple(sum(ratio >= step for ratio in found) / len(found) if found else nan for step in STEPS)


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Summarize each network, layout, dtype and operation."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.layout, row.dtype, row.op), []).append(row)
    return [
        Summary(
            *group,
            sum(row.repeats for row in layers),
            len(layers),
            mean((over_best(row), row.repeats) for row in layers),
            min((ratio for row in layers if (ratio := over_best(row)) == ratio), default=nan),
            shares(layers),
            mean((over_best(row, fresh=True), row.repeats) for row in layers),
            mean((row.ratio("fastbn", "copy"), row.repeats) for row in layers),
            mean((row.ratio("fastbn", "limit"), row.repeats) for row in layers),
            mean((gigabytes(row), row.repeats) for row in layers),
            max(row.error for row in layers),
        )
        for group, layers in groups.items()
    ]


def against(rows: Sequence[Row]) -> list[tuple[str, str, int, float, float, tuple[float, ...]]]:
    """Each peer for itself: its name, the operation, rows in which it took part, mean and least ratio, shares of rows."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for name in row.times:
            if BY_NAME.get(name) is not None and BY_NAME[name].kind in ("peer", "aside"):
                ours = "fastbn fresh" if BY_NAME[name].fresh else "fastbn"
                found.setdefault((name, row.op), []).append(row.ratio(name, ours))
    return [
        (name, op, len(ratios), mean((r, 1) for r in ratios), min(ratios), tuple(sum(r >= s for r in ratios) / len(ratios) for s in STEPS))
        for (name, op), ratios in sorted(found.items(), key=lambda item: list(BY_NAME).index(item[0][0]))
    ]


def behind(rows: Iterable[Row]) -> list[Row]:
    """Rows in which the best peer is faster, the worst first."""
    return sorted((row for row in rows if over_best(row) < 1), key=over_best)


def reason(row: Row) -> str:
    """What is likely to be behind a row below 1, from what was measured."""
    name = best(row)
    if max(row.times["fastbn"].spread, row.times[name].spread) > WIDE:
        return "times spread over more than a quarter"
    if over_best(row) > 0.95:
        return "within 5 %"
    if row.median("fastbn") < 20e-6:
        return "the cost of a call"
    if row.ratio("fastbn", "limit") < 1.15:
        return "at the limit of its own order of reading"
    if row.ratio(name, "copy") < 1 and row.ratio("fastbn", "copy") >= 1:
        return "the peer's output stayed in a cache"
    return "unknown"
