"""What `fastbn.onnx.check` says of models: small ones, those of the onnx wheel, and those of rapidocr where they are at hand."""

from __future__ import annotations

import json
import pickle
import queue
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx_models import array, net, norm, operators, run  # noqa: E402

import fastbn.onnx  # noqa: E402

BN = "BatchNormalization"
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
IMAGES = array(2, 3, 6, 6)

# Counted by hand: which stand behind a Conv, and how many there are. A DenseNet has one behind its first convolution and one
# behind the first of both convolutions of its 6 + 12 + 24 + 16 layers; its others stand before convolutions, behind pooling (of
# the stem, and of 3 transitions) or concatenations, and what follows them is a Mul.
COUNTED = {
    "bvlc_alexnet": ({"stays": 2}, {"LRN": 2}, {"Relu": 2}),
    "densenet121": ({"foldable": 59, "stays": 62}, {BN: 121}, {"Conv": 59, "MaxPool": 1, "AveragePool": 3, "Concat": 58}),
    "inception_v1": ({"stays": 2}, {"LRN": 2}, {"MaxPool": 1, "Relu": 1}),
    "inception_v2": ({"foldable": 69}, {BN: 69}, {"Conv": 69}),
    "resnet50": ({"foldable": 53}, {BN: 53}, {"Conv": 53}),
    "shufflenet": ({"foldable": 49}, {BN: 49}, {"Conv": 49}),
    "squeezenet": ({}, {}, {}),
    "vgg19": ({}, {}, {}),
    "zfnet512": ({"stays": 2}, {"LRN": 2}, {"Relu": 2}),
}
# Nodes that compute something, before and after folding: each batch norm that folds is one less.
NODES = {"densenet121": (910, 851), "inception_v2": (509, 440), "resnet50": (176, 123), "shufflenet": (203, 154)}


def computing(model: Any) -> int:
    return sum(op not in ("Constant", "ConstantOfShape") for op in operators(model))


@pytest.mark.parametrize("name", COUNTED)
def test_light_models(name: str) -> None:
    report = fastbn.onnx.check(LIGHT / f"light_{name}.onnx")
    states, ops, before = COUNTED[name]
    assert Counter(row.state for row in report) == states
    assert Counter(row.op for row in report) == ops
    assert Counter(row.before for row in report) == before
    assert len({row.name for row in report}) == len(report)
    assert all(row.shape is not None and row.channels == row.shape[1] for row in report)
    printed = str(report).splitlines()
    assert all(any(line.startswith(f"{row.name} ") for line in printed) for row in report)


def with_numbers(model: Any) -> Any:
    """A light model with numbers by chance for the constants of which it has the shapes alone."""
    shapes = {tensor.name: tuple(onnx.numpy_helper.to_array(tensor)) for tensor in model.graph.initializer if tensor.data_type == 7}
    readers = {name: (node.op_type, i) for node in model.graph.node for i, name in enumerate(node.input)}
    rng = np.random.default_rng(0)
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in shapes:
            value = rng.standard_normal(shapes[node.input[0]])
            op, place = readers[node.output[0]]
            if op in ("Conv", "Gemm") and place == 1:
                value /= np.sqrt(max(1, value[0].size))
            elif op == BN and place in (1, 4):
                value = rng.uniform(0.5, 1.5, value.shape)
            constant = onnx.helper.make_node("Constant", [], [node.output[0]], value=onnx.numpy_helper.from_array(value.astype(np.float32)))
            node.CopyFrom(constant)
    return model


@pytest.mark.parametrize("name", NODES)
def test_light_models_give_the_same_when_folded(name: str) -> None:
    pytest.importorskip("onnxruntime")
    model = with_numbers(onnx.load(LIGHT / f"light_{name}.onnx"))
    given = model.SerializeToString()
    folded = fastbn.onnx.fold(model)
    assert model.SerializeToString() == given
    onnx.checker.check_model(folded)
    before, after = NODES[name]
    assert computing(model) == before
    assert computing(folded) == after
    assert operators(folded).count(BN) == COUNTED[name][0].get("stays", 0)
    held = {tensor.name for tensor in model.graph.initializer}
    (entry,) = (value for value in model.graph.input if value.name not in held)
    x = array(*(dim.dim_value for dim in entry.type.tensor_type.shape.dim))
    for ours, theirs in zip(run(folded, x, entry.name), run(model, x, entry.name), strict=True):
        assert (np.abs(ours - theirs) <= 1e-5 * np.maximum(1, np.abs(theirs))).all()
        assert np.ptp(theirs) > 1e-5


