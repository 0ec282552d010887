"""What CI asserts of a test run: kernels that must run, and how many tests may be skipped."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn

SKIPS = "import pytest\n\n\n@pytest.mark.parametrize('n', range(3))\ndef test_n(n):\n    if n:\n        pytest.skip('no n')\n"


def _pytest(folder: Path, *options: str, text: str = SKIPS) -> subprocess.CompletedProcess[str]:
    tests = folder / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), tests)
    (tests / "test_n.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("budget", "status"), [(2, 0), (1, 1)])
def test_more_skips_than_the_budget_fail_the_run(tmp_path: Path, budget: int, status: int) -> None:
    done = _pytest(tmp_path, f"--skip-budget={budget}")
    assert done.returncode == status, done.stdout
    assert ("ERROR 2 tests were skipped, and no more than 1 may be" in done.stdout) == bool(status)
    assert "1 passed, 2 skipped" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("names", "status"), [("reference", 0), ("", 0), ("reference,simd_v9", 4)])
def test_a_missing_kernel_stops_the_run(tmp_path: Path, names: str, status: int) -> None:
    done = _pytest(tmp_path, f"--expect-kernels={names}")
    assert done.returncode == status, done.stdout + done.stderr
    assert ("kernels that must run here cannot (simd_v9: there is no such kernel)" in done.stderr) == bool(status)


def test_the_header_says_what_is_tested(tmp_path: Path) -> None:
    place = Path(fastbn.__file__).resolve().parents[1]
    assert f"fastbn {fastbn.__version__} from {place}: " in _pytest(tmp_path).stdout.replace("\n", "")


def test_parameters_that_are_not_wanted_make_no_test(tmp_path: Path) -> None:
    text = "import pytest\n@pytest.mark.only(lambda n: n > 1)\n@pytest.mark.parametrize('n', range(3))\ndef test_n(n):\n    assert n > 1\n"
    done = _pytest(tmp_path, "-o", "markers=only(function)", text=text)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout.splitlines()[-1]
