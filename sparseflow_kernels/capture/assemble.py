"""From the rows of the result back to y: the chain of layers of a VectorField, with the sources of its tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..field import IDENTITY, Activation, Layer, LinearShift, Pattern, SigmoidGate, TimeFunction, VectorField
from ..origin import Key, Origin
from ..trained import Held, starts_at_zero
from .algebra import apply
from .operations import aten
from .refusal import NotFinite
from .replay import TimeFormula
from .rows import Affine, Hidden
from .tracer import Tracer
from .values import Constant
from .zeros import take_zeros


def assemble(tracer: Tracer, last: Affine, root: Hidden) -> tuple[VectorField, dict[Key, Origin]]:
    chain: list[tuple[Affine, Activation]] = []
    affine, activation = last, IDENTITY
    while True:
        parent = root if affine.parent is None else affine.parent.resolve()[0]
        chain.append((tracer.table.onto(affine, parent), activation))
        if parent is root:
            break
        affine, activation = parent.pre, parent.activation
    layers, notes, origins = [], [], {}
    for index, (affine, activation) in enumerate(reversed(chain)):
        name = affine.name or (f"layer {index}" if affine.weight is not None else f"layer {index} (diagonal)")
        layer, constants = _layer(tracer, affine, activation, name)
        layers.append(layer)
        origins.update({(index, key): tracer.parameters.origin(value) for key, value in constants.items()})
        if layer.pattern.nnz == 0:
            notes.append(f"capture: layer {index} ({name}) has no weights left")
        for kind in ("gate", "shift"):
            if isinstance(getattr(layer, kind), TimeFunction):
                notes.append(f"capture: the {kind} of layer {index} ({name}) is kept as a general function of t")
    return VectorField(layers, notes), origins


def _layer(tracer: Tracer, a: Affine, activation: Activation, name: str) -> tuple[Layer, dict[str, Constant]]:
    weight = tracer.table.dense(a)
    mask = (weight.value != 0).cpu()
    if not bool(mask.all()):
        held = Held.by_module(tracer.module, tracer.seen.moving, tracer.seen.zeros)
        start = starts_at_zero(tracer.parameters.origin(weight), held)
        mask |= start.view(mask.shape)
        take_zeros(weight, ~mask, tracer.parameters, held)
    entries = [Constant(index.to(weight.value.device)) for index in mask.nonzero().unbind(1)]
    constants = {"values": apply(aten.index.Tensor, weight, entries), "bias": a.bias}

    def own(key: str) -> Tensor:
        value = constants[key].value
        if not bool(torch.isfinite(value).all()):
            raise NotFinite(f"layer {name!r}: {key} computed from the weights holds NaN or infinite values")
        return value.detach().to(tracer.table.dtype).clone()

    modulation = {}
    parts = (("gate", a.gate, "sigmoid", SigmoidGate), ("shift", a.shift, "affine", LinearShift))
    for kind, part, form, native in parts:
        if part is None:
            continue
        pair = getattr(part, form)
        if pair is None:
            modulation[kind] = TimeFunction(TimeFormula(part.node, tracer.table.dtype, tracer.parameters.value))
        else:
            constants[f"{kind}.slope"], constants[f"{kind}.offset"] = pair
            modulation[kind] = native(own(f"{kind}.slope"), own(f"{kind}.offset"))
    layer = Layer(Pattern.from_mask(mask), own("values"), own("bias"), activation=activation, name=name, **modulation)
    return layer, constants
