"""The benchmark's tables against published numbers, its statistics against NumPy, and a run of a second."""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path

import numpy as np
import pytest

import fastbn
from bench import again, compare, data, options, peers, progress, published, ratios, readme, report, roofline, situ, text, timing
from bench.cases import NETWORKS, Case, cases, quick
from bench.measure import Row, measure
from bench.peers import CONTENDERS, IN_SITU, OPS, fastbn_peer
from bench.peers.copy_peer import copy_into
from bench.timing import Budget, Times, combine, race, summarize

# Layers, and channels of all layers: half of the "non-trainable parameters" that Keras prints for ResNet50 (53,120),
# MobileNetV2 (34,112) and DenseNet121 (83,648); what fusing takes away from YOLOv5s (7,235,389 to 7,225,885
# parameters); and the tensors in the two wheels.
PUBLISHED = {
    "resnet50": (53, 26_560),
    "resnet50-b1": (53, 26_560),
    "mobilenet_v2": (52, 17_056),
    "efficientnet_lite0": (49, 21_008),
    "densenet121": (121, 41_824),
    "yolov5s": (57, 9_504),
    "ppocr_cls": (35, 2_136),
}
ROOT = Path(__file__).parent.parent
CASE = Case("resnet50-b1", "layer4.0.bn1", (2, 5, 3, 4), 3)
BLOCKS = Case("resnet50-b1", "layer4.0.bn1", (2, 32, 8, 8), 3)  # whole blocks, for those that know no others


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_layers(name):
    layers = NETWORKS[name].layers
    assert (len(layers), sum(layer.shape[1] for layer in layers)) == PUBLISHED[name]
    assert len({layer.name for layer in layers}) == len(layers)


@pytest.mark.parametrize("name", NETWORKS)
def test_cases_are_the_networks_different_shapes(name):
    found = cases(name)
    assert len({case.shape for case in found}) == len(found)
    assert sum(case.repeats for case in found) == len(NETWORKS[name].layers)
    assert set(quick(name)) <= set(found)
    assert 1 <= len(quick(name)) <= 3 or name == "benchdnn-large"


@pytest.mark.parametrize(
    ("network", "layer", "shape"),
    [
        ("resnet50", "layer2.0.bn1", (32, 128, 56, 56)),
        ("resnet50", "layer2.0.bn2", (32, 128, 28, 28)),
        ("mobilenet_v2", "features.2.conv.1.1", (32, 96, 56, 56)),
        ("densenet121", "features.norm5", (32, 1024, 7, 7)),
        ("densenet121", "features.transition1.norm", (32, 256, 56, 56)),
        ("yolov5s", "model.17.cv3.bn", (1, 128, 80, 80)),
        ("yolov5s", "model.23.cv3.bn", (1, 512, 20, 20)),
        ("ppocr_cls", "conv_last_bn", (6, 200, 2, 96)),
    ],
)
def test_layers_have_their_size(network, layer, shape):
    assert dict(NETWORKS[network].layers)[layer] == shape


@pytest.mark.parametrize("op", ["inference", "forward", "backward"])
@pytest.mark.parametrize(("layout", "shape"), [("NCHW", (4, 64, 16, 16)), ("NHWC", (4, 16, 16, 64)), ("NHWC", (1, 15, 15, 1024))], ids=str)
def test_the_limit_reads_and_writes_all(op, layout, shape):
    """Few rows of many channels are summed and mapped by columns, in inference too."""
    limit = pytest.importorskip("bench.peers.limit_peer", reason="Numba is not installed")
    x, dy = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    weight = np.ones(shape[-1 if layout == "NHWC" else 1])
    inputs = data.Inputs(*(None for _ in data.Inputs._fields))._replace(x=x, dy=dy, weight=weight, layout=layout)
    out = np.full_like(x, np.nan)
    with fastbn.num_threads(2):
        call = getattr(limit, op)(inputs, out)
        assert call is not None
        call()
    np.testing.assert_array_equal(out, x + dy if op == "backward" else x)


@pytest.mark.parametrize("network", ["efficientnet_lite0", "ppocr_cls"])
def test_trained_parameters_fit_the_tables(network):
    read, package = data._TRAINED[network]
    if not read():
        pytest.skip(f"{package}, or the package that reads it, is not installed")
    for layer in NETWORKS[network].layers:
        given = data.parameters(Case(network, layer.name, layer.shape, 1))
        assert {v.shape for v in given[:4]} == {(layer.shape[1],)}
        assert given.origin == f"trained ({package})"


def test_inputs_are_the_same_values_in_both_layouts():
    first, last = (data.inputs(CASE, layout, "float32") for layout in ("NCHW", "NHWC"))
    for a, b in zip(first[:2], last[:2], strict=True):
        assert a.shape == CASE.shape
        assert np.array_equal(a, b.transpose(0, 3, 1, 2))
        assert b.flags.c_contiguous


