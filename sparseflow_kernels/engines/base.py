"""What an engine is: somebody who runs a packed vector field. Choice of an engine is kept apart, in `engines/__init__.py`.

Batch layout at this border is PyTorch's: states are [batch, dim], contiguous, in the field's dtype and device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

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
    grid: float64 CPU, only for a FixedTableau: the points the solver steps on, from times[0] to times[-1];
        outputs between them are interpolated linearly.  perturb: fixed grids only, as in torchdiffeq.
    noise: [batch, dim] Hutchinson probe, only for a "hutchinson" divergence.
    step_control: "shared" (torchdiffeq's: one step size for the batch) or "per_tile" (each tile of samples on its own).
    replay: float64 CPU [steps, 2], (t, dt) of an earlier solve's accepted steps, to be taken again without control, for
        the gradient of that solve. Only ever given to differentiable engines.
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


@dataclass
class SolveResult:
    """What came out. `status` is "ok", "underflow" (step size underflow), "non_finite" (a forced step met a non-finite
    state) or "max_num_steps"; then t, dt say where it stopped and `rows` lists offending batch rows (may be empty).

    xs: [outputs, batch, dim].  ls: [outputs, batch] or None.
    nfe, accepted, rejected: counts (per_tile: nfe is the mean over tiles, rounded up; accepted and rejected the sums).
    steps: float64 CPU [accepted, 2], (t, dt) of every accepted step in the request's upward time; empty for per_tile.
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


class Engine(ABC):
    """A vector field (with a divergence, if `plan` is given) packed for one machine. Packing reads the field's tensors
    once; a changed parameter needs a new instance (CompiledField sees to it)."""

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False  # True: autograd flows through evaluate and solve by itself
    plan: "DivergencePlan | None"  # what it was packed with

    @staticmethod
    @abstractmethod
    def unsupported(field: VectorField) -> str | None:
        """Why this engine cannot run the field, in a sentence with the remedy; None if it can."""

    @abstractmethod
    def __init__(self, field: VectorField, plan: "DivergencePlan | None" = None) -> None: ...

    @abstractmethod
    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        """f(t, y), [batch, dim] -> [batch, dim]."""

    @abstractmethod
    def evaluate_with_divergence(self, t: Tensor | float, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(f(t, x) [batch, dim], tr df/dx [batch]), or the Hutchinson estimate noise' (df/dx) noise."""

    @abstractmethod
    def solve(self, request: SolveRequest) -> SolveResult: ...
