"""Checks of fastbn.torch over processes of gloo, run as a program: it imports torch once and forks as many processes as are asked for.

A check is a function of the rank and the number of ranks, which every process calls. What one raises is written to a
folder, in a file for each check and rank; `test_torch_sync` reads them.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import cuts

import fastbn.torch
from fastbn import sync
from fastbn.torch import SyncBatchNorm, convert_sync_batchnorm

nn, F = torch.nn, torch.nn.functional
Check = Callable[[int, int], None]
CHECKS: dict[str, Check] = {}
DYING: dict[str, Check] = {}  # each in a group of its own, because it ends with a process that is gone


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def dying(function: Check) -> Check:
    DYING[function.__name__] = function
    return function


SHAPES = {
    "NC": (9, 5), "NCL": (9, 5, 4), "NCHW": (9, 5, 4, 3), "channels last": (9, 5, 4, 3), "NCDHW": (9, 4, 2, 3, 2), "strided": (9, 5, 4, 3)
}  # fmt: skip


def arranged(x: Any, order: str) -> Any:
    if order == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0] if order == "strided" else x


def everybody(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def near(actual: Any, truth: Any, scale: float = 1.0) -> None:
    """Within 1e-6 of a float64 truth; 1e-12 for float64, a last place more for 16 bits."""
    assert actual.shape == truth.shape
    allowed = {torch.float64: 1e-12, torch.float32: 1e-6}.get(actual.dtype, 2e-6)
    bound = allowed * truth.abs().clamp(min=scale)
    if actual.dtype in (torch.bfloat16, torch.float16):
        bound = bound + truth.abs() * 2 ** -(8 if actual.dtype == torch.bfloat16 else 11) * 1.01
    assert ((actual.double() - truth).abs() <= bound).all(), (actual.double() - truth).abs().max()


def layer_and_twin(channels: int, dtype: Any, **options: Any) -> tuple[Any, Any]:
    """A synchronized layer, and what computes the truth on the joined batch, in float64."""
    torch.manual_seed(1)
    layer = SyncBatchNorm(channels, dtype=dtype, **options)
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    plain = nn.BatchNorm1d(channels, dtype=torch.float64, **options)
    plain.load_state_dict(layer.state_dict())
    plain._check_input_dim = lambda x: None
    return layer, plain


def compare(rank: int, ranks: int, order: str, dtype: Any, parameters: Any, **options: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(SHAPES[order], generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    x = (x * 2 + 5).to(dtype)
    layer, plain = layer_and_twin(x.shape[1], parameters, **options)
    cut = cuts(9, ranks)[rank]
    for step in range(2):
        whole = x.double().clone().requires_grad_()
        truth = plain(whole)
        plain.zero_grad()
        truth.backward(dy.double())
        own = arranged(x[cut], order).detach().requires_grad_()
        y = layer(own)
        layer.zero_grad()
        y.backward(arranged(dy[cut], order))
        assert y.dtype == dtype
        assert own.grad is not None
        assert own.untyped_storage().resizable()
        if order != "strided" and own.numel():
            assert y.stride() == own.stride() == own.grad.stride()
        near(y.detach(), truth.detach()[cut])
        near(own.grad, whole.grad[cut])
        if layer.affine:
            for name in ("weight", "bias"):
                grad = getattr(layer, name).grad
                assert grad.dtype == parameters
                if own.numel() == 0:
                    assert not grad.any()
                parts = everybody(grad.double())
                if parameters.itemsize > 2:
                    near(torch.stack(parts).sum(0).to(parameters), getattr(plain, name).grad, np.sqrt(x.numel() / x.shape[1]))
        if layer.track_running_stats:
            assert int(layer.num_batches_tracked) == step + 1
            for name in ("running_mean", "running_var"):
                own_bits = getattr(layer, name).view(torch.uint8).numpy().tobytes()
                assert set(everybody(own_bits)) == {own_bits}
                near(getattr(layer, name), getattr(plain, name)) if parameters.itemsize > 2 else None
    if not layer.track_running_stats:
        return
    before = copy.deepcopy(layer.state_dict())
    layer.eval(), plain.eval()
    near(layer(arranged(x[cut], order)).detach(), plain(x.double()).detach()[cut], 10.0 if parameters == dtype else 1.0)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@check
def float32_in_every_order_of_memory(rank: int, ranks: int) -> None:
    for order in SHAPES:
        compare(rank, ranks, order, torch.float32, torch.float32)


@check
def float64(rank: int, ranks: int) -> None:
    for order in ("NC", "channels last"):
        compare(rank, ranks, order, torch.float64, torch.float64)


@check
def sixteen_bits_with_parameters_of_32(rank: int, ranks: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for order in ("NCHW", "channels last"):
            compare(rank, ranks, order, dtype, torch.float32)


@check
def bfloat16_without_ml_dtypes(rank: int, ranks: int) -> None:
    known, fastbn.torch.arrays.resolve = fastbn.torch.arrays.resolve, _unknown
    try:
        compare(rank, ranks, "channels last", torch.bfloat16, torch.float32)
    finally:
        fastbn.torch.arrays.resolve = known


def _unknown(dtype: Any) -> Any:
    if dtype == "bfloat16":
        raise TypeError("not installed")
    return np.dtype(dtype)


@check
def options(rank: int, ranks: int) -> None:
    for given in ({"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}):
        compare(rank, ranks, "NCHW", torch.float32, torch.float32, **given)


@check
def batches_are_counted_without_running_statistics(rank: int, ranks: int) -> None:
    layer = SyncBatchNorm(3)
    layer.running_mean = layer.running_var = None
    layer(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 1


@check
def parameters_of_16_bits(rank: int, ranks: int) -> None:
    layer = SyncBatchNorm(4, dtype=torch.bfloat16)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(rank)).bfloat16()
    layer(x).float().square().sum().backward()
    assert layer.weight.grad.dtype == layer.running_var.dtype == torch.bfloat16
    assert set(everybody(layer.running_var.tolist()[0])) == {layer.running_var.tolist()[0]}


@check
def groups_of_processes(rank: int, ranks: int) -> None:
    groups = [dist.new_group([2 * i, 2 * i + 1]) for i in range(ranks // 2)]
    mine = rank // 2
    layer = SyncBatchNorm(3, process_group=groups[mine])
    x = torch.randn(ranks, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    layer(x[rank : rank + 1])
    near(layer.running_mean, 0.1 * x[2 * mine : 2 * mine + 2].double().mean(0))
    twin = copy.deepcopy(nn.Sequential(layer))[0]
    assert twin.process_group is layer.process_group
    assert twin.weight is not layer.weight
    twin(x[rank : rank + 1])
    dist.barrier()
    other = groups[(mine + 1) % len(groups)]
    if len(groups) > 1:
        with pytest.raises(RuntimeError, match="does not belong to the process group"):
            SyncBatchNorm(3, process_group=other)(x)


@check
def two_messages_a_step(rank: int, ranks: int) -> None:
    model = nn.Sequential(SyncBatchNorm(64), nn.ReLU(), SyncBatchNorm(64))
    x = torch.randn(2, 64, 4, 4, requires_grad=True)
    model(x)
    sent: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda out, t, **k: (sent.append(("all_gather", t.numel() * t.itemsize)), gather(out, t, **k))
    dist.all_reduce = lambda t, **k: (sent.append(("all_reduce", t.numel() * t.itemsize)), reduce(t, **k))
    try:
        model(x).sum().backward()
        assert sent == [("all_gather", 8 * (2 * 64 + 1))] * 2 + [("all_reduce", 8 * 2 * 64), ("all_reduce", 8 * 2 * 64)]
        sent.clear()
        model.eval()(x).sum().backward()
        model.train()
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.synchronize = False
            model(x)
        assert sent == []
        for layer in (model[0], model[2]):
            layer.synchronize = True
        model(x.detach()).sum().backward()  # without a gradient of x, the backward of the first layer asks nobody
        assert [kind for kind, _ in sent] == ["all_gather", "all_gather", "all_reduce"]
        sent.clear()
        copy.deepcopy(model[0])(x)
        assert sent == [("all_gather", 8), ("all_gather", 8 * (2 * 64 + 1))]  # a new layer asks once whether all agree
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip


@check
def models_train_inside_distributed_data_parallel(rank: int, ranks: int) -> None:
    single, parts = network().double(), network().double()
    names = [name for name, _ in parts.named_parameters()]
    before = {id(p) for p in parts.parameters()}
    assert convert_sync_batchnorm(parts) is parts
    assert {id(p) for p in parts.parameters()} == before
    assert [name for name, _ in parts.named_parameters()] == names
    model = nn.parallel.DistributedDataParallel(parts)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (single, model)]
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(5):
        x, target = torch.randn(4 * ranks, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(4 * ranks) % 3
        x += target[:, None, None, None]
        cut = slice(4 * rank, 4 * rank + 4)
        for m, optimizer, part in ((single, optimizers[0], slice(None)), (model, optimizers[1], cut)):
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x[part]), target[part])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    for (name, a), b in zip(single.state_dict().items(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-9, msg=name)
    assert losses[-2] < losses[0]


@check
def an_empty_process_takes_part_in_distributed_data_parallel(rank: int, ranks: int) -> None:
    model = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(network()))
    x = torch.randn(0 if rank == 1 else 5, 3, 8, 8)
    for _ in range(2):
        model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert set(everybody(float(p.grad.double().sum()))) == {float(p.grad.double().sum())}
    assert set(everybody(model.module[1].running_var.numpy().tobytes())) == {model.module[1].running_var.numpy().tobytes()}


@check
def processes_that_disagree_are_told(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=r"do not agree: in the order of the ranks, they have messages of \[7, 9"):
        SyncBatchNorm(3 if rank == 0 else 4)(torch.randn(4, 3 if rank == 0 else 4))
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3)
    layer(x)
    layer(x.double())
    other = SyncBatchNorm(3)
    with pytest.raises(ValueError, match="an input of another dtype"):
        other(x.double() if rank == 0 else x)
    other(x)
    assert int(other.num_batches_tracked) == 1


@check
def compiled_models_take_part(rank: int, ranks: int) -> None:
    if ranks > 2:  # the compiler takes seconds
        return
    model = convert_sync_batchnorm(network())
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    grads = []
    for run in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append(model[0].weight.grad.clone())
    assert torch.equal(*grads)
    assert int(model[1].num_batches_tracked) == 2


@check
def many_compiled_layers_are_few_graphs(rank: int, ranks: int) -> None:
    """A graph that asked which layers have a communicator was another one after each layer's first call."""
    if ranks > 2:
        return
    torch.compiler.reset()
    layers = convert_sync_batchnorm(nn.ModuleList(nn.BatchNorm1d(3) for _ in range(6)))
    x = torch.randn(5, 3)
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for layer in layers:
            torch.compile(layer, backend="eager")(x)