def test_photographs_are_the_first_layers_input():
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL", reason="scikit-learn reads photographs with pillow, of the bench extra")
    image, convolved = (case._replace(shape=(2, *case.shape[1:])) for case in cases("photographs"))
    pixels = data.inputs(image, "NHWC", "float32").x
    assert pixels.shape == (2, 224, 224, 3)
    assert pixels.min() >= 0
    assert 0.9 < pixels.max() <= 1
    x = data.inputs(convolved, "NCHW", "float32").x
    assert x.shape == convolved.shape
    assert np.all(x.var((0, 2, 3)) > 0)


def test_sample_has_the_first_and_the_last_channel():
    large = np.broadcast_to(np.float32(0), (32, 100, 112, 112))
    chosen = data.sample(large, "NCHW")
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 99, 8)
    assert np.array_equal(data.sample(large[:1, :7], "NCHW"), np.arange(7))


# Those that are installed: libraries that nothing here needs are no reason to skip. A run checks the slow ones, too.
INSTALLED = [pytest.param(contender, id=contender.name) for contender in CONTENDERS if not contender.slow and contender.installed()]


@pytest.mark.parametrize("contender", INSTALLED)
@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_contenders_compute_batch_norm(contender, layout):
    inputs = data.inputs(BLOCKS, layout, "float32")
    out, ran = np.empty_like(inputs.x), 0
    for op in OPS:
        call = contender.call(op, inputs, out)
        if call is None:
            continue
        ran += 1
        result = call()
        if contender.kind == "bound":
            assert op == "backward" or np.array_equal(out, inputs.x)
            continue
        found = contender.array(result, inputs)
        np.testing.assert_allclose(found, getattr(fastbn_peer, op)(inputs, None)(), rtol=0, atol=1e-5)
        if not contender.fresh and contender.kind != "aside" and not (contender.name == "torch" and op == "backward"):
            assert np.array_equal(out, found)
    assert ran or layout == "NHWC"


def test_choice_has_the_copy_and_fastbn_whatever_is_named():
    assert {"copy", "fastbn", "fastbn fresh", "numpy"} == {contender.name for contender in peers.choose(["numpy"])}
    assert not any(contender.slow for contender in peers.choose())


def test_a_contender_that_is_wrong_or_fails_is_not_timed_and_said(monkeypatch):
    def call(op, inputs, out):
        if op == "forward":
            raise ValueError("no such thing\nand more")
        return lambda: inputs.x + 1

    monkeypatch.setattr(import_module("bench.peers.numpy_peer"), "inference", lambda *given: call("inference", *given))
    monkeypatch.setattr(import_module("bench.peers.numpy_peer"), "forward", lambda *given: call("forward", *given))
    rows = list(measure(CASE, "NCHW", "float32", Budget(0.3, 3), peers.choose(["numpy"])))
    assert ["numpy" in row.times for row in rows] == [False, False, True]
    assert rows[0].left_out["numpy"].startswith("off by ")
    assert rows[1].left_out["numpy"] == "ValueError: no such thing"


@pytest.mark.parametrize("threads", [1, 3])
def test_copy_into_copies_all(threads):
    src = np.arange(1_100_003, dtype=np.float32).reshape(1, -1)
    dst = np.zeros_like(src)
    copy_into(dst, src, threads)
    assert np.array_equal(dst, src)


