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

from bench import options

if __name__ == "__main__":
    options.require("bench.sync", "torch")

import torch
import torch.distributed as dist

import fastbn.torch
from bench.torch_models import MODELS

CHANNELS = (64, 256, 1024, 2048)
SHAPES = ((8, 64, 32, 32), (8, 256, 8, 8), (8, 512, 4, 4))


def compute(seconds: float) -> None:
    """Keep the processor busy, as a network between two layers does: what waits for a message has gone to sleep then."""
    end = perf_counter() + seconds
    while perf_counter() < end:
        pass


def in_turns(calls: dict[str, Callable[[], object]], times: int, before: float = 0.0) -> dict[str, float]:
    """Microseconds of each, the median; every call begins when all processes are there and have computed for so many seconds."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(times + 2):
        for name, call in calls.items():
            dist.barrier()
            compute(before)
            start = perf_counter()
            call()
            if i >= 2:
                taken[name].append(1e6 * (perf_counter() - start))
    return {name: median(values) for name, values in taken.items()}


class Messages:
    """How long a process has been in messages, waiting for the others to come to theirs included."""

    def __init__(self) -> None:
        self.taken: list[float] = []
        for name in ("all_gather", "all_reduce"):
            setattr(fastbn.torch.Communicator, name, self.timed(getattr(fastbn.torch.Communicator, name)))

    def timed(self, method: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        """The same method, with a clock."""

        def call(communicator: fastbn.torch.Communicator, array: np.ndarray) -> np.ndarray:
            start = perf_counter()
            found = method(communicator, array)
            self.taken.append(perf_counter() - start)
            return found

        return call


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
    say(f"{args.processes} processes, a thread each\n")
    say("| channels | all_gather us | all_reduce us | after 3 ms of computing: all_gather | all_reduce |")
    say("|---:|---:|---:|---:|---:|")
    messages = fastbn.torch.Communicator()
    for channels in CHANNELS:
        up, back = np.zeros(2 * channels + 1), np.zeros((2, channels))
        calls = {"up": lambda a=up: messages.all_gather(a), "back": lambda a=back: messages.all_reduce(a)}
        found = [f"{t:.0f}" for before in (0.0, 3e-3) for t in in_turns(calls, args.times, before).values()]
        say(f"| {channels} | {' | '.join(found)} |", flush=True)
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
    clock = Messages()
    found = in_turns(steps, args.steps)
    each = len(clock.taken) // (args.steps + 2)
    waited = 1e6 * median(sum(clock.taken[i : i + each]) for i in range(2 * each, len(clock.taken), each))
    x = f"{args.batch} x 3 x {args.pixels} x {args.pixels}"
    say(f"\n{args.network}, {x} on each process, {count} batch norms: {found['plain'] / 1e3:.0f} ms plain, ", end="")
    share = 100 * waited / found["over"]
    say(f"{found['over'] / 1e3:.0f} ms over processes, of which {waited / 1e3:.0f} ms ({share:.0f} %) in {each} messages")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes."""
    parser = argparse.ArgumentParser(prog="python -m bench.sync", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=options.whole(1), default=2, help="(default: %(default)s)")
    parser.add_argument("--times", type=options.whole(1), default=100, help="calls of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=options.whole(1), default=7, help="of the network (default: %(default)s)")
    parser.add_argument("--network", choices=MODELS, default="resnet18", help="(default: %(default)s)")
    parser.add_argument("--batch", type=options.whole(1), default=8, help="images on each process (default: %(default)s)")
    parser.add_argument("--pixels", type=options.whole(32), default=128, help="height and width (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (str(Path(folder) / "store"), args), nprocs=args.processes)
    return 0


if __name__ == "__main__":
    sys.exit(options.run(main))
