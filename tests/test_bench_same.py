"""The gate for a rebuild of the kernels: it finds what was planted; and the calls whose instructions are counted."""

import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import fastbn
from bench import calls, data, instructions
from bench.same import cases as same_cases
from bench.same import worker

GATE = ["--checks", "bits", "--kernels", "reference", "--only", "forward, float32, 3x5x7, contiguous, leaky_relu"]


@pytest.fixture
def copied_build(tmp_path):
    """A source tree that a test may change: a copy of the package without its extension modules, and another bench."""
    package = Path(fastbn.__file__).parent
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("raise ImportError('the wrong one')")
    shutil.copytree(package, tmp_path / "fastbn", ignore=shutil.ignore_patterns("*.so", "*.cpp", "__pycache__"))
    return tmp_path


def test_gate_finds_a_build_equal_to_itself_and_to_its_copy(copied_build, capsys):
    gate = import_module("bench.same.__main__")
    build = str(Path(fastbn.__file__).parent.parent)
    assert gate.main([build, str(copied_build), *GATE]) == 0
    assert re.search(r"reference: (\d+) of \1 cases are equal", capsys.readouterr().out)


def test_gate_finds_a_changed_constant_and_names_the_case(copied_build, capsys):
    path = copied_build / "fastbn" / "activations.py"
    changed = path.read_text().replace("0.01", "0.02")
    assert changed != path.read_text()
    path.write_text(changed)
    build = str(Path(fastbn.__file__).parent.parent)
    assert import_module("bench.same.__main__").main([build, str(copied_build), *GATE]) == 1
    said = capsys.readouterr().out
    assert re.search(r"first difference: forward, float32, 3x5x7, contiguous, leaky_relu.*: y: \d+ of 105 elements, the first at", said)


def test_gate_names_the_case_that_ends_a_process_or_raises(copied_build, capsys):
    path = copied_build / "fastbn" / "activations.py"
    for fault, words in (("import os; os._exit(3)", "ended with status 3"), ("raise KeyError('no')", "raises: .*KeyError")):
        path.write_text(path.read_text() + f"\n\ndef lookup(name):\n    {fault}\n")
        build = str(Path(fastbn.__file__).parent.parent)
        assert import_module("bench.same.__main__").main([build, str(copied_build), *GATE]) == 1
        assert re.search(f"forward, float32, 3x5x7, contiguous, leaky_relu.*{words}", capsys.readouterr().out)


def test_a_counted_process_has_no_fastbn_before_its_build_is_chosen():
    code = "import sys; from bench import instructions; raise SystemExit('fastbn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(calls.__file__).parents[1], check=True)


def test_gate_imports_each_build_and_nothing_else(tmp_path, capsys):
    gate = import_module("bench.same.__main__")
    (tmp_path / "fastbn").mkdir()
    (tmp_path / "fastbn" / "__init__.py").write_text("raise ImportError('of no use')")
    build = str(Path(fastbn.__file__).parent.parent)
    assert gate.main([build, str(tmp_path), *GATE]) == 1
    assert "ended with status 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gate.main([build, str(tmp_path / "fastbn"), *GATE])
    assert "holds no package fastbn" in capsys.readouterr().err


def test_gate_runs_every_operation_dtype_and_order_of_memory():
    listed = list(same_cases.cases())
    assert len(set(listed)) == len(listed)
    assert {case.op for case in listed} == set(same_cases.OPS)
    some = [next(c for c in listed if (c.op, c.dtype, c.memory) == key) for key in product(same_cases.OPS, data.DTYPES, same_cases.MEMORY)]
    if find_spec("ml_dtypes") is None:
        some = [case for case in some if case.dtype != "bfloat16"]
    with fastbn.use_kernel("reference"), np.errstate(all="ignore"):
        for case in some:
            assert same_cases.run(case)


def test_which_nan_it_is_does_not_count_but_the_sign_of_zero_does():
    one, other = np.array([0x7FC00000, 0xFFC00001], np.uint32).view(np.float32).reshape(2, 1)
    assert worker.digest(one) == worker.digest(other)
    assert worker.digest(np.float32([0.0])) != worker.digest(np.float32([-0.0]))
    assert worker.digest(np.zeros((2, 3))) != worker.digest(np.zeros((3, 2)).T)


def test_counts_that_grew_are_marked():
    before = {"loops": {"a": 1.0, "b": 1.0}, "calls": {"c": 100.0}}
    table, grown = instructions.compare(before, {"loops": {"a": 1.005, "b": 1.02}, "calls": {"c": 90.0, "new": 5.0}}, 1.01)
    assert grown == 1
    assert [line[1] for line in table.lines if line[-1]] == ["b"]


def test_recorded_counts_are_of_the_calls_that_there_are():
    pytest.importorskip("ml_dtypes")
    record = json.loads(instructions.RECORD.read_text())
    assert set(record["loops"]) == set(calls.loops())
    assert set(record["calls"]) == set(calls.small())


@pytest.mark.parametrize("name", calls.PLAIN + calls.FUSED + calls.OTHER)
def test_named_calls_run(name):
    with fastbn.use_kernel("reference"):
        calls.calls(calls.prepare((2, 8, 4, 4), "NCHW", strides=True))[name]()


def test_aligned_copies_keep_values_and_the_order_of_memory():
    for a in (np.arange(24.0).reshape(2, 3, 4), np.arange(24.0).reshape(2, 3, 4).transpose(0, 2, 1)):
        copy = calls.aligned(a)
        assert np.array_equal(copy, a)
        assert copy.strides == a.strides
        assert copy.ctypes.data % 64 == 0
