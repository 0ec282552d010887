"""Networks in PyTorch, from their papers, with random weights: what `bench.in_torch` trains.

He et al. 2015 (residual networks), Sandler et al. 2018 (MobileNetV2), Huang et al. 2016 (DenseNet), Ronneberger et al.
2015 (U-Net, here with batch norm), Çiçek et al. 2016 and Isensee et al. 2018 (of volumes, with instance norm), Liu et al. 2022
(ConvNeXt, with layer norm), Ho et al. 2020 (the blocks of a diffusion network, with group norm; here without time and
attention). `width` divides all channels, for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def _convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if act is None else [act(inplace=True)]))  # type: ignore[call-arg]


class _Residual(nn.Module):
    """A sum of a body and a shortcut, and what follows it."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None, after: nn.Module):
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut or nn.Identity(), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x) + self.shortcut(x))


def _classifier(channels: int, classes: int = 1000) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def _resnet(blocks: Sequence[int], bottleneck: bool, width: int) -> nn.Module:
    expansion, channels = 4 if bottleneck else 1, 64 // width
    layers: list[nn.Module] = [_convolution(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(blocks):
        inner = 64 * 2**stage // width
        outer = inner * expansion
        for block in range(count):
            stride = 2 if stage and not block else 1
            if bottleneck:
                body = [_convolution(channels, inner), _convolution(inner, inner, 3, stride), _convolution(inner, outer, act=None)]
            else:
                body = [_convolution(channels, inner, 3, stride), _convolution(inner, outer, 3, act=None)]
            shortcut = None if stride == 1 and channels == outer else _convolution(channels, outer, 1, stride, act=None)
            layers.append(_Residual(nn.Sequential(*body), shortcut, nn.ReLU(inplace=True)))
            channels = outer
    return nn.Sequential(*layers, *_classifier(channels))


def resnet18(width: int = 1) -> nn.Module:
    """18 layers of two convolutions a block."""
    return _resnet((2, 2, 2, 2), False, width)


def resnet50(width: int = 1) -> nn.Module:
    """50 layers of three convolutions a block."""
    return _resnet((3, 4, 6, 3), True, width)


def mobilenet_v2(width: int = 1) -> nn.Module:
    """Inverted residuals with linear bottlenecks."""
    channels = 32 // width
    layers: list[nn.Module] = [_convolution(3, channels, 3, 2, act=nn.ReLU6)]
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for factor, outputs, count, first in table:
        for block in range(count):
            inner, outer, stride = channels * factor, outputs // width, 1 if block else first
            body = [] if factor == 1 else [_convolution(channels, inner, act=nn.ReLU6)]
            body += [_convolution(inner, inner, 3, stride, inner, act=nn.ReLU6), _convolution(inner, outer, act=None)]
            whole = nn.Sequential(*body)
            layers.append(_Residual(whole, None, nn.Identity()) if stride == 1 and channels == outer else whole)
            channels = outer
    return nn.Sequential(*layers, _convolution(channels, 1280 // width, act=nn.ReLU6), *_classifier(1280 // width))


class _Dense(nn.Module):
    """Append to the input what was made of it."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121(width: int = 1) -> nn.Module:
    """Four blocks of densely connected layers."""
    growth, channels = 32 // width, 64 // width
    layers: list[nn.Module] = [_convolution(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for i, count in enumerate((6, 12, 24, 16)):
        if i:
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(count):
            layers.append(_Dense(channels, growth))
            channels += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *_classifier(channels))


class _UNet(nn.Module):
    """Of images, or of volumes; `convolution` makes a layer of inputs and outputs."""

    def __init__(self, channels: Sequence[int], convolution: Callable[[int, int], nn.Module], volumes: bool):
        super().__init__()
        grow, last = (nn.ConvTranspose3d, nn.Conv3d) if volumes else (nn.ConvTranspose2d, nn.Conv2d)
        self.pool = nn.MaxPool3d(2) if volumes else nn.MaxPool2d(2)

        def twice(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(convolution(inputs, outputs), convolution(outputs, outputs))

        self.down = nn.ModuleList(twice(a, b) for a, b in pairwise((3, *channels)))
        self.grow = nn.ModuleList(grow(b, a, 2, 2) for a, b in reversed(list(pairwise(channels))))
        self.up = nn.ModuleList(twice(2 * a, a) for a in channels[-2::-1])
        self.last = last(channels[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for level, layer in enumerate(self.down):
            x = layer(x if level == 0 else self.pool(x))
            seen.append(x)
        seen.pop()
        for grow, layer in zip(self.grow, self.up, strict=True):
            x = layer(torch.cat([seen.pop(), grow(x)], 1))
        return self.last(x)


def unet(width: int = 1) -> nn.Module:
    """Contract, expand, and join what was seen on the way."""
    return _UNet([c // width for c in (32, 64, 128, 256)], lambda a, b: _convolution(a, b, 3), False)


def unet_3d(width: int = 1) -> nn.Module:
    """The same of volumes; each convolution with instance norm and LeakyReLU."""

    def convolution(inputs: int, outputs: int) -> nn.Module:
        norm = nn.InstanceNorm3d(outputs, affine=True)
        return nn.Sequential(nn.Conv3d(inputs, outputs, 3, padding=1), norm, nn.LeakyReLU(inplace=True))

    return _UNet([c // width for c in (32, 64, 128, 256)], convolution, True)


class _ConvNext(nn.Module):
    """A large depthwise convolution, and two layers for each pixel, in channels last between them."""

    def __init__(self, channels: int):
        super().__init__()
        self.across = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.pixel = nn.Sequential(
            nn.LayerNorm(channels, eps=1e-6), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.scale = nn.Parameter(1e-6 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.scale * self.pixel(self.across(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class _LayerNorm2d(nn.LayerNorm):
    """Of the channels of each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext_tiny(width: int = 1) -> nn.Module:
    """18 blocks in four stages; depth is not dropped."""
    channels, layers = [3, *(c // width for c in (96, 192, 384, 768))], []
    for stage, ((a, b), count) in enumerate(zip(pairwise(channels), (3, 3, 9, 3), strict=True)):
        size = 2 if stage else 4
        down = nn.Conv2d(a, b, size, size)
        norm = _LayerNorm2d(a if stage else b, eps=1e-6)
        layers += [norm, down] if stage else [down, norm]
        layers += [_ConvNext(b) for _ in range(count)]
    pool, flat, last = _classifier(channels[-1])
    return nn.Sequential(*layers, pool, flat, nn.LayerNorm(channels[-1], eps=1e-6), last)


def diffusion(width: int = 1) -> nn.Module:
    """Residual blocks of group norm, SiLU and convolution, of 128 and 256 channels."""

    def block(a: int, b: int) -> nn.Module:
        def half(a: int, b: int) -> list[nn.Module]:
            return [nn.GroupNorm(32 // width, a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1)]

        return _Residual(nn.Sequential(*half(a, b), *half(b, b)), None if a == b else nn.Conv2d(a, b, 1), nn.Identity())

    few, many = 128 // width, 256 // width
    down, up = nn.Conv2d(few, few, 3, 2, 1), nn.ConvTranspose2d(many, few, 2, 2)
    body = [block(few, few), down, block(few, many), block(many, many), up, block(few, few)]
    return nn.Sequential(nn.Conv2d(3, few, 3, 2, 1), *body, nn.GroupNorm(32 // width, few), nn.SiLU(), nn.Conv2d(few, 2, 3, padding=1))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "densenet121": densenet121,
    "unet": unet,
    "unet_3d": unet_3d,
    "convnext_tiny": convnext_tiny,
    "diffusion": diffusion,
}
VOLUMES = ("unet_3d",)  # networks of 5-D inputs


def example(network: str, batch: int, pixels: int) -> Tensor:
    """An input: images, or as many cubes of half their side."""
    side = (pixels // 2,) * 3 if network in VOLUMES else (pixels,) * 2
    return torch.randn(batch, 3, *side)
