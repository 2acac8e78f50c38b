"""Random sparse vector fields as plain data, and what autograd says of them; shared by several test files."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from sparseflow_kernels.field import Activation, GraphField, Layer, LinearShift, Pattern, SigmoidGate, VectorField
from sparseflow_kernels.field.graph import evaluate


def random_field(
    sizes: Sequence[int], density: float = 0.5, *, activation: str | Activation = "tanh", gate: bool = False,
    shift: bool = False, output_gate: bool | None = None, seed: int = 0, dtype: torch.dtype = torch.float64,
) -> VectorField:
    """A field of the given widths (state first and last), each weight present with probability `density`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if isinstance(activation, str):
        activation = Activation(activation)
    layers = []
    for number, (into, out) in enumerate(zip(sizes, sizes[1:])):
        final = number == len(sizes) - 2
        gated = output_gate if final and output_gate is not None else gate
        pattern = Pattern.from_mask(torch.rand(out, into, generator=generator) < density)
        layers.append(Layer(
            pattern, normal(pattern.nnz) / max(1.0, density * into) ** 0.5, 0.3 * normal(out),
            SigmoidGate(normal(out), normal(out)) if gated else None,
            LinearShift(normal(out), normal(out)) if shift else None,
            Activation() if final else activation, f"layer{number}",
        ))
    return VectorField(layers)


def plain_forward(field: VectorField, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(f(t, y), pre-activations) written out with torch's own activations, apart from the package's table."""
    functions = {
        "identity": lambda z: z, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "sin": torch.sin,
        "softplus": torch.nn.functional.softplus, "elu": torch.nn.functional.elu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu,
        "square": lambda z: z**2, "cube": lambda z: z**3,
    }
    if isinstance(field, GraphField):
        rows = y.reshape(-1, y.shape[-1])
        inputs, parts = {"state": rows, "time": t.reshape(1, 1)}, [part.values for part in field.parts]
        return evaluate([field.output], inputs, parts.__getitem__)[0].expand_as(rows).reshape(y.shape), []
    pre_activations = []
    for layer in field.layers:
        gate, shift = layer.modulation(t)
        z = y @ layer.weight.T + layer.bias
        z = z if gate is None else z * gate
        z = z if shift is None else z + shift
        pre_activations.append(z)
        y = functions[layer.activation.name](z, *layer.activation.params)
    return y, pre_activations


def jacobians(f, x: Tensor) -> Tensor:
    """[batch, dim, dim] of a batch-wise function by autograd, with graph."""
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = f(x)
    rows = [
        torch.autograd.grad(y[:, m].sum(), x, create_graph=True, allow_unused=True)[0] if y.requires_grad else None
        for m in range(x.shape[1])
    ]
    return torch.stack([torch.zeros_like(x) if row is None else row for row in rows], 1)
