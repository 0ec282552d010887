import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fastbn
from fastbn import __main__ as command
from fastbn import benchmark, cpu, dispatch, reference
from fastbn.__main__ import main
from fastbn.tables import size


@pytest.fixture
def few_shapes(monkeypatch):
    """For what does not ask whether kernels are right."""
    monkeypatch.setattr(command, "SHAPES", command.SHAPES[:2])


def test_info_names_what_matters(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("numpy", "processor", "KiB", "threads", "reference: usable"):
        assert word in printed


def python_m_fastbn(*arguments, stdout=subprocess.PIPE, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FASTBN_")} | environment
    command = [sys.executable, "-m", "fastbn", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=clean)


def test_a_bare_call_is_an_overview_of_what_runs_here_and_of_the_commands(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 24
    assert dispatch.select("float32").name in printed
    assert all(f"python -m fastbn {name}" in printed for name in ("info", "verify", "bench"))


def test_a_bare_call_says_what_is_wrong():
    done = python_m_fastbn(FASTBN_NUM_THREADS="0")
    assert (done.returncode, done.stderr) == (1, "")
    assert "problem    FASTBN_NUM_THREADS " in done.stdout


@pytest.mark.parametrize("action", ["default", "error"])
@pytest.mark.parametrize("arguments", [[], ["bench", "--shape", "2,3", "--seconds", "0.01"]], ids=" ".join)
def test_a_warning_is_one_line_without_a_place_in_the_source(action, arguments):
    code = "import sys; from fastbn import dispatch; from fastbn.__main__ import main; dispatch.TABLE = dispatch.TABLE[-1:]; "
    program = [sys.executable, "-W", action, "-c", f"{code}sys.exit(main({arguments}))"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.stderr.startswith("python -m fastbn: fastbn runs its slower 'reference' kernel")
    assert "Traceback" not in done.stderr
    assert "RuntimeWarning" not in done.stderr
    assert arguments or len(done.stderr.splitlines()) == 1
    assert done.returncode


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["verify", "--help"], ["bench", "--help"]], ids=" ".join)
def test_help_shows_examples_that_fit_and_that_the_command_takes(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    shown = re.findall(r"^  python -m fastbn (.*?)(?: \|.*)?$", printed, re.MULTILINE)
    assert shown
    for example in shown:
        command.parser_of_commands().parse_args(example.split())
    assert max(map(len, printed.split("examples:")[1].splitlines())) <= 80


@pytest.mark.parametrize("memory", ["channels_first", "channels_last"])
def test_bench_measures_any_shape(capsys, memory):
    few = ["bench", "--shape", "2,3,4,5", "--shape", "6x8", "--layout", memory, "--seconds", "0.01", "--threads", "1"]
    assert main(few) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert main([*few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    shape = [2, 3, 4, 5] if memory == "channels_first" else [2, 4, 5, 3]
    assert [(line["shape"], line["op"]) for line in found] == [(sizes, op) for sizes in (shape, [6, 8]) for op in benchmark.OPS]
    assert all(line["microseconds"] > 0 and line["over_numpy"] > 0 for line in found)


WRONG = (
    ["--shape", "3"], ["--shape", "1,8"], ["--shape", "a,b"], ["--shape", "0,3"], ["--threads", "0"], ["--threads", "99999999999"],
    ["--seconds", "nan"], ["--seconds", "inf"], ["--seconds", "0"],
    ["--dtype", "int8"], ["--layout", "HWCN"],
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_bench_refuses_a_wrong_argument_with_one_line(capsys, wrong):
    with pytest.raises(SystemExit) as end:
        main(["bench", *wrong])
    assert end.value.code == 2
    assert f"python -m fastbn bench: error: argument {wrong[0]}: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_keeps_what_an_interrupt_leaves(monkeypatch, capsys, as_json):
    def measured(*_):
        yield benchmark.Line((128, 256, 16, 112, 112), "NCDHW", "float32", "forward", 1.0, 2.0, 3.0, 4.0, 0.1)
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", measured)
    assert main(["bench", "--threads", "3", *["--json"] * as_json]) == 130
    said = capsys.readouterr()
    assert said.err.strip() == "interrupted"
    if as_json:
        found = json.loads(said.out)
        assert [line["op"] for line in found["results"]] == ["forward"]
        assert found["config"]["threads"]["used"] == 3  # of the measurements
    else:
        assert "128x256x16x112x112 NCDHW " in said.out
        assert said.out.endswith(f"{benchmark.LEGEND}\n")


@pytest.mark.parametrize("channels_last", [False, True])
def test_bench_compares_with_numpy_that_is_right(channels_last):
    rng = np.random.default_rng(0)
    shape = (4, 5, 6, 3) if channels_last else (4, 3, 5, 6)
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    vectors = tuple(np.abs(v) + 0.5 for v in rng.standard_normal((4, 3)).astype(np.float32))
    plain = benchmark.plain(x, dy, vectors, shape.index(3))
    ours = benchmark.ours(x, dy, vectors, "NHWC" if channels_last else "NCHW")
    for op in benchmark.OPS:
        found = ours[op]()
        np.testing.assert_allclose(found if isinstance(found, np.ndarray) else found[0], plain[op](), atol=1e-5)


@pytest.mark.parametrize("arguments", [["--json"], ["info", "--json"], ["--json", "info"]])
def test_info_as_json(capsys, arguments):
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kernels"] == fastbn.show_config()["kernels"]
    assert report["problems"] == []


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(capsys, option):
    with pytest.raises(SystemExit) as end:
        main([option])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"


@pytest.mark.usefixtures("few_shapes")
def test_lines_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main([])
    main(["info"])
    main(["verify", "--kernel", "reference"])
    for name in ([], *([name] for name in command.COMMANDS)):
        with pytest.raises(SystemExit):
            main([*name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "{" not in line) <= 80  # argparse breaks no list of choices


def test_help_says_what_the_words_of_info_mean(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    words = capsys.readouterr().out.partition("words:")[2].partition("examples:")[0]
    config = fastbn.show_config()
    named = {name for part in ("threads", "waking", "memory") for name in config[part] or () if name.islower()}
    assert named >= {"used", "idle"}
    assert all(re.search(rf"\b{name}\b", words) for name in (*named, "selected", "pinned"))


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"), (1000, "1000 bytes"), (32 << 10, "32 KiB"), (1280 << 10, "1.3 MB"), (2 << 20, "2 MiB"),
        (3159564288, "3.2 GB"), (1500, "1.5 KB"), (1 << 34, "16 GiB"), (10**12, "1000.0 GB"),
    ],
)  # fmt: skip
def test_sizes_are_for_people(count, shown):
    assert size(count) == shown


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FASTBN_NUM_THREADS", "0"), ("FASTBN_NUM_THREADS", "two"), ("FASTBN_POOL_BYTES", "1XB"), ("FASTBN_KERNEL", "avx2"),
        ("FASTBN_KERNEL", "simd_neon" if dispatch.KERNELS["simd_neon"].unusable() else "simd_v4"),
    ],
)  # fmt: skip
def test_info_shows_what_is_wrong_with_the_environment(variable, value):
    done = python_m_fastbn("info", **{variable: value})
    assert done.stderr == ""
    assert done.returncode == 1
    assert re.search(rf"^problem +{variable} ", done.stdout, re.MULTILINE)
    assert "reference: usable" in done.stdout


def test_info_shows_what_nobody_thought_of(monkeypatch, capsys):
    def fail():
        raise OSError("no such thing")

    monkeypatch.setattr(fastbn, "show_config", fail)
    assert main(["info"]) == 1
    assert "problem    no such thing" in capsys.readouterr().out


def test_only_the_reference_is_a_problem(monkeypatch, capsys):
    monkeypatch.setattr("fastbn.introspection.select", lambda dtype: dispatch.KERNELS["reference"])
    assert main(["info"]) == 1
    assert "problem    only the reference can run" in capsys.readouterr().out


def test_info_shows_warnings_in_the_report(monkeypatch, capsys):
    monkeypatch.setattr(fastbn, "show_config", lambda: warnings.warn("slow", RuntimeWarning, stacklevel=1) or {})
    assert main(["info"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "warning    slow\n"
    assert captured.err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = python_m_fastbn("info", stdout=full)
    assert done.stderr == "python -m fastbn: No space left on device\n"
    assert done.returncode == 1


def test_a_closed_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    done = python_m_fastbn("info", stdout=writing)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_without_a_standard_output_nothing_is_printed(monkeypatch, capsys):
    for name in ("stdout", "stderr"):
        with monkeypatch.context() as closed:
            closed.setattr(sys, name, None)
            assert main(["info"]) == 0
    assert not capsys.readouterr().err


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "draw", interrupt)
    assert main(["verify"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def large(*_):
        raise MemoryError("Unable to allocate 8 GiB")

    monkeypatch.setattr(benchmark, "measure", large)
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "python -m fastbn: Unable to allocate 8 GiB\n"


def test_verify_passes(capsys):
    assert main(["verify"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for kernel in dispatch.TABLE:
        assert kernel.name in printed
        assert kernel.unusable() is None or kernel.unusable() in printed
    assert "DIFFERS" not in printed


@pytest.mark.usefixtures("few_shapes")
def test_verify_as_json(capsys):
    assert main(["verify", "--kernel", "reference", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["ok"] is True
    assert {result["kernel"] for result in found["results"]} == {"reference"}
    assert all(0 <= result["error"] <= 1 and result["cases"] for result in found["results"])
    assert ("bfloat16 is left out" in captured.err) == (find_spec("ml_dtypes") is None)


@pytest.mark.usefixtures("few_shapes")
def test_verify_runs_one_kernel(capsys):
    assert main(["verify", "--kernel", "reference"]) == 0
    assert "simd" not in capsys.readouterr().out


def test_unknown_kernel_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["verify", "--kernel", "fast"])
    assert "reference" in capsys.readouterr().err


def naive_variance(x, threads=1):
    x = x.astype(np.float32)
    mean, square = x.mean((0, 2)), np.square(x).mean((0, 2))
    count = x.shape[0] * x.shape[2]
    return mean.astype(np.float64), np.zeros(mean.size), (count * (square - mean**2)).astype(np.float64)


def not_centered(x, y, mean, scale, shift, threads=1, epilogue=None):
    scale, shift = scale[:, None], (shift - mean * scale)[:, None]
    y[...] = (x.astype(mean.dtype) * scale + shift).astype(y.dtype)


def forgets_the_last(x, y, *arguments):
    kept = y[-1, -1, -1].copy()
    reference.normalize(x, y, *arguments)
    y[-1, -1, -1] = kept


def forgets_a_sum(*arguments):
    sum_dy, sum_dy_xmu = reference.grad_sums(*arguments)
    return sum_dy, 0.999 * sum_dy_xmu


def gives_nan(dy, x, dx, *arguments):
    dx[...] = np.nan


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("stats", naive_variance),
        ("normalize", not_centered),
        ("normalize", forgets_the_last),
        ("grad_sums", forgets_a_sum),
        ("grad_input", gives_nan),
    ],
)
def test_verify_finds_a_broken_kernel(monkeypatch, capsys, operation, wrong):
    name = f"{operation}_{wrong.__name__}"  # dispatch remembers kernels by name
    module = ModuleType(name)
    for op in ("stats", "normalize", "grad_sums", "grad_input"):
        setattr(module, op, wrong if op == operation else getattr(reference, op))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(dispatch.KERNELS, name, dispatch.Kernel(name, name, dtypes=frozenset({"float32"})))
    assert main(["verify", "--kernel", name]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_verify_fails_where_the_kernel_cannot_run(monkeypatch, capsys):
    kernel = dispatch.Kernel("absent", "fastbn.kernels.absent", level="neon" if cpu.family() == "ARM" else "v2")
    monkeypatch.setitem(dispatch.KERNELS, "absent", kernel)
    assert main(["verify", "--kernel", "absent"]) == 1
    assert "cannot run: it was not built" in capsys.readouterr().out


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("onnx.parser")
    from onnx_models import array, net, norm

    path = tmp_path / "model.onnx"
    nodes = "c = Conv (x, w) n = BatchNormalization (c, s, b, m, v) r = Relu (n) y = BatchNormalization (r, s, b, m, v)"
    path.write_bytes(net(nodes, (1, 3, 6, 6), {"w": array(4, 3, 3, 3), **norm(4)}).SerializeToString())
    return path


def test_onnx_lists_the_norms_of_a_model(model, capsys):
    assert main(["onnx", str(model), "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["n", "BatchNormalization", "1x4x4x4", "4", "1e-05", "Conv", "Relu", "-", "folds", "into", "c"]
    assert lines[2].endswith("stays: it stands between Relu and the output")
    assert lines[3] == "2 nodes: 1 can be folded, 0 are already, 1 stay"


def test_onnx_as_json_with_times(model, capsys):
    pytest.importorskip("onnxruntime")
    assert main(["onnx", str(model), "--json", "--seconds", "0.01"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in report["nodes"]] == ["foldable", "stays"]
    assert report["nodes"][0]["share"] == 0
    assert 0 < report["nodes"][1]["share"] < 1
    assert re.match(r"times: ONNX Runtime [\d.]+, \d+ runs of \S+ ms, x 1x3x6x6; ", report["timing"])


@pytest.mark.parametrize("rewrite", [False, True])
def test_onnx_writes_the_folded_model(model, tmp_path, capsys, rewrite):
    from onnx_models import operators

    out = tmp_path / "out.onnx"
    assert main(["onnx", str(model), "--seconds", "0", "--fold", str(out), *["--rewrite"] * rewrite]) == 0
    import onnx

    assert operators(onnx.load(out)) == ["Conv", "Relu", *(["Conv"] if rewrite else ["BatchNormalization"])]


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.onnx"], ["{model}", "--fold", "missing/out.onnx"], ["{model}", "--fold", "."],
        ["{model}", "--fold", "{model}"],
    ],
)  # fmt: skip
def test_onnx_says_in_a_line_what_is_wrong_before_it_measures(model, capsys, arguments):
    before = model.read_bytes()
    assert main(["onnx", *(argument.format(model=model) for argument in arguments)]) == 1
    said = capsys.readouterr()
    assert re.fullmatch(r"python -m fastbn: .*(missing|--fold must be).*\n", said.err)
    assert not said.out
    assert model.read_bytes() == before


def test_onnx_does_not_write_over_the_tensors_of_the_model(model, capsys):
    import onnx

    large = model.with_name("large.onnx")
    onnx.save(onnx.load(model), large, save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    tensors = model.with_name("out.onnx.data").read_bytes()
    for out in ("out.onnx", "out.onnx.data"):
        assert main(["onnx", str(large), "--seconds", "0", "--fold", str(model.with_name(out))]) == 1
        assert "--fold must be a file whose tensors are not the model's" in capsys.readouterr().err
        assert model.with_name("out.onnx.data").read_bytes() == tensors


@pytest.mark.parametrize("suffix", [".json", ".textproto", ""])
def test_onnx_writes_what_it_can_read(model, suffix):
    out = model.with_name(f"out{suffix}")
    assert main(["onnx", str(model), "--seconds", "0", "--fold", str(out)]) == 0
    assert main(["onnx", str(out), "--seconds", "0"]) == 0


def test_onnx_prints_any_name_in_a_line_and_by_any_encoding(model, monkeypatch):
    import onnx

    named = onnx.load(model)
    named.graph.node[1].name = "\x1b[31mn\n\u2603"
    onnx.save(named, model)
    for encoding, shown in (("utf-8", "\\x1b[31mn\\n\u2603  "), ("ascii", "\\x1b[31mn\\n\\u2603  ")):
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
        assert main(["onnx", str(model), "--seconds", "0"]) == 0
        assert out.getvalue().decode(encoding).splitlines()[1].startswith(shown)


def test_onnx_refuses_options_that_do_nothing(model, capsys):
    for arguments in (["onnx", str(model), "--rewrite"], ["verify", "--fold", "x"], ["onnx"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    assert "python -m fastbn onnx: error: --rewrite goes with --fold" in capsys.readouterr().err
    for seconds in ("-1", "nan", "inf", "soon"):
        with pytest.raises(SystemExit) as end:
            main(["onnx", str(model), "--seconds", seconds])
        assert end.value.code == 2
        assert f"must be a number of seconds of at least 0, got '{seconds}'" in capsys.readouterr().err
