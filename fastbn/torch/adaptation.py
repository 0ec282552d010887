"""Adaptation at test time, without gradients: statistics follow the data that a model gets.

A layer that adapts gets a subclass of its own class, so its parameters, buffers, hooks and state_dict do not change: it reads
its running statistics and never writes them. What it learns is stored beside them, and is part of copies and pickles.
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  as everywhere
from torch import Tensor, nn

from fastbn import checks
from fastbn.functional import batch_norm_stats
from fastbn.results import Stats
from fastbn.torch.arrays import TYPES, array_of, computable, eagerly, on_torchs_threads, unreadable, vector
from fastbn.torch.derived import OWN, Derived, become, derive, refuse_script
from fastbn.torch.graph import check, is_batch_norm, norms
from fastbn.torch.sync import unusual

STATE = "_fastbn_adapted"
_lock = threading.Lock()


class _Memory:
    """What one layer knows."""

    def __init__(self, prior: int, memory: float | None):
        self.prior, self.memory = prior, memory
        self.known: Stats | None = None  # of the stream
        self.skipped = 0

    def statistics(self, layer: Any, x: Tensor) -> Stats | None:
        """What to normalize x with, None for the running statistics; x is remembered where that is asked for."""
        if x.numel() == 0:
            return self.known
        with on_torchs_threads():
            batch = batch_norm_stats(array_of(computable(x.detach().cpu())))
        each = batch.count // x.shape[0]  # values of one sample
        finite = bool(np.isfinite(batch.vectors).all())
        mean, var = vector(layer.running_mean), vector(layer.running_var)
        assert mean is not None  # noqa: S101  `adapt` has looked
        assert var is not None  # noqa: S101
        with _lock:
            known = self.known
            if known is None:
                known = Stats.running(mean, var, self.prior * each, unbiased=False)
            if not finite:
                self.skipped += 1
                return known if known.count else None
            if self.memory is not None and self.memory < math.inf and self.known is not None:
                known = Stats(min(known.count, int(self.memory) * each), *known.vectors)
            found = known.merge(batch)
            if self.memory is not None:
                self.known = found
        return found


def _mixed(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance to normalize x with."""
    if why := unreadable({}):  # a trace would hold the statistics of its example
        raise TypeError(f"a layer that adapts reads the values of its input, and not {why}; fastbn.torch.Adaptation(model).revert() first")
    stats = layer.__dict__[STATE].statistics(layer, x)
    if stats is None:
        return layer.running_mean, layer.running_var
    mean, var = (torch.from_numpy(v).to(layer.running_mean) for v in stats.to_running(unbiased=False))
    return mean, var


