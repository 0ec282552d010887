"""Normalization operators for `onnx.reference.ReferenceEvaluator`, run by fastbn.

One class stands for all versions of an operator, as the evaluator knows them by name: what differs between versions is asked
of the model's opset. All of them are what is a mean and a variance; that over some axes is what batch norm does over the
others, with an array of another shape.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from onnx import helper
from onnx.reference.op_run import OpRun

from fastbn import functional
from fastbn.layout import Array
from fastbn.onnx.protos import DEFAULT
from fastbn.results import Stats

MVN_EPSILON = 1e-9  # of MeanVarianceNormalization, which adds it to the standard deviation


def _exact(stats: Stats) -> tuple[Array, Array]:
    """Mean and variance in float64; the mean with all the digits that are known."""
    return stats.mean.astype(np.float64) + stats.mean_lo, stats.var.astype(np.float64)


def _opset(op: OpRun) -> int:
    return max((version for domain, version in op.run_params["opsets"].items() if domain in DEFAULT), default=1)


def _images_and_channels(x: Array) -> tuple[int, int]:
    if x.ndim < 2:
        raise ValueError(f"x must have an axis of images and one of channels, got shape {x.shape}")
    return x.shape[0], x.shape[1]


class BatchNormalization(OpRun):
    """BatchNormalization of every opset, in inference and in training.

    The momentum is the weight of the old statistics, and the running variance moves towards the population's. Training is
    asked for by ``training_mode`` from opset 14 on, by more than one output in 7 to 13, and by ``is_test=0`` before.
    """

    def _run(self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, **attributes: Any) -> tuple[Array, ...]:
        opset = _opset(self)
        epsilon, momentum = float(attributes["epsilon"]), float(attributes["momentum"])
        wanted = len(self.onnx_node.output)
        if opset >= 14:
            training = bool(attributes.get("training_mode"))
        elif opset >= 7:
            training = any(list(self.onnx_node.output)[1:])
        else:
            training = not attributes.get("is_test")
        shape, parameters = x.shape, scale.shape
        if opset < 9 and attributes.get("spatial") == 0:  # each position is a channel
            x, scale, bias, mean, var = x.reshape(len(x), scale.size), scale.ravel(), bias.ravel(), mean.ravel(), var.ravel()
        elif x.ndim == 1:
            x = x[:, None]
        if not training:
            return (functional.batch_norm(x, mean, var, scale, bias, eps=epsilon).reshape(shape),)
        stats = functional.batch_norm_stats(x)
        moved = mean.copy(), var.copy()
        y = functional.batch_norm(x, *moved, scale, bias, True, 1.0 - momentum, epsilon, correction=0, stats=stats)
        results = [y.reshape(shape), *(v.reshape(parameters) for v in moved)]
        if opset < 14:
            results += [v.astype(x.dtype).reshape(parameters) for v in (stats.mean, stats.var)]
        return tuple(results[:wanted])


class InstanceNormalization(OpRun):
    """InstanceNormalization: each channel of each image is a channel of one image."""

    def _run(self, x: Array, scale: Array, bias: Array, **attributes: Any) -> tuple[Array]:
        images, channels = _images_and_channels(x)
        one = x.reshape(1, images * channels, prod(x.shape[2:]))
        parameters = np.tile(scale, images), np.tile(bias, images)
        y = functional.batch_norm(one, None, None, *parameters, training=True, eps=float(attributes["epsilon"]), correction=0)
        return (y.reshape(x.shape),)


class GroupNormalization(OpRun):
    """GroupNormalization; a scale for each channel from opset 21 on, for each group before."""

    def _run(self, x: Array, scale: Array, bias: Array, **attributes: Any) -> tuple[Array]:
        images, channels = _images_and_channels(x)
        groups = int(attributes["num_groups"])
        if groups < 1 or channels % groups:
            raise ValueError(f"num_groups must divide the {channels} channels of x, got {groups}")
        size, spatial = channels // groups, prod(x.shape[2:])
        mean, var = _exact(functional.batch_norm_stats(x.reshape(1, images * groups, size * spatial)))
        invstd = 1 / np.sqrt(var + float(attributes["epsilon"]))
        if _opset(self) < 21:
            scale, bias = np.repeat(scale, size), np.repeat(bias, size)
        vectors = np.repeat(mean, size), np.repeat(invstd, size), np.tile(scale, images), np.tile(bias, images)
        return (functional.batch_norm_elemt(x.reshape(1, images * channels, spatial), *vectors).reshape(x.shape),)


class LayerNormalization(OpRun):
    """LayerNormalization: what comes before the axis are the channels of one image."""

    def _run(self, x: Array, scale: Array, bias: Array | None = None, **attributes: Any) -> tuple[Array, ...]:
        axis = int(attributes["axis"])
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis must be one of x, of shape {x.shape}, got {axis}")
        axis %= x.ndim
        rows = prod(x.shape[:axis])
        one = x.reshape(1, rows, prod(x.shape[axis:]))
        mean, var = _exact(functional.batch_norm_stats(one))
        invstd = 1 / np.sqrt(var + float(attributes["epsilon"]))
        y = functional.batch_norm_elemt(one, mean, invstd).reshape(x.shape) * scale
        y = y if bias is None else y + bias
        kept = (*x.shape[:axis], *[1] * (x.ndim - axis))
        stash = helper.tensor_dtype_to_np_dtype(int(attributes["stash_type"]))
        results = y.astype(x.dtype, copy=False), *(v.astype(stash).reshape(kept) for v in (mean, invstd))
        return results[: len(self.onnx_node.output)]


class MeanVarianceNormalization(OpRun):
    """MeanVarianceNormalization over any axes: the others, one behind the other, are the channels.

    Axes that x lacks are left out, as ONNX Runtime does: by default they are those of images.
    """

    def _run(self, x: Array, **attributes: Any) -> tuple[Array]:
        axes = attributes.get("axes") or (0, 2, 3)
        over = sorted({axis % x.ndim for axis in axes if -x.ndim <= axis < x.ndim})
        if not over:
            raise ValueError(f"axes must name one of x, of shape {x.shape}, got {list(axes)}")
        order = [axis for axis in range(x.ndim) if axis not in over] + over
        turned = x.transpose(order)
        kept = x.ndim - len(over)
        one = turned.reshape(1, prod(turned.shape[:kept]), prod(turned.shape[kept:]))
        mean, var = _exact(functional.batch_norm_stats(one))
        y = functional.batch_norm_elemt(one, mean, 1 / (np.sqrt(var) + MVN_EPSILON))
        return (y.reshape(turned.shape).transpose(np.argsort(order)),)


ops: list[type[OpRun]] = [BatchNormalization, InstanceNormalization, GroupNormalization, LayerNormalization, MeanVarianceNormalization]
