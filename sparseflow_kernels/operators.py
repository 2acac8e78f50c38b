"""Compiled fields as torch.compile and torch.export see them: operators with fakes and gradients, opaque inside.

    sparseflow::evaluate, sparseflow::solve, and their backwards

An operator is given its field as a string (shapes, activations, engine; a digest of the patterns), the patterns as
constant tensors, and the numbers as tensors, so that a graph of torch.export holds all it needs: it can be saved, and
runs in any process that has imported this package. Engines packed for a graph's tensors live as long as the tensors do.
Eager calls
do not come here: an operator costs more than a small evaluation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import gradients
from .engines.base import Engine, SolveRequest, SolveResult
from .engines.reference import ReferenceEngine
from .field import Activation, GraphField, Layer, LinearShift, Pattern, SigmoidGate, TimeFunction, VectorField
from .packing import Packing
from .solution import SolverError
from .solving.arguments import request_of, upward

# ------------------------------------------------------------------------------------------------- fields as constants


class Described(NamedTuple):
    """A field without its numbers: its layers as text, and (row_ptr, col) of every layer's pattern, flat."""

    text: str
    patterns: list[Tensor]


def describe(field: VectorField | GraphField, engine: str) -> Described | None:
    """None for a graph, and for a field with functions of time of its own: they are Python, and no constants."""
    if isinstance(field, GraphField):
        return None
    layers, digest, patterns = [], hashlib.sha256(), []
    for layer in field.layers:
        if isinstance(layer.gate, TimeFunction) or isinstance(layer.shift, TimeFunction):
            return None
        layers.append({
            "shape": layer.pattern.shape, "activation": [layer.activation.name, layer.activation.params],
            "gate": layer.gate is not None, "shift": layer.shift is not None, "name": layer.name,
        })  # fmt: skip
        for part in (layer.pattern.row_ptr, layer.pattern.col):
            digest.update(part.numpy().tobytes())
            patterns.append(part)
    text = json.dumps({"engine": engine, "layers": layers, "patterns": digest.hexdigest()}, separators=(",", ":"))
    return Described(text, patterns)


@dataclass
class _ReadBack:
    """A description read back: the field's skeleton, and its engines for the numbers it was last given."""

    text: str
    field: VectorField
    packing: Packing

    @staticmethod
    def read(text: str, patterns: Sequence[Tensor]) -> "_ReadBack":
        described, nothing = json.loads(text), torch.empty(0, device="meta")
        layers = []
        for entry, row_ptr, col in zip(described["layers"], patterns[::2], patterns[1::2]):
            pattern = Pattern(tuple(entry["shape"]), row_ptr.cpu(), col.cpu())
            name, params = entry["activation"]
            layers.append(Layer(
                pattern, nothing.new_empty(pattern.nnz), nothing.new_empty(pattern.shape[0]),
                SigmoidGate(nothing, nothing) if entry["gate"] else None,
                LinearShift(nothing, nothing) if entry["shift"] else None,
                Activation(name, tuple(params)), entry["name"],
            ))  # fmt: skip
        return _ReadBack(text, VectorField(layers), Packing(described["engine"]))

    def over(self, tensors: Sequence[Tensor]) -> VectorField:
        given = iter([tensor.detach() for tensor in tensors])  # aliases: what is packed must not keep `_read_back`' key
        return self.field.map_tensors(lambda _: next(given))

    def engine(self, kind: str | None, tensors: Sequence[Tensor]) -> Engine:
        return self.packing.engine(kind, tensors, lambda: self.over(tensors))

    def reference(self, kind: str | None, tensors: Sequence[Tensor]) -> ReferenceEngine:
        field = self.over(tensors)
        return ReferenceEngine(field, self.packing.plan(kind, lambda: field))


_read_back = WeakTensorKeyDictionary()  # the first tensor of a field -> what its description gave


def _field_of(text: str, patterns: Sequence[Tensor], tensors: Sequence[Tensor]) -> _ReadBack:
    known = _read_back.get(tensors[0])
    if known is None or known.text != text:
        known = _read_back[tensors[0]] = _ReadBack.read(text, patterns)
    return known


def _with_autograd() -> Any:
    """Operators run below autograd, which the reference engine's gradients need."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded & torch._C._after_autograd_keyset)


def _needed(values: Sequence[Tensor | None], likes: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Gradients as operators return them: zeros for None, nothing (of size 0) for what is not needed."""
    found = []
    for value, like, need in zip(values, likes, needs):
        if not need:
            value = torch.empty(0)
        elif value is None:
            value = torch.zeros_like(like)
        else:
            value = value.clone()  # operators may return no memory of their arguments, nor any twice
        found.append(value)
    return found


