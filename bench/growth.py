"""Time per byte from 4 KiB to 1 GiB: ``python -m bench.growth FOLDER``.

Cost should grow with the size and with nothing else. Each operation runs on arrays of 64 channels that are there
already, beside a copy of the same array; one table, and a drawing as PNG and SVG, of nanoseconds for each KiB of x.
Steps are expected where the arrays of a call no longer fit a cache.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fastbn
from bench import options, report, text
from bench.peers.copy_peer import copy_into
from bench.progress import each
from bench.timing import race

CHANNELS = 64
SIZES = [4096 << i for i in range(19)]  # bytes of x
LAYOUTS = ("NCHW", "NHWC")
CONTENDERS = ("copy", "inference", "forward", "backward")


def shape(nbytes: int, layout: str) -> tuple[int, int, int, int]:
    """Images of at most 64 x 64, as many as it takes."""
    positions = nbytes // (4 * CHANNELS)
    height, width = min(64, positions), min(64, max(1, positions // 64))
    images = max(1, positions // 4096)
    return (images, CHANNELS, height, width) if layout == "NCHW" else (images, height, width, CHANNELS)


def measure(nbytes: int, layout: str, seconds: float) -> dict[str, float]:
    """Nanoseconds for each KiB of x: the median of each contender."""
    x = np.random.default_rng(0).standard_normal(shape(nbytes, layout), dtype=np.float32)
    dy, y = x[::-1].copy(), np.empty_like(x)
    zero, one = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
    _, saved = fastbn.batch_norm_forward(x, one, zero, layout=layout, out=y)
    times = race(
        {
            "copy": lambda: copy_into(y, x, fastbn.get_num_threads()),
            "inference": lambda: fastbn.batch_norm(x, zero, one, one, zero, layout=layout, out=y),
            "forward": lambda: fastbn.batch_norm(x, None, None, one, zero, True, layout=layout, out=y),
            "backward": lambda: fastbn.batch_norm_backward(dy, x, saved, out=y),
        },
        seconds,
    )
    return {name: times[name].median * 1e9 / (nbytes / 1024) for name in CONTENDERS}


def draw(found: dict[tuple[str, int], dict[str, float]], folder: Path) -> list[Path]:
    """Draw one panel for each layout; return the files."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4.5), layout="constrained")
    for panel, layout in zip(figure.subplots(1, len(LAYOUTS), sharex=True, sharey=True), LAYOUTS, strict=True):
        sizes = [size for name, size in found if name == layout]
        for contender in CONTENDERS:
            style = {"color": "black", "linewidth": 1} if contender == "copy" else {"marker": "o", "markersize": 3}
            panel.plot([size / 1024 for size in sizes], [found[layout, size][contender] for size in sizes], label=contender, **style)
        for nbytes in fastbn.show_config()["caches"].values():
            panel.axvline(nbytes / 1024, color="gray", linewidth=0.5, linestyle=":")
        panel.set(title=layout, xscale="log", yscale="log", xlabel="KiB of x (dotted: caches)")
        panel.grid(visible=True, alpha=0.3)
        panel.legend()
        panel.set_ylabel("ns per KiB, median")
    return options.write_figure(figure, folder, "growth")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and draw."""
    parser = argparse.ArgumentParser(
        "python -m bench.growth", description="Time per byte from 4 KiB to 1 GiB. Ctrl-C ends it early and writes what there is."
    )
    add, folder = parser.add_argument, "bench/results"
    add("folder", type=options.output_folder, nargs="?", default=folder, help="where the drawings go (default: %(default)s)")
    add(
        "--largest", type=options.whole(SIZES[0]), default=SIZES[-1], metavar="BYTES",
        help="of the largest array; four of them are needed (default: %(default)s)",
    )  # fmt: skip
    add("--seconds", type=options.seconds, default=2.0, help="for each size and layout (default: %(default)s)")
    arguments = parser.parse_args(argv)
    options.need(parser, "it", "rich", "matplotlib")
    cases = [(layout, size) for size in SIZES if size <= arguments.largest for layout in LAYOUTS]
    before = report.load()
    measured, interrupted = each(
        cases, lambda case: f"{case[0]} {case[1] >> 10} KiB", lambda case: [(case, measure(case[1], case[0], arguments.seconds))]
    )
    found = dict(measured)
    if interrupted:
        print(f"interrupted after {len(found)} of {len(cases)} measurements", file=sys.stderr)
    if not found:
        return options.INTERRUPTED
    rows = [(f"{size >> 10} KiB", layout, *(times[name] for name in CONTENDERS)) for (layout, size), times in found.items()]
    parts: list[text.Part] = [
        "# Time per byte",
        *report.unstable(before),
        text.Table(("x", "layout", *(f"{name}, ns per KiB" for name in CONTENDERS)), rows),
    ]
    written = options.write({arguments.folder / "growth.md": text.markdown(parts)})
    print("wrote", *draw(found, arguments.folder), file=sys.stderr)
    text.show(parts)
    return options.INTERRUPTED if interrupted else int(not written)


if __name__ == "__main__":
    sys.exit(options.run(main))