@check
def arrays_of_numpy(rank: int, ranks: int) -> None:
    x = np.random.default_rng(0).standard_normal((9, 4))
    bn, whole = fastbn.BatchNorm1d(4, dtype="float64", communicator=fastbn.torch.Communicator()), fastbn.BatchNorm1d(4, dtype="float64")
    cut = cuts(9, ranks)[rank]
    np.testing.assert_allclose(bn(x[cut]), whole(x)[cut], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(bn.backward(x[cut] ** 2).dx, whole.backward(x**2).dx[cut], rtol=1e-11, atol=1e-11)
    assert set(everybody(bn.running_var.tobytes())) == {bn.running_var.tobytes()}
    stats = sync.merge([fastbn.batch_norm_stats(x[cut])], fastbn.torch.Communicator())[0]
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-12)


@check
def wrong_inputs_are_refused_by_all(rank: int, ranks: int) -> None:
    layer = SyncBatchNorm(3)
    whole = torch.ones(2, 3, dtype=torch.int32)
    for wrong, message in ((torch.ones(3), "at least 2D"), (torch.ones(2, 4), "input has 4 channels"), (whole, "floating")):
        with pytest.raises(ValueError, match=message):
            layer(wrong)
    assert int(layer.num_batches_tracked) == 0
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.ones(1 if rank == 0 else 0, 3))
    assert int(layer.num_batches_tracked) == 0


