"""Running statistics of a PyTorch model found anew, over a whole data set."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastbn import checks
from fastbn.functional import batch_norm_stats
from fastbn.reestimate import Estimate, Recorder, collect, running_of
from fastbn.sync import Communicator
from fastbn.torch.arrays import TYPES, array_of, computable, on_torchs_threads, overwrite
from fastbn.torch.freezing import is_frozen
from fastbn.torch.graph import check, is_batch_norm, norms
from fastbn.torch.standing import tensor_of


def update_bn(
    model: nn.Module,
    loader: Iterable[Any],
    exact: bool = True,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    start: Estimate | None = None,
    tolerance: float | None = None,
    communicator: Communicator | None = None,
    progress: bool | Callable[[Estimate], object] = False,
) -> Estimate | None:
    """Find the running statistics of a model's batch norms anew: exactly those of a data set, in one pass.

    Each batch runs through the model with the batch norms in training mode, so that each is normalized by its own
    statistics, and everything else in evaluation mode, as in inference: dropout does not change what is measured. What each
    layer normalizes is merged, weighted by the number of values: batches may have any sizes. Layers that are frozen, or
    have no running statistics, are left alone.

    Parameters
    ----------
    model : Module
        It runs without torch.compile meanwhile, and without gradients.
    loader : iterable
        Of tensors; of lists or tuples, whose first element the model is called with; or of dicts, whose values it gets under
        their names, as far as its forward has them. It may be empty where there is a `start`, which is then taken over.
    exact : bool
        False calls ``torch.optim.swa_utils.update_bn``, which gives all batches the same weight and averages their
        variances; none of the other options can be given then.
    forward : callable, optional
        ``forward(model, batch)``, for batches that are called otherwise.
    start, tolerance, communicator, progress
        As in `fastbn.update_bn`: to go on from an earlier Estimate, to stop early, to merge over processes, to be told.

    Returns
    -------
    Estimate, or None where not `exact`
        By the layers' names in the model. Estimates of several machines merge:
        ``update_bn(model, [], start=a.merge(b))``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as it must be, if there was no batch at all, or too few values. What the model or the loader
        raises goes through. The model is as before then.

    Notes
    -----
    Where one batch came to every batch norm once, others leave the model behind the last of them, by an exception that is no
    `Exception`; the layers after it are not run.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    >>> x = torch.tensor([[1.0], [3.0], [5.0], [7.0], [9.0]])
    >>> fastbn.torch.update_bn(model, [x[:3], x[3:]]).batches
    2
    >>> model[0].running_mean, model[0].running_var
    (tensor([5.]), tensor([10.]))
    """
    check(model)
    if not checks.switch("exact", exact):
        if forward is not None or start is not None or tolerance is not None or communicator is not None or progress:
            raise ValueError("exact=False leaves everything to torch.optim.swa_utils.update_bn, which takes no other options")
        inexact: Any = torch.optim.swa_utils.update_bn
        inexact(loader, model)
        return None
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    moving: dict[str, Any] = {}
    for path, layer in norms(model):
        if not is_batch_norm(layer) or layer.running_mean is None or is_frozen(layer):
            continue
        if nn.parameter.is_lazy(layer.running_mean):
            raise ValueError(f"{path or 'the model'} is a lazy batch norm: call the model once")
        if layer.running_mean.is_meta:
            raise ValueError(f"{path or 'the model'} lies on the meta device, which holds no values to find statistics of")
        moving[path] = layer
    if not moving:
        raise ValueError("the model has no batch norm with running statistics that is not frozen")
    recorder = Recorder({path: layer.num_features for path, layer in moving.items()}, start, tolerance)

    def call(batch: Any) -> object:
        return _called(model, batch) if forward is None else forward(model, batch)

    stance: Any = torch.compiler.set_stance  # it is typed in part only
    with torch.no_grad(), stance("force_eager"), _watched(model, moving, recorder):
        found = collect(recorder, loader, call, communicator, progress)
    new: list[tuple[Tensor, Tensor]] = []
    for path, layer in moving.items():
        if path in found.layers:
            statistics = map(torch.from_numpy, running_of(path, found, unbiased=True))
            buffers = layer.running_mean, layer.running_var, layer.num_batches_tracked
            values = *statistics, torch.tensor(found.batches)
            new += [pair for pair in zip(buffers, values, strict=True) if pair[0] is not None]
    overwrite(new)
    return found


def _called(model: nn.Module, batch: Any) -> object:
    """Call a model with what a loader gives."""
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
            batch = {key: value for key, value in batch.items() if key in known}
        return model(**batch)
    if isinstance(batch, (list, tuple)) and batch:
        return _called(model, batch[0])
    return model(batch)


class _Inputs(TorchFunctionMode):
    """Sees what layers call batch norm with, which need not be what they are called with."""

    def __init__(self, saw: Callable[[str, Any], None]):
        super().__init__()
        self.saw = saw
        self.calls: list[str] = []  # that have begun: a layer may hold another one
        self.seen: set[str] = set()

    def during(self, path: str, forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Run a layer's code; where that normalizes by other functions, what the layer is called with counts."""
        self.calls.append(path)
        self.seen.discard(path)
        try:
            with nullcontext() if len(self.calls) > 1 else self:
                y = forward(*args, **named)
        finally:
            self.calls.pop()
        if path not in self.seen:
            self.saw(path, args[0] if args else named.get("input"))
        return y

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.functional.batch_norm, torch.batch_norm):
            self.seen.add(self.calls[-1])
            self.saw(self.calls[-1], tensor_of(args[0] if args else kwargs["input"]))
        return func(*args, **kwargs)


@contextmanager
def _watched(model: nn.Module, moving: Mapping[str, Any], recorder: Recorder) -> Iterator[None]:
    """A model whose batch norms tell what comes in, normalize by the batch, and move nothing; it is as before after the block."""
    modes = [(module, module.training) for module in model.modules()]
    own = ("track_running_stats", "synchronize")
    kept = [(layer, {name: layer.__dict__[name] for name in own if name in layer.__dict__}) for layer in moving.values()]
    buffers = [(buffer, buffer.clone()) for layer in moving.values() for buffer in layer.buffers(recurse=False)]
    own_forwards = {path: layer.__dict__.get("forward") for path, layer in moving.items()}

    def saw(path: str, x: Any) -> None:
        if not isinstance(x, Tensor) or x.dtype not in TYPES or x.layout is not torch.strided or x.dim() < 2:
            return  # the layer says what is wrong with it
        with on_torchs_threads():
            stats = batch_norm_stats(array_of(computable(x.detach().cpu())))
        recorder.saw(path, stats)

    inputs = _Inputs(saw)

    def watch(path: str, layer: Any) -> None:
        usual = layer.forward

        def forward(*args: Any, **named: Any) -> Any:
            layer.training = True  # the model may have said otherwise
            return inputs.during(path, usual, *args, **named)

        layer.__dict__["forward"] = forward
        for name in own:
            if name in layer.__dict__:
                setattr(layer, name, False)

    try:
        model.eval()
        for path, layer in moving.items():
            watch(path, layer)
        yield
    finally:
        for path, usual in own_forwards.items():
            moving[path].__dict__.pop("forward", None)
            if usual is not None:
                moving[path].__dict__["forward"] = usual
        for layer, values in kept:
            layer.__dict__.update(values)
        for module, mode in modes:
            module.training = mode
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)
