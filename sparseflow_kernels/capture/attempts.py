"""How forward wants to be called: the sizes of the state that run, and where none does, the reason."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import re
import warnings
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..field import UnsupportedFieldError
from .probe import Probe, check_settled, dtype_and_device
from .refusal import REMEDY, TUPLES

FAILED = object()  # what a call that raised returned
SMALL = 32  # sizes of a state that are tried where the weights show none
TIME_SHAPES = ((), (1, 1), (1,))
STATE_NAMES = {"x", "y", "z", "h", "u", "v", "state", "states", "input", "inputs"}
TIME_NAMES = {"t", "tt", "ts", "time", "times"}


def find_probe(module: nn.Module, dim: int | None, like: Tensor | None = None, grad: bool = False) -> Probe:
    """The one way to call the module that returns [batch, dim]; with an example `like`, one of its number of axes
    first. Where forward runs for one batch only, a probe that says so (`Probe.only`)."""
    check_settled(module)
    dtype, device = dtype_and_device(module, like)
    registered = [*module.parameters(), *module.buffers()]
    # A state that is concatenated with t makes a matrix one wider.
    likely = {s for x in registered if x.dim() in (1, 2) for s in x.shape}
    for part in module.modules():
        if isinstance(getattr(part, "in_features", None), int) and isinstance(getattr(part, "out_features", None), int):
            likely |= {part.in_features, part.in_features - 1, part.out_features}
    if like is not None:
        dim = like.shape[-1]
    dims = sorted(likely - {0}) if dim is None else [dim]
    attempts = Attempts(module, dtype, device, dims, grad)
    if like is not None:
        try:
            attempts.example(like)
        except UnsupportedFieldError:
            if grad or not attempts.differentiates:
                raise
            return find_probe(module, dim, like, grad=True)
    # Where the weights do not show it (a state cut in parts, weights made by another network), sizes one by one.
    unlikely = [] if dim is not None else sorted(set(range(1, SMALL + 1)) - likely)
    rounds = [(sizes, batched, ()) for sizes in (dims, unlikely) for batched in (True, False)]
    axes = 3 if like is None else like.dim()
    if axes > 2:
        rounds.insert(len(rounds) if like is None else 0, (dims, True, (1,) * (axes - 2)))
    works = next(filter(None, (attempts.at(*one) for one in rounds)), [])
    if works and all(probe.t_shape for probe in works) and _named_swapped(module):
        attempts.refuse_swapped()  # what runs does so by accident, and not for t 0-d, which solvers give
    if not works and attempts.differentiates and not grad:
        with contextlib.suppress(UnsupportedFieldError, ValueError):
            return find_probe(module, dim, like, grad=True)
    if len(works) != 1:
        return _diagnose(attempts, works, dim, like)
    if not works[0].batched:
        attempts.refuse_columns(works[0])
    return works[0]


class Attempts:
    """Calls of a module with states of several sizes, and what came of them."""

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, dims: list[int], grad: bool = False
    ) -> None:
        self.module, self.dtype, self.device, self.dims, self.grad = module, dtype, device, dims, grad
        self.held = list(held_tensors(module))
        self.sizes = {s for _, x in self.held for s in x.shape}
        self.batch = 0
        self.error: Exception | None = None  # the first one, and where it was
        self.error_at = ""
        self.returned: str | None = None  # what else than a tensor shaped like y
        self.returned_tuple = False
        self.mentioned: set[int] = set()  # numbers in messages of errors, and sizes of what was returned
        self.differentiates = False

    def at(self, dims: list[int], batched: bool, between: tuple[int, ...] = ()) -> list[Probe]:
        """The probes that work, one per size at most."""
        # A batch size that nothing else has, so that no broadcast or transpose of the module's works by accident.
        taken = self.sizes | {d + k for d in dims for k in (-1, 0, 1, 2)}
        self.batch = next(n for n in itertools.count(7, 2) if n not in taken)
        ways = [
            [
                Probe(d, t_shape, self.batch, self.dtype, self.device, batched, between, grad=self.grad)
                for t_shape in TIME_SHAPES
            ]
            for d in dims
        ]
        return [probe for one in ways if (probe := next(filter(self.works, one), None)) is not None]

    def works(self, probe: Probe) -> bool:
        t, y = probe.point()
        out = self.call(lambda: probe.run(self.module, t, y), f"y {list(y.shape)}")
        if isinstance(out, Tensor):
            if out.shape == y.shape:
                return True
            self.mentioned |= set(out.shape)
        if probe.batched and out is not FAILED and self.returned is None:
            what = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            self.returned = f"forward(t, y) with y {list(y.shape)} returned {what}"
            self.returned_tuple = isinstance(out, (tuple, list))
        return False

    def call(self, run: Any, at: str) -> Any:
        try:
            return run()
        except Exception as error:  # whatever the user's code raises says that this shape is not meant
            if self.error is None:
                self.error, self.error_at = error, at
            text = str(error)[:400]
            self.differentiates |= "does not require grad" in text
            self.mentioned |= {int(number) for number in re.findall(r"\b\d{1,4}\b", text)}
            return FAILED

    def example(self, like: Tensor) -> None:
        """Raises UnsupportedFieldError unless forward runs for the example."""
        for t_shape in TIME_SHAPES:
            t = Probe(like.shape[-1], t_shape, 1, self.dtype, self.device).time(0.5)
            run = lambda y: self.module(t, y.requires_grad_(self.grad))
            with torch.set_grad_enabled(self.grad):
                out = self.call(lambda: run(like.detach().clone()), f"like {list(like.shape)}")
            if isinstance(out, Tensor) and out.shape == like.shape:
                return
            if out is not FAILED:
                what = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
                tuples = f" ({TUPLES})" if isinstance(out, (tuple, list)) else ""
                raise UnsupportedFieldError(
                    f"{self.name}: forward(t, like) with like {list(like.shape)} returned {what}; a vector field "
                    f"returns one tensor shaped like y{tuples}"
                )
        for refuse in (self.refuse_swapped, self.refuse_tuples):
            refuse()
        raise UnsupportedFieldError(
            f"{self.name}: forward(t, like) failed for like {list(like.shape)} and t 0-d, [1, 1] or [1]: "
            f"{type(self.error).__name__}: {self.error}"
        ) from self.error

    @property
    def name(self) -> str:
        return f"module {type(self.module).__name__}"

    # --------------------------------------------------------------------------------------------- why nothing works

    def states(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(t, y [batch, dim]) of a few sizes and the usual forms of t."""
        for dim in self.dims[:12]:
            for t_shape in TIME_SHAPES:
                yield Probe(dim, t_shape, self.batch or 7, self.dtype, self.device).point()

    def swapped(self) -> bool:
        """forward(y, t) runs."""
        for t, y in self.states():
            with contextlib.suppress(Exception):
                out = self.module(y, t)
                if isinstance(out, Tensor) and out.shape == y.shape:
                    return True
        return False

    def refuse_swapped(self) -> None:
        if self.swapped():
            raise UnsupportedFieldError(
                f"{self.name}: forward runs with its arguments swapped, as forward(y, t), but a vector field is called "
                "as forward(t, y). Swap them, or wrap the module in one whose forward(t, y) calls it"
            )

    def refuse_columns(self, probe: Probe) -> None:
        """Samples that are columns, y [dim, batch], look like one state [dim] that is transposed."""
        watch = _Transposes({id(x) for _, x in self.held})
        with contextlib.suppress(Exception), warnings.catch_warnings(), watch:
            warnings.simplefilter("ignore")
            self.module(probe.time(0.5), probe.point()[1][0])
        if watch.found:
            raise UnsupportedFieldError(
                f"{self.name}: forward transposes the state: its samples are the columns of y [{probe.dim}, batch], "
                "and those of a compiled field the rows of y [batch, dim]. Leave the transpositions out (net(y) for "
                f"net(y.t()).t()) and transpose y0 and the result. Otherwise u{REMEDY[1:]}"
            )

    def refuse_tuples(self) -> None:
        """A state of several tensors: forward runs for one, or unpacks what it is given, or returns one."""
        unpacks = isinstance(self.error, (ValueError, TypeError)) and "too many values to unpack" in str(self.error)
        if unpacks or self._takes_tuple():
            what = "forward(t, state) takes a tuple of tensors, so it is no field of one tensor"
        elif self.returned_tuple:
            what = f"{self.returned}; a vector field returns one tensor shaped like y. If its state is a tuple"
        else:
            return
        raise UnsupportedFieldError(f"{self.name}: {what}: {TUPLES}")

    def _takes_tuple(self) -> bool:
        for t, y in self.states():
            if t.dim():
                continue
            one, flat = y.new_zeros(len(y), 1), y.new_zeros(len(y))
            for state in ((y, one), (y, y), (y, flat), (y, one, one), (y, y, y), (y, flat, flat), (y, y, y, y)):
                with contextlib.suppress(Exception):
                    out = self.module(t, state)
                    if isinstance(out, (tuple, list)) and len(out) == len(state) and out[0].shape == y.shape:
                        return True
        return False

    def only_batch(self) -> Probe | None:
        """A batch for which forward runs after all, and why."""
        known, mentioned = (sorted(sizes - {0, self.batch}) for sizes in (self.sizes, self.mentioned))
        for batch in [*known[:32], 2, 4, 8, *mentioned[:16]]:
            for dim in self.dims[:12]:
                for t_shape in TIME_SHAPES[:2]:
                    probe = Probe(dim, t_shape, batch, self.dtype, self.device)
                    t, y = probe.point()
                    with contextlib.suppress(Exception):
                        out = self.module(t, y)
                        if isinstance(out, Tensor) and out.shape == y.shape:
                            return Probe(dim, t_shape, batch, self.dtype, self.device, only=self._why(batch))
        return None

    def _why(self, batch: int) -> str:
        rows = [f"{name!r} {list(x.shape)}" for name, x in self.held if batch in x.shape]
        if batch in self.sizes or batch not in (2, 4, 8):
            what = f"the module holds {', '.join(rows[:3])}" if rows else "it holds a tensor"
            return (
                f"forward runs for batches of {batch} samples, not of {self.batch}: {what}, with a row for every sample"
            )
        return f"forward runs for batches of {batch} samples, not of {self.batch}: it treats samples in groups"

    def flat(self, shape: list[int]) -> str:
        """A remedy, where forward runs for a sample laid in one row."""
        probe = Probe(math.prod(shape[1:]), (), self.batch, self.dtype, self.device)
        runs = probe.dim < 1 << 16 and self.works(probe)
        return f"Forward runs for flat states too: solve for y0.flatten(1), [{shape[0]}, {probe.dim}]. " if runs else ""

    def more_axes(self) -> list[int] | None:
        """A state with more axes for which forward runs."""
        points = sorted(s for s in {*self.sizes, 3, 4} if 0 < s <= 64)[:24]
        for dim in self.dims[:12]:
            for between in [(p,) for p in points] + [(p, p) for p in points] + [(2, 4, 4), (4, 4)]:
                shape = (self.batch, *between, dim)
                y = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                with contextlib.suppress(Exception):
                    out = self.module(torch.tensor(0.5).to(self.device, self.dtype), y.to(self.device, self.dtype))
                    if isinstance(out, Tensor) and out.shape == y.shape:
                        return list(shape)
        return None