def test_summary_of_durations():
    durations = [float(i) for i in range(200, 0, -1)]
    assert summarize(durations) == Times(np.median(durations), 198.0, 200, 100 / np.median(durations))
    assert summarize([3.0]) == Times(3.0, 3.0, 1, 0.0)


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass, for `race` alone: what it measures does not depend on what else runs here."""
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "settle", lambda: None)

    def wait(seconds):
        now[0] += seconds

    return wait


def test_race_calls_everyone_in_turns(clock):
    order = []
    times = race({name: lambda name=name: (clock(1e-4), order.append(name)) for name in "ab"}, 0.0)
    assert order[:2] == ["a", "b"]
    assert all(times[name].calls >= 5 for name in "ab")


def test_race_does_not_count_a_slow_first_call(clock):
    waits = [0.1] + [1e-4] * 1000
    times = race({"cold": lambda: clock(waits.pop(0))}, 0.0)
    assert times["cold"].calls >= 5


def test_race_times_each_contender_although_its_time_is_over(clock):
    times = race({"long": lambda: clock(0.03)}, 1e-9)
    assert times["long"].calls == 1


def test_race_calls_what_comes_between_and_does_not_time_it(clock):
    order = []
    times = race({"a": lambda: (clock(1e-4), order.append("a"))}, 0.0, between=lambda: (clock(0.01), order.append("between")), shortest=2)
    assert order[:4] == ["between", "a", "between", "a"]
    assert times["a"].median == pytest.approx(1e-4)


def test_budget_is_divided_over_the_work_left():
    budget = Budget(100.0, 4)
    assert 24 < budget.share() <= 25
    assert 33 < budget.share() <= 34
    assert Budget(0.0, 4).share() == 0


def _row(network, shape, count, op, layout, **medians):
    times = {name: Times(median, median, 1) for name, median in medians.items()}
    return Row(network, "x", shape, count, layout, "float32", op, 4 * prod(shape), "made up", 0.0, shape[1], times)


def test_summary_counts_a_shape_as_often_as_the_network_has_it():
    rows = [
        _row("resnet50", (1, 2, 3, 4), 3, "forward", "NCHW", copy=1.0, fastbn=2.0, numpy=8.0),
        _row("resnet50", (1, 2, 5, 4), 1, "forward", "NCHW", copy=1.0, fastbn=32.0, numpy=32.0),
    ]
    (summary,) = ratios.summarize(rows)
    assert (summary.layers, summary.rows) == (4, 2)
    assert summary.to_copy == pytest.approx(4.0)
    assert summary.over_best == pytest.approx(4**0.75)
    assert summary.least == 1.0
    assert summary.at_least == (1.0, 0.5, 0.0)
    assert np.isnan(summary.fresh)


def test_a_row_is_held_against_its_best_peer_on_the_same_memory():
    times = {"copy": 1.0, "limit": 1.0, "fastbn": 4.0, "fastbn fresh": 5.0, "torch": 6.0, "torch fresh": 7.0}
    times |= {"onednn": 3.0, "onednn blocked": 1.0}
    row = _row("resnet50", (1, 2, 3, 4), 1, "forward", "NCHW")._replace(times={name: Times(t, t, 1) for name, t in times.items()})
    assert ratios.best(row) == "onednn"
    assert ratios.over_best(row) == 0.75
    assert ratios.best(row, fresh=True) == "torch fresh"
    assert ratios.over_best(row, fresh=True) == 7 / 5
    assert ratios.behind([row]) == [row]
    assert np.isnan(ratios.over_best(_row("resnet50", (1, 2, 3, 4), 1, "forward", "NCHW", copy=1.0, fastbn=2.0)))


def test_a_share_is_never_rounded_up_to_all():
    assert report.percent(0.999) == "99 %"
    assert report.percent(float("nan")) == "-"


def test_processes_are_combined_by_their_medians():
    combined = combine([Times(1.0, 2.0, 5, 0.1), Times(3.0, 9.0, 5, 0.3), Times(2.0, 3.0, 5, 0.2)])
    assert combined == Times(2.0, 9.0, 15, 0.3, 3, 1.0)


def test_floor_is_a_copy_of_the_bytes_moved():
    row = _row("resnet50", (1, 2, 3, 4), 1, "backward", "NHWC", copy=1.0, fastbn=5.0)
    assert roofline.moved(row) == 5 * 96
    assert roofline.to_floor(row) == pytest.approx(2.0)


def test_measure_reports_the_error():
    with fastbn.use_kernel("reference"):
        rows = list(measure(CASE, "NHWC", "float32", Budget(0.3, 3)))
    assert [row.op for row in rows] == list(OPS)
    assert all(0 < row.error < 1e-6 for row in rows)
    assert all({"copy", "fastbn", "numpy"} <= row.times.keys() for row in rows)
    assert ("torch" in rows[0].times) == (find_spec("torch") is not None)


def test_main_writes_the_reports(tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from bench.__main__ import main

    paths = tmp_path / "a" / "bench.json", tmp_path / "bench.md"
    few = ["--quick", "--networks", "ppocr_cls", "--layouts", "NCHW", "--budget", "0.1", "--threads", "1", "--peers", "numpy"]
    others = ["--roofline", str(tmp_path / "figures"), "--csv", str(tmp_path / "bench.csv"), "--html", str(tmp_path / "bench.html")]
    with fastbn.use_kernel("reference"):
        assert main([*few, "--json", str(paths[0]), "--markdown", str(paths[1]), *others]) == 0
    found = json.loads(paths[0].read_text())
    assert found["machine"]["threads"] == 1
    assert found["machine"]["kernel"] == "reference"
    assert len(found["rows"]) + sum(found["left_out"].values()) == 9
    assert paths[1].read_text().startswith(capsys.readouterr().out.rstrip())
    assert report.read_json(paths[0].read_text())[1][0].times["fastbn"].calls > 0
    for name in ("roofline.png", "roofline.svg", "roofline.md"):
        assert (tmp_path / "figures" / name).stat().st_size > 0
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(row["times"]) for row in found["rows"])
    page = (tmp_path / "bench.html").read_text()
    assert page.count("<figure>") == 4
    assert not re.search(r"#0102|src=|<link|@import|url\((?!#)", page)  # no color of the drawing's, nothing from elsewhere
    for command in (["report", str(paths[0]), "--markdown"], ["merge", str(paths[0]), str(paths[0]), "--json"]):
        assert main([*command, str(tmp_path / command[0])]) == 0
    again_found, rows = report.read_json((tmp_path / "merge").read_text())
    assert again_found["dtype"] == "float32"
    assert {times.processes for row in rows for times in row.times.values()} == {2}
    capsys.readouterr()
    assert main(["compare", str(paths[0]), str(tmp_path / "merge")]) == 0
    assert "agree within 10% in 100 %" in capsys.readouterr().out


def test_comparison_is_in_units_of_the_copy_of_each_run():
    before = [_row("resnet50", (1, 2, 3, 4), 1, "forward", "NCHW", copy=1.0, fastbn=4.0, numpy=8.0)]
    after = [_row("resnet50", (1, 2, 3, 4), 1, "forward", "NCHW", copy=2.0, fastbn=4.0, numpy=8.0)]
    ((_, _, change),) = compare._changes(before, after)
    assert change == 2.0
    assert compare.agreement(compare._changes(before, after)) == 1.0
    assert "1 rows in both, 0 in one alone" in text.markdown(compare.parts(before, after, ("a", "b")))


def test_a_run_says_its_command_and_nobody_s_folders():
    command = "python -m bench --quick --json /a/b.json --html='c d.html' --peers torch 'torch fresh' --markdown x.md"
    assert report.without_outputs("python -m bench --json '/a b/c.json' --quick") == "python -m bench --quick"
    assert report.without_outputs(command) == "python -m bench --quick --peers torch 'torch fresh'"
    assert "place" not in report.machine("float32")["config"]


def test_texts_are_renewed_between_their_marks_alone():
    before = "a\n<!-- bench: sizes -->\nold\n\nolder\n<!-- end -->\nb"
    after = readme.renewed(before, {"sizes": "new"})
    assert after == "a\n<!-- bench: sizes -->\nnew\n<!-- end -->\nb"
    assert readme.renewed(after, {"sizes": "new"}) == after
    with pytest.raises(KeyError):
        readme.renewed(before, {})


@pytest.mark.skipif(not readme.RUN.exists(), reason="no run is committed")
def test_figures_of_the_documentation_are_those_of_the_committed_run():
    pytest.importorskip("matplotlib")
    assert readme.main(["--check"]) == 0


def test_batch_norm_in_a_preactivation_model_is_a_node_of_its_own():
    pytest.importorskip("onnxruntime")
    preactivation = import_module("bench.preactivation")
    shape, op, theirs, own, ratio = preactivation.measure((1, 16, 8, 8), 0.05)
    assert shape == "1x16x8x8"
    assert op in ("Conv", "BatchNormalization")
    assert ratio == pytest.approx(theirs / own)


# Rows and layers of the lists, counted in the files themselves.
LISTS = {
    "benchdnn-resnet50": (9, 53), "benchdnn-googlenet-v2": (23, 71), "benchdnn-googlenet-v3": (18, 94), "benchdnn-densenet121": (65, 121),
    "benchdnn-regressions": (10, 10), "benchdnn-large": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_published_lists_are_whole(name):
    shapes = published.SETS[name].shapes
    assert (len({shape for shape, _ in shapes}), sum(count for _, count in shapes)) == LISTS[name]
    assert len(cases(name)) == LISTS[name][0]


def test_traced_inputs_are_read_from_the_log_of_an_operator():
    log = """Operator: aten.add.Tensor
