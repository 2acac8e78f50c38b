"""A solve of a compiled field by its engine, the whole of it at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import gradients, memory, operators
from ..compiled_field import CompiledField
from ..divergence_field import DivergenceField
from ..devices import factories_on_cpu
from ..field import UnsupportedFieldError
from ..hooks import CALLBACKS, hooks_of
from ..numerics.tableaus import ADAPTIVE, METHODS
from ..solution import Solution, SolverError, Stats
from .arguments import State, check_tolerance, numbers_of, request_of, upward


@dataclass
class EngineCall:
    """A solve of a compiled field by its engine: x [..., dim], or (x, l [...] or [..., 1])."""

    func: CompiledField | DivergenceField
    y0: State
    t: Tensor
    rtol: tuple[float, ...]
    atol: tuple[float, ...]
    method: str
    options: dict
    step_control: str

    @staticmethod
    def make(
        func: CompiledField | DivergenceField, y0: State, t: Tensor, rtol: Any, atol: Any,
        method: str, options: dict, step_control: str,
    ) -> "EngineCall | str":  # fmt: skip
        parts = (y0,) if isinstance(y0, Tensor) else y0
        if not parts:
            raise ValueError("y0 must be a tensor or a tuple with at least one tensor")
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"y0 must hold tensors only, not {', '.join(type(part).__name__ for part in parts)}")
        # nn.Module answers for a missing attribute slowly, so look where a callback would be
        places = (func.__dict__, func._modules, type(func).__dict__)
        if any(place.get(name) is not None for name in CALLBACKS for place in places):
            return "func has callbacks, which need Python at every step"
        if any(hooks_of(func)) or func.hooked_inside():
            return "func, its parts or all modules have forward hooks or others, which need Python at every evaluation"
        if isinstance(func, DivergenceField):
            field = func.field
            if not isinstance(field, CompiledField):
                return "the field under the divergence is not compiled"
            if not isinstance(y0, tuple) or len(parts) != 2:
                return "the state of a field with divergence must be a tuple (x, l)"
        else:
            field = func
            if isinstance(y0, tuple) and (field.layout is None or not field.layout.is_tuple):
                return "the state is a tuple, and this compiled field runs on one tensor"
        if field.layout is not None:
            return EngineCall._make_of_layout(field, func, y0, t, rtol, atol, method, options, step_control)
        x = parts[0]
        if x.dim() < 1 or x.shape[-1] != field.dim:
            return f"the state's last axis must be {field.dim}, its shape is {list(x.shape)}"
        field.check_axes("y0", x)
        if len(parts) == 2 and parts[1].shape not in (x.shape[:-1], x.shape[:-1] + (1,)):
            return f"l must be of shape {list(x.shape[:-1])} or with a last axis of 1, not {list(parts[1].shape)}"
        dtype, device = field.dtype, field.device
        if len({part.dtype for part in parts}) > 1:
            raise TypeError(f"y0: x is {x.dtype} and l is {parts[1].dtype}; the field wants {dtype} for both")
        if len({part.device for part in parts}) > 1:
            raise ValueError(f"y0: x is on {x.device} and l on {parts[1].device}; the field wants both on {device}")
        for part in parts:
            if part.dtype != dtype or part.device != device:
                return (
                    f"y0 is {part.dtype} on {part.device}, the compiled field {dtype} on {device}; "
                    "convert one to the other to run it natively"
                )
        return EngineCall._of_options(func, y0, t, rtol, atol, method, options, step_control, len(parts))

    @staticmethod
    def _of_options(
        func: CompiledField | DivergenceField, y0: State, t: Tensor, rtol: Any, atol: Any, method: str, options: dict,
        step_control: str, parts: int,
    ) -> "EngineCall | str":  # fmt: skip
        """parts: tensors of the state, each of which may have tolerances of its own."""
        check_tolerance("rtol", rtol, parts if parts > 1 else None)
        check_tolerance("atol", atol, parts if parts > 1 else None)
        tolerances = numbers_of(rtol, parts), numbers_of(atol, parts)
        if None in tolerances:
            return "rtol and atol differ from element to element"
        if "norm" in options and method in ADAPTIVE:
            return "options['norm'] is Python at every step"
        if options.get("dtype", torch.float64) != torch.float64:
            return f"options['dtype'] is {options['dtype']}; engines keep time in float64"
        if options.get("interp", "linear") != "linear":
            return f"options['interp'] is {options['interp']!r}; engines interpolate linearly on a fixed grid"
        return EngineCall(func, y0, t, *tolerances, method, options, step_control)

    @staticmethod
    def _make_of_layout(
        field: CompiledField, func: CompiledField | DivergenceField, y0: State, t: Tensor, rtol: Any, atol: Any,
        method: str, options: dict, step_control: str,
    ) -> "EngineCall | str":  # fmt: skip
        """Of a field whose states are of a shape of their own."""
        state = y0[0] if isinstance(func, DivergenceField) else y0
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        if field.layout.fits(state) is not None:
            return f"y0: {field.layout.fits(state)}"
        for part in parts:
            if part.dtype != field.dtype or part.device != field.device:
                return (
                    f"y0 is {part.dtype} on {part.device}, the compiled field {field.dtype} on {field.device}; convert "
                    "one to the other to run it natively"
                )
        if isinstance(func, DivergenceField):
            samples = len(field.layout.flatten(state))
            if y0[1].numel() != samples:
                return f"l must have one number for each of {samples} samples, not be of shape {list(y0[1].shape)}"
        count = 2 if isinstance(func, DivergenceField) else len(parts)
        return EngineCall._of_options(func, y0, t, rtol, atol, method, options, step_control, count)

    @factories_on_cpu
    def run(self) -> Solution:
        """Raises SolverError where the solve cannot go on, MemoryError, with the sizes, where it does not fit."""
        parts = (self.y0,) if isinstance(self.y0, Tensor) else self.y0
        func = self.func
        field, kind = (func.field, func.kind) if isinstance(func, DivergenceField) else (func, None)
        if torch.compiler.is_compiling():
            return self._run_compiled(field, kind, *parts)
        try:
            if field.layout is not None or field.has_context:
                return self._run_of_graph(field, kind, parts)
            return self._run(field, kind, *parts)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_out_of_memory(error):
                raise
            memory.explain(error, parts, len(self.t), METHODS[self.method].stages_per_step)

    def _run(self, field: CompiledField, kind: str | None, x0: Tensor, l0: Tensor | None = None) -> Solution:
        func, parts = self.func, (x0,) if l0 is None else (x0, l0)
        times, sign = upward(self.t, x0.device)
        if any(part.numel() == 0 for part in parts):
            empty = torch.zeros(0, 2, dtype=torch.float64)
            ys = tuple(part[None].expand(len(self.t), *part.shape).clone() for part in parts)
            return self._solution(ys, Stats(0, 0, 0, empty, field.engine_name, self.method, self.step_control))
        memory.refuse_what_never_fits(parts, len(times), METHODS[self.method].stages_per_step)
        (engine, reference), options = field.ready(kind), self.options
        if field.has_context:  # since the module was read anew
            return self._run_of_graph(field, kind, parts)
        noise = None if kind is None else func.begin_solve(x0)
        if (constructor := options.get("grid_constructor")) is not None:
            options = {**options, "grid_constructor": lambda t: constructor(func, self.y0, t)}
        request = request_of(
            *_flat(field.dim, x0, l0, noise), self.t, times, sign, self.rtol, self.atol, self.method, options,
            self.step_control,
        )  # fmt: skip
        result = gradients.solve(engine, reference, request)
        field.count(result.nfe)
        ys = tuple(
            outputs.reshape(len(self.t), *part.shape) for outputs, part in zip((result.xs, result.ls), parts)
        )
        if result.status != "ok":
            raise SolverError.of(result, request, ys, isinstance(self.y0, tuple))
        steps = result.steps if sign > 0 else result.steps * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        return self._solution(ys, Stats(
            result.nfe, result.accepted, result.rejected, steps, engine.name, self.method, self.step_control
        ))

    def _run_of_graph(self, field: CompiledField, kind: str | None, parts: tuple[Tensor, ...]) -> Solution:
        """Of a state of the field's own layout, or a field with a context."""
        func, layout = self.func, field.layout
        state = parts if layout is not None and layout.is_tuple else parts[0]
        l0 = parts[1] if kind is not None else None
        flatten = (lambda y: y.reshape(-1, field.dim)) if layout is None else layout.flatten
        x0 = flatten(state).contiguous()
        times, sign = upward(self.t, x0.device)

        def laid_out(xs: Tensor, ls: Tensor | None) -> tuple[Tensor, ...]:
            ys = xs.reshape(len(xs), *parts[0].shape) if layout is None else layout.unflatten(xs)
            ys = ys if isinstance(ys, tuple) else (ys,)
            return ys if ls is None else (*ys, ls.reshape(len(ls), *l0.shape))

        if x0.numel() == 0:
            empty = torch.zeros(0, 2, dtype=torch.float64)
            ys = tuple(part[None].expand(len(self.t), *part.shape).clone() for part in parts)
            return self._solution(ys, Stats(0, 0, 0, empty, field.engine_name, self.method, self.step_control))
        memory.refuse_what_never_fits(parts, len(times), METHODS[self.method].stages_per_step)
        noise = None if kind is None else func.begin_solve(state)
        noise = None if noise is None else flatten(noise).contiguous()
        options = self.options
        if (constructor := options.get("grid_constructor")) is not None:
            options = {**options, "grid_constructor": lambda t: constructor(func, self.y0, t)}
        request = request_of(
            x0, None if l0 is None else l0.reshape(-1).contiguous(), noise, self.t, times, sign, self.rtol, self.atol,
            self.method, options, self.step_control,
        )  # fmt: skip
        sizes = tuple(math.prod(shape) for shape in layout.shapes) if layout is not None and layout.is_tuple else None
        engine, reference = field.ready(kind)
        request = replace(request, context=field.context_of(len(x0)), parts=sizes)
        result = gradients.solve(engine, reference, request)
        field.count(result.nfe)
        ys = laid_out(result.xs, result.ls)
        if result.status != "ok":
            raise SolverError.of(result, request, ys, isinstance(self.y0, tuple))
        steps = result.steps if sign > 0 else result.steps * torch.tensor([-1.0, 1.0], dtype=torch.float64)
        return self._solution(ys, Stats(
            result.nfe, result.accepted, result.rejected, steps, engine.name, self.method, self.step_control
        ))

    def _run_compiled(
        self, field: CompiledField, kind: str | None, x0: Tensor, l0: Tensor | None = None
    ) -> Solution:  # fmt: skip
        """The solve as one operator in the graph; its statistics are tensors."""
        obstacle = operators.no_solve(field.described, self.t, self.options, self.step_control)
        if obstacle is not None:
            if torch.compiler.is_exporting():
                raise UnsupportedFieldError(f"torch.export of this solve: {obstacle}")
            return _run_eagerly(self)
        noise = None if kind is None else self.func.begin_solve(x0)
        solved = operators.solve(
            field.described, field.ordered(), kind, *_flat(field.dim, x0, l0, noise), self.t, self.rtol, self.atol,
            self.method, self.options,
        )  # fmt: skip
        ys = [solved.xs.reshape(self.t.shape[0], *x0.shape)]
        if l0 is not None:
            ys.append(solved.ls.reshape(self.t.shape[0], *l0.shape))
        nfe, accepted, rejected = solved.counts.unbind()
        stats = Stats(nfe, accepted, rejected, None, field.requested, self.method, self.step_control)
        return self._solution(tuple(ys), stats)

    def _solution(self, ys: tuple[Tensor, ...], stats: Stats) -> Solution:
        ys = (self.func.field if isinstance(self.func, DivergenceField) else self.func).reaching(ys)
        return Solution(ys if isinstance(self.y0, tuple) else ys[0], stats)


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler with this package
def _run_eagerly(call: EngineCall) -> Solution:
    return call.run()


def _flat(
    dim: int, x: Tensor, l: Tensor | None, noise: Tensor | None  # noqa: E741
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """x [batch, dim], l [batch], noise [batch, dim]."""
    return (
        x.reshape(-1, dim).contiguous(),
        None if l is None else l.reshape(-1).contiguous(),
        None if noise is None else noise.reshape(-1, dim).contiguous(),
    )
