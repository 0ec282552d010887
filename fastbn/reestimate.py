"""Re-estimate running statistics: those of a whole data set, in one pass.

After training, running statistics are a decaying average of batches that were seen while the weights moved. Pruning,
quantization, averaging of weights, or another domain leave statistics that do not belong to the model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbn import checks, sync
from fastbn.floating import default_mode
from fastbn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastbn.layout import Array
from fastbn.results import Stats
from fastbn.states import check_writable
from fastbn.sync import Communicator

Layer = BatchNorm1d | BatchNorm2d | BatchNorm3d
FEWEST = 8  # batches before their spread says how far off the mean is


class Finished(BaseException):
    """Ends a forward after its last batch norm. No Exception: the model's own code may catch these."""


@dataclass(frozen=True)
class Estimate:
    """Statistics of a model's layers over a data set, or a part of it. It can be pickled, and merged with others.

    Attributes
    ----------
    layers : dict of str to Stats
        Statistics of the inputs of each layer.
    batches : int
        Number of batches seen.

    Examples
    --------
    >>> half = Estimate({"bn": Stats(2, [1.0], [0.0])}, 1)
    >>> half.merge(Estimate({"bn": Stats(2, [3.0], [0.0])}, 1))
    Estimate(layers={'bn': Stats(count=4, mean=array([2.]), var=array([1.]))}, batches=2)
    """

    layers: Mapping[str, Stats]
    batches: int = 0

    def __post_init__(self) -> None:
        """Check what was given, and keep a copy."""
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must be a mapping of names to Stats, got {type(self.layers).__name__}")
        object.__setattr__(self, "layers", dict(self.layers))
        object.__setattr__(self, "batches", checks.integer("batches", self.batches, 0))
        for name, stats in self.layers.items():
            if not isinstance(stats, Stats):
                raise TypeError(f"layers must be a mapping of names to Stats, got {type(stats).__name__} for {name!r}")

    def __hash__(self) -> int:
        return hash((frozenset(self.layers.items()), self.batches))

    def merge(self, *others: Estimate) -> Estimate:
        """Merge the statistics of all the data, as by `Stats.merge`.

        Parameters
        ----------
        *others : Estimate
            Estimates of other parts of the data, with the same model.

        Returns
        -------
        Estimate

        Raises
        ------
        TypeError, ValueError
            If something else is given, or a layer's numbers of channels differ.
        """
        found = dict(self.layers)
        for other in others:
            if not isinstance(other, Estimate):
                raise TypeError(f"merge takes Estimates, got {type(other).__name__}")
            for name, stats in other.layers.items():
                own = found.get(name, stats)
                if own.mean.shape != stats.mean.shape:
                    raise ValueError(f"merge needs statistics of {own.mean.size} channels for layer {name!r}, got {stats.mean.size}")
                found[name] = own.merge(stats) if name in found else stats
        return Estimate(found, self.batches + sum(other.batches for other in others))


class Recorder:
    """Takes down what comes into the layers, batch by batch."""

    def __init__(self, channels: Mapping[str, int], start: Estimate | None, tolerance: float | None):
        if start is not None and not isinstance(start, Estimate):
            raise TypeError(f"start must be an Estimate, as update_bn returns, got {type(start).__name__}")
        self.total = Estimate({}) if start is None else start
        for name, stats in self.total.layers.items():
            if name not in channels:
                raise ValueError(f"start has a layer {checks.short(name)}, which is none of the model's batch norms")
            if stats.mean.size != channels[name]:
                raise ValueError(f"layer {name!r} has {channels[name]} channels, but those of start are {stats.mean.size}")
        self.channels = channels
        self.tolerance = None if tolerance is None else checks.number("tolerance", tolerance, 0.0)
        self.means: dict[str, Stats] = {}
        self.order: list[str] | None = None  # of the calls in a batch that came to every layer once
        self.called: list[str] = []
        self.batch: dict[str, Stats] = {}

    def saw(self, name: str, stats: Stats) -> None:
        """Take down one call of a layer; ends the forward where nothing that counts comes after it."""
        self.batch[name] = stats.merge(self.batch[name]) if name in self.batch else stats
        self.called.append(name)
        if self.called == self.order:
            raise Finished

    def run(self, call: Callable[[], object]) -> None:
        """One batch."""
        self.called, self.batch = [], {}
        with suppress(Finished):
            call()
        if sorted(self.called) == sorted(self.channels):  # else another batch may come to other layers, or more often to one
            self.order = self.called
        self.total = self.total.merge(Estimate(self.batch, 1))
        if self.tolerance is not None:
            for name, stats in self.batch.items():
                # A batch counts as one value: those in it, neighbors in one image, are too much alike to count each.
                mean = Stats(1, stats.mean.astype(np.float64), np.zeros(stats.mean.size))
                self.means[name] = self.means[name].merge(mean) if name in self.means else mean

    @default_mode
    def is_exact_enough(self) -> bool:
        """Whether every mean is known to within the tolerance, in standard deviations of its channel."""
        if self.tolerance is None or not self.means:
            return False
        return all(
            means.count >= FEWEST and bool((means.standard_error <= self.tolerance * np.sqrt(self.total.layers[name].var)).all())
            for name, means in self.means.items()
        )

    def together(self, communicator: Communicator) -> Estimate:
        """Merged with what other processes have seen."""
        names = list(self.channels)
        own = [self.total.layers.get(name, Stats.identity(self.channels[name], np.float64)) for name in names]
        merged = sync.merge(own, communicator)
        own_batches = np.array([float(self.total.batches)])
        (batches,) = sync.returned("all_reduce", sync.check(communicator).all_reduce(own_batches), own_batches)
        return Estimate({name: s for name, s in zip(names, merged, strict=True) if s.count}, int(batches))


