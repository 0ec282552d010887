"""Threads where people are: ``python -m bench.situations``.

In a loop the threads of the pool are still awake from the call before. In a program something lies between two calls: a
product of matrices, whose threads spin for a while; work of an OpenMP team, which spins longer; a sweep over other
memory; the wait for the next request; another process, or another thread that calls too; a container that has half a
processor. Each operation is timed in each of these situations, on 1 to n threads in turn, so that what the machine does
meanwhile falls on all of them. What there is not on this machine is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import fastbn
from bench import options, page, report, text
from bench.busy import busy
from bench.progress import each
from bench.quota import quota
from bench.quota import unavailable as no_quota

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHANNELS, SIDE = 64, 28  # one image: 0.2 MB; of half the side where that is too much
SIZES = (50, 200, 800, 3200, 12800, 51200)  # kB of x
TURN = 10  # calls on one number of threads, before the next has its turn
Call = Callable[[], object]


class Row(NamedTuple):
    """One operation on one size in one situation: median and 99th percentile, in seconds, by number of threads."""

    op: str
    nbytes: int
    situation: str
    median: dict[int, float]
    p99: dict[int, float]


def _operations(nbytes: int) -> dict[str, Call]:
    """The operations on an array of about so many bytes; outputs are there already where an operation takes them."""
    side = SIDE if nbytes >= 4 * CHANNELS * SIDE * SIDE // 2 else SIDE // 2
    shape = (max(1, round(nbytes / (4 * CHANNELS * side * side))), CHANNELS, side, side)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape, np.float32), rng.standard_normal(shape, np.float32)
    out, dx = np.empty_like(x), np.empty_like(x)
    frozen = fastbn.FrozenBatchNorm(np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32))
    _, saved = fastbn.batch_norm_forward(x)
    return {
        "inference": lambda: frozen(x, out=out),
        "forward": lambda: fastbn.batch_norm_forward(x, out=out),
        "backward": lambda: fastbn.batch_norm_backward(dy, x, saved, out=dx),
    }


def _nothing() -> None:
    pass


def _product() -> Call:
    a, b, c = (np.ones((384, 384), np.float32) for _ in range(3))
    return lambda: np.matmul(a, b, out=c)


def _openmp() -> Call:
    """An operation of PyTorch's, whose OpenMP workers spin for milliseconds after it."""
    import torch

    x = torch.ones(1 << 20)
    return lambda: torch.exp(x, out=x).fill_(0)


def _no_torch() -> str | None:
    return None if find_spec("torch") else "its OpenMP team is PyTorch's, which is not installed"


def _sweep() -> Call:
    memory = np.ones(4 << 20, np.float32)
    return memory.sum


def _pause(milliseconds: float) -> Callable[[], Call]:
    return lambda: lambda: time.sleep(milliseconds / 1e3)


@contextmanager
def _another_caller() -> Iterator[None]:
    """Let another thread make the same kind of calls, one after the other."""
    stop, call = threading.Event(), _operations(800_000)["forward"]

    def work() -> None:
        while not stop.is_set():
            call()

    other = threading.Thread(target=work)
    other.start()
    try:
        yield
    finally:
        stop.set()
        other.join()


# By name: what makes what comes before each call, and what goes on beside all of them.
Situation = tuple[Callable[[], Call], Callable[[], AbstractContextManager[None]]]
SITUATIONS: dict[str, Situation] = {
    "loop": (lambda: _nothing, nullcontext),
    "product": (_product, nullcontext),
    "sweep": (_sweep, nullcontext),
    "pause-1ms": (_pause(1), nullcontext),
    "pause-5ms": (_pause(5), nullcontext),
    "pause-50ms": (_pause(50), nullcontext),
    "busy": (lambda: _nothing, lambda: busy(1)),
    "two-callers": (lambda: _nothing, _another_caller),
    "openmp": (_openmp, nullcontext),
    "half-a-processor": (lambda: _nothing, lambda: quota(0.5)),
}
SHOWN = ("loop", "product", "sweep", "pause-5ms", "busy")  # by the picture of the documentation
# Of those that not every machine has: why there is none here, or None.
UNAVAILABLE: dict[str, Callable[[], str | None]] = {"openmp": _no_torch, "half-a-processor": no_quota}


