"""Two runs, row by row: ``python -m bench compare BEFORE.json AFTER.json``.

What is compared is fastbn's time in units of the copy of the same run, so that a machine that was slower as a whole changes
nothing; and how far the ratios to the best peer agree, which says what a run is worth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench import again, options, report, text
from bench.measure import Row
from bench.ratios import mean, over_best

AGREE = 0.10  # ratios of two runs that differ by no more agree


def _changes(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row, float]]:
    """Rows that both runs have, and how many times as fast fastbn became, in units of the copy."""
    known = {again.key(row): row for row in before}
    both = [(known[again.key(row)], row) for row in after if again.key(row) in known]
    return [(old, new, old.ratio("fastbn", "copy") / new.ratio("fastbn", "copy")) for old, new in both]


def agreement(changes: Sequence[tuple[Row, Row, float]]) -> float:
    """The share of rows whose ratios to the best peer differ by no more than 10 %."""
    ratios = [(over_best(old), over_best(new)) for old, new, _ in changes]
    known = [max(a, b) / min(a, b) for a, b in ratios if a == a and b == b]
    return sum(ratio <= 1 + AGREE for ratio in known) / len(known) if known else float("nan")


def parts(before: Sequence[Row], after: Sequence[Row], names: Sequence[str], worst: int = 15) -> list[text.Part]:
    """Write the comparison."""
    changes = _changes(before, after)
    groups: dict[tuple[str, str, str], list[float]] = {}
    for _, new, change in changes:
        groups.setdefault((new.layout, new.dtype, new.op), []).append(change)
    lines = [(*group, len(found), mean((c, 1) for c in found), min(found), max(found)) for group, found in groups.items()]
    ordered = sorted(changes, key=lambda change: change[2])
    chosen = ordered if len(ordered) <= 2 * worst else [*ordered[:worst], *ordered[-worst:]]
    rows = [
        [new.network, new.size, new.layout, new.dtype, new.op, old.median("fastbn") * 1e6, new.median("fastbn") * 1e6, change,
         over_best(old), over_best(new)]
        for old, new, change in chosen
    ]  # fmt: skip
    alone = len(before) + len(after) - 2 * len(changes)
    share = agreement(changes)
    agreed = "" if share != share else f" Ratios to the best peer agree within {AGREE:.0%} in {int(100 * share)} % of them."
    return [
        f"# {names[1]} against {names[0]}",
        f"{len(changes)} rows in both, {alone} in one alone.{agreed}",
        "Above 1, fastbn became faster: its time in units of the copy of the same run, before over after.",
        text.Table(("layout", "dtype", "operation", "rows", "mean", "least", "most"), lines),
        "## Rows that changed most",
        text.Table(
            ("network", "NCHW shape", "layout", "dtype", "operation", "before µs", "after µs", "change", "over best before",
             "over best after"),
            rows, ("NCHW shape", "change", "after µs", "before µs", "over best after", "over best before", "dtype"),
        ),
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        "python -m bench compare", description="Compare two runs, row by row, in units of each one's copy.",
        epilog="example: python -m bench compare before.json after.json --fail-below 0.9",
    )  # fmt: skip
    parser.add_argument("before", type=options.input_file, help="what python -m bench --json has written")
    parser.add_argument("after", type=options.input_file, help="the same, later")
    parser.add_argument("--fail-below", type=options.above_zero("ratio"), metavar="CHANGE", help="exit status 1 if a mean is below this")
    arguments = parser.parse_args(argv[1:] if argv[:1] == ["compare"] else argv)
    (_, before), (_, after) = (report.read(path, parser) for path in (arguments.before, arguments.after))
    written = parts(before, after, (arguments.before.name, arguments.after.name))
    text.show(written)
    means = [line[4] for line in written[3].lines]
    if not means:
        print("the two runs have no row in common", file=sys.stderr)
        return 1
    return int(arguments.fail_below is not None and min(means) < arguments.fail_below)