class _Transposes(TorchFunctionMode):
    """Is a tensor of one axis transposed, which changes nothing? own: ids of tensors that may be."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.found = own, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        named = getattr(func, "__name__", "") == "t" or getattr(func, "__self__", None) in (Tensor.T, Tensor.mT)
        if named and isinstance(args[0], Tensor) and args[0].dim() == 1 and id(args[0]) not in self.own:
            self.found = True
        return func(*args, **(kwargs or {}))


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and tensors in plain attributes, by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()
    for path, part in module.named_modules():
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            items = list(value.values()) if isinstance(value, dict) else value
            for item in items if isinstance(items, (list, tuple)) else [items]:
                if isinstance(item, Tensor):
                    yield f"{path}.{key}".strip("."), item


def _named_swapped(module: nn.Module) -> bool:
    """forward's arguments are called (y, t)."""
    with contextlib.suppress(TypeError, ValueError):
        names = [name.lower() for name in inspect.signature(module.forward).parameters][:2]
        return len(names) == 2 and names[0] in STATE_NAMES and names[1] in TIME_NAMES
    return False


def _diagnose(attempts: Attempts, works: list[Probe], dim: int | None, like: Tensor | None) -> Probe:
    """Raises what explains why there is no one way to call the module, or gives the way for the only batch."""
    name, error = attempts.name, attempts.error
    if not works:
        attempts.refuse_swapped()
        attempts.refuse_tuples()
        if attempts.differentiates:
            raise UnsupportedFieldError(
                f"{name}: forward differentiates what it computes (torch.autograd.grad), and such a field cannot be "
                f"expressed as layers. {REMEDY}."
            ) from error
        images = next((p for p, m in attempts.module.named_modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
        if images is not None and (dim is None or like is not None):
            raise UnsupportedFieldError(
                f"{name}: {images!r} is a convolution, and the shape of its states cannot be told. Pass an example of "
                f"the state, like=y0. Otherwise u{REMEDY[1:]}."
            )
        only = attempts.only_batch()
        if only is not None:
            return only
        shape = None if like is None or like.dim() < 3 else list(like.shape)
        shape = shape or attempts.more_axes()
        if shape is not None:
            raise UnsupportedFieldError(
                f"{name}: forward takes states with more axes ({shape} runs, [{attempts.batch}, {shape[-1]}] does not) "
                "and mixes the rows [..., dim] of one sample, or needs a number of them. Pass an example of the state, "
                f"like=y0. {attempts.flat(shape)}Otherwise u{REMEDY[1:]}."
            )
        if attempts.returned is not None:
            raise ValueError(f"{name}: {attempts.returned}; a vector field returns one tensor shaped like y")
    if dim is not None:
        raise UnsupportedFieldError(
            f"{name}: forward(t, y) failed for y [{attempts.batch}, {dim}] and t 0-d, [1, 1] or [1]: "
            f"{type(error).__name__}: {error}. Where its states have another shape, pass an example, like=y0"
        ) from error
    found = ", ".join(str(probe.dim) for probe in works) or "none"
    hint = f" (the first try, {attempts.error_at}, said: {error})" if error is not None and not works else ""
    raise ValueError(
        f"{name}: the size of the state cannot be told from the weights (sizes that run: {found}); pass dim=..., or an "
        f"example of the state, like=y0{hint}"
    )
