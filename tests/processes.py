"""What the tests of batches that lie on several processes share: threads in place of processes, and how a batch is cut."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from truth import ulp, within

from fastbn import sync
from fastbn.layout import Array


class Exchange:
    """What threads that stand for processes have in common: a slot for each, and what has been sent."""

    def __init__(self, ranks: int):
        self.slots: list[Array] = [np.zeros(0)] * ranks
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.messages: list[tuple[str, int]] = []


class Member(sync.OfProcess):
    """One of them. Numbers go as bytes, as they would through a wire."""

    def __init__(self, exchange: Exchange, rank: int):
        self.exchange, self.rank = exchange, rank

    def _exchange(self, kind: str, array: Array) -> Array:
        assert array.flags.c_contiguous
        assert array.dtype == np.float64
        self.exchange.slots[self.rank] = np.frombuffer(array.tobytes()).reshape(array.shape)
        if self.rank == 0:
            self.exchange.messages.append((kind, array.nbytes))
        self.exchange.barrier.wait()
        found = np.stack(self.exchange.slots)
        self.exchange.barrier.wait()
        return found

    def all_gather(self, array: Array) -> Array:
        return self._exchange("all_gather", array)

    def all_reduce(self, array: Array) -> Array:
        return self._exchange("all_reduce", array).sum(0)


def together(ranks: int, work: Callable[[int, Member], Any]) -> tuple[list[Any], list[tuple[str, int]]]:
    """Run work(rank, communicator) on as many threads; what each returned, and the messages that one of them sent."""
    exchange, found, errors = Exchange(ranks), [None] * ranks, []

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank, Member(exchange, rank))
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return found, exchange.messages


def cuts(n: int, ranks: int) -> list[slice]:
    """Uneven parts of n rows, one after the other; the last but one is empty where there are more than two."""
    if ranks == 1:
        return [slice(0, n)]
    filled = ranks - 1 if ranks > 2 else ranks
    edges = [0, *(n - (n >> i) for i in range(1, filled)), n]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return parts if ranks == filled else [*parts[:-1], slice(edges[-2], edges[-2]), parts[-1]]


def joined(parts: Sequence[Array]) -> Array:
    return np.concatenate([np.asarray(part) for part in parts])


def as_one(actual: Any, whole: Any, scale: float = 1.0) -> None:
    """What parts give, within 1e-6 of what one process gives on the whole: 1e-12 for float64, a last place more for 16 bits."""
    truth = np.asarray(whole, np.float64)
    assert actual.shape == truth.shape
    bound = {"float64": 1e-12, "float32": 1e-6}.get(actual.dtype.name, 2e-6) * np.maximum(scale, np.abs(truth))
    within(actual, truth, bound + (ulp(truth, actual.dtype) if actual.dtype.itemsize == 2 else 0))
