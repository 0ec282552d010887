"""The table of kernels: who is chosen, who is pinned, and what is said about it."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbn
from fastbn import core, cpu, dispatch, introspection
from fastbn.dispatch import KERNELS, TABLE, Kernel
from fastbn.dtypes import DTYPES

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def _forget() -> None:
    for module in (core, dispatch):
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No pin from outside, and no memory of earlier choices."""
    monkeypatch.setattr(dispatch, "_from_environment", None)
    _forget()
    yield
    _forget()


@pytest.fixture
def _none_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tuple(Kernel(k.name, "fastbn.kernels._missing" if k.level else k.path, level=k.level, package=k.package) for k in TABLE)
    monkeypatch.setattr(dispatch, "TABLE", table)
    monkeypatch.setattr(dispatch, "KERNELS", {kernel.name: kernel for kernel in table})


def _chosen(dtype: str) -> Kernel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where nothing is compiled
        return dispatch.select(dtype)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_runs_here(row: Kernel) -> None:
    if reason := row.unusable():
        pytest.skip(reason)
    with fastbn.use_kernel(row.name):
        assert dispatch.select("float32") is row
        np.testing.assert_array_equal(fastbn.batch_norm_stats(X).mean, X.mean((0, 2)))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_module_has_the_four_operations(row: Kernel) -> None:
    if reason := row.unusable():
        pytest.skip(reason)
    for operation in ("stats", "normalize", "grad_sums", "grad_input"):
        assert callable(getattr(row.module(), operation))


def test_the_reference_is_last_and_takes_everything() -> None:
    assert TABLE[-1].name == "reference"
    assert TABLE[-1].unusable() is None
    assert not any(TABLE[-1].declines(dtype) for dtype in DTYPES)


