"""Numbers per sample that a module holds: in attributes, in buffers, in what its functions close over.

They become the context of a field. The field reads them from the module at every call, so that the module may be given
others between two solves.
"""

from __future__ import annotations

import collections
import copy
import dis
import functools
import inspect
import site
import sys
import sysconfig
import types
from typing import Any, Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..field.graph import CONTEXT
from .elements import Elements
from .refusal import REMEDY, refuse
from .replay import Attribute, Replay, with_samples
from .samples import STRIDE
from .values import Constant

PREFIX = "attribute:"
_INSTALLED = (
    *(sysconfig.get_path(one) for one in ("stdlib", "platstdlib", "purelib", "platlib")),
    *site.getsitepackages(), site.getusersitepackages(),
)  # fmt: skip
REGISTERED = ("_parameters", "_modules")


def attributes(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor that a module holds beside its parameters; `attribute` finds it again by the name.

    Pruning masks, and the masked tensors that torch keeps beside them, are left out: they belong to the parameters, even
    where their first axis is as long as a batch.
    """
    for path, part in module.named_modules():
        masked = {key for key in part._buffers.keys() if key.endswith("_mask") and f"{key[:-5]}_orig" in part._parameters}
        masked |= {key[:-5] for key in masked}
        for key, value in (*part._buffers.items(), *vars(part).items()):
            if key not in REGISTERED and key != "_buffers" and key not in masked:
                yield from _inside(f"{PREFIX}{path}/{key}", value, 3)
        if not type(part).__module__.startswith("torch."):
            yield from _inside(f"{PREFIX}{path}/forward", part.forward, 2)


def items_of(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, (list, tuple, collections.deque)):
        yield from ((str(number), item) for number, item in enumerate(value))
    elif isinstance(value, types.MethodType):
        yield from items_of(value.__func__)
        if not isinstance(value.__self__, nn.Module):  # whose parts are looked at anyway
            yield "self", value.__self__
    elif isinstance(value, types.FunctionType):
        if is_librarys(value):
            return
        cells = zip(value.__code__.co_freevars, value.__closure__ or ())
        yield from ((name, cell.cell_contents) for name, cell in cells if cell != types.CellType())
        yield from ((f"default{i}", item) for i, item in enumerate(value.__defaults__ or ()))
        yield from (value.__kwdefaults__ or {}).items()
        if value.__dict__:  # but for what its own code writes: calls that it counts, times that it takes
            own = _stored(value.__code__)
            yield from ((name, item) for name, item in value.__dict__.items() if name != "__wrapped__" and name not in own)
        names, members, imported = _globals_of(value.__code__)
        read = ((name, value.__globals__.get(name)) for name in names)
        yield from ((name, item) for name, item in read if not isinstance(item, (types.NoneType, types.ModuleType)))
        held = [(name, value.__globals__.get(name), member) for name, member in members]  # config.rate
        held += [(name, _imported(name, level, value), member) for name, level, member in imported]
        for name, holder, member in held:
            if isinstance(holder, (types.ModuleType, type)) and not _is_librarys(holder):
                item = inspect.getattr_static(holder, member, None)
                if callable(item):  # which one it is, and not what is in it
                    if not isinstance(holder, types.ModuleType) or is_installed(holder.__name__):
                        continue
                    item = getattr(item, "__code__", item if isinstance(item, types.BuiltinFunctionType) else None)
                if not (item is None or isinstance(item, (types.ModuleType, property, nn.Module))):
                    yield f"{name}.{member}", item
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))


def inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds: its items, or the attributes of an object that has none."""
    empty = True
    for item in items_of(value):
        empty = False
        yield item
    if empty and not isinstance(value, (Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)):
        yield from getattr(value, "__dict__", {}).items()
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name != "__dict__" and not name.startswith("__") and hasattr(value, name):
                    yield name, getattr(value, name)


@functools.lru_cache(maxsize=1024)
def _stored(code: types.CodeType) -> frozenset[str]:
    return frozenset(one.argval for one in dis.get_instructions(code) if one.opname == "STORE_ATTR")


@functools.lru_cache(maxsize=1024)
def _globals_of(
    code: types.CodeType,
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...], tuple[tuple[str, int, str], ...]]:
    """(the globals that code reads, what it reads of them, what it imports or reads of what it imports: the module's
    name, how relative that is, and the member), that of the functions in it included."""
    instructions = [one for one in dis.get_instructions(code) if one.opname not in ("CACHE", "PUSH_NULL")]
    reads, members_of = ("LOAD_GLOBAL", "LOAD_NAME"), ("LOAD_ATTR", "LOAD_METHOD")
    names = [one.argval for one in instructions if one.opname in reads]
    members = [
        (one.argval, following.argval) for one, following in zip(instructions, instructions[1:])
        if one.opname in reads and following.opname in members_of
    ]  # fmt: skip
    imported, home, local = [], ("", 0), {}
    for number, one in enumerate(instructions):
        following = instructions[number + 1] if number + 1 < len(instructions) else one
        if one.opname == "IMPORT_NAME":
            home = one.argval, instructions[number - 2].argval
            if following.opname == "STORE_FAST":
                local[following.argval] = home
        elif one.opname == "IMPORT_FROM":
            imported.append((*home, one.argval))
        elif one.opname.startswith("LOAD_FAST") and one.argval in local and following.opname in members_of:
            imported.append((*local[one.argval], following.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _globals_of(constant)
            names, members, imported = [*names, *inner[0]], [*members, *inner[1]], [*imported, *inner[2]]
    return tuple(dict.fromkeys(names)), tuple(dict.fromkeys(members)), tuple(dict.fromkeys(imported))


def _imported(name: str, level: int, function: types.FunctionType) -> Any:
    """The module that an import within a function names, where it is there already."""
    if level:
        package = (function.__globals__.get("__package__") or "").split(".")
        name = ".".join([*package[: len(package) - level + 1], *([name] if name else [])])
    return sys.modules.get(name)


def functions_of_modules(function: Any) -> list[Any]:
    """The user's functions that a function calls as attributes of their modules."""
    found = []
    for name, member in _globals_of(function.__code__)[1]:
        holder = getattr(function, "__globals__", {}).get(name)
        if isinstance(holder, types.ModuleType) and not _is_librarys(holder):
            found.append(inspect.getattr_static(holder, member, None))
    return found


def is_librarys(function: Any) -> bool:
    """Whether a function is one of torch's, numpy's or this package's: nothing of the user's is in there."""
    return (getattr(function, "__module__", None) or "").startswith(("torch.", "numpy.", "sparseflow_kernels."))


def _is_librarys(holder: types.ModuleType | type) -> bool:
    home = holder.__name__ if isinstance(holder, types.ModuleType) else holder.__module__
    return home.split(".")[0] in ("torch", "numpy", "math", "scipy", "einops", "torchdiffeq", "sparseflow_kernels")


_known: dict[str, bool] = {}


def is_installed(module: str) -> bool:
    """Whether a module comes with Python or with a package: its functions stay what they are."""
    if module not in _known:
        if module not in sys.modules:
            return False
        file = getattr(sys.modules[module], "__file__", None)
        of_python = module.split(".")[0] in sys.stdlib_module_names and module != "__main__"
        _known[module] = of_python if file is None else file.startswith(_INSTALLED)
    return _known[module]


def _inside(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield name, value
    elif depth and not isinstance(value, nn.Module):
        for key, item in inside(value):
            yield from _inside(f"{name}/{key}", item, depth - 1)


def attribute(module: nn.Module, name: str) -> Tensor:
    """The tensor that the module holds under this name now. Raises ValueError where it holds none any more."""
    path, key, *rest = name.removeprefix(PREFIX).split("/")
    value: Any = getattr(part_named(module, path), key)
    for step in rest:
        value = next((item for name, item in inside(value) if name == step), None)
    if not isinstance(value, Tensor):
        raise ValueError(f"the module no longer holds the tensor {name.removeprefix(PREFIX)!r}, its context")
    return value


def part_named(module: nn.Module, path: str) -> nn.Module:
    """nn.Module.get_submodule, which TorchScript's modules lack."""
    return functools.reduce(getattr, path.split(".") if path else (), module)


def tensor_named(module: nn.Module, name: str) -> Tensor:
    """The parameter, or the tensor beside parameters, that the module holds under the name of a `Leaf`."""
    if name.startswith(PREFIX):
        return attribute(module, name)
    path, _, leaf = name.rpartition(".")
    return part_named(module, path)._parameters[leaf]


class Context:
    """The context of a field while the field is read: columns of constants that differ from sample to sample.

    count: how many columns there are so far.
    """

    def __init__(self, e: Elements, batch: int, rows: int) -> None:
        """rows: how many columns there will be, or a number that is larger than that."""
        self._e, self.batch = e, batch
        self._input = e.table.add(e.graph.input("context", rows, CONTEXT))
        self._known: dict[tuple, Tensor] = {}
        self.count = 0
        # (how the constant is computed, its axis of samples, the columns taken of it, the constant)
        self.parts: list[tuple[Any, int, Tensor, Constant]] = []

    def ids(self, value: Constant, entries: Tensor, samples: Tensor) -> Tensor:
        """Elements of entries of a constant, for the samples that they meet.

        entries, samples: int64 of one shape, which the result has too. Raises UnsupportedFieldError where the constant
        holds no attribute of the module, or where one sample reads the numbers of another.
        """
        if not value.from_attributes:
            refuse(
                "a constant that differs from sample to sample of the batch",
                "Make it part of the state (columns whose derivative is zero) and cut it off again inside forward. "
                "Where it is a parameter, the whole state may be one sample: pass an example of it, like=y0. "
                f"Otherwise u{REMEDY[1:]}",
            )
        flat = samples.reshape(-1)
        for axis, size in enumerate(value.shape):
            if size != self.batch:
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
        """The names of the module's tensors that the context consists of."""
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


MOST_BATCHES = 16  # numbers of samples, the parts for which are kept


class ReadContext:
    """Calls give the present context [samples, columns] of a module, with a graph where the module's numbers have one."""

    def __init__(self, module: nn.Module, context: Context, dtype: torch.dtype) -> None:
        self._module = module
        self._held: dict[str, Tensor] = {}  # what is read in the place of the module's tensors of these names
        self.check: Callable[[], bool] | None = None  # whether what the field took for given still holds
        self._read = [(node, axis, columns, _without(value.shape, axis)) for node, axis, columns, value in context.parts]
        self._parts = [(Replay(node, dtype), *rest) for node, *rest in self._read]
        self._batch, self._others = context.batch, collections.OrderedDict()  # number of samples -> parts of as many
        self._dtype = dtype
        self._resizes: bool | None = None  # whether sizes that forward takes are known to be the batch's

    @property
    def tensors(self) -> frozenset[str]:
        """Names of the module's tensors that it is made of, as `attributes` gives them."""
        leaves = (leaf for replay, *_ in self._parts for leaf in replay.all_leaves())
        return frozenset(leaf.name for leaf in leaves if isinstance(leaf, Attribute))

    @property
    def names(self) -> list[str]:
        """The module's tensors that it is read from, as dotted paths, in alphabetical order."""
        return sorted(map(dotted, self.tensors))

    def pinned(self) -> "ReadContext":
        """The same of the tensors that the module holds now."""
        other = copy.copy(self)
        other.check = None
        other._held = {name: attribute(self._module, name) for name in self.tensors}
        return other

    def _tensor(self, name: str, like: Tensor) -> Tensor:
        if (value := self._held.get(name)) is None:
            value = tensor_named(self._module, name)
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    def _of(self, samples: int) -> list[tuple]:
        """The parts as forward computes them for another number of samples than it was read with, of which it may have
        taken sizes."""
        if samples not in self._others:
            while len(self._others) >= MOST_BATCHES:
                self._others.popitem(last=False)
            self._others[samples] = [
                (Replay(with_samples(node, self._batch, samples), self._dtype), *rest) for node, *rest in self._read
            ]
        return self._others[samples]

    def _present(self, like: Tensor, samples: int | None) -> list[Tensor]:
        """What the parts are now. Where they do not come to as many rows as there are samples, sizes that forward takes
        may be those of the batch that it was read with."""
        try:
            parts = [self._part(like, *part) for part in self._parts]
            if samples is None or samples == self._batch or all(len(part) == samples for part in parts):
                return parts
        except (RuntimeError, ValueError):
            if samples is None or samples == self._batch or not self._follows(like, samples):
                raise
            return [self._part(like, *part) for part in self._of(samples)]
        return [self._part(like, *part) for part in self._of(samples)] if self._follows(like, samples) else parts

    @torch.no_grad()
    def _follows(self, like: Tensor, samples: int) -> bool:
        """Whether the sizes are the batch's: a sample's numbers are the same however many others there are."""
        if self._resizes is None:

            def rows(name: str, count: int) -> Tensor:
                value = self._tensor(name, like)
                if name.startswith(PREFIX) and value.dim() and len(value) == samples:
                    value = value[torch.arange(count, device=value.device) % samples]
                return value

            more, axes = self._batch + 1, [axis for _, axis, *_ in self._read]
            try:
                old = [replay.run(like, None, lambda name: rows(name, self._batch)) for replay, *_ in self._parts]
                new = [replay.run(like, None, lambda name: rows(name, more)) for replay, *_ in self._of(more)]
            except RuntimeError:
                return False
            self._resizes = all(
                b.dim() == a.dim() and b.shape[axis] == more
                and torch.allclose(a, b.narrow(axis, 0, self._batch), equal_nan=True)
                for a, b, axis in zip(old, new, axes)
            )  # fmt: skip
        return self._resizes

    def __call__(self, samples: int | None = None) -> Tensor:
        """samples: how many the state has; None: as many as the module's tensors say."""
        if self.check is not None and not self.check():
            raise ValueError(
                f"context: a number, a branch or a position that forward made of {', '.join(self.names)} is another now "
                "than when the field was compiled: compile it anew, or with live=True, which does so by itself"
            )
        like = next(self._module.parameters(), None)
        if like is None:
            held = (x for _, x in attributes(self._module) if x.is_floating_point())
            like = next(held, torch.empty(0, dtype=self._dtype))
        like = torch.empty(0, dtype=self._dtype, device=like.device)
        parts = self._present(like, samples)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _part(self, like: Tensor, replay: Replay, axis: int, columns: Tensor, sample: tuple[int, ...]) -> Tensor:
        """sample: the shape that one sample has."""

        value = replay.run(like, None, lambda name: self._tensor(name, like))
        if value.dim() <= len(sample) or _without(value.shape, axis) != sample:
            names = ", ".join(sorted(dotted(leaf.name) for leaf in replay.all_leaves()))
            raise ValueError(
                f"context: what is read from {names} is {list(value.shape)} now, and was compiled with "
                f"{list(sample)} per sample: compile the field anew"
            )
        value = value.movedim(axis, 0)
        value = value.reshape(value.shape[0], -1)
        if len(columns) != value.shape[1] or int(columns[-1]) != len(columns) - 1:  # ascending: else they are all of them
            value = value[:, columns.to(value.device)]
        return value.to(like.dtype)


def dotted(name: str) -> str:
    """The name of an attribute for people."""
    return name.removeprefix(PREFIX).replace("/", ".").strip(".")


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """A shape but for this axis."""
    return (*shape[:axis], *shape[axis + 1:])


def names_of(module: nn.Module, batch: int) -> dict[int, Attribute]:
    """id -> name of the module's tensors that may be its context: those whose first axis is as long as the batch."""
    found = ((name, x) for name, x in attributes(module) if x.layout == torch.strided and x.dim())
    return {id(x): Attribute(name) for name, x in found if x.shape[0] == batch}

