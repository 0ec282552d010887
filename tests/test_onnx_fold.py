"""Folding ONNX models: what folds, what stays and why, and that the results are the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx_models import array, net, norm, operators, run  # noqa: E402

import fastbn.onnx  # noqa: E402
from fastbn.__main__ import main  # noqa: E402
from fastbn.layout import Array  # noqa: E402

BN = "BatchNormalization"
ROOT = Path(__file__).resolve().parents[1]


def near(ours: Array, theirs: Array, bound: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    wide = theirs.astype(np.float64)
    assert (np.abs(ours.astype(np.float64) - wide) <= bound * np.maximum(1, np.abs(wide))).all()


def folded(model: Any, x: Array, *, rewrite: bool = False, bound: float = 1e-5) -> Any:
    """Fold a model, and hold all that `fold` and `check` promise."""
    before = model.SerializeToString()
    report = fastbn.onnx.check(model)
    result = fastbn.onnx.fold(model, rewrite)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    for ours, theirs in zip(run(result, x), run(model, x), strict=True):
        near(ours, theirs, bound)
    assert [i.name for i in result.graph.output] == [i.name for i in model.graph.output]
    if not rewrite:
        left = fastbn.onnx.check(result)
        assert len(left) == sum(row.state == "stays" for row in report)
        assert all(row.state == "stays" for row in left)
    return result


SECOND = {f"{name}2": value for name, value in norm(3, seed=9).items()}
CONV = {"w": array(4, 3, 3, 3), **norm(4)}
IMAGES = array(2, 3, 6, 6, seed=3)
ROWS = array(5, 3, seed=3)


@pytest.mark.parametrize(
    ("nodes", "constants", "x", "left"),
    [
        ("c = Conv (x, w) y = BN (c, s, b, m, v)", CONV, IMAGES, ["Conv"]),
        ("c = Conv <pads = [1, 1, 1, 1]> (x, w, k) y = BN (c, s, b, m, v)", {**CONV, "k": array(4)}, IMAGES, ["Conv"]),
        ("c = Conv (x, w) i = Identity (c) y = BN (i, s, b, m, v)", CONV, IMAGES, ["Conv", "Identity"]),
        ("c = Conv (x, w) a = Add (c, k) y = BN (a, s, b, m, v)", {**CONV, "k": array(1, 4, 1, 1)}, IMAGES, ["Conv", "Add"]),
        ("c = Conv (x, w) a = Add (k, c) y = BN (a, s, b, m, v)", {**CONV, "k": array(1)}, IMAGES, ["Conv", "Add"]),
        ("c = Conv (x, w) a = Add (c, k) y = BN (a, s, b, m, v)", {**CONV, "k": array(4, 4)}, IMAGES, ["Conv", "Add"]),
        ("c = Conv <group = 2> (x, w) y = BN (c, s, b, m, v)", {"w": array(4, 2, 3, 3), **norm(4)}, array(2, 4, 5, 5), ["Conv"]),
        ("c = Conv (x, w) y = BN (c, s, b, m, v)", {"w": array(4, 3, 3), **norm(4)}, array(2, 3, 6), ["Conv"]),
        ("c = Conv (x, w) y = BN (c, s, b, m, v)", {"w": array(4, 3, 2, 2, 2), **norm(4)}, array(2, 3, 4, 4, 4), ["Conv"]),
        ("c = ConvTranspose (x, w) y = BN (c, s, b, m, v)", {"w": array(3, 4, 3, 3), **norm(4)}, IMAGES, ["ConvTranspose"]),
        (
            "c = ConvTranspose <group = 2, strides = [2, 2]> (x, w, k) y = BN (c, s, b, m, v)",
            {"w": array(4, 3, 3, 3), "k": array(6), **norm(6)}, array(2, 4, 5, 5), ["ConvTranspose"],
        ),
        ("c = Gemm (x, w) y = BN (c, s, b, m, v)", {"w": array(3, 4), **norm(4)}, ROWS, ["Gemm"]),
        ("c = Gemm <transB = 1> (x, w, k) y = BN (c, s, b, m, v)", {"w": array(4, 3), "k": array(4), **norm(4)}, ROWS, ["Gemm"]),
        (
            "c = Gemm <alpha = 0.5, beta = 2.0> (x, w, k) y = BN (c, s, b, m, v)",
            {"w": array(3, 4), "k": array(5, 1), **norm(4)}, ROWS, ["Gemm"],
        ),
        (
            "c = Gemm <transA = 1, beta = 0.0> (x, w, k) y = BN (c, s, b, m, v)",
            {"w": array(5, 4), "k": np.array(3, np.float32), **norm(4)}, ROWS, ["Gemm"],
        ),
        ("c = MatMul (x, w) y = BN (c, s, b, m, v)", {"w": array(3, 4), **norm(4)}, ROWS, ["MatMul", "Add"]),
        ("c = MatMul (x, w) a = Add (c, k) y = BN (a, s, b, m, v)", {"w": array(3, 4), "k": array(4), **norm(4)}, ROWS, ["MatMul", "Add"]),
        ("c = MatMul (w, x) y = BN (c, s, b, m, v)", {"w": array(4, 3), **norm(4)}, array(2, 3, 5), ["MatMul", "Add"]),
        (
            "c = InstanceNormalization (x, p, q) y = BN (c, s, b, m, v)",
            {"p": array(3), "q": array(3), **norm(3)}, IMAGES, ["InstanceNormalization"],
        ),
        ("c = BN (x, s, b, m, v) y = Conv (c, w)", {"w": array(4, 3, 3, 3), **norm(3)}, IMAGES, ["Conv"]),
        ("c = BN (x, s, b, m, v) i = Identity (c) y = Conv (i, w)", {"w": array(4, 3, 3, 3), **norm(3)}, IMAGES, ["Identity", "Conv"]),
        (
            "c = BN (x, s, b, m, v) y = Conv <group = 2> (c, w, k)",
            {"w": array(6, 2, 3, 3), "k": array(6), **norm(4)}, array(2, 4, 5, 5), ["Conv"],
        ),
        ("c = BN (x, s, b, m, v) y = Conv <auto_pad = \"VALID\"> (c, w)", {"w": array(4, 3, 3, 3), **norm(3)}, IMAGES, ["Conv"]),
        ("c = BN (x, s, b, m, v) y = Conv <auto_pad = \"SAME_UPPER\"> (c, w)", {"w": array(4, 3, 1, 1), **norm(3)}, IMAGES, ["Conv"]),
        (
            "c = BN (x, s, b, m, v) y = Conv <auto_pad = \"SAME_LOWER\", strides = [2, 2]> (c, w)",
            {"w": array(4, 3, 2, 2), **norm(3)}, IMAGES, ["Conv"],
        ),
        ("c = BN (x, s, b, m, v) y = Gemm (c, w)", {"w": array(3, 4), **norm(3)}, ROWS, ["Gemm"]),
        (
            "c = BN (x, s, b, m, v) y = Gemm <transB = 1, alpha = 0.5, beta = 3.0> (c, w, k)",
            {"w": array(4, 3), "k": array(1, 4), **norm(3)}, ROWS, ["Gemm"],
        ),
        ("c = BN (x, s, b, m, v) y = MatMul (c, w)", {"w": array(3, 4), **norm(3)}, ROWS, ["MatMul", "Add"]),
        ("c = BN (x, s, b, m, v) d = MatMul (c, w) y = Add (d, k)", {"w": array(3, 4), "k": array(4), **norm(3)}, ROWS, ["MatMul", "Add"]),
        ("c = BN (x, s, b, m, v) y = MatMul (w, c)", {"w": array(4, 3), **norm(3)}, array(2, 3, 5), ["MatMul", "Add"]),
        ("c = BN (x, s, b, m, v) y = BN (c, s2, b2, m2, v2)", {**norm(3), **SECOND}, IMAGES, [BN]),
        (
            "c = BN (x, s, b, m, v) d = BN (c, s2, b2, m2, v2) y = Conv (d, w)",
            {"w": array(4, 3, 3, 3), **norm(3), **SECOND}, IMAGES, ["Conv"],
        ),
        (
            "d = Conv (x, w) c = BN (d, s, b, m, v) e = BN (c, s, b, m, v) y = BN (e, s, b, m, v)",
            {"w": array(3, 3, 3, 3), **norm(3)}, IMAGES, ["Conv"],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ir", [3, 8])
def test_what_folds(nodes: str, constants: dict[str, Array], x: Array, left: list[str], ir: int) -> None:
    model = net(nodes.replace("BN", BN), x.shape, constants, ir=ir, opset=13)
    result = folded(model, x)
    assert [op for op in operators(result) if op != "Constant"] == left
    assert len(result.graph.initializer) <= len(constants) + 1


@pytest.mark.parametrize("between", ["", "i = Identity (c) "])
@pytest.mark.parametrize("product", ["MatMul (n, w)", "MatMul (w, n)"])
def test_batch_norms_on_both_sides_of_a_product_fold(between: str, product: str) -> None:
    """The product that the first one adds its shift to has as many axes as it had."""
    last = "i" if between else "c"
    nodes = f"n = {BN} (x, s, b, m, v) c = {product} {between}d = {BN} ({last}, s2, b2, m2, v2) y = {BN} (d, s, b, m, v)"
    x = ROWS if product.startswith("MatMul (n") else array(2, 3, 5)
    model = net(nodes, x.shape, {"w": array(3, 3), **norm(3), **SECOND})
    assert operators(folded(model, x)) == ["MatMul", "Add", *(["Identity"] if between else [])]


ZERO = {"s": array(3), "b": np.zeros(3, np.float32), "m": np.zeros(3, np.float32), "v": np.ones(3, np.float32)}


def test_padding_with_zeros_changes_nothing_where_the_shift_is_zero() -> None:
    for after, weight in (("Conv", array(4, 3, 3, 3)), ("ConvTranspose", array(3, 4, 3, 3))):
        model = net(f"c = {BN} (x, s, b, m, v) y = {after} <pads = [1, 1, 1, 1]> (c, w)", IMAGES.shape, {"w": weight, **ZERO})
        assert operators(folded(model, IMAGES)) == [after]


STAYS = [
    ("c = BN (x, s, b, m, v) y = Conv <pads = [1, 0, 0, 0]> (c, w)", norm(3), {}, "y after it pads with zeros"),
    ("c = BN (x, s, b, m, v) y = Conv <auto_pad = \"SAME_UPPER\"> (c, w)", norm(3), {}, "y after it pads with zeros"),
    ("c = BN (x, s, b, m, v) y = ConvTranspose (c, t)", norm(3), {}, "does not bring its shift to every output alike"),
    ("c = BN (x, s, b, m, v) d = Conv (c, w) e = Relu (c) y = Mul (e, e)", norm(3), {"outputs": ("y", "d")}, "it is read 2 times"),
    ("c = BN (x, s, b, m, v) y = Conv (c, w)", norm(3), {"outputs": ("y", "c")}, "the graph returns it"),
    ("c = Conv (x, w) y = BN (c, s, b, m, v) z = Relu (c)", norm(4), {"outputs": ("y", "z")}, "what c before it returns cannot change"),
    ("c = Conv (x, w) y = BN (c, s, b, m, v)", norm(4), {"outputs": ("y", "c")}, "the graph returns it"),
    ("c = Conv (x, w) a = Add (c, k) y = BN (a, s, b, m, v) z = Relu (a)", norm(4), {"outputs": ("y", "z")}, "it is read 2 times"),
    ("c = Conv (x, w) y = BN (c, s, b, m, v)", norm(4), {"overridable": ("w",)}, "w is an input of the graph, too: a caller may"),
    ("c = Conv (x, w) y = BN (c, s, b, m, v)", norm(4), {"overridable": ("v",)}, "v is an input of the graph, too"),
    ("r = Relu (x) c = BN (r, s, b, m, v) y = Relu (c)", norm(3), {}, "it stands between Relu and Relu"),
    ("y = BN (x, s, b, m, v)", norm(3), {}, "it stands between the input and the output"),
    ("q = Exp (v) c = Conv (x, w) y = BN (c, s, b, m, q)", norm(4), {}, "q is computed by Exp"),
    ("q = Exp (w) c = Conv (x, q) y = BN (c, s, b, m, v)", norm(4), {}, "q is computed by Exp"),
    ("c = Conv (x, w) y, n, o = BN <training_mode = 1> (c, s, b, m, v)", norm(4), {}, "it trains: training_mode is 1"),
    (
        "c, n, o = BN <training_mode = 1> (x, s, b, m, v) y = BN (c, s, b, m, v)", norm(3), {},
        "c before it cannot take it: it trains: training_mode is 1",
    ),
    ("c = Conv (x, w) i = Flatten (c) y = BN (i, s, b, m, v)", norm(64), {"outputs": ("y:2",)}, "it stands between Flatten and the output"),
    ("c = Conv (x, w) y = BN (c, s, b, m, v)", {**norm(4), "v": -np.ones(4, np.float32)}, {}, "its scale or its shift is not finite"),
    ("c = Conv (x, h) y = BN (c, s, b, m, v)", {**norm(4), "s": np.full(4, 1e38, np.float32)}, {}, "does not fit float32"),
    ("y = Conv (x, w) z = BN (s, s, s, s, s)", {"s": np.ones(3, np.float32)}, {}, "it stands between a constant and nothing"),
    ("y = InstanceNormalization (x, s, b)", norm(3), {}, "its statistics are those of the input"),
    ("y = LRN <size = 3> (x)", {}, {}, "its statistics are those of the input"),
]  # fmt: skip


# Where sizes are the same by chance, what looks like the channels may be another axis.
SQUARE = [
    ("c = BN (x, s, b, m, v) y = Gemm <transA = 1> (c, w)", (3, 3), {"w": array(3, 3), **norm(3)}, "sums over the batch"),
    ("c = BN (x, s, b, m, v) y = MatMul (c, w)", (3, 3, 3), {"w": array(3, 3), **norm(3)}, "does not sum over its channels"),
    ("c = BN (x, s, b, m, v) y = MatMul (w, c)", (3, 3), {"w": array(3, 3), **norm(3)}, "does not sum over its channels"),
    ("c = BN (x, s, b, m, v) y = Gemm (w, c)", (3, 3), {"w": array(3, 3), **norm(3)}, "no data but a parameter of y"),
    ("c = BN (x, s, b, m, v) y = MatMul (c, c)", (3, 3), norm(3), "it is read 2 times"),
    ("c = MatMul (x, w) y = BN (c, s, b, m, v)", (3, 3, 3), {"w": array(3, 3), **norm(3)}, "x is an input of the graph"),
    ("c = MatMul (w, x) y = BN (c, s, b, m, v)", (3, 3), {"w": array(3, 3), **norm(3)}, "x is an input of the graph"),
    ("c = MatMul (w, x) y = BN (c, s, b, m, v)", (2, 3, 3, 3), {"w": array(3, 3), **norm(3)}, "the channels are no columns"),
    ("c = Gemm (w, x) y = BN (c, s, b, m, v)", (3, 3), {"w": array(3, 3), **norm(3)}, "x is an input of the graph"),
    (
        "c = Conv (x, w) a = Add (c, k) y = BN (a, s, b, m, v)", (3, 3, 3, 3),
        {"w": array(3, 3, 1, 1), "k": array(3, 1, 1, 1, 1), **norm(3)}, "how a before it broadcasts is not known",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "shape", "constants", "why"), SQUARE, ids=[case[0] for case in SQUARE])
def test_another_axis_of_the_same_length_is_not_taken_for_the_channels(
    nodes: str, shape: tuple[int, ...], constants: dict[str, Array], why: str
) -> None:
    rank = 5 if "Add" in nodes else len(shape)
    model = net(nodes.replace("BN", BN), shape, constants, outputs=(f"y:{rank}",))
    (row,) = fastbn.onnx.check(model)
    assert why in row.why
    folded(model, array(*shape))


def test_what_training_may_change_is_no_constant() -> None:
    model = net(f"c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, CONV)
    model.training_info.add()
    (row,) = fastbn.onnx.check(model)
    assert row.why == "the model's training_info may change s"


@pytest.mark.parametrize(("nodes", "parameters", "options", "why"), STAYS, ids=[case[0] for case in STAYS])
def test_what_stays_and_why(nodes: str, parameters: dict[str, Array], options: dict[str, Any], why: str) -> None:
    constants = {
        "w": array(4, 3, 3, 3), "t": array(3, 4, 3, 3), "h": array(4, 3, 3, 3) * np.float32(1e2), "k": array(4, 1, 1),
        **parameters,
    }  # fmt: skip
    model = net(nodes.replace("BN", BN), IMAGES.shape, constants, **options)
    assert why in "; ".join(row.why for row in fastbn.onnx.check(model))
    result = fastbn.onnx.fold(model)
    stays = [row.name for row in fastbn.onnx.check(model) if row.state == "stays"]
    assert [row.name for row in fastbn.onnx.check(result)] == stays
    onnx.checker.check_model(result)


def test_group_normalization_takes_one() -> None:
    nodes = f"c = GroupNormalization <num_groups = 3> (x, p, q) y = {BN} (c, s, b, m, v)"
    model = net(nodes, (2, 6, 4, 4), {"p": array(6), "q": array(6), **norm(6)}, opset=21)
    assert operators(folded(model, array(2, 6, 4, 4))) == ["GroupNormalization"]


@pytest.mark.parametrize("groups", [2, 6])
@pytest.mark.parametrize("where", ["graph", "function", "file"])
def test_deprecated_operators_are_looked_at_as_others(groups: int, where: str, tmp_path: Path) -> None:
    constants = {"w": array(6, 6, 1, 1), "p": array(groups), "q": array(groups), **norm(6), **norm(6, prefix="n")}
    group = f"GroupNormalization <num_groups = {groups}>"
    function = f'<domain: "local", opset_import: ["": 21]> block (a, p, q) => (r) {{ r = {group} (a, p, q) }}'
    middle = "local.block" if where == "function" else group
    nodes = f"c = Conv (x, w) d = {BN} (c, s, b, m, v) e = {middle} (d, p, q) y = {BN} (e, ns, nb, nm, nv)"
    model = net(nodes, (2, 6, 4, 4), constants, opset=21, functions=function if where == "function" else "")
    for holder in (model, *model.functions):  # which onnx.checker takes for deprecated
        holder.opset_import[0].version = 18
    given: Any = model
    if where == "file":
        given = tmp_path / "m.onnx"
        onnx.save(model, given, save_as_external_data=True, location="w", size_threshold=0)
        model = onnx.load(given)
    result = fastbn.onnx.fold(given)
    takes = groups == 6 and where != "function"
    assert operators(result) == ["Conv", middle.split(" ")[0].split(".")[-1], *([] if takes else [BN])]
    x = array(2, 6, 4, 4)
    near(run(result, x)[0], run(model, x)[0])
    model.graph.node[0].op_type = "Konv"
    with pytest.raises(ValueError, match="No Op registered for Konv"):
        fastbn.onnx.check(model)


def test_a_model_too_large_for_a_file_is_written_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastbn.onnx.protos, "LARGE", 1000)
    model = net(f"c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, {"w": array(16, 3, 3, 3), **norm(16)})
    onnx.save(model, tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    for _ in range(2):
        assert main(["onnx", str(tmp_path / "m.onnx"), "--fold", str(out), "--seconds", "0"]) == 0
        assert 1000 < (tmp_path / "out.onnx.data").stat().st_size < 3000
        result = onnx.load(out)
        assert operators(result) == ["Conv"]
        near(run(result, IMAGES)[0], run(model, IMAGES)[0])


def test_shared_weights_are_copied() -> None:
    nodes = f"c = Conv (x, w, k) y = {BN} (c, s, b, m, v) z = Conv (x, w, k)"
    model = net(nodes, IMAGES.shape, {**CONV, "k": array(4)}, outputs=("y", "z"))
    result = folded(model, IMAGES)
    assert operators(result) == ["Conv", "Conv"]
    assert [i.name for i in result.graph.initializer] == ["w", "k", "w_folded", "k_folded"]


def test_parameters_shared_by_two_batch_norms_stay_until_both_are_folded() -> None:
    nodes = f"c = Conv (x, w) d = {BN} (c, s, b, m, v) y = Conv (d, u) r = Relu (x) z = {BN} (r, s1, b1, m, v)"
    constants = {"w": array(4, 3, 1, 1), "u": array(4, 4, 3, 3), **norm(4), "s1": array(3), "b1": array(3), "m": array(4)}
    model = net(nodes.replace("(r, s1, b1, m, v)", "(c, s, b, m, v)"), IMAGES.shape, constants, outputs=("y", "z"))
    result = folded(model, IMAGES)  # the first goes into the second Conv; the second stays, as what the first Conv returns is read twice
    assert operators(result) == ["Conv", "Conv", "Relu", BN]
    assert {"s", "b", "m", "v"} <= {i.name for i in result.graph.initializer}


def test_folded_initializers_keep_their_names() -> None:
    result = folded(net(f"c = Conv (x, w, k) y = {BN} (c, s, b, m, v)", IMAGES.shape, {**CONV, "k": array(4)}), IMAGES)
    assert [i.name for i in result.graph.initializer] == ["w", "k"]


@pytest.mark.parametrize("nodes", [f"c = MatMul (x, w) h = {BN} (c, s, b, m, v)", f"c = Relu (x) h = {BN} (c, s, b, m, v)"])
def test_new_nodes_have_names_that_no_other_node_has(nodes: str) -> None:
    model = net(f"{nodes} z = Relu (h) y = Neg (z)", ROWS.shape, {"w": array(3, 3), **norm(3)})
    for node, name in zip(model.graph.node, ("c", "bn", "bn_shift", "bn_scale"), strict=True):
        node.name = name
    named = [node.name for node in folded(model, ROWS, rewrite=True).graph.node]  # ONNX Runtime refuses two of one name
    assert {"bn_shift", "bn_shift_2"} <= set(named)
    assert len(set(named)) == len(named)


FORMS = [
    ("s = Constant <value = float[4] {1, 2, 3, 4}> ()", {}),
    ("s = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()", {}),
    ("f = Constant <value_float = 2.0> () n = Constant <value_ints = [4]> () s = Expand (f, n)", {}),
    ("n = Constant <value = int64[1] {4}> () s = ConstantOfShape <value = float[1] {3}> (n)", {}),
    ("s = Identity (s0)", {"s0": array(4)}),
    ("s = Cast <to = 1> (s0)", {"s0": array(4, dtype=np.float64)}),
    ("s = CastLike (s0, x)", {"s0": array(4, dtype=np.float64)}),
    ("n = Shape (s0) s1 = CastLike (f, x) s = Expand (s1, n)", {"s0": array(4), "f": np.array(2.0)}),  # as torch.onnx writes
    ("n = Constant <value_ints = [-1]> () s = Reshape (s0, n)", {"s0": array(2, 2)}),
    ("n = Constant <value_int = 0> () s1 = Unsqueeze (s0, n1) s = Squeeze (s1, n1)", {"s0": array(4), "n1": np.array([0])}),
]


@pytest.mark.parametrize(("nodes", "constants"), FORMS, ids=[case[0] for case in FORMS])
def test_every_form_of_a_constant_is_one(nodes: str, constants: dict[str, Array]) -> None:
    others = {name: value for name, value in CONV.items() if name != "s"}
    model = net(f"{nodes} c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, {**others, **constants})
    result = folded(model, IMAGES)
    assert [op for op in operators(result) if op != "Constant"] == ["Conv"]
    assert {i.name for i in result.graph.initializer} == {"w", "c_bias"}


def test_a_transposed_weight_is_a_constant() -> None:
    model = net(f"t = Transpose <perm = [1, 0]> (w) c = Gemm (x, t) y = {BN} (c, s, b, m, v)", ROWS.shape, {"w": array(4, 3), **norm(4)})
    result = folded(model, ROWS)
    assert operators(result) == ["Gemm"]
    assert "w" not in {i.name for i in result.graph.initializer}


@pytest.mark.parametrize("attribute", [False, True])
def test_a_sparse_weight_is_a_constant(attribute: bool) -> None:
    dense = array(4, 3) * (np.arange(12).reshape(4, 3) % 2).astype(np.float32)
    places = np.argwhere(dense)
    model = net(f"c = Gemm <transB = 1> (x, w) y = {BN} (c, s, b, m, v)", ROWS.shape, {"w": dense, **norm(4)})
    expected = run(model, ROWS)[0]
    values = onnx.numpy_helper.from_array(dense[tuple(places.T)], "w")
    sparse = onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(places, "places"), dense.shape)
    kept = [i for i in model.graph.initializer if i.name != "w"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if attribute:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    else:
        model.graph.sparse_initializer.append(sparse)
    result = fastbn.onnx.fold(model)
    assert operators(result) == ["Gemm"]
    assert not result.graph.sparse_initializer
    near(run(result, ROWS)[0], expected)


def test_dequantized_weights_stay_small() -> None:
    nodes = f"w = DequantizeLinear (q, f) c = Conv (x, w) y = {BN} (c, s, b, m, v)"
    constants = {**norm(4), "q": np.arange(108, dtype=np.int8).reshape(4, 3, 3, 3), "f": np.array(0.1, np.float32)}
    (row,) = fastbn.onnx.check(net(nodes, IMAGES.shape, constants))
    assert row.why == "w is computed by DequantizeLinear"


def branches(then: str, otherwise: str, constants: dict[str, Array], before: str = "") -> Any:
    text = f"""c = Constant <value = bool {{1}}> () {before} y = If (c) <
        then_branch = t () => (float[A, B, C, D] p) {{ {then} }}, else_branch = e () => (float[E, F, G, H] q) {{ {otherwise} }}>"""
    return net(text.replace("BN", BN), IMAGES.shape, constants)


def test_branches_fold_inside_and_read_constants_from_outside() -> None:
    model = branches("a = Conv (x, w) p = BN (a, s, b, m, v)", "d = Conv (x, w) q = Relu (d)", CONV)
    (row,) = fastbn.onnx.check(model)
    assert (row.name, row.before, row.after, row.into) == ("y/then_branch/p", "Conv", "the output", "a")
    assert row.shape == (2, 4, 4, 4)
    result = folded(model, IMAGES)
    then, otherwise = (attribute.g for attribute in result.graph.node[1].attribute)
    if then.name != "t":
        then, otherwise = otherwise, then
    assert [node.op_type for node in then.node] == ["Conv"]
    assert {i.name for i in result.graph.initializer} == {"w"}  # the other branch reads it
    assert len(then.initializer) == 2
    assert [node.op_type for node in otherwise.node] == ["Conv", "Relu"]


@pytest.mark.parametrize("reader", ["p = Relu (a)", "p = BN (a, s, b, m, v)", "p = Identity (a)"])
def test_what_a_branch_reads_does_not_change(reader: str) -> None:
    model = branches(reader, "q = Relu (x1)", {**CONV, "x1": array(2, 4, 4, 4)}, "a = Conv (x, w) u = BN (a, s, b, m, v) z = Relu (u)")
    reasons = [row.why for row in fastbn.onnx.check(model)]
    assert reasons[0] == "what a before it returns cannot change: a subgraph reads it"
    assert reasons[1:] in ([], ["it stands between Conv and the output"])
    folded(model, IMAGES)


def test_both_branches_may_use_the_same_names() -> None:
    both = "a = Conv (x, w) p = BN (a, s, b, m, v)"
    model = branches(both, both.replace("p =", "q ="), CONV)
    assert [row.name for row in fastbn.onnx.check(model)] == ["y/then_branch/p", "y/else_branch/q"]
    assert not fastbn.onnx.check(folded(model, IMAGES))


def test_functions_fold_inside() -> None:
    function = f"""<domain: "local", opset_import: ["": 17]> block <eps> (a, w, s, b, m, v) => (r) {{
        k = Constant <value = float[4, 3, 1, 1] {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}}> ()
        one = Constant <value = float[4] {{1, 2, 3, 4}}> ()
        c = Conv (a, k) d = {BN} (c, one, one, one, one) e = {BN} (d, s, b, m, v) f = {BN} <epsilon: float = @eps> (e, one, one, one, one)
        r = Identity (f) }}"""
    model = net("y = local.block <eps = 0.1> (x, w, s, b, m, v)", IMAGES.shape, CONV, functions=function)
    rows = fastbn.onnx.check(model)
    assert [row.name for row in rows] == ["local.block/d", "local.block/e", "local.block/f"]
    assert [row.state for row in rows] == ["foldable", "stays", "stays"]
    assert rows[1].why == "s is an input of the function"
    assert rows[2].why == "epsilon of f is an attribute of the function"
    result = folded(model, IMAGES)
    assert [node.op_type for node in result.functions[0].node].count(BN) == 2


def test_what_changes_nothing_is_left_out() -> None:
    one, zero = np.ones(3, np.float32), np.zeros(3, np.float32)
    same = {"s": np.sqrt(np.float32([4, 5, 6]) + np.float32(1e-5)), "b": array(3), "m": array(3), "v": np.float32([4, 5, 6])}
    for constants in ({"s": one, "b": zero, "m": zero, "v": one - np.float32(1e-5)}, same):
        for nodes, left in (
            (f"r = Relu (x) n = {BN} (r, s, b, m, v) y = Relu (n)", ["Relu", "Relu"]),
            (f"y = {BN} (x, s, b, m, v)", ["Identity"]),
            (f"r = Relu (x) n = {BN} (r, s, b, m, v) y = Relu (n) z = Sigmoid (n)", ["Relu", "Relu", "Sigmoid"]),
        ):
            model = net(nodes, IMAGES.shape, constants)
            (row,) = fastbn.onnx.check(model)
            assert (row.state, row.why) == ("folded", "it changes nothing")
            assert operators(folded(model, IMAGES)) == left


def test_a_scale_that_16_bits_tell_from_1_changes_an_input_of_32() -> None:
    constants = {"s": np.float16([1.001, 1]), "b": np.zeros(2, np.float16), "m": np.zeros(2, np.float32), "v": np.ones(2, np.float32)}
    model = net(f"y = {BN} <epsilon = 0.0> (x, s, b, m, v)", (3, 2), constants)
    (row,) = fastbn.onnx.check(model)
    assert row.state == "stays"
    assert operators(folded(model, array(3, 2))) == [BN]


@pytest.mark.filterwarnings("error")
def test_a_constant_that_is_not_finite_stays_without_a_warning() -> None:
    infinite = np.float32([[np.inf, 1, 1]] * 3)
    for nodes, k, left in (
        (f"c = Gemm (x, w, k) y = {BN} (c, s, b, m, v)", array(3), ["Gemm", BN]),
        (f"c = Gemm <beta = 0.0> (x, u, k) y = {BN} (c, s, b, m, v)", infinite[0], ["Gemm"]),  # k is not read
        (f"c = {BN} (x, s, b, m, v) y = Gemm <beta = 0.0> (c, u, k)", infinite[0], ["Gemm"]),
    ):
        model = net(nodes, ROWS.shape, {"w": infinite, "u": array(3, 3), "k": k, **norm(3), "s": np.float32([0, 1, 2])})
        assert operators(fastbn.onnx.fold(model)) == left
        if left == ["Gemm"]:
            folded(model, ROWS)


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
@pytest.mark.parametrize(
    "nodes", [f"c = Gemm <beta = 0.0> (x, w, k) y = {BN} (c, s, b, m, v)", f"c = {BN} (x, s, b, m, v) y = Gemm <beta = 0.0> (c, w, k)"]
)
def test_an_input_that_is_not_read_stays_the_callers(nodes: str, shape: tuple[int, ...]) -> None:
    model = net(nodes, ROWS.shape, {"w": array(3, 3), "k": np.zeros(shape, np.float32), **norm(3)}, overridable=("k",))
    result = fastbn.onnx.fold(model)
    assert operators(result) == ["Gemm"]
    assert [value.name for value in result.graph.input] == ["x", "k"]
    ort = pytest.importorskip("onnxruntime")
    given = {"x": ROWS, "k": array(*shape)}
    before, after = (ort.InferenceSession(one.SerializeToString()).run(None, given)[0] for one in (model, result))
    near(after, before, 1e-5)


@pytest.mark.parametrize(
    "nodes",
    [
        "c = Gemm (x, w, k) y = BN (c, s, b, m, v)", "c = BN (x, s, b, m, v) y = Gemm (c, w, k)",
        "c = BN (x, s, b, m, v) z = MatMul (c, w) y = Add (z, k)", "z = MatMul (x, w) c = Add (z, k) y = BN (c, s, b, m, v)",
    ],
)  # fmt: skip
def test_beside_a_constant_that_does_not_fit_it_stays(nodes: str) -> None:
    model = net(nodes.replace("BN", BN), ROWS.shape, {"w": array(3, 3), "k": array(2), **norm(3)})
    (row,) = fastbn.onnx.check(model)
    assert row.state == "stays"
    assert "constants beside it do not fit each other: operands could not be broadcast" in row.why
    assert operators(fastbn.onnx.fold(model)) == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize(("x", "parameters"), [("float64", "float32"), ("float32", "float16"), ("float32", "float64")])
def test_parameters_that_are_narrower_than_x_take_a_batch_norm_in_full(x: str, parameters: str, ir: int) -> None:
    constants = {name: value.astype(x if name in "mv" else parameters) for name, value in (norm(3) | SECOND).items()}
    model = net(f"c = {BN} (x, s, b, m, v) y = {BN} (c, s2, b2, m, v)", (5, 3), constants, dtype=x, ir=ir)
    given, result = array(5, 3, dtype=x), fastbn.onnx.fold(model)
    onnx.checker.check_model(result, full_check=True)
    assert operators(result).count(BN) == 1
    near(evaluate(result, given)[0], evaluate(model, given)[0], {"float32": 1e-6, "float64": 1e-14}[x])


@pytest.mark.parametrize("opset", [1, 6])
def test_old_opsets_stay_with_a_reason(opset: int) -> None:
    consumed = "consumed_inputs = [0, 0, 0, 1, 1], " if opset == 1 else ""
    model = net(f"c = Conv (x, w) y = {BN} <{consumed}is_test = 1> (c, s, b, m, v)", IMAGES.shape, CONV, opset=opset, ir=3)
    (row,) = fastbn.onnx.check(model)
    assert row.why == f"it is of opset {opset}: convert the model to opset 7 or later (onnx.version_converter)"
    assert operators(fastbn.onnx.fold(model)) == ["Conv", BN]


@pytest.mark.parametrize("opset", [7, 8, 9, 13])
def test_old_opsets_train_where_they_return_statistics(opset: int) -> None:
    model = net(f"c = Conv (x, w) y, n, o, p, q = {BN} (c, s, b, m, v)", IMAGES.shape, CONV, opset=opset)
    (row,) = fastbn.onnx.check(model)
    assert row.why == "it trains: it has more than one output"


@pytest.mark.parametrize("opset", [7, 8])
def test_parameters_for_each_position_stay(opset: int) -> None:
    model = net(f"c = Conv (x, w) y = {BN} <spatial = 0> (c, s, b, m, v)", IMAGES.shape, CONV, opset=opset)
    (row,) = fastbn.onnx.check(model)
    assert row.why == "spatial is 0: each position has parameters of its own"
    model = net(f"c = Conv (x, w) y = {BN} <spatial = 1> (c, s, b, m, v)", IMAGES.shape, CONV, opset=opset)
    assert operators(folded(model, IMAGES)) == ["Conv"]


def test_external_data(tmp_path: Path) -> None:
    nodes = f"c = Conv (x, w) y = {BN} (c, s, b, m, v) z = Conv (x, u)"
    model = net(nodes, IMAGES.shape, {**CONV, "u": array(4, 3, 3, 3)}, outputs=("y", "z"))
    expected = run(model, IMAGES)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    saved = path.read_bytes(), (tmp_path / "weights.bin").read_bytes()
    (row,) = fastbn.onnx.check(path)
    assert row.into == "c"
    result = fastbn.onnx.fold(str(path))
    onnx.checker.check_model(result)
    for ours, theirs in zip(run(result, IMAGES), expected, strict=True):
        near(ours, theirs)
    assert saved == (path.read_bytes(), (tmp_path / "weights.bin").read_bytes())
    assert list(fastbn.onnx.extract(path)) == ["y"]
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ValueError, match=r"weights\.bin"):
        fastbn.onnx.check(path)


@pytest.mark.parametrize("function", ["check", "fold", "extract"])
def test_what_is_no_model_is_refused(function: str, tmp_path: Path) -> None:
    call = getattr(fastbn.onnx, function)
    model = net(f"y = {BN} (x, s, b, m, v)", IMAGES.shape, norm(3))
    whole = model.SerializeToString()
    for name, content in (("empty", b""), ("half", whole[: len(whole) // 2]), ("text", b"hello"), ("other", b"\x89PNG\r\n" * 9)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"^model"):
            call(tmp_path / name)
    with pytest.raises(ValueError, match=r"model must be the path of a file, but there is none at 'missing\.onnx'"):
        call("missing.onnx")
    with pytest.raises(ValueError, match="model must be the path of a file"):
        call(tmp_path)
    with pytest.raises(ValueError, match="model must be the path of a file"):
        call("a" * 5000)
    for wrong in (None, 3, whole, model.graph, [model]):
        with pytest.raises(TypeError, match=f"model must be an onnx\\.ModelProto or a path, got {type(wrong).__name__}"):
            call(wrong)
    model.graph.node[0].input[0] = "nothing"
    with pytest.raises(ValueError, match=r"model must be one that onnx.checker lets pass: .*nothing"):
        call(model)


@pytest.mark.parametrize(
    ("nodes", "constants", "why"),
    [
        ("c = Conv <group = 3> (x, w) y = BN (c, s, b, m, v)", {}, "are not those of a convolution of 3 groups"),
        ("c = Conv <group = 0> (x, w) y = BN (c, s, b, m, v)", {}, "are not those of a convolution of 0 groups"),
        ("c = Conv (x, k) y = BN (c, s, b, m, v)", {}, "of shape (4,), are not those of a convolution"),
        ("c = Conv (x, w, k3) y = BN (c, s, b, m, v)", {"k3": array(3)}, "k3 has 3 numbers, and c 4 channels"),
        ("c = Conv (x, w) y = BN (c, s, k3, m, v)", {"k3": array(3)}, "its parameters are not vectors of one length"),
        ("c = Conv (x, w) y = BN (c, k3, k3, k3, k3)", {"k3": np.ones(3, np.float32)}, "c has 4 channels, and it has 3"),
        ("c = Conv (x, w) y = BN (c, o, o, o, o)", {"o": np.ones(0, np.float32)}, "it has no channels"),
        ("c = Conv (x, w) y = BN (c, i, i, i, i)", {"i": np.ones(4, np.int32)}, "its parameters are not float32, float64"),
        ("c = BN (x, k3, k3, k3, k3) y = Conv <auto_pad = \"SAME_LOWER\", strides = [1]> (c, w)", {"k3": array(3) ** 2}, "pads"),
    ],
)
def test_nodes_that_fit_nothing_stay(nodes: str, constants: dict[str, Array], why: str) -> None:
    """The checker lets them pass; nothing is raised but by who runs them."""
    given = {**CONV, "k": array(4), **constants}
    model = net(nodes.replace("BN", BN), IMAGES.shape, given)
    assert why in fastbn.onnx.check(model)[0].why
    assert operators(fastbn.onnx.fold(model, rewrite=True)).count("Conv") >= 1


def test_numbers_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = net(f"c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, CONV)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:100])
    (row,) = fastbn.onnx.check(path)
    assert re.match(r"the numbers of [sbmvw] cannot be read: ", row.why)
    with pytest.raises(ValueError, match=r"^model: its external data cannot be read: "):
        fastbn.onnx.fold(path)


@pytest.mark.filterwarnings("ignore:The onnxtxt format")
@pytest.mark.parametrize("suffix", [".onnx", ".onnxtxt", ".json", ".textproto"])
def test_every_format_of_onnx_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    onnx.save(net(f"c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, CONV), str(path))
    assert operators(fastbn.onnx.fold(path)) == ["Conv"]


def test_bfloat16() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    constants = {name: value.astype(bfloat16) for name, value in CONV.items()}
    model = net(f"c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, constants, opset=22, dtype="bfloat16")
    result = fastbn.onnx.fold(model)
    assert operators(result) == ["Conv"]
    assert {tensor.data_type for tensor in result.graph.initializer} == {onnx.TensorProto.BFLOAT16}
    wide = {name: value.astype(np.float32) for name, value in constants.items()}
    exact = fastbn.onnx.fold(net(f"c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, wide))
    for ours, theirs in zip(result.graph.initializer, exact.graph.initializer, strict=True):
        near(*(onnx.numpy_helper.to_array(t).astype(np.float32) for t in (ours, theirs)), bound=2**-8)


def test_options_are_checked() -> None:
    model = net(f"y = {BN} (x, s, b, m, v)", IMAGES.shape, norm(3))
    with pytest.raises(TypeError, match="inputs must be a mapping of names to arrays, got list"):
        fastbn.onnx.check(model, inputs=[array(2)])
    with pytest.raises(TypeError, match="rewrite must be True or False, got 'yes'"):
        fastbn.onnx.fold(model, rewrite="yes")
    with pytest.raises(TypeError, match="seconds must be a number"):
        fastbn.onnx.check(model, seconds="1")
    for seconds in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds must be a finite number of at least 0"):
            fastbn.onnx.check(model, seconds=seconds)
    with pytest.raises(ValueError, match="inputs are what the model is run with, and seconds=0 does not run it"):
        fastbn.onnx.check(model, inputs={"x": IMAGES})


@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 6), (2, 3, 5, 4), (1, 3, 2, 3, 4)])
def test_what_cannot_be_folded_is_rewritten(shape: tuple[int, ...], ir: int) -> None:
    x = array(*shape)
    model = net(f"r = Relu (x) n = {BN} (r, s, b, m, v) y = Relu (n)", shape, norm(3), opset=13, ir=ir)
    result = folded(model, x, rewrite=True)
    assert BN not in operators(result)
    assert operators(folded(model, x)) == ["Relu", BN, "Relu"]


def test_float64_is_not_rewritten_as_a_convolution() -> None:
    for shape in ((5, 3), (2, 3, 6), (2, 3, 5, 4), (1, 3, 2, 3, 4)):  # ONNX Runtime has none of it
        model = net(f"r = Relu (x) y = {BN} (r, s, b, m, v)", shape, norm(3, np.float64), dtype="float64")
        assert operators(folded(model, array(*shape, dtype=np.float64), rewrite=True, bound=1e-14)) == ["Relu", "Mul", "Add"]


def test_a_function_called_like_an_operator_takes_nothing() -> None:
    model = net(f"c = Conv (x, w) y = {BN} (c, s, b, m, v)", IMAGES.shape, CONV)
    own = '<domain: "own", opset_import: ["": 17]> Conv (a, w) => (o) { e = Exp (w)  o = ConvTranspose (a, e) }'
    model.functions.append(onnx.parser.parse_function(own))
    model.functions[0].domain = ""
    (row,) = fastbn.onnx.check(model)
    assert row.why == "it stands between function Conv and the output"
    assert operators(fastbn.onnx.fold(model)) == ["Conv", BN]


def test_what_trains_or_has_16_bits_is_not_rewritten() -> None:
    training = net(f"y, n, o = {BN} <training_mode = 1> (x, s, b, m, v)", IMAGES.shape, norm(3))
    half = net(f"y = {BN} (x, s, b, m, v)", IMAGES.shape, norm(3, np.float16), dtype="float16")
    unknown = net(f"y = {BN} (x, s, b, m, v)", IMAGES.shape, norm(3), overridable=("s",))
    for model in (training, half, unknown):
        assert operators(fastbn.onnx.fold(model, rewrite=True)) == [BN]


@st.composite
def problems(draw: Any) -> tuple[Any, Array, str]:
    """A batch norm beside a linear operator, and what may stand between and around them."""
    dtype = draw(st.sampled_from(["float32", "float64", "float16"]))
    opset = draw(st.sampled_from([7, 8, 9, 11, 13, 14, 15, 17, 21, 22]))
    if dtype == "float64":  # ONNX Runtime has no convolution of it, and ONNX' own evaluator is wrong below, and in ConvTranspose
        opset = max(opset, 14)
    op = draw(st.sampled_from(["Conv", "Gemm", "MatMul", "none"] + (["ConvTranspose"] if dtype != "float64" else [])))
    first = draw(st.booleans())  # the linear operator comes first
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    rank = draw(st.sampled_from([3, 4, 5])) if op.startswith("Conv") else 2 if op != "none" else draw(st.sampled_from([2, 3, 4]))
    kernel = (draw(st.sampled_from([1, 2])),) * (rank - 2)
    pads = draw(st.sampled_from(["", f"pads = {[1] * 2 * (rank - 2)}"]))
    bias, added, read, twice = (draw(st.booleans()) for _ in range(4))
    seed = draw(st.integers(0, 9))
    options = [f"group = {groups}", pads, f"strides = {[2] * (rank - 2)}" if draw(st.booleans()) else ""]
    constants = {}
    if op == "Conv":
        constants["w"] = array(outputs, inputs // groups, *kernel, seed=seed)
    elif op == "ConvTranspose":
        constants["w"] = array(inputs, outputs // groups, *kernel, seed=seed)
    elif op != "none":
        transposed = op == "Gemm" and draw(st.booleans())
        constants["w"] = array(*((outputs, inputs) if transposed else (inputs, outputs)), seed=seed)
        options = [f"transB = {int(transposed)}", "alpha = 0.5, beta = 2.0"] if op == "Gemm" else []
    given = "w"
    if op != "none" and (op == "Gemm" or (bias and op != "MatMul")):
        constants["k"], given = array(outputs, seed=seed + 1), "w, k"
    linear = f"{{}} = {op} <{', '.join(filter(None, options))}> ({{}}, {given})".replace("<>", "")
    channels = outputs if first and op != "none" else inputs
    batch_norm = f"{{}} = {BN} <epsilon = 0.001> ({{}}, s, b, m, v)"
    steps = [linear, batch_norm] if first else [batch_norm, linear]
    if op == "none":
        steps = [batch_norm]
    if twice:
        steps.insert(steps.index(batch_norm), batch_norm)
    if added:
        constants["a"] = array(channels, *[1] * (rank - 2), seed=seed + 2)
        steps.insert(draw(st.integers(0, len(steps))) if first else 0, "{} = Add ({}, a)")
        if steps[0] == "{} = Add ({}, a)" and first:
            steps = steps[1:]
    names = ["x", *(f"h{i}" for i in range(len(steps) - 1)), "y"]
    nodes = " ".join(step.format(names[i + 1], names[i]) for i, step in enumerate(steps))
    if read and len(steps) > 1:
        nodes += f" z = Relu ({names[draw(st.integers(1, len(steps) - 1))]})"
    constants |= norm(channels, seed=seed)
    constants = {name: value.astype(dtype) for name, value in constants.items()}
    x = array(2, inputs, *[4] * (rank - 2), seed=seed, dtype=dtype)
    ir = draw(st.sampled_from([3, 8]))
    return net(nodes, x.shape, constants, opset=opset, ir=ir, dtype=dtype, outputs=("y", "z") if " z = " in nodes else ("y",)), x, dtype


@hypothesis.given(problems(), st.booleans())
@hypothesis.settings(max_examples=200)
def test_outputs_are_the_same(problem: tuple[Any, Array, str], rewrite: bool) -> None:
    model, x, dtype = problem
    before = model.SerializeToString()
    report = fastbn.onnx.check(model)
    result = fastbn.onnx.fold(model, rewrite)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    if not rewrite:
        assert operators(result).count(BN) == sum(row.state == "stays" for row in report)
    compute = evaluate if dtype == "float64" else run
    for ours, theirs in zip(compute(result, x), compute(model, x), strict=True):
        near(ours, theirs, {"float64": 1e-12, "float32": 1e-5, "float16": 0.05}[dtype])


def evaluate(model: Any, x: Array) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    results: list[Array] = ReferenceEvaluator(model).run(None, {"x": x})
    return results
