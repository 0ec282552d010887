"""Timing: contenders take turns in one process, each turn a short burst of calls, and the median of all calls counts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from threading import get_native_id
from time import perf_counter, sleep
from typing import NamedTuple

TURN = 2e-3  # seconds of one contender's turn: long against waking its threads and refilling the caches after the others
MOST = 1000  # calls that are enough
FEW, LEAST = 5, 0.02  # calls that a contender gets even where its time is over, unless they take this many seconds

_TASKS = Path("/proc/self/task")


class Times(NamedTuple):
    """Seconds of one call over `calls` calls.

    Attributes
    ----------
    median, p99 : float
        The median and the 99th percentile.
    calls : int
    spread : float
        Between the quartiles, over the median.
    processes : int
        In which it was measured; the median is that of their medians.
    between : float
        From the smallest to the largest of these, over the median.
    """

    median: float
    p99: float
    calls: int
    spread: float = 0.0
    processes: int = 1
    between: float = 0.0


def race(
    contenders: Mapping[str, Callable[[], object]], seconds: float, between: Callable[[], object] | None = None, shortest: int = 1
) -> dict[str, Times]:
    """Time several functions, turn by turn.

    Parameters
    ----------
    contenders : mapping of str to callable
    seconds : float
        For all of them together, in equal parts; contenders whose calls are long may take more. However little it is,
        each is timed once.
    between : callable, optional
        Called before each call, and not timed.
    shortest : int
        Calls of a turn, at least.

    Returns
    -------
    dict of str to Times
    """
    part = seconds / len(contenders)
    spent: dict[str, float] = {}
    cost: dict[str, float] = {}  # of one call and what comes between
    samples: dict[str, list[float]] = {}

    def racing(name: str) -> bool:
        calls = len(samples[name])
        return calls == 0 or (spent[name] < part and calls < MOST) or (spent[name] < LEAST and calls < FEW)

    collecting = gc.isenabled()
    gc.disable()
    try:
        for name in contenders:  # the first calls do not count: they find no pages, no threads, no caches
            start = perf_counter()
            _turn(contenders[name], 1, between)
            cost[name] = perf_counter() - start
            spent[name], samples[name] = 0, []
            settle()
        while names := [name for name in contenders if racing(name)]:
            for name in names:
                start = perf_counter()
                durations = _turn(contenders[name], max(shortest, min(100, int(TURN / cost[name]))), between)
                cost[name] = min(cost[name], (perf_counter() - start) / len(durations))
                settle()
                spent[name] += perf_counter() - start
                # The first of several calls finds sleeping threads, and in the caches what the others left there.
                samples[name] += durations[1:] or durations
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(durations) for name, durations in samples.items()}


def _turn(call: Callable[[], object], calls: int, between: Callable[[], object] | None) -> list[float]:
    """Seconds of each of some calls."""
    durations = []
    for _ in range(calls):
        if between is not None:
            between()
        before = perf_counter()
        call()
        durations.append(perf_counter() - before)
    return durations


def settle(most: float = 0.05) -> None:
    """Wait until no other thread of this process runs, so that no contender competes with the one before.

    OpenMP's threads, PyTorch's among them, wait for more work in a loop for some 10 ms after a call. Only Linux tells.
    """
    own, end = str(get_native_id()), perf_counter() + most
    while perf_counter() < end and any(_runs(task) for task in (_TASKS.iterdir() if _TASKS.exists() else ()) if task.name != own):
        sleep(0.2e-3)


def _runs(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(") ")[2].startswith("R")
    except OSError:  # it has just ended
        return False


def summarize(durations: list[float]) -> Times:
    """Median, 99th percentile and spread of some durations."""
    ordered, n = sorted(durations), len(durations)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    spread = (ordered[ceil(0.75 * n) - 1] - ordered[ceil(0.25 * n) - 1]) / median if median else 0.0
    return Times(median, ordered[ceil(0.99 * n) - 1], n, spread)


def combine(runs: Sequence[Times]) -> Times:
    """One process's times each, as one."""
    ordered, n = sorted(run.median for run in runs), len(runs)
    median = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    between = (ordered[-1] - ordered[0]) / median if median else 0.0
    return Times(median, max(r.p99 for r in runs), sum(r.calls for r in runs), max(r.spread for r in runs), n, between)


class Budget:
    """Divides the time that is left over the work that is left.

    Parameters
    ----------
    seconds : float
        For all the work.
    parts : int
        Number of pieces of work.
    """

    def __init__(self, seconds: float, parts: int):
        self._end = perf_counter() + seconds
        self._parts = parts

    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - perf_counter())

    def share(self) -> float:
        """Seconds for the next piece of work."""
        share = self.left() / max(1, self._parts)
        self._parts -= 1
        return share

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that takes nothing of it."""
        start = perf_counter()
        try:
            yield
        finally:
            self._end += perf_counter() - start
