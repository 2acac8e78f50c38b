"""Blocks of a matrix that are nearly full run in kernels of their own, which must not show in a single bit."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import states
from random_fields import random_field

from sparseflow_kernels import divergence
from sparseflow_kernels.engines.cpu import CpuEngine
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import Activation, Layer, Pattern, VectorField

pytest.importorskip("sparseflow_kernels._cpu")
F32, F64 = torch.float32, torch.float64
T = 0.375
NEIGHBOURS = 3  # sparse rows put beside every row, so that no four rows together are nearly full


def two_layers(mask: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor) -> VectorField:
    """x -> tanh(W x), of which `outputs` are the state again."""
    hidden, dim = mask.shape
    first = Pattern.from_mask(mask)
    second = Pattern.from_mask(torch.nn.functional.one_hot(outputs, hidden) > 0)
    ones = torch.ones(second.nnz, dtype=weight.dtype)
    return VectorField([
        Layer(first, weight[mask], torch.zeros(hidden, dtype=weight.dtype), None, None, Activation("tanh"), "first"),
        Layer(second, ones, torch.zeros(dim, dtype=weight.dtype), None, None, Activation(), "second"),
    ])


def alone_and_in_sparse_company(dim: int, density: float, dtype: torch.dtype):
    """The same nearly full rows twice: as a matrix of their own, and with sparse rows between them."""
    generator = torch.Generator().manual_seed(dim)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    mask = uniform(dim, dim) < density
    weight = ((uniform(dim, dim) - 0.5) / dim**0.5).to(dtype)
    more_mask, more_weight = uniform(dim, 1 + NEIGHBOURS, dim) < 0.2, uniform(dim, 1 + NEIGHBOURS, dim).to(dtype)
    more_mask[:, 0], more_weight[:, 0] = mask, weight
    rows = torch.arange(dim)
    company = two_layers(more_mask.flatten(0, 1), more_weight.flatten(0, 1), rows * (1 + NEIGHBOURS))
    return two_layers(mask, weight, rows), company, more_mask


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("dim,density", [(64, 1.0), (61, 0.9), (330, 0.8)])  # the last one in several blocks of columns
def test_the_bits_are_those_of_sparse_rows(dim, density, dtype):
    alone, company, more_mask = alone_and_in_sparse_company(dim, density, dtype)
    one, other = CpuEngine(alone), CpuEngine(company)
    x, cotangent = states(70, dim, dtype)
    for width in range(len(one.program.widths())):
        one.program.force_width(width), other.program.force_width(width)
        assert torch.equal(one.evaluate(T, x), other.evaluate(T, x)), width
    gradients = [e.evaluate_backward(T, x, None, cotangent, None, {"tensors", "x"}) for e in (one, other)]
    names = [dict(zip([n for n, _ in field.tensors()], g.tensors)) for field, g in zip((alone, company), gradients)]
    weights = [next(v for n, v in g.items() if "first" in n or "0" in n) for g in names]
    full_rows = torch.arange(dim * (1 + NEIGHBOURS)) % (1 + NEIGHBOURS) == 0
    of_full_rows = full_rows[more_mask.flatten(0, 1).nonzero()[:, 0]]
    assert torch.equal(weights[0], weights[1][of_full_rows])


@pytest.mark.parametrize("density", [0.5, 0.7, 0.85, 1.0])
@pytest.mark.parametrize("kind", [None, "exact", "hutchinson"])
def test_nearly_full_fields_agree_with_the_reference(kind, density):
    """Row and column counts that fill no group, through all kernels that have dense groups."""
    for sizes in ((3, 5, 3), (6, 33, 41, 6), (5, 70, 19, 9, 5)):
        field = random_field(sizes, density, gate=True, shift=True, seed=len(sizes)).map_tensors(lambda t: t.requires_grad_())
        plan = None if kind is None else divergence.plan(field, kind)
        cpu, reference = CpuEngine(field, plan), ReferenceEngine(field, plan)
        x, noise = states(37, sizes[0])
        noise = noise if kind == "hutchinson" else None
        grad_f, grad_trace = states(37, sizes[0], seed=1)[0], torch.linspace(-1, 1, 37, dtype=F64)
        t, start = torch.tensor(T, dtype=F64), x.clone().requires_grad_()
        if kind is None:
            wanted = (reference.evaluate(t, start),)
            loss = (wanted[0] * grad_f).sum()
        else:
            wanted = reference.evaluate_with_divergence(t, start, noise)
            loss = (wanted[0] * grad_f).sum() + (wanted[1] * grad_trace).sum()
        for width in range(len(cpu.program.widths())):
            cpu.program.force_width(width)
            found = (cpu.evaluate(T, x),) if kind is None else cpu.evaluate_with_divergence(T, x, noise)
            torch.testing.assert_close(found, wanted)
        if cpu.no_gradient({"x", "tensors"}):
            continue
        tensors = [tensor for _, tensor in field.tensors()]
        gradients = torch.autograd.grad(loss, [start, *tensors], allow_unused=True, materialize_grads=True)
        backward = cpu.evaluate_backward(T, x, noise, grad_f, None if kind is None else grad_trace, {"x", "tensors"})
        torch.testing.assert_close((backward.x, *backward.tensors), gradients)
