"""One line in a PyTorch program, or two: a small residual network learns scikit-learn's digits in three ways.

By torch alone, with fastbn behind torch's batch norm (`enable`), and with sums and activations in the same operation, too
(`convert`). The model and its training are the same; printed are the time of a step, what batch norm and what follows it
take of it by PyTorch's profiler, and the accuracy on digits that were not seen; the losses are drawn where --output says.
Batch norms are then folded for inference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastbn.torch

BATCH, SIZE = 64, 32  # the digits have 8 x 8 pixels, and are enlarged: as they are, there is little to normalize
NORMALIZES = {f"{kind}batch_norm{way}" for kind in ("aten::native_", "fastbn::") for way in ("", "_forward", "_backward")}
FOLLOWS = {"aten::relu", "aten::relu_", "aten::threshold_backward", "aten::add"}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Output of shape (N, outputs, H / stride, W / stride)."""
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


def network() -> nn.Module:
    """Three blocks, the mean over what is left of the image, a linear classifier; always the same at first."""
    torch.manual_seed(0)
    return nn.Sequential(Block(1, 16, 1), Block(16, 32, 2), Block(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the labels that are found."""
    with torch.inference_mode():
        return float((model(images).argmax(1) == labels).float().mean() * 100)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> tuple[list[float], list[float]]:
    """Train; return the seconds and the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator, taken, losses = torch.Generator().manual_seed(0), [], []
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        start = perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        taken.append(perf_counter() - start)
        losses.append(float(loss.detach()))
    return taken, losses


def share(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Milliseconds that batch norms, sums and activations take of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        train(model, images, labels, 3)
    return sum(event.self_cpu_time_total for event in profile.key_averages() if event.key in NORMALIZES | FOLLOWS) / 3000


def draw(losses: dict[str, list[float]], file: Path) -> None:
    """Draw the losses, each the mean of ten steps. They start as one, and part as rounding does: no way is the better one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for name, found in losses.items():
        panel.plot(range(len(found) - 9), [sum(found[i : i + 10]) / 10 for i in range(len(found) - 9)], label=name)
    panel.set(xlabel="step", ylabel="loss, mean of ten steps", yscale="log")
    panel.legend()
    figure.savefig(file, dpi=120)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of training (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the losses there, by matplotlib")
    arguments = parser.parse_args()
    if (steps := arguments.steps) < 10:
        parser.error(f"argument --steps: must be at least 10, got {steps}")
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, (SIZE, SIZE)).contiguous()
    seen, unseen, labels, unseen_labels = (
        torch.as_tensor(part) for part in train_test_split(images.numpy(), digits.target, test_size=0.25, random_state=0)
    )

    losses: dict[str, list[float]] = {}
    for name in ("torch", "enable", "convert"):
        model = network()
        if name == "enable":
            fastbn.torch.enable()  # the one line
        if name == "convert":
            converted = fastbn.torch.convert(model)  # the second
        taken, losses[name] = train(model.train(), seen, labels, steps)
        spent = share(model, seen, labels)
        found = accuracy(model.eval(), unseen, unseen_labels)
        print(f"{name:8} step {1000 * median(taken):6.1f} ms, batch norm and what follows it {spent:5.1f} ms; accuracy {found:.1f} %")

    if arguments.output is not None:
        draw(losses, arguments.output)
    print("\nwhat was converted:", converted, sep="\n")
    print("\nwhat fastbn computed:", fastbn.torch.report(), sep="\n")
    folded = fastbn.torch.fold(model)
    start = accuracy(model, unseen, unseen_labels)
    print(f"\nfolded for inference: {len(folded.folded)} of {len(folded.folded) + len(folded.left)} batch norms;", end=" ")
    print(f"accuracy {accuracy(folded.model, unseen, unseen_labels):.1f} % after {start:.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
