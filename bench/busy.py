"""Threads on a quiet and on a busy machine: ``python -m bench.busy``.

Training forward, call after call, on one thread and on all, first alone and then beside as many processes as asked
for that compute all the time. What matters when the machine is busy is the tail: a pool that waits for a thread
without a processor waits for a time slice of the scheduler, several milliseconds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

import fastbn
from bench import options, report, text

SHAPES = {"25.7 MB": (32, 64, 56, 56), "3.2 MB": (1, 64, 112, 112), "0.4 MB": (1, 128, 28, 28), "4 KiB": (1, 16, 8, 8)}


def _compute() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that ends this one
    while True:
        sum(range(10_000))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Let other processes compute all the time."""
    others = [multiprocessing.get_context("spawn").Process(target=_compute, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    time.sleep(1.0 if others else 0.0)
    try:
        yield
    finally:
        for other in others:
            other.terminate()
            other.join()


def times(call: Callable[[], object], seconds: float) -> np.ndarray:
    """Seconds of each call, back to back."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while (start := time.perf_counter()) < until or len(taken) < 20:
        call()
        taken.append(time.perf_counter() - start)
    return np.array(taken)


def forward(shape: tuple[int, ...]) -> Callable[[], object]:
    """Training forward on arrays that are there already."""
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    out = np.empty_like(x)
    return lambda: fastbn.batch_norm(x, None, None, training=True, out=out)


def measure(threads: int, processes: int, seconds: float) -> Iterator[tuple[str, int, int, np.ndarray]]:
    """Rows of size, threads, busy processes and times."""
    for neighbors in (0, processes):
        with busy(neighbors):
            for size, shape in SHAPES.items():
                call = forward(shape)
                for n in (1, threads):
                    with fastbn.num_threads(n):
                        times(call, 0.3)
                        yield size, n, neighbors, times(call, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; after Ctrl-C, what there is."""
    parser = argparse.ArgumentParser("python -m bench.busy", description="Training forward on a quiet and on a busy machine.")
    add = parser.add_argument
    add("--threads", type=options.threads, default=fastbn.get_num_threads(), help="beside one (default: %(default)s)")
    add("--processes", type=options.whole(0), default=1, help="processes that compute all the time (default: %(default)s)")
    add("--seconds", type=options.seconds, default=5.0, help="for each row (default: %(default)s)")
    arguments = parser.parse_args(argv)
    lines: list[tuple[object, ...]] = []
    single: dict[str, float] = {}
    interrupted, before = False, report.load()
    try:
        for size, n, neighbors, taken in measure(arguments.threads, arguments.processes, arguments.seconds):
            median = float(np.median(taken))
            single.setdefault(size, median)
            lines.append((size, n, neighbors, median * 1e6, float(np.percentile(taken, 99)) * 1e6, median / single[size]))
    except KeyboardInterrupt:
        print(f"interrupted after {len(lines)} rows", file=sys.stderr)
        interrupted = True
    if lines:
        text.show(
            [
                *report.unstable(before),
                text.Table(("x", "threads", "busy processes", "median µs", "p99 µs", "median / quiet single thread"), lines),
            ]
        )
    return options.INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    sys.exit(options.run(main))