def why_not(name: str) -> str | None:
    """Why a situation cannot be had here, or None."""
    return UNAVAILABLE.get(name, lambda: None)()


def times(call: Call, before: Call, threads: Sequence[int], seconds: float) -> dict[int, np.ndarray]:
    """Seconds of each call, by number of threads, which take turns; the first call of a turn does not count."""
    taken: dict[int, list[float]] = {n: [] for n in threads}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(taken[threads[0]]) < 2 * TURN:
        for n in threads:
            with fastbn.num_threads(n):
                for i in range(TURN + 1):
                    before()
                    start = time.perf_counter()
                    call()
                    if i > 0:
                        taken[n].append(time.perf_counter() - start)
    return {n: np.array(found) for n, found in taken.items()}


def measure(name: str, sizes: Sequence[int], ops: Sequence[str], threads: Sequence[int], seconds: float) -> Iterator[Row]:
    """Measure the operations in one situation."""
    prepare, beside = SITUATIONS[name]
    before = prepare()
    with beside():
        for size in sizes:
            calls = _operations(size * 1000)
            for op in ops:
                taken = times(calls[op], before, threads, seconds)
                medians = {n: float(np.median(found)) for n, found in taken.items()}
                yield Row(op, size * 1000, name, medians, {n: float(np.percentile(found, 99)) for n, found in taken.items()})


def write(rows: Sequence[Row], threads: Sequence[int], unstable: Sequence[str]) -> list[text.Part]:
    """Write the table: medians in microseconds, the largest number of threads over one, and its 99th percentile over its median."""
    most = threads[-1]
    header = ("situation", "MB", "operation", *(f"{n} threads" if n > 1 else "1 thread" for n in threads), "gain", "p99 / median")
    lines = [
        (row.situation, row.nbytes / 1e6, row.op, *(row.median[n] * 1e6 for n in threads), row.median[threads[0]] / row.median[most],
         row.p99[most] / row.median[most])
        for row in rows
    ]  # fmt: skip
    return [
        "# fastbn's threads in situations",
        *unstable,
        f"Medians in µs; the gain is that of {most} over {threads[0]}.",
        text.Table(header, lines, ("p99 / median",)),
    ]


def gains(rows: Sequence[Row]) -> str:
    """Write a table of how many times as fast all threads are as one, by situation, operation and size."""
    sizes = sorted({row.nbytes for row in rows})
    found = {(row.situation, row.op, row.nbytes): row.median[1] / row.median[max(row.median)] for row in rows}
    lines = [
        [name, op, *(f"{gain:.2f}" if (gain := found.get((name, op, size))) else "-" for size in sizes)]
        for name, op in dict.fromkeys((row.situation, row.op) for row in rows)
    ]
    return text.table(["situation", "operation", *(f"{size / 1e6:g} MB" for size in sizes)], lines)


