"""Per-sample numbers that a module holds: attributes, buffers, what its functions close over. They become the context
of a field, and are read from the module at every call, so that it may be given others between two solves."""

from __future__ import annotations

import types
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ..field.graph import CONTEXT
from .elements import Elements
from .refusal import REMEDY, refuse
from .replay import Attribute, Replay
from .samples import STRIDE
from .values import Constant

PREFIX = "attribute:"
REGISTERED = ("_parameters", "_modules")


def attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a module holds beside its parameters, by a name that `attribute` finds again. Masks of pruning, and
    the products that torch keeps of them, are a part of the parameters, though their first axis may be as long as a
    batch."""
    for path, part in module.named_modules():
        masked = {key for key in part._buffers if key.endswith("_mask") and f"{key[:-5]}_orig" in part._parameters}
        masked |= {key[:-5] for key in masked}
        for key, value in (*part._buffers.items(), *vars(part).items()):
            if key not in REGISTERED and key != "_buffers" and key not in masked:
                yield from _inside(f"{PREFIX}{path}/{key}", value, 3)
        if not type(part).__module__.startswith("torch."):
            yield from _inside(f"{PREFIX}{path}/forward", part.forward, 2)


def items_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(number), item) for number, item in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield from items_of(value.__func__)
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        yield from ((name, cell.cell_contents) for name, cell in cells if cell != types.CellType())
        yield from ((f"default{i}", item) for i, item in enumerate(value.__defaults__ or ()))
        names = (name for name in value.__code__.co_names if isinstance(value.__globals__.get(name), Tensor))
        yield from ((name, value.__globals__[name]) for name in names)
    elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield name, value
    elif depth and not isinstance(value, nn.Module):
        for key, item in items_of(value):
            yield from _inside(f"{name}/{key}", item, depth - 1)


def attribute(module: nn.Module, name: str) -> Tensor:
    """The tensor of this name now."""
    path, key, *rest = name.removeprefix(PREFIX).split("/")
    value: Any = getattr(module.get_submodule(path), key)
    for step in rest:
        value = next((item for name, item in items_of(value) if name == step), None)
    if not isinstance(value, Tensor):
        raise ValueError(f"the module no longer holds the tensor {name.removeprefix(PREFIX)!r}, its context")
    return value


class Context:
    """The context of a field while it is read: columns of per-sample constants, one after the other."""

    def __init__(self, e: Elements, batch: int, rows: int) -> None:
        """rows: how many there are, or more than there can be."""
        self._e, self._batch = e, batch
        self._input = e.table.add(e.graph.input("context", rows, CONTEXT))
        self._known: dict[tuple, Tensor] = {}
        self.count = 0
        self.parts: list[tuple[Any, int, Tensor]] = []  # (how it is computed, its axis of samples, columns)

    def ids(self, value: Constant, entries: Tensor, samples: Tensor) -> Tensor:
        """Elements of a constant's entries, which meet elements of these samples."""
        if not value.from_attributes:
            refuse(
                "a constant that differs from sample to sample of the batch",
                "Make it part of the state (columns whose derivative is zero) and cut it off again inside forward. "
                "Where it is a parameter, the whole state may be one sample: pass an example of it, like=y0. "
                f"Otherwise u{REMEDY[1:]}",
            )
        flat = samples.reshape(-1)
        for axis, size in enumerate(value.shape):
            if size != self._batch:
                continue
            by_sample = torch.arange(value.value.numel()).view(value.shape).movedim(axis, 0).reshape(size, -1)
            column = torch.full((value.value.numel(),), -1)
            column[by_sample] = torch.arange(by_sample.shape[1]).expand_as(by_sample)
            sample = torch.empty_like(column)
            sample[by_sample] = torch.arange(size)[:, None].expand_as(by_sample)
            of = entries.reshape(-1)
            if bool((sample[of] == flat).all()):
                rows = self._rows(value, axis, column[of])
                return flat.view(samples.shape) * STRIDE + rows.view(samples.shape)
        refuse("a constant of which samples use the numbers of other samples")

    @property
    def names(self) -> set[str]:
        """Of the module's tensors that it consists of."""
        leaves = (leaf for node, *_ in self.parts for leaf in Replay(node, self._e.table.dtype).all_leaves())
        return {leaf.name for leaf in leaves if isinstance(leaf, Attribute)}

    def _rows(self, value: Constant, axis: int, columns: Tensor) -> Tensor:
        used, inverse = columns.unique(return_inverse=True)
        key = (id(value), axis, used.numpy().tobytes())
        if key not in self._known:
            self._known[key] = self._input[self.count: self.count + used.numel()]
            self.count += used.numel()
            self.parts.append((value.node, axis, used, value))
        return self._known[key][inverse]


class ReadContext:
    """The present context [samples, rows] of a module."""

    def __init__(self, module: nn.Module, context: Context, dtype: torch.dtype) -> None:
        self._module = module
        self._parts = [(Replay(node, dtype), axis, columns) for node, axis, columns, _ in context.parts]
        self._dtype = dtype

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the module's tensors that it is made of, as `attributes` gives them."""
        leaves = (leaf for replay, _, _ in self._parts for leaf in replay.all_leaves())
        return frozenset(leaf.name for leaf in leaves if isinstance(leaf, Attribute))

    @property
    def names(self) -> list[str]:
        """Where in the module it comes from."""
        return sorted(name.removeprefix(PREFIX).replace("/", ".").strip(".") for name in self.tensors)

    def __call__(self) -> Tensor:
        like = next(self._module.parameters(), None)
        if like is None:
            held = (x for _, x in attributes(self._module) if x.is_floating_point())
            like = next(held, torch.empty(0, dtype=self._dtype))
        like = torch.empty(0, dtype=self._dtype, device=like.device)
        parts = [self._part(like, *part) for part in self._parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _part(self, like: Tensor, replay: Replay, axis: int, columns: Tensor) -> Tensor:
        def moved(name: str) -> Tensor:
            value = attribute(self._module, name) if name.startswith(PREFIX) else self._module.get_parameter(name)
            return value.to(like.device, like.dtype if value.is_floating_point() else None)

        value = replay.run(like, None, moved).movedim(axis, 0)
        value = value.reshape(value.shape[0], -1)
        if len(columns) != value.shape[1] or int(columns[-1]) != len(columns) - 1:  # ascending: else they are all of them
            value = value[:, columns.to(value.device)]
        return value.to(like.dtype)


def names_of(module: nn.Module, batch: int) -> dict[int, Attribute]:
    """By id, the tensors that may be the context: those with a row for every sample."""
    found = ((name, x) for name, x in attributes(module) if x.layout == torch.strided and x.dim())
    return {id(x): Attribute(name) for name, x in found if x.shape[0] == batch}

