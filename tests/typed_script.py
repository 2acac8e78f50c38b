"""A user's script: what the package's types say of it is checked by mypy --strict (test_types.py), and it runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sparseflow_kernels as sfk
from sparseflow_kernels import data, flows, pruning, training


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.net(y)
        return out


def solve() -> None:
    module = Field()
    pruned: Field = sfk.prune_weights_(module, keep=0.5)
    field: sfk.CompiledField = sfk.compile(pruned, engine="auto", live=True)
    y0, t = torch.randn(4, 3), torch.linspace(0.0, 1.0, 3)
    y = sfk.odeint(field, y0, t, rtol=1e-5, atol=1e-5, method="dopri5", options={"max_num_steps": 1000})
    assert isinstance(y, Tensor)
    aug = sfk.with_divergence(field, "hutchinson", noise="rademacher")
    solution: sfk.Solution = sfk.solve(aug, (y0, torch.zeros(4)), t)
    stats = solution.stats
    nfe: int = stats.nfe
    engine: str = stats.engine
    reason: str | None = stats.reason
    print(nfe, engine, reason, field.report(), field.nnz, solution.ys)
    with sfk.accelerate() as context:
        sfk.odeint(module, y0, t)
    print(context.report())


def wrong(field: sfk.CompiledField, y0: Tensor, t: Tensor) -> None:
    """Never called."""
    sfk.compile(field, engin="cpu")  # type: ignore[call-arg]
    sfk.odeint(field, y0)  # type: ignore[call-arg]
    sfk.with_divergence(field, "extract")  # type: ignore[arg-type]
    print(sfk.solve(field, y0, t).stats.nfes)  # type: ignore[attr-defined]
    flows.ContinuousFlow(field, dim="2")  # type: ignore[arg-type]
    sfk.prune_weights_(field, keep="0.1")  # type: ignore[arg-type]


def train() -> None:
    moons: data.Dataset = data.load("moons", n=200)
    flow = flows.ContinuousFlow(flows.mlp_field(2, (8,)), dim=2, divergence="exact")
    history = training.train(flow, moons, steps=2, batch=32)
    print(history[-1]["nll"])
    for cycle in sfk.sparse_flow(flow, moons, keeps=(0.5,), steps=2, batch=32):
        nll: float = cycle.nll
        print(nll, cycle.flow.sample(3), cycle.flow.log_prob(moons.test))
    kept: float = pruning.keep_ratio(flow)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    report = sfk.sparsify_(sfk.prune_neurons_(flows.mlp_field(2, (8,)), keep=0.5))
    print(kept, model, report, sfk.build_info()["version"], sfk.get_num_threads())


solve()
train()
