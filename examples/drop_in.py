"""A torchdiffeq program on pruned weights: the import, and one call to compile, are all that changed."""

import torch
from torch import nn

import sparseflow_kernels as torchdiffeq


class Field(nn.Module):
    """Your own class: nothing of this package in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2))

    def forward(self, t, y):
        return self.net(y)


torch.manual_seed(0)
f = torchdiffeq.prune_weights_(Field(), keep=0.1)
field = torchdiffeq.compile(f)

y0, t = torch.randn(256, 2), torch.linspace(0.0, 2.0, 20)
with torch.no_grad():
    ys = torchdiffeq.odeint(field, y0, t, rtol=1e-6, atol=1e-6)  # natively
    before = torchdiffeq.odeint(f, y0, t, rtol=1e-6, atol=1e-6)  # a plain module: torchdiffeq itself

print(
    f"{field.nnz} multiply-adds per sample and evaluation, {sum(p.numel() for p in f.parameters())} parameters before"
)
print(f"largest difference over {len(t)} output times: {float((ys - before).abs().max()):.1e}")
