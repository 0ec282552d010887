"""The tables and pictures of README.md and docs/performance.md, from one run: ``python -m bench readme``.

What stands between ``<!-- bench: NAME -->`` and ``<!-- end -->`` is written anew from bench/results/readme.json; what is about
threads, from bench/results/situations.json, which `python -m bench.situations --json` has written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from textwrap import fill
from typing import Any

from bench import options, page, report, situations, text
from bench.measure import Row
from bench.peers import OPS
from bench.ratios import STEPS, behind, best, mean, over_best, reason, shares

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "bench" / "results" / "readme.json"
SITUATIONS = ROOT / "bench" / "results" / "situations.json"
TEXTS = (ROOT / "README.md", ROOT / "docs" / "performance.md")
PICTURES = ROOT / "docs" / "pictures"
TITLES = {"inference": "inference", "forward": "training forward", "backward": "backward"}
_COLORS = {
    "light": ("#1d2430", "#d5dae1", "#0b6bcb", "#c2410c", "#15803d", "#7e22ce", "#64748b"),
    "dark": ("#e6e9ee", "#333c48", "#62aef7", "#f79257", "#5fce87", "#c79bf2", "#9aa7b8"),
}
_WORST = 12


def _sizes(rows: Sequence[Row]) -> str:
    """Each shape of the set of sizes: the time in copies and, in brackets, over the best peer."""
    chosen = [row for row in rows if row.network == "floor" and row.dtype == "float32"]
    shapes = sorted({row.shape for row in chosen}, key=lambda shape: [row.shape for row in chosen].index(shape))
    found = {(row.shape, row.layout, row.op): row for row in chosen}
    lines = []
    for shape in shapes:
        cells = []
        for layout in ("NCHW", "NHWC"):
            for op in OPS:
                row = found.get((shape, layout, op))
                cells.append("-" if row is None else f"{row.ratio('fastbn', 'copy'):.2f} ({over_best(row):.2f})")
        lines.append(["×".join(map(str, shape)), f"{4 * prod(shape) / 1e6:.1f}", *cells])
    header = ["float32 tensor", "MB", *(f"{layout} {TITLES[op]}" for layout in ("NCHW", "NHWC") for op in OPS)]
    return text.table(header, lines)


def _lists(rows: Sequence[Row]) -> str:
    """Each list, dtype and operation, both layouts together, against the best peer."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.network != "floor":
            groups.setdefault((row.network, row.dtype, row.op), []).append(row)
    lines = [
        [
            network, dtype, TITLES[op], len(found),
            mean((over_best(row), row.repeats) for row in found), min(map(over_best, found)), *map(report.percent, shares(found)),
            *(mean((row.ratio("fastbn", unit), row.repeats) for row in found) for unit in ("copy", "limit")),
        ]
        for (network, dtype, op), found in groups.items()
    ]  # fmt: skip
    header = ("list", "dtype", "operation", "rows", "over best", "least", *(f"≥ {step}×" for step in STEPS), "x copy", "x limit")
    return text.table(header, lines)


def _peers(rows: Sequence[Row]) -> str:
    return text.markdown([report.peers(rows)]).strip()


def _behind(rows: Sequence[Row]) -> str:
    lost = behind(rows)
    if not lost:
        return "None."
    lines = [
        [
            row.network, row.size, row.layout, row.dtype, TITLES[row.op], best(row), over_best(row), row.ratio("fastbn", "limit"),
            reason(row),
        ]
        for row in lost[:_WORST]
    ]  # fmt: skip
    header = ("list", "shape", "layout", "dtype", "operation", "best", "over best", "x limit", "likely reason")
    more = f"\n\nThese are the worst {_WORST} of {len(lost)}, of {len(rows)} rows in all." if len(lost) > _WORST else ""
    return f"{len(lost)} of {len(rows)} rows, the worst first.\n\n{text.table(header, lines)}{more}"


def _machine(about: dict[str, Any], rows: Sequence[Row]) -> str:
    return report.facts(about, rows, {})


_LIBRARIES = {
    "torch": "PyTorch", "onednn": "oneDNN", "openvino": "OpenVINO", "jax": "JAX", "tensorflow": "TensorFlow", "onnxruntime": "ONNX Runtime",
    "keras": "Keras",
}  # fmt: skip


