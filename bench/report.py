"""The report: the machine, a summary of each network, the worst layers and a table of all; and the same as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn
from bench.cases import NETWORKS
from bench.measure import Row
from bench.text import Part, Table
from bench.timing import Times

# Tensors that any implementation must read or write once, whatever the layout: for GB/s.
TENSORS = {"inference": 2, "forward": 2, "backward": 3}

# A load of others per core, and a spread of times, above which figures mean little; and in how many rows.
BUSY, WIDE, SOME = 0.25, 0.25, 0.25

_NOTES = """\
Times are medians; the contenders took turns in one process. *copy* is a copy of x into an array already there, with as
many threads, and *x copy* is the time in units of it. *over NumPy* and *over PyTorch* are speed-ups. All of these write into
an array already there; *fresh* makes a new output on each call, and is compared with PyTorch doing the same. PyTorch's
backward always makes new outputs. GB/s counts each tensor once: x and y, or x, dy and dx. The error is the largest
|fastbn - reference| / max(1, |reference|), with the reference in float64; tensors of more than 2^20 elements are compared on
eight channels, the first and the last among them."""


class Summary(NamedTuple):
    """One operation on all layers of a network: sums in milliseconds, geometric means of ratios, largest error."""

    network: str
    layout: str
    op: str
    layers: int
    fastbn_ms: float
    torch_ms: float
    to_copy: float
    over_numpy: float
    over_torch: float
    fresh_over_torch: float
    error: float


def load() -> dict[str, Any]:
    """How busy the machine is before the start: processes that run, on average over a minute, and cores."""
    return {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "cores": os.cpu_count()}


def machine(dtype: str) -> dict[str, Any]:
    """Describe the machine, the versions, the moment, and what fastbn will run on a dtype."""
    model, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(": ", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    config = fastbn.show_config()
    return {
        "processor": model,
        **load(),
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": fastbn.get_num_threads(),
        "dtype": dtype,
        "kernel": config["pinned"] or config["selected"][dtype],
        "versions": {"Python": platform.python_version(), "NumPy": np.__version__, "PyTorch": _version("torch")},
        "config": config,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _mean(rows: Sequence[Row], over: str, under: str) -> float:
    """Geometric mean of a ratio of times over the layers of a network."""
    return float(np.exp(np.average([log(row.ratio(over, under)) for row in rows], weights=[row.repeats for row in rows])))


def _total(rows: Sequence[Row], name: str) -> float:
    return sum(row.repeats * row.median(name) for row in rows) * 1e3


def summarize(rows: Iterable[Row]) -> list[Summary]:
    """Summarize each network, layout and operation; a shape counts as often as the network has it."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.network, row.layout, row.op), []).append(row)
    return [
        Summary(
            *group,
            sum(row.repeats for row in layers),
            _total(layers, "fastbn"),
            _total(layers, "torch"),
            _mean(layers, "fastbn", "copy"),
            _mean(layers, "numpy", "fastbn"),
            _mean(layers, "torch", "fastbn"),
            _mean(layers, "torch fresh", "fastbn fresh"),
            max(row.error for row in layers),
        )
        for group, layers in groups.items()
    ]


def _layer(row: Row) -> list[object]:
    """One line of the table of layers."""
    us, fast = 1e6, row.times["fastbn"]
    return [
        row.layer, row.size, row.repeats, row.layout, row.op, row.median("copy") * us, fast.median * us, fast.p99 * us,
        TENSORS[row.op] * row.nbytes / fast.median / 1e9, row.ratio("fastbn", "copy"), row.ratio("numpy", "fastbn"),
        row.ratio("torch", "fastbn"), row.median("fastbn fresh") * us, row.ratio("torch fresh", "fastbn fresh"), row.error,
    ]  # fmt: skip


_LAYER = (
    "layer", "NCHW shape", "layers", "layout", "operation", "copy µs", "fastbn µs", "p99 µs", "GB/s", "x copy", "over NumPy",
    "over PyTorch", "fresh µs", "fresh over PyTorch", "error",
)  # fmt: skip
_SUMMARY = (
    "network", "layout", "operation", "layers", "fastbn ms", "PyTorch ms", "x copy", "over NumPy", "over PyTorch", "fresh over PyTorch",
    "error",
)  # fmt: skip


# What a narrow terminal does without, the last one first.
_DISPENSABLE = (
    "NCHW shape", "x copy", "fastbn µs", "over PyTorch", "over NumPy", "fastbn ms", "copy µs", "PyTorch ms", "fresh over PyTorch", "layers",
    "p99 µs", "GB/s", "fresh µs", "error", "layer",
)  # fmt: skip