def test_no_kernel_declines_a_dtype() -> None:
    """Tests are made for the dtypes that a kernel takes: one that it declined would be tested by nothing."""
    assert not {(k.name, dtype) for k in TABLE for dtype in DTYPES if k.declines(dtype)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_that_accepts_wins(dtype: str) -> None:
    chosen = _chosen(dtype)
    assert not chosen.unusable()
    for better in TABLE[: TABLE.index(chosen)]:
        assert better.unusable() or better.declines(dtype)


def test_unusable_kernels_say_why_when_pinned() -> None:
    for name, row in KERNELS.items():
        if reason := row.unusable():
            with pytest.raises(RuntimeError) as caught:
                fastbn.use_kernel(name).__enter__()
            assert str(caught.value) == f"kernel {name!r} cannot run here: {reason}"


@pytest.mark.usefixtures("_none_compiled")
def test_reasons() -> None:
    mine = _of_this_processor()[0]
    with pytest.raises(RuntimeError, match=f"kernel '{mine}' cannot run here: it was not built"):
        fastbn.use_kernel(mine).__enter__()
    assert Kernel("far", "fastbn.reference", package="no_such_package").unusable() == (
        "no_such_package is not installed (pip install no_such_package)"
    )
    assert Kernel("narrow", "fastbn.reference", dtypes=frozenset({"float32"})).declines("float16") == "it has no f16"


def _of_this_processor() -> list[str]:
    return [k.name for k in TABLE if k.level is not None and cpu.family_of(k.level) == cpu.family()]


@pytest.mark.usefixtures("_none_compiled")
def test_the_slow_kernel_is_announced_once() -> None:
    with pytest.warns(RuntimeWarning, match="runs its slower '(numba|reference)' kernel, because no compiled one .*it was not built"):
        fastbn.batch_norm_stats(X)
    fastbn.batch_norm_stats(X)  # warnings are errors here
    fastbn.batch_norm_stats(X.astype(np.float64))


@pytest.mark.usefixtures("_none_compiled")
def test_the_announcement_points_at_the_caller_and_names_kernels_of_this_processor_only() -> None:
    with pytest.warns(RuntimeWarning) as caught:
        fastbn.BatchNorm1d(3)(X)  # through NumPy's decorators
    assert [warning.filename for warning in caught] == [__file__]
    said = str(caught[0].message)
    assert [k.name for k in TABLE if k.level is not None and f"{k.name}: " in said] == _of_this_processor()


@pytest.mark.usefixtures("_none_compiled")
def test_the_announcement_names_the_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python started in a clone imports the sources, although a wheel is installed."""
    clone, site = tmp_path / "clone", tmp_path / "site-packages"
    for folder in (clone, site):
        (folder / "fastbn").mkdir(parents=True)
        (folder / "fastbn" / "dispatch.py").touch()
    monkeypatch.setattr(dispatch, "__file__", str(clone / "fastbn" / "dispatch.py"))
    monkeypatch.setattr(sys, "path", [str(clone)])
    assert "There was no C++ compiler when it was installed" in dispatch._why_not_built()
    (clone / "setup.py").touch()
    said = dispatch._why_not_built()
    assert str(clone) in said
    assert "`pip install -e .`" in said
    assert "another folder" not in said
    monkeypatch.setattr(sys, "path", ["", str(clone), str(site)])
    said = dispatch._why_not_built()
    assert f"start Python in another folder to import the fastbn in {site}, or run `pip install -e .` there" in said


def test_where_no_kernel_runs_the_reasons_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an application whose packer saw no kernel, not even the reference."""
    table = tuple(Kernel(k.name, "fastbn.kernels._missing", level=k.level, custom=k.custom) for k in TABLE)
    monkeypatch.setattr(dispatch, "TABLE", table)
    with pytest.raises(ImportError, match=r"no kernel of fastbn can run \(.*reference: it cannot be imported: No module named") as caught:
        fastbn.batch_norm_stats(X)
    assert all(f"{k.name}: " in str(caught.value) for k in TABLE)


def test_packers_see_the_import_of_every_kernel() -> None:
    """PyInstaller and others follow import statements, and no names in strings."""
    tree = ast.parse(Path(dispatch.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {k.path for k in TABLE if k.package is None} | {"fastbn.kernels._cpu", "fastbn.kernels._pool"} <= imported


def test_a_processor_that_cannot_be_asked_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_cpu", None)
    monkeypatch.setattr(cpu, "_unknown", "No module named 'fastbn.kernels._cpu'")
    for level in cpu.LEVELS:
        reason = cpu.unsupported(level)
        assert reason == "what this processor supports could not be looked up (No module named 'fastbn.kernels._cpu')"


def test_avx512_needs_what_avx2_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_unknown", None)
    monkeypatch.setattr(cpu, "features", lambda: frozenset(cpu.LEVELS["v4"] | cpu.LEVELS["v3"]) - {"fma"})
    assert cpu.unsupported("v4") == cpu.unsupported("v3") == "this processor lacks fma"


@pytest.mark.parametrize(("machine", "foreign"), [("x86_64", {"simd_neon"}), ("aarch64", {"simd_v4", "simd_v3", "simd_v2"})])
def test_kernels_for_other_processors_say_so(monkeypatch: pytest.MonkeyPatch, machine: str, foreign: set[str]) -> None:
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    for k in TABLE:
        if k.level is not None:
            reason = Kernel(k.name, k.path, level=k.level).unusable() or ""
            assert reason.startswith("it is for ") == (k.name in foreign)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
@pytest.mark.skipif(cpu._unknown is not None or cpu.family() != "x86-64", reason="no CPUID")
def test_features_are_those_that_the_kernel_of_the_system_sees() -> None:
    flags = set(re.findall(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0].replace("_", ".").split())
    known = set().union(*(cpu.LEVELS[level] for level in ("v2", "v3", "v4")))
    assert cpu.features() == known & flags


@pytest.mark.parametrize("error", [ImportError("broken"), AttributeError("of another version")])
def test_a_broken_package_makes_a_kernel_unusable(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr(dispatch, "import_module", fail)
    assert Kernel("numba", "fastbn.kernels.numba").unusable() == f"it cannot be imported: {error}"


def test_what_a_signals_handler_raises_in_an_import_ends_the_call_and_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of time that ends the first call must neither be lost, nor leave the process a slower kernel for ever."""
    arrives = [TimeoutError("the request takes too long")]

    def interrupted(path: str) -> Any:
        if arrives:
            raise arrives.pop()
        return import_module(path)

    monkeypatch.setattr(dispatch, "import_module", interrupted)
    row = Kernel("reference", "fastbn.reference")
    with pytest.raises(TimeoutError):
        row.unusable()
    assert row.unusable() is None


def test_a_pinned_reference_is_not_announced() -> None:
    with fastbn.use_kernel("reference"):
        fastbn.batch_norm_stats(X)


def test_pins_nest() -> None:
    free = _chosen("float32")
    with fastbn.use_kernel("reference"):
        assert dispatch.select("float32").name == "reference"
        with fastbn.use_kernel(None):
            assert _chosen("float32") is free
        assert dispatch.select("float32").name == "reference"
    assert dispatch.pinned() is None


def test_a_pin_ends_with_an_error() -> None:
    with pytest.raises(KeyError), fastbn.use_kernel("reference"):
        raise KeyError
    assert dispatch.pinned() is None


def test_pins_are_per_thread() -> None:
    inside, done = threading.Event(), threading.Event()

    def pin() -> None:
        with fastbn.use_kernel("reference"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=pin)
    thread.start()
    assert inside.wait(10)
    here = dispatch.pinned()
    done.set()
    thread.join()
    assert here is None


def test_pins_are_per_task() -> None:
    async def pinned() -> str | None:
        with fastbn.use_kernel("reference"):
            await asyncio.sleep(0)
            return dispatch.pinned()

    async def free() -> str | None:
        await asyncio.sleep(0)
        return dispatch.pinned()

    async def both() -> list[str | None]:
        return list(await asyncio.gather(pinned(), free()))

    assert asyncio.run(both()) == ["reference", None]


@pytest.mark.parametrize(("value", "said"), [("reference", "2.0 reference"), ("", "None"), ("fastest", "FASTBN_KERNEL must be one of")])
def test_the_environment_pins(value: str, said: str) -> None:
    code = "import fastbn, numpy as np; print(fastbn.batch_norm_stats(np.array([[1.0], [3.0]])).mean[0], fastbn.dispatch.pinned())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTBN_KERNEL": value}, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (value != "fastest")
    assert said in (done.stdout or done.stderr)


def test_a_block_is_nearer_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    free = _chosen("float32")
    monkeypatch.setattr(dispatch, "_from_environment", "reference")
    assert dispatch.select("float32").name == "reference"
    with fastbn.use_kernel(None):
        assert dispatch.pinned() is None
        assert _chosen("float32") is free
        with fastbn.use_kernel("reference"):
            assert dispatch.select("float32").name == "reference"
    assert dispatch.pinned() == "reference"


def test_a_kernel_of_the_environment_that_cannot_run_is_named_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    far = Kernel("far", "fastbn.reference", package="no_such_package", dtypes=frozenset({"float32"}))
    narrow = Kernel("narrow", "fastbn.reference", dtypes=frozenset({"float32"}))
    for kernel in (far, narrow):
        monkeypatch.setitem(KERNELS, kernel.name, kernel)
    monkeypatch.setattr(dispatch, "_from_environment", "far")
    with pytest.raises(RuntimeError, match="FASTBN_KERNEL 'far' cannot run here: no_such_package is not installed"):
        fastbn.batch_norm_stats(X)
    monkeypatch.setattr(dispatch, "_from_environment", "narrow")
    with pytest.raises(RuntimeError, match="FASTBN_KERNEL 'narrow' is pinned but cannot run: it has no f64"):
        fastbn.batch_norm_stats(X.astype(np.float64))


@pytest.mark.parametrize("name", [3, ["reference"], b"reference"])
def test_the_name_of_a_kernel_is_text(name: Any) -> None:
    with pytest.raises(ValueError, match="kernel must be one of"):
        fastbn.use_kernel(name).__enter__()


def test_a_pinned_kernel_must_take_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Kernel("narrow", "fastbn.reference", dtypes=frozenset({"float32"}))
    monkeypatch.setitem(KERNELS, "narrow", narrow)
    with fastbn.use_kernel("narrow"):
        fastbn.batch_norm_stats(X)
        with pytest.raises(RuntimeError, match="kernel 'narrow' is pinned but cannot run: it has no f64"):
            fastbn.batch_norm_stats(X.astype(np.float64))


@pytest.mark.parametrize("op", introspection.OPS)
def test_explain(op: str) -> None:
    with fastbn.use_kernel("reference"):
        assert fastbn.explain(op, X).splitlines()[:2] == [
            f"{op}_ncsp_f32: kernel reference",
            "  memory: 2 x 3 x 4 (outer x channels x inner)",
        ]
        assert fastbn.explain(op, X, "NLC").startswith(f"{op}_nspc_f32")
        assert fastbn.explain(op, X.astype(np.float64)).startswith(f"{op}_ncsp_f64")
        assert "copied first: not dense" in fastbn.explain(op, X[..., ::2])


def test_explain_prints_short_lines_of_words_that_it_explains() -> None:
    texts = [
        fastbn.explain(op, x, layout)
        for op in introspection.OPS
        for x, layout in ((np.ones((16, 512, 28, 28), np.float32)[::2], "NCHW"), (np.ones((2, 3, 4, 2048), np.float32), "NHWC"), (X, None))
    ]
    lines = [line for text in texts for line in text.splitlines()[1:]]
    assert max(map(len, lines)) <= 80
    assert not any(re.search(r"\b1 (tiles|reads|writes)\b", line) for line in lines)
    words = {line.partition(":")[0].strip() for line in lines} & {"memory", "threads", "tiles", "units", "streaming", "traffic"}
    assert {"memory", "threads"} <= words
    described = introspection.explain.__doc__  # None under python -OO
    assert described is None or all(f"- {word}: " in described for word in words)


def test_explain_says_why_better_kernels_were_passed_over() -> None:
    chosen = _chosen("float32")
    text = fastbn.explain("stats", X)
    for better in TABLE[: TABLE.index(chosen)]:
        assert f"{better.name}: {better.unusable()}" in text


def test_show_config() -> None:
    config = fastbn.show_config()
    assert set(config["kernels"]) == set(KERNELS)
    assert config["kernels"]["reference"] == "usable"
    assert config["selected"] == {dtype: _chosen(dtype).name for dtype in DTYPES}
    assert all(size > 0 for size in config["caches"].values())
    assert config["threads"]["used"] >= 1
    assert config["pinned"] is None
    with fastbn.use_kernel("reference"):
        assert fastbn.show_config()["pinned"] == "reference"
