"""What is compiled: a field read from a module, or a field that is data, simplified; and where its numbers come
from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Mapping

import torch
from torch import Tensor, nn

from .capture import capture_with_origins, check_like
from .field import GraphField, UnsupportedFieldError, VectorField
from .field.layout import State
from .field_parameters import FieldParameters
from .origin import Key, Origin
from .simplify import simplify
from .simplify_graph import simplify_graph
from .trained import Held, zeros_to_keep


@dataclass
class Reading:
    """origins: of the field's tensors.  held: the parameters that these name.  told: what was simplified."""

    field: VectorField | GraphField
    origins: dict[Key, Origin]
    held: dict[str, Held]
    told: str = ""

    def simplified(self) -> "Reading":
        """The field as it is packed."""
        if isinstance(self.field, GraphField):
            graph, origins, told = simplify_graph(self.field, self.origins)
            return Reading(graph, origins, self.held, told)
        field, report = simplify(self.field, self.origins, zeros_to_keep(self.origins, self.held))
        return Reading(field, report.origins, self.held, str(report))


def read(
    source: nn.Module | VectorField | GraphField, dim: int | None, like: State | None,
    moving: Mapping[str, Tensor] | None = None, zeros: bool = False,
) -> Reading:  # fmt: skip
    """Of a module, a field, or the present values of a compiled field. moving, zeros: as of `Held.by_module`, and as
    what is being collected has them (`capture.seen`).

    Raises UnsupportedFieldError, ValueError and TypeError as `compile` does.
    """
    if isinstance(source, FieldParameters):
        field = source.vector_field
        present = zip(source.origins.items(), field.tensors())
        origins = {key: replace(origin, value=tensor.detach()) for (key, origin), (_, tensor) in present}
        return Reading(field, origins, source.held())
    if isinstance(source, (VectorField, GraphField)):
        return Reading(source, *Held.by_tensors(source))
    return Reading(*capture_with_origins(source, dim, like), Held.by_module(source, moving, zeros))


def check_fits(field: VectorField | GraphField, like: State) -> None:
    """Raises ValueError, TypeError or UnsupportedFieldError where `like` is no state of this field."""
    if isinstance(field, GraphField) and not field.layout.plain:
        if (reason := field.layout.fits(like)) is not None:
            raise ValueError(f"like: {reason}")
        return
    check_like(like, field.dim)
    if (like.dtype, like.device) != (field.dtype, field.device):
        raise TypeError(f"like is {like.dtype} on {like.device}, the field {field.dtype} on {field.device}")
    reason = field.refused(like.dim())
    if reason is not None:
        raise UnsupportedFieldError(f"like: {reason}")


def shapes_of(state: State) -> tuple:
    """The shape of a state that is a tensor, the shapes of one that is a tuple."""
    return tuple(state.shape) if isinstance(state, Tensor) else tuple(tuple(part.shape) for part in state)


def example_of(shapes: tuple, device: torch.device, dtype: torch.dtype) -> State:
    """A state of these shapes (`shapes_of`), the same numbers at every call."""
    if shapes and isinstance(shapes[0], tuple):
        return tuple(example_of(shape, device, dtype) for shape in shapes)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shapes, generator=generator, dtype=torch.float64).to(device, dtype)


def state_of(field: VectorField | GraphField, like: State | None) -> State:
    """A state to try the module with that was read: a copy of `like`, where there is one."""
    if isinstance(like, tuple):
        return tuple(part.detach().clone() for part in like)
    if like is not None:
        return like.detach().clone()
    axes = next(axes for axes in (2, 1, 3, 4) if field.refused(axes) is None)
    return example_of((2,) * (axes - 1) + (field.dim,), field.device, field.dtype)
