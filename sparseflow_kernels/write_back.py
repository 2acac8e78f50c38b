"""The way back: a compiled field's numbers into the parameters of the module that it was compiled from."""

from __future__ import annotations

import torch
from torch import nn

from .capture import capture_with_origins
from .field import Layer, Part, Pattern
from .field.layout import State
from .field_parameters import FieldParameters, time_formulas
from .reading import Reading
from .report import part_name
from .trained import Held, Shares, without_zeros, write


@torch.no_grad()
def write_back(field: FieldParameters, module: nn.Module, like: State | None) -> None:
    """`CompiledField.copy_to`, which says what is written and raised. like: an example of the state, where one is
    needed."""
    held, parameters = field.held(), dict(module.named_parameters())
    with without_zeros(parameters, held, field.shares.trained):
        original, origins = capture_with_origins(module, field.dim if field.layout is None else None, like)
        theirs = Held.by_module(module)
        for name in held.keys() & theirs.keys():  # what is trained was settled when this was compiled
            theirs[name].trained = field.shares.trained[name]
        found = Reading(original, origins, theirs).simplified()
    _check_alike(field, found)
    shares = Shares(found.origins, theirs, (name for formula in time_formulas(found.field) for name in formula.names))
    if shares != field.shares:
        raise ValueError(
            "copy_to: the module computes its field from its parameters in another way than the one this was compiled "
            "from (shared, scaled or computed weights, or constants that were none)"
        )
    for own_name, (name, elements) in zip(field.shares.recipe.held, shares.recipe.held.items()):
        write(parameters[name], elements, field.entry(own_name))
    for number, name in field.shares.own:
        origin, tensor = found.origins[number, name], field.layers[number].tensor(name)
        for which, parameter in enumerate(origin.parameters):
            own = origin.parameter == which
            write(parameters[parameter], origin.index[own], tensor[own.to(tensor.device)])


def _check_alike(field: FieldParameters, found: Reading) -> None:
    """Raises ValueError where the layers of the module's field are not those of the compiled one."""
    mine, theirs = field.skeleton.layers, found.field.layers
    for number, (layer, other) in enumerate(zip(mine, theirs)):
        if not _same_layer(other, layer):
            raise ValueError(
                f"copy_to: layer {number} ({layer.name!r}) of the compiled field is {_in_words(layer)}, the module now "
                f"gives {_in_words(other)}; it is not the module this was compiled from, or its masks have changed"
            )
    if len(theirs) != len(mine):
        raise ValueError(f"copy_to: the compiled field has {len(mine)} layers, the module {len(theirs)}")


def _in_words(layer: Layer | Part) -> str:
    if isinstance(layer, Part):
        return "numbers" if layer.pattern is None else f"{list(layer.pattern.shape)} with {layer.pattern.nnz} weights"
    return (
        f"{layer.out_features} x {layer.in_features} with {layer.pattern.nnz} weights, {layer.activation.name}, "
        f"gate {part_name(layer.gate)}, shift {part_name(layer.shift)}"
    )


def _same_layer(one: Layer | Part, other: Layer | Part) -> bool:
    if isinstance(one, Part) or isinstance(other, Part):
        return type(one) is type(other) and one.values.shape == other.values.shape and (
            one.pattern is other.pattern if one.pattern is None or other.pattern is None
            else _same_pattern(one.pattern, other.pattern)
        )  # fmt: skip
    return (
        _same_pattern(one.pattern, other.pattern)
        and one.activation == other.activation
        and [name for name, _ in one.tensors()] == [name for name, _ in other.tensors()]
    )


def _same_pattern(one: Pattern, other: Pattern) -> bool:
    return one.shape == other.shape and torch.equal(one.row_ptr, other.row_ptr) and torch.equal(one.col, other.col)
