"""fastbn's Numba kernels, through its public functions."""

from __future__ import annotations

from collections.abc import Callable

import fastbn
from bench.data import Array, Inputs
from bench.peers import fastbn_peer


def _pinned(call: Callable[[], Array]) -> Callable[[], Array]:
    def pinned() -> Array:
        with fastbn.use_kernel("numba"):
            return call()

    return pinned


def inference(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    return _pinned(fastbn_peer.inference(inputs, out))


def forward(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    return _pinned(fastbn_peer.forward(inputs, out))


def backward(inputs: Inputs, out: Array | None) -> Callable[[], Array]:
    return _pinned(fastbn_peer.backward(inputs, out))
