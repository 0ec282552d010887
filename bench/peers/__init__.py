"""The contenders: one ordered table that feeds the measurements and the report.

A contender is a module with some of three functions, `inference`, `forward` and `backward`. Each takes the inputs and the
array to write to, or None for a new one on each call, and returns a function without arguments: the call that is timed.
It returns None where the peer has no such call: another dtype, a layout it would have to transpose, another number of
threads. A module may have `array(result, inputs)`, which gives the result as an array like x; else NumPy makes one. It may
have `about(op, inputs)`, what the peer itself says about how it computes, and `version()`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from bench.data import LAYOUTS, Array, Inputs

OPS = ("inference", "forward", "backward")
Call = Callable[[], object]


class Contender(NamedTuple):
    """One row of the table.

    Attributes
    ----------
    name : str
        What the report calls it.
    package, module : str
        What it needs, and its module here.
    fresh : bool
        Whether each call makes a new output.
    kind : str
        "bound" (no batch norm at all), "ours", "peer", or "aside": shown, but not compared with, because its memory is not that
        of the row.
    slow : bool
        Takes seconds to prepare for each row, and so takes part only when it is named.
    """

    name: str
    package: str
    module: str
    fresh: bool
    kind: str = "peer"
    slow: bool = False

    def installed(self) -> bool:
        """Whether its package is installed."""
        return find_spec(self.package) is not None if self.package != "onednn" else bool(self.load().library())

    def load(self) -> Any:
        """Import its module; call this where it is first used."""
        return import_module(f"bench.peers.{self.module}")

    def call(self, op: str, inputs: Inputs, out: Array | None) -> Call | None:
        """The call that is timed, or None where the peer has none."""
        prepare = getattr(self.load(), op, None)
        return None if prepare is None else prepare(inputs, None if self.fresh else out)

    def array(self, result: object, inputs: Inputs) -> Array:
        """What a call returned, as an array like x."""
        module = self.load()
        return module.array(result, inputs) if hasattr(module, "array") else as_array(result, inputs)

    def version(self) -> str | None:
        """Of its package."""
        module = self.load()
        return module.version() if hasattr(module, "version") else _version(self.package)


def _version(package: str) -> str | None:
    """Of a package, which may have its name from what it was built for."""
    for name in (package, f"{package}-cpu"):
        with suppress(PackageNotFoundError):
            return version(name)
    return getattr(import_module(package), "__version__", None)


def as_array(result: object, inputs: Inputs) -> Array:
    """A result as a NumPy array in the layout of x, from one in that layout or of shape (N, C, H, W)."""
    found: Array = np.asarray(result)
    return found if found.shape == inputs.x.shape else np.moveaxis(found, 1, LAYOUTS[inputs.layout])


COPY = Contender("copy", "numpy", "copy_peer", fresh=False, kind="bound")
CONTENDERS = (
    COPY,
    Contender("limit", "numba", "limit_peer", fresh=False, kind="bound"),
    Contender("fastbn", "fastbn", "fastbn_peer", fresh=False, kind="ours"),
    Contender("fastbn fresh", "fastbn", "fastbn_peer", fresh=True, kind="ours"),
    Contender("fastbn numba", "numba", "numba_peer", fresh=False, kind="ours"),
    Contender("numpy", "numpy", "numpy_peer", fresh=False),
    Contender("torch", "torch", "torch_peer", fresh=False),
    Contender("torch fresh", "torch", "torch_peer", fresh=True),
    Contender("torch.compile", "torch", "compile_peer", fresh=True, slow=True),
    Contender("onednn", "onednn", "onednn_peer", fresh=False),
    Contender("onednn blocked", "onednn", "onednn_blocked_peer", fresh=False, kind="aside"),
    Contender("onnxruntime", "onnxruntime", "onnxruntime_peer", fresh=False),
    Contender("openvino", "openvino", "openvino_peer", fresh=False),
    Contender("jax", "jax", "jax_peer", fresh=True),
    Contender("tensorflow", "tensorflow", "tensorflow_peer", fresh=True),
    Contender("keras", "keras", "keras_peer", fresh=True),
)
BY_NAME: Mapping[str, Contender] = {contender.name: contender for contender in CONTENDERS}
# What takes part between convolutions, where outputs are new as in a model. FrozenBatchNorm knows inference alone.
IN_SITU = (
    Contender("fastbn fresh", "fastbn", "fastbn_peer", fresh=True, kind="ours"),
    Contender("frozen fresh", "fastbn", "frozen_peer", fresh=True, kind="ours"),
    Contender("torch fresh", "torch", "torch_peer", fresh=True),
)


def choose_keras_backend() -> None:
    """PyTorch, JAX or TensorFlow, whichever is installed, unless KERAS_BACKEND says; before TensorFlow imports Keras."""
    installed = [name for name in ("torch", "jax", "tensorflow") if find_spec(name)]
    os.environ.setdefault("KERAS_BACKEND", *installed[:1] or ["tensorflow"])


def choose(names: list[str] | None = None) -> list[Contender]:
    """The contenders that take part: those named, or all that are installed and quick to prepare.

    The copy and fastbn always do.
    """
    if names is None:
        return [contender for contender in CONTENDERS if not contender.slow and contender.installed()]
    wanted = {COPY.name, "fastbn", "fastbn fresh", *names}
    return [contender for contender in CONTENDERS if contender.name in wanted and contender.installed()]
