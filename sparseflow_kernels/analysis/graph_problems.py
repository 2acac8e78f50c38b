"""The benchmark problems that are no chains of layers: the kinds of vector field that public repositories hold most of.

Weights are random and pruned by magnitude, as in `problems`; the time of a solve depends on shapes, masks and steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..pruning import prune_weights_, remove_masks_


def _mlp(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


class ConditionalVelocity(nn.Module):
    """A velocity of conditional flow matching: an MLP of the state, a context per sample and Fourier features of time."""

    def __init__(self, dim: int = 2, context: int = 16, frequencies: int = 16, width: int = 256) -> None:
        super().__init__()
        self.net = _mlp((dim + context + 2 * frequencies, width, width, width, dim), nn.SiLU)
        self.register_buffer("frequencies", math.pi * torch.arange(1, frequencies + 1))
        self.context: Tensor | None = None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        angles = t.reshape(-1, 1) * self.frequencies
        features = torch.cat((angles.sin(), angles.cos()), -1).expand(x.shape[0], -1)
        return self.net(torch.cat((x, self.context, features), -1))


class ResidualField(nn.Module):
    """Residual blocks with LayerNorm and GELU."""

    def __init__(self, dim: int = 64, width: int = 256, blocks: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(dim, width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(width, dim) for _ in range(blocks))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down):
            x = x + down(functional.gelu(up(norm(x))))
        return x


class GruField(nn.Module):
    """The autonomous GRU-ODE (De Brouwer et al. 2019): (1 - z) * (n - h)."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.reset, self.update, self.new = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        r, z = torch.sigmoid(self.reset(h)), torch.sigmoid(self.update(h))
        return (1 - z) * (torch.tanh(self.new(r * h)) - h)


class HamiltonianField(nn.Module):
    """A Hamiltonian network (Greydanus et al. 2019), differentiated by autograd at every evaluation."""

    def __init__(self, dim: int = 4, width: int = 200) -> None:
        super().__init__()
        self.energy = _mlp((dim, width, width, 1), nn.Tanh)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            graph = self.training and torch.is_grad_enabled()
            (gradient,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=graph)
        n = x.shape[1] // 2
        return torch.cat((gradient[:, n:], -gradient[:, :n]), 1)


class LatentField(nn.Module):
    """torchdiffeq's latent ODE: 4-20-20-4 with ELU."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp((4, 20, 20, 4), nn.ELU)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)


class PointsField(nn.Module):
    """Points [batch, points, 3] under shared weights, which see the mean of their cloud."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = _mlp((6, width, width, width, 3), nn.Tanh)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True).expand_as(x)
        return self.net(torch.cat((x, mean), -1))


@dataclass(frozen=True)
class GraphSpec:
    """shape: of the state.  divergence: "hutchinson" or None.  context: columns of the context, 0 for none.  gain: factor on
    the weights, so that a solve takes more than a few steps.  target: ratio of a solve over dense torchdiffeq that is aimed
    at; train_target: of a training step."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    gain: float
    divergence: str | None = None
    context: int = 0
    target: float | None = None
    train_target: float | None = None


GRAPHS = {
    spec.name: spec
    for spec in (
        GraphSpec("cfm", ConditionalVelocity, (512, 2), 2.0, context=16, target=15.0, train_target=6.0),
        GraphSpec("resnet", ResidualField, (512, 64), 1.5, divergence="hutchinson", target=8.0),
        GraphSpec("gru", GruField, (256, 64), 4.0, target=10.0),
        GraphSpec("hnn", HamiltonianField, (512, 4), 3.0, target=15.0),
        GraphSpec("latent", LatentField, (64, 4), 3.0, train_target=15.0),
        GraphSpec("points", PointsField, (64, 16, 3), 2.5, target=8.0),
    )
}


def make_graph_problem(spec: GraphSpec, keep: float, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """(module, y0), pruned to a fraction `keep` of its weights, every matrix scaled back to the spectral norm it had."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = spec.build()
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    with torch.no_grad():
        for linear in linears:
            linear.weight.mul_(spec.gain)
        norms = [torch.linalg.matrix_norm(linear.weight, 2) for linear in linears]
        if keep < 1.0:
            prune_weights_(module, keep, of="weights")
            remove_masks_(module)
            for linear, norm in zip(linears, norms):
                linear.weight.mul_(norm / torch.linalg.matrix_norm(linear.weight, 2).clamp(min=1e-12))
    if spec.context:
        module.context = torch.randn(spec.shape[0], spec.context, generator=generator)
    return module.eval(), torch.randn(spec.shape, generator=generator)