# Counted by hand, in the models of rapidocr-onnxruntime 1.4.4: batch norms, and what they stand behind.
RAPIDOCR = {
    "ch_PP-OCRv4_det_infer.onnx": {"Conv": 2, "Add": 1},
    "ch_PP-OCRv4_rec_infer.onnx": {"Conv": 6},
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": {"Conv": 35},
}


@pytest.mark.parametrize("name", RAPIDOCR)
def test_rapidocr(name: str) -> None:
    package = find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the models of rapidocr-onnxruntime")
    path = Path(package.submodule_search_locations[0]) / "models" / name
    report = fastbn.onnx.check(path)
    assert Counter(row.before for row in report) == RAPIDOCR[name]
    assert {row.state for row in report} == {"foldable"}
    folded, model = fastbn.onnx.fold(path), onnx.load(path)
    assert computing(model) - computing(folded) == len(report)
    x = array(1, 3, *((48, 320) if "rec" in name else (64, 96)))
    for ours, theirs in zip(run(folded, x), run(model, x), strict=True):
        assert (np.abs(ours - theirs) <= 1e-5 * np.maximum(1, np.abs(theirs))).all()


def test_every_norm_is_listed_with_what_is_known_of_it() -> None:
    nodes = """a = LayerNormalization <axis = 1, epsilon = 0.5> (x, l)  b = InstanceNormalization (a, s, b0)
        c = MeanVarianceNormalization (b)  d = LpNormalization (c)  e = GroupNormalization <num_groups = 3> (d, s, b0)
        y = LRN <size = 3> (e)  f = Relu (e)"""
    constants = {"l": array(3, 6, 6), "s": array(3), "b0": array(3)}
    report = fastbn.onnx.check(net(nodes, ("N", 3, 6, 6), constants, opset=21))
    assert [row.name for row in report] == list("abcdey")
    assert [row.channels for row in report if row.name in "abce"] == [6, 3, 3, 3]
    assert [row.epsilon and round(row.epsilon, 9) for row in report] == [0.5, 1e-5, None, None, 1e-5, None]
    assert [row.before for row in report][:2] == ["the input", "LayerNormalization"]
    assert [row.after for row in report][-2:] == ["LRN, Relu", "the output"]
    assert all(row.shape == ("N", 3, 6, 6) for row in report[:3])  # shape inference may lose it behind the third
    assert {row.why for row in report} == {"its statistics are those of the input"}
    assert "Nx3x6x6" in str(report)


def test_names_tell_nodes_apart() -> None:
    model = net(f"a = {BN} (x, s, b, m, v) r = Relu (a) c = {BN} (r, s, b, m, v) d = Relu (c) y = {BN} (d, s, b, m, v)", (2, 3), norm(3))
    for node in model.graph.node[:4]:
        node.name = "same"
    assert [row.name for row in fastbn.onnx.check(model)] == ["same -> a", "same -> c", "y"]
    assert list(fastbn.onnx.extract(model)) == ["same -> a", "same -> c", "y"]


def test_overloads_of_a_function_are_told_apart() -> None:
    """Each has times and shapes of its own."""
    function = f"""<domain: "local", opset_import: ["": 17]> f (a, s, b, m, v) => (o)
        <float[N, 3] t> {{ t = Relu (a)  o = {BN} (t, s, b, m, v) }}"""
    model = net("h = local.f (x, s, b, m, v) y = local.f (h, s, b, m, v)", (2, 3), norm(3), functions=function, ir=10)
    model.functions.append(model.functions[0])
    second = model.functions[1]
    second.overload = model.graph.node[1].overload = "second"
    del second.node[0], second.value_info[:]
    second.node[0].input[0] = "a"
    first, other = fastbn.onnx.check(model, seconds=0.001)
    assert (first.shape, other.shape) == (("N", 3), None)
    assert (first.before, other.before) == ("Relu", "the input")
    assert "list index out of range" not in fastbn.onnx.check(model, seconds=0.001).timing


def test_nodes_of_other_domains_may_be_anything() -> None:
    """onnx.checker does not know them."""
    model = net("y = Relu (x)", (2, 3), {})
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    for outputs, epsilon in (([], 1e-3), (["a"], "none"), (["b"], [1.0]), (["c"], 1e-3)):
        node = onnx.helper.make_node("SkipLayerNormalization", ["x"], outputs, domain="com.microsoft", epsilon=epsilon)
        model.graph.node.append(node)
    assert [row.epsilon for row in fastbn.onnx.check(model)] == [None, None, pytest.approx(1e-3)]
    assert len(fastbn.onnx.fold(model).graph.node) == 5


