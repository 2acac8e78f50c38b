"""The benchmark problems that are no flows of plain layers: the kinds of vector field that public repositories hold most
of, written as their users write them.

Weights are random, as in `problems`. They are pruned by magnitude, every matrix to a density of its own: one threshold
for all of them, right for trained weights, would compare the scales that they were initialised with, and take whole
matrices away. The densities are Erdos and Renyi's (Mocanu et al. 2018): as many entries a neuron everywhere, so that
narrow first and last layers stay denser and no layer starves the next.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .problems import Problem


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
        self.columns = context
        self.context: Tensor | None = None  # [batch, columns]

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
        graph = torch.is_grad_enabled()  # none is kept where nothing is trained
        with torch.enable_grad():
            x = x if graph and x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=graph)
        n = x.shape[1] // 2
        return torch.cat((gradient[:, n:], -gradient[:, :n]), 1)


class LatentField(nn.Module):
    """torchdiffeq's latent ODE: 4-20-20-4 with ELU."""

    def __init__(self, dim: int = 4, width: int = 20) -> None:
        super().__init__()
        self.net = _mlp((dim, width, width, dim), nn.ELU)

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


class ImageField(nn.Module):
    """FFJORD's field of square images (Grathwohl et al. 2019): four 3 x 3 convolutions with time as a channel, softplus. The
    state is the image's numbers [batch, channels * side * side]."""

    def __init__(self, channels: int = 1, width: int = 64, side: int = 28) -> None:
        super().__init__()
        self.image = channels, side, side
        sizes = (channels, width, width, width, channels)
        self.layers = nn.ModuleList(nn.Conv2d(a + 1, b, 3, padding=1) for a, b in zip(sizes, sizes[1:]))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        x = x.view(-1, *self.image)
        for number, layer in enumerate(self.layers):
            x = functional.softplus(x) if number else x
            x = layer(torch.cat((torch.ones_like(x[:, :1]) * t, x), 1))
        return x.flatten(1)


# Fields by name. Arguments are sizes, so that a small one of each kind can be made.
MODULES = {
    "cfm": ConditionalVelocity, "resnet": ResidualField, "gru": GruField, "hnn": HamiltonianField, "latent": LatentField,
    "points": PointsField, "images": ImageField,
}  # fmt: skip


@dataclass(frozen=True)
class GraphSpec:
    """module: which of `MODULES`; sizes: its arguments.  about: it, in words.  shape: of the state.  gain: factor on the
    weights, so that a solve takes more than a few steps.  divergence: "hutchinson" or None.  outputs: times that a solve
    gives the state at, the first and the last among them.  loss: of a training step:

    "matching": the mean square of f(t, x) - v, a time for every sample, and no solve: conditional flow matching.
    "distance": the mean square of the outputs' distances to targets, and its gradient in the first state too, as an
    encoder needs it.  "likelihood": a flow's."""

    name: str
    module: str
    sizes: tuple[tuple[str, int], ...]
    about: str
    shape: tuple[int, ...]
    gain: float
    divergence: str | None = None
    loss: str = "distance"
    outputs: int = 2

    @property
    def title(self) -> str:
        divergence = "" if self.divergence is None else f", {self.divergence}"
        return f"{self.name} ({self.about}, batch {self.shape[0]}{divergence})"

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def dim(self) -> int:
        """Of all of a sample."""
        return math.prod(self.shape[1:])

    def build(self) -> nn.Module:
        return MODULES[self.module](**dict(self.sizes))

    def problem(self, keep: float) -> "GraphProblem":
        return make_graph_problem(self, keep)


def _spec(name: str, about: str, shape: tuple[int, ...], gain: float, divergence=None, loss="distance", outputs=2) -> GraphSpec:
    return GraphSpec(name, name, (), about, shape, gain, divergence, loss, outputs)


GRAPHS = {
    spec.name: spec
    for spec in (
        _spec("cfm", "2 + 16 context + 32 Fourier features of time, 3x256 silu", (512, 2), 2.0, loss="matching"),
        _spec("resnet", "64, 4 residual blocks of 256, LayerNorm, gelu", (512, 64), 1.5, "hutchinson", "likelihood"),
        _spec("gru", "GRU-ODE of 64", (256, 64), 4.0),
        _spec("hnn", "gradient of a Hamiltonian 4-2x200-1 tanh", (512, 4), 3.0),
        _spec("latent", "4-2x20-4 elu, 100 output times", (64, 4), 2.0, outputs=100),  # as the example observes its spirals
        _spec("images", "1 x 28 x 28, 4 convolutions 3 x 3 of 64, softplus", (32, 784), 1.0, "hutchinson", "likelihood"),
        _spec("points", "16 points of 3, shared 3x64 tanh, mean of the cloud", (64, 16, 3), 2.5),
    )
}
TRAIN_GRAPHS = ("cfm", "latent", "images")