def as_json(about: dict[str, Any], rows: Sequence[Row]) -> str:
    """Write the machine and, a line for each, the rows."""
    lines = ",\n".join("  " + json.dumps(report.rounded(row._asdict())) for row in rows)
    return json.dumps({"machine": about}, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'


def read_json(text: str) -> tuple[dict[str, Any], list[Row]]:
    """Read back what `as_json` wrote."""
    found = json.loads(text)
    times = ("median", "p99")
    return found["machine"], [Row(**row | {key: {int(n): t for n, t in row[key].items()} for key in times}) for row in found["rows"]]


def plot(rows: Sequence[Row], op: str = "forward", names: Sequence[str] = SHOWN) -> Callable[[Axes], None]:
    """Draw the gain of one operation by size, a line for each of some situations."""

    def draw(axes: Axes) -> None:
        for name, color in zip(names, page.SERIES, strict=False):
            mine = [row for row in rows if row.op == op and row.situation == name]
            ratios = [row.median[1] / row.median[max(row.median)] for row in mine]
            axes.plot([row.nbytes / 1e6 for row in mine], ratios, color=color, label=name, linewidth=1.4, marker="o", markersize=3)
        axes.set(xscale="log", xlabel="MB of x", ylabel="times as fast as one thread")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", ncols=2)

    return draw


def draw(rows: Sequence[Row], threads: Sequence[int], file: Path) -> None:
    """Draw the gain of all threads over one, by size: a panel for each operation, a line for each situation."""
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(row.op for row in rows))
    figure = Figure((6 * len(ops), 4.5), layout="constrained")
    for panel, op in zip(np.atleast_1d(figure.subplots(1, len(ops), sharey=True)), ops, strict=True):
        for name in dict.fromkeys(row.situation for row in rows):
            mine = [row for row in rows if row.op == op and row.situation == name]
            gains = [row.median[threads[0]] / row.median[threads[-1]] for row in mine]
            panel.plot([row.nbytes / 1e6 for row in mine], gains, marker="o", markersize=3, label=name)
        panel.axhline(1, color="gray", linewidth=0.5)
        panel.set(title=op, xscale="log", xlabel="MB of x", ylabel=f"gain of {threads[-1]} threads over {threads[0]}")
        panel.legend(fontsize="small")
    figure.savefig(file, dpi=150)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.situations", description="Time calls on 1 to n threads after and beside other work.")
    add = parser.add_argument
    names = ", ".join(SITUATIONS)
    add("--situations", nargs="+", choices=SITUATIONS, default=list(SITUATIONS), metavar="NAME", help=f"{names} (default: all)")
    add("--ops", nargs="+", choices=("inference", "forward", "backward"), default=["forward", "backward"], help="(default: %(default)s)")
    add("--sizes", nargs="+", type=options.whole(1), default=list(SIZES), metavar="KB", help="of x (default: %(default)s)")
    add("--threads", type=options.threads, default=fastbn.get_num_threads(), help="the most, after 1, 2, 4 ... (default: %(default)s)")
    add("--seconds", type=options.seconds, default=1.0, help="for each row (default: %(default)s)")
    add("--json", type=options.output_file, metavar="FILE", help="write all there, with the machine")
    add("--plot", type=options.output_file, metavar="FILE", help="draw the gains there (needs matplotlib)")
    arguments = parser.parse_args(argv)
    options.need(parser, "it", "rich")
    if arguments.plot is not None:
        options.need(parser, "--plot", "matplotlib")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table; after Ctrl-C, what there is."""
    arguments = _arguments(argv)
    threads = [n for n in (1 << i for i in range(20)) if n < arguments.threads] + [arguments.threads]
    before = report.machine("float32", program="bench.situations")
    reasons = {name: why_not(name) for name in dict.fromkeys(arguments.situations)}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"{name}: {reason}", file=sys.stderr)
    rows, interrupted = each(
        [name for name, reason in reasons.items() if reason is None],
        str,
        lambda name: measure(name, arguments.sizes, arguments.ops, threads, arguments.seconds),
    )
    if interrupted:
        print(f"interrupted after {len(rows)} rows", file=sys.stderr)
    written = not rows or arguments.json is None or options.write({arguments.json: as_json(before, rows)})
    if rows and arguments.plot is not None:
        options.keep(arguments.plot)
        draw(rows, threads, arguments.plot)
    if rows:
        text.show(write(rows, threads, report.unstable(before)))
    return options.INTERRUPTED if interrupted else int(not written)


if __name__ == "__main__":
    sys.exit(options.run(main))
