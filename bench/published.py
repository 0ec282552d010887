"""Shapes that others have published to measure batch norm with, as facts: images, channels, height, width, how many layers.

Each set names where it stands. Arrays with another number of axes are measured as four axes with the same memory: (N, C) as
N × C × 1 × 1, and what has depth with depth and height as one axis. Imports nothing but the standard library.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

Shape = tuple[int, int, int, int]


class Set(NamedTuple):
    """Shapes of one source, each with the number of layers that have it."""

    title: str
    shapes: tuple[tuple[Shape, int], ...]
    source: str
    reason: str


def _square(images: int, *rows: tuple[int, int] | tuple[int, int, int]) -> tuple[tuple[Shape, int], ...]:
    """From rows of channels, side of the plane, and layers where there are several."""
    return tuple(((images, row[0], row[1], row[1]), row[2] if len(row) > 2 else 1) for row in rows)


def _densenet_121() -> Iterator[tuple[int, int, int]]:
    """The list in order: in each block, what a layer reads, 32 channels more each time, and what it makes of it, 128."""
    yield 64, 112, 1
    for first, last, side, layers in ((64, 256, 57, 7), (128, 512, 29, 13), (256, 1024, 15, 24), (512, 1024, 8, 16)):
        yield from ((channels, side, layers if channels == 128 else 1) for channels in range(first, last + 1, 32))
        if first > 128:
            yield 128, side, layers


_BENCHDNN = "tests/benchdnn/inputs/bnorm/{} of github.com/uxlfoundation/oneDNN, commit 3f27bec2"

SETS = {
    "benchdnn-resnet50": Set(
        "oneDNN's list for ResNet-50, batch 50",
        _square(
            50, (64, 112), (256, 56, 4), (64, 56, 6), (512, 28, 5), (128, 28, 8), (1024, 14, 7), (256, 14, 12), (2048, 7, 4), (512, 7, 6),
        ),
        _BENCHDNN.format("shapes_resnet_50"), "what oneDNN measures itself with",
    ),
    "benchdnn-googlenet-v2": Set(
        "oneDNN's list for GoogLeNet v2, batch 96",
        _square(
            96, (64, 112), (64, 56), (192, 56), (64, 28, 9), (96, 28, 6), (32, 28), (128, 28), (160, 14, 6), (96, 14, 8), (128, 4),
            (224, 14), (64, 14), (128, 14, 11), (192, 14, 5), (192, 7, 4), (256, 14), (256, 7), (128, 2), (352, 7, 2), (320, 7, 2),
            (160, 7), (224, 7, 4), (128, 7, 2),
        ),
        _BENCHDNN.format("shapes_googlenet_v2"), "many widths of channels, planes down to 2x2",
    ),
    "benchdnn-googlenet-v3": Set(
        "oneDNN's list for GoogLeNet v3, batch 96",
        _square(
            96, (32, 149), (32, 147), (64, 147), (80, 73), (192, 71), (64, 35, 12), (48, 35, 3), (96, 35, 7), (32, 35), (384, 17), (96, 17),
            (192, 17, 26), (128, 17, 6), (160, 17, 12), (320, 8, 3), (192, 8, 3), (384, 8, 12), (448, 8, 2),
        ),
        _BENCHDNN.format("shapes_googlenet_v3"), "odd planes, which start on no cache line",
    ),
    "benchdnn-densenet121": Set(
        "oneDNN's list for DenseNet-121, batch 1", _square(1, *_densenet_121()),
        _BENCHDNN.format("shapes_densenet_121"), "one image; odd planes; every width from 64 to 1024 channels",
    ),
    "benchdnn-regressions": Set(
        "oneDNN's list of regressions",
        tuple(((n, c, s, s), 1) for n, c, s in (
            (2, 251, 28), (2, 64, 224), (2, 64, 56), (8, 322, 16), (88, 600, 16), (88, 980, 16), (88, 800, 16), (88, 900, 16), (12, 4, 8),
            (1, 24, 14),
        )),
        _BENCHDNN.format("shapes_regressions"), "sizes at which oneDNN once cut its work wrongly",
    ),
    "benchdnn-large": Set(
        "oneDNN's large batch", (((3072, 64, 112, 112), 1),), _BENCHDNN.format("shapes_large"), "10 GB a tensor: more than 2^31 elements",
    ),
    "pytorch-operators": Set(
        "PyTorch's operator benchmark",
        tuple(((n, c, length, 1), 1) for n, c, length in (
            (1, 256, 3136), (2, 8192, 1), (2, 2048, 1), (128, 8192, 1), (128, 2048, 1), (3136, 256, 1),
        )),
        "benchmarks/operator_benchmark/pt/batchnorm_test.py of github.com/pytorch/pytorch, commit 07b13b71",
        "(N, C) and (N, C, L), which are slow elsewhere",
    ),
    "unet-3d": Set(
        "3-D U-Net, batch 6", (((6, 32, 160 * 224, 224), 1), ((6, 128, 6 * 7, 7), 1)),
        "first and last row of oneDNN's table of a 3-D U-Net", "volumes: the first has 6 GB a tensor",
    ),
}  # fmt: skip

_TRACED = re.compile(r"cnt: (\d+), \(\(T\(\[([\d, ]+)\]")


def four(shape: tuple[int, ...]) -> Shape:
    """A shape of two and more axes as four with the same memory."""
    if len(shape) < 2:
        raise ValueError(f"a shape has two axes or more, got {shape}")
    n, c, *rest = shape
    width = rest.pop() if rest else 1
    height = 1
    for size in rest:
        height *= size
    return (n, c, height, width) if len(shape) > 3 else (n, c, width, 1)


def traced(text: str) -> dict[Shape, int]:
    """The inputs of batch norms in a log of PyTorch's operators, and how often each came.

    Such logs lie under benchmarks/dynamo/microbenchmarks/operator_inp_logs in PyTorch's repository, one for each model of timm and
    torchbench that is trained.
    """
    found: Counter[Shape] = Counter()
    counts = False
    for line in text.splitlines():
        if line.startswith("Operator: "):
            counts = line.split()[1].startswith(("aten.native_batch_norm.", "aten._native_batch_norm_legit", "aten.cudnn_batch_norm."))
        elif counts and (match := _TRACED.match(line)):
            found[four(tuple(int(size) for size in match[2].split(",")))] += int(match[1])
    return dict(found)


def read_traced(path: Path) -> Set:
    """The set in one such file."""
    shapes = traced(path.read_text(encoding="utf-8", errors="replace"))
    if not shapes:
        raise ValueError(f"{path} names no input of a batch norm")
    name = path.stem.removesuffix("_training")
    source = f"{path.name}, of PyTorch's operator_inp_logs"
    return Set(f"{name}, as PyTorch traced it", tuple(shapes.items()), source, "a whole model's training step")
