"""Command line: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain, zip_longest
from math import prod
from pathlib import Path

import fastbn
from bench import options, report, roofline, text
from bench.cases import NETWORKS, Case, cases, quick
from bench.data import DTYPES, LAYOUTS
from bench.measure import Row, measure
from bench.peers import CONTENDERS, OPS
from bench.progress import each
from bench.timing import Budget

RESULTS = Path(__file__).parent / "results"
UNUSUAL = ("floor", "tiny")  # networks that run when they are named: ResNet-50 has the shapes of the first


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench",
        description="Measure fastbn on the layers of real networks, beside a copy, NumPy and, where installed, PyTorch. "
        "Ctrl-C ends it early and writes what there is.",
        epilog="More: python -m bench.situ, bench.in_torch, bench.busy, bench.growth, bench.roofline, bench.instructions, bench.same "
        "(each with --help).",
    )
    default, results = [name for name in NETWORKS if name not in UNUSUAL], "PATH; a file that is there is kept under another name"
    add = parser.add_argument
    add("--quick", action="store_true", help="three shapes of each network, of at most 2^23 elements, in about a minute")
    add("--networks", nargs="+", choices=NETWORKS, default=default, metavar="NAME", help=f"{', '.join(NETWORKS)} (default: %(default)s)")
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="order of the axes in memory (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of x, y and the gradients (default: %(default)s)")
    add("--threads", type=options.whole(1), default=fastbn.get_num_threads(), help="for every contender (default: %(default)s)")
    add("--budget", type=options.seconds, metavar="SECONDS", help="for all measurements (default: 900, or 45 with --quick)")
    add("--json", type=options.output_file, default=str(RESULTS / "bench.json"), metavar="PATH", help=f"{results} (default: %(default)s)")
    add("--markdown", type=options.output_file, default=str(RESULTS / "bench.md"), metavar="PATH", help=f"{results} (default: %(default)s)")
    add(
        "--roofline", type=options.output_folder, nargs="?", const=str(RESULTS), metavar="FOLDER",
        help="also draw time against bytes, in this folder (without one: %(const)s)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.json.resolve() == arguments.markdown.resolve():
        parser.error("--json and --markdown name the same file")
    if arguments.roofline is not None:
        options.need(parser, "--roofline", "matplotlib")
    if arguments.dtype == "bfloat16":
        options.need(parser, "--dtype bfloat16", "ml_dtypes")
    if "photographs" in arguments.networks:
        options.need(parser, "--networks photographs", "sklearn", "scikit-learn")
        options.need(parser, "--networks photographs", "PIL", "pillow")
    return arguments


def _choose(networks: Sequence[str], layouts: Sequence[str], few: bool) -> list[tuple[Case, str]]:
    """List the cases, one of each network in turn, the largest first: what does not fit the time is the smallest of all networks."""
    choose = quick if few else cases
    ordered = [sorted(choose(network), key=lambda case: -prod(case.shape)) for network in dict.fromkeys(networks)]
    turns = (case for case in chain.from_iterable(zip_longest(*ordered)) if case is not None)
    return [(case, layout) for case in turns for layout in dict.fromkeys(layouts)]


def _run(chosen: Sequence[tuple[Case, str]], dtype: str, seconds: float) -> tuple[list[Row], bool]:
    """Measure every case in its layout; also whether Ctrl-C ended it."""
    for contender in CONTENDERS:
        if contender.installed():
            contender.load()  # PyTorch takes seconds that are nobody's measurement
    budget = Budget(seconds, len(chosen) * len(OPS))
    return each(
        chosen,
        lambda item: f"{item[0].network} {'x'.join(map(str, item[0].shape))} {item[1]}",
        lambda item: measure(*item, dtype, budget),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the reports and print the summary."""
    arguments = _arguments(argv)
    chosen = _choose(arguments.networks, arguments.layouts, arguments.quick)
    with fastbn.num_threads(arguments.threads):
        about = report.machine(arguments.dtype)
        rows, interrupted = _run(chosen, arguments.dtype, arguments.budget or (45.0 if arguments.quick else 900.0))
    if interrupted:
        print(f"interrupted after {len(rows)} of {len(chosen) * len(OPS)} measurements", file=sys.stderr)
    elif not rows:
        print("There was no time for a single measurement; give a larger --budget.", file=sys.stderr)
    if not rows:
        return options.INTERRUPTED if interrupted else 1
    wanted = Counter(case.network for case, _ in chosen for _ in OPS)
    left_out = dict(wanted - Counter(row.network for row in rows))
    order = list(NETWORKS)
    rows.sort(key=lambda row: (order.index(row.network), -prod(row.shape)))  # the layouts and operations stay in their order
    summary = report.summary(about, rows, left_out)
    texts = {
        arguments.json: report.as_json(about, rows, left_out),
        arguments.markdown: text.markdown([*summary, *report.layers(rows)]),
    }
    if arguments.roofline is not None:
        texts[arguments.roofline / "roofline.md"] = roofline.ratios(rows)
    written = options.write(texts)
    if arguments.roofline is not None:
        print("wrote", *roofline.draw(about, rows, arguments.roofline), file=sys.stderr)
    text.show(summary)
    return options.INTERRUPTED if interrupted else int(not written)


if __name__ == "__main__":
    sys.exit(options.run(main))
