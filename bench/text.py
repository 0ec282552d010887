"""A report is a sequence of parts, text and tables: Markdown in a file or a pipe, drawn tables that fit on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import isnan
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Drawn


class Table(NamedTuple):
    """Lines of cells under a header; a narrow terminal does without the `dispensable` columns, the last one first."""

    header: Sequence[str]
    lines: Sequence[Sequence[object]]
    dispensable: Sequence[str] = ()

    def without(self, *names: str) -> Table:
        """Leave out columns."""
        kept = [i for i, name in enumerate(self.header) if name not in names]
        return self._replace(header=[self.header[i] for i in kept], lines=[[line[i] for i in kept] for line in self.lines])

    def filled(self) -> Table:
        """Leave out the columns that hold no number, as those of a package that is not installed."""
        columns = zip(self.header, zip(*self.lines, strict=True), strict=False)
        return self.without(*(name for name, column in columns if all(map(_missing, column))))

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers, and so stands to the right."""
        return all(isinstance(line[column], (int, float)) for line in self.lines)


Part = str | Table  # a text is a heading after "#", items after "-", or a paragraph


def _missing(value: object) -> bool:
    return isinstance(value, float) and isnan(value)


def cell(value: object) -> str:
    """Write a number rounded, NaN as a dash, anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    if isnan(value):
        return "-"
    if 0 < abs(value) < 0.005:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """Write a Markdown table: numbers to the right, rounded; a dash for NaN."""
    whole = Table(header, lines)
    rule = ["---:" if whole.is_number(i) else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in (header, rule, *lines))


def markdown(parts: Sequence[Part]) -> str:
    """Write a report as Markdown."""
    return "\n\n".join(table(*part.filled()[:2]) if isinstance(part, Table) else part for part in parts) + "\n"


def _width(name: str, column: Sequence[object]) -> int:
    """Characters that a column takes: a header may be broken between words, a cell not at all. Two are for the gap."""
    return max(len(text) for text in [*name.split(), *map(cell, column)]) + 2


def fit(whole: Table, width: int) -> tuple[Table, list[str]]:
    """Leave out dispensable columns until the table has at most `width` characters.

    Returns
    -------
    table : Table
    left_out : list of str
    """
    widths = {name: _width(name, [line[i] for line in whole.lines]) for i, name in enumerate(whole.header)}
    left_out: list[str] = []
    for name in reversed([name for name in whole.dispensable if name in widths]):
        if sum(widths.values()) <= width:
            break
        del widths[name]
        left_out.append(name)
    return whole.without(*left_out), left_out


def show(parts: Sequence[Part]) -> None:
    """Print a report: as Markdown into a pipe or a file, drawn for a terminal."""
    if not sys.stdout.isatty():
        sys.stdout.write(markdown(parts))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    for part in parts:
        if isinstance(part, Table):
            _draw(console, part.filled())
        elif part.startswith("#"):
            console.print(f"[bold]{escape(part.lstrip('# '))}[/]", "")
        elif part.startswith("- "):
            console.print(escape(part), "")
        else:  # lines broken for a file would be broken twice
            console.print(escape(" ".join(part.split())), "")


def drawn(whole: Table, width: int) -> tuple[Drawn, list[str]]:
    """A table for a terminal of that width, and the columns that it does without."""
    from rich import box
    from rich.table import Table as Drawn

    shown, left_out = fit(whole, width)
    made = Drawn(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, name in enumerate(shown.header):  # broken here, because rich breaks cells as readily as headers
        broken = fill(name, _width(name, [line[i] for line in shown.lines]) - 2)
        made.add_column(broken, justify="right" if shown.is_number(i) else "left", no_wrap=True)
    for line in shown.lines:
        made.add_row(*map(cell, line))
    return made, left_out


def _draw(console: Console, whole: Table) -> None:
    made, left_out = drawn(whole, console.width)
    console.print(made)
    if left_out:
        console.print(f"[dim]not shown for want of width, but in the file: {', '.join(reversed(left_out))}[/]")
    console.print()
