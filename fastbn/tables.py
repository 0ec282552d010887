"""Plain text for people: tables, lines and sizes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(count: int, what: str) -> str:
    """A number of things, of which one has no s."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def print_within(start: str, text: str) -> None:
    """Print text after a start, in lines of 80 characters; further lines are indented by the start's length."""
    lines = textwrap.wrap(text, 79 - len(start), break_long_words=False, break_on_hyphens=False) or [""]
    print(start + f"\n{' ' * len(start)}".join(lines))


def size(count: float) -> str:
    """Bytes for people: "32 KiB", "3.2 GB"; powers of 1024 where they leave no more than three digits, as for caches."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit, power in (("KiB", 10), ("MiB", 20), ("GiB", 30)):
        if count % (1 << power) == 0 and count < 1000 << power:
            return f"{int(count) >> power} {unit}"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.1f} KB"
