"""What a batch norm over several processes costs: ``python -m bench.sync``.

Processes of gloo on this machine, a thread each. Printed are the latencies of the two messages of a layer by their size, of
a layer's forward and backward beside a plain one's, and a ResNet's step with both, in turns.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist

import fastbn.torch
from bench.torch_models import MODELS

CHANNELS = (64, 256, 1024, 2048)
SHAPES = ((8, 64, 32, 32), (8, 256, 8, 8), (8, 512, 4, 4))


def in_turns(calls: dict[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Microseconds of each, the median; every call begins when all processes are there."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(times + 2):
        for name, call in calls.items():
            dist.barrier()
            start = perf_counter()
            call()
            if i >= 2:
                taken[name].append(1e6 * (perf_counter() - start))
    return {name: median(values) for name, values in taken.items()}


def step(layer: torch.nn.Module, shape: tuple[int, ...]) -> Callable[[], object]:
    """A forward and a backward."""
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    return lambda: layer(x).backward(dy)


def training(model: torch.nn.Module, batch: int, pixels: int) -> Callable[[], object]:
    """A step without an optimizer."""
    x = torch.randn(batch, 3, pixels, pixels)
    return lambda: model(x).sum().backward()


def process(rank: int, file: str, args: argparse.Namespace) -> None:
    """What each process measures; one prints."""
    torch.set_num_threads(1)
    store = dist.FileStore(file, args.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.processes, timeout=timedelta(seconds=300))
    say = print if rank == 0 else lambda *_, **__: None
    say(f"{args.processes} processes, a thread each\n\n| channels | all_gather us | all_reduce us |\n|---:|---:|---:|")
    messages = fastbn.torch.Communicator()
    for channels in CHANNELS:
        up, back = np.zeros(2 * channels + 1), np.zeros((2, channels))
        found = in_turns({"up": lambda a=up: messages.all_gather(a), "back": lambda a=back: messages.all_reduce(a)}, args.times)
        say(f"| {channels} | {found['up']:.0f} | {found['back']:.0f} |", flush=True)
    say("\n| forward and backward | plain us | over processes us | more |\n|---|---:|---:|---:|")
    fastbn.torch.enable()
    for shape in SHAPES:
        layers = {"plain": torch.nn.BatchNorm2d(shape[1]), "over": fastbn.torch.SyncBatchNorm(shape[1])}
        found = in_turns({name: step(layer, shape) for name, layer in layers.items()}, args.times)
        more = found["over"] - found["plain"]
        say(f"| {' x '.join(map(str, shape))} | {found['plain']:.0f} | {found['over']:.0f} | {more:.0f} |", flush=True)
    plain = MODELS[args.network](1)
    over = fastbn.torch.convert_sync_batchnorm(copy.deepcopy(plain))
    count = sum(isinstance(layer, fastbn.torch.SyncBatchNorm) for layer in over.modules())
    steps = {name: training(model, args.batch, args.pixels) for name, model in (("plain", plain), ("over", over))}
    found = in_turns(steps, args.steps)
    more = found["over"] - found["plain"]
    x = f"{args.batch} x 3 x {args.pixels} x {args.pixels}"
    say(f"\n{args.network}, {x} on each process, {count} batch norms: {found['plain'] / 1e3:.0f} ms plain, ", end="")
    say(f"{found['over'] / 1e3:.0f} ms over processes, of which the difference is {100 * more / found['over']:.1f} %")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes."""
    parser = argparse.ArgumentParser(prog="python -m bench.sync", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--times", type=int, default=100, help="calls of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=7, help="of the network (default: %(default)s)")
    parser.add_argument("--network", choices=MODELS, default="resnet18", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images on each process (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=128, help="height and width (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (str(Path(folder) / "store"), args), nprocs=args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