cnt: 3, ((T([8, 3, 5, 5], f16), 1), {})
Operator: aten.native_batch_norm.default
cnt: 1, ((T([128, 64, 112, 112], f16), T([64], f16), True, 0.1, 1e-05), {})
cnt: 4, ((T([16, 8, 10], f32, stride=(80, 1, 8)), T([8], f32), True, 0.1, 1e-05), {})
cnt: 2, ((T([4, 8, 2, 3, 5], f32), T([8], f32)), {})
Operator: aten.native_batch_norm_backward.default
cnt: 5, ((T([128, 512, 7, 7], f16), T([128, 512, 7, 7], f16)), {})
"""
    assert published.traced(log) == {(128, 64, 112, 112): 1, (16, 8, 10, 1): 4, (4, 8, 6, 5): 2}


def test_traced_files_become_networks(tmp_path):
    path = tmp_path / "small_training.txt"
    path.write_text("Operator: aten.native_batch_norm.default\ncnt: 2, ((T([1, 8, 4, 4], f16), T([8], f16)), {})\n")
    found = published.read_traced(path)
    assert found.shapes == (((1, 8, 4, 4), 2),)
    assert found.title.startswith("small, ")
    path.write_text("nothing")
    with pytest.raises(ValueError, match="names no input"):
        published.read_traced(path)
    path.write_bytes(b"\x8a\xff\0")
    with pytest.raises(ValueError, match=f"{path.name} names no input"):
        published.read_traced(path)


TRACED = "Operator: aten.native_batch_norm.default\ncnt: 2, ((T([1, 8, 4, 4], f16), T([8], f16)), {})\n"


def test_traced_files_have_names_of_their_own(tmp_path, capsys):
    pytest.importorskip("rich")
    paths = [tmp_path / name for name in ("a/traced.txt", "b/traced.txt", "tiny.txt")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text(TRACED)
    for given in (paths[:2], paths[2:]):
        with pytest.raises(SystemExit):
            import_module("bench.__main__").main(["--networks", "tiny", "--budget", "1", "--traced", *map(str, given)])
        assert f"another network is called {given[0].stem}, so {given[-1]} needs another name" in capsys.readouterr().err


def test_processes_read_the_traced_files_that_the_command_names(tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    (tmp_path / "ours.txt").write_text(TRACED)
    monkeypatch.chdir(tmp_path)
    few = ["--networks", "tiny", "--layouts", "NCHW", "--peers", "numpy", "--budget", "1", "--processes", "2"]
    assert import_module("bench.__main__").main([*few, "--traced", "ours.txt", "--json", "bench.json", "--markdown", "bench.md"]) == 0
    assert "ours" in {row.network for row in report.read_json(Path("bench.json").read_text())[1]}


def test_what_is_no_number_is_read_as_it_was_written():
    about, (row, *_) = report.read_json(readme.RUN.read_text())
    written = report.as_json(about, [row._replace(error=float("nan"))], {})
    (found,) = report.read_json(written)[1]
    assert np.isnan(found.error)
    assert report.as_json(about, [found], {}) == written


def test_runs_of_several_processes_are_one(tmp_path, capsys):
    pytest.importorskip("rich")
    main = import_module("bench.__main__").main
    paths = str(tmp_path / "bench.json"), str(tmp_path / "bench.md")
    few = ["--networks", "tiny", "--layouts", "NCHW", "--peers", "numpy", "--budget", "1", "--processes", "2"]
    assert main([*few, "--json", paths[0], "--markdown", paths[1]]) == 0
    rows = report.read_json(Path(paths[0]).read_text())[1]
    assert {row.times["fastbn"].processes for row in rows} == {2}
    assert again.in_order(rows) == rows


def test_what_follows_the_bar_has_a_line_of_its_own(capsys):
    assert progress.each([1, 2], str, lambda item: [item])[0] == [1, 2]
    lines = capsys.readouterr().err
    assert "2/2" in lines.splitlines()[-1]
    assert lines.endswith("\n")


def test_main_says_that_there_was_no_time(capsys, tmp_path):
    pytest.importorskip("rich")
    from bench.__main__ import main

    with fastbn.use_kernel("reference"):
        assert main(["--networks", "tiny", "--budget", "1e-9", "--json", str(tmp_path / "bench.json")]) == 1
    assert "--budget" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


WRONG = {
    "bench.__main__": (
        ["--budget", "0"], ["--budget", "-1"], ["--budget", "nan"], ["--budget", "soon"], ["--threads", "0"], ["--threads", "-3"],
        ["--threads", "1.5"], ["--peers", "cublas"], ["--processes", "0"], ["--traced", "/nothing"], ["--traced", "pyproject.toml"],
        ["--largest", "0"], ["--threads", "99999999999"], ["--networks", "benchdnn-large", "--quick"],
        ["report", str(readme.RUN), "--json", "a", "--csv", "./a"],
        ["compare", "/nothing", "/nothing"], ["merge", "/nothing"], ["report", "/nothing"],
        ["--json", "/proc/nothing/bench.json"], ["--markdown", "/dev/null/bench.md"], ["--json", "/"],
        ["--json", "a", "--markdown", "./a"], ["--roofline", "/proc/nothing"],
    ),
    "bench.growth": (["--seconds", "0"], ["--largest", "1"], ["/proc/nothing"]),
    "bench.busy": (["--threads", "0"], ["--threads", "99999999999"], ["--seconds", "-1"], ["--processes", "-1"]),
    "bench.in_keras": (["--turns", "0"], ["--batch", "0"], ["--side", "0"], ["--backends", "theano"]),
    "bench.in_torch": (["--threads", "99999999999"], ["--json", "/"]),
    "bench.norms": (["--threads", "0"], ["--threads", "99999999999"], ["--seconds", "-1"], ["--only", "batch_norm"]),
    "bench.preactivation": (["--threads", "99999999999"],),
    "bench.situations": (["--threads", "99999999999"],),
    "bench.sync": (["--processes", "0"], ["--times", "0"], ["--steps", "0"], ["--batch", "0"], ["--pixels", "1"]),
    "bench.situ": (["--threads", "0"], ["--threads", "99999999999"], ["--budget", "0"], ["--batches", "0"], ["--markdown", "/"]),
    "bench.same.__main__": ([".", "/nothing"], [".", ".", "--every", "0"], [".", ".", "--checks", "none"]),
    "bench.roofline": (["/nothing.json"], ["pyproject.toml"], ["/nothing.json", "/dev/null"]),
}  # fmt: skip


@pytest.mark.parametrize(("module", "wrong"), [(module, wrong) for module, all_wrong in WRONG.items() for wrong in all_wrong])
def test_commands_refuse_a_wrong_argument_with_one_line_before_they_measure(module, wrong, capsys):
    pytest.importorskip("rich")
    if module in ("bench.in_torch", "bench.sync"):
        pytest.importorskip("torch")
    with pytest.raises(SystemExit) as ended:
        import_module(module).main(wrong)
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in said


def test_a_bound_of_a_comparison_is_a_ratio(capsys):
    with pytest.raises(SystemExit):
        import_module("bench.compare").main([__file__, __file__, "--fail-below", "-1"])
    assert capsys.readouterr().err.endswith("error: argument --fail-below: must be a ratio above 0, got '-1'\n")


def test_every_program_ends_quietly_by_an_interrupt_and_a_pipe():
    """All of them are run by what does so."""
    main = import_module("bench.__main__")
    folder = Path(main.__file__).parent
    ends = [(folder / name / "__main__.py" if (folder / name).is_dir() else folder / f"{name}.py") for name in main.PROGRAMS]
    assert all(file.read_text(encoding="utf-8").endswith("    sys.exit(options.run(main))\n") for file in ends)


def test_programs_of_their_own_are_named(capsys):
    pytest.importorskip("rich")
    main = import_module("bench.__main__")
    folder = Path(main.__file__).parent
    texts = {file.stem: file.read_text(encoding="utf-8") for file in folder.glob("*.py") if file.stem != "__main__"}
    programs = [name for name, text in texts.items() if '\nif __name__ == "__main__":' in text]
    assert sorted(programs + [file.parent.name for file in folder.glob("*/__main__.py")]) == sorted(main.PROGRAMS)
    with pytest.raises(SystemExit):
        main.main(["situations", "--help"])
    assert capsys.readouterr().err.endswith("error: situations is a program of its own: python -m bench.situations\n")


@pytest.mark.parametrize("module", WRONG)
def test_commands_have_help_for_every_option(module, capsys):
    pytest.importorskip("rich")
    if module in ("bench.in_torch", "bench.sync"):
        pytest.importorskip("torch")
    with pytest.raises(SystemExit) as ended:
        import_module(module).main(["--help"])
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    assert "default: None" not in help_text
    entries = re.split(r"\n  (?=-|\w)", help_text.split("options:")[1].split("\n\n")[0])[1:]
    assert entries
    assert all(re.search(r"\s{2,}\S.*\w", entry) for entry in entries), entries


def test_main_writes_what_there_is_when_interrupted(tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    main_module = import_module("bench.__main__")

    def measured(*_):
        yield _row("tiny", (1, 8, 4, 4), 1, "forward", "NCHW", copy=1.0, fastbn=2.0, numpy=8.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "measure", measured)
    paths = tmp_path / "bench.json", tmp_path / "bench.md"
    few = ["--networks", "tiny", "ppocr_cls", "--json", str(paths[0]), "--markdown", str(paths[1])]
    assert main_module.main(few) == options.INTERRUPTED
    assert "interrupted after 1 of " in capsys.readouterr().err
    found = json.loads(paths[0].read_text())
    assert len(found["rows"]) == 1
    assert set(found["left_out"]) == {"tiny", "ppocr_cls"}
    assert NETWORKS["ppocr_cls"].title in paths[1].read_text()


def test_an_interrupt_of_several_processes_keeps_the_rows_of_all(tmp_path, capsys, monkeypatch):
    """The process that measures gets it, too, and writes what it has; who waits for it goes on waiting."""
    pytest.importorskip("rich")
    main_module = import_module("bench.__main__")
    row = _row("tiny", (1, 8, 4, 4), 1, "forward", "NCHW", copy=1.0, fastbn=2.0, numpy=8.0)
    about = report.machine("float32", main_module.choose(["numpy"]))

    class Measuring:
        started = 0

        def __init__(self, command, **_):
            Measuring.started += 1
            self.returncode, self.path = None, Path(command[command.index("--json") + 1])

        def wait(self):
            if Measuring.started == 2 and not self.path.exists():
                self.path.write_text("")
                raise KeyboardInterrupt
            self.path.write_text(report.as_json(about, [row], {}))
            self.returncode = 130 if Measuring.started == 2 else 0

    monkeypatch.setattr(report, "machine", lambda *_: about)  # which starts processes of its own
    monkeypatch.setattr(main_module.subprocess, "Popen", Measuring)
    paths = tmp_path / "bench.json", tmp_path / "bench.md"
    few = ["--networks", "tiny", "--peers", "numpy", "--processes", "5", "--json", str(paths[0]), "--markdown", str(paths[1])]
    assert main_module.main(few) == options.INTERRUPTED
    assert Measuring.started == 2
    assert "interrupted after 1 of " in capsys.readouterr().err
    (found,) = report.read_json(paths[0].read_text())[1]
    assert found.times["fastbn"].processes == 2


def test_merged_runs_keep_the_peers_of_each():
    first, second = (_row("tiny", (1, 8, 4, 4), 1, "forward", "NCHW", copy=1.0, fastbn=2.0, **{peer: 8.0}) for peer in ("numpy", "torch"))
    (row,) = again.combine([[first], [second]])
    assert set(row.times) == {"copy", "fastbn", "numpy", "torch"}
    assert row.times["fastbn"].processes == 2


def test_commands_end_without_a_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert options.run(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_commands_end_quietly_when_their_reader_has_gone():
    command = "import sys; from bench import options; sys.exit(options.run(lambda: print('x\\n' * 10**6) or 0))"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
@pytest.mark.parametrize(
    ("output", "status", "said"), [("1>/dev/full", 1, "[Errno 28] No space left on device\n"), ("1>&-", 0, ""), ("2>&-", 0, "")]
)
def test_commands_end_quietly_when_their_output_takes_nothing(output, status, said):
    command = "import sys; from bench import options; sys.exit(options.run(lambda: print('\u00b5s', file=sys.stdout) or 0))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$0" -c "$1" {output}', sys.executable, command], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert (done.returncode, done.stderr) == (status, said)
    assert done.stdout == ("\\xb5s\n" if output == "2>&-" else "")


def test_results_of_an_earlier_run_are_kept(tmp_path, capsys):
    path = tmp_path / "bench.md"
    for content in ("first", "second", "third"):
        assert options.write({path: content})
    assert path.read_text() == "third"
    assert sorted(other.read_text() for other in tmp_path.iterdir()) == ["first", "second", "third"]
    assert capsys.readouterr().err.count("kept the earlier") == 2


def test_what_cannot_be_written_does_not_lose_the_rest(tmp_path, capsys):
    assert not options.write({tmp_path: "a folder", tmp_path / "b": "text"})
    assert (tmp_path / "b").read_text() == "text"
    assert "could not write" in capsys.readouterr().err


def test_cases_alternate_between_the_networks_and_start_with_the_largest():
    pytest.importorskip("rich")
    chosen = import_module("bench.__main__")._choose(["resnet50", "ppocr_cls", "resnet50"], ["NCHW", "NHWC"], few=True)
    assert len(set(chosen)) == len(chosen) == 12
    assert [case.network for case, _ in chosen[:6:2]] == ["resnet50", "ppocr_cls", "resnet50"]
    sizes = [prod(case.shape) for case, _ in chosen if case.network == "ppocr_cls"]
    assert sizes == sorted(sizes, reverse=True)


def test_a_busy_machine_and_a_wide_spread_are_said():
    quiet, wide = ([{"fastbn": Times(1.0, 2.0, 9, spread)}] for spread in (0.1, 0.5))
    assert report.unstable({"load": 0.1, "cores": 2}, quiet) == []
    assert "load 1.5 on 2 cores" in report.unstable({"load": 1.5, "cores": 2}, quiet)[0]
    assert "fastbn's times" in report.unstable({"load": None, "cores": None}, wide)[0]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_tables_fit_the_terminal(width, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    row = _row("efficientnet_lite0", (32, 16, 112, 112), 1, "forward", "NCHW", copy=1.0, fastbn=2.0, numpy=8.0)
    text.show([text.Table(("network", *report._LAYER), [[row.network, *report._layer(row)]], report._DISPENSABLE)])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    assert any("efficientnet_lite0" in line and "forward" in line for line in lines)
    assert "PyTorch" not in lines[0] + lines[1]  # a column without a number
    assert any(line.startswith("not shown") for line in lines)


def test_roofline_draws_what_was_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [_row("tiny", (1, 8, 4, 4), 1, op, layout, copy=1.0, fastbn=2.0) for op in OPS for layout in data.LAYOUTS]
    about = {"config": {"fastbn": "0"}, "dtype": "float32", "threads": 1, "processor": "some", "date": "today"}
    (tmp_path / "bench.json").write_text(report.as_json(about, rows, {}))
    assert roofline.main([str(tmp_path / "bench.json"), str(tmp_path / "new")]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"roofline.md", "roofline.png", "roofline.svg"}


def test_growth_writes_a_table_and_drawings(tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from bench import growth

    assert all(4 * np.prod(growth.shape(size, layout)) == size for size in growth.SIZES for layout in growth.LAYOUTS)
    growth.main([str(tmp_path), "--largest", "8192", "--seconds", "0.01"])
    assert capsys.readouterr().out.count("KiB | N") == 4
    for name in ("growth.png", "growth.svg", "growth.md"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("layout", data.LAYOUTS)
@pytest.mark.parametrize("between", situ.NEIGHBORS)
def test_neighbors_write_what_the_call_reads(between, layout):
    if between == "torch":
        pytest.importorskip("torch")
    given = data.inputs(CASE, layout, "float32")
    before = given.x.copy()
    situ.NEIGHBORS[between](given, given.x)()
    assert np.array_equal(given.x, before) == (between == "walk")
    assert np.isfinite(given.x).all()
    if between == "torch":
        convolved = given.x.copy()
        situ.by_numpy(given, given.x)()
        np.testing.assert_allclose(given.x, convolved, atol=1e-5)


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_another_layer_comes_before_the_one_that_writes_what_the_call_reads(layout):
    given, order = data.inputs(CASE, layout, "float32"), []
    situ.work(lambda given, target: lambda: order.append(target), given, given.dy)()
    assert order[0].shape[data.LAYOUTS[layout]] == situ.OTHER[1]
    assert order[0].nbytes > 2 << 20
    assert order[1] is given.dy


@pytest.mark.parametrize("contender", IN_SITU, ids=lambda contender: contender.name)
def test_contenders_in_situ_make_new_outputs(contender):
    pytest.importorskip(contender.package)
    given = data.inputs(CASE, "NHWC", "float32")
    with fastbn.use_kernel("reference"):
        call = contender.load().inference(given, None)
        first, second = np.asarray(call()), np.asarray(call())
        expected = fastbn_peer.inference(given, None)()
    assert not np.shares_memory(first, second)
    np.testing.assert_allclose(first if first.shape == expected.shape else np.moveaxis(first, 1, -1), expected, atol=1e-5)


def test_situ_measures_each_operation_in_a_loop_and_in_situ():
    with fastbn.use_kernel("reference"):
        rows = list(situ.measure(CASE, "NCHW", "float32", situ.by_numpy, Budget(1.0, 3)))
    assert [row.op for row in rows] == list(OPS)
    assert all(row.loop.keys() == row.situ.keys() >= {"copy", "fastbn fresh"} for row in rows)
    assert ["frozen fresh" in row.situ for row in rows] == [True, False, False]


def test_situ_has_each_shape_once_and_small_ones_in_every_batch():
    chosen = situ.choose(situ.NETWORKS, (8, 16), few=False)
    shapes = [case.shape for case in chosen]
    assert len(set(shapes)) == len(shapes)
    assert {(1, 8, 4, 4), (2, 64, 4, 4), (8, 64, 112, 112), (16, 64, 112, 112)} <= set(shapes)
    assert {shape[0] for shape in shapes} == {1, 2, 8, 16}


def test_situ_writes_a_report(tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "situ.md"
    few = ["--networks", "tiny", "--layouts", "NHWC", "--budget", "0.2", "--between", "walk", "--markdown", str(path)]
    assert situ.main(few) == 0
    assert path.read_text() == capsys.readouterr().out
    assert "| 2x64x4x4 | NHWC | backward |" in path.read_text()


def test_all_that_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(options, "find_spec", lambda _: None)
    for arguments, needs in ([], "rich scikit-learn pillow"), (["--networks", "tiny"], "rich"):
        with pytest.raises(SystemExit):
            import_module("bench.__main__").main(arguments)
        expected = f"python -m bench: error: it needs {needs.replace(' ', ', ')}: pip install {needs}"
        assert capsys.readouterr().err.splitlines()[-1] == expected


WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {missing} else find(name, *rest)
"""


