"""What fastbn brings to whole networks in PyTorch: ``python -m bench.in_torch``.

A step of training (or a call in eval) runs by torch alone, with `fastbn.torch.enable()`, converted, and both, in turns; if
asked for, compiled by torch, with batch norms in place, and with batch norms that only move memory, too: no kernel that leaves
memory to torch is much faster than these are. torch's profiler says in other steps what batch norm takes,
and what it takes with the sums and activations after it, in all and for each shape. First-step gradients are held against
those of float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

from bench import options

if __name__ == "__main__":
    options.require("bench.in_torch", "torch", "rich")

import torch

import fastbn.torch
from bench import text
from bench.progress import each
from bench.timing import Times, summarize
from bench.torch_models import MODELS, example

FORMATS = {"contiguous": 2 * (torch.contiguous_format,), "channels last": (torch.channels_last, torch.channels_last_3d)}  # images, volumes
NORMS = {  # operator: forward or backward, and which of its inputs is x
    "aten::native_batch_norm": ("forward", 0), "aten::native_batch_norm_backward": ("backward", 1),
    "fastbn::batch_norm_forward": ("forward", 0), "fastbn::batch_norm_backward": ("backward", 1),
    "aten::native_layer_norm": ("forward", 0), "aten::native_layer_norm_backward": ("backward", 1),
    "aten::native_group_norm": ("forward", 0), "aten::native_group_norm_backward": ("backward", 1),
}  # fmt: skip
ACTIVATIONS = ("hardtanh", "leaky_relu", "silu", "hardswish")
LEAST = {"aten::clone": ("forward", 0), "aten::maximum": ("backward", 0)}
AFTER = {f"aten::{name}{end}": ("forward", 0) for name in ("add", "relu", *ACTIVATIONS) for end in ("", "_")}
AFTER |= {f"aten::{name}_backward": ("backward", 0) for name in ("threshold", *ACTIVATIONS)}
PROFILED = 3  # steps of each side, taken twice


class Side(NamedTuple):
    """A way to run a network.

    Attributes
    ----------
    enabled : bool
    prepare : callable
        What becomes of a copy of the network.
    """

    enabled: bool
    prepare: Callable[[torch.nn.Module], object]


def _converted(model: torch.nn.Module) -> torch.nn.Module:
    fastbn.torch.convert(model)
    return model


class _Least(torch.autograd.Function):
    """What reads and writes the bytes that a batch norm must, by operators that nothing else in a network calls."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return torch.maximum(dy, *ctx.saved_tensors)


