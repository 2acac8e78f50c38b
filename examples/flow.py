"""A small flow on two moons: train, prune, retrain, compile; then densities and samples from the compiled one."""

import sys

import torch

import sparseflow_kernels as sfk
from sparseflow_kernels import data
from sparseflow_kernels.flows import mlp_field
from sparseflow_kernels.training import evaluate_nll

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100  # per cycle; a quarter of a minute
torch.manual_seed(0)
moons = data.load("moons")
flow = sfk.ContinuousFlow(mlp_field(2, (32, 32)), dim=2, rtol=1e-3, atol=1e-3)
options = {"steps": steps, "batch": 256, "lr": 2e-2, "lr_end": 2e-3}

for cycle in sfk.sparse_flow(flow, moons, keeps=(0.5,), **options):
    print(f"keep {cycle.keep:g}: {cycle.size} parameters, validation NLL {cycle.nll:.3f}", flush=True)

compiled = cycle.flow.compile().eval()
print(f"test NLL {evaluate_nll(compiled, moons.test):.3f} with {compiled.stats.nfe} evaluations")
print(f"samples: {list(compiled.sample(1000).shape)}")
