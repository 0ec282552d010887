"""The contenders: one ordered table that feeds the measurements and the report.

A contender is a module with three functions, `inference`, `forward` and `backward`. Each takes the inputs and the array to
write to, or None for a new one on each call, and returns a function without arguments: the call that is timed.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

OPS = ("inference", "forward", "backward")


class Contender(NamedTuple):
    """One row of the table: what the report calls it, the package it needs, its module, and whether each call makes a new output."""

    name: str
    package: str
    module: str
    fresh: bool

    def installed(self) -> bool:
        """Whether its package is installed."""
        return find_spec(self.package) is not None

    def load(self) -> Any:
        """Import its module; call this where it is first used."""
        return import_module(f"bench.peers.{self.module}")


COPY = Contender("copy", "numpy", "copy_peer", fresh=False)
CONTENDERS = (
    COPY,
    Contender("fastbn", "fastbn", "fastbn_peer", fresh=False),
    Contender("numpy", "numpy", "numpy_peer", fresh=False),
    Contender("torch", "torch", "torch_peer", fresh=False),
    Contender("fastbn fresh", "fastbn", "fastbn_peer", fresh=True),
    Contender("torch fresh", "torch", "torch_peer", fresh=True),
)
# What takes part between convolutions, where outputs are new as in a model. FrozenBatchNorm knows inference alone.
IN_SITU = (
    Contender("fastbn fresh", "fastbn", "fastbn_peer", fresh=True),
    Contender("frozen fresh", "fastbn", "frozen_peer", fresh=True),
    Contender("torch fresh", "torch", "torch_peer", fresh=True),
)
