"""Instructions of the hot loops and of small calls: ``python -m bench.instructions``.

Counted by valgrind's callgrind. Of the loops, what runs inside the thread pool's `parallel`, that is in the units of
work and nothing else, for each element; of small calls, everything, Python included. A count repeats where a time does
not, so a slower loop or a longer way to it shows without a quiet machine. ``--check`` compares with the recorded counts;
another compiler changes the loops' counts, another Python or NumPy the calls', so the record names them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from math import prod
from pathlib import Path
from typing import Any

from bench import options
from bench.build import use
from bench.text import Table, show

RECORD = Path(__file__).with_name("instructions.json")
ROOT = Path(__file__).parent.parent
KERNEL = {"aarch64": "simd_neon", "arm64": "simd_neon"}.get(platform.machine(), "simd_v3")  # valgrind knows no AVX-512
GROWTH = 1.10
KINDS = ("loops", "calls")
REPEATS = 20  # small calls that are counted together, after as many that warm up the interpreter

Counts = dict[str, dict[str, float]]


def _marked(calls: dict[str, Callable[[], object]], repeats: int) -> list[str]:
    """Run calls between two calls of getppid, at each of which callgrind writes down a sum and starts anew."""
    gc.disable()
    for call in calls.values():
        for _ in range(repeats):
            call()
        os.getppid()
        for _ in range(repeats):
            call()
        os.getppid()
    return list(calls)


def child(kind: str, build: str) -> None:
    """What runs under valgrind: all calls of a kind; their names go to the standard output."""
    use(build)
    import fastbn
    from bench import calls

    fastbn.set_num_threads(1)
    # A pinned kernel takes a longer way, so small calls go where they go by themselves; under valgrind that is KERNEL, too.
    with fastbn.use_kernel(KERNEL) if kind == "loops" else nullcontext():
        names = _marked(calls.loops(), 1) if kind == "loops" else _marked(calls.small(), REPEATS)
    print(json.dumps(names))


def _total(dump: Path) -> int:
    found = re.search(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"callgrind wrote no total to {dump.name}")
    return int(found[1])


def _count(kind: str, build: Path) -> dict[str, float]:
    """Count all calls of a kind in one process."""
    from bench.calls import PATTERNS

    valgrind = ["valgrind", "--tool=callgrind", "--dump-before=getppid", "--callgrind-out-file=out"]
    if kind == "loops":
        valgrind.append("--toggle-collect=fastbn::parallel*")
    command = [*valgrind, sys.executable, "-c", f"from bench import instructions; instructions.child({kind!r}, {str(build)!r})"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    with tempfile.TemporaryDirectory() as folder:  # also as the working folder, from which Python would import
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)  # noqa: S603  our own
        if result.returncode:
            raise RuntimeError(f"{build}: valgrind or a call failed:\n{result.stderr}")
        names = json.loads(result.stdout)
        totals = [_total(Path(folder, f"out.{2 * i + 2}")) for i in range(len(names))]
    if 0 in totals:
        raise RuntimeError(f"callgrind counted nothing for {names[totals.index(0)]}: is there no C++ function parallel any more?")
    each = prod(PATTERNS["ncsp"][0]) if kind == "loops" else REPEATS  # all patterns have as many elements
    return {name: round(total / each, 3 if kind == "loops" else 0) for name, total in zip(names, totals, strict=True)}


def count(build: Path = ROOT) -> Counts:
    """Count all calls of a build, the folder that holds its package.

    Returns
    -------
    dict
        "loops": instructions for each element, and "calls": instructions for each call, by the names of the calls.
    """
    with ThreadPoolExecutor(len(KINDS)) as threads:
        return dict(zip(KINDS, threads.map(lambda kind: _count(kind, build), KINDS), strict=True))


def compare(before: Counts, after: Counts, growth: float) -> tuple[Table, int]:
    """Set counts side by side, all that grew by more than a factor marked; and the number of these."""
    lines = []
    for kind in KINDS:
        for name, found in after[kind].items():
            was = before.get(kind, {}).get(name, float("nan"))
            lines.append((kind, name, was, found, found / was, "GREW" if found > was * growth else ""))
    return Table(("kind", "call", "before", "now", "ratio", "verdict"), lines), sum(line[-1] == "GREW" for line in lines)


def compiler() -> str:
    """Name and version of the C++ compiler."""
    return subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]  # noqa: S607


def about() -> dict[str, Any]:
    """What the counts depend on, apart from the code."""
    import numpy as np

    python, numpy = (".".join(version.split(".")[:2]) for version in (platform.python_version(), np.__version__))
    return {"compiler": compiler(), "machine": platform.machine(), "python": python, "numpy": numpy}


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, and record or check."""
    parser = argparse.ArgumentParser("python -m bench.instructions", description="Count instructions under valgrind, in about a minute.")
    parser.add_argument("--check", action="store_true", help="compare with the record; exit code 1 where a count grew by more than 10 %%")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    arguments = parser.parse_args(argv)
    for tool in ("valgrind", "c++"):
        if shutil.which(tool) is None:
            parser.error(f"{tool} is not installed")
    options.need(parser, "a case", "ml_dtypes")
    now = about()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    print(f"{KERNEL}, {now['compiler']}, Python {now['python']}; counting, which takes about a minute", file=sys.stderr)
    counts = count()
    before = {kind: record.get(kind, {}) for kind in KINDS}
    if before["calls"] and (record["python"], record["numpy"]) != (now["python"], now["numpy"]):
        print(f"calls are not compared: they were recorded with Python {record['python']}, NumPy {record['numpy']}", file=sys.stderr)
        before["calls"] = {}
    table, grown = compare(before, counts, GROWTH)
    show(["# Instructions", f"Of the loops for each element, else for each call. Recorded with {record.get('compiler')}.", table])
    if arguments.record:
        RECORD.write_text(json.dumps(now | counts, indent=1) + "\n")
    return int(arguments.check and grown > 0)


if __name__ == "__main__":
    sys.exit(options.run(main))
