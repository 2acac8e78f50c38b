"""A module read and run: the field, and what running the module has shown of what a live field has to watch."""

from __future__ import annotations

from typing import Callable

import torch
from torch import nn

from .capture.context import attributes
from .capture.seen import Seen, collecting
from .counting import Counters
from .field import GraphField, UnsupportedFieldError, VectorField
from .field.layout import State
from .field_parameters import FieldParameters, time_formulas
from .live import Run, may_move
from .own_gradients import check_own_gradients
from .reading import Reading, read, state_of
from .warn import warn


def read_and_run(
    source: nn.Module | VectorField | GraphField, dim: int | None, like: State | None, live: bool,
    moving: frozenset[str], field_of: Callable[[Reading, nn.Module], Callable[..., State]], zeros: bool = False,
) -> tuple[Reading, Run | None, Seen]:  # fmt: skip
    """The field, and of one that is live what running the module has shown. Tensors beside the parameters are read like
    these where they are moving or require a gradient, if the field can be read so.

    field_of: gives the field that was read over the module's own parameters, in plain torch. Raises
    UnsupportedFieldError, ValueError and TypeError as `compile` does.
    """
    module = source if isinstance(source, nn.Module) and not isinstance(source, FieldParameters) else None
    tensors = {}
    if live and module is not None:
        tensors = {
            name: tensor for name, tensor in attributes(module)
            if (name in moving or tensor.requires_grad) and may_move(tensor)
        }  # fmt: skip
    first: Exception | None = None
    for these in (tensors, {}) if tensors else ({},):
        try:
            with collecting(these, zeros) as seen:
                found = read(source, dim, like, these, zeros)
                if module is not None:
                    _check_gradients(module, found, like, seen, field_of)
                run = _run_of(module, found, like, seen) if live and module is not None else None
        except (UnsupportedFieldError, TypeError, ValueError) as error:
            first = first or error  # with them it says what is the matter
            if these:
                continue
            raise first from first.__cause__
        kind = found.field.dtype, found.field.device
        if not these or all((tensor.dtype, tensor.device) == kind for tensor in these.values()):
            if not any(name in these for formula in time_formulas(found.field) for name in formula.names):
                return found, run, seen
    raise AssertionError("unreachable")


def _check_gradients(
    module: nn.Module, found: Reading, like: State | None, seen: Seen, field_of: Callable[..., Callable[..., State]]
) -> None:
    time = torch.zeros((), dtype=found.field.dtype, device=found.field.device)

    def of_field() -> Callable[[State], State]:
        field = field_of(found, module)
        return lambda state: field(time, state)

    check_own_gradients(module, lambda state: module(time, state), of_field, state_of(found.field, like), seen)


def _run_of(module: nn.Module, found: Reading, like: State | None, seen: Seen) -> Run:
    time = torch.zeros((), dtype=found.field.dtype, device=found.field.device)
    counters = Counters(module, lambda: module(time, state_of(found.field, like)))
    origins = list(found.origins.values())
    read = frozenset().union(*(origin.parameters for origin in origins), *(one.needs_whole() for one in origins))
    moving = frozenset(seen.moving) & read
    flags = frozenset(name for name, parameter in module.named_parameters() if id(parameter) in seen.flags)
    answers = seen.answers(module, found.field.dtype)
    return Run(counters, seen.unread(module), answers, moving, seen.zeros, seen.reached, flags)


def tell_what_was_taken(module: nn.Module, found: Reading, seen: Seen) -> None:
    """Of a field with parameters of its own, which is not compiled anew."""
    if (answers := seen.answers(module, found.field.dtype, zeros=False)) is None:
        return
    context = getattr(found.field, "read_context", None)
    if context is not None and any(leaf.name in context.tensors for leaf in answers.leaves):
        context.check = answers.same
    trained = sorted(leaf.name for leaf in answers.leaves if leaf.name in found.held and found.held[leaf.name].trained)
    if trained:
        warn(
            f"compile: forward makes a branch or a position of the parameter {trained[0]!r}, which stays what it is "
            "now; where it is trained, compile with live=True"
        )
