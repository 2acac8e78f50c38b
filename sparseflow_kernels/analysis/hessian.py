"""Curvature of the loss over the parameters that remain: Hessian-vector products, stochastic Lanczos, exact matrices.

The loss is the mean negative log-likelihood of given rows; the parameters are those of the exactly simplified flow,
zeros left out, so that pruned and dead entries have no part in the spectrum. Derivatives are those of the discrete
solution, step sizes held fixed, by differentiating the reference engine twice.

Two definitions stand beside one another everywhere: the Sparse Flows paper's (arXiv 2106.12718; its published script),
which reads its three numbers off Lanczos' Ritz values, and the usual ones. Stochastic Lanczos quadrature: Ubaru, Chen &
Saad 2017; for spectra of networks: Ghorbani, Krishnan & Xiao 2019. Trace: Hutch++, Meyer, Musco, Musco & Woodruff 2021.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from ..flows import ContinuousFlow, NeuralODE

STEPS, PROBES = 100, 3  # the paper's
TRACE_PRODUCTS = 45


class LossHessian:
    """The Hessian of a model's mean NLL over its live parameters, a symmetric matrix known by its products.

    flow: its fields may be plain, masked or compiled; it is copied, in float64, and not changed. The divergence is
        exact, whatever the flow trains with, but of flows whose evaluation estimates it (`exact_evaluation`: of images).
        There it is that of a probe for every row, drawn once, as is what dequantises the row: one function of the
        parameters, whose Hessian has an expectation of its own.  x: rows [n, dim].  labels: int64 [n], their classes, for a classifier.
    batch: rows differentiated at once. With one batch the graph of the gradient is built once and kept; with several it
        is built anew for every product. It takes about 50 kB a row and evaluation of the field for the paper's l4_h64
        in float64, that is 2.5 GB for 512 rows and 100 evaluations; the digits' flow of images takes 1.3 GB for 24 rows,
        MNIST's 2.5 GB for one (untrained, with 84 and 140 evaluations; a product 1.6 s and 5 s).
    seed: of what is drawn, which depends on the batches, too.

    size: number of live parameters.  Raises ValueError for no rows, or a flow without live parameters.
    """

    def __init__(
        self, flow: NeuralODE, x: Tensor, labels: Tensor | None = None, *, batch: int = 512, seed: int = 0
    ) -> None:
        if len(x) == 0:
            raise ValueError("x has no rows to take the loss of")
        self._flow = flow.compile(engine="reference").to(torch.float64).eval()
        if isinstance(self._flow, ContinuousFlow) and self._flow.exact_evaluation:
            self._flow.eval_divergence = "exact"
        self._parameters = [p for p in self._flow.parameters() if p.requires_grad]
        self._live = [p.detach() != 0 for p in self._parameters]
        self.size = sum(int(live.sum()) for live in self._live)
        if self.size == 0:
            raise ValueError("the flow has no live parameter")
        like = self._parameters[0]
        self._rows = len(x)
        told = [None] * -(-len(x) // batch) if labels is None else labels.to(like.device).split(batch)
        self._seed = seed
        self._parts = list(enumerate(zip(x.to(like).split(batch), told)))
        self._kept: Tensor | None = None

    def _gradient(self, part: tuple[int, tuple[Tensor, Tensor | None]], create_graph: bool) -> Tensor:
        """[size]: the part of the mean loss's gradient that these rows make. What a flow draws is the same every time."""
        number, given = part
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._seed + number)
            loss = self._flow.row_nll(*given).sum() / self._rows
        found = torch.autograd.grad(loss, self._parameters, create_graph=create_graph, materialize_grads=True)
        return torch.cat([gradient[live] for gradient, live in zip(found, self._live)])

    def _gradients(self):
        if len(self._parts) > 1:
            yield from (self._gradient(part, True) for part in self._parts)
            return
        if self._kept is None:
            self._kept = self._gradient(self._parts[0], True)
        yield self._kept

    @property
    def device(self) -> torch.device:
        return self._parameters[0].device

    def gradient(self) -> Tensor:
        """[size]: the gradient of the mean loss."""
        return sum(self._gradient(part, False) for part in self._parts)

    def product(self, vector: Tensor) -> Tensor:
        """H v for v [size], or H V for the columns of V [size, k]; on the flow's device."""
        columns = vector.reshape(self.size, -1).to(self._parameters[0])
        out = torch.zeros_like(columns)
        for gradient in self._gradients():
            for column in range(columns.shape[1]):
                found = torch.autograd.grad(
                    gradient, self._parameters, columns[:, column], retain_graph=True, materialize_grads=True
                )
                out[:, column] += torch.cat([part[live] for part, live in zip(found, self._live)])
        return out.reshape(vector.shape)

    def dense(self) -> Tensor:
        """The matrix [size, size], by as many products; symmetrised. Minutes for some hundreds of parameters."""
        matrix = self.product(torch.eye(self.size, dtype=self._parameters[0].dtype, device=self.device))
        return (matrix + matrix.T) / 2