def _line(about: dict[str, Any], rows: Sequence[Row]) -> str:
    ran = {name: sum(name in row.times for row in rows) for name in _LIBRARIES}
    took_part = ", ".join(
        f"{_LIBRARIES[name]} {about['versions'][_LIBRARIES[name]]} ({count})" for name, count in ran.items() if count
    )
    share = shares(rows)
    words = (
        f"On {len(rows)} rows of published lists, against the best library of each row, fastbn is at least as fast in "
        f"{report.percent(share[0])}, twice as fast in {report.percent(share[1])} and five times as fast in "
        f"{report.percent(share[2])} of rows. Not all libraries ran in all rows; the number of rows is in brackets: {took_part}. "
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, {about['date'][:10]}, "
        f"load before {about['load']:.1f}."
    )
    return fill(words, 120, break_long_words=False, break_on_hyphens=False)


def blocks(about: dict[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """What is written, by name."""
    makers: dict[str, Callable[[], str]] = {
        "line": lambda: _line(about, rows), "sizes": lambda: _sizes(rows), "lists": lambda: _lists(rows), "peers": lambda: _peers(rows),
        "behind": lambda: _behind(rows), "machine": lambda: _machine(about, rows),
    }  # fmt: skip
    return {name: make() for name, make in makers.items()}


def of_situations(about: dict[str, Any], rows: Sequence[situations.Row]) -> dict[str, str]:
    """What is written about threads, by name."""
    where = (
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, {about['dtype']}, kernel {about['kernel']}, "
        f"{about['date'][:10]}, load before {about['load'] or 0:.1f}, commit {about['commit']}: `{about['command']}`"
    )
    unstable = "".join(f"\n\n{words}" for words in report.unstable(about))
    return {"situations": f"{situations.gains(rows)}\n\n{fill(where, 120, break_long_words=False, break_on_hyphens=False)}{unstable}"}


def renewed(content: str, found: dict[str, str]) -> str:
    """A text with its blocks written anew.

    Raises
    ------
    KeyError
        If it has a block that is none.
    """
    pattern = re.compile(r"<!-- bench: (\w+) -->\n.*?<!-- end -->", re.DOTALL)
    return pattern.sub(lambda match: f"<!-- bench: {match[1]} -->\n{found[match[1]]}\n<!-- end -->", content)


def pictures(rows: Sequence[Row], threads: Sequence[situations.Row]) -> dict[Path, str]:
    """The drawings, each for light and for dark pages."""
    drawn = {"distribution": page.distribution(rows), "roofline": page.roofline(rows), "situations": situations.plot(threads)}
    made = {}
    for name, draw in drawn.items():
        svg = page.figure(name, draw)
        for theme, colors in _COLORS.items():
            colored = svg
            for variable, color in zip(("--ink", "--grid", *(f"--c{i}" for i in range(5))), colors, strict=True):
                colored = colored.replace(f"var({variable})", color)
            made[PICTURES / f"{name}-{theme}.svg"] = re.sub(r"[ \t]+$", "", colored, flags=re.MULTILINE)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write the texts and the pictures."""
    argv = list(sys.argv[1:] if argv is None else argv)
    about_it = "Write the tables and pictures of the documentation from one run."
    parser = argparse.ArgumentParser("python -m bench readme", description=about_it)
    add = parser.add_argument
    add("run", nargs="?", type=options.input_file, default=str(RUN), help="what python -m bench has written (default: %(default)s)")
    add("--check", action="store_true", help="write nothing; exit status 1 if a table would change")
    arguments = parser.parse_args(argv[1:] if argv[:1] == ["readme"] else argv)
    options.need(parser, "readme", "matplotlib")
    about, rows = report.read(arguments.run, parser)
    about_threads, threads = situations.read_json(SITUATIONS.read_text(encoding="utf-8"))
    found = blocks(about, rows) | of_situations(about_threads, threads)
    texts = {path: renewed(path.read_text(encoding="utf-8"), found) for path in TEXTS}
    if arguments.check:
        stale = [str(path.relative_to(ROOT)) for path, content in texts.items() if path.read_text(encoding="utf-8") != content]
        print("".join(f"{path} would change: python -m bench readme\n" for path in stale), end="", file=sys.stderr)
        return int(bool(stale))
    PICTURES.mkdir(exist_ok=True)
    for path, content in {**texts, **pictures(rows, threads)}.items():
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    return 0
