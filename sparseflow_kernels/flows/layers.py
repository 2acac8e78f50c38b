"""Vector fields as plain torch modules: FFJORD's ways to let time into a Linear layer (Grathwohl et al. 2019, arXiv
1810.01367, table of layer types), and the multi-layer field made of them.

Every layer maps (t, x) with t 0-d and x [batch, in] to [batch, out]. `sparseflow_kernels.compile` reads these modules
as it reads anybody's; nothing depends on the classes.
"""

from __future__ import annotations

from typing import Callable, Sequence

import torch
from torch import Tensor, nn


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "square": Square,
    "identity": nn.Identity,
}


class IgnoreLinear(nn.Module):
    """W x + b: an autonomous layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.linear(x)


class ConcatLinear(nn.Module):
    """W [t, x] + b: time is input column 0."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features + 1, out_features)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.linear(torch.cat([torch.ones_like(x[:, :1]) * t, x], dim=1))


class ConcatLinearV2(nn.Module):
    """W x + b + h t."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.time_bias = nn.Linear(1, out_features, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.linear(x) + self.time_bias(t.view(1, 1))


class SquashLinear(nn.Module):
    """(W x + b) * sigmoid(g t + g0)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.time_gate = nn.Linear(1, out_features)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.linear(x) * torch.sigmoid(self.time_gate(t.view(1, 1)))


class ConcatSquashLinear(nn.Module):
    """(W x + b) * sigmoid(g t + g0) + h t."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.time_gate = nn.Linear(1, out_features)
        self.time_bias = nn.Linear(1, out_features, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.time_gate(t.view(1, 1)))
        return self.linear(x) * gate + self.time_bias(t.view(1, 1))


class BlendLinear(nn.Module):
    """(W_0 x + b_0) + t (W_1 x + b_1 - W_0 x - b_0): one map at t = 0, another at t = 1."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, out_features)
        self.last = nn.Linear(in_features, out_features)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        first = self.first(x)
        return first + (self.last(x) - first) * t


class HyperLinear(nn.Module):
    """W(t) x + b(t), both affine in `hidden` functions h_k(t) = tanh(g_k t + g0_k):
    W(t) = W_0 + sum_k h_k(t) W_k, and b(t) alike.

    That is FFJORD's hypernetwork, whose last layer is linear, written as its products with x: `linear` stacks
    (W_0, b_0) .. (W_hidden, b_hidden), so that every entry is a weight that can be pruned.
    """

    hidden = 8

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.time_net = nn.Linear(1, self.hidden)
        self.linear = nn.Linear(in_features, (1 + self.hidden) * out_features)
        with torch.no_grad():  # near a layer without time, as FFJORD starts
            self.linear.weight[out_features:] *= 0.1
            self.linear.bias[out_features:] *= 0.1

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        factors = torch.tanh(self.time_net(t.view(1, 1)))
        parts = self.linear(x)
        y = parts[:, : self.out_features]
        for k in range(self.hidden):
            start = (k + 1) * self.out_features
            y = y + parts[:, start : start + self.out_features] * factors[:, k : k + 1]
        return y


LAYERS: dict[str, type[nn.Module]] = {
    "ignore": IgnoreLinear,
    "concat": ConcatLinear,
    "concat_v2": ConcatLinearV2,
    "squash": SquashLinear,
    "concatsquash": ConcatSquashLinear,
    "concatcoord": ConcatLinear,  # coordinates are of pixels; a linear layer has none, and FFJORD takes concat for it
    "blend": BlendLinear,
    "hyper": HyperLinear,
}
"""FFJORD's names of the layer kinds."""


class MLPField(nn.Module):
    """dx/dt = f(t, x): layers of one kind with an activation between them, none after the last.

    forward: t 0-d, x [batch, dim] -> [batch, dim].
    """

    def __init__(self, dim: int, hidden: Sequence[int], layer: str = "concatsquash", activation: str = "tanh") -> None:
        super().__init__()
        if layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(LAYERS)}; got {layer!r}")
        if activation not in ACTIVATION_MODULES:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATION_MODULES)}; got {activation!r}")
        widths = [dim, *hidden, dim]
        if any(int(width) != width or width < 1 for width in widths):
            raise ValueError(f"dim and hidden must be whole numbers >= 1; got dim={dim!r}, hidden={tuple(hidden)!r}")
        self.dim = dim
        self.layers = nn.ModuleList(LAYERS[layer](a, b) for a, b in zip(widths, widths[1:]))
        self.activation = ACTIVATION_MODULES[activation]()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(t, x))
        return self.layers[-1](t, x)


def mlp_field(dim: int, hidden: Sequence[int], layer: str = "concatsquash", activation: str = "tanh") -> MLPField:
    """A vector field on R^dim with hidden layers of the given widths, in torch's default dtype and initialisation.

    layer: how time enters, one of `LAYERS`.  activation: one of `ACTIVATION_MODULES`.
    Raises ValueError for unknown names and widths below 1.
    """
    return MLPField(dim, hidden, layer, activation)
