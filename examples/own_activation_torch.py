"""An activation of one's own fused into batch norm inside PyTorch: mish, its gradient included.

Run with ``python examples/own_activation_torch.py``; it needs PyTorch and Numba (``pip install '.[torch,numba]'``).
"""

from __future__ import annotations

from typing import Any

import numba
import torch
from torch import Tensor, nn

import fastbn
import fastbn.torch

# Unlike math.exp, these become vector instructions; like(z, 1) is 1 in the type of z, where 1 would make it float64.
from fastbn.kernels.numba_math import exp, like


@numba.njit
def mish(z: float) -> Any:
    """The mish of z, ``z * tanh(log(1 + exp(z)))``, with one exponential: Misra, "Mish", 2019."""
    e = exp(like(z, 20) if z > 20 else z)  # beyond 20 the quotient is 1
    n = e * (e + like(z, 2))
    return z * (n / (n + like(z, 2)))


@numba.njit
def mish_derivative(z: float) -> Any:
    """The derivative of mish."""
    w = like(z, 20) if z > 20 else z
    e = exp(w)
    n = e * (e + like(z, 2))
    d = like(z, 1) / (n + like(z, 2))
    return d * (n + like(z, 4) * w * (e * e + e) * d)


MISH = fastbn.Activation(mish, mish_derivative)


class BatchNormMish(nn.BatchNorm2d):
    """``mish(batch_norm(x))`` in the same passes over memory as batch norm alone; parameters and buffers are torch's."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """Normalize, and apply mish."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return fastbn.torch.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps,
            activation=MISH,
        )  # fmt: skip


def mish_layer() -> nn.Module:
    """One operation."""
    return BatchNormMish(16)


def torch_layer() -> nn.Module:
    """The same as two of torch's own."""
    return nn.Sequential(nn.BatchNorm2d(16), nn.Mish())


def train(layer: nn.Module, steps: int = 20) -> list[float]:
    """Learn the sum of an image behind a convolution and the layer; the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(16, 3, 12, 12)
    target = x.sum((1, 2, 3), keepdim=True)[:, :, 0, 0] / 20
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train with the fused layer, and with torch's two."""
    for name, layer in (("fused", mish_layer()), ("two operations", torch_layer())):
        losses = train(layer)
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