def _fake_needed(likes: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(like) if need else torch.empty(0) for like, need in zip(likes, needs)]


def _nothing(constant: Any) -> Any:
    """The gradient of a constant argument as torch wants it: a list of None for a list of tensors (which an empty one
    is), None for all else."""
    tensors = isinstance(constant, list) and all(isinstance(entry, Tensor) for entry in constant)
    return [None] * len(constant) if tensors else None


_FIELD = "Tensor[] tensors, Tensor[] patterns, str program, str kind"  # program: the text; exported programs name it so


# --------------------------------------------------------------------------------------------------------- evaluations


def evaluate(
    field: Described, tensors: list[Tensor], kind: str | None, t: Tensor, x: Tensor, noise: Tensor | None
) -> tuple[Tensor, ...]:  # fmt: skip
    """gradients.evaluate, as an operator. tensors: the field's, in the order of VectorField.tensors()."""
    f, trace = torch.ops.sparseflow.evaluate(t, x, noise, tensors, field.patterns, field.text, kind or "")
    return (f,) if kind is None else (f, trace)


@torch.library.custom_op(
    "sparseflow::evaluate", mutates_args=(), schema=f"(Tensor t, Tensor x, Tensor? noise, {_FIELD}) -> (Tensor, Tensor)"
)
def _evaluate(t, x, noise, tensors, patterns, program, kind):
    engine = _field_of(program, patterns, tensors).engine(kind or None, tensors)
    with torch.no_grad():
        found = gradients.call(engine, t, x.contiguous(), None if noise is None else noise.contiguous())
    return (*found, x.new_empty(0))[:2]


@_evaluate.register_fake
def _(t, x, noise, tensors, patterns, program, kind):
    return x.new_empty(x.shape), x.new_empty(x.shape[0] if kind else 0)


@torch.library.custom_op(
    "sparseflow::evaluate_backward", mutates_args=(),
    schema=f"(Tensor t, Tensor x, Tensor? noise, {_FIELD}, Tensor grad_f, Tensor? grad_trace, bool[] needs)"
    " -> Tensor[]",
)  # fmt: skip
def _evaluate_backward(t, x, noise, tensors, patterns, program, kind, grad_f, grad_trace, needs):
    kind, read = kind or None, _field_of(program, patterns, tensors)
    with _with_autograd(), torch.no_grad():
        gradient = gradients.evaluate_backward(
            read.engine(kind, tensors), read.reference(kind, tensors), t, x.contiguous(),
            None if noise is None else noise.contiguous(), grad_f, grad_trace if kind else None,
            gradients.wanted(gradients.EVALUATE_INPUTS, (*needs[:3], False, *needs[3:])),
        )  # fmt: skip
    return _needed((gradient.t, gradient.x, gradient.noise, *gradient.tensors), (t, x, noise, *tensors), needs)


@_evaluate_backward.register_fake
def _(t, x, noise, tensors, patterns, program, kind, grad_f, grad_trace, needs):
    return _fake_needed((t, x, noise, *tensors), needs)


def _evaluate_setup(ctx, inputs, output):
    t, x, noise, tensors, ctx.patterns, ctx.program, ctx.kind = inputs
    ctx.save_for_backward(t, x, noise, *tensors)


def _evaluate_gradient(ctx, grad_f, grad_trace):
    t, x, noise, *tensors = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3]]
    found = torch.ops.sparseflow.evaluate_backward(
        t, x, noise, tensors, ctx.patterns, ctx.program, ctx.kind, grad_f, grad_trace if ctx.kind else None, needs
    )
    found = [value if need else None for value, need in zip(found, needs)]
    return (*found[:3], found[3:], _nothing(ctx.patterns), None, None)


_evaluate.register_autograd(_evaluate_gradient, setup_context=_evaluate_setup)


# -------------------------------------------------------------------------------------------------------------- solves

_SOLVE = (
    f"Tensor x, Tensor? l, Tensor t, Tensor? noise, {_FIELD}, str method, float[] rtol, float[] atol, str[] names, "
    "float[] options, float[] step_t, float[] jump_t"
)
_NUMBERS = frozenset((
    "min_step", "max_step", "first_step", "safety", "ifactor", "dfactor", "max_num_steps", "step_size", "perturb",
    "stop_at_outputs",
))  # fmt: skip
_LISTS = frozenset(("step_t", "jump_t"))
_IGNORED = frozenset(("dtype", "interp", "norm"))  # float64, "linear" and, on a fixed grid, any norm


