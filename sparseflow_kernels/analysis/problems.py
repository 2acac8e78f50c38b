"""The benchmark problems: vector fields of the sizes the flow literature uses, pruned to a keep ratio.

Shapes are FFJORD's tabular flows (Grathwohl et al. 2019, appendix) and the 2-D toys of the sparse-flow paper
(Liebenwein et al. 2021). Weights are random: the time of a solve depends on the shapes, the mask and the number of
steps, not on what the flow has learnt.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..flows import TABULAR, mlp_field
from ..pruning import prune_weights_, remove_masks_


@dataclass(frozen=True)
class FieldSpec:
    """One benchmark field. hidden: widths of the hidden layers; layer: how time enters (FFJORD's names); batch: samples;
    divergence: "exact" or "hutchinson"; gain: factor on the random weights, so that a solve takes more than a few steps."""

    name: str
    dim: int
    hidden: tuple[int, ...]
    layer: str
    activation: str
    batch: int
    divergence: str
    gain: float

    @property
    def title(self) -> str:
        widths = f"{len(self.hidden)}x{self.hidden[0]}"
        return f"{self.name} ({self.dim}-{widths}-{self.dim} {self.activation} {self.layer}, batch {self.batch}, {self.divergence})"

    def problem(self, keep: float) -> "Problem":
        return make_problem(self, keep)


def _tabular(name: str, divergence: str, gain: float, title: str | None = None) -> FieldSpec:
    shape = TABULAR[name]
    return FieldSpec(title or name, shape.dim, shape.hidden, "concatsquash", shape.activation, 1000, divergence, gain)


FIELDS = {
    spec.name: spec
    for spec in (
        FieldSpec("toy", 2, (64, 64, 64), "ignore", "tanh", 512, "exact", 2.5),
        FieldSpec("toy-l4_h64", 2, (64, 64, 64), "ignore", "sigmoid", 1024, "hutchinson", 4.0),
        _tabular("power", "hutchinson", 4.0),
        _tabular("hepmass", "hutchinson", 4.0),
        _tabular("miniboone", "hutchinson", 4.0),
        _tabular("miniboone", "exact", 4.0, "miniboone-exact"),
        _tabular("bsds300", "hutchinson", 5.0),
    )
}
DEFAULT_FIELDS = ("toy", "power", "hepmass", "miniboone", "miniboone-exact")
TRAIN_FIELDS = ("toy-l4_h64", "power", "hepmass", "miniboone")
DEFAULT_KEEPS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)


@dataclass
class Problem:
    """d/dt (x, l) = (f, -tr df/dx) from t = 0 to 1, float32; made on the CPU (`on` moves it).

    module: a plain nn.Module, pruned weights baked in as zeros.  x: [batch, dim].  noise: [batch, dim], Rademacher, or
    None for the exact divergence.
    """

    spec: FieldSpec
    keep: float
    module: nn.Module
    x: Tensor
    noise: Tensor | None
    rtol: float = 1e-5
    atol: float = 1e-5

    @property
    def like(self) -> Tensor | None:
        """An example of the state, where a compiler needs one."""
        return None

    @property
    def times(self) -> Tensor:
        return self.x.new_tensor([0.0, 1.0])

    def state(self) -> tuple[Tensor, Tensor]:
        """(x [batch, dim], l = 0 [batch]) at t = 0."""
        return self.x, self.x.new_zeros(self.x.shape[0])

    def on(self, device: torch.device, rows: int | None = None) -> "Problem":
        """A copy on a device, of the first `rows` samples or all."""
        noise = None if self.noise is None else self.noise[:rows].to(device)
        module = copy.deepcopy(self.module).to(device)
        return replace(self, module=module, x=self.x[:rows].to(device), noise=noise)

    def reference(self, rows: int) -> "Problem":
        """The first `rows` samples in float64, at tolerance 1e-10: samples do not see one another but through step sizes."""
        return Problem(self.spec, self.keep, copy.deepcopy(self.module).double(), self.x[:rows].double(),
                       None if self.noise is None else self.noise[:rows].double(), 1e-10, 1e-10)


def make_problem(spec: FieldSpec, keep: float, seed: int = 0) -> Problem:
    """The field pruned globally by magnitude to the fraction `keep` of its weights.

    Every weight matrix is scaled back to the spectral norm it had before pruning: otherwise a sparser field would also
    be a tamer one, and a solve of it would be shorter for a reason that has nothing to do with kernels.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = mlp_field(spec.dim, spec.hidden, layer=spec.layer, activation=spec.activation).float()
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and min(part.weight.shape) > 1]
    with torch.no_grad():
        for linear in linears:
            linear.weight.mul_(spec.gain)
        norms = [torch.linalg.matrix_norm(linear.weight, 2) for linear in linears]
        if keep < 1.0:
            prune_weights_(module, keep, of="weights")
            remove_masks_(module)
            for linear, norm in zip(linears, norms):
                linear.weight.mul_(norm / torch.linalg.matrix_norm(linear.weight, 2).clamp(min=1e-12))
    module.requires_grad_(False)
    x = torch.randn(spec.batch, spec.dim, generator=generator, dtype=torch.float32)
    noise = None
    if spec.divergence == "hutchinson":
        noise = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
    return Problem(spec, keep, module, x, noise)
