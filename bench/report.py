"""The report: the machine, a summary of each network, the worst layers and a table of all; and the same as JSON."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from bench.cases import NETWORKS
from bench.measure import Row
from bench.peers import Contender
from bench.ratios import STEPS, Summary, against, behind, best, gigabytes, over_best, reason, summarize
from bench.text import Part, Table
from bench.timing import Times
from fastbn.benchmark import WIDE

# A load of others per core, and a spread of times, above which figures mean little; and in how many rows.
BUSY, SOME = 0.25, 0.25

_NOTES = """\
Times are medians; the contenders took turns in one process, and each was held against the float64 reference first. *copy* is
a copy of x into an array already there, with as many threads; *limit* moves the bytes of the call in fastbn's order, without
arithmetic: *x copy* and *x limit* are fastbn's time in units of these. *over best* is how many times as fast fastbn is as the
best peer of the row, on the same layout and dtype, with outputs given where the peer takes one; *fresh* compares new outputs on
each call with the best peer that makes new ones. A share is that of rows. GB/s counts each tensor once: x and y, or x, dy and dx.
The error is the largest |fastbn - reference| / max(1, |reference|); tensors of more than 2^20 elements are compared on eight
channels, the first and the last among them."""


def load() -> dict[str, Any]:
    """How busy the machine is before the start: processes that run, on average over a minute, and cores."""
    return {"load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "cores": os.cpu_count()}


def machine(dtype: str, contenders: Sequence[Contender] = (), program: str = "bench") -> dict[str, Any]:
    """Describe the machine, the versions, the moment, the command, and what fastbn will run on a dtype."""
    config = fastbn.show_config()
    versions: dict[str, str | None] = {"Python": platform.python_version(), "NumPy": np.__version__, "PyTorch": _version("torch")}
    for contender in contenders:
        if contender.kind in ("peer", "aside"):
            versions.setdefault(_TITLES.get(contender.package, contender.package), contender.version())
    return {
        "processor": _processor(),
        **load(),
        **_system(),
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_outputs(shlex.join(["python", "-m", program, *sys.argv[1:]])),
        "commit": _commit(),
        "threads": fastbn.get_num_threads(),
        "dtype": dtype,
        "kernel": config["pinned"] or config["selected"][dtype],
        "versions": versions,
        "config": {key: value for key, value in config.items() if key != "place"},  # whose folder it is, is nobody's business
    }


def without_outputs(command: str) -> str:
    """A command without the files that it writes, which are others wherever it is run again."""
    return re.sub(r" --(?:json|markdown|csv|html|plot)[ =]('[^']*'|\S+)", "", command)


_TITLES = {
    "numpy": "NumPy", "torch": "PyTorch", "onednn": "oneDNN", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "jax": "JAX",
    "tensorflow": "TensorFlow", "keras": "Keras",
}  # fmt: skip


def _processor() -> str:
    """The model; where its name tells nothing, its numbers, too."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    found = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in found.items()}
    name = facts.get("model name", platform.processor())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if {"cpu family", "model"} <= facts.keys() else name


def _system() -> dict[str, Any]:
    """Who shares the last cache, nodes of memory, how the clock is governed: None where the system does not say."""
    cpu, nodes = Path("/sys/devices/system/cpu/cpu0"), Path("/sys/devices/system/node")

    def read(path: Path) -> str | None:
        return path.read_text().strip() if path.exists() else None

    return {
        "l3 shared by": read(cpu / "cache/index3/shared_cpu_list"),
        "governor": read(cpu / "cpufreq/scaling_governor"),
        "nodes": len(list(nodes.glob("node[0-9]*"))) or None,
    }


