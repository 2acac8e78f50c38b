"""What an engine is: somebody who runs a packed vector field. Choice of an engine is kept apart, in `engines/__init__.py`.

Batch layout at this border is PyTorch's: states are [batch, dim], contiguous, in the field's dtype and device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Collection

from torch import Tensor

from ..field import VectorField
from ..numerics.step_control import StepOptions
from ..numerics.tableaus import FixedTableau, Tableau

if TYPE_CHECKING:
    from ..divergence import DivergencePlan


@dataclass(frozen=True)
class SolveRequest:
    """One initial value problem, normalised: time runs upwards in `times`, the field is f(t, y) = sign * field(sign * t, y).

    x: [batch, dim].  l: [batch] log-density channel, or None; present iff the engine was packed with a divergence, and
        then dl/dt = -tr(df/dx).
    times: float64 CPU [outputs], strictly increasing (already negated for a decreasing user `t`).  sign: +1 or -1.
    rtol, atol: one float per component of the state, (x,) or (x, l). The error norm is the maximum over the components
        of the RMS over that component's elements (torchdiffeq's mixed norm; plain RMS without l).
    parts: of a state that is a tuple of tensors, how many columns of x each of them has; they are components then.
    grid: float64 CPU, only for a FixedTableau: the points the solver steps on, from times[0] to times[-1];
        outputs between them are interpolated linearly.  perturb: fixed grids only, as in torchdiffeq.
    noise: [batch, dim] Hutchinson probe, only for a "hutchinson" divergence.
    step_control: "shared" (torchdiffeq's: one step size for the batch), "per_tile" (each tile of samples on its own) or
        "per_sample"; an engine that does not know one of them says so with ValueError.
    replay: float64 CPU [steps, 2], (t, dt) of an earlier solve's accepted steps, to be taken again without control, for
        the gradient of that solve. Only ever given to differentiable engines.
    record: keep in the result what `solve_backward` needs beside the request.
    context: [batch, context] numbers per sample, constant during the solve; only for fields that have a context.
    """

    x: Tensor
    l: Tensor | None
    times: Tensor
    sign: int
    tableau: Tableau | FixedTableau
    rtol: tuple[float, ...]
    atol: tuple[float, ...]
    options: StepOptions
    grid: Tensor | None = None
    perturb: bool = False
    noise: Tensor | None = None
    step_control: str = "shared"
    replay: Tensor | None = None
    record: bool = False
    context: Tensor | None = None
    parts: tuple[int, ...] | None = None


@dataclass
class SolveResult:
    """What came out. `status` is "ok", "underflow" (step size underflow), "non_finite" (a forced step met a non-finite
    state) or "max_num_steps"; then t, dt say where it stopped and `rows` lists offending batch rows (may be empty).

    xs: [outputs, batch, dim].  ls: [outputs, batch] or None.
    nfe, accepted, rejected: counts (on their own: nfe is the mean over tiles, rounded up; accepted and rejected the sums).
    steps: float64 CPU [accepted, 2], (t, dt) of every accepted step in the request's upward time; empty unless shared.
    states, derivatives: with `record`, x at the ends of the accepted steps, [accepted + 1, batch, dim], and derivatives of
        the steps' stages, [.., batch, dim], as many as the engine has a use for.
    slopes: with `record`, of an adaptive method, (dx/dt [outputs, batch, dim], dl/dt [outputs, batch] or None) of the
        interpolants at the outputs, in upward time; zero at the first. Engines that have no use for them leave None.
    """

    xs: Tensor
    ls: Tensor | None
    nfe: int
    accepted: int
    rejected: int
    steps: Tensor
    status: str = "ok"
    t: float = 0.0
    dt: float = 0.0
    rows: tuple[int, ...] = ()
    states: Tensor | None = None
    derivatives: Tensor | None = None
    slopes: tuple[Tensor, Tensor | None] | None = None


@dataclass
class Gradient:
    """What a backward pass found; None for what was not asked for or does not exist.

    x: [batch, dim].  l: [batch].  t: 0-d, of an evaluation.  times, grid: float64 CPU, shaped like the request's.
    noise: [batch, dim].  context: [batch, context].  tensors: one per tensor of the field, in the order of `VectorField.tensors()` (the reference
        engine adds the parameters of functions of time).
    """

    tensors: tuple[Tensor | None, ...] = ()
    x: Tensor | None = None
    l: Tensor | None = None
    t: Tensor | None = None
    times: Tensor | None = None
    grid: Tensor | None = None
    noise: Tensor | None = None
    context: Tensor | None = None


class Engine(ABC):
    """A vector field (with a divergence, if `plan` is given) packed for one machine. Packing reads the field's tensors
    once; a changed parameter needs `update` or a new instance (`Packing` sees to it)."""

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False  # True: autograd flows through evaluate and solve by itself
    plan: "DivergencePlan | None"  # what it was packed with
    stamp: int = 0  # how often `update` took over new values

    @staticmethod
    @abstractmethod
    def unsupported(field: VectorField) -> str | None:
        """Why this engine cannot run the field, in a sentence with the remedy; None if it can."""

    @classmethod
    def unsuited(cls, field: VectorField) -> str | None:
        """Why another engine of the same device would do better, though this one can run the field; None if not so."""
        return None

    @abstractmethod
    def __init__(self, field: VectorField, plan: "DivergencePlan | None" = None) -> None: ...

    def describe(self) -> list[str]:
        """How it runs the field: the form of each layer and what decided it, a line each; for people."""
        return []

    def update(self, field: VectorField) -> bool:
        """Take over the values of a field that has the same patterns (the same objects), activations and functions of
        time. False, and nothing changed, where a new instance is needed instead."""
        return False

    @abstractmethod
    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        """f(t, y), [batch, dim] -> [batch, dim]."""

    @abstractmethod
    def evaluate_with_divergence(self, t: Tensor | float, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(f(t, x) [batch, dim], tr df/dx [batch]), or the Hutchinson estimate noise' (df/dx) noise."""

    @abstractmethod
    def solve(self, request: SolveRequest) -> SolveResult: ...

    def no_gradient(self, wanted: Collection[str], request: SolveRequest | None = None) -> str | None:
        """Why the two methods below cannot give the gradients `wanted` (names of Gradient's fields) of an evaluation, or
        of this solve; None if they can. The reference engine can always."""
        return f"the {self.name} engine has no gradient of its own"

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str],
    ) -> Gradient:  # fmt: skip
        """The gradient of sum(grad_f * f) + sum(grad_trace * trace) at (t, x); grad_f [batch, dim], grad_trace [batch]."""
        raise NotImplementedError(self.no_gradient(wanted))

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        """The gradient of sum(grad_xs * xs) + sum(grad_ls * ls): the exact one of the accepted steps, step sizes held
        fixed (on a fixed grid they follow `grid`). `result` is what `solve` returned for `request` with `record`, but
        for its outputs: xs and ls may be gone."""
        raise NotImplementedError(self.no_gradient(wanted, request))
