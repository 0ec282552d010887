"""Instructions per element of the hot loops: ``python -m bench.instructions``.

Counted by valgrind's callgrind inside the thread pool's `parallel`, that is in the units of work and nothing else. A
count repeats to the digit where a time does not, so a slower loop shows without a quiet machine. ``--check`` compares
with the recorded counts; a change of the compiler changes them too, so each record names it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECORD = Path(__file__).with_name("instructions.json")
KERNEL = "simd_v3"  # valgrind knows no AVX-512
GROWTH = 1.10
SHAPES = {"ncsp": (4, 32, 784), "nspc": (3136, 32, 1), "small planes": (64, 32, 49)}
OPS = ("stats", "normalize", "forward", "backward")

SCRIPT = """
import sys, numpy as np
from fastbn.dispatch import KERNELS
op, shape = sys.argv[1], tuple(map(int, sys.argv[2].split(",")))
module = KERNELS["simd_v3"].module()
module.set_caches(32 << 10, 512 << 10, 32 << 20)
memory = np.ones(3 * np.prod(shape) + 64, np.float32)
memory = memory[-memory.ctypes.data % 64 // 4 :]
x, y, dy = (memory[i * np.prod(shape) :][: np.prod(shape)].reshape(shape) for i in range(3))
w, f32 = np.ones(shape[1], np.float32), np.dtype(np.float32)
{
    "stats": lambda: module.stats(x, 1),
    "normalize": lambda: module.normalize(x, y, w, w, w, 1),
    "forward": lambda: module.forward(x, y, w, w, 1e-5, None, None, 0.1, 1, f32, 1),
    "backward": lambda: module.backward(dy, x, y, w, w, w, w, 1),
}[op]()
"""


def count(op: str, shape: tuple[int, int, int]) -> float:
    """Instructions per element of one call."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--toggle-collect=fastbn::parallel*", f"--callgrind-out-file={folder}/out"]
        arguments = [sys.executable, "-c", SCRIPT, op, ",".join(map(str, shape))]
        result = subprocess.run(command + arguments, capture_output=True, text=True)  # noqa: S603  no input from outside
        if result.returncode:
            raise RuntimeError(result.stderr)
        found = re.search(r"^totals: (\d+)", Path(folder, "out").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"callgrind counted nothing for {op}")
    return round(int(found[1]) / (shape[0] * shape[1] * shape[2]), 3)


def compiler() -> str:
    """Name and version of the C++ compiler."""
    return subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]  # noqa: S607


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, and record or check."""
    parser = argparse.ArgumentParser("python -m bench.instructions")
    parser.add_argument("--check", action="store_true", help="compare with the record; exit code 1 where a count grew by more than 10 %%")
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    arguments = parser.parse_args(argv)
    if shutil.which("valgrind") is None:
        parser.error("valgrind is not installed")
    cases = [(op, pattern) for op in OPS for pattern in SHAPES]
    with ThreadPoolExecutor(2) as threads:
        counts = dict(zip(cases, threads.map(lambda case: count(case[0], SHAPES[case[1]]), cases), strict=True))
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"counts": {}, "compiler": None}
    grown = 0
    print(f"instructions per element, {KERNEL}, float32, {compiler()}; recorded with {record['compiler']}")
    for (op, pattern), found in counts.items():
        before = record["counts"].get(f"{op} {pattern}")
        worse = before is not None and found > before * GROWTH
        grown += worse
        print(f"{op:10} {pattern:13} {found:7.3f}   recorded {before}{'   GREW' if worse else ''}")
    if arguments.record:
        named = {f"{op} {pattern}": found for (op, pattern), found in counts.items()}
        RECORD.write_text(json.dumps({"compiler": compiler(), "machine": platform.machine(), "counts": named}, indent=1) + "\n")
    return int(arguments.check and grown > 0)


if __name__ == "__main__":
    sys.exit(main())
