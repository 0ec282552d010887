"""Command line: ``python -m bench.same --help``."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import numpy as np

from bench import instructions, options, report, text
from bench.same import cases

CHECKS = ("bits", "instructions", "times", "sizes")
SIMD = ("simd_v4", "simd_v3", "simd_v2", "simd_neon")
AT_ONCE = 100  # cases that a worker runs for one request
GROWTH = 1.01  # of the instructions
SLOWER = 1.03  # of the times
ROUNDS, BURST, TRIALS = 15, 1e-3, 3


class CrashError(Exception):
    """A build has ended its process."""


class Build:
    """A build, and the process that it runs in."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.start()

    def start(self) -> None:
        """Start the process."""
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(self.folder)]
        environment = os.environ | {"PYTHONHASHSEED": "0"}  # or dictionaries would differ between the two
        self._process = subprocess.Popen(  # noqa: S603  our own file
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends the other
        )  # fmt: skip

    def stop(self) -> None:
        """End the process, which a crash may have done already."""
        self._process.kill()
        self._process.communicate()

    def ask(self, *request: object) -> None:
        """Send a request; `answer` waits for what comes back."""
        assert self._process.stdin is not None  # noqa: S101  for the type checker
        with suppress(BrokenPipeError):  # `answer` will say how it ended
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def answer(self) -> Any:
        """Wait for the answer to the oldest request."""
        assert self._process.stdout is not None  # noqa: S101  for the type checker
        if not (line := self._process.stdout.readline()):
            raise CrashError(f"{self.folder} ended with status {self._process.wait()}")
        return json.loads(line)

    def call(self, *request: object) -> Any:
        """Send a request and wait for its answer."""
        self.ask(*request)
        return self.answer()


def _crashed(builds: Sequence[Build], kernel: str, indices: Sequence[int], every: Sequence[cases.Case]) -> str:
    """Find the case that ends the process of a build."""
    for build in builds:
        build.stop()
        build.start()
        i = indices[0]
        try:
            for i in indices:
                build.call("run", kernel, [i])
        except CrashError as crash:
            return f"{kernel}: {every[i]}: {crash}"
    return f"{kernel}: a build ended its process between {every[indices[0]]} and {every[indices[-1]]}, but not when that was tried again"


def _first_difference(builds: Sequence[Build], kernel: str, index: int, name: str) -> str:
    """Say where a result differs first."""
    with tempfile.TemporaryDirectory() as folder:
        for which, build in zip("ab", builds, strict=True):
            build.call("save", kernel, index, f"{folder}/{which}.npz")
        a, b = (dict(np.load(f"{folder}/{which}.npz")).get(name, np.array("no such result")) for which in "ab")
    if a.shape != b.shape or a.dtype.kind == "U":
        return " and ".join(repr(str(found)) if found.dtype.kind == "U" else f"an array of shape {found.shape}" for found in (a, b))
    different = np.argwhere((a != b) & ~(np.isnan(a) & np.isnan(b)) | (np.signbit(a) != np.signbit(b)))
    if not len(different):
        return "equal values, of another dtype or in another order of memory"
    where = tuple(different[0])
    return f"{len(different)} of {a.size} elements, the first at {tuple(map(int, where))}: {a[where].item()!r} and {b[where].item()!r}"