def unstable(about: dict[str, Any], measured: Sequence[Mapping[str, Times]] = ()) -> list[str]:
    """Say in words what speaks against the times: a busy machine before the start, times that differ from call to call."""
    found = []
    if (running := about["load"] or 0.0) > BUSY * (about["cores"] or 1):
        found.append(f"other processes were running (load {running:.1f} on {about['cores']} cores before the start)")
    for name in dict.fromkeys(name for times in measured for name in times):
        wide = sum(name in times and times[name].spread > WIDE for times in measured)
        if wide > SOME * len(measured):
            found.append(f"half of {name}'s times spread over more than {WIDE:.0%} of the median in {wide} of {len(measured)} measurements")
    return [f"Unstable: {'; '.join(found)}. Do not rely on these figures; measure again on a quiet machine"] if found else []


def _left_out(left_out: Mapping[str, int]) -> list[str]:
    """Say what was not measured."""
    if not left_out:
        return []
    names = ", ".join(f"{NETWORKS[name].title} ({count})" for name, count in left_out.items())
    return [f"{sum(left_out.values())} measurements left out, because the time was over or Ctrl-C came: {names}"]


def _facts(about: dict[str, Any], rows: Sequence[Row], left_out: Mapping[str, int]) -> str:
    """Items about the machine, the versions, and what may be wrong with the figures."""
    versions = {"fastbn": about["config"]["fastbn"], **about["versions"]}
    facts = [
        f"{about['processor']}, {about['cores']} cores",
        ", ".join(f"{level.upper()} {size >> 10} KiB" for level, size in about["config"]["caches"].items()),
        f"{about['system']}, {about['date']}, load before {about['load'] or 0:.1f}",
        ", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items()),
        f"{about['threads']} threads, {about['dtype']}, kernel {about['kernel']}",
        "Parameters: " + ", ".join(dict.fromkeys(row.parameters for row in rows)),
    ]
    if about["versions"]["PyTorch"] is None:
        facts.append("No columns for PyTorch: it is not installed (`pip install torch`)")
    return "\n".join(f"- {fact}" for fact in [*facts, *_left_out(left_out), *unstable(about, [row.times for row in rows])])


def summary(about: dict[str, Any], rows: Sequence[Row], left_out: Mapping[str, int], worst: int = 10) -> list[Part]:
    """Write the first part of the report: the machine, the summary and the worst layers."""
    slow = sorted(rows, key=lambda row: row.ratio("fastbn", "copy"), reverse=True)[:worst]
    behind = sorted((row for row in rows if row.ratio("torch", "fastbn") < 1), key=lambda row: row.ratio("torch", "fastbn"))[:worst]
    parts: list[Part] = [
        "# fastbn on the layers of real networks",
        _facts(about, rows, left_out),
        _NOTES,
        "## Networks",
        "Sums over all layers of a network that were measured, a shape as often as the network has it; geometric means of the ratios.",
        Table(_SUMMARY, [_line(found) for found in summarize(rows)], _DISPENSABLE),
        "## Farthest from the copy",
        Table(("network", *_LAYER), [[row.network, *_layer(row)] for row in slow], _DISPENSABLE),
    ]
    if behind:
        parts += ["## Slower than PyTorch", Table(("network", *_LAYER), [[row.network, *_layer(row)] for row in behind], _DISPENSABLE)]
    return parts


def _line(found: Summary) -> list[object]:
    """One line of the table of networks; where layers are missing, how many there are."""
    total = len(NETWORKS[found.network].layers)
    return [f"{found.layers} of {total}" if name == "layers" and found.layers < total else value for name, value in found._asdict().items()]


def layers(rows: Sequence[Row]) -> list[Part]:
    """Write the second part of the report: every layer of every network."""
    parts: list[Part] = []
    for name in dict.fromkeys(row.network for row in rows):
        network = NETWORKS[name]
        about = f"{network.reason[0].upper()}{network.reason[1:]}. Source: {network.source}."
        parts += [f"## {network.title}", about, Table(_LAYER, [_layer(row) for row in rows if row.network == name])]
    return parts


def as_json(about: dict[str, Any], rows: Sequence[Row], left_out: Mapping[str, int]) -> str:
    """Write everything that was measured, with the machine and the summary, as JSON; null for NaN."""
    results = [row._asdict() | {"times": {name: times._asdict() for name, times in row.times.items()}} for row in rows]
    summaries = [{key: None if value != value else value for key, value in s._asdict().items()} for s in summarize(rows)]
    return json.dumps({"machine": about, "left_out": dict(left_out), "summary": summaries, "rows": results}, indent=1) + "\n"


def read_json(text: str) -> tuple[dict[str, Any], list[Row]]:
    """Read the machine and the rows back from what `as_json` wrote."""
    found = json.loads(text)
    rows = [
        Row(**row | {"shape": tuple(row["shape"]), "times": {name: Times(**times) for name, times in row["times"].items()}})
        for row in found["rows"]
    ]
    return found["machine"], rows
