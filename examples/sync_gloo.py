"""DistributedDataParallel on the CPU with one batch norm over all processes: ``python examples/sync_gloo.py``.

Each process has a few of the digits of a batch. Printed is the accuracy with statistics of the whole batch, and with each
process's own: two images say little about a mean.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastbn.torch


def network() -> nn.Module:
    """A convolution and two linear layers; the same on every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64, bias=False), nn.BatchNorm1d(64),
        nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(synchronized: bool, each: int, steps: int) -> float:
    """Accuracy in percent after training together."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    model = network()
    if synchronized:
        fastbn.torch.convert_sync_batchnorm(model)  # the one line
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(1300, (each * dist.get_world_size(),), generator=generator)
        mine = batch[dist.get_rank() * each :][:each]
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(x[mine]), y[mine]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model.eval()(x[1300:]).argmax(1) == y[1300:]).float().mean() * 100)


def process(rank: int, processes: int, file: str, each: int, steps: int) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    store = dist.FileStore(file, processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(seconds=60))
    for synchronized in (True, False):
        accuracy = train(synchronized, each, steps)
        if rank == 0:
            what = "of the whole batch" if synchronized else "of each process's part"
            print(f"{processes} processes, statistics {what}: accuracy {accuracy:.1f} %", flush=True)
    dist.destroy_process_group()


def main() -> int:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--each", type=int, default=2, help="images of a batch on each process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of training (default: %(default)s)")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    with tempfile.TemporaryDirectory() as folder:
        given = args.processes, str(Path(folder) / "store"), args.each, args.steps
        torch.multiprocessing.spawn(process, given, nprocs=args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
