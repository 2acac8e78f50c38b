"""A field beside its log-density: (x, l) -> (dx/dt, dl/dt = -tr df/dx)."""

from __future__ import annotations

from typing import Callable, Literal

import torch
from torch import Tensor, nn

from .compiled_field import CompiledField
from .divergence import KINDS, Kind
from .field import VectorField
from .hooks import GLOBAL_HOOKS, hooks_of
from .warn import warn

NOISES = ("rademacher", "gaussian")

Noise = Literal["rademacher", "gaussian"]


def with_divergence(
    field: CompiledField | Callable[[Tensor, Tensor], Tensor],
    kind: Kind = "exact",
    noise: Tensor | Noise | None = None,
) -> "DivergenceField":
    """The field beside its log-density: (x, l) -> (dx/dt, dl/dt = -tr df/dx), see DivergenceField.

    field: a CompiledField, or any f(t, x [..., dim]) that treats its rows independently (then by autograd); of samples
    of more axes than one, f(t, x [batch, ...]), where l has a number for each sample.
    kind: "exact", or "hutchinson": e' (df/dx) e with the probe e fixed during a solve.
    noise: only for "hutchinson": "rademacher" (None; +1 or -1) or "gaussian", drawn at the start of each solve from
    torch's generator; or the probe itself, shaped like x.

    Raises ValueError for an unknown kind or noise and for noise with "exact", TypeError for other objects.
    """
    return DivergenceField(field, kind, noise)


