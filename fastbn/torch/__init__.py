"""fastbn behind PyTorch's normalizations.

After ``fastbn.torch.enable()``, ATen's normalizations on the CPU run on fastbn's kernels: `nn.BatchNorm1d`, `2d`, `3d`,
`LayerNorm`, `GroupNorm`, instance norm, the functions behind them, and everything else that calls them. Models, state_dict,
autograd and hooks stay torch's own. See docs/pytorch.md.
"""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError(f"fastbn.torch needs PyTorch (pip install torch): {error}") from error

from fastbn.torch.adaptation import Adaptation, adapt
from fastbn.torch.benchmark import Benchmark, benchmark
from fastbn.torch.conversion import Conversion, convert, revert
from fastbn.torch.folding import Folded, fold
from fastbn.torch.freezing import freeze, unfreeze
from fastbn.torch.fused import batch_norm
from fastbn.torch.override import Report, disable, enable, enabled, explain, is_enabled, report
from fastbn.torch.overview import Summary, summary
from fastbn.torch.reestimate import update_bn
from fastbn.torch.sync import Communicator, SyncBatchNorm, convert_sync_batchnorm

__all__ = [
    "Adaptation",
    "Benchmark",
    "Communicator",
    "Conversion",
    "Folded",
    "Report",
    "Summary",
    "SyncBatchNorm",
    "adapt",
    "batch_norm",
    "benchmark",
    "convert",
    "convert_sync_batchnorm",
    "disable",
    "enable",
    "enabled",
    "explain",
    "fold",
    "freeze",
    "is_enabled",
    "report",
    "revert",
    "summary",
    "unfreeze",
    "update_bn",
]

del _torch