def test_bodies_of_loops_and_scans_are_looked_into() -> None:
    pytest.importorskip("onnxruntime")
    loop = f"""n = Constant <value = int64 {{3}}> () t = Constant <value = bool {{1}}> ()
        y = Loop (n, t, x) <body = one (int64 i, bool go, float[2, 3] h) => (bool more, float[2, 3] k) {{
            more = Identity (go) g = Gemm (h, w) q = {BN} (g, s, b, m, v) k = Relu (q) }}>"""
    x, constants = array(2, 3), {"w": array(3, 3), **norm(3)}
    model = net(loop, x.shape, constants)
    (row,) = fastbn.onnx.check(model)
    assert (row.name, row.shape, row.into) == ("y/body/q", (2, 3), "g")
    folded = fastbn.onnx.fold(model)
    onnx.checker.check_model(folded)
    np.testing.assert_allclose(run(folded, x)[0], run(model, x)[0], rtol=1e-5, atol=1e-5)
    state = loop.replace("Gemm (h, w)", "Identity (h)").replace("float[2, 3] h", "float[2, 3] h0").replace("(h)", "(h0)")
    (row,) = fastbn.onnx.check(net(state, x.shape, constants))
    assert row.why == "it stands between Identity and Relu"


def test_reports_are_values() -> None:
    report = fastbn.onnx.check(net(f"y = {BN} (x, s, b, m, v)", (2, 3), norm(3)))
    assert pickle.loads(pickle.dumps(report)) == report  # noqa: S301
    assert report == fastbn.onnx.check(net(f"y = {BN} (x, s, b, m, v)", (2, 3), norm(3)))
    assert json.loads(json.dumps(report.to_dict()))["nodes"][0]["name"] == "y"
    assert isinstance(report[0], fastbn.onnx.Norm)
    assert isinstance(report, fastbn.onnx.Report)
    assert str(fastbn.onnx.check(net("y = Relu (x)", (2, 3), {}))) == "the model has no normalization nodes"


def test_times_are_measured_where_onnxruntime_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    nodes = f"""y = {BN} (x, s, b, m, v) c = Conv (x, w) z = {BN} (c, s, b, m, v)
        h = ReduceMax <keepdims = 0> (x) t = Greater (h, k)
        u = If (t) <then_branch = p () => (float[A, B, C, D] e) {{ e = {BN} (x, s, b, m, v) }},
            else_branch = q () => (float[E, F, G, H] f) {{ f = {BN} (x, s, b, m, v) }}>"""
    constants = {"w": array(3, 3, 3, 3), "k": np.array(0, np.float32), **norm(3)}
    model = net(nodes, ("N", 3, "H", "W"), constants, outputs=("y", "z", "u"))
    report = fastbn.onnx.check(model, seconds=0.01)
    assert [row.name for row in report] == ["y", "z", "u/then_branch/e", "u/else_branch/f"]
    shares = [row.share or 0 for row in report]
    assert shares[0] > 0 < shares[2]
    assert shares[1] == 0 == shares[3]
    assert "x 1x3x224x224; not by itself: folded or fused when it loads" in report.timing
    assert str(report).endswith(report.timing)
    assert "x 5x3x9x9" in fastbn.onnx.check(model, seconds=0.01, inputs={"x": array(5, 3, 9, 9)}).timing
    wrong = fastbn.onnx.check(model, seconds=0.01, inputs={"x": array(5, 4, 9, 9)})
    assert wrong.timing.startswith("times were not measured: ")
    assert wrong[0].share is None
    half = fastbn.onnx.check(net("y = Relu (x)", (2, 3), {}, dtype="float16"), seconds=0.01)
    assert "runs of" in half.timing
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = fastbn.onnx.check(model, seconds=0.01)
    assert report.timing == "times were not measured: onnxruntime is not installed (pip install onnxruntime)"


def test_times_of_a_batch_norm_between_convolutions() -> None:
    pytest.importorskip("onnxruntime")
    nodes = f"c = Conv (x, w) r = Relu (c) n = {BN} (r, s, b, m, v) q = Relu (n) y = Conv <pads = [1, 1, 1, 1]> (q, u)"
    constants = {"w": array(16, 3, 3, 3), "u": array(16, 16, 3, 3), **norm(16)}
    (row,) = fastbn.onnx.check(net(nodes, (1, 3, 40, 40), constants), seconds=0.01)
    assert row.share
    (row,) = fastbn.onnx.check(net(nodes.replace("Relu", "Tanh"), (1, 3, 40, 40), constants), seconds=0.01)
    assert row.share


