"""A network that was made smaller loses accuracy; its batch norms' statistics, found anew, bring much of it back.

A small convolutional network in NumPy learns scikit-learn's digits. Then its weights keep a few bits, rounded or with the
others dropped, or the smallest ones are set to zero, and nothing is trained any more: `fastbn.update_bn` runs the training
images through once.

What errors of the weights add up to at the output of a layer has a mean and a scale of its own in each channel. That is what a
batch norm takes away, if its statistics know of it. Bits that are dropped make every weight smaller, and so the errors add up.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from train_digits import BATCH, SEED, Array, Network

import fastbn

BITS = (6, 5, 4, 3)
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)


def quantize(weight: Array, bits: int) -> Array:
    """Weights rounded to so many bits, with one scale for all."""
    scale = np.abs(weight).max() / (2 ** (bits - 1) - 1)
    return (np.round(weight / scale) * scale).astype(np.float32)


def shift(weight: Array, bits: int) -> Array:
    """Weights as integers of 16 bits, of which only the upper ones are kept: a shift, which rounds down."""
    scale = np.abs(weight).max() / (2**15 - 1)
    kept = np.round(weight / scale).astype(np.int16) >> (16 - bits)
    return (kept * (scale * 2.0 ** (16 - bits))).astype(np.float32)


def prune(weight: Array, share: float) -> Array:
    """Weights of which the smallest are zero."""
    return np.where(np.abs(weight) < np.quantile(np.abs(weight), share), 0, weight).astype(np.float32)


def accuracy(network: Network, images: Array, labels: Array) -> float:
    """Percent of the labels that are found."""
    return float((network.forward(images).argmax(1) == labels).mean() * 100)


def trained(epochs: int, images: Array, labels: Array) -> Network:
    """A network that has learnt."""
    network, rng = Network(normalize=True), np.random.default_rng(SEED)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(images), BATCH):
            batch = order[start : start + BATCH]
            network.step(images[batch], labels[batch], 0.1)
    return network


def plot(results: dict[str, list[tuple[str, float, float]]], full: float, path: str) -> None:
    """A panel for each way to make a network smaller, with the accuracy before and after."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for panel, (title, rows) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        names, before, after = zip(*rows, strict=True)
        panel.plot(names, before, "o-", color="tab:orange", label="statistics of the whole network")
        panel.plot(names, after, "o-", color="tab:blue", label="statistics found anew")
        panel.axhline(full, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=title, ylim=(0, 102), ylabel="accuracy on test images, %")
        panel.label_outer()
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, make smaller in two ways, find the statistics anew, print and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of training (default: %(default)s)")
    parser.add_argument("--output", default="recalibrate.png", help="file for the plot (default: %(default)s)")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"argument --epochs: must be at least 1, got {args.epochs}")
    if (suffix := Path(args.output).suffix[1:]) not in (known := Figure().canvas.get_supported_filetypes()):
        parser.error(f"argument --output: must end in one of {', '.join(known)}, got {suffix!r}")
    try:  # the plot comes last, and should not fail then
        Path(args.output).open("ab").close()
    except OSError as error:
        parser.error(f"argument --output: cannot write {args.output}: {error.strerror}")

    digits = load_digits()
    images = (digits.images[..., None] / 16 - 0.5).astype(np.float32)
    x, x_test, labels, labels_test = train_test_split(images, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target)
    network = trained(args.epochs, x, labels)
    full = accuracy(network, x_test, labels_test)
    print(f"Accuracy on {len(x_test)} test images, of the whole network: {full:.1f} %\n")
    batches = [x[start : start + BATCH] for start in range(0, len(x), BATCH)]
    results: dict[str, list[tuple[str, float, float]]] = {}
    ways: list[tuple[str, Callable[[Array, float], Array], tuple[float, ...], Callable[[float], str]]] = [
        ("weights rounded to bits", quantize, BITS, "{:.0f}".format),
        ("upper bits of weights kept", shift, BITS, "{:.0f}".format),
        ("smallest weights set to zero", prune, SHARES, "{:.0%}".format),
    ]
    for title, change, amounts, name in ways:
        print(title)
        for amount in amounts:
            smaller = copy.deepcopy(network)
            for block in smaller.blocks:
                block.weight = change(block.weight, amount)
            before = accuracy(smaller, x_test, labels_test)
            fastbn.update_bn([block.norm for block in smaller.blocks], batches, smaller.forward)
            after = accuracy(smaller, x_test, labels_test)
            results.setdefault(title, []).append((name(amount), before, after))
            print(f"{name(amount):>6}: {before:5.1f} % -> {after:5.1f} %")
    plot(results, full, args.output)
    print(f"\nThe plot is in {args.output}")


if __name__ == "__main__":
    try:
        with threadpool_limits(1, "blas"):  # small matrices: threads gain little, and lose much where a core is busy
            main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