class _Bar:
    """One line on the standard error, if there is one and somebody reads it: hours of work do not end because nobody does."""

    def __init__(self, batches: object):
        try:
            self.of = f" of {len(batches)}"  # type: ignore[arg-type]
        except TypeError:
            self.of = ""
        self.seen, self.start = 0, time.monotonic()

    def __call__(self, estimate: Estimate) -> None:
        self.seen += 1
        self._write(f"\rupdate_bn: {self.seen}{self.of} batches, {time.monotonic() - self.start:.0f} s")

    def close(self) -> None:
        self._write("\n")

    def _write(self, text: str) -> None:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()


def collect(
    recorder: Recorder, batches: Iterable[Any], call: Callable[[Any], object], communicator: Communicator | None, progress: object
) -> Estimate:
    """Run the batches through a model, and return what its layers saw."""
    if not checks.is_iterable(batches):
        raise TypeError(f"the batches must be an iterable, got {type(batches).__name__}")
    if communicator is not None:
        sync.check(communicator)
    if not callable(progress) and not (isinstance(progress, (bool, np.bool_, int)) and progress in (0, 1)):
        raise TypeError(f"progress must be True or False, or a function of an Estimate, got {checks.short(progress)}")
    bar = _Bar(batches) if progress and not callable(progress) else None
    tell: Any = bar or (progress if callable(progress) else None)
    with nullcontext() if bar is None else closing(bar):  # an error begins on a line of its own
        for batch in batches:
            try:
                recorder.run(lambda batch=batch: call(batch))  # type: ignore[misc]
            except (RuntimeError, TypeError, ValueError) as error:
                shape = getattr(batches, "shape", None)
                if shape is None or recorder.total.batches or type(error) not in (RuntimeError, TypeError, ValueError):
                    raise
                hint = f"the batches were what one array of shape {tuple(shape)} has on its first axis; give [x] if it is one batch"
                raise type(error)(f"{error} ({hint})") from error
            if tell is not None:
                tell(recorder.total)
            if recorder.is_exact_enough():
                break
    found = recorder.total if communicator is None else recorder.together(communicator)
    if not found.layers:
        raise ValueError("no batch reached a batch norm, and there is no start to continue from")
    return found


