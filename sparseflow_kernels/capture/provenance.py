"""Which parameter entry each entry of a constant is: followed through the operations, so that a changed field can be
written back into its module."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .operations import STRUCTURAL, base_name
from .values import NOT_A_PARAMETER, NOT_PLAIN, Constant

Origin = tuple[Tensor | None, Tensor | None]  # source and factor, as in Constant


def trace(func, args, kwargs, values: list) -> list[Origin]:
    """The origin of every result of an operation on constants."""
    constants = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Constant)]
    if all(a.source is None for a in constants):
        return [(None, None)] * len(values)
    base = base_name(func)
    if base == "_to_copy":
        return [(constants[0].source, constants[0].factor)]
    if base in STRUCTURAL and base != "copy" or base == "index_put" and len(args) == 3:
        moved = (tree_leaves(_moved(func, args, kwargs, part)) for part in ("sources", "factors"))
        return list(zip(*moved))
    origin = _of_arithmetic(base, args, kwargs)
    if origin is not None:
        return [tuple(part.expand(values[0].shape) for part in origin)]
    return [(torch.full(v.shape, NOT_PLAIN), None) if isinstance(v, Tensor) else (None, None) for v in values]


def _moved(func, args, kwargs, part: str) -> Any:
    def swap(a):
        if not isinstance(a, Constant):
            return a
        return getattr(a, part) if a.value.is_floating_point() else a.value.cpu()

    return func(*tree_map(swap, args), **tree_map(swap, kwargs))


def _of_arithmetic(base: str, args, kwargs) -> Origin | None:
    if base not in ("neg", "add", "sub", "mul", "div", "mm", "mv", "addmm"):
        return None
    if any(v != 1 for v in kwargs.values()):  # alpha, beta, rounding_mode
        return None
    operands = [a if isinstance(a, Constant) else Constant(torch.as_tensor(a)) for a in args]
    minus = Constant(torch.tensor(-1.0))
    match base, operands:
        case "neg", [a]:
            return _product(a, minus)
        case "add", [a, b]:
            return _sum(a, b)
        case "sub", [a, b]:
            return _sum(a, Constant(-b.value, *_product(b, minus)))
        case "mul", [a, b]:
            return _product(a, b)
        case "div", [a, b]:
            return None if b.source is not None else _product(a, Constant(1.0 / b.value.double()))
        case "mm", [a, b]:
            return _matrix_product(a, b)
        case "mv", [a, b]:
            column = Constant(b.value[:, None], b.sources[:, None], b.factors[:, None])
            source, factor = _matrix_product(a, column if b.source is not None else Constant(column.value))
            return source[:, 0], factor[:, 0]
        case "addmm", [a, b, c]:
            return _sum(a, Constant(torch.mm(b.value, c.value), *_matrix_product(b, c)))
    return None


def _sum(a: Constant, b: Constant) -> Origin:
    """Plain where the other summand is zero."""
    constant = (a.sources == NOT_A_PARAMETER) & (b.sources == NOT_A_PARAMETER)
    source = torch.where(constant, NOT_A_PARAMETER, NOT_PLAIN)
    source = torch.where(b.zeros, a.sources, torch.where(a.zeros, b.sources, source))
    return source, torch.where(b.zeros, a.factors, b.factors)


def _product(a: Constant, b: Constant) -> Origin:
    """Plain where the other factor has nothing to do with a parameter."""
    if a.source is None:
        a, b = b, a
    other = b.value.detach().cpu().double()
    # A zero that no parameter can change (a mask) has no source.
    source = torch.where(b.zeros, NOT_A_PARAMETER, torch.where(b.sources == NOT_A_PARAMETER, a.sources, NOT_PLAIN))
    return source, a.factors * other


def _matrix_product(a: Constant, b: Constant) -> Origin:
    """Plain where exactly one entry of the parameter-free factor is not zero."""
    if a.source is None:
        source, factor = _matrix_product(Constant(b.value.mT, b.sources.mT, b.factors.mT), Constant(a.value.mT))
        return source.mT, factor.mT
    if b.source is not None:
        shape = (a.shape[0], b.shape[1])
        return torch.full(shape, NOT_PLAIN), torch.ones(shape, dtype=torch.float64)
    other = b.value.detach().cpu().double()
    count, k = (other != 0).sum(0), (other != 0).long().argmax(0)
    source = torch.where(count == 1, a.source[:, k], torch.where(count == 0, NOT_A_PARAMETER, NOT_PLAIN))
    return source, a.factors[:, k] * other.gather(0, k[None])


@dataclass(eq=False)
class Provenance:
    """Where the entries of one tensor of a captured field came from: entry i is scale[i] times element index[i] of the
    flattened parameter parameters[parameter[i]]. parameter[i] = -1: a constant of the module's code, or computed from
    parameters in a way that cannot be written back."""

    parameters: tuple[str, ...]
    parameter: Tensor
    index: Tensor
    scale: Tensor

    @property
    def complete(self) -> bool:
        """Every entry can be written back."""
        return bool((self.parameter >= 0).all())


# (layer number, tensor name as in Layer.tensors()) -> where it came from; None: no entry can be written back.
Sources = dict[tuple[int, str], Provenance | None]


class ParameterNumbers:
    """The numbering behind Constant.source: all parameters of a module laid end to end."""

    def __init__(self, module: nn.Module) -> None:
        self.names: list[str] = []
        self._starts: list[int] = []
        self._start_of: dict[int, int] = {}
        start = 0
        for name, parameter in module.named_parameters():
            self.names.append(name)
            self._starts.append(start)
            self._start_of[id(parameter)] = start
            start += parameter.numel()

    def constant(self, tensor: Tensor) -> Constant:
        """A tensor that the trace meets for the first time."""
        start = self._start_of.get(id(tensor))
        if start is not None:
            return Constant(tensor.detach(), torch.arange(start, start + tensor.numel()).view(tensor.shape))
        computed = torch.full(tensor.shape, NOT_PLAIN) if tensor.requires_grad else None
        return Constant(tensor.detach(), computed)

    def first_name(self, value: Constant) -> str | None:
        """The parameter of the first plain entry."""
        plain = value.sources[value.sources >= 0]
        return self.names[bisect.bisect_right(self._starts, int(plain[0])) - 1] if plain.numel() else None

    def provenance(self, value: Constant) -> Provenance | None:
        source, scale = value.sources.reshape(-1).contiguous(), value.factors.reshape(-1)
        plain = (source >= 0) & (scale != 0)
        if not bool(plain.any()):
            return None
        starts = torch.tensor(self._starts)
        which = torch.where(plain, torch.searchsorted(starts, source, right=True) - 1, -1)
        index = torch.where(plain, source - starts[which.clamp(min=0)], -1)
        used = which[plain].unique()
        compact = torch.full((len(starts) + 1,), -1)
        compact[used] = torch.arange(used.numel())
        return Provenance(tuple(self.names[i] for i in used.tolist()), compact[which], index, scale)