@pytest.mark.parametrize(
    ("module", "missing", "said"),
    [
        ("in_torch", ("torch",), "it needs torch: pip install torch"),
        ("in_torch", ("torch", "rich"), "it needs torch, rich: pip install torch rich"),
        ("sync", ("torch",), "it needs torch: pip install torch"),
        ("norms", ("torch",), "it needs torch: pip install torch"),
        ("in_keras", ("keras",), "it needs keras: pip install keras"),
        ("in_keras", ("torch", "tensorflow", "jax"), "it needs one of torch, tensorflow, jax: pip install torch"),
        ("preactivation", ("onnxruntime", "onnx"), "it needs onnxruntime, onnx: pip install onnxruntime onnx"),
        ("growth", ("rich", "matplotlib"), "it needs rich, matplotlib: pip install rich matplotlib"),
        ("roofline", ("matplotlib",), "the drawing needs matplotlib: pip install matplotlib"),
        ("situ", ("rich",), "it needs rich: pip install rich"),
        ("situations", ("rich",), "it needs rich: pip install rich"),
    ],
)
def test_what_is_not_installed_is_one_line(module: str, missing: tuple[str, ...], said: str, tmp_path: Path) -> None:
    if module == "in_keras" and "keras" not in missing:
        pytest.importorskip("keras", reason="needs Keras")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(missing=missing))
    path = os.pathsep.join((str(tmp_path), str(Path(options.__file__).parents[1])))
    command = [sys.executable, "-m", f"bench.{module}"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"python -m bench.{module}: error: {said}"
    assert "Traceback" not in done.stderr
