"""Which parameter entry each entry of a constant is: followed through the operations, so that a compiled field trains
what its module trains, and can be written back into it."""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn

from ..origin import Origin
from .operations import STRUCTURAL, aten, base_name
from .refusal import refuse
from .replay import Computed, Leaf, Node
from .trees import tree_leaves, tree_map
from .values import NOT_A_PARAMETER, NOT_PLAIN, Constant

LARGEST = 1 << 27  # entries of a sparse tensor as capture reads it
Traced = tuple[Tensor | None, Tensor | None]  # source and factor, as in Constant


def trace(func, args, kwargs, values: list) -> list[Traced]:
    """The origin of every result of an operation on constants."""
    constants = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Constant)]
    if all(a.source is None for a in constants):
        return [(None, None)] * len(values)
    base = base_name(func)
    if base == "_to_copy" and values[0].is_floating_point():
        return [(constants[0].source, constants[0].factor)]
    # What is detached is no parameter to the gradient, and yet moves with it.
    moves = base in STRUCTURAL and base not in ("copy", "_to_copy", "detach")
    if moves or (base == "index_put" and len(args) == 3):
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


def _of_arithmetic(base: str, args, kwargs) -> Traced | None:
    if base not in ("neg", "add", "sub", "mul", "div", "mm", "mv", "addmm"):
        return None
    if any(v != 1 for v in kwargs.values()):  # alpha, beta, rounding_mode
        return None
    own = lambda a: a if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float64)
    operands = [a if isinstance(a, Constant) else Constant(own(a)) for a in args]
    minus = Constant(torch.tensor(-1.0, dtype=torch.float64))
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


def _sum(a: Constant, b: Constant) -> Traced:
    """Plain where the other summand is zero."""
    constant = (a.sources == NOT_A_PARAMETER) & (b.sources == NOT_A_PARAMETER)
    source = torch.where(constant, NOT_A_PARAMETER, NOT_PLAIN)
    source = torch.where(b.zeros, a.sources, torch.where(a.zeros, b.sources, source))
    return source, torch.where(b.zeros, a.factors, b.factors)


def _product(a: Constant, b: Constant) -> Traced:
    """Plain where the other factor has nothing to do with a parameter."""
    left, right = a.sources == NOT_A_PARAMETER, b.sources == NOT_A_PARAMETER
    source = torch.where(right, a.sources, torch.where(left, b.sources, NOT_PLAIN))
    # A zero that no parameter can change (a mask) has no source.
    source = torch.where(a.zeros | b.zeros, NOT_A_PARAMETER, source)
    one, other = (x.value.detach().cpu().double() for x in (a, b))
    return source, torch.where(right, a.factors * other, b.factors * one)


def _matrix_product(a: Constant, b: Constant) -> Traced:
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


