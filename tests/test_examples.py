import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(fastbn.__file__).parent.parent)}  # the package that is tested, installed or not


def test_train_digits(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    # NumPy's warnings come from the example itself, and it should spill none when a run diverges
    command = [sys.executable, "-W", "error::RuntimeWarning:__main__", EXAMPLES / "train_digits.py", "--epochs", "1", "--output", plot]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    rows = re.findall(r"learning rate (\S+) +(with batch norm|without) +(\d+\.\d|diverged)", printed)
    results = {(float(rate), how): result for rate, how, result in rows}
    assert len(results) == 8
    # what the example is there to show, with room for other rounding
    assert float(results[0.1, "with batch norm"]) > 70 > 60 > float(results[0.1, "without"])
    assert plot.read_bytes().startswith(b"\x89PNG")


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


def test_torch_resnet(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    pytest.importorskip("torch", minversion="2.10")
    command = [sys.executable, EXAMPLES / "torch_resnet.py", "--steps", "40", "--output", tmp_path / "losses.png"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    found = dict(re.findall(r"^(torch|enable|convert) .* accuracy (\d+\.\d) %$", printed, re.MULTILINE))
    assert float(found["torch"]) > 60  # on another machine rounding takes another way
    assert all(abs(float(found["torch"]) - float(found[way])) < 20 for way in ("enable", "convert"))
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert "forward, float32, contiguous" in printed
    assert "left to torch" not in printed
    folded = re.search(r"folded for inference: 9 of 9 batch norms; accuracy (\S+) % after (\S+) %", printed)
    assert folded is not None
    assert folded[1] == folded[2]


def test_recalibrate(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    command = [sys.executable, EXAMPLES / "recalibrate.py", "--epochs", "3", "--output", plot]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    found, way = {}, ""
    for line in printed.splitlines():
        row = re.fullmatch(r" *(\S+): +(\S+) % -> +(\S+) %", line)
        way = way if row else line
        if row:
            found[way, row[1]] = float(row[2]), float(row[3])
    assert len(found) == 13
    for name in (("upper bits of weights kept", "5"), ("smallest weights set to zero", "60%")):
        assert found[name][1] > found[name][0] + 15  # what the example is there to show, with room for other rounding
    assert found["weights rounded to bits", "6"][1] > 80
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_small_batches(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    command = [sys.executable, EXAMPLES / "small_batches.py", "--images", "1000", "--output", plot]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    found = {name: float(percent) for name, percent in re.findall(r"^two images of the same digit +(\S.*\S) +(\S+) % \(", printed, re.M)}
    assert len(found) == 5
    assert found["group norm"] > found["batch norm"] + 10  # what the example is there to show, with room for other rounding
    assert plot.read_bytes().startswith(b"\x89PNG")


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
    printed = subprocess.run([sys.executable, EXAMPLES / "federated_flower.py"], check=True, capture_output=True, text=True, env=ENVIRONMENT)
    off = re.fullmatch(r" *merged: mean off by (\S+), variance by (\S+) of it\n averaged: .*, variance by 4.*\n", printed.stdout)
    assert off is not None
    assert float(off[1]) < 1e-6
    assert float(off[2]) < 1e-6


@pytest.mark.slow
def test_sync_gloo():
    pytest.importorskip("sklearn")
    torch = pytest.importorskip("torch", minversion="2.10")
    if not torch.distributed.is_available():
        pytest.skip("needs a PyTorch with torch.distributed")
    command = [sys.executable, EXAMPLES / "sync_gloo.py", "--steps", "30", "--each", "4"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    found = re.findall(r"^2 processes, statistics (.*): accuracy (\S+) %$", printed, re.MULTILINE)
    assert [what for what, _ in found] == ["of the whole batch", "of each process's part"]
    assert float(found[0][1]) > 30
