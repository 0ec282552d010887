"""How much `enable` and `convert` speed up a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbn.checks import number
from fastbn.torch.conversion import convert
from fastbn.torch.graph import check, check_called, copied
from fastbn.torch.override import either, report
from fastbn.torch.parts import NORMS

KINDS = ("aten::native_batch_norm", "aten::native_layer_norm", "aten::native_group_norm", "fastbn::batch_norm")
OPERATORS = {kind + way for kind in KINDS for way in ("", "_forward", "_backward")} | {"aten::rms_norm"} | {
    f"fastbn::{kind}{way}" for kind in NORMS for way in ("_forward", "_backward")
}  # fmt: skip
SIDES = ("torch", "fastbn")
TURN = 3  # steps of one side in a row, of which the first does not count: it finds the other's data in the caches
LEAST = 3  # turns of each side
FEW = 20  # steps, below which nothing is said of the difference
SPREAD = 0.5  # of the steps of one side, above which nothing is, either
PROFILED = 3  # steps


class Benchmark(NamedTuple):
    """What `benchmark` found.

    Attributes
    ----------
    step : dict of str to float
        Milliseconds of a step by "torch" and by "fastbn": the median.
    batch_norm : dict of str to float
        Milliseconds of a step that batch norm takes: its share according to torch's profiler, times the median. It includes
        instance, group, layer and RMS norm, except the backward of torch's own RMS norm, which consists of sums and products.
    noise : float
        Half the interquartile range of a step over its median, of the noisier side.
    steps : int
        Number of timed steps of each side.
    declined : dict
        (operation, reason) -> number of calls in a step that fastbn left to torch.
    """

    step: dict[str, float]
    batch_norm: dict[str, float]
    noise: float
    steps: int
    declined: dict[tuple[str, str], float]

    @property
    def ratio(self) -> float:
        """The speedup of a step with fastbn."""
        return self.step["torch"] / self.step["fastbn"]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.batch_norm["torch"]:
            return "no normalization ran on the CPU"
        if self.steps < FEW:
            return f"too few to say more: give it more seconds, for {FEW} steps or more"
        if self.noise > SPREAD:
            return f"times differ by more than {100 * SPREAD:.0f} % from step to step: other programs run, or a step is too short to time"
        if abs(self.ratio - 1) <= self.noise:
            return f"no difference beyond the noise of {100 * self.noise:.0f} %"
        return f"a step is {self.ratio:.2f} times as fast with fastbn" + ("" if self.ratio > 1 else ": leave it to torch")

    def __str__(self) -> str:
        """A line for each side, the verdict, and what was left to torch."""
        lines = [
            f"{side:7} {self.step[side]:9.2f} ms a step, of which normalization {self.batch_norm[side]:8.2f} ms "
            f"({100 * self.batch_norm[side] / self.step[side]:.0f} %)"
            for side in SIDES
        ]
        lines += [f"{self.steps} steps of each: {self.verdict}"]
        lines += [f"{count:g} a step, {operation}, left to torch: {reason}" for (operation, reason), count in self.declined.items()]
        return "\n".join(lines)


def benchmark(model: nn.Module, *inputs: Any, seconds: float = 10.0, fuse: bool = False, **named: Any) -> Benchmark:
    """Time a model without fastbn and with it, in turns.

    It runs copies of the model on copies of the inputs. In training mode, a step is a forward, and a backward from the mean of the
    output; in evaluation mode, it is a call without gradients. Meanwhile, batch norm in other threads switches, too.

    Parameters
    ----------
    model : Module
    *inputs, **named
        The arguments of the model.
    seconds : float
        How long to measure; a few steps are timed in any case.
    fuse : bool
        Also convert the copy that runs with fastbn (`convert`). Then its time of batch norm includes the fused sums and
        activations, so compare the times of the steps.

    Returns
    -------
    Benchmark
        Printed, it shows the times and a verdict.

    Raises
    ------
    TypeError
        If model is not a Module, or seconds is not a number.
    ValueError
        If seconds is negative, if the model has lazy layers that were never called, or if, in training mode, it returns no
        floating-point tensor that requires a gradient.
    RuntimeError
        As `enable`.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> found = fastbn.torch.benchmark(model, torch.randn(2, 3, 8, 8), seconds=0)
    >>> found.steps, found.declined
    (6, {})
    """
    check(model)
    check_called(model)
    seconds = number("seconds", seconds, 0.0)
    twins = {side: copied(model) for side in SIDES}
    if fuse:
        convert(twins["fastbn"])
    steps = {side: _step(twins[side], *_apart((inputs, named))) for side in SIDES}
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    spent: dict[str, float] = {}
    with torch.random.fork_rng(devices=()), either() as choose:
        for side in SIDES:
            choose(side == "fastbn")
            before = report().declined
            steps[side]()  # everything is new
            declined = {key: float(count - before.get(key, 0)) for key, count in report().declined.items() if count != before.get(key, 0)}
        end = perf_counter() + seconds
        while len(samples["fastbn"]) < LEAST * (TURN - 1) or perf_counter() < end:
            for side in SIDES:
                choose(side == "fastbn")
                samples[side] += list(_times(steps[side], TURN))[1:]
        for side in SIDES:
            choose(side == "fastbn")
            spent[side] = _share(steps[side])
    noise = max((high - low) / 2 / middle for low, middle, high in (quantiles(times, n=4) for times in samples.values()))
    medians = {side: 1000 * median(times) for side, times in samples.items()}
    batch_norm = {side: medians[side] * spent[side] for side in SIDES}
    return Benchmark(medians, batch_norm, noise, len(samples["fastbn"]), declined)


def _apart(inputs: Any) -> Any:
    """The same inputs in memory of their own, which a model may change, with gradients of their own."""
    found: Any = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), inputs)
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _step(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Callable[[], None]:
    def train() -> None:
        model.zero_grad()
        means = [tensor.mean() for tensor in _tensors(model(*inputs, **named)) if tensor.requires_grad]
        if not means:
            raise ValueError(
                "the model returns no floating-point tensor that requires a gradient, so no backward can start from its output; "
                "after model.eval() it is timed without a backward"
            )
        torch.stack(means).sum().backward()  # type: ignore[no-untyped-call, unused-ignore]

    def evaluate() -> None:
        with torch.inference_mode():
            model(*inputs, **named)

    return train if model.training else evaluate


def _times(step: Callable[[], None], count: int) -> Iterator[float]:
    for _ in range(count):
        start = perf_counter()
        step()
        yield perf_counter() - start


def _share(step: Callable[[], None]) -> float:
    """The part of a step that is normalization; of the very steps that are profiled, which take longer and may be disturbed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as found:
        start = perf_counter()
        for _ in range(PROFILED):
            step()
        end = perf_counter()
    return float(sum(event.cpu_time_total for event in found.key_averages() if event.key in OPERATORS)) / 1e6 / (end - start)
