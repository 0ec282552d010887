"""The environment variables: what they may hold, and that a wrong one is found where fastbn is imported."""

from __future__ import annotations

import os
import py_compile
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbn import dispatch, environment

NUMBER = f"an integer from 1 to {1 << 20}"
BYTES = "a number of bytes, such as 512M or 1G, 0 for no recycling"
WRONG = [
    *[("FASTBN_NUM_THREADS", text) for text in ("0", "-1", "two", "1.5", " 4 ", "٣", "²", "1048577", "9" * 30, "0x2", "1_0")],
    *[("FASTBN_POOL_BYTES", text) for text in ("-1", "1e9", "4.5", "many", "1 GB", " 1", "²", "٣", "G", "1iB", "1X", "1GG", "16E")],
    ("FASTBN_POOL_BYTES", "8388608T"),
    ("FASTBN_POOL_BYTES", "9223372036854775808"),
    *[("FASTBN_KERNEL", text) for text in ("avx2", "SIMD_V3", " reference", "simd")],
]


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTBN_")}
    return subprocess.run([sys.executable, *arguments], env=clean | variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_wrong_values_are_named(name: str, text: str) -> None:
    expected = {"FASTBN_NUM_THREADS": NUMBER, "FASTBN_POOL_BYTES": BYTES}.get(name, f"one of {', '.join(environment.KERNELS)}")
    settings, problems = environment.read({name: text})
    assert problems == [f"{name} must be {expected}, got {text!r}"]
    assert settings == (None, None, None)


@pytest.mark.parametrize("name", environment.EXPECTED)
def test_a_value_of_five_thousand_digits_is_refused_in_a_short_sentence(name: str) -> None:
    (problem,) = environment.read({name: "1" * 5000})[1]
    assert problem.startswith(f"{name} must be ")
    assert problem.endswith("1111...")
    assert len(problem) < 250


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("1", 1), ("123456789012", 123456789012), ("64K", 1 << 16), ("512M", 1 << 29), ("1G", 1 << 30), ("1GB", 1 << 30),
        ("1GiB", 1 << 30), ("1gib", 1 << 30), ("2t", 1 << 41), ("5B", 5), ("0" * 5000 + "7", 7), ("8388607T", 8388607 << 40),
    ],
)  # fmt: skip
def test_numbers_of_bytes(text: str, number: int) -> None:
    assert environment.read({"FASTBN_POOL_BYTES": text}) == ((None, number, None), [])


def test_values() -> None:
    variables = {"FASTBN_NUM_THREADS": "1048576", "FASTBN_POOL_BYTES": "1", "FASTBN_KERNEL": "reference", "HOME": "/"}
    assert environment.read(variables) == ((1 << 20, 1, "reference"), [])


def test_empty_is_not_set() -> None:
    assert environment.read(dict.fromkeys(environment.EXPECTED, "")) == ((None, None, None), [])


def test_the_names_of_the_kernels_are_those_of_the_table() -> None:
    assert tuple(kernel.name for kernel in dispatch.TABLE) == environment.KERNELS


def test_unknown_names_are_told_with_the_nearest() -> None:
    strange = {"FASTBN_THREADS": "1", "fastbn_kernel": "", "FASTBN_POOL_BYTE": "1", "FASTBN_CXXFLAGS": "", "FASTBN_KERNEL": "", "FAST": ""}
    assert environment.unknown(strange) == [
        "fastbn knows no environment variable 'FASTBN_POOL_BYTE'; did you mean FASTBN_POOL_BYTES?",
        "fastbn knows no environment variable 'FASTBN_THREADS'; did you mean FASTBN_NUM_THREADS?",
        "fastbn knows no environment variable 'fastbn_kernel'; did you mean FASTBN_KERNEL?",
    ]


def test_every_name_that_the_code_reads_is_known() -> None:
    root = Path(environment.__file__).parents[1]
    files = [root / "setup.py", *root.glob("fastbn/**/*.py"), *root.glob("bench/**/*.py")]
    read = {name for file in files if file.exists() for name in re.findall(r"""["'](FASTBN_[A-Z_]+)["']""", file.read_text("utf-8"))}
    assert {*environment.EXPECTED} < read
    assert environment.unknown(dict.fromkeys(read, "")) == []


@pytest.mark.parametrize("name", environment.EXPECTED)
def test_a_wrong_value_stops_the_import(name: str) -> None:
    done = python("-c", "import fastbn", **{name: "wrong"})
    assert done.returncode == 1
    assert f"ValueError: {name} must be" in done.stderr


