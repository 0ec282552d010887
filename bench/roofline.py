"""Time against bytes, beside the line that a copy draws; and how far each layer is from the floor.

``python -m bench.roofline`` draws what ``python -m bench`` has written; so does its option ``--roofline``.

The floor of a call is the time a copy would take for as many bytes as the call must move when nothing stays in a cache
between two passes over the tensor, except that channels-first memory can be worked through a few channels at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from bench import options
from bench.measure import Row
from bench.peers import OPS
from bench.report import read
from bench.text import table

RESULTS = Path(__file__).parent / "results"

# Tensors read and written: statistics need a pass of their own over memory in which the channels are interleaved.
MOVED = {
    ("inference", "NCHW"): 2,
    ("inference", "NHWC"): 2,
    ("forward", "NCHW"): 2,
    ("forward", "NHWC"): 3,
    ("backward", "NCHW"): 3,
    ("backward", "NHWC"): 5,
}


def moved(row: Row) -> int:
    """Bytes that a call must move at least."""
    return MOVED[row.op, row.layout] * row.nbytes


def to_floor(row: Row) -> float:
    """Time over the time that a copy takes for as many bytes."""
    return row.ratio("fastbn", "copy") * 2 * row.nbytes / moved(row)


def ratios(rows: Sequence[Row]) -> str:
    """Write the table of ratios to the floor as Markdown: a summary, and every layer, the farthest first."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row.op, row.layout), []).append(to_floor(row))
    means = [(*key, MOVED[key], float(np.exp(np.mean([log(r) for r in found]))), max(found)) for key, found in groups.items()]
    lines = [
        (row.network, row.layer, row.size, row.layout, row.op, moved(row) / 1e6, row.median("fastbn") * 1e6, to_floor(row))
        for row in sorted(rows, key=to_floor, reverse=True)
    ]
    header = ("network", "layer", "NCHW shape", "layout", "operation", "MB moved", "fastbn µs", "x floor")
    return "\n\n".join((
        "# Ratio to the floor",
        "The floor is a copy of as many bytes as the call must move.",
        table(("operation", "layout", "tensors moved", "geometric mean", "largest"), means),
        table(header, lines),
    )) + "\n"  # fmt: skip


def draw(about: dict[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw one panel for each operation, one point for each layer, and save it as PNG and SVG.

    Parameters
    ----------
    about : dict
        The machine.
    rows : sequence of Row
    folder : Path
        Made if it is not there.

    Returns
    -------
    list of Path
        The files.
    """
    from matplotlib.figure import Figure

    sizes = sorted({row.nbytes for row in rows})
    copies = [float(np.median([row.median("copy") for row in rows if row.nbytes == size])) * 1e6 for size in sizes]
    figure = Figure((12, 4.5), layout="constrained")
    panels = figure.subplots(1, len(OPS), sharex=True, sharey=True)
    for panel, op in zip(panels, OPS, strict=True):
        panel.plot([2 * size / 1e6 for size in sizes], copies, color="black", linewidth=1, label="copy")
        for layout, marker in (("NCHW", "o"), ("NHWC", "^")):
            chosen = [row for row in rows if (row.op, row.layout) == (op, layout)]
            moves, times = [moved(row) / 1e6 for row in chosen], [row.median("fastbn") * 1e6 for row in chosen]
            panel.scatter(moves, times, s=18, alpha=0.7, marker=marker, label=layout)
        panel.set(title=op, xscale="log", yscale="log", xlabel="MB moved")
        panel.grid(visible=True, alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("µs, median")
    version, threads = about["config"]["fastbn"], f"{about['threads']} threads"
    figure.suptitle(", ".join((f"fastbn {version}", about["dtype"], threads, about["processor"], about["date"])))
    return options.write_figure(figure, folder, "roofline")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw what was measured, and write the table."""
    parser = argparse.ArgumentParser("python -m bench.roofline", description="Draw time against bytes, as python -m bench has measured it.")
    add = parser.add_argument
    add("results", type=Path, nargs="?", default=RESULTS / "bench.json", help="what python -m bench wrote (default: %(default)s)")
    add("folder", type=options.output_folder, nargs="?", default=str(RESULTS), help="for the drawings (default: %(default)s)")
    arguments = parser.parse_args(argv)
    options.need(parser, "the drawing", "matplotlib")
    try:
        about, rows = read(arguments.results, parser)
    except OSError as error:
        parser.error(f"cannot read {arguments.results}: {error.strerror}; python -m bench writes it")
    written = options.write({arguments.folder / "roofline.md": ratios(rows)})
    print("wrote", *draw(about, rows, arguments.folder), file=sys.stderr)
    return int(not written)


if __name__ == "__main__":
    sys.exit(options.run(main))
