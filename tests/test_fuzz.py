"""Random calls of everything public: a slice of what `tests/fuzz.py` explores, always the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
from other_process import run

import fastbn
from fastbn.dispatch import KERNELS


def finds_nothing(*arguments: str) -> None:
    options = fuzz.parse(["--seed", "20260101", *arguments])
    found = fuzz.explore(options)
    assert not found, "\n" + fuzz.report(found, options)
    assert options.made > 0


def test_a_few_thousand_random_calls() -> None:
    finds_nothing("--calls", "2500", "--jobs", "2")


@pytest.mark.slow
def test_half_a_minute_of_random_calls() -> None:
    finds_nothing("--seconds", "30", "--jobs", "2", "--numba")


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [name for name in fuzz.kernels(numba=False) if name != "reference"])
def test_random_calls_with_one_kernel(kernel: str) -> None:
    finds_nothing("--calls", "5000", "--kernel", kernel, "--caches", "512", "2048", "4096")


@pytest.mark.slow
@pytest.mark.skipif(bool(KERNELS["numba"].unusable()), reason="Numba compiles the functions")
def test_random_calls_with_functions_of_a_user() -> None:
    options = ["--seed", "20260101", "--calls", "400", "--functions", "--numba", "--patience", "600"]
    done = run([sys.executable, fuzz.__file__, *options])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b400 numbers", done.stdout)


# A judge that never finds anything says nothing.


def findings(number: int = 400) -> str:
    draw = fuzz.Draw()
    return " ".join(finding.kind for i in range(number) for finding in fuzz.one(draw, 1, i, False, None))


def broken(monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> None:
    original = getattr(fastbn, name)
    monkeypatch.setattr(fastbn, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def test_a_value_that_is_a_little_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "batch_norm", lambda f, **a: f(**a) * np.float32(1 + 1e-4))
    assert "batch_norm: y" in findings()


def test_a_changed_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(f: Any, **arguments: Any) -> Any:
        result = f(**arguments)
        x = arguments["x"]
        if x.size and x.flags.writeable:
            x[...] = 0
        return result

    broken(monkeypatch, "batch_norm_stats", careless)
    assert "stats: memory that is no output was written" in findings()


def test_a_neighbor_in_memory_that_is_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(f: Any, **arguments: Any) -> Any:
        result = f(**arguments)
        base = getattr(arguments["x"], "base", None)
        if isinstance(base, np.ndarray):
            base.reshape(-1).view(np.uint8)[-1] = 0
        return result

    broken(monkeypatch, "batch_norm_elemt", careless)
    assert "elemt: memory that is no output was written" in findings()


def test_half_a_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(f: Any, **arguments: Any) -> Any:
        running = arguments.get("running_mean")
        if isinstance(running, np.ndarray) and running.flags.writeable and running.dtype == np.float32:
            running += 1
        return f(**arguments)

    broken(monkeypatch, "batch_norm_forward", careless)
    assert "something was modified before the refusal" in findings(1500)


def test_another_exception_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(f: Any, **arguments: Any) -> Any:
        raise KeyError("oops")

    broken(monkeypatch, "batch_norm_stats", careless)
    assert "stats: KeyError" in findings()


def test_an_error_that_names_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def vague(f: Any, **arguments: Any) -> Any:
        try:
            return f(**arguments)
        except (ValueError, TypeError):
            raise ValueError("something is wrong") from None

    broken(monkeypatch, "batch_norm", vague)
    assert "the error names no argument" in findings()


def test_a_crash_is_found_and_what_follows_is_run(tmp_path: Path) -> None:
    script = tmp_path / "crashing.py"
    script.write_text(
        "import ctypes, sys\n"
        f"sys.path.insert(0, {str(Path(fuzz.__file__).parent)!r})\n"
        "import fastbn, fuzz\n"
        "fuzz.__file__ = __file__\n"
        "original = fuzz.one\n"
        "def one(draw, seed, number, *rest, **more):\n"
        "    if number == 40: ctypes.string_at(1)\n"
        "    return []\n"
        "fuzz.one = one\n"
        "sys.exit(fuzz.main())\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), "--seed", "1", "--calls", "100"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert result.returncode == 1, result.stderr
    assert "CRASH: exit status -11" in result.stdout
    assert "--only 40" in result.stdout
    assert "99 numbers" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc as Linux has it")
def test_memory_stays_flat_over_20000_mixed_calls() -> None:
    script = (
        "import fuzz, fastbn\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "draw = fuzz.Draw()\n"
        "def round():\n"
        "    for i in range(4000): fuzz.one(draw, 5, i, False, None)\n"
        "    draw.begin(0)\n"
        "    fastbn.release_memory()\n"
        "    return resident()\n"
        "round()\n"
        "sizes = [round() for _ in range(4)]\n"
        "print((max(sizes) - sizes[0]) / 2**20)\n"
    )
    folder = str(Path(fuzz.__file__).parent)
    done = run([sys.executable, "-W", "error", "-c", script], {"PYTHONPATH": ":".join([folder, *sys.path])})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4, f"{done.stdout.strip()} MiB more after 20,000 calls than after 8,000"
