"""Is the captured field the module? What a run cannot show (values kept between calls, rows that see each other where
the state has other axes) shows at other points, so the two are compared."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor, nn

from .. import activations
from ..field import MOST_AXES, GraphField, Node, UnsupportedFieldError, VectorField
from ..field.graph import evaluate, order
from .attempts import held_tensors
from .graph_probe import GraphProbe
from .probe import TIME, Probe, differentiable
from .refusal import REMEDY

# Near times first, then far ones: functions of t may overflow there, and rounding grows with t.
TIMES = (-1.0, -0.37, 0.0, 0.45, 1.3, 2.0, 0.0013, -6.71, 11.3, 57.7, -143.0, 997.3)
NEAR = 10.0
SCALES = (1.0, 0.2, 3.0, 0.01, 30.0)  # sizes of y, a row each
PATIENCE = 2.0  # seconds for one run of forward with states of other shapes
COST = 3e7  # multiply-adds of a comparison that may be left out
MANY_NODES = 600  # of a graph, which is compared at fewer times then
ROUNDING = 64  # units in the last place by which t and y are moved, to see what rounding does to the module


def verify(module: nn.Module, field: VectorField, probe: Probe, like: Tensor | None = None) -> dict[int, str]:
    """Raises UnsupportedFieldError unless both agree to rounding at points other than the traced one, and for the
    example. Returns the numbers of axes of a state for which they do not, with the reason."""
    return _verify(_Comparison(module, field, probe), like)


def verify_graph(module: nn.Module, field: GraphField, probe: GraphProbe, like: Tensor | None = None) -> dict[int, str]:
    """The same for a graph. like: an example of the state, where its rows [dim] are run one by one."""
    return _verify(_GraphComparison(module, field, probe), like)


def _verify(comparison: "_Comparison", like: Tensor | None) -> dict[int, str]:
    module, field, probe = comparison.module, comparison.field, comparison.probe
    name = f"module {type(module).__name__}"
    sizes = comparison.sizes
    met = 0
    for number, time in enumerate(comparison.times):
        _, y = probe.point(time, 1.0, number + 1, sizes[number % len(sizes)])
        y = y * comparison.scales(len(y))
        found = comparison.at(time, y, y)
        if isinstance(found, Exception):
            # Not defined at this time, as it may be; or not for this batch.
            if len(y) == 1 or not isinstance(comparison.at(TIME, y, y), Exception):
                continue
            raise UnsupportedFieldError(
                f"{name}: forward(t, y) fails for a batch of {len(y)} samples, not for one of {probe.batch} ({found}). "
                f"{REMEDY}."
            ) from found
        met += 1
        if found is not None:
            batch = ""
            if number and len(sizes) > 1:
                _, five = probe.point(time, 1.0, number + 1, 5)
                batch = "" if comparison.at(time, five, five) else f" and a batch of {len(y)} samples"
            raise UnsupportedFieldError(
                f"{name}: the captured field differs from the module at t = {time}{batch} (relative error "
                f"{found:.1e}): {_suspicion(module, field, found, batch)} {REMEDY}."
            )
    if not met:
        raise UnsupportedFieldError(f"{name}: forward(t, y) fails at every time but t = {TIME:.3f}. {REMEDY}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about shapes that nobody has asked for
        refused = {} if probe.only or not comparison.plain else _axes(comparison)
    if like is not None:
        _example(comparison, like.detach(), name)
        reason = refused.get(min(like.dim(), MOST_AXES))
        if reason is not None:  # right for the example by chance: a single point, say
            raise UnsupportedFieldError(reason)
    return refused


@dataclass
class _Comparison:
    module: nn.Module
    field: VectorField
    probe: Probe

    plain = True  # states [..., dim], any row by itself
    times = TIMES

    @property
    def sizes(self) -> list[int]:
        """Batches to compare at."""
        if self.probe.only:
            return [self.probe.batch]
        dim = self.field.dim
        return [5, 5, 1, dim if self.cheap((dim,)) else 2, 8, 3]  # twice: forward may keep what the last call was given

    @cached_property
    def _weights(self) -> list[Tensor]:
        return [layer.weight.T for layer in self.field.layers]

    def cheap(self, lead: tuple[int, ...]) -> bool:
        return math.prod(lead) * sum(weight.numel() for weight in self._weights) <= COST

    def scales(self, rows: int) -> Tensor:
        repeats = [SCALES[i % len(SCALES)] for i in range(rows)]
        return torch.tensor(repeats, dtype=self.probe.dtype, device=self.probe.device)[:, None]

    def evaluate(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y) by the definition, dense."""
        for layer, weight in zip(self.field.layers, self._weights):
            gate, shift = layer.modulation(t)
            z = y @ weight + layer.bias
            z = z if gate is None else gate * z
            z = z if shift is None else z + shift
            y = activations.apply(layer.activation, z)
        return y

    def run(self, t: Tensor, y: Tensor) -> Tensor:
        """The module, for y [batch, dim] as it was traced, else for y as it is."""
        return self.probe.run(self.module, t, y) if y.dim() == 2 else self.as_given(t, y)

    def as_given(self, t: Tensor, y: Tensor) -> Tensor:
        return differentiable(lambda y: self.module(t, y), y, self.probe.grad)

    def at(self, time: float, y: Tensor, given: Tensor) -> float | None | Exception:
        """The relative error of the field at rows y [batch, dim], which the module gets as `given`; None: rounding;
        an exception: the module's own. Also RuntimeError where it returns something else than dy."""
        t = self.probe.time(time)
        run = self.run if given is y else self.as_given
        try:
            expected = run(t, given.clone())
            expected = expected.detach() if isinstance(expected, Tensor) else expected
        except Exception as error:
            return error
        if not isinstance(expected, Tensor) or expected.shape != given.shape:
            what = list(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
            return RuntimeError(f"it returned {what} for y {list(given.shape)}")
        expected = expected.reshape(y.shape)
        try:
            got = self.evaluate(t.reshape(()), y)
        except Exception as error:
            raise UnsupportedFieldError(
                f"module {type(self.module).__name__}: a function of t cannot be computed at t = {time} "
                f"({type(error).__name__}: {error}). {REMEDY}."
            ) from error
        finite = torch.isfinite(expected) & torch.isfinite(got)
        if abs(time) <= NEAR and not torch.equal(torch.isfinite(expected), torch.isfinite(got)):
            return math.inf
        size = 1.0 + (expected.abs() * finite).nan_to_num(0.0).amax(1)
        error = ((expected - got).abs() * finite).nan_to_num(0.0).amax(1)
        tolerance = 4000 * torch.finfo(self.field.dtype).eps
        if bool((error <= tolerance * size).all()):
            return None
        again = run(t, given.detach().clone()).detach().reshape(y.shape)
        if bool((((again - expected).abs() * finite).nan_to_num(0.0).amax(1) > tolerance * size).any()):
            return float((error / size).max())  # it is another module at every call
        # Far out, and in steep places, rounding alone makes a difference.
        step = 1.0 + ROUNDING * torch.finfo(self.field.dtype).eps
        moved = (run(t * step, given.detach() * step).reshape(y.shape) - expected).abs().nan_to_num(math.inf).amax(1)
        if bool((error <= tolerance * size + 4.0 * moved.nan_to_num(math.inf)).all()):
            return None
        return float((error / size).max())


@dataclass
class _GraphComparison(_Comparison):
    field: GraphField
    probe: GraphProbe

    @property
    def plain(self) -> bool:
        return self.probe.plain is not None

    @cached_property
    def nodes(self) -> list[Node]:
        return order([self.field.output])

    @cached_property
    def _dense(self) -> dict[int, Tensor]:
        return {}

    @property
    def times(self) -> tuple[float, ...]:
        return TIMES if len(self.nodes) < MANY_NODES else TIMES[::3]

    @property
    def sizes(self) -> list[int]:
        return super().sizes if self.field.layout.batched else [1]

    def cheap(self, lead: tuple[int, ...]) -> bool:
        cost = sum(n.rows if n.matrix is None else n.matrix.pattern.nnz for n in self.nodes)
        return math.prod(lead) * cost <= COST

    def evaluate(self, t: Tensor, y: Tensor) -> Tensor:
        inputs = {"state": y, "time": t.reshape(1, 1)}
        if self.field.context is not None:
            inputs["context"] = self.field.read_context().detach()
        parts = self.field.parts
        part = lambda number: parts[number].values
        out = evaluate([self.field.output], inputs, part, weights=self._dense, nodes=self.nodes)
        return out[0].expand_as(y)

    def run(self, t: Tensor, y: Tensor) -> Tensor:
        return self.probe.run(self.module, t, y) if y.dim() == 2 else self.as_given(t, y)


def _axes(comparison: _Comparison) -> dict[int, str]:
    """The numbers of axes for which forward does not treat rows [..., dim] one by one, as the field does."""
    probe, dim = comparison.probe, comparison.field.dim
    probe = getattr(probe, "plain", None) or probe
    held = sorted({s for _, x in held_tensors(comparison.module) for s in x.shape} - {0})
    refused = {}
    for axes in range(1, MOST_AXES + 1):
        if axes == 2 and probe.batched and not probe.between:
            continue  # compared already
        lead = lambda size, axes=axes: (2,) * (axes - 3) + (size,) * min(axes - 1, 2)
        sizes = (dim, 1) if axes == 3 else (dim,)
        leads = [(4, 3, 2)[: axes - 1], *filter(comparison.cheap, map(lead, sizes))] if axes > 1 else [()]
        begin = perf_counter()
        results = [_rows(comparison, lead) for lead in leads]
        if axes > 1 and all(isinstance(found, Exception) for found in results):
            # Perhaps it needs as many rows as a tensor it holds has. A forward that makes Hessians of what it gets, and
            # gets too much, may take all memory for that.
            before, seconds = max(map(math.prod, leads)), perf_counter() - begin
            every = list(filter(comparison.cheap, map(lead, held)))[:24]
            leads = [one for one in every if seconds * max(1.0, math.prod(one) / before) ** 3 < PATIENCE]
            results = [_rows(comparison, lead) for lead in leads]
            if leads != every:
                refused[axes] = (
                    f"forward of module {type(comparison.module).__name__} was not run for states with {axes} axes, which "
                    "would take long; where it takes them, compile it with one as an example: sfk.compile(module, like=y0)"
                )
        wrong = next((lead for lead, found in zip(leads, results) if isinstance(found, float)), None)
        if wrong is not None:
            refused[axes] = (
                f"forward of module {type(comparison.module).__name__} does not treat the rows of a state with {axes} "
                f"{'axis' if axes == 1 else 'axes'} one by one (compared at {[*wrong, dim]}), and a compiled field "
                f"does. {REMEDY}; or, where forward does treat the rows of your states so, compile it with one of them "
                "as an example: sfk.compile(module, like=y0)"
            )
    return refused


def _rows(comparison: _Comparison, lead: tuple[int, ...], time: float = 0.45) -> float | None | Exception:
    probe = comparison.probe
    _, y = probe.point(time, 1.0, 77, math.prod(lead))
    return comparison.at(time, y, y.view(*lead, probe.dim))


def _example(comparison: _Comparison, like: Tensor, name: str) -> None:
    rows = like.reshape(-1, like.shape[-1])
    for time in (0.45, -1.0, 11.3):
        for y in (rows, comparison.probe.point(time, 1.0, 78, len(rows))[1]):
            found = comparison.at(time, y, y.view(like.shape))
            if isinstance(found, float):
                raise UnsupportedFieldError(
                    f"{name}: forward does not treat the rows [..., dim] of a state {list(like.shape)} one by one, as "
                    f"a compiled field does (relative error {found:.1e} at t = {time}). {REMEDY}."
                )


def _suspicion(module: nn.Module, field: VectorField, error: float, batch: str) -> str:
    if batch:
        return "does it treat samples differently if there are so many?"
    if field.dtype == torch.float64 and 0.0 < error < 1e-5:
        return (
            "is something computed in float32 on the way (torch.full or torch.tensor without dtype=)? Make it "
            "follow y.dtype, or compile the module in float32."
        )
    if math.isinf(error):
        return "only one of them is finite there."
    updates = ""
    if module.training:
        updates = " (call .eval() first if a layer updates itself in training, as spectral_norm does)"
    return f"does forward branch on values of t or y, or keep state between calls{updates}?"
