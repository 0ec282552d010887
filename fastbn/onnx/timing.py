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
from fastbn.onnx.protos import Key, said, walk

UNKNOWN = 224  # pixels, where the model says nothing: what networks for images are made for
LEAST = 3  # runs


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
        return _run(_named(proto, folder, places), len(places), seconds, inputs)
    except Exception as error:  # a model that ONNX Runtime does not take can be looked at all the same
        return Timing(text=f"times were not measured: {said(error)}")


def _named(proto: ModelProto, folder: str, places: Sequence[tuple[Key, int]]) -> bytes:
    """The model, with names by which the nodes are found again; ONNX Runtime puts something behind them, or before."""
    twin = ModelProto()
    twin.CopyFrom(proto)
    if folder:
        onnx.external_data_helper.load_external_data_for_model(twin, folder)
    number = {place: i for i, place in enumerate(places)}
    bodies = [*walk(twin.graph, ()), *(found for f in twin.functions for found in walk(f, (f.domain, f.name)))]
    for key, body in bodies:
        for index, node in enumerate(body.node):
            if (key, index) in number:
                node.name = f"<fastbn {number[key, index]}>"
    serialized: bytes = twin.SerializeToString()
    return serialized


def _run(model: bytes, count: int, seconds: float, inputs: Mapping[str, Array] | None) -> Timing:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 3  # it warns of what the model's author did
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feed = dict(inputs) if inputs is not None else {value.name: drawn(value.type, value.shape) for value in session.get_inputs()}
        session.run(None, feed)
        runs, end = 0, perf_counter() + seconds
        while runs < LEAST or perf_counter() < end:
            session.run(None, feed)
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text())
    whole = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"][1:]  # not the first
    since, total = whole[0]["ts"], sum(event["dur"] for event in whole)
    spent = [0] * count
    for event in events:
        if event.get("cat") == "Node" and event["ts"] >= since and "<fastbn " in event["name"] and event["name"].endswith("_kernel_time"):
            spent[int(event["name"].partition("<fastbn ")[2].partition(">")[0])] += event["dur"]
    sizes = ", ".join(f"{name} {'x'.join(map(str, np.shape(value)))}" for name, value in feed.items())
    time = median(event["dur"] for event in whole) / 1000
    text = f"times: ONNX Runtime {onnxruntime.__version__}, {runs} runs of {time:.3g} ms, {sizes}; not run: it folds the node when it loads"
    return Timing([part / total for part in spent], text)


def drawn(kind: str, shape: Sequence[Any]) -> Array:
    """Numbers by chance for an input; integers are 0, as they may be indices."""
    sizes = [n if isinstance(n, int) and n >= 0 else UNKNOWN if axis else 1 for axis, n in enumerate(shape)]
    name = kind.partition("(")[2].rstrip(")")
    if name in ("float", "double", "float16"):
        dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[name]
        return np.random.default_rng(0).standard_normal(sizes).astype(dtype)
    if kind.startswith("tensor(") and name != "string":
        return np.zeros(sizes, bool if name == "bool" else name)
    raise ValueError(f"inputs must be given for {kind}")