def test_times_of_what_has_external_data_or_lies_in_functions(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    function = f'<domain: "local", opset_import: ["": 17]> block (a, s, b, m, v) => (r) {{ h = {BN} (a, s, b, m, v) r = Relu (h) }}'
    model = net("t = Relu (x) y = local.block (t, s, b, m, v)", (2, 3, 60, 60), norm(3), functions=function)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    (row,) = fastbn.onnx.check(tmp_path / "m.onnx", seconds=0.01)
    assert row.name == "local.block/h"
    assert row.share


def test_extracted_layers_compute_what_the_nodes_do() -> None:
    pytest.importorskip("onnxruntime")
    nodes = f"""y = {BN} <epsilon = 0.01> (x, s, b, m, v) z = {BN} (x, s1, b, m, v) k = Exp (s) w = {BN} (x, k, b, m, v)"""
    model = net(nodes, (2, 3, 6, 6), {**norm(3), "s1": array(3)}, outputs=("y", "z", "w"))
    layers = fastbn.onnx.extract(model)
    assert list(layers) == ["y", "z"]
    training = net(f"t, p, q = {BN} <training_mode = 1> (x, s, b, m, v) y = Relu (t)", (2, 3, 6, 6), norm(3))
    assert fastbn.onnx.extract(training) == {}
    results = run(model, IMAGES)
    for layer, theirs in zip(layers.values(), results, strict=False):
        np.testing.assert_allclose(layer(IMAGES), theirs, rtol=1e-5, atol=1e-5)
    (layer,) = fastbn.onnx.extract(net(f"y = {BN} (x, s, b, m, v)", (2, 3), norm(3, np.float64), dtype="float64")).values()
    np.testing.assert_allclose(layer.scale, norm(3, np.float64)["s"] / np.sqrt(norm(3, np.float64)["v"] + np.float32(1e-5)), rtol=1e-15)


def test_the_node_whose_epsilon_no_layer_takes_is_named() -> None:
    model = net(f"z = {BN} (x, s, b, m, v) y = {BN} <epsilon = -1.0> (z, s, b, m, v)", (2, 3), norm(3))
    with pytest.raises(ValueError, match=r"^model: y is no batch norm that can be run: epsilon must be "):
        fastbn.onnx.extract(model)


def test_a_session_runs_fastbn() -> None:
    pytest.importorskip("onnxruntime_extensions")
    nodes = f"""c = Conv (x, w)  n = {BN} <epsilon = 0.01> (c, s, b, m, v)
        d = Cast <to = 11> (n)  e = {BN} (d, s2, b2, m2, v2)  y = Cast <to = 1> (e)"""
    wide = {f"{name}2": value for name, value in norm(4, np.float64, seed=5).items()}
    model = net(nodes, ("N", 3, "H", "W"), {"w": array(4, 3, 3, 3), **norm(4), **wide}, overridable=("s",))
    given = model.SerializeToString()
    session = fastbn.onnx.session(model)
    assert model.SerializeToString() == given
    assert repr(session).startswith("<fastbn.onnx session of x: tensor(float)['N', 3, 'H', 'W'] to y: tensor(float)[")
    np.testing.assert_allclose(session.run(None, {"x": IMAGES})[0], run(model, IMAGES)[0], rtol=1e-5, atol=1e-5)
    again = fastbn.onnx.session(model)
    s = array(4, seed=8)
    assert np.abs(again.run(None, {"x": IMAGES, "s": s})[0] - session.run(None, {"x": IMAGES})[0]).max() > 0.01


def test_a_session_takes_one_axis_which_is_of_one_channel() -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxruntime_extensions")
    model, x = net(f"y = {BN} (x, s, b, m, v)", ("N",), norm(1)), np.arange(4, dtype=np.float32)
    (wanted,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(fastbn.onnx.session(model).run(None, {"x": x})[0], wanted, rtol=1e-5)


def test_a_session_of_a_path_has_its_external_data(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_extensions")
    model = net(f"c = Conv (x, w)  y = {BN} (c, s, b, m, v)", ("N", 3, "H", "W"), {"w": array(4, 3, 3, 3), **norm(4)})
    wanted, path = run(model, IMAGES)[0], tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    np.testing.assert_allclose(fastbn.onnx.session(path).run(None, {"x": IMAGES})[0], wanted, rtol=1e-5, atol=1e-5)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="external data"):
        fastbn.onnx.session(path)


@pytest.mark.parametrize("epsilon", ["", " <epsilon: float = @eps>"])
def test_a_session_leaves_what_lies_in_functions(epsilon: str) -> None:
    """Also in a branch there, whose epsilon each call may set."""
    pytest.importorskip("onnxruntime_extensions")
    function = f"""<domain: "local", opset_import: ["": 17]> block <eps> (a, s, b, m, v) => (r)
        <float[2, 3, 6, 6] a, float[3] s, float[3] b, float[3] m, float[3] v> {{
        t = Constant <value = bool {{1}}> ()
        r = If (t) <then_branch = p () => (float[A, B, C, D] e) {{ e = {BN}{epsilon} (a, s, b, m, v) }},
            else_branch = q () => (float[E, F, G, H] f) {{ f = Relu (a) }}> }}"""
    model = net("y = local.block <eps = 0.5> (x, s, b, m, v)", IMAGES.shape, norm(3), functions=function, ir=10)
    np.testing.assert_allclose(fastbn.onnx.session(model).run(None, {"x": IMAGES})[0], run(model, IMAGES)[0], rtol=1e-5, atol=1e-5)


def test_what_fastbn_raises_in_a_session_is_raised_by_run() -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxruntime_extensions")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    model = net(f"y = {BN} (x, s, b, m, v)", ("N", "C", 2, 2), norm(4), overridable=("s",))
    session = fastbn.onnx.session(model, options)
    with pytest.raises(ValueError, match="x has 3 channels on axis 1 but running_mean has shape"):
        session.run(None, {"x": array(2, 3, 2, 2)})
    assert session.run(None, {"x": array(2, 4, 2, 2)})[0].shape == (2, 4, 2, 2)
    with pytest.raises(TypeError, match=r"options must be an onnxruntime\.SessionOptions, got dict"):
        fastbn.onnx.session(model, {})
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    with pytest.raises(ValueError, match="options must have the execution_mode ORT_SEQUENTIAL, got ORT_PARALLEL"):
        fastbn.onnx.session(model, options)


def test_options_of_a_session_may_have_the_extensions_already() -> None:
    ort = pytest.importorskip("onnxruntime")
    extensions = pytest.importorskip("onnxruntime_extensions")
    model = net(f"y = {BN} (x, s, b, m, v)", IMAGES.shape, norm(3))
    with_extensions = ort.SessionOptions()
    with_extensions.register_custom_ops_library(extensions.get_library_path())
    for options in (with_extensions, ort.SessionOptions()):
        for _ in range(2):
            result = fastbn.onnx.session(model, options).run(None, {"x": IMAGES})[0]
            np.testing.assert_allclose(result, run(model, IMAGES)[0], rtol=1e-5, atol=1e-5)


def test_every_way_to_run_a_session_raises_what_fastbn_raised() -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxruntime_extensions")
    session = fastbn.onnx.session(net(f"y = {BN} (x, s, b, m, v)", ("N", "C", 2, 2), norm(4), overridable=("s",)))
    said: queue.Queue[tuple[Any, str]] = queue.Queue()

    def bound(x: Any) -> Any:
        binding = session.io_binding()
        binding.bind_cpu_input("x", x)
        binding.bind_output("y")
        return binding

    ways = [
        lambda x: session.run_with_ort_values(None, {"x": ort.OrtValue.ortvalue_from_numpy(x)}),
        lambda x: session.run_with_iobinding(bound(x)),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="x has 3 channels on axis 1 but running_mean has shape"):
            way(array(2, 3, 2, 2))
        way(array(2, 4, 2, 2))
    for channels in (3, 4):
        session.run_async(None, {"x": array(2, channels, 2, 2)}, lambda results, _, text: said.put((results, text)), None)
        results, text = said.get(timeout=60)
        assert (text.startswith("ValueError: x has 3 channels"), len(results)) == ((True, 0) if channels == 3 else (False, 1))
    session.run(None, {"x": array(2, 4, 2, 2)})


def test_a_session_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"fastbn\.onnx\.session needs onnxruntime and onnxruntime-extensions"):
        fastbn.onnx.session(net("y = Relu (x)", (2, 3), {}))