def _least(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.forward = _Least.apply  # type: ignore[assignment]
    return model


def _in_place(model: torch.nn.Module) -> torch.nn.Module:
    fastbn.torch.convert(model, inplace_abn=True)
    return model


SIDES: dict[str, Side] = {
    "torch": Side(False, lambda model: model),
    "enable": Side(True, lambda model: model),
    "convert": Side(False, _converted),
    "both": Side(True, _converted),
    "inplace_abn": Side(False, _in_place),
    "compile": Side(False, torch.compile),
    "least": Side(False, _least),
}
USUAL = ("torch", "enable", "convert", "both")


class Row(NamedTuple):
    """One network in one order of memory.

    Attributes
    ----------
    step : dict of str to Times
        Of each side.
    norms, shapes : dict of str to dict of str to float
        Milliseconds of batch norm in one step, and of batch norm, sums and activations, of each side, by direction and shape.
    distance : dict of str to float
        Of the gradients of the first step from those in float64, relative.
    declined : dict of str to int
        Calls that fastbn left to torch.
    """

    network: str
    order: str
    step: dict[str, Times]
    norms: dict[str, dict[str, float]]
    shapes: dict[str, dict[str, float]]
    distance: dict[str, float]
    declined: dict[str, int]

    def ratio(self, side: str) -> float:
        """How many times as fast a step is as torch's."""
        return self.step["torch"].median / self.step[side].median

    def gains(self, side: str) -> tuple[float, float, float, str]:
        """What batch norm takes of torch's step in milliseconds, how many times as fast it is, and its slowest shape.

        Where it runs with what follows it, all of that is meant.
        """
        found = self.norms if side in ("enable", "least") else self.shapes
        whole, ours = found["torch"], found[side]
        spent = sum(ours.values())
        if side == "compile" or not spent:
            return sum(whole.values()), float("nan"), float("nan"), "-"
        worst = min(((ms / ours[shape], shape) for shape, ms in whole.items() if ours.get(shape)), default=(float("nan"), "none"))
        return sum(whole.values()), sum(whole.values()) / spent, *worst


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


def profile(step: Callable[[], None], steps: int, norms_are: Mapping[str, tuple[str, int]]) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of batch norm in one step by direction and shape of x, and of all that may run with it."""
    with torch.profiler.profile(record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as found:
        for _ in range(steps):
            step()
    norms: dict[str, float] = defaultdict(float)
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages(group_by_input_shape=True):
        way, which = norms_are.get(event.key) or AFTER.get(event.key, ("", 0))
        shape = event.input_shapes[which] if way else ()
        if len(shape) < 2:
            continue
        for table in (norms, spent) if event.key in norms_are else (spent,):
            table[f"{way} {'x'.join(map(str, shape))}"] += event.cpu_time_total / 1000 / steps
    seen = {shape.split()[1] for shape in norms}  # sums of others are of weights
    return dict(norms), {shape: ms for shape, ms in spent.items() if shape.split()[1] in seen}


def gradients(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Gradients of a copy's first step, as one vector."""
    twin = copy.deepcopy(model).train().to(x.dtype)
    y = twin(x)
    torch.nn.functional.cross_entropy(y, torch.zeros_like(y[:, 0], dtype=torch.long)).backward()
    return torch.cat([p.grad.double().flatten() for p in twin.parameters() if p.grad is not None])


def _smaller(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {shape: min(ms, b.get(shape, ms)) for shape, ms in a.items()}


def measure(network: str, order: str, args: argparse.Namespace) -> Row:
    """Time one network, all sides in turns."""
    torch.manual_seed(0)
    x = example(network, args.batch, args.pixels)
    form = FORMATS[order][x.dim() - 4]
    model, x = MODELS[network](args.width).to(memory_format=form), x.contiguous(memory_format=form)
    steps: dict[str, Callable[[], None]] = {}
    distance, declined = {}, {}

    def choose(side: str) -> None:
        (fastbn.torch.enable if SIDES[side].enabled else fastbn.torch.disable)()

    try:
        fastbn.torch.disable()
        exact = gradients(model, x.double())
        for side in args.sides:
            choose(side)
            twin: Any = SIDES[side].prepare(copy.deepcopy(model))
            steps[side] = stepper(twin, x, not args.eval)
            if side not in ("compile", "least"):  # the one would begin anew, the other computes something else
                fastbn.torch.report(reset=True)
                distance[side] = float((gradients(twin, x) - exact).norm() / exact.norm())
                declined[side] = sum(fastbn.torch.report().declined.values())
        samples: dict[str, list[float]] = {side: [] for side in args.sides}
        for turn in range(args.turns + 1):
            first = turn % len(args.sides)
            for side in (*args.sides[first:], *args.sides[:first]):
                choose(side)
                steps[side]()  # the first one after a change finds the other's data in the caches
                start = perf_counter()
                for _ in range(args.steps):
                    steps[side]()
                if turn:  # before, everything is new
                    samples[side].append((perf_counter() - start) / args.steps)
        norms: dict[str, dict[str, float]] = {}
        shapes: dict[str, dict[str, float]] = {}
        for _ in range(2):
            for side in args.sides:
                choose(side)
                steps[side]()
                again = profile(steps[side], PROFILED, LEAST if side == "least" else NORMS)
                norms[side] = _smaller(again[0], norms.get(side, {}))
                shapes[side] = _smaller(again[1], shapes.get(side, {}))
    finally:
        fastbn.torch.disable()
    return Row(network, order, {side: summarize(times) for side, times in samples.items()}, norms, shapes, distance, declined)


def parts(rows: Sequence[Row], args: argparse.Namespace) -> list[text.Part]:
    """The report."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    what = "eval" if args.eval else "training step"
    head = f"# fastbn in PyTorch {torch.__version__}: {what}, batch {args.batch}, {args.pixels} pixels"
    facts = [
        f"- {torch.get_num_threads()} threads, load {load:.1f}; {args.turns} turns of {args.steps} steps of each side, medians",
        "- ratios above 1: faster than torch; by torch's profiler, the best of two times three steps: batch norm where fastbn is "
        "enabled, and with the sums and activations after it where a network was converted",
        "- distance: of the first step's gradients from float64, over torch's",
        *["- least: batch norms only move the bytes that they must, by torch's operators"] * ("least" in args.sides),
    ]
    header = ["network", "memory", "side", "torch ms", "step ratio", "spread", "bn torch ms", "bn ratio", "worst", "shape", "distance"]
    header += ["declined"]
    lines = []
    for row in rows:
        for side in args.sides[1:]:
            times = row.step["torch"], row.step[side]
            away = row.distance.get(side, float("nan")) / row.distance["torch"]
            numbers = times[0].median * 1000, row.ratio(side), max(t.spread for t in times), *row.gains(side)
            lines.append((row.network, row.order, side, *numbers, away, row.declined.get(side, 0)))
    return [head, "\n".join(facts), text.Table(header, lines, ("spread", "declined", "distance"))]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.in_torch", description="Train whole networks by PyTorch, without fastbn and with it.")
    add = parser.add_argument
    add("--networks", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=f"{', '.join(MODELS)} (default: all)")
    add("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="order of memory (default: both)")
    add("--batch", type=options.whole(1), default=8, help="(default: %(default)s)")
    add("--pixels", type=options.whole(32), default=128, help="height and width; of volumes half (default: %(default)s)")
    add("--width", type=options.whole(1), default=1, help="divide all channels by this (default: %(default)s)")
    add("--threads", type=options.threads, default=torch.get_num_threads(), help="(default: %(default)s)")
    add("--turns", type=options.whole(1), default=10, help="of each side (default: %(default)s)")
    add("--steps", type=options.whole(1), default=2, help="of a turn (default: %(default)s)")
    add("--sides", nargs="+", choices=SIDES, default=list(USUAL), metavar="NAME", help=f"{', '.join(SIDES)} (default: the first four)")
    add("--eval", action="store_true", help="inference instead of training")
    add("--json", type=options.output_file, metavar="PATH", help="write all numbers, those of each shape too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args = _arguments(argv)
    args.sides = ["torch", *(side for side in args.sides if side != "torch")]
    torch.set_num_threads(args.threads)
    failed: list[str] = []

    def attempt(item: tuple[str, str]) -> Iterator[Row]:
        try:
            yield measure(*item, args)
        except (MemoryError, RuntimeError) as error:  # a network too large for this machine is no reason to lose the others
            failed.append(f"{', '.join(item)}: {error}")

    rows, interrupted = each(list(product(args.networks, args.formats)), ", ".join, attempt)
    text.show(parts(rows, args))
    written = args.json is None or options.write({args.json: json.dumps([as_json(row) for row in rows], indent=1)})
    print("".join(f"{what}\n" for what in failed), end="", file=sys.stderr)
    return options.INTERRUPTED if interrupted else int(bool(failed) or not written)


def as_json(row: Row) -> dict[str, Any]:
    """A row for a file."""
    return row._asdict() | {"step": {side: times._asdict() for side, times in row.step.items()}}


if __name__ == "__main__":
    sys.exit(options.run(main))