class _Adapted:
    """What the subclasses share; the other base is the layer's own class."""

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002  as torch's layers
        """Normalize; in evaluation by what was mixed from the running statistics and the data."""
        if self.training or STATE not in self.__dict__:  # the latter where somebody has derived another class, which stays
            found: Tensor = super().forward(input)  # type: ignore[misc]
            return found
        self._check_input_dim(input)
        usual = self.running_mean, self.running_var
        known = input.dtype in TYPES and input.layout is torch.strided and not input.is_meta and input.shape[1] == usual[0].numel()
        mean, var = eagerly(_mixed, self, input) if known else usual  # torch says what is wrong with another
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def __prepare_scriptable__(self) -> Any:
        """Say what to do before `torch.jit.script`."""
        refuse_script("a layer that adapts", "call fastbn.torch.Adaptation(model).revert() first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle names the layer's own class: this one is made anew where it is read."""
        if not _is_ours(type(self)):  # it says itself how it is made, or has a name
            return super().__reduce_ex__(protocol)
        kind = type(self).__bases__[1]
        of = vars(kind).get(OWN)  # a converted layer, whose class has no name either
        return _empty, (kind,) if of is None else (of, kind.__bases__[0]), self.__dict__


def _is_ours(kind: type) -> bool:
    """Whether a class was made here, and is none that somebody has derived from it since, as parametrizations do."""
    return kind.__bases__[0] is _Adapted


@cache
def _adapted(kind: Any) -> Any:
    """The subclass of a layer's class."""
    return type(f"Adapted{kind.__name__}", (_Adapted, kind), {"__doc__": f"A {kind.__name__} that adapts.", "__module__": __name__})


def _empty(kind: type, mixin: type[Derived] | None = None) -> Any:
    made = _adapted(kind if mixin is None else derive(mixin, kind))
    return made.__new__(made)


class Adaptation:
    """The layers of a model that adapt. As a context manager, it reverts them at the end.

    Parameters
    ----------
    model : Module
        A model on which `adapt` was called, or a copy of one.

    Attributes
    ----------
    layers : dict of str to Module
        By their names in the model.

    Raises
    ------
    TypeError
        If model is no Module.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).eval()
    >>> with fastbn.torch.adapt(model) as adaptation:
    ...     list(adaptation.layers)
    ['0']
    >>> type(model[0]).__name__
    'BatchNorm1d'
    """

    def __init__(self, model: nn.Module):
        check(model)
        self.layers: dict[str, Any] = {path: layer for path, layer in norms(model) if isinstance(layer, _Adapted)}
        self._memories = {path: layer.__dict__.get(STATE, _Memory(0, None)) for path, layer in self.layers.items()}

    def __repr__(self) -> str:
        return f"Adaptation(layers={list(self.layers)}, skipped={self.skipped})"

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()

    @property
    def skipped(self) -> int:
        """How many times a layer got data that were not finite, and did not learn from them."""
        return sum(memory.skipped for memory in self._memories.values())

    def reset(self) -> None:
        """Forget the stream: the next call begins with the running statistics, as the first one did."""
        for memory in self._memories.values():
            with _lock:
                memory.known, memory.skipped = None, 0

    def revert(self) -> None:
        """Undo `adapt`, except for layers on which `adapt` was called again since. You may call this more than once."""
        for path, layer in self.layers.items():
            if layer.__dict__.get(STATE, self._memories[path]) is self._memories[path]:
                if _is_ours(type(layer)):
                    become(layer, type(layer).__bases__[1])
                layer.__dict__.pop(STATE, None)
        self.layers, self._memories = {}, {}


def adapt(model: nn.Module, *, prior: int = 8, memory: float | None = None) -> Adaptation:
    """Let the batch norms of a model follow the data in evaluation mode, without gradients.

    Each layer merges its running statistics with those of its input, and normalizes by the result; the running statistics
    count as those of `prior` samples. Weights, running statistics and the state_dict do not change.

    Parameters
    ----------
    model : Module
        It adapts in evaluation mode only; training mode works as before.
    prior : int
        How many samples the running statistics are worth. 0: only the batch counts.
    memory : int or math.inf, optional
        None: each call stands alone. Otherwise all calls are one stream: what a layer has seen keeps counting, as at most this
        many samples. Older data fade exponentially; a new batch of N samples has the weight N / (N + memory).

    Returns
    -------
    Adaptation
        Call its `revert`, or use it as a context manager; `reset` forgets a stream.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid; if a layer adapts already, or has a forward other than batch norm's; or if there is no batch
        norm with running statistics. Nothing is changed in this case.

    Notes
    -----
    In the literature, ``prior=0`` is prediction-time batch norm (Nado et al. 2020), and the first half of TENT (Wang et al.,
    "Tent: Fully test-time adaptation by entropy minimization", ICLR 2021). TENT's other half, which trains weight and bias by
    gradients, is not done here. A prior of n samples is Schneider et al., "Improving robustness against common
    corruptions by covariate shift adaptation", NeurIPS 2020, except that variances are merged with the distance between the
    means, as for one batch of both. ``prior=0, memory=math.inf`` finds AdaBN's statistics (Li et al. 2017) as data come in;
    `update_bn` finds them at once, if all data are available.

    A batch must be a fair sample: many images of one class are not another domain. Batches with values that are not finite are
    normalized by what was known before, and not remembered.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1, eps=1e-12)).eval()
    >>> x = torch.tensor([[9.0], [11.0]])
    >>> with fastbn.torch.adapt(model, prior=0):
    ...     model(x).tolist()
    [[-1.0], [1.0]]
    >>> model(x).tolist()
    [[9.0], [11.0]]
    """
    check(model)
    count = checks.integer("prior", prior, 0, 10**12)
    if memory is not None and memory != math.inf:
        memory = checks.integer("memory", memory, 1, 10**12)
    layers = [(path, layer) for path, layer in norms(model) if is_batch_norm(layer) and layer.running_mean is not None]
    if not layers:
        raise ValueError("the model has no batch norm with running statistics")
    for path, layer in layers:
        if STATE in layer.__dict__:
            raise ValueError(f"{path or 'the model'} adapts already: revert that first, by fastbn.torch.Adaptation(model).revert()")
        if why := unusual(layer):
            raise ValueError(f"{path or 'the model'} cannot adapt: {why}")
    own: list[Any] = [type(layer) for _, layer in layers]
    kinds = [_adapted(kind) for kind in own]  # before any layer is changed: a class may refuse
    for (_, layer), kind in zip(layers, kinds, strict=True):
        layer.__dict__[STATE] = _Memory(count, memory)
        become(layer, kind)
    return Adaptation(model)
