"""What a module counts while its forward runs (`self.nfe += 1`), counted on where its forward does not run."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import deque
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from .capture.context import inside
from .capture.untouched import untouched
from .capture.seen import watched
from .capture.trees import tree_leaves
from .written import for_others, globals_of, is_torchs, plain_of

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
DEEPEST = 3  # containers in containers
LONGEST = 64  # items of one
LARGE = 10**9  # evaluations
KEPT = "_sparseflow_kernels_kept"  # the attribute in which a module keeps what was compiled of it (known_fields.py)
TORCHS = frozenset(nn.Module().__dict__) | {KEPT}  # attributes that are none of the user's


class Counters:
    """Attributes of a module and its parts, numbers or tensors of one element, to which every call adds the same.

    `add` says that there were so many evaluations that the module has not seen. Whoever sets an attribute to zero
    starts from there.

    run: the parts that were called.  reached: those of which a method ran, or that another one gave out.  records: the
    name of a list or a dict that grew, or of an attribute that forward writes for others to read; or None: what a
    forward that is not run would fail to note there.  by_number: what forward computes depends on what it counts.
    """

    def __init__(self, module: nn.Module, call: Callable[[], Any]) -> None:
        """call: one evaluation of the module, which is left as it was. One that fails counts nothing."""
        before, sizes = _numbers(module), _sizes(module)
        self.run: list[nn.Module] = []
        self.reached: set[nn.Module]
        self.records: str | None = None
        with untouched(module), _called(self.run), _reached(module) as self.reached:
            seen, outputs, kept, states = [], [], _kept(module), []
            for _ in range(2):
                try:
                    outputs.append(watched(call))
                except Exception:  # noqa: BLE001 - whatever a module raises: what it refuses is told when it is asked for
                    break
                seen.append(_numbers(module))
                states.append(_state(module))
            self.records = next((name for name, size in _sizes(module).items() if size > sizes.get(name, size)), None)
            written = [one for one, value in _kept(module).items() if value is not kept[one]]
        self._counted: list[tuple[nn.Module | type, str, float]] = []
        for (part, key), first in before.items() if len(seen) == 2 else ():
            one, two = (values.get((part, key)) for values in seen)
            # What is added is a whole number, or it may be a sum of what forward computes.
            if one is None or two is None or not two - one == one - first != 0:
                continue
            if float(one - first).is_integer():
                self._counted.append((part, key, one - first))
        classes = self.of_classes()
        if classes:  # a number that its class holds looks like the part's own
            self._counted = [
                (part, key, step) for part, key, step in self._counted
                if isinstance(part, type) or not any((kind, key) in classes for kind in type(part).__mro__)
            ]  # fmt: skip
        counted = {(part, key) for part, key, _ in self._counted}
        counted |= {(part, f"{kind.__name__}.{key}") for part in module.modules() for kind, key in classes}
        self.records = self.records or next((name for part, name in written if (part, name) not in counted), None)
        if self.records is None and len(states) == 2:  # a sum that every call adds to, a running mean
            once, twice = states
            self.records = next((
                key for (part, key), value in twice.items()
                if (part, key) not in counted and not _alike(once.get((part, key)), value)
            ), None)  # fmt: skip
        self.by_number = False
        self._ending: tuple[nn.Module, Callable[[], Any]] | None = None  # what raises where it was called too often
        if self._counted:
            self._try_a_large_number(module, call, outputs[0])

    def _try_a_large_number(self, module: nn.Module, call: Callable[[], Any], expected: Any) -> None:
        """What a module does that was called very often: it may raise an error, which ends a solve."""
        with untouched(module):
            self._add(LARGE)
            try:
                found = call()
            except Exception:  # noqa: BLE001 - whatever the user has chosen
                self._ending = module, call
                return
        pairs = zip(tree_leaves(found), tree_leaves(expected))
        self.by_number = not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))

    def __bool__(self) -> bool:
        return bool(self._counted)

    def replace(self, others: dict[nn.Module, nn.Module]) -> None:
        """Counts on in modules that stand where others stood."""
        now: dict[Any, Any] = dict(others)
        self._counted = [(now.get(part, part), key, step) for part, key, step in self._counted]

    def of_classes(self) -> frozenset[tuple[type, str]]:
        """(class, name) of those that classes hold: `type(self).nfe += 1`."""
        return frozenset((part, key) for part, key, _ in self._counted if isinstance(part, type))

    def of(self, part: nn.Module) -> frozenset[str]:
        """The names of this part's own."""
        return frozenset(key for other, key, _ in self._counted if other is part)

    def add(self, evaluations: int) -> None:
        """Raises what forward itself raises where it was called too often."""
        self._add(evaluations)
        if self._ending is not None:
            module, call = self._ending
            with untouched(module):
                call()

    def _add(self, evaluations: int) -> None:
        for part, key, step in self._counted:
            if isinstance(part, type):
                setattr(part, key, getattr(part, key) + step * evaluations)
                continue
            value = part._buffers.get(key, part.__dict__.get(key, getattr(type(part), key, None)))
            if isinstance(value, Tensor):
                with torch.no_grad():
                    value.add_(step * evaluations)
            elif _is_number(value):
                part.__dict__[key] = value + step * evaluations


