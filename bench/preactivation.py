"""Batch norm inside an ONNX model that cannot fold it: ``python -m bench.preactivation``.

In a pre-activation network a batch norm stands before its convolution, and the sum that it reads is read again. ONNX Runtime
keeps such data in blocks of channels, and makes the batch norm and its ReLU a depthwise 1x1 convolution there. Its own
profiler says what these take. Beside them fastbn's FrozenBatchNorm with relu, on the same shape in plain memory, after a run of
the whole model: its input has left the nearer caches, where ONNX Runtime's was just written.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from bench import options, report, text
from bench.timing import race, summarize

SHAPES = ((1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7), (8, 64, 56, 56), (8, 256, 14, 14))
BLOCKS = 2
LEAST = 5  # runs


def model(shape: tuple[int, int, int, int]) -> bytes:
    """Two pre-activation blocks (batch norm, ReLU, 3x3 convolution, sum) after a convolution."""
    from onnx import TensorProto, helper, numpy_helper

    rng, channels = np.random.default_rng(0), shape[1]
    tensors: list[Any] = []
    nodes: list[Any] = []

    def convolve(source: str, target: str) -> None:
        weights = rng.standard_normal((channels, channels, 3, 3), np.float32) / np.float32(3 * channels**0.5)
        tensors.append(numpy_helper.from_array(weights, f"{target}.weight"))
        nodes.append(helper.make_node("Conv", [source, f"{target}.weight"], [target], pads=[1, 1, 1, 1]))

    convolve("x", "sum0")
    for i in range(BLOCKS):
        names = [f"norm{i}.{name}" for name in ("weight", "bias", "mean", "var")]
        values = [np.full(channels, value, np.float32) for value in (1, 0, 0, 1)]
        tensors.extend(map(numpy_helper.from_array, values, names))
        nodes.append(helper.make_node("BatchNormalization", [f"sum{i}", *names], [f"norm{i}"]))
        nodes.append(helper.make_node("Relu", [f"norm{i}"], [f"relu{i}"]))
        convolve(f"relu{i}", f"conv{i}")
        nodes.append(helper.make_node("Add", [f"conv{i}", f"sum{i}"], [f"sum{i + 1}"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", f"sum{BLOCKS}"))
    graph = helper.make_graph(nodes, "blocks", [x], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=9).SerializeToString()


def measure(shape: tuple[int, int, int, int], seconds: float) -> list[object]:
    """One line: the shape, how ONNX Runtime runs the batch norm and what it takes, what fastbn takes, and the ratio."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.log_severity_level = fastbn.get_num_threads(), 3
        settings.enable_profiling, settings.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(model(shape), settings, providers=["CPUExecutionProvider"])
        rng, channels = np.random.default_rng(0), shape[1]
        x = rng.standard_normal(shape, np.float32)
        out = np.empty_like(x)
        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        layer = fastbn.FrozenBatchNorm(zeros, ones, ones, zeros, activation="relu")
        own = race({"fastbn": lambda: layer(x, out=out)}, seconds, lambda: session.run(None, {"x": x}), LEAST)["fastbn"]
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found = [event for event in events if event["name"].startswith("norm") and event["name"].endswith("_kernel_time")]
    if not found:  # ONNX Runtime named them otherwise
        return ["x".join(map(str, shape)), "-", float("nan"), own.median * 1e6, float("nan")]
    theirs = summarize([event["dur"] for event in found[len(found) // 4 :]]).median
    return ["x".join(map(str, shape)), found[0]["args"].get("op_name", "-"), theirs, own.median * 1e6, theirs / (own.median * 1e6)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        "python -m bench.preactivation", description="Batch norm and ReLU inside an ONNX model that cannot fold them, beside fastbn's."
    )
    add = parser.add_argument
    add("--threads", type=options.threads, default=fastbn.get_num_threads(), help="for both (default: %(default)s)")
    add("--seconds", type=options.seconds, default=12.0, help="for all (default: %(default)s)")
    arguments = parser.parse_args(argv)
    options.need(parser, "it", "onnxruntime", "onnx")
    with fastbn.num_threads(arguments.threads):
        about = report.machine("float32")
        lines = [measure(shape, arguments.seconds / len(SHAPES)) for shape in SHAPES]
    text.show([
        "# Batch norm and ReLU in a pre-activation model",
        f"- {about['processor']}, {about['threads']} threads, kernel {about['kernel']}, {about['date']}, load {about['load'] or 0:.1f}",
        "Medians. ONNX Runtime's are its profiler's, of the node that the batch norm became; its input was just written.",
        text.Table(("shape", "runs as", "ONNX Runtime µs", "fastbn µs", "over ONNX Runtime"), lines),
    ])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(options.run(main))
