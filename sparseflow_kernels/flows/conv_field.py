"""Vector fields of images as plain torch modules: convolutions with time as a channel, as FFJORD's image flows have
them (Grathwohl et al. 2019, arXiv 1810.01367).

Every layer maps (t, x) with t 0-d and x [batch, in, height, width] to [batch, out, height, width].
`sparseflow_kernels.compile` reads these modules as it reads anybody's, from an example of the state (`like`).
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor, nn

from .layers import ACTIVATION_MODULES


class IgnoreConv2d(nn.Module):
    """A 3x3 convolution, padded with zeros: an autonomous layer."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.conv(x)


class ConcatConv2d(nn.Module):
    """A 3x3 convolution, padded with zeros, of [t, x]: time is input channel 0, which has the value t at every pixel
    and 0 outside the image."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels + 1, out_channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.conv(torch.cat([torch.ones_like(x[:, :1]) * t, x], 1))


class ConcatSquashConv2d(nn.Module):
    """conv(x) * sigmoid(g t + g0) + h t, with a gate and a time bias for every channel."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_gate = nn.Linear(1, out_channels)
        self.time_bias = nn.Linear(1, out_channels, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.time_gate(t.view(1, 1))).view(1, -1, 1, 1)
        return self.conv(x) * gate + self.time_bias(t.view(1, 1)).view(1, -1, 1, 1)


CONV_LAYERS: dict[str, type[nn.Module]] = {
    "ignore": IgnoreConv2d, "concat": ConcatConv2d, "concatsquash": ConcatSquashConv2d,
}  # fmt: skip
"""FFJORD's names of the layer kinds."""


class ConvField(nn.Module):
    """dx/dt = f(t, x): 3x3 convolutions of one kind with an activation between them, none after the last.

    forward: t 0-d, x [batch, channels, height, width] -> the same shape.
    shape: (channels, height, width) of its states.
    pruning_shape: of the smallest images on which paths of weights are as on these: n layers of 3x3 taps move at most n
        pixels, so that n + 1 a side hold every path. Pruning reads the field on these.
    """

    def __init__(
        self, shape: Sequence[int], hidden: Sequence[int] = (64, 64, 64), layer: str = "concat",
        activation: str = "softplus",
    ) -> None:  # fmt: skip
        super().__init__()
        if layer not in CONV_LAYERS:
            raise ValueError(f"layer must be one of {', '.join(CONV_LAYERS)}; got {layer!r}")
        if activation not in ACTIVATION_MODULES:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATION_MODULES)}; got {activation!r}")
        self.shape = image_shape(shape)
        channels, height, width = self.shape
        widths = [channels, *hidden, channels]
        if any(int(n) != n or n < 1 for n in widths):
            raise ValueError(f"hidden must be whole numbers >= 1, channels of every hidden layer; got {hidden!r}")
        self.layers = nn.ModuleList(CONV_LAYERS[layer](a, b) for a, b in zip(widths, widths[1:]))
        self.activation = ACTIVATION_MODULES[activation]()
        most = len(self.layers) + 1
        self.pruning_shape = (channels, min(height, most), min(width, most))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(t, x))
        return self.layers[-1](t, x)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"


def image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Raises ValueError unless it is (channels, height, width), whole numbers above 0."""
    found = tuple(shape)
    if len(found) != 3 or any(isinstance(n, bool) or int(n) != n or n < 1 for n in found):
        raise ValueError(f"shape must be (channels, height, width), whole numbers >= 1; got {shape!r}")
    return tuple(map(int, found))