class ParameterNumbers:
    """The numbering behind Constant.source: all parameters of a module laid end to end."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, take: Callable[..., None] = lambda value, is_zero=False: None,
        moving: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """take: is told of constants that are taken as they are, though they are made of the module's attributes.
        moving: tensors that the module holds beside its parameters, and that are taken for some."""
        self.dtype, self.take = dtype, take
        self.names: list[str] = []
        self._parameters: list[Tensor] = []
        self._starts: list[int] = []
        self._number_of: dict[int, int] = {}
        self._memory: dict[int, int] = {}
        start = 0
        moving = moving or {}
        for number, (name, parameter) in enumerate((*module.named_parameters(), *moving.items())):
            self.names.append(name)
            self._parameters.append(parameter)
            self._starts.append(start)
            self._number_of[id(parameter)] = number
            if parameter.numel() and parameter.layout == torch.strided and name not in moving:
                self._memory.setdefault(parameter.untyped_storage()._cdata, number)
            start += parameter.numel()

    def constant(self, tensor: Tensor) -> Constant:
        """A tensor that the trace meets for the first time."""
        number = self._number_of.get(id(tensor))
        if tensor.layout != torch.strided:
            return self._sparse(tensor, None if number is None else self.names[number])
        if number is not None:
            numbers = torch.arange(self._starts[number], self._starts[number] + tensor.numel()).view(tensor.shape)
            return Constant(tensor.detach(), numbers, None, Leaf(self.names[number]))
        number = self._memory.get(tensor.untyped_storage()._cdata)
        if number is not None:  # parameter.data: it moves with the parameter, and has no gradient
            parameter = self._parameters[number]
            offset = tensor.storage_offset() - parameter.storage_offset()
            node = Node(aten.as_strided.default, (Leaf(self.names[number]), tensor.shape, tensor.stride(), offset))
            return Constant(
                tensor.detach(), torch.full(tensor.shape, NOT_PLAIN), None, Node(aten.detach.default, (node,))
            )  # fmt: skip
        if tensor.requires_grad:
            refuse(
                f"a tensor of shape {list(tensor.shape)} that requires a gradient and is no parameter of the module",
                "Register it (self.name = nn.Parameter(...), or the module that owns it as a submodule) so that it is "
                "trained with the field, or use it detached, as a constant",
            )
        return Constant(tensor.detach())

    def by_name(self, name: str) -> Constant:
        return self.constant(self._parameters[self.names.index(name)])

    @staticmethod
    def _sparse(tensor: Tensor, name: str | None) -> Constant:
        """A sparse tensor, as the dense one that it stands for."""
        what = "a sparse tensor" if name is None else f"the sparse parameter {name!r}"
        if tensor.requires_grad:
            refuse(
                f"{what} of {list(tensor.shape)} that requires a gradient",
                "Make it a dense parameter with a mask (torch.nn.utils.prune) or an sfk.SparseLinear, which are trained "
                "with the field, or fix it with requires_grad_(False)",
            )
        if tensor.numel() > LARGEST:
            refuse(f"{what} of {list(tensor.shape)}, which is read as a dense one,")
        return Constant(tensor.detach().to_dense())

    def first_name(self, value: Constant) -> str | None:
        """The parameter of the first plain entry."""
        plain = value.sources[value.sources >= 0]
        return self.names[bisect.bisect_right(self._starts, int(plain[0])) - 1] if plain.numel() else None

    def value(self, name: str) -> Tensor:
        return self._parameters[self.names.index(name)].detach()

    def knows(self, name: str) -> bool:
        """Whether it is a parameter's name, and not an attribute's."""
        return name in self.names

    def trained(self, name: str) -> bool:
        return self._parameters[self.names.index(name)].requires_grad

    def origin(self, value: Constant) -> Origin:
        if value.in_order:
            first, count = int(value.source.reshape(-1)[0]), value.source.numel()
            number = bisect.bisect_right(self._starts, first) - 1
            if first + count - self._starts[number] <= self._parameters[number].numel():
                own = Origin.of_parameter(self.names[number], value.value.reshape(-1))
                return own if first == self._starts[number] else replace(own, index=own.index + (first - self._starts[number]))
        source, scale = value.sources.reshape(-1).contiguous(), value.factors.reshape(-1)
        source = torch.where((source >= 0) & (scale == 0), NOT_A_PARAMETER, source)
        plain = source >= 0
        starts = torch.tensor(self._starts or [0])
        which = torch.where(plain, torch.searchsorted(starts, source, right=True) - 1, source)
        index = torch.where(plain, source - starts[which.clamp(min=0)], torch.arange(source.numel()))
        used = which[plain].unique()
        compact = torch.full((len(starts),), -1)
        compact[used] = torch.arange(used.numel())
        expression = Computed(value.node, self.dtype) if bool((source == NOT_PLAIN).any()) else None
        return Origin(
            tuple(self.names[i] for i in used.tolist()), torch.where(plain, compact[which.clamp(min=0)], which), index,
            torch.where(plain, scale, 1.0), value.value.detach().reshape(-1), expression,
        )  # fmt: skip
