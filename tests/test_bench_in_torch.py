"""What `bench.in_torch` trains and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")
pytest.importorskip("rich")

import fastbn.torch  # noqa: E402
from bench import in_torch, torch_models  # noqa: E402
from fastbn.dispatch import select  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels")


@pytest.mark.parametrize(
    ("name", "millions"),
    [("resnet18", 11.7), ("resnet50", 25.6), ("mobilenet_v2", 3.5), ("densenet121", 8.0), ("convnext_tiny", 28.6)],
)
def test_networks_have_the_parameters_of_their_papers(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = torch_models.MODELS[name](1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", torch_models.MODELS)
def test_networks_train(name: str) -> None:
    model = torch_models.MODELS[name](8)
    y = model(torch_models.example(name, 2, 32))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


FEW = ["--networks", "resnet18", "--width", "8", "--pixels", "32", "--batch", "4", "--turns", "1", "--steps", "1"]


@pytest.mark.parametrize("more", [[], ["--eval"]], ids=["training", "eval"])
def test_each_network_and_order_of_memory_has_a_line(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, path = torch.get_num_threads(), tmp_path / "found.json"
    try:
        assert in_torch.main([*FEW, "--threads", "1", *more, "--json", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert not fastbn.torch.is_enabled()
    printed = capsys.readouterr().out
    sides = in_torch.USUAL[1:]
    assert all(f"| resnet18 | {order} | {side} |" in printed for order in in_torch.FORMATS for side in sides)
    rows = json.loads(path.read_text())
    assert [row["order"] for row in rows] == list(in_torch.FORMATS)
    for row in rows:
        assert set(row["declined"].values()) == {0}
        assert row["norms"]["torch"].keys() == row["norms"]["enable"].keys()
        assert any(shape.startswith("backward") for shape in row["shapes"]["torch"]) == (not more)
        assert all(max(row["norms"][side].values()) > 0 for side in in_torch.USUAL)
        assert all(row["distance"][side] < 1e-2 for side in in_torch.USUAL)


def test_batch_norms_that_only_move_memory_are_a_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_torch.main([*FEW, "--formats", "contiguous", "--sides", "least", "--json", str(tmp_path / "found.json")]) == 0
    assert "- least: batch norms only move" in (printed := capsys.readouterr().out)
    assert "| resnet18 | contiguous | least |" in printed
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["norms"]["least"].keys() == row["norms"]["torch"].keys()
    assert min(row["norms"]["least"].values()) > 0


def test_a_network_that_fails_leaves_others(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found.json"
    orders, threads, measure = list(in_torch.FORMATS), torch.get_num_threads(), in_torch.measure

    def fails_once(network: str, order: str, args: Any) -> in_torch.Row:
        if order == orders[0]:
            raise RuntimeError("not enough memory")
        return measure(network, order, args)

    monkeypatch.setattr(in_torch, "measure", fails_once)
    few = ["--networks", "resnet18", "--width", "8", "--pixels", "32", "--batch", "2", "--turns", "1", "--steps", "1", "--sides", "enable"]
    try:
        assert in_torch.main([*few, "--threads", "1", "--json", str(path)]) == 1
    finally:
        torch.set_num_threads(threads)
    assert f"resnet18, {orders[0]}: not enough memory" in capsys.readouterr().err
    assert [row["order"] for row in json.loads(path.read_text())] == orders[1:]