def _commit() -> str | None:
    """Of the checkout, if it is one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],  # noqa: S607  wherever git is
            capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _layer(row: Row) -> list[object]:
    """One line of the table of layers."""
    us, fast = 1e6, row.times["fastbn"]
    return [
        row.layer, row.size, row.repeats, row.layout, row.dtype, row.op,
        row.median("copy") * us, row.median("limit") * us, fast.median * us, fast.spread * 100, fast.p99 * us, gigabytes(row),
        row.ratio("fastbn", "copy"), row.ratio("fastbn", "limit"), best(row) or "-",
        row.median(best(row)) * us, over_best(row), row.median("fastbn fresh") * us, over_best(row, fresh=True), row.error,
    ]  # fmt: skip


_LAYER = (
    "layer", "NCHW shape", "layers", "layout", "dtype", "operation",
    "copy µs", "limit µs", "fastbn µs", "IQR %", "p99 µs", "GB/s", "x copy", "x limit",
    "best peer", "its µs", "over best", "fresh µs", "fresh over best", "error",
)  # fmt: skip
_SUMMARY = (
    "network", "layout", "dtype", "operation", "layers", "over best", "least", *(f">= {step}x" for step in STEPS), "fresh", "x copy",
    "x limit", "GB/s", "error",
)  # fmt: skip


# What a narrow terminal does without, the last one first.
_DISPENSABLE = (
    "NCHW shape", "over best", "fastbn µs", "best peer", "least", ">= 1x", "x copy", ">= 2x", "x limit", "its µs", "GB/s",
    "fresh over best", "fresh", ">= 5x", "copy µs", "layers", "p99 µs", "IQR %", "limit µs", "fresh µs", "error", "dtype", "layer",
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
    names = ", ".join(f"{NETWORKS[name].title if name in NETWORKS else name} ({count})" for name, count in left_out.items())
    return [f"{sum(left_out.values())} measurements left out, because the time was over or Ctrl-C came: {names}"]


def facts(about: dict[str, Any], rows: Sequence[Row], left_out: Mapping[str, int]) -> str:
    """Items about the machine, the versions, and what may be wrong with the figures."""
    versions = {"fastbn": about["config"]["fastbn"], **about["versions"]}
    last = f", shared by CPUs {shared}" if (shared := about.get("l3 shared by")) else ""
    nodes = f", {about['nodes']} node(s) of memory" if about.get("nodes") else ""
    processes = max((times.processes for row in rows for times in row.times.values()), default=1)
    found = [
        f"{about['processor']}, {about['cores']} cores{nodes}, governor {about.get('governor') or 'unknown'}",
        ", ".join(f"{level.upper()} {size >> 10} KiB" for level, size in about["config"]["caches"].items()) + last,
        f"{about['system']}, {about['date']}, load before {about['load'] or 0:.1f}",
        ", ".join(f"{name} {number or 'not installed'}" for name, number in versions.items()),
        f"{about['threads']} threads, {about['dtype']}, kernel {about['kernel']}, {processes} process(es)",
        "Parameters: " + ", ".join(dict.fromkeys(row.parameters for row in rows)),
    ]
    found += [f"`{about['command']}`, commit {about.get('commit') or 'unknown'}"] * ("command" in about)
    if about["versions"]["PyTorch"] is None:
        found.append("No columns for PyTorch: it is not installed (`pip install torch`)")
    refused: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, why in row.left_out.items():
            key = name, "wrong results" if why.startswith("off by") else why
            refused[key] = refused.get(key, 0) + 1
    found += [f"Not timed in {count} of {len(rows)} rows: {name} ({why})" for (name, why), count in refused.items()]
    return "\n".join(f"- {fact}" for fact in [*found, *_left_out(left_out), *unstable(about, [row.times for row in rows])])


def summary(about: dict[str, Any], rows: Sequence[Row], left_out: Mapping[str, int], worst: int = 10) -> list[Part]:
    """Write the first part of the report: the machine, the summary, each peer, and the worst layers."""
    rows = widest(rows)
    slow, lost = sorted(rows, key=lambda row: row.ratio("fastbn", "copy"), reverse=True)[:worst], behind(rows)
    header = ("network", *_LAYER)
    parts: list[Part] = [
        "# fastbn on the layers of real networks",
        facts(about, rows, left_out),
        _NOTES,
        "## Networks",
        "Geometric means of ratios, in which a shape counts as often as the network has it; *least* is the worst row.",
        Table(_SUMMARY, [_line(found) for found in summarize(rows)], _DISPENSABLE),
        "## Each peer",
        "How many times as fast fastbn is, over all rows in which the peer takes part: geometric mean, least, and shares of rows.",
        peers(rows),
        f"## Slower than the best peer: {len(lost)} of {len(rows)} rows",
    ]
    if lost:
        lines = [[row.network, *_layer(row), reason(row)] for row in lost]
        parts += ["The worst first; the reason is a guess from what was measured.", Table((*header, "likely reason"), lines, _DISPENSABLE)]
    else:
        parts += ["None."]
    return [*parts, "## Farthest from the copy", Table(header, [[row.network, *_layer(row)] for row in slow], _DISPENSABLE)]


def peers(rows: Sequence[Row]) -> Table:
    """Each peer for itself."""
    lines = [[name, op, count, middle, least, *map(percent, some)] for name, op, count, middle, least, some in against(rows)]
    return Table(("peer", "operation", "rows", "mean", "least", *(f">= {step}x" for step in STEPS)), lines)


def widest(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with the most threads: what is summarized, where several numbers were measured."""
    most = max((row.threads for row in rows), default=0)
    return [row for row in rows if row.threads == most]