class DivergenceField(nn.Module):
    """A vector field with its divergence, `field(t, (x, l)) -> (dx/dt, dl/dt)`. Made by `with_divergence`.

    field: what was given.  kind: "exact" or "hutchinson".  Source of the instantaneous change of variables: Chen et al.
    2018 (Neural ODEs); of the estimator with noise fixed per solve: Grathwohl et al. 2019 (FFJORD).
    """

    def __init__(
        self, field: CompiledField | Callable, kind: str = "exact", noise: Tensor | str | None = None
    ) -> None:
        super().__init__()
        if isinstance(field, (VectorField, DivergenceField, type)) or not callable(field):
            what = f"the class {field.__name__}" if isinstance(field, type) else type(field).__name__
            raise TypeError(
                f"with_divergence: field must be a callable f(t, x), not {what}"
                + ("; compile(field) it first" if isinstance(field, VectorField) else "")
            )
        if kind not in KINDS:
            raise ValueError(f'with_divergence: kind must be "exact" or "hutchinson", not {kind!r}')
        if kind == "exact" and noise is not None:
            raise ValueError('with_divergence: noise is only for kind="hutchinson"; the exact divergence has none')
        if isinstance(noise, str) and noise not in NOISES:
            raise ValueError(f'with_divergence: noise must be a tensor, "rademacher" or "gaussian", not {noise!r}')
        if noise is not None and not isinstance(noise, (str, Tensor)):
            raise TypeError(f"with_divergence: noise must be a tensor or a name, not {type(noise).__name__}")
        if isinstance(field, CompiledField) and field.is_detached:
            warn(
                "with_divergence: forward detaches its state or what it makes of it (.detach(), .data, "
                "torch.autograd.grad without create_graph=True), and nothing is differentiated through that, so the "
                "divergence is that of the other terms. For all of it, leave the detaching out of forward, and take "
                "gradients with create_graph=True"
            )
        self.field = field
        self.kind = kind
        self.distribution = "rademacher" if noise is None else noise if isinstance(noise, str) else "given"
        self.register_buffer("noise", noise if isinstance(noise, Tensor) else None, persistent=False)
        self._drawn: Tensor | None = None

    def hooked_inside(self) -> bool:
        """Are there hooks of torch's on the field below, or on all modules?"""
        field = self._modules.get("field")  # quicker than self.field
        if not isinstance(field, CompiledField):
            return any(GLOBAL_HOOKS)
        return field.hooked_inside() or any(hooks_of(field))

    @property
    def nfe(self) -> int:
        """Evaluations of the field so far; 0 for one that is not compiled and counts none."""
        return getattr(self.field, "nfe", 0)

    @nfe.setter
    def nfe(self, evaluations: int) -> None:
        self.field.nfe = evaluations

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}" + (f", noise={self.distribution!r}" if self.kind == "hutchinson" else "")

    def begin_solve(self, x: Tensor) -> Tensor | None:
        """Fix the probe for a solve that starts at x, and return it (shaped like x); None for "exact".

        The solver calls of this package do this. Under another solver the probe is drawn at the first evaluation and
        kept until `resample()`, or until x has another shape, dtype or device.
        """
        if self.kind == "exact":
            return None
        if self.noise is not None:
            if self.noise.shape != x.shape:
                raise ValueError(f"noise: is {list(self.noise.shape)}, the state {list(x.shape)}; they must be alike")
            return self.noise.to(x.device, x.dtype)
        if self.distribution == "gaussian":
            drawn = torch.randn_like(x.detach())
        else:
            drawn = torch.randint_like(x.detach(), 2) * 2 - 1
        if not torch.compiler.is_exporting():  # what is drawn there has no values
            self._drawn = drawn
        return drawn

    def resample(self) -> None:
        """Forget the drawn probe; the next evaluation or solve draws another. A probe that was given stays."""
        self._drawn = None

    def _probe(self, x: Tensor) -> Tensor | None:
        drawn = self._drawn
        if drawn is not None and (drawn.shape, drawn.dtype, drawn.device) == (x.shape, x.dtype, x.device):
            return drawn
        return self.begin_solve(x)

    def forward(self, t: Tensor | float, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(dx/dt shaped like x, dl/dt shaped like l) at state (x [..., dim], l [...] or [..., 1]). Where x [batch, ...]
        has more axes and l is [batch] or [batch, 1], the divergence is over all numbers of a sample.

        Differentiable in t, x and the parameters; l does not enter.
        """
        if isinstance(self.field, CompiledField) and self.field.layout is not None and self.field.layout.is_tuple:
            raise TypeError(
                "with_divergence: this field's state is a tuple of tensors, and a divergence is of one. Compile a "
                "module of the tensor whose density is meant; what else it integrates can be columns of a state "
                "of its own"
            )
        if not isinstance(state, (tuple, list)) or len(state) != 2 or not all(isinstance(p, Tensor) for p in state):
            raise TypeError("state: must be a tuple (x, l) of two tensors")
        x, l = state  # noqa: E741
        compiled = isinstance(self.field, CompiledField)
        if compiled and self.field.layout is not None:
            return self._of_layout(t, x, l)
        if compiled:
            t, x = self.field._check_time(t), self.field.in_own_dtype(x)
            self.field._check_state("x", x)
        elif x.dim() < 1 or not x.is_floating_point():
            raise TypeError(f"x: must be a real floating point tensor [..., dim], not {x.dtype} {list(x.shape)}")
        lead = x.dim() - 1  # axes that count samples
        if not compiled and l.shape not in (x.shape[:-1], x.shape[:-1] + (1,)) and l.shape in (
            x.shape[:1], x.shape[:1] + (1,)
        ):  # fmt: skip
            lead = 1
        if l.shape not in (x.shape[:lead], x.shape[:lead] + (1,)):
            raise ValueError(f"l: must be {list(x.shape[:-1])} or {[*x.shape[:-1], 1]}, not {list(l.shape)}")
        noise = self._probe(x)
        if compiled and x.numel() == 0:
            return x.clone(), torch.zeros_like(l)
        if compiled and not self.hooked_inside():
            flat = None if noise is None else noise.reshape(-1, self.field.dim).contiguous()
            dx, trace = self.field._run(self.kind, t, x.reshape(-1, self.field.dim).contiguous(), flat)
            return dx.view(x.shape), -trace.view(l.shape)
        dx, trace = _autograd_divergence(self.field, t, x, noise, lead)
        return dx, -trace.view(l.shape)

    def _of_layout(self, t: Tensor | float, x: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
        """Of states of the field's own layout: the divergence is over all numbers of a sample."""
        field = self.field
        rows = field.flatten("x", x)
        if l.numel() != len(rows):
            one = "" if field.layout.batched else (
                "; this field takes its whole state for one sample, as forward joins what may be samples (a mean over "
                "them, a concatenation along their axis): there is one divergence of all of it"
            )  # fmt: skip
            raise ValueError(
                f"l: must have a number for each of {len(rows)} samples, not be of shape {list(l.shape)}{one}"
            )
        noise = self._probe(x)
        noise = None if noise is None else field.layout.flatten(noise).contiguous()
        dx, trace = field._run(self.kind, field._check_time(t), rows, noise)
        return field.layout.unflatten(dx), -trace.view(l.shape)


def _autograd_divergence(
    f: Callable[[Tensor, Tensor], Tensor], t: Tensor | float, x: Tensor, noise: Tensor | None, lead: int
) -> tuple[Tensor, Tensor]:
    """(f(t, x), tr df/dx) of any f, one vector-Jacobian product per number of a sample, or one for a noise vector.
    lead: how many of x's axes count samples, which are the trace's."""
    wanted = torch.is_grad_enabled()
    if isinstance(f, nn.Module):  # what any other callable depends on cannot be known
        depends = [value for value in (t, x, noise) if isinstance(value, Tensor)] + list(f.parameters())
        wanted = wanted and any(tensor.requires_grad for tensor in depends)
    with torch.inference_mode(False), torch.enable_grad():
        if x.is_inference():
            x = x.clone()
        if isinstance(t, Tensor) and t.is_inference():
            t = t.clone()
        inputs = x if wanted and x.requires_grad else x.detach().requires_grad_()
        dx = f(t, inputs)
        if not isinstance(dx, Tensor) or dx.shape != x.shape:
            shape = list(dx.shape) if isinstance(dx, Tensor) else type(dx).__name__
            raise ValueError(f"f(t, x): must be shaped like x, {list(x.shape)}, not {shape}")

        def product(cotangent: Tensor) -> Tensor:
            if not dx.requires_grad:
                return torch.zeros_like(x)
            (found,) = torch.autograd.grad(
                dx, inputs, cotangent, create_graph=wanted, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return found

        if noise is not None:
            trace = (product(noise) * noise).flatten(lead).sum(-1)
        else:
            trace = x.new_zeros(x.shape[:lead])
            for m in range(x.shape[lead:].numel()):
                unit = torch.zeros_like(x)
                unit.flatten(lead)[..., m] = 1
                trace = trace + product(unit).flatten(lead)[..., m]
    return (dx, trace) if wanted else (dx.detach(), trace.detach())
