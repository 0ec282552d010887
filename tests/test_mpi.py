"""fastbn.mpi over 2 and 3 processes of MPI; the checks themselves are in `ranks`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mpi4py", reason="needs mpi4py (pip install mpi4py) and an MPI library")
pytest.importorskip("ml_dtypes")
if shutil.which("mpirun") is None:
    pytest.skip("needs an MPI: mpirun is not there", allow_module_level=True)

PROGRAM = Path(__file__).with_name("ranks.py")


def mpirun(ranks: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a program on so many processes, on any machine: more than it has processors, as root, without a network."""
    allowed = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_MCA_btl": "self,vader,tcp", "OMPI_MCA_btl_vader_single_copy_mechanism": "none", "OMPI_MCA_mpi_yield_when_idle": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "FASTBN_NUM_THREADS": "1",
    }  # fmt: skip
    command = ["mpirun", "-n", str(ranks), sys.executable, "-m", "mpi4py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | allowed, timeout=120)


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_that_share_a_batch(ranks: int, tmp_path: Path) -> None:
    ended = mpirun(ranks, PROGRAM, tmp_path, "all")
    for rank in range(ranks):
        report = tmp_path / f"rank {rank} of {ranks}"
        assert report.exists(), ended.stdout + ended.stderr
        assert report.read_text() == ""
    assert ended.returncode == 0, ended.stderr


def test_an_error_on_one_process_ends_all(tmp_path: Path) -> None:
    ended = mpirun(2, PROGRAM, tmp_path, "dies")
    assert ended.returncode != 0
    assert "this process had an accident" in ended.stderr


def test_a_network_trains(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    ended = mpirun(2, PROGRAM.parents[1] / "examples" / "sync_mpi.py", "--steps", "300")
    assert ended.returncode == 0, ended.stderr
    found = re.findall(r"^2 processes, statistics (.*): accuracy (\S+) %, running statistics (.*)$", ended.stdout, re.MULTILINE)
    assert [(what, bits) for what, _, bits in found] == [("of the whole batch", "the same bits"), ("of each process's part", "different")]
    assert float(found[0][1]) > 70


def test_its_examples() -> None:
    code = "import doctest, sys, fastbn.mpi; sys.exit(doctest.testmod(fastbn.mpi, optionflags=doctest.NORMALIZE_WHITESPACE).failed)"
    ended = mpirun(1, "-c", code)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_what_is_no_communicator_is_refused() -> None:
    ended = mpirun(1, "-c", "import fastbn.mpi; fastbn.mpi.Communicator(3)")
    assert "TypeError: comm must be an mpi4py.MPI.Intracomm, got 3" in ended.stderr
