"""Batches of two images: batch normalization fails where the statistics of images and groups, or running ones, do not.

The network of train_digits.py learns scikit-learn's digits from batches of two, with one normalization after the other: from
images of any digits, and from two of the same digit, as consecutive frames of a video are alike. A batch's statistics then tell
the digit, training relies on them, and with running statistics the network is lost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from train_digits import Block, Network

import fastbn

LEARNING_RATE = 0.02
BATCHES = ("any digits", "the same digit")
NORMS: dict[str, Callable[[int], Any]] = {
    "batch norm": lambda c: fastbn.BatchNorm2d(c, layout="NHWC"),
    "batch renorm": lambda c: fastbn.BatchRenorm2d(c, layout="NHWC", momentum=0.02),
    "batch-channel norm": lambda c: fastbn.BatchChannelNorm2d(c, layout="NHWC", momentum=0.02),
    "group norm": lambda c: fastbn.GroupNorm(4, c, layout="NHWC"),
    "layer norm": lambda c: fastbn.GroupNorm(1, c, layout="NHWC"),
}


class AnyBlock(Block):
    """A block with a normalization of one's choice."""

    def __init__(self, rng: np.random.Generator, channels_in: int, channels_out: int, stride: int, norm: Callable[[int], Any]):
        super().__init__(rng, channels_in, channels_out, stride, normalize=False)
        self.norm = norm(channels_out)

    def parameters(self) -> Any:
        """Each parameter with its gradient."""
        yield from super().parameters()
        if hasattr(self.norm, "mix"):
            yield self.norm.mix, self.gradients.dmix


class AnyNetwork(Network):
    """The same network, with that."""

    def __init__(self, norm: Callable[[int], Any]):
        super().__init__(normalize=False)
        rng = np.random.default_rng(0)
        sizes = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 2), (32, 32, 1)]
        self.blocks = [AnyBlock(rng, *size, norm) for size in sizes]


def train(norm: Callable[[int], Any], same: bool, images: int, data: list[np.ndarray]) -> list[float]:
    """Percent of the test images that are recognized, ten times on the way."""
    x, x_test, labels, labels_test = data
    network, rng, found = AnyNetwork(norm), np.random.default_rng(0), []
    steps = images // 2
    for step in range(1, steps + 1):
        at = rng.integers(0, len(x), 2)
        if same:
            at[1] = rng.choice(np.flatnonzero(labels == labels[at[0]]))
        with np.errstate(all="ignore"):  # a run that diverges overflows on the way
            network.step(x[at], labels[at], LEARNING_RATE)
        if step % max(1, steps // 10) == 0:
            with np.errstate(all="ignore"):
                found.append(100 * float((network.forward(x_test).argmax(1) == labels_test).mean()))
    return found


def main() -> None:
    """Train all, print the accuracies, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=6000, help="that each network sees (default: %(default)s)")
    parser.add_argument("--output", default="small_batches.png", help="file for the plot (default: %(default)s)")
    args = parser.parse_args()
    if args.images < 64:
        parser.error(f"argument --images: must be at least 64, got {args.images}")
    if (suffix := Path(args.output).suffix[1:]) not in (known := Figure().canvas.get_supported_filetypes()):
        parser.error(f"argument --output: must end in one of {', '.join(known)}, got {suffix!r}")
    digits = load_digits()
    images = (digits.images[..., None] / 16 - 0.5).astype(np.float32)
    data = train_test_split(images, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, batch in zip(panels, BATCHES, strict=True):
        for name, norm in NORMS.items():
            found = train(norm, batch == BATCHES[1], args.images, data)
            print(f"two images of {batch:<15} {name:<19} {found[-1]:5.1f} % (worst of the last five {min(found[-5:]):.1f} %)", flush=True)
            panel.plot(np.linspace(args.images / 10, args.images, len(found)), found, "o-", markersize=3, label=name)
        panel.set(title=f"two images of {batch}", xlabel="images seen", ylim=(0, 102))
    panels[0].set_ylabel("accuracy on test images, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(args.output, dpi=150)
    print(f"\nThe plot is in {args.output}")


if __name__ == "__main__":
    try:
        with threadpool_limits(1, "blas"):
            main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
