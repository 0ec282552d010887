"""One page of a run, with its plots, in one file that needs nothing else: for a browser or a phone, light and dark.

matplotlib draws, in colors that no one would choose; in the page they become variables of its style sheet.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from bench import again, report, text
from bench.cases import NETWORKS
from bench.measure import Row
from bench.peers import OPS
from bench.ratios import STEPS, best, gigabytes, mean, over_best, shares, summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID = "#010203", "#010204"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215")
_VARIABLES = {INK: "--ink", GRID: "--grid", **{color: f"--c{i}" for i, color in enumerate(SERIES)}}
_SIZE = (4.5, 3.1)  # inches: small enough that its letters can be read at the width of a phone

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2430; --soft: #5b6675; --grid: #d5dae1; --shade: #f4f6f8;
  --c0: #0b6bcb; --c1: #c2410c; --c2: #15803d; --c3: #7e22ce; --c4: #64748b; }
@media (prefers-color-scheme: dark) { :root { --paper: #12161c; --ink: #e6e9ee; --soft: #9aa5b4; --grid: #333c48; --shade: #1b212a;
  --c0: #62aef7; --c1: #f79257; --c2: #5fce87; --c3: #c79bf2; --c4: #9aa7b8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { color: var(--soft); font-size: .92rem; } ul { padding-left: 1.2rem; }
.warning { border-left: .25rem solid var(--c1); padding-left: .75rem; color: var(--ink); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--shade); border-radius: .5rem; padding: .75rem; } .card b { display: block; font-size: 1.5rem; line-height: 1.3; }
.card span { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--shade); border-radius: .5rem; padding: .75rem; min-width: 0; }
figcaption { font-size: .88rem; color: var(--soft); margin-bottom: .5rem; } figcaption b { color: var(--ink); }
svg { width: 100%; height: auto; display: block; }
.table { overflow-x: auto; margin: .5rem 0; } table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th { background: var(--paper); color: var(--soft); font-weight: 600; }
th.words, td.words { text-align: left; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); }
@media (max-width: 40rem) { td:first-child, th:first-child { position: static; } }
code { background: var(--shade); padding: .1rem .3rem; border-radius: .25rem; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0; }
"""