def test_every_wrong_value_is_told_at_once() -> None:
    done = python("-c", "import fastbn", FASTBN_NUM_THREADS="0", FASTBN_KERNEL="fastest")
    assert "FASTBN_NUM_THREADS must be" in done.stderr.splitlines()[-1]
    assert "FASTBN_KERNEL must be" in done.stderr.splitlines()[-1]


def test_an_unknown_name_is_a_warning() -> None:
    done = python("-c", "import fastbn; print('imported')", FASTBN_THREADS="4")
    assert done.stdout == "imported\n"
    assert "RuntimeWarning: fastbn knows no environment variable 'FASTBN_THREADS'; did you mean FASTBN_NUM_THREADS?" in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "import fastbn", "from fastbn.layers import BatchNorm1d", "import importlib; importlib.import_module('fastbn.nn')",
        "exec('import fastbn', {'__name__': 'pyimod02_importers'})  # as in an application of PyInstaller's",
    ],
)  # fmt: skip
def test_the_warning_is_at_the_line_that_imports(tmp_path: Path, line: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"# a service\nimport sys\n{line}\n")
    root = str(Path(environment.__file__).parent.parent)
    done = python(str(script), FASTBN_THREADS="4", PYTHONPATH=root)
    assert done.stderr.startswith(f"{script}:3: RuntimeWarning: fastbn knows no environment variable 'FASTBN_THREADS'"), done.stderr
    done = python("-W", "error::RuntimeWarning:__main__", str(script), FASTBN_THREADS="4", PYTHONPATH=root)
    assert (done.returncode, done.stderr.splitlines()[-1][:21]) == (1, "RuntimeWarning: fastb")


def test_a_warning_is_at_the_callers_line_where_fastbn_is_packed_without_its_sources(tmp_path: Path) -> None:
    """The code then names no files, as with PyInstaller, or those of another machine."""
    package = Path(environment.__file__).parent
    for path in (*package.glob("*.py"), *package.glob("kernels/*.py")):
        short = path.relative_to(package.parent)
        py_compile.compile(str(path), str(tmp_path / short.with_suffix(".pyc")), str(short), doraise=True)
    script = tmp_path / "script.py"
    script.write_text("import sys\nsys.modules['numba'] = None\nimport fastbn\nfastbn.batch_norm_stats(fastbn.nn.np.ones((2, 1)))\n")
    said = python(str(script), FASTBN_THREADS="4").stderr
    assert f"{script}:3: RuntimeWarning: fastbn knows no environment variable 'FASTBN_THREADS'" in said
    assert f"{script}:4: RuntimeWarning: fastbn runs its slower 'reference' kernel" in said


def test_no_text_is_read_in_the_encoding_of_the_locale() -> None:
    """Python warns of that if it is asked to, and where warnings are errors, no kernel can then be imported; nor can Numba."""
    code = "import sys; sys.modules['numba'] = None; import fastbn; print(fastbn.show_config()['kernels'])"
    done = python("-X", "warn_default_encoding", "-W", "error", "-c", code)
    assert (done.stdout, done.stderr) == (python("-c", code).stdout, "")


@pytest.mark.parametrize("arguments", [("-m", "fastbn", "--help"), ("-mfastbn", "--help"), ("-W", "error", "-m", "fastbn", "--help")])
def test_the_command_starts_all_the_same(arguments: tuple[str, ...]) -> None:
    done = python(*arguments, FASTBN_NUM_THREADS="0", FASTBN_POOL_BYTES="1GX", FASTBN_KERNEL="avx2", FASTBN_THREADS="4")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_knows_the_problems() -> None:
    """A script that looks like the command to Python, and asks."""
    code = "import sys; sys.argv = ['-m']; sys.orig_argv = ['python', '-m', 'fastbn']; from fastbn import environment"
    done = python("-c", code + "; print(environment.problems())", FASTBN_NUM_THREADS="0", FASTBN_THREADS="4")
    assert done.stdout.count("FASTBN_NUM_THREADS must be an integer") == 1, done.stderr
    assert done.stdout.count("knows no environment variable 'FASTBN_THREADS'") == 1


@pytest.mark.parametrize("arguments", [(), ("fastbn",)])
def test_another_command_that_imports_fastbn_does_not_start(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import fastbn")
    (tmp_path / "other" / "__main__.py").write_text("")
    path = os.pathsep.join((str(tmp_path), str(Path(environment.__file__).parent.parent)))
    done = python("-m", "other", *arguments, FASTBN_NUM_THREADS="0", PYTHONPATH=path)
    assert "ValueError: FASTBN_NUM_THREADS must be" in done.stderr
