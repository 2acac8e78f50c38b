"""Running a user's module without leaving a trace.

What forward changes while it is looked at is put back: parameters, buffers and attributes of every part, what those
hold (containers in containers, objects, generators), numbers on the modules' classes, and torch's, Python's and numpy's
random states. What is as it was is not written, so that other threads lose nothing that forward does not change.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import random
import sys
import types
from collections import OrderedDict, deque
from typing import Any, Iterator

import numpy
import torch
from torch import Tensor, nn

from .context import is_installed

_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, Tensor, nn.Parameter))
_NO_OBJECTS = (Tensor, nn.Module, type, types.ModuleType)
MOST_HELD = 10_000  # things that are looked at: data may hang on a module


def _held(modules: list[nn.Module]) -> Iterator[Any]:
    """What modules hold that is changed in place, each once: containers, generators, plain objects, and what these
    hold; and their own classes."""
    kinds = {type(module) for module in modules}
    yield from {own for kind in kinds for own in kind.__mro__[:-1] if not own.__module__.startswith("torch.")}
    waiting = deque(value for module in modules for name, value in module.__dict__.items() if name != "_modules")
    found: set[int] = set()
    most = len(waiting) + MOST_HELD
    while waiting and most:
        value, most = waiting.popleft(), most - 1
        kind = type(value)
        if kind in _PLAIN or id(value) in found:
            continue
        found.add(id(value))
        yield value
        if (kind is dict or kind is OrderedDict) and not value:
            continue
        if isinstance(value, (list, tuple, set, deque)):
            waiting.extend(itertools.islice(value, MOST_HELD))
        elif isinstance(value, dict):
            waiting.extend(itertools.islice(value.values(), MOST_HELD))
        elif _is_users(value):
            waiting.extend(value.__dict__.values())


def _is_object(value: Any) -> bool:
    if isinstance(value, types.FunctionType):  # which may count its calls
        return True
    return hasattr(value, "__dict__") and not isinstance(value, _NO_OBJECTS) and not callable(value)


def _is_users(value: Any) -> bool:
    """An object of a class of the user's, or of none: what a queue, a logger or a lock holds, others work with meanwhile."""
    if isinstance(value, (types.SimpleNamespace, types.FunctionType)):
        return True
    return _is_object(value) and not is_installed(type(value).__module__)


def _same(now: Any, before: Any) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


class _Contents:
    """One of them as it was, but for a dictionary."""

    def __init__(self, value: Any) -> None:
        self._value, self._before = value, None
        if isinstance(value, (list, set, deque)):
            self._before = list(value)
        elif isinstance(value, tuple):
            pass
        elif isinstance(value, torch.Generator):
            self._before = value.get_state()
        elif isinstance(value, random.Random):
            self._before = value.getstate()
        elif isinstance(value, numpy.random.Generator):
            self._before = value.bit_generator.state
        elif isinstance(value, type):
            self._before = {k: v for k, v in vars(value).items() if isinstance(v, (int, float)) and k[:2] != "__"}
        elif _is_object(value):
            self._before = dict(value.__dict__)

    def restore(self) -> None:
        value, before = self._value, self._before
        if before is None:
            return
        if isinstance(value, (list, deque)):
            if not _same(value, before):
                kind: Any = list if isinstance(value, list) else deque  # the user's may be frozen
                kind.clear(value)
                kind.extend(value, before)
        elif isinstance(value, set):
            set.intersection_update(value, before)
            set.update(value, before)
        elif isinstance(value, torch.Generator):
            value.set_state(before)
        elif isinstance(value, random.Random):
            value.setstate(before)
        elif isinstance(value, numpy.random.Generator):
            value.bit_generator.state = before
        elif isinstance(value, type):
            for name, number in before.items():
                if vars(value).get(name) is not number:
                    setattr(value, name, number)
        else:
            _restore_items(value.__dict__, before)


def _restore_items(now: dict, before: dict) -> None:
    if (now or before) and not (_same(now, before) and _same(now.values(), before.values())):
        dict.clear(now)  # in place: others (hook handles) may hold the dictionary
        dict.update(now, before)


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Leaves parameters, buffers, attributes and random states as they were."""
    submodules = list(module.modules())
    attributes = [{name: value for name, value in m.__dict__.items() if name != "_modules"} for m in submodules]
    held = list(_held(submodules))
    items = [(value, dict(value)) for value in held if isinstance(value, dict)]  # most by far: torch's own of hooks
    contents = [_Contents(value) for value in held if not isinstance(value, dict)]
    randoms = random.getstate(), numpy.random.get_state()
    beside = [x for m in submodules for x in m.__dict__.values() if isinstance(x, Tensor) and not x.is_meta]
    tensors = [(x, x.detach().clone()) for x in [*module.parameters(), *module.buffers(), *beside]]
    gpus = {x.device for x, _ in tensors if x.device.type == "cuda"}
    kinds = {"cpu", *(x.device.type for x, _ in tensors)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(gpus)))
        stack.enter_context(torch.inference_mode(False))
        for kind in filter(torch.amp.is_autocast_available, kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))  # the field is the module in its own dtype
        if "torch._dynamo" in sys.modules:  # what is compiled inside (submodules, functions) runs as it was written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            random.setstate(randoms[0])
            numpy.random.set_state(randoms[1])
            for value, before in items:
                _restore_items(value, before)
            for one in contents:
                one.restore()
            for m, saved in zip(submodules, attributes):
                for name in [name for name in m.__dict__ if name not in saved and name != "_modules"]:
                    del m.__dict__[name]
                for name, value in saved.items():
                    if m.__dict__.get(name) is not value:
                        m.__dict__[name] = value
            with torch.no_grad():
                for x, value in tensors:
                    if x.layout != torch.strided or not torch.equal(x, value):
                        x.copy_(value)
