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


def test_torch_resnet():
    pytest.importorskip("sklearn")
    pytest.importorskip("torch", minversion="2.10")
    command = [sys.executable, EXAMPLES / "torch_resnet.py", "--steps", "40"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout  # our own file
    found = dict(re.findall(r"^(torch|fastbn) .* accuracy (\d+\.\d) %$", printed, re.MULTILINE))
    assert float(found["torch"]) > 60  # on another machine rounding takes another way
    assert abs(float(found["torch"]) - float(found["fastbn"])) < 20
    assert "forward, float32, contiguous" in printed
    assert "left to torch" not in printed
    folded = re.search(r"folded for inference: 9 of 9 batch norms; accuracy (\S+) % after (\S+) %", printed)
    assert folded is not None
    assert folded[1] == folded[2]
