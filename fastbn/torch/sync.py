"""Batch norm over the processes of torch.distributed, on the CPU.

The layer is not derived from `torch.nn.SyncBatchNorm`, which computes on GPUs only, and which DistributedDataParallel refuses
in models on the CPU.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.utils.parametrize import is_parametrized

from fastbn import sync
from fastbn.layout import Array
from fastbn.torch.arrays import TYPES, array_of, computable, eagerly, new_like, on_torchs_threads, overwrite, unreadable, vector
from fastbn.torch.derived import own_method, refuse_script
from fastbn.torch.graph import STEPS, check, is_batch_norm

distributed: Any = torch.distributed  # it is typed in part only
# What a layer holds, and a class may compute.
STATE = ("training", "momentum", "eps", "track_running_stats", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Communicator(sync.OfProcess):
    """Sends arrays between the processes of torch.distributed; also for fastbn's NumPy layers and functions.

    Parameters
    ----------
    process_group : ProcessGroup, optional
        A group that works on CPU tensors, as gloo does; None means the default group.

    Raises
    ------
    RuntimeError
        If torch.distributed is not initialized, or this process is not in the group. If another process dies, the methods
        raise torch's error, at the latest after the group's timeout.

    See Also
    --------
    fastbn.sync : the functions that take it.

    Examples
    --------
    >>> import torch.distributed as dist, fastbn.torch, numpy as np
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> fastbn.torch.Communicator().all_gather(np.array([1.0, 2.0]))
    array([[1., 2.]])
    >>> dist.destroy_process_group()
    """

    def __init__(self, process_group: Any = None):
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError("torch.distributed is not initialized: call torch.distributed.init_process_group first")
        self.group = process_group
        self.ranks: int = distributed.get_world_size(process_group)
        if self.ranks < 1:
            raise RuntimeError("this process does not belong to the process group")
        self._agreed: set[int] = set()

    def all_gather(self, array: Array) -> Array:
        """Return the arrays of all processes, in the order of the ranks.

        If one process sends more numbers than another, gloo ends the program. So each new length is announced once, in a message
        of its own.
        """
        if array.size not in self._agreed:
            sizes = [int(size) for (size,) in self._gathered(np.array([float(array.size)]))]
            if set(sizes) != {array.size}:
                raise ValueError(
                    f"the processes do not agree: in the order of the ranks, they have messages of {sizes} numbers; has one of them "
                    "a layer with other channels, or an input of another dtype?"
                )
            self._agreed.add(array.size)
        return self._gathered(array)

    def _gathered(self, array: Array) -> Array:
        found = np.empty((self.ranks, *array.shape), array.dtype)
        distributed.all_gather(list(torch.from_numpy(found)), torch.from_numpy(np.array(array)), group=self.group)
        return found

    def all_reduce(self, array: Array) -> Array:
        """Return the sum of the arrays of all processes."""
        found = np.array(array)
        distributed.all_reduce(torch.from_numpy(found), group=self.group)
        return found


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
        momentum: float, eps: float, communicator: Communicator,
    ) -> Tensor:  # fmt: skip
        ctx.communicator = communicator
        source = computable(x)
        y, out = new_like(source)
        new_mean, new_var = (None if v is None else np.array(vector(v)) for v in (mean, var))
        with on_torchs_threads():
            _, ctx.saved = sync.batch_norm_forward(
                array_of(source), vector(weight), vector(bias), new_mean, new_var, momentum, eps, communicator=ctx.communicator, out=out,
            )  # fmt: skip
        overwrite((old, torch.from_numpy(new)) for old, new in ((mean, new_mean), (var, new_var)) if old is not None)
        ctx.save_for_backward(x)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        wanted = tuple(name for name, need in zip(("x", "weight", "bias"), ctx.needs_input_grad, strict=False) if need)
        source = computable(x)
        dx, out = new_like(source) if "x" in wanted else (None, None)
        with on_torchs_threads():
            g = sync.batch_norm_backward(
                array_of(computable(dy)), array_of(source), ctx.saved, communicator=ctx.communicator, wrt=wanted, out=out
            )
        gradients = zip((g.dweight, g.dbias), ctx.dtypes, strict=True)
        vectors = (None if v is None else torch.from_numpy(v).to(dtype) for v, dtype in gradients)
        return None if dx is None else dx.to(x.dtype), *vectors, None, None, None, None, None


# Of layers, beside them: it is of this process, and no part of a copy or a pickle.
_communicators: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Communicator]] = weakref.WeakKeyDictionary()


def _communicator(layer: SyncBatchNorm) -> Communicator:
    """What carries numbers to others."""
    key = id(distributed.group.WORLD), id(layer.process_group)
    known = _communicators.get(layer)
    if known is None or known[0] != key:
        known = _communicators[layer] = key, Communicator(layer.process_group)
    return known[1]


def _synchronized(layer: SyncBatchNorm, x: Tensor) -> Any:
    """Normalize with others."""
    communicator = _communicator(layer)
    if x.device.type != "cpu" or x.dtype not in TYPES or x.layout is not torch.strided:
        raise ValueError(
            f"fastbn.torch.SyncBatchNorm takes strided floating-point tensors on the CPU, got {x.dtype} on {x.device}"
            f"{'' if x.device.type == 'cpu' else '; torch.nn.SyncBatchNorm is for GPUs'}"
        )
    if x.shape[1] != layer.num_features:
        raise ValueError(f"input has {x.shape[1]} channels, but the layer has num_features={layer.num_features}")
    if why := unreadable({}):
        raise TypeError(
            f"fastbn.torch.SyncBatchNorm sends what it finds in its input to other processes, and not {why}; its eval() sends nothing"
        )
    mean, var = (layer.running_mean, layer.running_var) if layer.track_running_stats else (None, None)
    seen = layer.num_batches_tracked if layer.track_running_stats else None
    momentum = layer.momentum
    if momentum is None:  # the cumulative average
        momentum = 0.0 if seen is None else 1.0 / (int(seen) + 1)
    vectors = layer.weight, layer.bias, mean, var
    found: Any = _Synchronized.apply(x, *vectors, momentum, layer.eps, communicator)  # type: ignore[no-untyped-call, unused-ignore]
    if seen is not None:
        seen.add_(1)
    return found


class SyncBatchNorm(_BatchNorm):
    """Batch norm on the CPU that, in training, uses the statistics of all processes of a group.

    It has the parameters, buffers and names of ``torch.nn.SyncBatchNorm``, which is for GPUs. It works inside
    `torch.nn.parallel.DistributedDataParallel`. Processes may have batches of different sizes, or empty ones; all must call.
    In evaluation, and if torch.distributed is not initialized, it is plain batch norm.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in ``torch.nn.BatchNorm2d``.
    process_group : ProcessGroup, optional
        The processes that share a batch; None means all. It must work on CPU tensors, as gloo does.

    Attributes
    ----------
    process_group : ProcessGroup or None
    synchronize : bool
        False makes the layer plain batch norm, until it is True again.

    Notes
    -----
    A forward sends one message of 2 C + 1 float64 numbers (4 C + 1 for float64 inputs); a backward sends one of 2 C.
    Gradients of weight and bias are sums over the process's own part of the batch; DistributedDataParallel averages them,
    like those of all other parameters. Running statistics have the same bits on every process.
    There is no double backward.

    See Also
    --------
    convert_sync_batchnorm : convert all batch norms of a model.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.SyncBatchNorm(3)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, process_group: Any = None, device: Any = None, dtype: Any = None,
    ):  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group
        self.synchronize = True

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy in the same process, and so with the same group."""
        memo[id(self.process_group)] = self.process_group
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))  # type: ignore[no-untyped-call, unused-ignore]
        return twin

    def __prepare_scriptable__(self) -> Any:
        """Say what to do before `torch.jit.script`."""
        refuse_script("fastbn.torch.SyncBatchNorm", "load the state_dict into a model with torch.nn.BatchNorm2d or its like")

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  torch's name
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _has_others(self) -> bool:
        """Whether other processes share the batch, or this one is in no group, which is an error then."""
        if not (self.synchronize and self.training and distributed.is_available() and distributed.is_initialized()):
            return False
        return bool(distributed.get_world_size(self.process_group) != 1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as torch's layers
        """Normalize; with others, where there are others."""
        self._check_input_dim(input)
        if not self._has_others():
            return super().forward(input)
        found: Tensor = eagerly(_synchronized, self, input)
        return found

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Call the function `convert_sync_batchnorm`; torch's layer has this method, too."""
        return convert_sync_batchnorm(module, process_group)