def _differences(builds: Sequence[Build], kernel: str, indices: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Run cases in both builds at once; yield each one that differs, with the name of its first different result."""
    for start in range(0, len(indices), AT_ONCE):
        part = indices[start : start + AT_ONCE]
        for build in builds:
            build.ask("run", kernel, part)
        for i, a, b in zip(part, *(build.answer() for build in builds), strict=True):
            if a.keys() != b.keys() or "raises" in a:
                yield i, "raises"
            elif a != b:
                yield i, next(name for name in a if a[name] != b[name])


def _same_bits(builds: Sequence[Build], kernels: Sequence[str], every: int, only: str) -> int:
    """Compare the bits of all results; say the first difference of each kernel, and count the cases that differ."""
    listed = list(cases.cases())
    # Chosen by a checksum: steps of N would meet the steps in which the cases are listed.
    indices = [i for i, case in enumerate(listed) if only in (name := str(case)) and crc32(name.encode()) % every == 0]
    if not indices:
        raise SystemExit(f"bits: nothing to compare: no case has {only!r} in its description, or --every leaves none; one is: {listed[0]}")
    bad = 0
    for kernel in kernels:
        found: list[tuple[int, str]] = []
        try:
            found += _differences(builds, kernel, indices)
        except CrashError:
            print(f"bits: {_crashed(builds, kernel, indices, listed)}", flush=True)
            return bad + 1
        print(f"bits: {kernel}: {len(indices) - len(found)} of {len(indices)} cases are equal", flush=True)
        if found:
            index, name = found[0]
            print("  different:", ", ".join(f"{op} ({n})" for op, n in Counter(listed[i].op for i, _ in found).items()))
            print(f"  first difference: {listed[index]}: {name}: {_first_difference(builds, kernel, index, name)}", flush=True)
        bad += len(found)
    return bad


def _burst(builds: Sequence[Build], name: str) -> tuple[float, float]:
    """Microseconds of a small call in both builds: medians of bursts, which take turns."""
    taken: dict[Build, list[float]] = {build: [] for build in builds}
    for turn in range(ROUNDS + 1):
        for build in builds if turn % 2 else reversed(builds):
            taken[build].append(build.call("time", name, BURST))
    a, b = (median(bursts[1:]) * 1e6 for bursts in taken.values())  # the first warms up
    return a, b


def _same_times(builds: Sequence[Build]) -> int:
    """Time the small calls; count those that are slower in the second build, however often they are tried.

    Where the code of a process lies in memory makes a small call faster or slower; so each trial has new processes.
    """
    before, lines = report.load(), dict[str, tuple[float, float]]()
    names = builds[0].call("small")
    for _ in range(TRIALS):
        for name in names:
            found = _burst(builds, name)
            if name not in lines or found[1] / found[0] < lines[name][1] / lines[name][0]:
                lines[name] = found
        names = [name for name in names if lines[name][1] > SLOWER * lines[name][0]]
        if not names:
            break
        for build in builds:
            build.stop()
            build.start()
    rows = [(name, a, b, b / a, "SLOWER" if name in names else "") for name, (a, b) in lines.items()]
    text.show(["## Small calls", *report.unstable(before), text.Table(("call", "A µs", "B µs", "B / A", "verdict"), rows)])
    print(f"times: {len(names)} of {len(lines)} small calls are slower by more than {SLOWER - 1:.0%}", flush=True)
    return len(names)


def _same_instructions(folders: Sequence[Path]) -> int:
    """Count instructions in both builds; count the calls where the second needs more."""
    before, after = (instructions.count(folder) for folder in folders)
    table, grown = instructions.compare(before, after, GROWTH)
    text.show(["## Instructions", table])
    print(f"instructions: {grown} of {len(table.lines)} counts grew by more than {GROWTH - 1:.0%}", flush=True)
    return grown


def _sizes(folders: Sequence[Path]) -> None:
    """Print the sizes of the extension modules and of the package; they decide nothing."""

    def kib(folder: Path, pattern: str) -> dict[str, float]:
        return {path.name.partition(".")[0]: path.stat().st_size / 1024 for path in sorted((folder / "fastbn").rglob(pattern))}

    a, b = ({**kib(folder, "*.so"), **kib(folder, "*.pyd")} for folder in folders)
    for found in (a, b):
        found["all modules"] = sum(found.values())
    missing = float("nan")
    lines = [(name, a.get(name, missing), b.get(name, missing), b.get(name, missing) / a.get(name, missing)) for name in {**a, **b}]
    text.show(["## Sizes of the modules", text.Table(("module", "A KiB", "B KiB", "B / A"), lines)])


def _folder(name: str) -> Path:
    folder = Path(name).resolve()
    if not (folder / "fastbn" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{name} holds no package fastbn")
    return folder


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.same",
        description="Whether two builds give equal bits, and whether the second needs no more instructions and no more time. A build is a "
        "folder that holds the package fastbn with its extension modules: an unpacked wheel, or a source tree built in place.",
        epilog="Exit status 0: the second may replace the first. 1: it may not.",
    )
    add = parser.add_argument
    add("builds", type=_folder, nargs=2, metavar="BUILD", help="the old one and the new one")
    add("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="what to compare (default: %(default)s)")
    add("--kernels", nargs="+", metavar="NAME", help="whose bits to compare (default: all SIMD kernels that run here)")
    add(
        "--every",
        type=options.whole(1),
        default=1,
        metavar="N",
        help="one of N cases, always the same ones; all take some 4 minutes a kernel (default: 1)",
    )
    add("--only", default="", metavar="TEXT", help="cases whose description has this text (default: all)")
    arguments = parser.parse_args(argv)
    if "instructions" in arguments.checks and shutil.which("valgrind") is None:
        parser.error("valgrind is not installed; --checks leaves out the instructions where it does not name them")
    options.need(parser, "a case", "ml_dtypes")
    return arguments


def _kernels(builds: Sequence[Build], wanted: Sequence[str] | None) -> tuple[list[str], int]:
    """Choose the kernels that run in both builds, and count those that should and do not."""
    runs = {name: [build.call("runs", name) for build in builds] for name in wanted or SIMD}
    chosen = [name for name, found in runs.items() if wanted or any(found)]
    common = [name for name in chosen if all(runs[name])]
    for name in chosen:
        for build, found in zip(builds, runs[name], strict=True):
            if not found:
                print(f"bits: {build.folder} has no kernel {name} that runs here")
    if not chosen:
        print("bits: neither build has a SIMD kernel that runs here; --kernels names others")
    return common, max(1, len(chosen)) - len(common)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and say so."""
    arguments = _arguments(argv)
    builds = [Build(folder) for folder in arguments.builds]
    bad = 0
    try:
        if "sizes" in arguments.checks:
            _sizes(arguments.builds)
        if "bits" in arguments.checks:
            kernels, missing = _kernels(builds, arguments.kernels)
            bad += missing + _same_bits(builds, kernels, arguments.every, arguments.only)
        if "times" in arguments.checks:
            bad += _same_times(builds)
    except CrashError as crash:
        print(crash)
        bad += 1
    finally:
        for build in builds:
            build.stop()
    if "instructions" in arguments.checks:
        bad += _same_instructions(arguments.builds)
    print("different: the second build may not replace the first" if bad else "the same: the second build may replace the first")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(options.run(main))
