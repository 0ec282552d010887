"""What `fastbn.torch.enable()` brings to whole networks: ``python -m bench.in_torch``.

A step of training (or a call in eval) runs by torch alone and with fastbn, in turns; torch's profiler says in other steps
what batch norm takes, in all and for each shape. First-step gradients of both are held against those of float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

import fastbn.torch
from bench import options, text
from bench.progress import each
from bench.timing import Times, summarize
from bench.torch_models import MODELS

FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
OPERATORS = ("aten::native_batch_norm", "aten::native_batch_norm_backward")
SIDES: dict[str, Callable[[], None]] = {"torch": fastbn.torch.disable, "fastbn": fastbn.torch.enable}
PROFILED = 3  # steps of each side, taken twice


class Row(NamedTuple):
    """One network in one order of memory.

    Attributes
    ----------
    step : dict of str to Times
        Of each side.
    shapes : dict of str to dict of str to float
        Milliseconds of batch norm in one step, of each side, by operator and shape.
    distance : dict of str to float
        Of the gradients of the first step from those in float64, relative.
    declined : int
        Calls that fastbn left to torch.
    """

    network: str
    order: str
    step: dict[str, Times]
    shapes: dict[str, dict[str, float]]
    distance: dict[str, float]
    declined: int

    def ratio(self) -> float:
        """How many times as fast a step is with fastbn."""
        return self.step["torch"].median / self.step["fastbn"].median

    def spent(self, side: str) -> float:
        """Milliseconds of batch norm in a step."""
        return sum(self.shapes[side].values())

    def worst(self) -> tuple[float, str]:
        """The smallest ratio among the shapes of both sides, and the shape."""
        ours = self.shapes["fastbn"]
        ratios = [(ms / ours[shape], shape) for shape, ms in self.shapes["torch"].items() if ours.get(shape)]
        return min(ratios, default=(float("nan"), "none"))


def stepper(model: torch.nn.Module, x: torch.Tensor, training: bool) -> Callable[[], None]:
    """A function that trains one step, or evaluates."""
    if not training:
        model.eval()

        def evaluate() -> None:
            with torch.inference_mode():
                model(x)

        return evaluate
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        y = model(x)
        torch.nn.functional.cross_entropy(y, torch.zeros_like(y[:, 0], dtype=torch.long)).backward()
        optimizer.step()

    return train


def profile(step: Callable[[], None], steps: int) -> dict[str, float]:
    """Milliseconds of batch norm in one step, by operator and shape of x."""
    with torch.profiler.profile(record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as found:
        for _ in range(steps):
            step()
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        if event.key in OPERATORS:
            shape = event.input_shapes[event.key == OPERATORS[1]]
            way = "backward" if event.key == OPERATORS[1] else "forward"
            spent[f"{way} {'x'.join(map(str, shape))}"] += event.cpu_time_total / 1000 / steps
    return dict(spent)


def gradients(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gradients of a copy's first step, as one vector."""
    twin = copy.deepcopy(model).train().to(x.dtype)
    y = twin(x)
    torch.nn.functional.cross_entropy(y, torch.zeros_like(y[:, 0], dtype=torch.long)).backward()
    return torch.cat([p.grad.double().flatten() for p in twin.parameters() if p.grad is not None])


def measure(network: str, order: str, args: argparse.Namespace) -> Row:
    """Time one network, both sides in turns."""
    torch.manual_seed(0)
    model = MODELS[network](args.width).to(memory_format=FORMATS[order])
    x = torch.randn(args.batch, 3, args.pixels, args.pixels).contiguous(memory_format=FORMATS[order])
    try:
        fastbn.torch.disable()
        exact = gradients(model, x.double())
        distance = {}
        for side, choose in SIDES.items():
            choose()
            distance[side] = float((gradients(model, x) - exact).norm() / exact.norm())
        step = stepper(model, x, not args.eval)
        samples: dict[str, list[float]] = {side: [] for side in SIDES}
        fastbn.torch.report(reset=True)
        for turn in range(args.turns + 1):
            for side, choose in SIDES.items():
                choose()
                step()  # the first one after a change finds the other's data in the caches
                start = perf_counter()
                for _ in range(args.steps):
                    step()
                if turn:  # before, everything is new
                    samples[side].append((perf_counter() - start) / args.steps)
        declined = sum(fastbn.torch.report().declined.values())
        shapes: dict[str, dict[str, float]] = {}
        for _ in range(2):
            for side, choose in SIDES.items():
                choose()
                step()
                again = profile(step, PROFILED)
                shapes[side] = {shape: min(ms, shapes.get(side, again).get(shape, ms)) for shape, ms in again.items()}
    finally:
        fastbn.torch.disable()
    return Row(network, order, {side: summarize(times) for side, times in samples.items()}, shapes, distance, declined)


def parts(rows: Sequence[Row], args: argparse.Namespace) -> list[text.Part]:
    """The report."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    what = "eval" if args.eval else "training step"
    head = f"# fastbn in PyTorch {torch.__version__}: {what}, batch {args.batch}, {args.pixels} pixels"
    facts = [
        f"- {torch.get_num_threads()} threads, load {load:.1f}; {args.turns} turns of {args.steps} steps of each side, medians",
        "- ratios above 1: faster with fastbn; batch norm by torch's profiler, the best of two times three steps",
        "- distance: of the first step's gradients from float64, with fastbn over without",
    ]
    header = ["network", "memory", "torch ms", "fastbn ms", "step ratio", "spread", "bn torch ms", "bn ratio", "worst", "shape"]
    header += ["distance", "declined"]
    lines = []
    for row in rows:
        spent = row.spent("fastbn")
        bn = row.spent("torch") / spent if spent else float("nan")
        ratio, shape = row.worst()
        spread = max(times.spread for times in row.step.values())
        both = (row.step["torch"].median * 1000, row.step["fastbn"].median * 1000)
        away = row.distance["fastbn"] / row.distance["torch"]
        lines.append((row.network, row.order, *both, row.ratio(), spread, row.spent("torch"), bn, ratio, shape, away, row.declined))
    return [head, "\n".join(facts), text.Table(header, lines, ("spread", "declined", "distance"))]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.in_torch", description="Train whole networks by PyTorch, without fastbn and with it.")
    add = parser.add_argument
    add("--networks", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"{', '.join(MODELS)} (default: all)")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="order of memory (default: both)")
    add("--batch", type=options.whole(1), default=8, help="(default: %(default)s)")
    add("--pixels", type=options.whole(32), default=128, help="height and width (default: %(default)s)")
    add("--width", type=options.whole(1), default=1, help="divide all channels by this (default: %(default)s)")
    add("--threads", type=options.whole(1), default=torch.get_num_threads(), help="(default: %(default)s)")
    add("--turns", type=options.whole(1), default=10, help="of each side (default: %(default)s)")
    add("--steps", type=options.whole(1), default=2, help="of a turn (default: %(default)s)")
    add("--eval", action="store_true", help="inference instead of training")
    add("--json", type=Path, metavar="PATH", help="write all numbers, those of each shape too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    items = list(product(args.networks, args.formats))
    rows, interrupted = each(items, ", ".join, lambda item: [measure(*item, args)])
    text.show(parts(rows, args))
    if args.json:
        args.json.write_text(json.dumps([as_json(row) for row in rows], indent=1))
    return options.INTERRUPTED if interrupted else 0


def as_json(row: Row) -> dict[str, Any]:
    """A row for a file."""
    return row._asdict() | {"step": {side: times._asdict() for side, times in row.step.items()}}


if __name__ == "__main__":
    sys.exit(main())