def unusual(layer: nn.Module) -> str:
    """Why a batch norm does something else than torch's, or nothing."""
    if isinstance(layer, _LazyNormBase):
        return "it is a lazy batch norm, which was never called: call the model once"
    forward, usual = own_method(layer, "forward"), (_BatchNorm.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    if forward not in usual or "forward" in layer.__dict__:
        return f"{type(layer).__name__} has a forward of its own"
    return f"{type(layer).__name__} has a __call__ of its own" if own_method(layer, "__call__") is not nn.Module.__call__ else ""


def computes(layer: nn.Module) -> bool:
    """Whether torch's own code may find something else in a layer than what it holds, by a property or a `__getattr__` of its class."""
    kind: Any = type(layer)
    usual = kind.__getattr__ is nn.Module.__getattr__ and kind.__getattribute__ is object.__getattribute__
    return not usual or any(hasattr(kind, name) for name in STATE)


def _computed(layer: nn.Module) -> str:
    """Why a layer is not what it holds, or nothing."""
    if is_parametrized(layer):
        return "it is parametrized"
    return f"{type(layer).__name__} has attributes that are computed" if computes(layer) else ""


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Replace every batch norm of a model by a `SyncBatchNorm`.

    Parameters
    ----------
    model : Module
        It is changed in place. The new layers keep the parameters, buffers, hooks and mode of the old ones; these are the same
        objects, so existing optimizers still work.
    process_group : ProcessGroup, optional
        The processes that share a batch; None means all.

    Returns
    -------
    Module
        The model itself, or the new layer if the model is a batch norm.

    Raises
    ------
    TypeError
        If model is no Module.
    ValueError
        If a lazy batch norm was never called, if a layer is parametrized or has a forward other than batch norm's, or if its class
        computes what batch norms hold, such as `eps`. Nothing is changed in this case.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> [type(layer).__name__ for layer in fastbn.torch.convert_sync_batchnorm(model)]
    ['Conv2d', 'SyncBatchNorm']
    """
    check(model)
    for path, layer in model.named_modules():
        if is_batch_norm(layer) and (why := unusual(layer) or _computed(layer)):
            raise ValueError(f"{path or 'the model'} cannot be converted: {why}")
    made: dict[nn.Module, SyncBatchNorm] = {}

    def converted(layer: nn.Module) -> SyncBatchNorm:
        if layer not in made:
            new = made[layer] = SyncBatchNorm.__new__(SyncBatchNorm)
            new.__dict__.update({key: value for key, value in layer.__dict__.items() if key != STEPS})
            new.process_group, new.synchronize = process_group, True
        return made[layer]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and is_batch_norm(child):
                parent._modules[name] = converted(child)
    return converted(model) if is_batch_norm(model) else model
