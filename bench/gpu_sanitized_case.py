"""What compute-sanitizer watches (gpu_sanitize): `python bench/gpu_sanitized_case.py ENGINE`. A chain, and a graph with sums
of rows and a tangent."""

from __future__ import annotations

import dataclasses
import math
import sys

import torch
from gpu_measure import training_run

from sparseflow_kernels.analysis import graph_training, peers
from sparseflow_kernels.analysis.graph_problems import GRAPHS
from sparseflow_kernels.analysis.problems import FIELDS, make_problem
from sparseflow_kernels.compiled_field import compile as compile_field

BATCH = 33


def main(engine: str) -> None:
    device = torch.device("cpu" if engine in ("cpu", "reference") else "cuda")
    problem = make_problem(dataclasses.replace(FIELDS["toy"], batch=BATCH), 0.1)
    field = compile_field(problem.module, "reference").vector_field
    compiled = compile_field(field.map_tensors(lambda tensor: tensor.detach().to(device)), engine)
    there = problem.on(device)
    there = dataclasses.replace(there, rtol=1e-3, atol=1e-3)
    peers.run_of(compiled, there)()
    training_run(compiled, there)()
    sizes = (("dim", 6), ("width", 40), ("blocks", 2))
    graph = dataclasses.replace(GRAPHS["resnet"], sizes=sizes, shape=(BATCH, 6)).problem(0.5)
    graph = dataclasses.replace(graph.on(device), rtol=1e-3, atol=1e-3)
    outcome = graph_training.sparseflow_step(graph, engine)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    finite = all(bool(torch.isfinite(p.grad).all()) for p in compiled.parameters() if p.grad is not None)
    finite &= math.isfinite(outcome.loss)
    print(f"{engine}: {'finite' if finite else 'NOT FINITE'}")
    if not finite:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