def no_solve(field: Described | None, t: Any, options: dict, step_control: str) -> str | None:
    """Why a solve cannot be an operator, or None. Reads no data."""
    if field is None:
        return "the field has functions of time in Python"
    if step_control != "shared" or not isinstance(t, Tensor):
        return "only shared steps, at times in a tensor, can be traced"
    for name, value in options.items():
        if value is None or name in _IGNORED:
            continue
        if name not in _NUMBERS and name not in _LISTS:
            return f"options[{name!r}] is Python"
        for entry in value if name in _LISTS and isinstance(value, (list, tuple)) else (value,):
            if not isinstance(entry, (bool, int, float)):
                return f"options[{name!r}] must be made of plain numbers"
    return None


class Solved(NamedTuple):
    """xs: [outputs, batch, dim].  ls: [outputs, batch] (or of size 0).  counts: int64 [nfe, accepted, rejected].  The
    rest: as in SolveResult if recorded, of length 0 for None."""

    xs: Tensor
    ls: Tensor
    counts: Tensor
    steps: Tensor
    states: Tensor
    derivatives: Tensor
    x_slopes: Tensor
    l_slopes: Tensor


def solve(
    field: Described, tensors: list[Tensor], kind: str | None, x: Tensor, l: Tensor | None,  # noqa: E741
    noise: Tensor | None, t: Tensor, rtol: Sequence[float], atol: Sequence[float], method: str, options: dict,
) -> Solved:  # fmt: skip
    """A solve, as an operator; tensors as in `evaluate`, x [batch, dim], l [batch], noise [batch, dim], t as the caller
    has it."""
    names = [name for name, value in options.items() if name in _NUMBERS and value is not None]
    wants = [value for value in (x, l, t, noise, *tensors) if value is not None and value.requires_grad]
    record = torch.is_grad_enabled() and len(wants) > 0
    return Solved(*torch.ops.sparseflow.solve(
        x, l, t, noise, tensors, field.patterns, field.text, kind or "", method,
        [float(value) for value in rtol], [float(value) for value in atol],
        names, [float(options[name]) for name in names],
        *([float(point) for point in options.get(name) or ()] for name in ("step_t", "jump_t")), record,
    ))  # fmt: skip


def _request(x, l, t, noise, method, rtol, atol, names, options, step_t, jump_t) -> SolveRequest:  # noqa: E741
    given: dict[str, Any] = dict(zip(names, options))
    given |= {name: points for name, points in (("step_t", step_t), ("jump_t", jump_t)) if points}
    x, l, noise = (None if value is None else value.contiguous() for value in (x, l, noise))  # noqa: E741
    return request_of(x, l, noise, t, *upward(t, x.device), tuple(rtol), tuple(atol), method, given)


@torch.library.custom_op(
    "sparseflow::solve", mutates_args=(), schema=f"({_SOLVE}, bool record) -> ({', '.join(['Tensor'] * 8)})"
)
def _solve(
    x, l, t, noise, tensors, patterns, program, kind, method, rtol, atol, names, options, step_t, jump_t,  # noqa: E741
    record,
):  # fmt: skip
    with torch.no_grad():
        request = replace(
            _request(x, l, t, noise, method, rtol, atol, names, options, step_t, jump_t), record=record
        )
        if len(x) == 0:
            result = SolveResult(x.new_empty(len(t), *x.shape), None, 0, 0, 0, torch.empty(0, 2, dtype=torch.float64))
        else:
            result = _field_of(program, patterns, tensors).engine(kind or None, tensors).solve(request)
    if result.status != "ok":
        raise SolverError.of(result, request, (result.xs,) if l is None else (result.xs, result.ls), l is not None)

    def returned(value: Tensor | None, *shape: int) -> Tensor:
        """Outputs may share no memory."""
        return x.new_empty(shape) if value is None else value.clone(memory_format=torch.contiguous_format)

    x_slopes, l_slopes = result.slopes or (None, None)
    return (
        result.xs.contiguous(), returned(result.ls, *(() if l is None else (len(t),)), 0),
        torch.tensor([result.nfe, result.accepted, result.rejected]),
        result.steps if record else result.steps[:0].clone(),
        returned(result.states, 0, *x.shape), returned(result.derivatives, 0, *x.shape),
        returned(x_slopes, 0, *x.shape), returned(l_slopes, 0, len(x)),
    )  # fmt: skip


