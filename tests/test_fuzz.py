"""Random modules, pruned at random, against torchdiffeq on the module itself: values, solves, gradients, divergences.

SPARSEFLOW_FUZZ: how many modules (200; `make fuzz` takes more).  SPARSEFLOW_FUZZ_SEED: where the seeds start.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
import torch.nn.utils.prune as prune
import torchdiffeq
from torch import Tensor, nn

import sparseflow_kernels as sfk

F64 = torch.float64
COUNT, FIRST = int(os.environ.get("SPARSEFLOW_FUZZ", 200)), int(os.environ.get("SPARSEFLOW_FUZZ_SEED", 0))
BATCHES = 10  # modules a test
ACTIVATIONS = {
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus, "elu": nn.functional.elu,
    "silu": nn.functional.silu, "sin": torch.sin, "relu": torch.relu, "celu": lambda z: nn.functional.celu(z, 1.3),
    "none": lambda z: z,
}  # fmt: skip


class RandomModule(nn.Module):
    """A chain of layers as people write them, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.dim = draw.choice((1, 2, 3, 5))
        depth = draw.randrange(4)
        widths = [self.dim, *(draw.choice((1, 2, 5, 9, 17)) for _ in range(depth)), self.dim]
        self.time = [draw.choice(("none", "none", "concat", "shift", "gate", "wave")) for _ in widths[1:]]
        self.scales = [draw.choice((1.0, 1.0, 1.0, -0.5)) for _ in widths[1:]]
        self.acts = [draw.choice(tuple(ACTIVATIONS)) for _ in widths[1:-1]] + ["none"]
        self.before = draw.choice((None, None, None, "normalise", "cube"))
        pairs = list(zip(widths, widths[1:]))
        self.layers = nn.ModuleList(
            nn.Linear(a + (kind == "concat"), b, bias=draw.random() < 0.8) for (a, b), kind in zip(pairs, self.time)
        )
        self.times = nn.ModuleList(nn.Linear(2 if kind == "wave" else 1, b) for (_, b), kind in zip(pairs, self.time))
        self.register_buffer("spread", torch.rand(self.dim) + 0.5)
        if depth and widths[1] == self.dim and draw.random() < 0.3 and self.time[0] == self.time[1] != "concat":
            if widths[2] == self.dim:
                self.layers[1] = self.layers[0]  # one layer in two places
        for layer in set(self.layers):
            how, amount = draw.choice(("dense", "weights", "rows", "columns")), draw.choice((0.3, 0.7, 0.95))
            if how == "weights":
                prune.l1_unstructured(layer, "weight", amount=amount)
            elif how != "dense":
                prune.random_structured(layer, "weight", amount=amount, dim=0 if how == "rows" else 1)
            if draw.random() < 0.2:
                layer.weight_orig.requires_grad_(False) if how != "dense" else layer.weight.requires_grad_(False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.before is not None:
            y = y**3 if self.before == "cube" else (y - 0.1) / self.spread
        for layer, time, kind, scale, act in zip(self.layers, self.times, self.time, self.scales, self.acts):
            at = t.reshape(1, 1).to(y)
            z = layer(torch.cat([y, at.expand(len(y), 1)], 1) if kind == "concat" else y)
            if kind == "shift":
                z = z + time(at)
            elif kind == "gate":
                z = z * torch.sigmoid(time(at))
            elif kind == "wave":
                z = z + time(torch.cat([torch.sin(3.0 * at), torch.cos(at)], 1))
            y = ACTIVATIONS[act](scale * z if scale != 1.0 else z)
        return y


def close(got: Tensor, want: Tensor, what: str) -> None:
    scale = float(want.detach().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8 * max(1.0, scale), msg=lambda text: f"{what}: {text}")


def check(seed: int) -> None:
    module = RandomModule(seed).double()
    draw = random.Random(-1 - seed)
    batch = draw.choice((1, 2, 7, 33, 70))
    y0 = 0.5 * torch.randn(batch, module.dim, dtype=F64)
    field = sfk.compile(module, dim=module.dim)
    at = torch.tensor(draw.uniform(-2.0, 2.0), dtype=F64)
    close(field(at, y0), module(at, y0), "value")

    x = y0.clone().requires_grad_()
    (jacobian,) = [torch.stack([
        g for i in range(module.dim)
        for g in torch.autograd.grad(module(at, x)[:, i].sum(), x, allow_unused=True, materialize_grads=True)
    ], 1)]  # fmt: skip
    _, change = sfk.with_divergence(field)(at, (y0, y0.new_zeros(batch)))
    close(-change, jacobian.diagonal(dim1=1, dim2=2).sum(1), "divergence")

    method = draw.choice(("dopri5", "dopri5", "bosh3", "fehlberg2", "rk4", "euler"))
    if not {"relu", "elu", "celu"}.isdisjoint(module.acts):
        method = "rk4"  # at a kink, rounding decides how an adaptive method steps
    fixed = method in ("rk4", "euler")
    options = {"step_size": 0.1} if fixed else {"first_step": 0.05}  # torchdiffeq differentiates one that it chooses
    t = torch.tensor([0.0, 0.3, 0.7] if draw.random() < 0.7 else [0.5, 0.1], dtype=F64)
    settings = {"method": method, "rtol": 1e-8, "atol": 1e-8, "options": options}
    weights = torch.randn(len(t), batch, module.dim, dtype=F64)
    theirs, ours = y0.clone().requires_grad_(), y0.clone().requires_grad_()
    try:
        want = torchdiffeq.odeint(module, theirs, t, **settings)
    except AssertionError:  # the step underflows: the solution explodes
        return
    got = sfk.odeint(field, ours, t, **settings)
    close(got, want, f"solve by {method}")
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    close(ours.grad, theirs.grad, f"gradient in y0 by {method}")
    parameters = dict(module.named_parameters())
    for name, held in field.held(lambda p: torch.zeros_like(p) if p.grad is None else p.grad).items():
        gradient = parameters[name].grad
        gradient = torch.zeros_like(parameters[name]) if gradient is None else gradient
        own = gradient if held.elements is None else gradient.reshape(-1)[held.elements]
        close(held.values, own, f"gradient in {name} by {method}")
    field.copy_to(module)
    close(module(at, y0), field(at, y0), "copied back")


@pytest.mark.parametrize("start", range(0, COUNT, BATCHES))
def test_random_modules(start: int) -> None:
    for seed in range(FIRST + start, FIRST + min(COUNT, start + BATCHES)):
        try:
            check(seed)
        except Exception as error:
            error.add_note(f"SPARSEFLOW_FUZZ_SEED={seed} SPARSEFLOW_FUZZ=1 draws this module again")
            raise