def _kept(module: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """What the parts of a module hold under names that forward writes for others to read."""
    own = (part for part in module.modules() if not is_torchs(type(part)))
    return {(part, name): part.__dict__.get(name) for part in own for name in for_others(part)}


def _state(module: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """What all parts of a module hold under their names, and their classes: copies of tensors, the items of containers
    and of plain objects."""
    found = {}
    for part in module.modules():
        for key, value in part._buffers.items():
            found[part, key] = _copied(value, DEEPEST)
        for key, value in part.__dict__.items() if not is_torchs(type(part)) else ():
            if key not in TORCHS:
                found[part, key] = _copied(value, DEEPEST)
        for space, key in globals_of(part):
            found[part, f"{key} of {space.get('__name__')}"] = _copied(space.get(key), DEEPEST)
        for holder, key in plain_of(type(part)):
            found[part, f"{holder.__name__}.{key}"] = _copied(vars(holder).get(key), DEEPEST)
    return found


def _copied(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_meta or value.layout != torch.strided else value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, (set, frozenset)):
        return len(value)
    if isinstance(value, types.FunctionType):  # its attributes
        value = {name: item for name, item in value.__dict__.items() if name != "__wrapped__"}
    whole = not depth or isinstance(value, (nn.Module, type, types.ModuleType, *_FUNCTIONS))
    items = [] if whole else list(inside(value))
    return [(key, _copied(item, depth - 1)) for key, item in items] if len(items) <= LONGEST else len(items)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(one[0] == other[0] and _alike(one[1], other[1]) for one, other in zip(a, b))
    return type(a) is type(b) and (a == b or a != a)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(module: nn.Module) -> dict[tuple[nn.Module | type, str], float]:
    """Numbers, and tensors of one element, that the parts of a module hold under their names, or their classes do."""
    found: dict[tuple[nn.Module | type, str], float] = {}
    for part in module.modules():
        for holder, key in reversed(plain_of(type(part))):
            if _is_number(vars(holder).get(key)):
                found[part, key] = found[holder, key] = vars(holder)[key]
        for key, value in (*part.__dict__.items(), *part._buffers.items()):
            if isinstance(value, Tensor):
                if (
                    value.numel() == 1
                    and value.layout == torch.strided
                    and not value.is_meta
                    and not value.is_complex()
                ):
                    found[part, key] = value.item()
            elif _is_number(value):
                found[part, key] = value
    return found


def _sizes(module: nn.Module) -> dict[str, int]:
    """Sizes of the lists, dicts and the like that the parts of a module hold under their names."""
    return {
        f"{path}.{key}".lstrip("."): len(value)
        for path, part in module.named_modules() if not is_torchs(type(part))
        for key, value in part.__dict__.items() if isinstance(value, (list, dict, set, deque)) and key not in TORCHS
    }  # fmt: skip


@contextlib.contextmanager
def _called(parts: list[nn.Module]) -> Iterator[None]:
    """Notes the modules that are called meanwhile."""
    handle = register_module_forward_pre_hook(lambda part, args: parts.append(part))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _reached(module: nn.Module) -> Iterator[set[nn.Module]]:
    """Gives the modules of which Python runs a method meanwhile, be it only to look for an attribute, and the
    submodules that are found so: a path's `derivative` is no call of the path. All of them where somebody profiles."""
    found: set[nn.Module] = set()
    if sys.getprofile() is not None:
        yield set(module.modules())
        return

    def called(frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_argcount:
            return
        first = frame.f_locals.get(code.co_varnames[0])
        if issubclass(type(first), nn.Module):
            found.add(first)
            if code is nn.Module.__getattr__.__code__:
                child = first.__dict__.get("_modules", {}).get(frame.f_locals["name"])
                if child is not None:
                    found.add(child)

    sys.setprofile(called)
    try:
        yield found
    finally:
        sys.setprofile(None)
