"""Re-estimate the running statistics of a PyTorch model over a whole data set."""

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
    """Set the running statistics of a model's batch norms to the exact statistics of a data set, in one pass.

    Each batch runs through the model with the batch norms in training mode, so that its own statistics normalize it.
    Everything else is in evaluation mode, as in inference, so dropout does not change the result. The statistics of each
    layer's inputs are merged, weighted by the number of values, so batches may have any size. Layers that are frozen, or
    have no running statistics, do not change.

    Parameters
    ----------
    model : Module
        Meanwhile, it runs without torch.compile and without gradients.
    loader : iterable
        Of tensors; of lists or tuples, whose first element is passed to the model; or of dicts, whose values are passed by name,
        as far as the model's forward has these names. It may be empty if there is a `start`, which is then written to the layers.
    exact : bool
        False calls ``torch.optim.swa_utils.update_bn``, which gives all batches the same weight and averages their
        variances, and takes none of the other options.
    forward : callable, optional
        ``forward(model, batch)``, for batches of another kind.
    start, tolerance, communicator, progress
        As in `fastbn.update_bn`: continue from an earlier Estimate, stop early, merge over processes, report progress.

    Returns
    -------
    Estimate, or None if not `exact`
        By the layers' names in the model. Estimates of several machines can be merged:
        ``update_bn(model, [], start=a.merge(b))``.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, if there was no batch at all, or if there were too few values. Exceptions of the model or the
        loader are passed on. The model is unchanged in all these cases.

    Notes
    -----
    Once a batch has reached every batch norm exactly once, later batches leave the model after the last batch norm, by a
    BaseException that is not an `Exception`; the layers after it do not run.

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
            values = *statistics, torch.tensor(found.batches, device="cpu")
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
