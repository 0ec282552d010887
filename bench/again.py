"""Reports from what runs have written: ``python -m bench report`` and ``python -m bench merge``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from bench import options, report, roofline, text
from bench.cases import NETWORKS
from bench.measure import Row
from bench.timing import combine as combine_times

WRITTEN = ("json", "markdown", "csv", "html")  # options that name a report
Key = tuple[str, tuple[int, ...], str, str, str, int]


def key(row: Row) -> Key:
    """What two runs have in common where they measured the same."""
    return row.network, row.shape, row.layout, row.dtype, row.op, row.threads


def combine(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of several runs as one: times of the same row are combined, as those of so many processes."""
    found: dict[Key, list[Row]] = {}
    for row in (row for run in runs for row in run):
        found.setdefault(key(row), []).append(row)
    return [
        rows[0]._replace(
            times={
                name: combine_times([row.times[name] for row in rows if name in row.times])
                for name in dict.fromkeys(name for row in rows for name in row.times)
            },
            error=max(row.error for row in rows),
        )
        for rows in found.values()
    ]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By network, the largest first; layouts and operations stay in their order."""
    order = list(NETWORKS)
    return sorted(rows, key=lambda row: (order.index(row.network) if row.network in order else len(order), -prod(row.shape), row.dtype))


def write(about: dict[str, Any], rows: list[Row], left_out: Mapping[str, int], arguments: argparse.Namespace) -> bool:
    """Write the reports that the arguments name; whether all could be."""
    rows[:] = in_order(rows)
    wanted = vars(arguments)
    texts: dict[Path, str] = {}
    if path := wanted.get("json"):
        texts[path] = report.as_json(about, rows, left_out)
    if path := wanted.get("markdown"):
        texts[path] = text.markdown([*report.summary(about, rows, left_out), *report.layers(rows)])
    if path := wanted.get("csv"):
        texts[path] = report.as_csv(rows)
    if path := wanted.get("html"):
        from bench import page

        texts[path] = page.html(about, rows, left_out)
    if path := wanted.get("roofline"):
        texts[path / "roofline.md"] = roofline.ratios(rows)
    return options.write(texts)


def main(argv: Sequence[str]) -> int:
    """Read runs, write reports, and print the summary."""
    command, *rest = argv
    parser = argparse.ArgumentParser(
        f"python -m bench {command}",
        description="Write reports of what python -m bench has written." if command == "report" else
        "Write what several runs have measured as one. Rows that were measured more than once count as those of several processes.",
    )  # fmt: skip
    add = parser.add_argument
    add("runs", nargs="+", type=options.input_file, metavar="RUN.json", help="what python -m bench --json has written")
    for name in WRITTEN:
        add(f"--{name}", type=options.output_file, metavar="PATH", help="a file that is there is kept under another name")
    arguments = parser.parse_args(rest)
    options.need_different(parser, arguments, WRITTEN)
    if command == "merge" and arguments.json is None:
        parser.error("merge needs --json")
    if arguments.html is not None:
        options.need(parser, "--html", "matplotlib")
    runs = [report.read(path, parser) for path in arguments.runs]
    about = dict(runs[0][0])
    if len(runs) > 1:
        about["dtype"] = ", ".join(dict.fromkeys(dtype for run, _ in runs for dtype in run["dtype"].split(", ")))
        about["command"] = "; ".join(dict.fromkeys(run.get("command", "unknown") for run, _ in runs))
        about["versions"] = {name: number for run, _ in runs for name, number in run["versions"].items()}
        about["load"] = max(run["load"] or 0.0 for run, _ in runs)
    rows = combine([rows for _, rows in runs])
    written = write(about, rows, {}, arguments)
    text.show(report.summary(about, rows, {}))
    return int(not written)
