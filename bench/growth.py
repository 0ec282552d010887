"""Time per byte from 4 KiB to 1 GiB: ``python -m bench.growth FOLDER``.

Cost should grow with the size and with nothing else. Each operation runs on arrays of 64 channels that are there
already, beside a copy of the same array; one table, and a drawing as PNG and SVG, of nanoseconds for each KiB of x.
Steps are expected where the arrays of a call no longer fit a cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

import fastbn
from bench.peers.copy_peer import copy_into
from bench.report import table
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
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"growth.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table and draw."""
    parser = argparse.ArgumentParser("python -m bench.growth", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("bench/results"), help="where the drawings go")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="bytes of the largest array; four of them are needed")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each size and layout")
    arguments = parser.parse_args(argv)
    cases = [(layout, size) for layout in LAYOUTS for size in SIZES if size <= arguments.largest]
    progress = track(cases, console=Console(stderr=True))
    found = {(layout, size): measure(size, layout, arguments.seconds) for layout, size in progress}
    rows = [(f"{size >> 10} KiB", layout, *(found[layout, size][name] for name in CONTENDERS)) for layout, size in cases]
    text = table(("x", "layout", *(f"{name}, ns per KiB" for name in CONTENDERS)), rows)
    paths = draw(found, arguments.folder)
    (arguments.folder / "growth.md").write_text(f"# Time per byte\n\n{text}\n", encoding="utf-8")
    print(text)
    print("wrote", arguments.folder / "growth.md", *paths)


if __name__ == "__main__":
    main()
