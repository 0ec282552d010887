"""What batch normalization is famous for: fewer epochs to the same accuracy, and higher learning rates survive.

A small convolutional network in NumPy learns scikit-learn's digits by plain gradient descent, with batch
normalization (forward and backward by fastbn) and without, at several learning rates. Arrays are channels last.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import fastbn

LEARNING_RATES = (0.01, 0.1, 1.0, 3.0)
BATCH = 64
TARGET = 0.95
SEED = 0
Array = np.ndarray


class Block:
    """Convolution of 3 x 3, then batch normalization or a bias, then ReLU."""

    def __init__(self, rng: np.random.Generator, channels_in: int, channels_out: int, stride: int, normalize: bool):
        he = np.sqrt(2 / (9 * channels_in))  # the initialization that suits a network without batch norm
        self.weight = rng.normal(0, he, (9 * channels_in, channels_out)).astype(np.float32)
        self.bias = np.zeros(channels_out, np.float32)
        self.norm = fastbn.BatchNorm2d(channels_out, layout="NHWC") if normalize else None
        self.stride = stride

    def forward(self, x: Array, training: bool) -> Array:
        """Output of shape (N, H / stride, W / stride, channels_out) for x of shape (N, H, W, channels_in)."""
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = sliding_window_view(padded, (3, 3), axis=(1, 2))[:, :: self.stride, :: self.stride]
        n, height, width = windows.shape[:3]
        self.columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * height * width, -1)
        z = (self.columns @ self.weight).reshape(n, height, width, -1)
        z = z + self.bias if self.norm is None else self.norm.train(training)(z)
        self.y, self.x_shape = np.maximum(z, 0), x.shape
        return self.y

    def backward(self, dy: Array) -> Array:
        """Gradient of x; those of the parameters are kept for `parameters`."""
        dz = dy * (self.y > 0)
        if self.norm is None:
            self.dbias = dz.sum((0, 1, 2))
        else:
            self.gradients = self.norm.backward(dz)
            dz = self.gradients.dx
        rows = dz.reshape(-1, dz.shape[-1])
        self.dweight = self.columns.T @ rows
        n, height, width, channels = self.x_shape
        windows = (rows @ self.weight.T).reshape(*dz.shape[:3], 3, 3, channels)
        dx = np.zeros((n, height + 2, width + 2, channels), np.float32)
        for i in range(3):
            for j in range(3):
                dx[:, i : i + height : self.stride, j : j + width : self.stride] += windows[:, :, :, i, j]
        return dx[:, 1:-1, 1:-1]

    def parameters(self) -> Iterator[tuple[Array, Array]]:
        """Each parameter with its gradient."""
        yield self.weight, self.dweight
        if self.norm is None:
            yield self.bias, self.dbias
        else:
            yield self.norm.weight, self.gradients.dweight
            yield self.norm.bias, self.gradients.dbias


class Network:
    """Six blocks from 8 x 8 x 1 to 2 x 2 x 32, the mean over what is left of the image, a linear classifier."""

    def __init__(self, normalize: bool):
        rng = np.random.default_rng(SEED)
        sizes = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 2), (32, 32, 1)]
        self.blocks = [Block(rng, *size, normalize) for size in sizes]
        self.weight = rng.normal(0, np.sqrt(1 / 32), (32, 10)).astype(np.float32)
        self.bias = np.zeros(10, np.float32)

    def forward(self, x: Array, training: bool = False) -> Array:
        """Scores of shape (N, 10)."""
        for block in self.blocks:
            x = block.forward(x, training)
        self.features, self.area = x.mean((1, 2)), x.shape[1:3]
        return self.features @ self.weight + self.bias

    def step(self, x: Array, labels: Array, learning_rate: float) -> float:
        """One step of gradient descent; the loss before it."""
        scores = self.forward(x, training=True)
        scores -= scores.max(1, keepdims=True)
        log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
        truth = np.eye(10, dtype=np.float32)[labels]
        dscores = (np.exp(log_p) - truth) / len(x)
        parameters = [(self.weight, self.features.T @ dscores), (self.bias, dscores.sum(0))]
        dfeatures = (dscores @ self.weight.T) / np.float32(np.prod(self.area))
        dy = np.broadcast_to(dfeatures[:, None, None], (len(x), *self.area, dfeatures.shape[1]))
        for block in reversed(self.blocks):
            dy = block.backward(dy)
            parameters += block.parameters()
        for parameter, gradient in parameters:
            parameter -= learning_rate * gradient
        return -float((log_p * truth).sum()) / len(x)


def train(normalize: bool, learning_rate: float, epochs: int, data: list[Array]) -> Iterator[float]:
    """Yield the accuracy on the test images after each epoch; end early if the loss is no longer finite."""
    x, x_test, labels, labels_test = data
    network, rng = Network(normalize), np.random.default_rng(SEED)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), BATCH):
            batch = order[start : start + BATCH]
            with np.errstate(all="ignore"):  # a run that diverges overflows on the way, and its loss tells
                loss = network.step(x[batch], labels[batch], learning_rate)
            if not np.isfinite(loss):
                return
        with np.errstate(all="ignore"):
            yield float((network.forward(x_test).argmax(1) == labels_test).mean())


def outcome(accuracies: list[float], epochs: int) -> str:
    """Whether the run diverged, or when it reached the target."""
    if len(accuracies) < epochs:
        return f"diverged in epoch {len(accuracies) + 1}"
    return next((f"{TARGET:.0%} in epoch {epoch}" for epoch, a in enumerate(accuracies, 1) if a >= TARGET), f"{TARGET:.0%} not reached")


def plot(results: dict[tuple[float, bool], list[float]], epochs: int, path: str) -> None:
    """One panel for each learning rate, one line with batch norm and one without."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = figure.subplots(1, len(LEARNING_RATES), sharey=True)
    for panel, learning_rate in zip(panels, LEARNING_RATES, strict=True):
        for normalize, label, color in ((True, "with batch norm", "tab:blue"), (False, "without", "tab:orange")):
            accuracies = results[learning_rate, normalize]
            panel.plot(range(1, len(accuracies) + 1), accuracies, "o-", color=color, label=label, markersize=4)
            if len(accuracies) < epochs:
                panel.text(len(accuracies) + 1, 0.02, "diverged", color=color)
        panel.axhline(TARGET, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=f"learning rate {learning_rate:g}", xlabel="epoch", xlim=(0.5, epochs + 0.5), ylim=(0, 1.02))
    panels[0].set_ylabel("accuracy on test images")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train all the networks, print their accuracies, and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="over the training images (default: %(default)s)")
    parser.add_argument("--output", default="train_digits.png", help="file for the plot (default: %(default)s)")
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
    data = train_test_split(images, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target)
    results = {}
    print(f"Accuracy in % on {len(data[1])} test images after each epoch; guessing gives 10\n")
    for learning_rate in LEARNING_RATES:
        for normalize in (True, False):
            print(f"learning rate {learning_rate:<4g} {'with batch norm' if normalize else 'without':<16}", end="", flush=True)
            accuracies = results[learning_rate, normalize] = []
            for accuracy in train(normalize, learning_rate, args.epochs, data):
                accuracies.append(accuracy)
                print(f"{100 * accuracy:5.1f}", end=" ", flush=True)
            print("", outcome(accuracies, args.epochs))
    plot(results, args.epochs, args.output)
    print(f"\nThe plot is in {args.output}")


if __name__ == "__main__":
    try:
        with threadpool_limits(1, "blas"):  # small matrices: threads gain little, and lose much where a core is busy
            main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