def percent(share: float) -> str:
    """A share for people; never rounded up to all."""
    return "-" if share != share else f"{int(100 * share)} %"


def _line(found: Summary) -> list[object]:
    """One line of the table of networks; where layers are missing, how many there are."""
    total = len(NETWORKS[found.network].layers) if found.network in NETWORKS else found.layers
    layers: object = f"{found.layers} of {total}" if found.layers < total else found.layers
    return [
        found.network, found.layout, found.dtype, found.op, layers, found.over_best, found.least, *map(percent, found.at_least),
        found.fresh, found.to_copy, found.to_limit, found.gigabytes, found.error,
    ]  # fmt: skip


def layers(rows: Sequence[Row]) -> list[Part]:
    """Write the second part of the report: every layer of every network."""
    parts: list[Part] = []
    for name in dict.fromkeys(row.network for row in rows):
        if name in NETWORKS:
            network = NETWORKS[name]
            parts += [f"## {network.title}", f"{network.reason[0].upper()}{network.reason[1:]}. Source: {network.source}."]
        else:
            parts += [f"## {name}"]
        parts += [Table(_LAYER, [_layer(row) for row in rows if row.network == name])]
    return parts


def latest(rows: Sequence[Row]) -> Table:
    """A few results as they come."""
    header = ("network", "NCHW shape", "layout", "operation", "fastbn µs", "x copy", "x limit", "best peer", "over best", "IQR %")
    lines = [
        [
            row.network, row.size, row.layout, row.op, row.median("fastbn") * 1e6,
            row.ratio("fastbn", "copy"), row.ratio("fastbn", "limit"),
            best(row) or "-", over_best(row), row.times["fastbn"].spread * 100,
        ]
        for row in rows
    ]  # fmt: skip
    order = ("NCHW shape", "layout", "operation", "fastbn µs", "over best", "best peer", "x copy", "x limit", "IQR %", "network")
    return Table(header, lines, order)


def as_json(about: dict[str, Any], rows: Sequence[Row], left_out: Mapping[str, int]) -> str:
    """Write everything that was measured, with the machine and the summary, as JSON, a line for each row; null for NaN."""
    head = {"machine": about, "left_out": dict(left_out), "summary": [s._asdict() for s in summarize(widest(rows))]}
    start = json.dumps(rounded(head), indent=1).removesuffix("\n}")
    lines = (json.dumps(rounded(row._asdict() | {"times": {name: t._asdict() for name, t in row.times.items()}})) for row in rows)
    return start + ',\n "rows": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def rounded(value: Any) -> Any:
    """Without NaN, which JSON does not know, and without digits that nobody measured."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.5g}")
    return value


def as_csv(rows: Sequence[Row]) -> str:
    """Write one line for each row and contender, for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fields = ("network", "layer", "shape", "repeats", "layout", "dtype", "op", "threads", "nbytes")
    writer.writerow([*fields, "contender", *Times._fields, "says"])
    for row in rows:
        what = [row.network, row.layer, row.size, *(getattr(row, field) for field in fields[3:])]
        writer.writerows([*what, name, *times, row.says.get(name, "")] for name, times in row.times.items())
    return text.getvalue()


def read_json(text: str) -> tuple[dict[str, Any], list[Row]]:
    """Read the machine and the rows back from what `as_json` wrote."""
    found = json.loads(text)
    rows = [
        Row(**_known(row) | {"shape": tuple(row["shape"]), "times": {name: Times(**_known(times)) for name, times in row["times"].items()}})
        for row in found["rows"]
    ]
    return found["machine"], rows


def _known(entries: dict[str, Any]) -> dict[str, Any]:
    """With NaN for the null that was written for it."""
    return {name: float("nan") if value is None else value for name, value in entries.items()}


def read(path: Path, parser: argparse.ArgumentParser) -> tuple[dict[str, Any], list[Row]]:
    """Read a run; what is none ends the command with a line."""
    try:
        about, rows = read_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError):
        parser.error(f"{path} is not what python -m bench writes")
    if not rows:
        parser.error(f"{path} holds no measurements")
    return about, rows
