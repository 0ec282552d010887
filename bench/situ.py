"""Each operation in situ, beside its time in a loop: ``python -m bench.situ``.

In a loop a call finds its instructions in the caches, and often its data. In a program it comes after other work. Here
that is another layer, large enough to evict what the call before left in the caches, and then the convolution that
writes x, or dy for the backward; or a walk through other code and memory. Only the call is timed. Outputs are new on
each call, as they are in a model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn
from bench import data, options, report, text
from bench.cases import Case, cases, quick
from bench.peers import COPY, IN_SITU, OPS
from bench.progress import each
from bench.timing import Budget, Times, race

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("tiny", "resnet50", "mobilenet_v2", "densenet121")
BATCHES = (8, 16)
WIDEST = 64  # channels that the convolution reads: enough that it is one, and few enough that it does not take the time
OTHER = (1, 64, 112, 112)  # output of the other layer: with its input 6 MB, more than most second-level caches
EVICTED = 8 << 20  # bytes that a walk reads: more than a second-level cache and its share of the last one
TURN = 3  # calls of one contender in a row, of which the first does not count


class Row(NamedTuple):
    """One operation on one layer: the times of each contender in a loop and in situ."""

    network: str
    shape: tuple[int, int, int, int]
    layout: str
    op: str
    loop: dict[str, Times]
    situ: dict[str, Times]


# From the inputs of a call, of which it takes the layout, and an array: a function that writes the array.
Neighbor = Callable[[data.Inputs, data.Array], Callable[[], object]]


def _weights(given: data.Inputs, target: data.Array) -> tuple[data.Array, data.Array]:
    """Input of shape (N, positions, inputs) or (N, inputs, positions), and weights, of a pointwise convolution that makes `target`."""
    rng, axis = np.random.default_rng(0), data.LAYOUTS[given.layout]
    n, channels = target.shape[0], target.shape[axis]
    inputs, positions = min(channels, WIDEST), target.size // (n * channels)
    shape = (n, inputs, positions) if axis == 1 else (n, positions, inputs)
    return rng.standard_normal(shape, np.float32), rng.standard_normal((channels, inputs), np.float32) / np.float32(inputs**0.5)


def by_numpy(given: data.Inputs, target: data.Array) -> Callable[[], object]:
    """A pointwise convolution as a product of matrices."""
    x, weights = _weights(given, target)
    if given.layout == "NHWC":
        rows, y = x.reshape(-1, weights.shape[1]), target.reshape(-1, len(weights))
        return lambda: np.matmul(rows, weights.T, out=y)
    planes = target.reshape(len(target), len(weights), -1)
    return lambda: np.matmul(weights, x, out=planes)


def by_torch(given: data.Inputs, target: data.Array) -> Callable[[], object]:
    """A pointwise convolution of PyTorch, on as many threads; its result is copied to where the call will read it."""
    import torch

    from bench.peers.torch_peer import tensor

    torch.set_num_threads(fastbn.get_num_threads())
    y, (x, weights) = tensor(target, given.layout), _weights(given, target)
    spatial = y.shape[2:]
    if given.layout == "NHWC":
        source = torch.from_numpy(x).view(len(x), *spatial, -1).permute(0, 3, 1, 2)
    else:
        source = torch.from_numpy(x).view(len(x), -1, *spatial)
    kernel = torch.from_numpy(weights)[:, :, None, None]

    def convolve() -> None:
        with torch.inference_mode():
            y.copy_(torch.conv2d(source, kernel))

    return convolve


def by_walk(given: data.Inputs, target: data.Array) -> Callable[[], object]:
    """A walk through memory and through the code of many functions that have nothing to do with a call."""
    memory, small = np.ones(EVICTED // 8), np.linspace(0.0, 1.0, 64).reshape(8, 8)
    document = json.dumps([{str(i): [i, i / 7, None]} for i in range(64)])
    code: list[Callable[[], object]] = [
        lambda: json.dumps(json.loads(document)), lambda: re.findall(r"(\d+)\D+?(\d)", document), lambda: zlib.compress(document.encode()),
        lambda: np.linalg.svd(small + np.eye(8)), lambda: np.linalg.eig(small + np.eye(8)), lambda: np.fft.rfftn(small),
        lambda: np.sort(small, axis=None), lambda: np.unique(small.round(1)), lambda: np.einsum("ij,jk,kl", small, small, small),
        lambda: np.random.default_rng(0).normal(size=64), lambda: np.array2string(small), lambda: np.exp(np.sin(small)).sum(0),
        lambda: sorted(document.split(), key=hash), lambda: f"{small.tolist()}".encode().hex(), lambda: np.histogram(small), memory.sum,
    ]  # fmt: skip

    def walk() -> None:
        for visit in code:
            visit()

    return walk


NEIGHBORS: dict[str, Neighbor] = {"numpy": by_numpy, "torch": by_torch, "walk": by_walk}


def work(neighbor: Neighbor, given: data.Inputs, target: data.Array) -> Callable[[], object]:
    """What comes before each call: another layer, then the one that writes what the call reads."""
    other = np.empty([OTHER[axis] for axis in ((0, 1, 2, 3) if given.layout == "NCHW" else (0, 2, 3, 1))], np.float32)
    first, second = neighbor(given, other), neighbor(given, target)
    return lambda: (first(), second())


def choose(networks: Sequence[str], batches: Sequence[int], few: bool) -> list[Case]:
    """List the different shapes of networks, one of each network in turn, the largest first."""
    found: dict[tuple[int, int, int, int], Case] = {}
    for network in networks:
        for case in (quick if few else cases)(network):
            for n in (case.shape[0],) if network == "tiny" else batches:
                shape = (n, *case.shape[1:])
                found.setdefault(shape, case._replace(shape=shape))
    by_network = [sorted((c for c in found.values() if c.network == name), key=lambda c: -prod(c.shape)) for name in networks]
    return [case for case in chain.from_iterable(zip_longest(*by_network)) if case is not None]


def measure(case: Case, layout: str, dtype: str, neighbor: Neighbor, budget: Budget) -> Iterator[Row]:
    """Measure the operations on one layer, in a loop and in situ; each operation is one part of the budget."""
    if not budget.left():
        return
    given = data.inputs(case, layout, dtype)
    out = np.empty_like(given.x)
    for op in OPS:
        calls = {
            contender.name: getattr(contender.load(), op)(given, None if contender.fresh else out)
            for contender in (COPY, *IN_SITU)
            if contender.installed() and hasattr(contender.load(), op)
        }
        share = budget.share()
        loop = race(calls, share / 3)
        between = work(neighbor, given, given.dy if op == "backward" else given.x)
        yield Row(case.network, case.shape, layout, op, loop, race(calls, share * 2 / 3, between, TURN))


def _line(row: Row) -> list[object]:
    """One line of the table, in microseconds."""
    nothing = float("nan")

    def of(times: dict[str, Times], name: str, field: str = "median") -> float:
        return getattr(times[name], field) * 1e6 if name in times else nothing

    line: list[object] = ["x".join(map(str, row.shape)), row.layout, row.op, of(row.situ, "copy")]
    for contender in IN_SITU:
        line += [of(row.loop, contender.name), of(row.situ, contender.name), of(row.situ, contender.name, "p99")]
    fast = of(row.situ, "fastbn fresh")
    return [*line, fast / of(row.situ, "copy"), of(row.situ, "torch fresh") / fast]


_TITLES = {"fastbn fresh": "fastbn", "frozen fresh": "frozen", "torch fresh": "PyTorch"}
_HEADER = (
    "shape", "layout", "operation", "copy in situ",
    *(f"{title} {when}" for title in _TITLES.values() for when in ("in a loop", "in situ", "p99")), "x copy", "over PyTorch",
)  # fmt: skip
_DISPENSABLE = (
    "over PyTorch", "fastbn in a loop", "frozen in situ", "PyTorch in situ", "x copy", "copy in situ", "fastbn p99", "frozen in a loop",
    "PyTorch in a loop", "PyTorch p99", "frozen p99",
)  # fmt: skip


def write(about: dict[str, Any], rows: Sequence[Row], between: str, left_out: int) -> list[text.Part]:
    """Write the report: the machine, the geometric means, and every layer."""
    facts = [f"{about['processor']}, {about['threads']} threads, {about['dtype']}, kernel {about['kernel']}, {about['date']}"]
    facts += [f"{left_out} measurements left out, because the time was over or Ctrl-C came"] * (left_out > 0)
    facts += report.unstable(about, [row.situ for row in rows])
    groups: dict[tuple[str, str], list[list[object]]] = {}
    for row in rows:
        groups.setdefault((row.layout, row.op), []).append(_line(row)[-2:])
    means = [(*key, len(found), *_mean_and_worst(found)) for key, found in groups.items()]
    return [
        "# fastbn in situ",
        "\n".join(f"- {fact}" for fact in facts),
        f"Times in µs of calls that make new outputs; before each call in situ: {between}. The copy is of x into an array already there. "
        "*x copy* and *over PyTorch* are of the times in situ.",
        "## Geometric means",
        text.Table(("layout", "operation", "layers", "x copy", "over PyTorch", "least over PyTorch"), means),
        "## Layers",
        text.Table(_HEADER, [_line(row) for row in rows], _DISPENSABLE),
    ]


def _mean_and_worst(ratios: Sequence[Sequence[object]]) -> tuple[float, float, float]:
    to_copy, over_torch = np.array(ratios, float).T
    return float(np.exp(np.mean(np.log(to_copy)))), float(np.exp(np.mean(np.log(over_torch)))), float(over_torch.min())


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.situ",
        description="Measure each operation in situ, after other work, beside its time in a loop. Ctrl-C ends it early and writes what "
        "there is.",
    )
    add, torch = parser.add_argument, next(c for c in IN_SITU if c.package == "torch")
    between = "torch" if torch.installed() else "numpy"
    add("--quick", action="store_true", help="three shapes of each network, the first batch alone, in about two minutes")
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME", help=f"{', '.join(NETWORKS)} (default: all)")
    add("--batches", nargs="+", type=options.whole(1), default=list(BATCHES), metavar="N", help="not of tiny (default: %(default)s)")
    add("--layouts", nargs="+", choices=data.LAYOUTS, default=list(data.LAYOUTS), help="order of the axes in memory (default: %(default)s)")
    add("--between", choices=NEIGHBORS, default=between, help="a convolution of NumPy or PyTorch, or a walk through other code and memory "
        "(default: torch where it is installed, else numpy)")  # fmt: skip
    add("--threads", type=options.threads, default=fastbn.get_num_threads(), help="for every contender (default: %(default)s)")
    add("--budget", type=options.seconds, metavar="SECONDS", help="for all measurements (default: 900, or 120 with --quick)")
    add("--markdown", type=options.output_file, default=str(RESULTS / "situ.md"), metavar="PATH",
        help="a file that is there is kept under another name (default: %(default)s)")  # fmt: skip
    arguments = parser.parse_args(argv)
    options.need(parser, "it", "rich")
    if arguments.between == "torch":
        options.need(parser, "--between torch", "torch")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the report and print it."""
    arguments = _arguments(argv)
    networks, batches = list(dict.fromkeys(arguments.networks)), arguments.batches[: 1 if arguments.quick else None]
    layouts = list(dict.fromkeys(arguments.layouts))
    chosen = [(case, layout) for case in choose(networks, batches, arguments.quick) for layout in layouts]
    with fastbn.num_threads(arguments.threads):
        about = report.machine("float32")
        for contender in IN_SITU:
            if contender.installed():
                contender.load()  # PyTorch takes seconds that are nobody's measurement
        budget = Budget(arguments.budget or (120.0 if arguments.quick else 900.0), len(chosen) * len(OPS))
        rows, interrupted = each(
            chosen,
            lambda item: f"{item[0].network} {'x'.join(map(str, item[0].shape))} {item[1]}",
            lambda item: measure(*item, "float32", NEIGHBORS[arguments.between], budget),
        )
    total = len(chosen) * len(OPS)
    if interrupted:
        print(f"interrupted after {len(rows)} of {total} measurements", file=sys.stderr)
    elif not rows:
        print("There was no time for a single measurement; give a larger --budget.", file=sys.stderr)
    if not rows:
        return options.INTERRUPTED if interrupted else 1
    rows.sort(key=lambda row: (networks.index(row.network), -prod(row.shape)))
    parts = write(about, rows, arguments.between, total - len(rows))
    written = options.write({arguments.markdown: text.markdown(parts)})
    text.show(parts)
    return options.INTERRUPTED if interrupted else int(not written)


if __name__ == "__main__":
    sys.exit(options.run(main))
