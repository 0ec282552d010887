"""Batch normalization for CPUs at the speed of memory."""

import sys
from typing import TYPE_CHECKING

from fastbn import nn as nn
from fastbn.activations import Activation
from fastbn.dispatch import use_kernel, warmup
from fastbn.functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_forward,
    batch_norm_stats,
)
from fastbn.introspection import explain, show_config
from fastbn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, FrozenBatchNorm
from fastbn.memory import release as release_memory
from fastbn.memory import statistics as memory_statistics
from fastbn.norm_layers import (
    BatchChannelNorm2d,
    BatchRenorm2d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from fastbn.norms import (
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from fastbn.reestimate import Estimate, update_bn
from fastbn.results import Gradients, Saved, Stats
from fastbn.threads import get_num_threads, num_threads, set_num_threads
from fastbn.variants import (
    batch_channel_norm,
    batch_channel_norm_backward,
    batch_channel_norm_forward,
    batch_renorm,
    batch_renorm_backward,
    batch_renorm_forward,
    ghost_batch_norm,
    ghost_batch_norm_backward,
    ghost_batch_norm_forward,
)

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "BatchChannelNorm2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm2d",
    "Estimate",
    "FrozenBatchNorm",
    "Gradients",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Saved",
    "Stats",
    "__version__",
    "batch_channel_norm",
    "batch_channel_norm_backward",
    "batch_channel_norm_forward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_elemt",
    "batch_norm_forward",
    "batch_norm_stats",
    "batch_renorm",
    "batch_renorm_backward",
    "batch_renorm_forward",
    "explain",
    "get_num_threads",
    "ghost_batch_norm",
    "ghost_batch_norm_backward",
    "ghost_batch_norm_forward",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "memory_statistics",
    "num_threads",
    "release_memory",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "set_num_threads",
    "show_config",
    "update_bn",
    "use_kernel",
    "warmup",
]


def __dir__() -> list[str]:
    """Leave out the modules that fastbn is made of."""
    return __all__


if not TYPE_CHECKING:  # which knows what there is

    def __getattr__(name: str) -> object:
        """Say of the modules for frameworks that each is imported by itself."""
        hint = f"; import fastbn.{name} first" if name in ("keras", "mpi", "onnx", "torch") else ""
        raise AttributeError(f"module 'fastbn' has no attribute {name!r}{hint}", name=name, obj=sys.modules[__name__])