def figure(name: str, draw: Callable[[Axes], None]) -> str:
    """Draw into an SVG whose colors are the page's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9, "axes.labelsize": 9,
        "legend.fontsize": 8,
        "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GRID, "grid.color": GRID,
        "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none", "legend.frameon": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(_SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(visible=True, linewidth=0.6)
        axes.set_axisbelow(True)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r".*?(?=<svg)", "", file.getvalue(), count=1, flags=re.DOTALL)
    for _ in range(2):  # as wide as the page lets it
        svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg).replace("url(#", f"url(#{name}-")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg


def _ratios(rows: Sequence[Row], op: str) -> list[float]:
    return sorted(ratio for row in rows if row.op == op and (ratio := over_best(row)) == ratio)


def _times(axes: Axes, which: str, ticks: Sequence[float] = (0.5, 1, 2, 5, 10)) -> None:
    """Put ratios on a logarithmic axis, with ticks that people read."""
    low, high = (axes.get_xlim if which == "x" else axes.get_ylim)()
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    chosen = [tick for tick in ticks if low <= tick <= high] or [1]
    axis.set_ticks(chosen, [f"{tick:g}x" for tick in chosen])
    axis.set_ticks([], minor=True)
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)


def distribution(rows: Sequence[Row]) -> Callable[[Axes], None]:
    """The share of rows that are so many times as fast, or more."""

    def draw(axes: Axes) -> None:
        for op, color in zip(OPS, SERIES, strict=False):
            if found := _ratios(rows, op):
                share = [100 * (1 - i / len(found)) for i in range(len(found))]
                axes.step(found, share, where="pre", color=color, label=op, linewidth=1.6)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        everything = [ratio for op in OPS for ratio in _ratios(rows, op)]
        axes.set_xlim(min(0.8, *everything) * 0.95, max(2, *everything) * 1.05)
        _times(axes, "x")
        axes.set(ylim=(0, 102), xlabel="times as fast as the best peer, at least", ylabel="% of rows")
        axes.legend(loc="upper right")

    return draw


def networks(rows: Sequence[Row]) -> Callable[[Axes], None]:
    """The mean ratio to the best peer, in each network."""

    def draw(axes: Axes) -> None:
        names = list(dict.fromkeys(row.network for row in rows))
        found = summarize(rows)
        for i, (op, color) in enumerate(zip(OPS, SERIES, strict=False)):
            values = [mean((s.over_best, s.layers) for s in found if s.network == name and s.op == op) for name in names]
            axes.barh([place + 0.27 * (i - 1) for place in range(len(names))], values, height=0.25, color=color, label=op)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("times as fast, geometric mean")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)  # above the bars, which may be anywhere

    return draw


def roofline(rows: Sequence[Row]) -> Callable[[Axes], None]:
    """GB/s against the size of x, beside the copy and the limit."""

    def draw(axes: Axes) -> None:
        sizes = sorted({row.nbytes for row in rows})
        for name, style, color in (("copy", "-", SERIES[4]), ("limit", "--", SERIES[3])):
            chosen = [(s, [gigabytes(r, name) for r in rows if r.nbytes == s and r.op == "inference" and name in r.times]) for s in sizes]
            line = [(size / 1e6, sorted(found)[len(found) // 2]) for size, found in chosen if found]
            if line:
                axes.plot(*zip(*line, strict=True), style, color=color, label=f"{name}, 2 tensors", linewidth=1.2)
        for op, color in zip(OPS, SERIES, strict=False):
            chosen_rows = [row for row in rows if row.op == op]
            axes.scatter([row.nbytes / 1e6 for row in chosen_rows], [gigabytes(row) for row in chosen_rows], s=9, color=color, label=op)
        axes.set(xscale="log", xlabel="MB of x", ylabel="GB/s, each tensor counted once")
        axes.set_ylim(bottom=0)
        axes.legend(loc="best", ncols=2)

    return draw


def latency(rows: Sequence[Row], most: int = 1 << 20) -> Callable[[Axes], None] | None:
    """Median and 99th percentile of small calls, beside the best peer's."""
    small = [row for row in rows if row.nbytes <= most and row.op == "forward"]
    if not small:
        return None

    def draw(axes: Axes) -> None:
        sizes = [row.nbytes / 1024 for row in small]
        axes.scatter(sizes, [row.median("fastbn") * 1e6 for row in small], s=10, color=SERIES[0], label="fastbn")
        axes.scatter(sizes, [row.times["fastbn"].p99 * 1e6 for row in small], s=10, marker="_", color=SERIES[0], label="fastbn, p99")
        with_peer = [row for row in small if best(row)]
        places = [row.nbytes / 1024 for row in with_peer]
        axes.scatter(places, [row.median(best(row)) * 1e6 for row in with_peer], s=10, color=SERIES[1], label="best peer")
        axes.scatter(places, [row.times[best(row)].p99 * 1e6 for row in with_peer], s=10, marker="_", color=SERIES[1], label="its p99")
        axes.set(xscale="log", yscale="log", xlabel="KiB of x", ylabel="µs, training forward")
        axes.legend(loc="best", ncols=2)

    return draw


def scaling(rows: Sequence[Row]) -> Callable[[Axes], None] | None:
    """How many times as fast more threads are than one, where a run has several numbers of threads."""
    counts = sorted({row.threads for row in rows})
    if len(counts) < 2:
        return None
    times = {(again.key(row)[:-1], row.threads): row.median("fastbn") for row in rows}
    found = [(key, n, times[key, counts[0]] / value) for (key, n), value in times.items() if (key, counts[0]) in times]

    def draw(axes: Axes) -> None:
        for op, color in zip(OPS, SERIES, strict=False):
            line = [mean((ratio, 1) for key, threads, ratio in found if key[-1] == op and threads == n) for n in counts]
            axes.plot(counts, line, "o-", color=color, label=op, linewidth=1.4, markersize=4)
        axes.plot(counts, [n / counts[0] for n in counts], ":", color=INK, linewidth=0.8, label="ideal")
        axes.set_xticks(counts)
        axes.set(xlabel="threads", ylabel=f"times as fast as {counts[0]}")
        axes.legend(loc="upper left")

    return draw


