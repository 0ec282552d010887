"""fastbn.torch over several processes: what `gloo` checks in 2 and in 4 of them, and what needs one alone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", minversion="2.10", reason="needs PyTorch 2.10 or newer (pip install 'torch>=2.10')")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs a PyTorch with gloo", allow_module_level=True)

import gloo  # noqa: E402

import bench.sync  # noqa: E402
import fastbn.torch  # noqa: E402
from fastbn.dispatch import select  # noqa: E402

nn = torch.nn


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all checks, once."""
    folder = tmp_path_factory.mktemp("gloo")
    ended = subprocess.run([sys.executable, gloo.__file__, folder], capture_output=True, text=True, timeout=300)
    (folder / "printed").write_text(ended.stdout + ended.stderr)
    return folder


def said(reports: Path, check: str, ranks: int, rank: int) -> str:
    """What a check raised; where it was never called, what was printed and raised before it."""
    report = reports / f"{check} of {ranks}, {rank}"
    if report.exists():
        return report.read_text()
    return "\n".join(path.read_text() for path in sorted(reports.iterdir()) if not path.name.startswith("store"))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("check", gloo.CHECKS)
def test_processes_that_share_a_batch(check: str, ranks: int, reports: Path) -> None:
    for rank in range(ranks):
        assert said(reports, check, ranks, rank) == "", f"rank {rank}"


@pytest.mark.parametrize("check", gloo.DYING)
def test_an_error_and_no_hang(check: str, reports: Path) -> None:
    assert said(reports, check, 2, 0) == ""


def test_alone_it_is_plain_batch_norm() -> None:
    torch.manual_seed(0)
    layer, plain, x = fastbn.torch.SyncBatchNorm(3), nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    assert not isinstance(layer, nn.SyncBatchNorm)
    assert list(layer.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
    again = pickle.loads(pickle.dumps(layer))  # noqa: S301  our own
    assert torch.equal(again(x), layer(x))
    assert "SyncBatchNorm(3, " in repr(layer)
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized"):
        fastbn.torch.Communicator()


def test_converted_layers_keep_what_they_had() -> None:
    called: list[Any] = []
    shared = nn.BatchNorm1d(4)
    twice = nn.Sequential(shared, nn.Linear(4, 4), shared)
    model: Any = nn.Sequential(nn.BatchNorm2d(3, eps=0.5, momentum=None), twice, nn.InstanceNorm2d(3))
    model[0].register_forward_hook(lambda *_: called.append(1))
    model[0].weight.requires_grad_(False)
    model[1].eval()
    old = [model[0], shared]
    state = copy.deepcopy(model.state_dict())
    new = fastbn.torch.SyncBatchNorm.convert_sync_batchnorm(model)
    assert new is model
    assert model[1][0] is model[1][2]
    assert type(model[2]) is nn.InstanceNorm2d
    assert list(model.state_dict()) == list(state)
    for was, now in zip(old, (model[0], model[1][0]), strict=True):
        assert type(now) is fastbn.torch.SyncBatchNorm
        assert now.weight is was.weight
        assert now.running_mean is was.running_mean
        assert (now.eps, now.momentum, now.training) == (was.eps, was.momentum, was.training)
    model[0](torch.randn(2, 3, 4, 4))
    assert called == [1]
    alone = nn.SyncBatchNorm(3)
    assert type(fastbn.torch.convert_sync_batchnorm(alone)) is fastbn.torch.SyncBatchNorm


def test_frozen_layers_stay_frozen_until_they_are_unfrozen() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    fastbn.torch.freeze(model)
    fastbn.torch.convert(model)
    fastbn.torch.convert_sync_batchnorm(model).train()(torch.randn(5, 3))
    assert not model[0].running_mean.any()
    assert fastbn.torch.unfreeze(model) == 1
    assert model[0].weight.requires_grad
    model.train()(torch.randn(5, 3))
    assert model[0].running_mean.all()


class Active(nn.BatchNorm2d):
    def forward(self, input: Any) -> Any:  # noqa: A002  torch's name
        return super().forward(input).relu()


class Doubled(nn.BatchNorm2d):
    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return 2 * found if name == "momentum" else found


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Active(3), "1 cannot be converted: Active has a forward of its own"),
        (Doubled(3), "1 cannot be converted: Doubled has attributes that are computed"),
        (nn.LazyBatchNorm2d(), "never called"),
    ],
)
def test_what_is_no_plain_batch_norm_is_refused(layer: Any, message: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(ValueError, match=message):
        fastbn.torch.convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        fastbn.torch.convert_sync_batchnorm(3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(select("float32").module(), "kernels"), reason="needs compiled kernels")
def test_the_benchmark_prints_its_tables(capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.sync.main(["--times", "3", "--steps", "1", "--batch", "2", "--pixels", "32"]) == 0
    printed = capfd.readouterr().out
    for words in ("2 processes, a thread each", "| 2048 | ", "| 8 x 512 x 4 x 4 | ", "on each process, 20 batch norms: "):
        assert words in printed