@check
def where_values_cannot_be_read_it_says_so(rank: int, ranks: int) -> None:
    model, x = nn.Sequential(SyncBatchNorm(3)), torch.randn(4, 3)
    for call, message in (
        (lambda: torch.func.vmap(model)(x[None]), "not inside of torch.func's transforms"),
        (lambda: torch.jit.trace(model, x), "not while torch.jit traces"),
        (lambda: torch.export.export(model, (x,)), "not while torch.jit traces or torch.export exports|not where torch records operations"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert int(model[0].num_batches_tracked) == 0
    assert torch.export.export(model.eval(), (x,)).module()(x).shape == x.shape


def gone(step: Callable[[], object], seconds: float) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        step()
    assert time.monotonic() - start < seconds


@dying
def a_process_that_ends_in_the_forward(rank: int, ranks: int) -> None:
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    if rank == 1:
        os._exit(0)
    gone(lambda: layer(x), 5)
    assert not layer.running_mean.any()


@dying
def a_process_that_ends_in_the_backward(rank: int, ranks: int) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = SyncBatchNorm(3)(x)
    if rank == 1:
        os._exit(0)
    gone(lambda: y.sum().backward(), 5)
    assert x.grad is None


@dying
def a_process_that_never_calls(rank: int, ranks: int) -> None:
    if rank == 1:
        time.sleep(3)
        os._exit(0)
    gone(lambda: SyncBatchNorm(3)(torch.randn(4, 3)), 2.9)


@contextmanager
def group(rank: int, ranks: int, file: str, seconds: float) -> Iterator[None]:
    store = dist.FileStore(file, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    dist.barrier()  # on a busy machine processes find each other late; only then does time count
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), dist.group.WORLD)
    yield
    dist.destroy_process_group()


def run(folder: Path, rank: int, ranks: int, checks: dict[str, Check], seconds: float) -> None:
    """In a process of its own: run checks, write what they raise."""
    name, code = "the group", 0
    try:
        with group(rank, ranks, str(folder / f"store {ranks} {'-'.join(checks)[:40]}"), seconds):
            for name, function in checks.items():
                function(rank, ranks)
                (folder / f"{name} of {ranks}, {rank}").write_text("")
    except BaseException:
        (folder / f"{name} of {ranks}, {rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    os._exit(code)


def fork(folder: Path, ranks: int, checks: dict[str, Check], seconds: float) -> list[int]:
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            run(folder, rank, ranks, checks, seconds)
        children.append(child)
    return children


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    fastbn.set_num_threads(1)
    children: list[int] = []
    for ranks, checks in ((2, CHECKS), *((2, {name: f}) for name, f in DYING.items()), (4, CHECKS)):
        children += fork(folder, ranks, checks, 2 if checks is not CHECKS else 60)
        if ranks == 2 and checks is not CHECKS:
            continue
        while children:
            os.waitpid(children.pop(), 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