@dataclass
class GraphProblem(Problem):
    """dx/dt = f from t = 0 to 1, and d/dt l = -tr df/dx where the spec has a divergence.

    x: `spec.shape`.  target: what a training step wants, samples first: velocities, or states at the outputs behind the
    first.  sample_times: [batch], of "matching".
    """

    target: Tensor | None = None
    sample_times: Tensor | None = None

    @property
    def like(self) -> Tensor:
        return self.x

    @property
    def times(self) -> Tensor:
        return torch.linspace(0.0, 1.0, self.spec.outputs, dtype=self.x.dtype, device=self.x.device)

    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        return self.x if self.spec.divergence is None else super().state()

    def on(self, device: torch.device, rows: int | None = None) -> "GraphProblem":
        found = self.rows(0, self.x.shape[0] if rows is None else rows)
        found.module.to(device)
        if getattr(found.module, "context", None) is not None:
            found.module.context = found.module.context.to(device)
        parts = {name: getattr(found, name) for name in ("x", "noise", "target", "sample_times")}
        return replace(found, **{name: part.to(device) for name, part in parts.items() if part is not None})

    def reference(self, rows: int) -> "GraphProblem":
        exact = replace(self.rows(0, rows), rtol=1e-10, atol=1e-10)
        parts = {name: getattr(exact, name) for name in ("x", "noise", "target", "sample_times")}
        exact = replace(exact, **{name: part.double() for name, part in parts.items() if part is not None})
        exact.module.double()
        if getattr(exact.module, "context", None) is not None:
            exact.module.context = exact.module.context.double()
        return exact

    def rows(self, start: int, stop: int) -> "GraphProblem":
        """Of these samples, with a module of its own."""
        module, own = copy.deepcopy(self.module), slice(start, stop)
        if getattr(module, "context", None) is not None:
            module.context = module.context[own]
        parts = {name: getattr(self, name) for name in ("x", "noise", "target", "sample_times")}
        return replace(self, module=module, **{name: None if part is None else part[own] for name, part in parts.items()})


def densities(shapes: Sequence[tuple[int, int]], keep: float) -> list[float]:
    """Of matrices [out, in]: in proportion to 1 / out + 1 / in, at most 1, `keep` over all of them together."""
    free, left = set(range(len(shapes))), keep * sum(map(math.prod, shapes))
    while free:
        scale = left / sum(sum(shapes[number]) for number in free)
        full = {number for number in free if scale * sum(shapes[number]) >= math.prod(shapes[number])}
        if not full:
            break
        free -= full
        left -= sum(math.prod(shapes[number]) for number in full)
    return [scale * sum(s) / math.prod(s) if number in free else 1.0 for number, s in enumerate(shapes)]


def _matrix(layer: nn.Module) -> Tensor:
    """The weight of a layer as a matrix; of a convolution with a column for every channel and tap."""
    return layer.weight.flatten(1)


def _prune_(layer: nn.Module, keep: float) -> None:
    """The largest entries stay, and the spectral norm with them: a sparser field is not to be a tamer one."""
    weight = _matrix(layer)
    norm = torch.linalg.matrix_norm(weight, 2)
    gone = weight.abs().flatten().argsort(stable=True)[: weight.numel() - max(1, round(keep * weight.numel()))]
    weight.view(-1)[gone] = 0.0
    weight.mul_(norm / torch.linalg.matrix_norm(weight, 2))


def make_graph_problem(spec: GraphSpec, keep: float, seed: int = 0) -> GraphProblem:
    """Pruned by magnitude to the fraction `keep` of the weights, matrix by matrix to their `densities`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = spec.build().float().requires_grad_(False)
    linears = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    for linear, density in zip(linears, densities([_matrix(linear).shape for linear in linears], keep)):
        linear.weight.mul_(spec.gain)
        if density < 1.0:
            _prune_(linear, density)
    normal = partial(torch.randn, generator=generator)
    x, noise = normal(spec.shape), None
    target = normal(spec.shape if spec.loss == "matching" else (spec.batch, spec.outputs - 1, *spec.shape[1:]))
    if spec.divergence == "hutchinson":
        noise = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
    if hasattr(module, "context"):
        module.context = normal(spec.batch, module.columns)
    times = torch.rand(spec.batch, generator=generator)
    return GraphProblem(spec, keep, module, x, noise, target=target, sample_times=times)
