"""What each node takes of a run by ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto

from fastbn.layout import Array
from fastbn.onnx.protos import Key, everything, said

UNKNOWN = (224, 64, 48, 32)  # pixels, where the model says nothing: what networks for images, and those for text, are made for
LEAST = 3  # runs
KERNEL = "_kernel_time"  # behind the name of a node


class Timing(NamedTuple):
    """What `measure` found.

    Attributes
    ----------
    shares : list of float, optional
        Of the time of a run, for each of the nodes asked for.
    text : str
        A sentence for the user.
    """

    shares: list[float] | None = None
    text: str = ""


def measure(
    proto: ModelProto, folder: str, places: Sequence[tuple[Key, int]], seconds: float, inputs: Mapping[str, Array] | None
) -> Timing:
    """Run a model, and add up what the nodes at some places take; never an error of its own."""
    if find_spec("onnxruntime") is None:
        return Timing(text="times were not measured: onnxruntime is not installed (pip install onnxruntime)")
    try:
        model, names = _named(proto, folder, places)
        return _run(model, names, seconds, inputs)
    except Exception as error:  # a model that ONNX Runtime does not take can be looked at all the same
        return Timing(text=f"times were not measured: {said(error)}")


def _named(proto: ModelProto, folder: str, places: Sequence[tuple[Key, int]]) -> tuple[bytes, list[tuple[str, str]]]:
    """The model with names by which the nodes are found again, and these.

    ONNX Runtime keeps the name of a node, with something before it where it was in a function. A batch norm between
    convolutions of images becomes a convolution, and is called like its output.
    """
    twin = ModelProto()
    twin.CopyFrom(proto)
    if folder:
        onnx.external_data_helper.load_external_data_for_model(twin, folder)
    bodies = dict(everything(twin))
    names = []
    for i, (key, index) in enumerate(places):
        node = bodies[key].node[index]
        node.name = f"<fastbn {i}>"
        names.append((node.name, f"{node.output[0]}_bn_nchwc"))
    return twin.SerializeToString(), names


def _run(model: bytes, names: list[tuple[str, str]], seconds: float, inputs: Mapping[str, Array] | None) -> Timing:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 4  # what is wrong, the exception says
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = _warm(session, inputs)
        runs, end = 0, perf_counter() + seconds
        while runs < LEAST or perf_counter() < end:
            session.run(None, feed)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    whole = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"][-runs:]
    since, total = whole[0]["ts"], sum(event["dur"] for event in whole)
    spent: dict[str, float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["ts"] >= since and event["name"].endswith(KERNEL):
            name = event["name"].removesuffix(KERNEL)
            # The clock ticks in microseconds: what took none was run all the same.
            spent[name] = spent.get(name, 0.0) + (event["dur"] or 0.5)
    shares = [sum(time for ran, time in spent.items() if own in ran or ran == moved) / total for own, moved in names]
    sizes = ", ".join(f"{name} {'x'.join(map(str, np.shape(value)))}" for name, value in feed.items())
    time = median(event["dur"] for event in whole) / 1000
    text = f"times: ONNX Runtime {onnxruntime.__version__}, {runs} runs of {time:.3g} ms, {sizes}"
    return Timing(shares, f"{text}; not by itself: folded or fused when it loads" if 0 in shares else text)


def _warm(session: Any, inputs: Mapping[str, Array] | None) -> dict[str, Array]:
    """Run a session once; with what it ran."""
    if inputs is not None:
        session.run(None, dict(inputs))
        return dict(inputs)
    for size in UNKNOWN:
        feed = {value.name: drawn(value.type, value.shape, size) for value in session.get_inputs()}
        try:
            session.run(None, feed)
        except Exception:
            if size == UNKNOWN[-1]:
                raise
        else:
            break
    return feed


def drawn(kind: str, shape: Sequence[Any], unknown: int) -> Array:
    """Numbers by chance for an input; integers are 0, as they may be indices."""
    sizes = [n if isinstance(n, int) and n >= 0 else unknown if axis else 1 for axis, n in enumerate(shape)]
    name = kind.partition("(")[2].rstrip(")")
    if name in ("float", "double", "float16"):
        dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[name]
        return np.random.default_rng(0).standard_normal(sizes).astype(dtype)
    if kind.startswith("tensor(") and name != "string":
        return np.zeros(sizes, bool if name == "bool" else name)
    raise ValueError(f"inputs must be given for {kind}")
