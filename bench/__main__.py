"""Command line: ``python -m bench --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastbn
from bench import report, roofline
from bench.cases import NETWORKS, Case, cases, quick
from bench.data import LAYOUTS
from bench.measure import Row, measure
from bench.peers import OPS
from bench.timing import Budget
from fastbn.dtypes import DTYPES

RESULTS = Path(__file__).parent / "results"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench",
        description="Measure fastbn on the layers of real networks, beside a copy, NumPy and, where installed, PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = [name for name in NETWORKS if name != "floor"]  # whose shapes ResNet-50 has
    parser.add_argument("--quick", action="store_true", help="three shapes of each network, of at most 2^23 elements, in under a minute")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=default, metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=fastbn.get_num_threads())
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all measurements; 900, or 45 with --quick")
    parser.add_argument("--json", type=Path, default=RESULTS / "bench.json", metavar="PATH")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "bench.md", metavar="PATH")
    parser.add_argument("--roofline", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help="also draw time against bytes there")
    return parser.parse_args(argv)


def _run(chosen: Sequence[tuple[Case, str]], dtype: str, seconds: float) -> list[Row]:
    """Measure every case in its layout, with a progress bar on the standard error."""
    rows: list[Row] = []
    budget = Budget(seconds, len(chosen) * len(OPS))
    columns = TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Without auto_refresh, whose thread would run during the measurements.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        task = progress.add_task("", total=len(chosen))
        for case, layout in chosen:
            progress.update(task, description=f"{case.network} {'x'.join(map(str, case.shape))} {layout}", refresh=True)
            rows += measure(case, layout, dtype, budget)
            progress.update(task, advance=1, refresh=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the summary and write the reports."""
    arguments = _arguments(argv)
    choose = quick if arguments.quick else cases
    chosen = [(case, layout) for network in arguments.networks for case in choose(network) for layout in arguments.layouts]
    with fastbn.num_threads(arguments.threads):
        about = report.machine(arguments.dtype)
        rows = _run(chosen, arguments.dtype, arguments.budget or (45.0 if arguments.quick else 900.0))
    if not rows:
        print("There was no time for a single measurement; give a larger --budget.", file=sys.stderr)
        return 1
    skipped = len(chosen) * len(OPS) - len(rows)
    summary = report.summary(about, rows, skipped)
    texts = {arguments.json: report.as_json(about, rows, skipped), arguments.markdown: summary + "\n" + report.layers(rows)}
    if arguments.roofline is not None:
        texts[arguments.roofline / "roofline.md"] = roofline.ratios(rows)
    print(summary)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    if arguments.roofline is not None:
        print("wrote", *roofline.draw(rows, arguments.roofline), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