@_solve.register_fake
def _(x, l, t, noise, tensors, patterns, program, kind, method, rtol, atol, names, options, step_t, jump_t, record):
    def some() -> Any:
        return torch.library.get_ctx().new_dynamic_size() if record else 0

    return (
        x.new_empty(t.shape[0], *x.shape), x.new_empty(0) if l is None else x.new_empty(t.shape[0], x.shape[0]),
        torch.empty(3, dtype=torch.int64), torch.empty(some(), 2, dtype=torch.float64),
        *(x.new_empty(some(), *x.shape) for _ in range(3)), x.new_empty(some(), x.shape[0]),
    )  # fmt: skip


@torch.library.custom_op(
    "sparseflow::solve_backward", mutates_args=(),
    schema=f"({_SOLVE}, Tensor[] recorded, Tensor grad_xs, Tensor? grad_ls, bool[] needs) -> Tensor[]",
)  # fmt: skip
def _solve_backward(
    x, l, t, noise, tensors, patterns, program, kind, method, rtol, atol, names, options, step_t, jump_t,  # noqa: E741
    recorded, grad_xs, grad_ls, needs,
):  # fmt: skip
    if len(x) == 0:
        return _needed([None] * len(needs), (x, l, t, noise, *tensors), needs)
    kind, read = kind or None, _field_of(program, patterns, tensors)
    (need_x, need_l, need_t, need_noise), of_tensors = needs[:4], needs[4:]
    with _with_autograd():
        time = t.detach().requires_grad_(need_t)
        with torch.enable_grad():
            moving = _request(x, l, time, noise, method, rtol, atol, names, options, step_t, jump_t)
        with torch.no_grad():
            still = {n: v.detach() for n in gradients.SOLVE_INPUTS if (v := getattr(moving, n)) is not None}
            request = replace(moving, record=True, **still)
            steps, states, derivatives, *slopes = recorded
            result = SolveResult(
                None, None, 0, len(steps), 0, steps, states=states, derivatives=derivatives,
                slopes=None if len(slopes[0]) == 0 else (slopes[0], None if l is None else slopes[1]),
            )  # fmt: skip
            names_wanted = gradients.wanted(
                gradients.SOLVE_INPUTS,
                (need_x, need_l, need_t, need_t and moving.grid is not None, need_noise, False, *of_tensors),
            )
            reference = read.reference(kind, tensors)
            engine = read.engine(kind, tensors)
            if engine.no_gradient(names_wanted, request) is not None:
                engine, request, result = reference, replace(request, record=False), replace(result, states=None)
            gradient = gradients.solve_backward(engine, reference, request, result, grad_xs, grad_ls, names_wanted)
        found_t = None
        if need_t:
            pairs = [
                (value, grad) for value, grad in ((moving.times, gradient.times), (moving.grid, gradient.grid))
                if grad is not None and value.requires_grad
            ]  # fmt: skip
            if pairs:
                (found_t,) = torch.autograd.grad([v for v, _ in pairs], time, [g for _, g in pairs])
    found = (gradient.x, gradient.l, found_t, gradient.noise, *gradient.tensors)
    return _needed(found, (x, l, t, noise, *tensors), needs)


@_solve_backward.register_fake
def _(
    x, l, t, noise, tensors, patterns, program, kind, method, rtol, atol, names, options, step_t, jump_t,  # noqa: E741
    recorded, grad_xs, grad_ls, needs,
):  # fmt: skip
    return _fake_needed((x, l, t, noise, *tensors), needs)


def _solve_setup(ctx, inputs, output):
    x, l, t, noise, tensors, *ctx.constants, _ = inputs  # noqa: E741
    ctx.save_for_backward(x, l, t, noise, *Solved(*output)[3:], *tensors)


def _solve_gradient(ctx, grad_xs, grad_ls, *_):
    x, l, t, noise, *rest = ctx.saved_tensors  # noqa: E741
    recorded, tensors = rest[:5], rest[5:]
    needs = [*ctx.needs_input_grad[:4], *ctx.needs_input_grad[4]]
    found = torch.ops.sparseflow.solve_backward(
        x, l, t, noise, tensors, *ctx.constants, recorded, grad_xs, None if l is None else grad_ls, needs
    )
    found = [value if need else None for value, need in zip(found, needs)]
    return (*found[:4], found[4:], *map(_nothing, ctx.constants), None)


_solve.register_autograd(_solve_gradient, setup_context=_solve_setup)
