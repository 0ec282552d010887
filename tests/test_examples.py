import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from other_process import run

import fastbn

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(fastbn.__file__).parent.parent)}  # the package that is tested, installed or not


def printed_by(name, *arguments, needs=("sklearn", "matplotlib"), plot=None):
    """What an example prints, and draws where the plot should be."""
    for package in needs:
        pytest.importorskip(package)
    # NumPy's warnings come from the example itself, and it should spill none when a run diverges
    command = [sys.executable, "-W", "error::RuntimeWarning:__main__", EXAMPLES / f"{name}.py", *arguments]
    done = run(command if plot is None else [*command, "--output", plot], ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert plot is None or plot.read_bytes().startswith(b"\x89PNG")
    return done.stdout


def test_train_digits(tmp_path):
    printed = printed_by("train_digits", "--epochs", "1", plot=tmp_path / "plot.png")
    rows = re.findall(r"learning rate (\S+) +(with batch norm|without) +(\d+\.\d|diverged)", printed)
    results = {(float(rate), how): result for rate, how, result in rows}
    assert len(results) == 8
    # what the example is there to show, with room for other rounding
    assert float(results[0.1, "with batch norm"]) > 70 > 60 > float(results[0.1, "without"])


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--output", "/proc/nothing/plot.png"], ["--output", "plot.number"]], ids=str)
def test_train_digits_refuses_a_wrong_argument_before_it_trains(wrong, tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, EXAMPLES / "train_digits.py", *wrong]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert ended.returncode == 2
    assert f"error: argument {wrong[0]}: " in ended.stderr.splitlines()[-1]
    assert ended.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "wrong", "needs"),
    [
        ("torch_resnet", ("--steps", "9"), ("sklearn", "torch")),
        ("sync_gloo", ("--processes", "0"), ("sklearn", "torch")),
        ("sync_gloo", ("--each", "0"), ("sklearn", "torch")),
        ("sync_mpi", ("--steps", "0"), ("sklearn", "mpi4py")),
        ("reestimate_dask", ("--chunk", "0"), ("dask",)),
    ],
)
def test_numbers_of_examples_are_checked(name, wrong, needs):
    for package in needs:
        pytest.importorskip(package)
    done = run([sys.executable, EXAMPLES / f"{name}.py", *wrong], ENVIRONMENT)
    assert done.returncode == 2
    assert f"error: argument {wrong[0]}: must be at least " in done.stderr.splitlines()[-1]


def test_torch_resnet(tmp_path):
    pytest.importorskip("torch", minversion="2.10")
    printed = printed_by("torch_resnet", "--steps", "40", plot=tmp_path / "plot.png")
    found = dict(re.findall(r"^(torch|enable|convert) .* accuracy (\d+\.\d) %$", printed, re.MULTILINE))
    assert float(found["torch"]) > 60  # on another machine rounding takes another way
    assert all(abs(float(found["torch"]) - float(found[way])) < 20 for way in ("enable", "convert"))
    assert "forward, float32, contiguous" in printed
    assert "left to torch" not in printed
    folded = re.search(r"folded for inference: 9 of 9 batch norms; accuracy (\S+) % after (\S+) %", printed)
    assert folded is not None
    assert folded[1] == folded[2]


def test_recalibrate(tmp_path):
    found, way = {}, ""
    for line in printed_by("recalibrate", "--epochs", "3", plot=tmp_path / "plot.png").splitlines():
        row = re.fullmatch(r" *(\S+): +(\S+) % -> +(\S+) %", line)
        way = way if row else line
        if row:
            found[way, row[1]] = float(row[2]), float(row[3])
    assert len(found) == 13
    for name in (("upper bits of weights kept", "5"), ("smallest weights set to zero", "60%")):
        assert found[name][1] > found[name][0] + 15  # what the example is there to show, with room for other rounding
    assert found["weights rounded to bits", "6"][1] > 80


def test_small_batches(tmp_path):
    printed = printed_by("small_batches", "--images", "1000", plot=tmp_path / "plot.png")
    rows = re.findall(r"^two images of the same digit +(\S.*\S) +(\S+) % \(", printed, re.M)
    found = {name: float(percent) for name, percent in rows}
    assert len(found) == 5
    assert found["group norm"] > found["batch norm"] + 10  # what the example is there to show, with room for other rounding


def test_reestimate_dask():
    pytest.importorskip("dask.array", reason="needs dask")
    command = [sys.executable, EXAMPLES / "reestimate_dask.py", "--rows", "20000", "--chunk", "900"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    assert "in 23 chunks: 20000 values in each of 32 channels" in printed
    off = re.search(r"off from float64: mean (\S+), variance (\S+)$", printed, re.MULTILINE)
    assert off is not None
    assert float(off[1]) < 1e-6
    assert float(off[2]) < 1e-6


def test_federated_flower():
    pytest.importorskip("flwr", reason="needs Flower (300 MB)")
    command = [sys.executable, EXAMPLES / "federated_flower.py"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    off = re.fullmatch(r" *merged: mean off by (\S+), variance by (\S+) of it\n *averaged: .*, variance by 4.*\n", printed)
    assert off is not None
    assert float(off[1]) < 1e-6
    assert float(off[2]) < 1e-6


@pytest.mark.slow
def test_sync_gloo():
    if not pytest.importorskip("torch", minversion="2.10").distributed.is_available():
        pytest.skip("needs a PyTorch with torch.distributed")
    printed = printed_by("sync_gloo", "--steps", "30", "--each", "4", needs=("sklearn",))
    found = re.findall(r"^2 processes, statistics (.*): accuracy (\S+) %$", printed, re.MULTILINE)
    assert [what for what, _ in found] == ["of the whole batch", "of each process's part"]
    assert float(found[0][1]) > 30
