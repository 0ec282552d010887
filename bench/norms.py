"""Instance, group, layer and RMS normalization beside PyTorch and a copy: ``python -m bench.norms``.

Float32, two threads or as many as are given, outputs given to fastbn and the copy; contenders take turns, and 20 ms pass where
the next one has threads of its own. Of each the least of several medians is shown, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from math import exp, log
from typing import Any, NamedTuple

import numpy as np

from bench import options


class Row(NamedTuple):
    """A shape that a published network has."""

    norm: str
    network: str
    shape: tuple[int, ...]  # channels first
    groups: int = 0


ROWS = (
    Row("instance_norm", "3-D U-Net, first level", (2, 32, 64, 64, 64)),
    Row("instance_norm", "3-D U-Net, third level", (2, 128, 16, 16, 16)),
    Row("instance_norm", "3-D U-Net, last level", (2, 320, 4, 4, 4)),
    Row("instance_norm", "style transfer, stem", (4, 32, 256, 256)),
    Row("instance_norm", "style transfer, residual", (4, 128, 64, 64)),
    Row("group_norm", "diffusion, 64 x 64", (2, 320, 64, 64), 32),
    Row("group_norm", "diffusion, 32 x 32", (2, 640, 32, 32), 32),
    Row("group_norm", "diffusion, 16 x 16", (2, 1280, 16, 16), 32),
    Row("group_norm", "autoencoder, 256 x 256", (1, 128, 256, 256), 32),
    Row("group_norm", "Mask R-CNN, neck", (2, 256, 50, 50), 32),
    Row("layer_norm", "ViT-B/16", (8, 197, 768)),
    Row("layer_norm", "ViT-S/16", (16, 197, 384)),
    Row("layer_norm", "ConvNeXt-T, first stage", (8, 56, 56, 96)),
    Row("layer_norm", "ConvNeXt-T, last stage", (8, 7, 7, 768)),
    Row("layer_norm", "BERT-L", (4, 384, 1024)),
    Row("rms_norm", "Llama 7B", (1, 512, 4096)),
    Row("rms_norm", "Qwen 0.5B", (2, 512, 896)),
    Row("rms_norm", "T5", (4, 512, 512)),
)


def median(call: Callable[[], object], seconds: float) -> float:
    """The median time of a call in a loop."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def contenders(row: Row, last: bool, backward: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name; `last` is for channels last, in both libraries."""
    import torch
    from torch.nn import functional as F  # noqa: N812  as everybody calls it

    import fastbn

    rng = np.random.default_rng(0)
    shape = row.shape if not last else (row.shape[0], *row.shape[2:], row.shape[1])
    x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
    y = np.empty_like(x)
    rows = row.norm in ("layer_norm", "rms_norm")
    channels = row.shape[-1] if rows else row.shape[1]
    w, b = (rng.standard_normal(channels, np.float32) for _ in range(2))
    t, g = (torch.from_numpy(np.moveaxis(a, -1, 1) if last else a) for a in (x, dy))
    tw, tb = torch.from_numpy(w), torch.from_numpy(b)
    given: tuple[Any, ...] = {"group_norm": (row.groups,), "layer_norm": ((channels,),), "rms_norm": ((channels,),)}.get(row.norm, ())
    affine = (w,) if row.norm == "rms_norm" else (w, b)
    own: tuple[Any, ...] = (None, None, *affine) if row.norm == "instance_norm" else (*given, *affine)
    theirs = {"weight": tw} | ({} if row.norm == "rms_norm" else {"bias": tb})
    options: dict[str, Any] = {} if rows else {"layout": "channels_last" if last else None}
    torch_norm = getattr(F, row.norm)
    if not backward:
        norm = getattr(fastbn, row.norm)
        return {
            "fastbn": lambda: norm(x, *own, out=y, **options),
            "torch": lambda: torch_norm(t, *given, **theirs),
            "copy": lambda: np.copyto(y, x),
        }
    _, saved = getattr(fastbn, f"{row.norm}_forward")(x, *own, **options)
    gradient = getattr(fastbn, f"{row.norm}_backward")
    leaves = [t.detach().requires_grad_(), *(p.requires_grad_() for p in theirs.values())]
    with_grad = dict(zip(theirs, leaves[1:], strict=True))
    made = torch_norm(leaves[0], *given, **with_grad)
    return {
        "fastbn": lambda: gradient(dy, x, saved, out=y),
        "torch": lambda: torch.autograd.grad(made, leaves, g, retain_graph=True),
        "copy": lambda: np.copyto(y, x),
    }


def measure(row: Row, last: bool, backward: bool, seconds: float) -> dict[str, float]:
    """The time of each contender, in turns."""
    import torch

    calls = contenders(row, last, backward)
    best: dict[str, float] = {}
    for _ in range(3):
        for name, call in calls.items():
            with torch.inference_mode(name == "torch" and not backward):
                best[name] = min(best.get(name, 1e9), median(call, seconds))
            time.sleep(0.02)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser("python -m bench.norms", description=__doc__)
    norms = sorted({row.norm for row in ROWS})
    parser.add_argument("--threads", type=options.threads, default=2, help="of both libraries (default: %(default)s)")
    parser.add_argument("--seconds", type=options.seconds, default=0.05, help="of one contender's turn (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=norms, default=norms, metavar="NORM", help=f"{', '.join(norms)} (default: all)")
    arguments = parser.parse_args(argv)
    options.need(parser, "it", "torch")
    import torch

    import fastbn

    torch.set_num_threads(arguments.threads)
    fastbn.set_num_threads(arguments.threads)
    for norm in dict.fromkeys(arguments.only):
        for backward in (False, True):
            for last in (False, True) if norm in ("instance_norm", "group_norm") else (False,):
                ratios = []
                for row in (row for row in ROWS if row.norm == norm):
                    t = measure(row, last, backward, arguments.seconds)
                    ratios.append(t["torch"] / t["fastbn"])
                    where = "channels last" if last else "contiguous"
                    us = "  ".join(f"{name} {1e6 * v:8.1f}" for name, v in t.items())
                    what = "backward" if backward else "forward"
                    print(f"{norm:14}{what:9}{where:14}{row.network:26}{us}  x{ratios[-1]:.2f}", flush=True)
                print(f"{norm} {'backward' if backward else 'forward'}: geometric mean x{exp(sum(map(log, ratios)) / len(ratios)):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(options.run(main))
