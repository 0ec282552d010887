"""Training over MPI in NumPy, with one batch norm over all processes: ``mpirun -n 2 python -m mpi4py examples/sync_mpi.py``.

Each process has a few of the digits of a batch. Printed is the accuracy with statistics of the whole batch, and with each
process's own: two digits say little about a mean.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from mpi4py import MPI
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import fastbn
import fastbn.mpi

WORLD = MPI.COMM_WORLD
HIDDEN = 64
Array = np.ndarray


class Network:
    """Linear, batch norm, ReLU, linear."""

    def __init__(self, communicator: fastbn.mpi.Communicator | None):
        rng = np.random.default_rng(0)  # the same on every process
        self.first = rng.normal(0, 0.2, (64, HIDDEN)).astype(np.float32)
        self.second = rng.normal(0, 0.1, (HIDDEN, 10)).astype(np.float32)
        self.norm = fastbn.BatchNorm1d(HIDDEN, activation="relu", communicator=communicator)

    def scores(self, x: Array) -> Array:
        """Scores of shape (N, 10)."""
        self.hidden = self.norm(x @ self.first)
        return self.hidden @ self.second

    def step(self, x: Array, labels: Array, batch: int, learning_rate: float) -> None:
        """One step of gradient descent, on this process's part of a batch."""
        scores = self.scores(x)
        p = np.exp(scores - scores.max(1, keepdims=True, initial=-np.inf))
        dscores = (p / p.sum(1, keepdims=True) - np.eye(10, dtype=np.float32)[labels]) / np.float32(batch)
        gradients = self.norm.backward(dscores @ self.second.T)
        parts = [x.T @ gradients.dx, self.hidden.T @ dscores, gradients.dweight, gradients.dbias]
        for parameter, part in zip((self.first, self.second, self.norm.weight, self.norm.bias), parts, strict=True):
            total = np.empty_like(part)
            WORLD.Allreduce(np.ascontiguousarray(part), total)  # gradients of weight and bias are added up as all others are
            parameter -= learning_rate * total


def train(communicator: fastbn.mpi.Communicator | None, each: int, steps: int, data: list[Array]) -> tuple[float, bool]:
    """Accuracy in percent, and whether all processes have the same bits in their running statistics."""
    x, x_test, labels, labels_test = data
    network, rng = Network(communicator), np.random.default_rng(1)
    batch = each * WORLD.Get_size()
    for _ in range(steps):
        mine = rng.integers(len(x), size=batch)[WORLD.Get_rank() * each :][:each]
        network.step(x[mine], labels[mine], batch, 0.1)
    bits = network.norm.running_var.tobytes()
    network.norm.eval()
    return 100 * float((network.scores(x_test).argmax(1) == labels_test).mean()), len(set(WORLD.allgather(bits))) == 1


def main() -> int:
    """Train twice, print on one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=2, help="images of a batch on each process (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="of training (default: %(default)s)")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    digits = load_digits()
    data = train_test_split((digits.data / 16).astype(np.float32), digits.target, test_size=0.25, random_state=0)
    for name, communicator in (("of the whole batch", fastbn.mpi.Communicator()), ("of each process's part", None)):
        accuracy, same = train(communicator, args.each, args.steps, data)
        if WORLD.Get_rank() == 0:
            which = "the same bits" if same else "different"
            print(f"{WORLD.Get_size()} processes, statistics {name}: accuracy {accuracy:.1f} %, running statistics {which}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
