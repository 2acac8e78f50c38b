"""The floor under the time of a solve, or of a training step: its arithmetic at the best rates this core can reach.

    floor = multiply-adds / FMA rate + activations / vector-math rate

Both rates are measured in the running process by loops over registers (`_cpu.fma_peak`, `_cpu.activation_rate`), so
memory, launches and the solver's own vector operations are what lies between a measured time and its floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..activations import ACTIVATIONS
from ..divergence import DivergencePlan, HutchinsonForm
from ..field import VectorField


@lru_cache(maxsize=None)
def fma_rate() -> float | None:
    """Float32 multiply-adds per second of one core; None without the CPU extension."""
    try:
        from .. import _cpu

        return float(_cpu.fma_peak())
    except (ImportError, AttributeError):
        return None


@lru_cache(maxsize=None)
def activation_rate(name: str) -> float | None:
    """Activations (value and slope) per second of one core, float32; None without the CPU extension."""
    try:
        from .. import _cpu

        return float(_cpu.activation_rate(ACTIVATIONS[name].number))
    except (ImportError, AttributeError):
        return None


KERNELS = {
    "spmm": "a sparse matrix times activations",
    "sddmm": "the gradient of a sparse matrix, of values and tangents together",
}
KERNEL_WIDTHS = (64, 128, 256, 860, 1260)
KERNEL_DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)


def kernel_share(kernel: str, width: int, density: float) -> float | None:
    """Multiply-adds per second of one of `KERNELS` on a random mask [width, width], float32, at the best tile width,
    over `fma_rate`; None without the CPU extension."""
    peak = fma_rate()
    if peak is None:
        return None
    from .. import _cpu

    if kernel == "spmm":
        seconds, multiply_adds = _cpu.bench_spmm(width, width, density, seed=0, repeats=5)
    else:
        seconds, multiply_adds = _cpu.bench_sddmm(width, width, density, carries=True, seed=0, repeats=5)
    return multiply_adds / seconds / peak


@dataclass(frozen=True)
class Work:
    """What one evaluation of a field costs per sample: multiply_adds, and the count of each activation by name."""

    multiply_adds: int
    activations: dict[str, int]

    @staticmethod
    def of(field: VectorField, plan: DivergencePlan | None = None) -> "Work":
        """Counted on the simplified field; the divergence adds the cost its plan counted for the form it chose."""
        return Work(field.nnz + (0 if plan is None else divergence_cost(plan)), _activations(field))

    @staticmethod
    def of_gradient(field: VectorField, plan: DivergencePlan | None) -> "Work | None":
        """One evaluation turned back, without a divergence (None): value forwards as far as slopes are wanted, cotangents
        backwards, and the gradient of every weight. With Hutchinson's estimate: value and tangent forwards as far as slopes are
        wanted, their cotangents backwards, and the gradient of every weight, each again for value and tangent. The
        probe is fixed: neither does it need a cotangent, nor is its product with the first layer counted. None for the
        exact forms."""
        kept = field.layers if field.layers[-1].gate else field.layers[:-1]
        if plan is None:
            return Work(sum(layer.pattern.nnz for layer in kept) + 2 * field.nnz, _activations(field))
        if not isinstance(plan.form, HutchinsonForm):
            return None
        first = field.layers[0].pattern.nnz
        forwards = 2 * sum(layer.pattern.nnz for layer in kept) - (first if kept else 0)
        backwards, weights = 2 * field.nnz - first, 2 * field.nnz
        return Work(forwards + backwards + weights, _activations(field))

    def floor(self, samples: int) -> float | None:
        """Seconds per evaluation of `samples` samples on one core, float32; None where a rate cannot be measured."""
        peak = fma_rate()
        rates = {name: activation_rate(name) for name in self.activations}
        if peak is None or None in rates.values():
            return None
        per_sample = self.multiply_adds / peak + sum(count / rates[name] for name, count in self.activations.items())
        return samples * per_sample


def training_step_floor(
    field: VectorField, plan: DivergencePlan, samples: int, evaluations: int, steps: int
) -> float | None:
    """Seconds of a log-likelihood and its gradient by dopri5: the forward solve's evaluations; six stages of every
    accepted step turned back (their derivatives are recorded); and the first derivative of all. None where `Work`
    cannot tell."""
    works = (Work.of(field, plan), Work.of_gradient(field, plan))
    floors = [None if work is None else work.floor(samples) for work in works]
    if None in floors:
        return None
    forward, back = floors
    return evaluations * forward + (6 * steps + 1) * back


def _activations(field: VectorField) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in field.layers:
        if layer.activation.name != "identity":
            name = layer.activation.name
            counts[name] = counts.get(name, 0) + layer.out_features
    return counts


def divergence_cost(plan: DivergencePlan) -> int:
    """Multiply-adds per sample and evaluation of the form the plan chose (0 for a linear field's constant trace)."""
    return plan.costs.get(type(plan.form).__name__.removesuffix("Form").lower(), 0)
