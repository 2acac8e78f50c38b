"""What the engines in C++ have in common on Python's side: how a solve's plain data is handed over, and whose gradient is
whose."""

from __future__ import annotations

from typing import Callable

import torch
from torch import Tensor

from ..field import VectorField
from ..numerics.step_control import StepOptions
from ..numerics.tableaus import FixedTableau, Tableau


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def native_tableau(tableau: Tableau | FixedTableau) -> dict:
    if isinstance(tableau, Tableau):
        return dict(adaptive=True, order=tableau.order, c=tableau.c, a=tableau.a, b=tableau.b,
                    b_error=tableau.b_error, b_mid=tableau.b_mid)
    # a fixed tableau lists its first stage, at node 0, like the others; native code takes that stage for granted
    return dict(adaptive=False, order=tableau.order, c=tableau.c[1:], a=tableau.a[1:], b=tableau.b, b_error=(), b_mid=())


def native_options(options: StepOptions) -> dict:
    return dict(
        min_step=options.min_step, max_step=options.max_step, first_step=options.first_step, safety=options.safety,
        ifactor=options.ifactor, dfactor=options.dfactor, max_num_steps=options.max_num_steps,
        step_t=sorted(options.step_t or ()), jump_t=sorted(options.jump_t or ()),
    )


def field_gradients(
    field: VectorField, writer, of_matrix: Callable[[int], Tensor], of_modulation: Callable[[int, str], Tensor]
) -> tuple[Tensor, ...]:
    """The gradient of every tensor of the field, in its dtype, from those of an adjoint program's matrices and modulations
    (`adjoint.AdjointWriter`): matrices that were computed from the weights hand theirs on by autograd."""
    dtype = field.dtype
    values = [of_matrix(matrix) for matrix in writer.weights]
    if writer.derived_from:
        with torch.enable_grad():
            lent = field.map_tensors(lambda tensor: tensor.detach().requires_grad_())
            leaves = [layer.values for layer in lent.layers]
            made = [(function(lent), of_matrix(matrix)) for matrix, function in writer.derived_from]
            made = [(out, grad.to(dtype)) for out, grad in made if out.requires_grad]
            if made:
                carried = torch.autograd.grad(
                    [out for out, _ in made], leaves, [grad for _, grad in made], allow_unused=True
                )
                values = [own if more is None else own + more for own, more in zip(values, carried)]
    found: list[Tensor] = []
    for value, layer, modulation in zip(values, field.layers, writer.modulations):
        for name, _ in layer.tensors():
            found.append((value if name == "values" else of_modulation(modulation, name)).to(dtype))
    return tuple(found)
