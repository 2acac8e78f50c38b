"""Vector fields as people write them: plain user classes with `forward(t, y)`, shared by several test files.

`FIELDS` maps a name to a zero-argument constructor (small sizes; seed with `torch.manual_seed` before calling). Every
field has the attribute `dim`. `make_ffjord(kind, dims, hidden, act)` builds an FFJORD-like odefunc of one layer kind.
"""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("ignore", "concat", "concat_v2", "squash", "concatsquash")

# -------------------------------------------------------------------------------------------- FFJORD's layer kinds


class IgnoreLinear(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self._layer = nn.Linear(dim_in, dim_out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._layer(x)


class ConcatLinear(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self._layer = nn.Linear(dim_in + 1, dim_out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        tt = torch.ones_like(x[:, :1]) * t
        return self._layer(torch.cat([tt, x], 1))


class ConcatLinearV2(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self._layer = nn.Linear(dim_in, dim_out)
        self._hyper_bias = nn.Linear(1, dim_out, bias=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._layer(x) + self._hyper_bias(t.view(1, 1))


class SquashLinear(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self._layer = nn.Linear(dim_in, dim_out)
        self._hyper = nn.Linear(1, dim_out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._layer(x) * torch.sigmoid(self._hyper(t.view(1, 1)))


class ConcatSquashLinear(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self._layer = nn.Linear(dim_in, dim_out)
        self._hyper_bias = nn.Linear(1, dim_out, bias=False)
        self._hyper_gate = nn.Linear(1, dim_out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self._layer(x) * torch.sigmoid(self._hyper_gate(t.view(1, 1))) + self._hyper_bias(t.view(1, 1))


LAYERS = {
    "ignore": IgnoreLinear, "concat": ConcatLinear, "concat_v2": ConcatLinearV2,
    "squash": SquashLinear, "concatsquash": ConcatSquashLinear,
}


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**2


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


ACTS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus, "relu": nn.ReLU,
    "elu": nn.ELU, "silu": nn.SiLU, "swish": Swish, "sin": Sine, "square": Square, "cube": Cube,
    "gelu": nn.GELU,
}


class FFJORDNet(nn.Module):
    """dims -> hidden... -> dims layers of one kind, the activation between them."""

    def __init__(self, kind: str, dims: int, hidden: tuple[int, ...], act: str) -> None:
        super().__init__()
        sizes = [dims, *hidden, dims]
        self.layers = nn.ModuleList(LAYERS[kind](a, b) for a, b in zip(sizes, sizes[1:]))
        self.activation_fns = nn.ModuleList(ACTS[act]() for _ in hidden)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        dx = y
        for index, layer in enumerate(self.layers):
            dx = layer(t, dx)
            if index < len(self.layers) - 1:
                dx = self.activation_fns[index](dx)
        return dx


class FFJORDFunc(nn.Module):
    """FFJORD's two levels, an odefunc around its network."""

    def __init__(self, kind: str, dims: int, hidden: tuple[int, ...], act: str) -> None:
        super().__init__()
        self.dim = dims
        self.diffeq = FFJORDNet(kind, dims, hidden, act)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        t = torch.as_tensor(t).to(y)
        return self.diffeq(t, y)


def make_ffjord(kind: str, dims: int = 2, hidden: tuple[int, ...] = (16, 16), act: str = "tanh") -> nn.Module:
    """An FFJORD-like odefunc `f(t, y)`; kind in KINDS, act in ACTS, `hidden` any tuple of widths (may be empty)."""
    return FFJORDFunc(kind, dims, tuple(hidden), act)


# ------------------------------------------------------------------------------------------------- common templates


class ODEDemo(nn.Module):
    """torchdiffeq's examples/ode_demo.py."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))
        for m in self.net.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, mean=0, std=0.1)
                nn.init.constant_(m.bias, val=0)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y**3)


class ODEDemoTrue(nn.Module):
    """The demo's true dynamics: one matrix on the cubed state, no bias, no parameters."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("true_A", torch.tensor([[-0.1, 2.0], [-2.0, -0.1]]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.mm(y**3, self.true_A)


class AutonomousMLP(nn.Module):
    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 12), nn.Softplus(beta=2.0, threshold=15.0), nn.Linear(12, 10, bias=False), nn.ELU(0.7),
            nn.Linear(10, 3),
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class Negated(nn.Module):
    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.net(y)


class Scaled(nn.Module):
    """Input standardised by buffers, output multiplied by a constant and by a learned vector."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, -0.2, 0.3]))
        self.register_buffer("std", torch.tensor([1.5, 0.5, 2.0]))
        self.log_scale = nn.Parameter(torch.randn(3) * 0.2)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.net((y - self.mean) / self.std) * self.log_scale.exp()


class EndsInActivation(nn.Module):
    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 9), nn.Linear(9, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.fc2(F.relu(self.fc1(y))))


class EndsInScaledActivation(nn.Module):
    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 9), nn.Linear(9, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 3.0 * torch.tanh(self.fc2(torch.sin(self.fc1(y)))) - 0.25


class OnlyLinear(nn.Module):
    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.linear(y)


class DoubleLinear(nn.Module):
    """Two linear layers with nothing between them (low-rank factors)."""

    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Linear(4, 2, bias=False), nn.Linear(2, 11), nn.Linear(11, 4)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.out(self.up(self.down(y)).tanh())


# --------------------------------------------------------------------------------------------- idioms for the time


class ConcatEveryWay(nn.Module):
    """Time concatenated to every layer's input, each time in another idiom, first or last, dim 1 or -1."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        sizes = [2, 6, 7, 8, 9, 5, 2]
        self.layers = nn.ModuleList(nn.Linear(a + 1, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.layers[0](torch.cat((torch.ones(y.shape[0], 1, dtype=y.dtype, device=y.device) * t, y), 1)))
        h = torch.tanh(self.layers[1](torch.cat([h, t.expand(h.shape[0], 1)], dim=-1)))
        h = torch.tanh(self.layers[2](torch.cat([t.expand_as(h[:, :1]), h], dim=-1)))
        h = torch.tanh(self.layers[3](torch.concat([h, torch.full_like(h[:, :1], 1.0) * t], dim=1)))
        h = torch.tanh(self.layers[4](torch.hstack([t.view(1, 1).repeat(h.size(0), 1), h])))
        return self.layers[5](torch.cat([torch.zeros_like(h[:, 0]).unsqueeze(1) + t, h], 1))


class TimeFullLike(nn.Module):
    """t read as a number. Not in FIELDS: the module itself has no gradient with respect to t."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.linear(torch.cat([y, torch.full_like(y[:, :1], t.item())], 1))


class BranchOnT(nn.Module):
    """Control flow on shapes, and a time vector made by unsqueeze."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if t.dim() == 0:
            t = t.unsqueeze(0).unsqueeze(0)
        if t.shape[0] != y.shape[0]:
            t = t.expand(y.shape[0], 1)
        if y.dim() != 2:
            raise ValueError("a batch of states is needed")
        return self.net(torch.cat([y, t], dim=1))


class ScaledTimeConcat(nn.Module):
    """An affine function of t is concatenated, twice."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        u = (2.0 * t - 1.0).reshape(1, 1).expand(y.shape[0], -1)
        return self.fc2(torch.tanh(self.fc1(torch.cat([u, y, 1 - u / 4], 1))))


class TimeFourier(nn.Module):
    """Sinusoids of t concatenated: a shift that is a function of time other than affine."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.tensor([1.0, 2.0, 3.0]))
        self.fc1, self.fc2 = nn.Linear(8, 10), nn.Linear(10, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        phase = t * self.frequency
        features = torch.cat([phase.sin(), phase.cos()]).expand(y.shape[0], -1)
        return self.fc2(F.softplus(self.fc1(torch.cat([y, features], dim=1))))


class TimeMLP(nn.Module):
    """FiLM: scale and shift from a small network of t."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 6), nn.SiLU(), nn.Linear(6, 16))
        self.fc1, self.fc2 = nn.Linear(2, 8), nn.Linear(8, 2)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        scale, shift = self.time(t.reshape(1, 1)).chunk(2, dim=-1)
        return self.fc2(torch.tanh(self.fc1(y) * (1 + scale) + shift))


class TimeScaledOutput(nn.Module):
    """The whole output multiplied by t: a gate that is not a sigmoid."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y) * (1.0 - t) + t


class GateThenLinear(nn.Module):
    """A gated, shifted affine layer followed by a linear layer without activation, then a second gate on a gate."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(2, 7), nn.Linear(7, 6), nn.Linear(6, 2)
        self.gate, self.gate2, self.shift = nn.Linear(1, 7), nn.Linear(1, 2), nn.Linear(1, 7)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        tt = t.view(1, 1)
        h = (self.fc1(y) + self.shift(tt)) * torch.sigmoid(self.gate(tt))
        h = torch.sigmoid(self.fc2(h))
        h = self.fc3(h) * self.gate2(tt).sigmoid()
        return h * torch.sigmoid(self.gate2(tt) * 2) - t


# -------------------------------------------------------------------------------------------- idioms for the weights


class RawParameters(nn.Module):
    """Weights as bare parameters, each product written another way."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 6, 7, 8, 5, 9, 3]
        self.W = nn.ParameterList(nn.Parameter(torch.randn(b, a) * 0.5) for a, b in zip(sizes, sizes[1:]))
        self.b = nn.ParameterList(nn.Parameter(torch.randn(b) * 0.5) for b in sizes[1:])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        W, b = self.W, self.b
        h = torch.tanh(y @ W[0].T + b[0])
        h = torch.relu(F.linear(h, W[1], b[1]))
        h = F.softplus(torch.einsum("bi,oi->bo", h, W[2]) + b[2])
        h = F.elu(torch.addmm(b[3], h, W[3].t()))
        h = F.silu(torch.matmul(W[4], h.unsqueeze(-1)).squeeze(-1) + b[4])
        return torch.matmul(h, W[5].transpose(0, 1)) + b[5]


class InputMajor(nn.Module):
    """Weights stored [in, out], split into a state part and a time part."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(1, 8))
        self.w2, self.b2 = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        h = y.mm(self.w1[1:]) + t * self.w1[:1] + self.b1
        return torch.tanh(h) @ self.w2 - self.b2


class SplitState(nn.Module):
    """Position and velocity halves, cut and joined again: a second-order system."""

    dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.force = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        q, p = y[:, :2], y[:, 2:]
        dq, dp = self.force(torch.cat([p, q], dim=-1)).chunk(2, dim=-1)
        return torch.cat([dp, -dq], dim=-1)


class StackedColumns(nn.Module):
    """Columns taken apart with `[..., i]`, put together with stack; a permutation by index."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y[..., 0], y[..., 1], y[..., 2]
        z = self.net(torch.stack([c, a, b], dim=-1))
        return z[:, [2, 0, 1]] * torch.tensor([1.0, -1.0, 2.0], dtype=y.dtype)


class WithDropout(nn.Module):
    """Captured only after `.eval()`."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
        self.eval()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class HandwrittenActivations(nn.Module):
    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in ((2, 6), (6, 7), (7, 5), (5, 6), (6, 8), (8, 2))])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        l1, l2, l3, l4, l5, out = self.layers
        h = l1(y)
        h = h * torch.sigmoid(h)
        h = l2(h)
        h = torch.square(h)
        h = l3(h)
        h = h * h * h
        h = l4(h).clamp(min=0)
        h = l5(h)
        h = h * h
        return out(h.pow(3))


class InPlace(nn.Module):
    """In-place activations and updates on its own tensors."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out = self.net(y)
        out *= 2.0
        out += t
        return out


FIELDS: dict[str, Callable[[], nn.Module]] = {
    **{f"ffjord_{kind}": (lambda kind=kind: make_ffjord(kind, 2, (9, 8), "tanh")) for kind in KINDS},
    **{f"ffjord_{kind}_three": (lambda kind=kind: make_ffjord(kind, 3, (6, 8, 5), "softplus")) for kind in KINDS},
    **{f"act_{act}": (lambda act=act: make_ffjord("concatsquash", 2, (6, 7), act)) for act in ACTS},
    **{f"no_hidden_{kind}": (lambda kind=kind: make_ffjord(kind, 3, (), "tanh")) for kind in KINDS},
    "one_hidden": lambda: make_ffjord("concat", 2, (8,), "tanh"),
    "ode_demo": ODEDemo, "ode_demo_true": ODEDemoTrue, "autonomous_mlp": AutonomousMLP, "negated": Negated,
    "scaled": Scaled, "ends_in_activation": EndsInActivation, "ends_in_scaled_activation": EndsInScaledActivation,
    "only_linear": OnlyLinear, "double_linear": DoubleLinear, "concat_every_way": ConcatEveryWay,
    "branch_on_t": BranchOnT, "scaled_time_concat": ScaledTimeConcat, "time_fourier": TimeFourier,
    "time_mlp": TimeMLP, "time_scaled_output": TimeScaledOutput, "gate_then_linear": GateThenLinear,
    "raw_parameters": RawParameters, "input_major": InputMajor, "split_state": SplitState,
    "stacked_columns": StackedColumns, "with_dropout": WithDropout, "handwritten_activations": HandwrittenActivations,
    "in_place": InPlace,
}
