"""Small changes of the code, one at a time: a test must notice each.

    python tests/mutants.py                    the Python files, in a copy of the package; no rebuild
    python tests/mutants.py --native           those in C++ and Cython too: a rebuild for each, minutes without ccache
    python tests/mutants.py --only split       those whose file or change holds this text
    python tests/mutants.py --random 20        lines of the Python files, changed at random; the seed is printed

What is printed: each change, and "killed" by which test, "SURVIVED", or "GONE" where the code no longer has the text
that is to be changed: then the entry wants another look.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    file: str  # under fastbn/
    old: str
    new: str
    tests: str  # files, and with -k names, that should notice


SURVIVORS = "test_survivors.py"
ERRORS = "test_errors.py test_survivors.py"
STATS = "test_stats.py test_survivors.py"
PAGES = "test_pages.py"
MUTANTS = [
    # Those that survived once, in the words of today's code.
    Mutant("functional.py", '{"dy": dy, "x": r.x, "residual": r.residual}', '{"dy": dy, "x": r.x}', SURVIVORS),
    Mutant("functional.py", '{"dy": dy, "x": r.x, "residual": r.residual}', '{"x": r.x, "residual": r.residual}', SURVIVORS),
    Mutant("composed.py", "np.where(np.isfinite(high), mean - high, 0.0) + mean_lo", "mean - high + mean_lo", SURVIVORS),
    Mutant("threads.py", "math.ceil(min(", "int(min(", SURVIVORS),
    Mutant("threads.py", "return min(found, default=None)", "return max(found, default=None)", SURVIVORS),
    Mutant("cpu.py", '{"v4": LEVELS["v4"] | LEVELS["v3"]}.get(level, LEVELS[level])', "LEVELS[level]", SURVIVORS),
    Mutant(
        "layers.py",
        "wide).copy() for name, a in list(given.items())[:2])",
        "wide) for name, a in list(given.items())[:2])",
        SURVIVORS,
    ),
    Mutant("layers.py", "wide).copy() for name, a in list(given.items())[2:])", "wide) for name, a in list(given.items())[2:])", SURVIVORS),
    Mutant(
        "activations.py", 'self.name == "leaky_relu" and self.parameter > 0', 'self.name == "leaky_relu" and self.parameter >= 0', ERRORS
    ),
    Mutant("torch/arrays.py", "    ask_for_large_pages(made.data_ptr(), array.nbytes)\n", "", PAGES),
    # Fresh ones. What arguments must be:
    Mutant(
        "checks.py",
        "    except np.exceptions.TooHardError:\n        return True",
        "    except np.exceptions.TooHardError:\n        return False",
        SURVIVORS,
    ),
    Mutant(
        "checks.py",
        "for n, stride in zip(a.shape, a.strides, strict=True) if n > 1)",
        "for n, stride in zip(a.shape, a.strides, strict=True))",
        SURVIVORS,
    ),
    Mutant("checks.py", "wanted = (value,) if isinstance(value, str) else tuple(value)", "wanted = tuple(value)", SURVIVORS),
    Mutant(
        "checks.py",
        "a.shape == channels[:1] and a.flags.carray:\n        return a  # as",
        "a.flags.carray:\n        return a  # as",
        ERRORS,
    ),
    Mutant("checks.py", "if least is not None and not least <= v < math.inf:", "if least is not None and v < least:", ERRORS),
    Mutant(
        "checks.py",
        "if isinstance(value, (bool, np.bool_, np.timedelta64)) or not isinstance(value, (int, float,",
        "if not isinstance(value, (int, float,",
        ERRORS,
    ),
    Mutant("checks.py", "narrow = np.can_cast(v.dtype, compute) or", "narrow = True or", "test_survivors.py test_numerics.py"),
    Mutant("layout.py", "    if type(a) in _PLAIN:", "    if isinstance(a, np.ndarray):", ERRORS),
    Mutant(
        "functional.py", 'n = checks.integer("count", count, 1 if r.x.size else 0, MOST_VALUES)', 'n = checks.integer("count", count, -1)',
        SURVIVORS,
    ),
    Mutant("checks.py", 'if out is not None and "x" not in wanted:', "if False:", SURVIVORS),
    Mutant("functional.py", "if count < 1 + correction:", "if count < 1:", ERRORS),
    Mutant("functional.py", '{"x": r.x, "residual": r.residual, "mask": r.mask})', "{})", ERRORS),
    Mutant("functional.py", 'checks.apart({"out": target}, {"mask": r.mask} | used)', "pass", ERRORS),
    # Digits, and what is kept:
    Mutant("composed.py", "if mean_lo is not None:\n        g0 = g0 - lost(mean_lo, g1)", "if False:\n        pass", SURVIVORS),
    Mutant("composed.py", "sum_dy_xmu - lost(mean_lo, sum_dy)", "sum_dy_xmu", "test_survivors.py test_numerics.py -k reference"),
    Mutant("composed.py", "shift - lost(mean_lo, scale)", "shift - mean_lo * scale", SURVIVORS),
    Mutant("composed.py", "np.where(np.isfinite(factor), mean_lo", "np.where(mean_lo != 0.0, mean_lo", "test_extremes.py -k infinite"),
    Mutant("core.py", '"x" in wanted or ("residual" in wanted and active) else None', '"x" in wanted else None', SURVIVORS),
    Mutant("core.py", "if compute not in self._parameters:", "if not self._parameters:", SURVIVORS),
    Mutant("core.py", "None if low is None else (low * saved.scale).astype(dtype)", "None", SURVIVORS),
    Mutant("core.py", "            old[...] = moved", "            pass", "test_functional.py"),
    Mutant("core.py", "count = r.x.size // max(r.x.shape[r.axis], 1)", "count = r.x.size", SURVIVORS),
    Mutant("core.py", "return high, low.astype(dtype)\n\n\n@default_mode", "return high, None\n\n\n@default_mode", SURVIVORS),
    Mutant("functional.py", "mask=r.mask.copy()", "mask=r.mask", SURVIVORS),
    Mutant("core.py", "dy if out is None or not np.may_share_memory(out, dy) else copied(dy)", "dy", SURVIVORS),
    Mutant("core.py", "else copied(residual)", "else residual", SURVIVORS),
    Mutant("composed.py", "values = x if self.counted is None else self.counted", "values = x", "test_functional.py test_extremes.py"),
    Mutant(
        "composed.py",
        "part.epilogue(epilogue), part.in_units(self.counted))",
        "part.epilogue(epilogue), part.of(self.counted))",
        "test_extremes.py",
    ),
    Mutant("composed.py", "part.from_units(momentum * own_var, 2)", "momentum * part.from_units(own_var, 2)", "test_extremes.py"),
    Mutant("reference.py", "np.ascontiguousarray(np.moveaxis(a, axis, 0))", "np.moveaxis(a, axis, 0)", "test_reference.py"),
    Mutant("reference.py", ".astype(mean.dtype)), x", "), x", "test_reference.py"),
    Mutant("functional.py", "(infinite := np.isinf(saved.invstd)).any()", "(infinite := np.isnan(saved.invstd)).any()", SURVIVORS),
    Mutant("results.py", "base = halves[shares.argmax()]", "base = 0 * halves[0]", STATS),
    Mutant("results.py", "offsets = (halves - base) + halves_lo", "offsets = halves - base", STATS),
    Mutant("results.py", "return rounded(count, 2.0 * mean, 2.0 * mean_lo,", "return rounded(count, 2.0 * mean, 0.0 * mean_lo,", STATS),
    # Layers:
    Mutant("states.py", "own[key][...] = value", "setattr(self, key, value)", SURVIVORS),
    Mutant(
        "layers.py", 'if checks.switch("mode", mode) and (self.running_mean is None or self.running_var is None):', "if False:", SURVIVORS
    ),
    Mutant("layers.py", 'gradients(() if self.frozen else ("weight", "bias"), self)', 'gradients(("weight", "bias"), self)', SURVIVORS),
    Mutant("states.py", "return 1.0 / (seen + 1)", "return 1.0 / max(seen, 1)", "test_layers.py"),
    Mutant("states.py", 'return self.__dict__ | {"_context": None}', "return self.__dict__", "test_layers.py test_survivors.py"),
    # The machine:
    Mutant("threads.py", "return 1 if nbytes < WORTH_THREADS[op]", "return 1 if nbytes <= WORTH_THREADS[op]", SURVIVORS),
    Mutant("cpu.py", "found[level] = size * 1024", "found[level] = size", SURVIVORS),
    Mutant("cpu.py", 'if kind != "Instruction" and level in found:', "if level in found:", SURVIVORS),
    Mutant("cpu.py", "found[level] = os.sysconf(name)", "pass", SURVIVORS),
    Mutant("layout.py", "dense = aligned and _contiguous(", "dense = _contiguous(", SURVIVORS),
    Mutant("memory.py", "return min((limit for limit in limits", "return max((limit for limit in limits", "test_memory.py"),
    Mutant("memory.py", "room = limit() - size - sum(", "room = limit() - size - 0 * sum(", "test_memory.py"),
    Mutant("dtypes.py", "DTYPES.get(dtype.name) if dtype.isnative else None", "DTYPES.get(dtype.name)", "test_errors.py"),
    Mutant("dispatch.py", "return PIN.get(_from_environment)", "return _from_environment or PIN.get(None)", "test_dispatch.py"),
]
# Each means a rebuild, and leaves its build behind, so these come last. The tests that kill them belong to the kernels' own files.
NATIVE = [
    *(
        Mutant("kernels/plain.pxi", f"and is_apart_or_all(out, {name})", "", "test_errors.py test_survivors.py")
        for name in ("x", "other", "residual")
    ),
    Mutant("kernels/direct.pxi", " if pin is self.library.pinned() else None", "", SURVIVORS),
    Mutant("kernels/direct.pxi", "        pin = self.pinned()\n", "        pin = None\n", SURVIVORS),
    Mutant("kernels/simd/block.hpp", "(z.r[i] >= 6)", "(z.r[i] > 6)", "test_activations.py"),
    Mutant("kernels/pool.cpp", "wanted > MOST_WORKERS", "false", SURVIVORS),
    Mutant("kernels/pages.hpp", "bytes < LARGE || has_pages(begin, bytes)", "bytes < LARGE", PAGES),
    Mutant("kernels/pages.hpp", "bytes < LARGE || has_pages(begin, bytes)", "has_pages(begin, bytes)", PAGES),
    Mutant("kernels/pages.hpp", "static_cast<std::uintptr_t>(bytes) / 2)", "0)", PAGES),
    Mutant("kernels/_plan.pyx", " or not has_pages(t.place, size_of(t))", "", PAGES),
    Mutant("kernels/_plan.pyx", "(0 - t.place) % LINE", "t.place % LINE", PAGES),
    Mutant("torch/arguments.hpp", "        ask_for_large_pages(writable_memory_of(made.tensor), bytes());\n", "", PAGES),
    Mutant("kernels/simd/run.pxi", "            take_back(job)\n", "            pass\n", "test_extremes.py"),
]


def copy_of_the_package(folder: Path) -> Path:
    """What the tests need, with the built modules."""
    for name in ("fastbn", "tests", "bench", "examples", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, folder)
    return folder


def failing_tests(where: Path, tests: str, timeout: float, known: list[str] | None) -> list[str]:
    """The tests that fail there: all of them, or the first that is not known to."""
    files = [f"tests/{t}" if t.endswith(".py") else t.strip("'") for t in re.findall(r"'[^']*'|\S+", tests)]
    if "-k" not in files:  # Numba compiles for minutes what the other kernels show in seconds
        files += ["-k", "not numba"]
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    if known is not None:
        command += ["-x", *(f"--deselect={test}" for test in known)]
    environment = {**os.environ, "PYTHONPATH": str(where)}
    try:
        result = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return [f"no end after {timeout:.0f} s"]
    if result.returncode == 0:
        return []
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.M) or [f"exit status {result.returncode}"]


def rebuilt(where: Path) -> bool:
    for source in (where / "fastbn").glob("*/_*.pyx"):
        source.touch()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    return subprocess.run(command, cwd=where, capture_output=True).returncode == 0


# What a slip of the finger makes of a line.
SLIPS = [
    *((rf" {a} ", f" {b} ") for one, two in (("<", "<="), (">", ">="), ("==", "!=")) for a, b in ((one, two), (two, one))),
    *((rf" {a} ", f" {b} ") for a, b in (("and", "or"), ("or", "and"), (r"\+", "-"), ("-", "+"), (r"\*", "/"), ("/", "*"))),
    *((rf"\b{a}\b", b) for a, b in (("not", ""), ("True", "False"), ("False", "True"), ("0", "1"), ("1", "2"))),
    (r"\bmin\(", "max("), (r"\bmax\(", "min("),
    (" is None", " is not None"), (" is not None", " is None"), (r"\.copy\(\)", ""), (" if .* else ", " if True else "),
]  # fmt: skip
RELATED = {
    "functional.py": "test_functional.py test_errors.py test_survivors.py test_layers.py",
    "composed.py": "test_numerics.py test_extremes.py test_survivors.py test_kernels.py",
    "core.py": "test_functional.py test_survivors.py test_numerics.py test_activations.py",
    "layers.py": "test_layers.py test_errors.py test_survivors.py",
    "states.py": "test_layers.py test_norms.py test_survivors.py",
    "threads.py": "test_threads.py test_survivors.py -k 'not same_bits and not numba'",
    "cpu.py": "test_survivors.py test_dispatch.py",
    "layout.py": "test_layout.py test_survivors.py",
    "dispatch.py": "test_dispatch.py test_survivors.py",
    "activations.py": "test_activations.py test_errors.py",
    "dtypes.py": "test_errors.py test_functional.py",
}  # fmt: skip


def random_mutants(count: int, seed: int) -> list[Mutant]:
    """Lines of code, not of documentation, each changed in one place."""
    r = random.Random(seed)  # noqa: S311
    found: list[Mutant] = []
    while len(found) < count:
        file = r.choice(sorted(RELATED))
        text = (ROOT / "fastbn" / file).read_text()
        strings = {
            line
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        lines = text.splitlines()
        code = [
            i
            for i, line in enumerate(lines, 1)
            if i not in strings and line.strip() and not line.strip().startswith(("#", "raise", "import", "from", "@", "def"))
        ]
        line = lines[r.choice(code) - 1]
        pattern, new = r.choice(SLIPS)
        places = list(re.finditer(pattern, line.partition("  # ")[0]))
        if not places or text.count(line) != 1:
            continue
        place = r.choice(places)
        changed = line[: place.start()] + new + line[place.end() :]
        found.append(Mutant(file, line, changed, RELATED[file]))
    return found


def change_of(mutant: Mutant) -> str:
    if mutant.old.count("\n") or len(mutant.old) > 70:
        old, new = mutant.old.split(), mutant.new.split()
        same = 0
        while same < min(len(old), len(new)) and old[same] == new[same]:
            same += 1
        return f"... {' '.join(old[max(same - 1, 0) : same + 5])} -> {' '.join(new[max(same - 1, 0) : same + 4])}"
    return f"{mutant.old.strip()} -> {mutant.new.strip()}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Small changes of the code, one at a time: a test must notice each.")
    parser.add_argument("--native", action="store_true", help="the changes that need a rebuild too")
    parser.add_argument("--only", default="", help="those whose file or change holds this text")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many lines changed at random instead")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "little"))
    parser.add_argument("--timeout", type=float, default=900, help="seconds for the tests of one change")
    options = parser.parse_args()
    mutants = random_mutants(options.random, options.seed) if options.random else MUTANTS + (NATIVE if options.native else [])
    if options.random:
        print(f"seed {options.seed}")
    mutants = [m for m in mutants if options.only in m.file or options.only in m.old or options.only in m.new]
    counts = {"killed": 0, "SURVIVED": 0, "GONE": 0}
    with tempfile.TemporaryDirectory() as folder:
        where = copy_of_the_package(Path(folder))
        known = {tests: failing_tests(where, tests, options.timeout, None) for tests in sorted({m.tests for m in mutants})}
        for tests in sorted({test for failing in known.values() for test in failing}):
            print(f"fails without any change, and so kills nothing: {tests}", flush=True)
        for mutant in mutants:
            path = where / "fastbn" / mutant.file
            text = path.read_text() if path.exists() else ""
            native = not mutant.file.endswith(".py")
            verdict, by = "GONE", ""
            if mutant.old in text:
                path.write_text(text.replace(mutant.old, mutant.new))
                try:
                    if native and not rebuilt(where):
                        by = "(does not compile)"
                    else:
                        failing = failing_tests(where, mutant.tests, options.timeout, known[mutant.tests])
                        by = failing[0].partition("::")[2] or failing[0] if failing else ""
                    verdict = "killed" if by else "SURVIVED"
                finally:
                    path.write_text(text)
            counts[verdict] += 1
            print(f"{verdict:8}  {mutant.file:20}  {change_of(mutant):90}  {by}", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()))
    return int(counts["killed"] < len(mutants))


if __name__ == "__main__":
    sys.exit(main())
