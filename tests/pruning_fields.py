"""Vector fields that are no chains, one for every way in which neurons can hang together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A stream of 10 neurons, two blocks of 12 hidden ones."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 10), nn.Linear(10, 3)
        self.up = nn.ModuleList(nn.Linear(10, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 10) for _ in range(2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        h = self.enter(y)
        for up, down in zip(self.up, self.down):
            h = h + down(torch.tanh(up(h)))
        return self.leave(torch.tanh(h)) - y


class ResidualOfTheState(nn.Module):
    """The stream is the state: only the hidden neurons can go."""

    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(4, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.c(y + self.b(F.silu(self.a(y))))


class Norm(nn.Module):
    """11 neurons behind a LayerNorm, 9 that are not."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(3, 11), nn.LayerNorm(11), nn.Linear(11, 9), nn.Linear(9, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.norm(F.gelu(self.a(y))))))


class Gated(nn.Module):
    """GLU: the two halves of one product, row by row."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 24), nn.Linear(12, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        value, gate = self.a(y).chunk(2, -1)
        return self.b(value * torch.sigmoid(gate))


class OneGateForAll(nn.Module):
    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.gate, self.b = nn.Linear(3, 8), nn.Linear(3, 1), nn.Linear(8, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(y)) * torch.sigmoid(self.gate(y)))


class Cell(nn.Module):
    """A GRU cell inside: its hidden rows are the state's; those of the read-out are neurons."""

    dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.up, self.down = nn.GRUCell(4, 5), nn.Linear(5, 14), nn.Linear(14, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.cell(self.down(torch.tanh(self.up(y))), y) - y


class HiddenCell(nn.Module):
    """A GRU whose hidden rows are neurons: three rows of each of its matrices belong to one."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.start, self.cell, self.leave = nn.Linear(3, 7), nn.GRUCell(3, 7), nn.Linear(7, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.leave(self.cell(y, self.start(y)))


class Film(nn.Module):
    """Scales and shifts of the hidden rows by a context, made by matrices."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 10), nn.Linear(10, 2)
        self.scale, self.shift = nn.Linear(4, 10), nn.Linear(4, 10)
        self.context: Tensor | None = torch.zeros(0)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.a(y)) * self.scale(self.context) + self.shift(self.context)
        return self.b(torch.tanh(h))


class Conditional(nn.Module):
    """[y, c, embedding of t] into one network."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 5))
        self.net = nn.Sequential(nn.Linear(2 + 3 + 5, 12), nn.SELU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 2))
        self.register_buffer("frequencies", torch.tensor([1.0, 3.0]))
        self.context: Tensor | None = torch.zeros(0)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        angle = t.reshape(1, 1) * self.frequencies
        embedded = self.time(torch.cat([angle.sin(), angle.cos()], -1)).expand(len(y), 5)
        return self.net(torch.cat([y, self.context, embedded], -1))


class Hamiltonian(nn.Module):
    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 1))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(y).sum(), y, create_graph=True)
        return torch.cat([slope[:, 2:], -slope[:, :2]], 1)


class Points(nn.Module):
    """States [batch, points, 2], the same weights at every point, and a sum over the points."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 8), nn.Linear(8, 9), nn.Linear(9, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.a(y))
        return self.c(F.silu(self.b(h + h.mean(1, keepdim=True))))


class Conv(nn.Module):
    """States [batch, 2, 4, 4]; padding with zeros, or around."""

    def __init__(self, mode: str = "zeros") -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1, padding_mode=mode)
        self.b = nn.Conv2d(6, 2, 3, padding=1, padding_mode=mode)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(y)))


class Bare(nn.Module):
    """Parameters used as matrices from the right, and one that only scales rows."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(3, 12)), nn.Parameter(torch.randn(12, 3))
        self.bias, self.scale = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(1, 12))
        self.end = nn.Parameter(torch.randn(3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w1 + self.bias) * self.scale @ self.w2 + self.end


class Tied(nn.Module):
    """One layer used twice, and one that shares its weight with another."""

    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.twice, self.leave = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.twice.weight

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.enter(y))
        h = torch.tanh(self.twice(torch.tanh(self.twice(h))))
        return self.leave(torch.tanh(self.again(h)))


class PastTheModule(nn.Module):
    """Weights that are read past their modules, and a list of parameters: no hook of theirs is called."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 10)
        self.more = nn.ParameterList([nn.Parameter(torch.randn(3, 10) / 3)])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(F.linear(y, self.a.weight, self.a.bias)) @ self.more[0].T


class Attention(nn.Module):
    """States [batch, points, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        weights = torch.softmax(self.q(y) @ self.k(y).transpose(1, 2) / 6**0.5, -1)
        return self.out(weights @ self.v(y))


class Fourier(nn.Module):
    """Sines and cosines of one product: two rows for every neuron of it."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(16, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        z = self.a(y)
        return self.b(torch.cat([z.sin(), z.cos()], -1))


LIKE = {Points: (5, 7, 2), Conv: (5, 2, 4, 4), Attention: (5, 3, 4)}
KINDS = {
    "residual": Residual, "residual of the state": ResidualOfTheState, "norm": Norm, "gated": Gated,
    "one gate": OneGateForAll, "cell": Cell, "hidden cell": HiddenCell, "film": Film, "conditional": Conditional,
    "hamiltonian": Hamiltonian, "points": Points, "conv": Conv, "conv around": lambda: Conv("circular"), "bare": Bare,
    "tied": Tied, "past": PastTheModule, "attention": Attention, "fourier": Fourier,
}  # fmt: skip


def made(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """(module in float64, an example of its state)."""
    torch.manual_seed(seed)
    module = KINDS[kind]().double()
    shape = LIKE.get(type(module)) or (5, module.dim)
    if hasattr(module, "context"):
        module.context = torch.randn(5, 4 if isinstance(module, Film) else 3, dtype=torch.float64)
    return module, torch.randn(shape, dtype=torch.float64)
