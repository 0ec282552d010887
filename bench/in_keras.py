"""Training steps in Keras on each of its backends, with Keras' batch norm and with fastbn's: ``python -m bench.in_keras``.

The same small network four times in one process, in turns: without batch norm, with Keras' layer, with fastbn's, and with
fastbn's that has the activation in it. What the first takes less than the others is what batch norm takes of a step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np

from bench import options

BACKENDS = ("torch", "tensorflow", "jax")
KINDS = ("none", "keras", "fastbn", "fused")
PAUSE = 0.02  # seconds in which torch's workers cease to spin


def network(kind: str, batch: int, side: int) -> Any:
    """Four convolutions of 64 channels, each with a batch norm and a ReLU."""
    import keras

    from fastbn.keras import BatchNormalization

    layers = keras.layers
    x = inputs = layers.Input((side, side, 16), batch_size=batch)
    for _ in range(4):
        x = layers.Conv2D(64, 3, padding="same", use_bias=False)(x)
        if kind == "fused":
            x = BatchNormalization(activation="relu")(x)
            continue
        if kind != "none":
            x = {"keras": layers.BatchNormalization, "fastbn": BatchNormalization}[kind]()(x)
        x = layers.ReLU()(x)
    model = keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))
    model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def error(layer: Any) -> float:
    """Largest relative error of a layer's output where the mean is ten thousand standard deviations."""
    import keras

    x = (1e4 + np.random.default_rng(0).normal(size=(32, 16, 16, 8))).astype(np.float32)
    wide = x.astype(np.float64)
    want = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + layer.epsilon)
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    return float((np.abs(y - want) / np.maximum(1.0, np.abs(want))).max())


def measure(turns: int, batch: int, side: int) -> str:
    """A line of the table, on the backend of this process."""
    import keras

    from fastbn.keras import BatchNormalization

    models = {kind: network(kind, batch, side) for kind in KINDS}
    x = np.random.default_rng(0).normal(size=(batch, side, side, 16)).astype(np.float32)
    y = np.arange(batch) % 10
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(turns + 2):
        for kind, model in models.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            model.train_on_batch(x, y)
            if turn > 1:  # the first ones compile
                times[kind].append(1e3 * (time.perf_counter() - start))
    base, theirs, ours, fused = (median(times[kind]) for kind in KINDS)
    errors = f"{error(keras.layers.BatchNormalization()):.1e} | {error(BatchNormalization()):.1e}"
    # What is less than a twentieth of a step is noise.
    share = f"{(theirs - base) / (ours - base):.2f}" if min(theirs, ours) - base > base / 20 else "-"
    name = keras.backend.backend()
    cells = *(f"{ms:.0f}" for ms in (base, theirs, ours, fused)), f"{theirs / ours:.2f}", f"{theirs / fused:.2f}", share, errors
    return f"| {name} | {' | '.join(cells)} |"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.in_keras", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="(default: all that are installed)")
    parser.add_argument("--turns", type=options.whole(1), default=9, help="steps of each that count (default: %(default)s)")
    parser.add_argument("--batch", type=options.whole(1), default=32, help="images (default: %(default)s)")
    parser.add_argument("--side", type=options.whole(1), default=32, help="height and width, in pixels (default: %(default)s)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    options.need(parser, "it", "keras")
    for backend in given.backends or ():
        options.need(parser, f"--backends {backend}", backend)
    given.backends = given.backends or [backend for backend in BACKENDS if find_spec(backend)]
    if not given.backends:
        parser.error(f"it needs one of {', '.join(BACKENDS)}: pip install torch")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table."""
    given = parse(arguments)
    if given.here:
        print(measure(given.turns, given.batch, given.side))
        return 0
    columns = "backend", "step without, ms", "Keras, ms", "fastbn, ms", "fused, ms", "step", "step, fused", "batch norm"
    print(f"| {' | '.join(columns)} | error of Keras at mean/std 1e4 | of fastbn |")
    print("|---|" + "---:|" * 9, flush=True)
    for backend in given.backends:
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        numbers = ["--turns", str(given.turns), "--batch", str(given.batch), "--side", str(given.side)]
        done = subprocess.run(  # noqa: S603  this very module
            [sys.executable, "-m", "bench.in_keras", "--here", *numbers], env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:  # it has said why
            return done.returncode
        print(done.stdout.strip(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(options.run(main))