def update_bn(
    layers: Sequence[Layer] | Mapping[str, Layer],
    batches: Iterable[Any],
    forward: Callable[[Any], object],
    *,
    start: Estimate | None = None,
    tolerance: float | None = None,
    communicator: Communicator | None = None,
    progress: bool | Callable[[Estimate], object] = False,
) -> Estimate:
    """Set the running statistics of a model's layers to the exact statistics of a data set, in one pass.

    Each batch runs through the model with the layers in training mode, so that its own statistics normalize it. The statistics
    of each layer's inputs are merged, weighted by the number of values. A layer that is frozen, or has no running statistics,
    does not change; a layer with `skip_nonfinite` skips batches that are not finite.

    Parameters
    ----------
    layers : sequence or mapping of str to BatchNorm1d, BatchNorm2d, BatchNorm3d
        The batch norms of the model; in a sequence, their names are "0", "1", ... One that is there several times has its first name.
    batches : iterable
        Read once. It may be empty if there is a `start`, whose statistics are then written to the layers.
    forward : callable
        Runs the model on one batch. Once a batch has called every layer exactly once, later batches leave the model as soon
        as they have done so, too, by a BaseException that is not an `Exception`.
    start : Estimate, optional
        What was seen before: continue an interrupted run, or start from the merged estimates of several machines.
    tolerance : float, optional
        Stop as soon as the standard error of every mean is at most this many standard deviations of its channel, judged by
        the spread of the means of at least eight batches.
    communicator : Communicator, optional
        At the end, merge with the estimates of other processes; all get the same bits. They may have different numbers of
        batches.
    progress : bool or callable
        True prints a line to the standard error. A function is called after each batch with the Estimate so far; it may
        store it, to continue after an interruption.

    Returns
    -------
    Estimate

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, if there was no batch at all, or if there were too few values. Exceptions of `forward` or
        the batches are passed on. The layers are unchanged in all these cases.

    Examples
    --------
    >>> import fastbn
    >>> bn = fastbn.BatchNorm1d(1)
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0], [9.0]], np.float32)
    >>> fastbn.update_bn([bn], [x[:3], x[3:]], bn).batches
    2
    >>> bn.running_mean, bn.running_var
    (array([5.], dtype=float32), array([10.], dtype=float32))
    """
    if not isinstance(layers, (Sequence, Mapping)):
        raise TypeError(f"layers must be a sequence or a mapping of layers, got {type(layers).__name__}")
    named: Mapping[str, Layer] = layers if isinstance(layers, Mapping) else {str(i): layer for i, layer in enumerate(layers)}
    first = {id(layer): name for name, layer in reversed([*named.items()])}
    named = {name: layer for name, layer in named.items() if first[id(layer)] == name}
    for name, layer in named.items():
        if not isinstance(layer, Layer):
            raise TypeError(f"layers must hold BatchNorm1d, BatchNorm2d or BatchNorm3d, got {type(layer).__name__} for {name!r}")
    if not callable(forward):
        raise TypeError(f"forward must be a function of a batch, got {type(forward).__name__}")
    moving = {name: layer for name, layer in named.items() if layer.running_mean is not None and not layer.frozen}
    if not moving:
        raise ValueError("layers have no batch norm with running statistics that is not frozen")
    for name, layer in moving.items():
        _check_own(name, layer)
    recorder = Recorder({name: layer.num_features for name, layer in moving.items()}, start, tolerance)
    with _watched(named, moving, recorder):
        found = collect(recorder, batches, forward, communicator, progress)
    new = [(layer, running_of(name, found, layer.correction == 1)) for name, layer in moving.items() if name in found.layers]
    _set(new, found.batches)
    return found


def _check_own(name: str, layer: Layer) -> None:
    """Check that a layer's statistics can be set, before anything runs."""
    channels = checks.Channels(layer.num_features, f"layer {name!r} has {layer.num_features} channels")
    for key in ("running_mean", "running_var"):
        checks.running(f"{key} of layer {name!r}", getattr(layer, key), channels)
    if layer.num_batches_tracked is not None:
        check_writable({"num_batches_tracked": layer.num_batches_tracked}, f"layer {name!r}")


@default_mode
def _set(new: Sequence[tuple[Layer, tuple[Array, Array]]], batches: int) -> None:
    for layer, (mean, var) in new:
        for old, v in ((layer.running_mean, mean), (layer.running_var, var), (layer.num_batches_tracked, batches)):
            if old is not None:
                old[...] = v  # what overflows becomes infinite, as in training


def running_of(name: str, found: Estimate, unbiased: bool) -> tuple[Array, Array]:
    """Running statistics of a layer."""
    stats = found.layers[name]
    if stats.count < 1 + unbiased:
        raise ValueError(f"layer {name!r} needs at least {1 + unbiased} values per channel, and {stats.count} came")
    return stats.to_running(unbiased=unbiased)


class _Listener(sync.Alone):
    """Stands where a layer asks other processes, and hears what it has found in what it normalizes, which its own code may have made."""

    def __init__(self, name: str, layer: Any, recorder: Recorder):
        self.name, self.layer, self.recorder = name, layer, recorder

    def all_gather(self, array: Array) -> Array:
        """Take statistics down, and return them."""
        stats = sync.received(array, 4 if array.size == 1 + 4 * self.layer.num_features else 2)
        if self.layer.skip_nonfinite and not np.isfinite(stats.vectors).all():
            stats = Stats.identity(self.layer.num_features)
        self.recorder.saw(self.name, stats)
        return super().all_gather(array)


@contextmanager
def _watched(named: Mapping[str, Layer], moving: Mapping[str, Layer], recorder: Recorder) -> Iterator[None]:
    """Layers that tell what comes in, normalize by the batch, and move nothing; each is as before after the block."""
    kept = [(layer, dict(layer.__dict__)) for layer in named.values()]

    def watch(name: str, layer: Any) -> None:
        usual = layer.forward

        def forward(*args: Any, **options: Any) -> Any:
            layer.training = True  # the model may have said otherwise
            if options.get("stats") is not None:  # by which it normalizes, and asks nobody
                recorder.saw(name, options["stats"])
            return usual(*args, **options)

        layer.forward, layer.track_running_stats, layer.communicator = forward, False, _Listener(name, layer, recorder)

    try:
        for name, layer in moving.items():
            watch(name, layer)
        yield
    finally:
        for layer, state in kept:
            layer.__dict__.clear()
            layer.__dict__.update(state)