def lanczos(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Ritz values [m], ascending, of a symmetric matrix on the Krylov space of `start` [size], and the quadrature
    weights [m] that go with them (sum 1): start' f(H) start = |start|^2 sum_i weight_i f(value_i), about.

    m = min(steps, size). Every new vector is orthogonalised against all before it, twice. Where the space is exhausted
    early, it goes on from a random orthogonal vector (from torch's global generator), whose values have weight 0.
    """
    size = len(start)
    steps = min(steps, size)
    basis = start.new_zeros(size, steps)
    diagonal, below = start.new_zeros(steps), start.new_zeros(max(0, steps - 1))
    vector, scale = start / start.norm(), 0.0
    for step in range(steps):
        basis[:, step] = vector
        image = product(vector)
        diagonal[step] = image @ vector
        scale = max(scale, float(image.norm()))
        if step + 1 == steps:
            break
        vector = _orthogonal(image, basis[:, : step + 1])
        length = vector.norm()
        if float(length) > 1e-12 * scale:
            below[step] = length
        else:
            vector = _orthogonal(torch.randn_like(start), basis[:, : step + 1])
            length = vector.norm()
        vector = vector / length
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(below, 1) + torch.diag(below, -1))
    return values, vectors[0].square()


def _probe(size: int, *columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Rademacher, float64, from torch's global CPU generator, so that they are the same on every device."""
    return (torch.randint(0, 2, (size, *columns), device="cpu").double() * 2 - 1).to(device)


def trace_estimate(
    product: Callable[[Tensor], Tensor], size: int, products: int = TRACE_PRODUCTS, device: torch.device | str = "cpu"
) -> float:
    """The trace of a symmetric matrix by Hutch++: a third of the products finds the space where most of it is, whose
    trace is taken exactly, and Hutchinson's estimator sees only the rest. Exact if products >= size.

    product: columns [size, k] -> [size, k], float64 on `device`. Probes are Rademacher, from torch's global generator.
    """
    if products >= size:
        return float(torch.trace(product(torch.eye(size, dtype=torch.float64, device=device))))
    third = max(1, products // 3)
    basis = torch.linalg.qr(product(_probe(size, third, device=device))).Q
    rest = _probe(size, third, device=device)
    rest = rest - basis @ (basis.T @ rest)
    return float((basis * product(basis)).sum() + (rest * product(rest)).sum() / third)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - basis @ (basis.T @ vector)
    return vector


@dataclass(frozen=True)
class Curvature:
    """The three numbers of a Hessian by both definitions.

    size: live parameters.  steps, probes: of stochastic Lanczos; 0 for an exact spectrum.
    paper_largest, paper_trace, paper_condition: of the Ritz values averaged over the probes: the largest, the SUM of
        the positive ones (which leaves out what is negative, and is no estimate of the trace unless steps = size), and
        the largest over the smallest positive one.
    largest, smallest: eigenvalues at the two ends.  trace: `trace_estimate`'s, or the sum of all eigenvalues.
    condition: largest over smallest absolute eigenvalue; by Lanczos a lower bound, since the eigenvalues next to zero
        converge last.  negative: share of the spectrum below zero (by quadrature weights).
    """

    size: int
    steps: int
    probes: int
    paper_largest: float
    paper_trace: float
    paper_condition: float
    largest: float
    smallest: float
    trace: float
    condition: float
    negative: float


def _paper(ritz: Tensor) -> tuple[float, float, float]:
    positive = ritz[ritz > 0]
    if len(positive) == 0:
        return float(ritz.max()), 0.0, float("nan")
    return float(ritz.max()), float(positive.sum()), float(positive.max() / positive.min())


def _condition(values: Tensor) -> float:
    return float(values.abs().max() / values.abs().min())


def curvature(hessian: LossHessian, *, steps: int = STEPS, probes: int = PROBES, seed: int = 0) -> Curvature:
    """By stochastic Lanczos: `probes` Rademacher vectors from `seed`, `steps` products each; and some for the trace."""
    if steps < 1 or probes < 1:
        raise ValueError(f"steps and probes must be at least 1; got {steps} and {probes}")
    values, weights = [], []
    device = hessian.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(probes):
            probe = _probe(hessian.size, device=device)
            found = lanczos(lambda v: hessian.product(v).double(), probe, steps)
            values.append(found[0])
            weights.append(found[1])
        trace = trace_estimate(lambda v: hessian.product(v).double(), hessian.size, device=device)
    ritz, weight = torch.stack(values), torch.stack(weights)
    negative = float((weight * (ritz < 0)).sum(1).mean())
    return Curvature(
        hessian.size, ritz.shape[1], probes, *_paper(ritz.mean(0)),
        float(ritz.max()), float(ritz.min()), trace, _condition(ritz), negative,
    )


def exact_curvature(matrix: Tensor) -> Curvature:
    """The same of a symmetric matrix [size, size], by all its eigenvalues (where the paper has Ritz values)."""
    values = torch.linalg.eigvalsh(matrix.double())
    return Curvature(
        len(values), 0, 0, *_paper(values), float(values.max()), float(values.min()), float(values.sum()),
        _condition(values), float((values < 0).double().mean()),
    )