def _plots(rows: Sequence[Row]) -> str:
    widest = report.widest(rows)
    peers = any(best(row) for row in rows)
    drawn = [
        ("distribution", "How often, how much", "Rows that are at least so many times as fast as their best peer.",
         distribution(widest) if peers else None),
        ("networks", "Each network", "Against the best peer of each row; a shape counts as often as the network has it.",
         networks(widest) if peers else None),
        ("roofline", "Bytes per second", "Each point is a row; the lines are what moving the bytes takes.", roofline(widest)),
        ("latency", "Small calls", "Training forwards of tensors of up to 1 MiB: median and 99th percentile.", latency(widest)),
        ("scaling", "Threads", "Geometric means over the same rows.", scaling(rows)),
    ]  # fmt: skip
    return "\n".join(
        f"<figure><figcaption><b>{title}.</b> {about}</figcaption>{figure(name, draw)}</figure>"
        for name, title, about, draw in drawn
        if draw is not None
    )


def _table(whole: text.Table) -> str:
    filled = whole.filled()
    kinds = ["" if filled.is_number(i) else ' class="words"' for i in range(len(filled.header))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, filled.header, strict=True))
    cells = [[f"<td{kind}>{escape(text.cell(value))}</td>" for kind, value in zip(kinds, line, strict=True)] for line in filled.lines]
    lines = "".join(f"<tr>{''.join(line)}</tr>" for line in cells)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _prose(part: str) -> str:
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", re.sub(r"\*([^*]+)\*", r"<em>\1</em>", escape(part, quote=False)))
    if words.startswith("- "):
        return "<ul>" + "".join(f"<li>{item}</li>" for item in re.split(r"(?:^|\n)- ", words)[1:]) + "</ul>"
    return f"<p>{words}</p>"


def _parts(parts: Sequence[text.Part]) -> str:
    made = []
    for part in parts:
        if isinstance(part, text.Table):
            made.append(_table(part))
        elif part.startswith("#"):
            made.append(f"<h2>{escape(part.lstrip('# '))}</h2>")
        else:
            made.append(_prose(part))
    return "\n".join(made)


def _cards(rows: Sequence[Row]) -> str:
    cards = []
    for op in OPS:
        middle = mean((over_best(row), row.repeats) for row in rows if row.op == op)
        if middle == middle:
            cards.append((f"{middle:.2f}x", f"{op}: as fast as the best peer, geometric mean"))
    parts = zip(STEPS, shares(rows), strict=True)
    cards += [(report.percent(part), f"of {len(rows)} rows at least {step}x") for step, part in parts if part == part]
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{about}</span></div>' for value, about in cards)
    return f'<div class="cards">{boxes}</div>'


def html(about: dict[str, Any], rows: Sequence[Row], left_out: Mapping[str, int]) -> str:
    """Write the page.

    Parameters
    ----------
    about : dict
        The machine.
    rows : sequence of Row
    left_out : mapping
        Rows of each network that were not measured.

    Returns
    -------
    str
    """
    (_, facts, *rest), every = report.summary(about, rows, left_out), report.layers(rows)
    title = f"fastbn {about['config']['fastbn']}: batch norm on {about['processor']}"
    names = ", ".join(NETWORKS[name].title if name in NETWORKS else name for name in dict.fromkeys(row.network for row in rows))
    warning = "".join(f'<p class="warning">{escape(text)}</p>' for text in report.unstable(about, [row.times for row in rows]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(names)}. {escape(about["dtype"])}, {about["threads"]} threads, {escape(about["date"][:10])}.</p>
{warning}
{_cards(report.widest(rows))}
<div class="plots">
{_plots(rows)}
</div>
{_parts(rest)}
<h2>Machine, versions, command</h2>
{_parts([facts])}
<details><summary>Every row</summary>
{_parts(every)}
</details>
</body></html>
"""
