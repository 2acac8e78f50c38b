"""Running a user's module without leaving a trace: its dtype and device, the shapes its forward takes, test points."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor, nn

from ..field import UnsupportedFieldError


@dataclass(frozen=True)
class Probe:
    """How a module is called: forward(t, y) with y [batch, dim]."""

    dim: int
    t_shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    device: torch.device

    def point(
        self, t: float = 0.6180339887498949, scale: float = 1.0, seed: int = 0, batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A t (by default one that no number in a user's code is likely to equal), and a random y."""
        generator = torch.Generator().manual_seed(seed)
        y = scale * torch.randn(batch or self.batch, self.dim, generator=generator, dtype=torch.float64)
        return torch.full(self.t_shape, t, dtype=self.dtype, device=self.device), y.to(self.device, self.dtype)


def find_probe(module: nn.Module, dim: int | None) -> Probe:
    """The one way to call the module that returns [batch, dim]."""
    dtype, device = _dtype_and_device(module)
    tensors = [*module.parameters(), *module.buffers()]
    sizes = {s for x in tensors for s in x.shape}
    # A state that is concatenated with t makes a matrix one wider.
    candidates = {s for x in tensors if x.dim() in (1, 2) for s in x.shape} | {
        m.in_features - 1 for m in module.modules() if isinstance(m, nn.Linear)
    }
    candidates = sorted(candidates - {0}) if dim is None else [dim]
    sizes |= {c + k for c in candidates for k in (-1, 0, 1, 2)}
    # A size that nothing else has, so that no broadcast or transpose of the module's works by accident.
    batch = next(n for n in itertools.count(7, 2) if n not in sizes)
    works: list[Probe] = []
    first_error: Exception | None = None
    returned = None
    for candidate in candidates:
        for t_shape in ((), (1, 1), (1,)):
            probe = Probe(candidate, t_shape, batch, dtype, device)
            try:
                out = module(*probe.point())
            except Exception as error:  # whatever the user's code raises says that this shape is not meant
                first_error = first_error or error
                continue
            if isinstance(out, Tensor) and out.shape == (batch, candidate):
                works.append(probe)
                break
            returned = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
    if len(works) == 1:
        return works[0]
    if dim is not None:
        if returned is not None:
            raise ValueError(
                f"dim={dim}: forward(t, y) with y [{batch}, {dim}] returned {returned}; a vector field returns one "
                "tensor shaped like y"
            )
        raise UnsupportedFieldError(
            f"module {type(module).__name__}: forward(t, y) failed for y [{batch}, {dim}] and t 0-d, [1, 1] or [1]: "
            f"{type(first_error).__name__}: {first_error}"
        ) from first_error
    found = ", ".join(str(probe.dim) for probe in works) or "none"
    hint = f" (the first try said: {first_error})" if first_error is not None and not works else ""
    raise ValueError(
        f"the size of the state cannot be told from the module's weights (sizes that run: {found}); pass dim=...{hint}"
    )


def _dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameters = list(module.parameters())
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device; materialise the module first")
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(f"parameter {name!r} holds NaN or infinite values; a vector field needs finite weights")
    for what, kinds in (("dtype", {p.dtype for p in parameters}), ("device", {p.device for p in parameters})):
        if len(kinds) > 1:
            raise UnsupportedFieldError(
                f"the module's parameters have more than one {what} ({', '.join(sorted(map(str, kinds)))}); move them "
                "to one with module.to(...)"
            )
    like = next(iter([*parameters, *(b for b in module.buffers() if b.is_floating_point()), torch.empty(0)]))
    if like.dtype not in (torch.float32, torch.float64):
        raise UnsupportedFieldError(f"the module's dtype is {like.dtype}; use module.float() or module.double()")
    return like.dtype, like.device


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Leaves parameters, buffers, attributes and random state as they were."""
    submodules = list(module.modules())
    attributes = [
        {k: type(v)(v) if type(v) in (dict, list, OrderedDict) else v for k, v in m.__dict__.items() if k != "_modules"}
        for m in submodules
    ]
    tensors = [(x, x.detach().clone()) for x in [*module.parameters(), *module.buffers()]]
    gpus = {x.device for x, _ in tensors if x.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(gpus)), torch.inference_mode(False):
        try:
            yield
        finally:
            for m, saved in zip(submodules, attributes):
                for key in [k for k in m.__dict__ if k not in saved and k != "_modules"]:
                    del m.__dict__[key]
                for key, value in saved.items():
                    now = m.__dict__.get(key)
                    if type(now) is type(value) and type(value) in (dict, OrderedDict):
                        now.clear()  # in place: others (hook handles) may hold the dictionary
                        now.update(value)
                    elif type(now) is type(value) and type(value) is list:
                        now[:] = value
                    else:
                        m.__dict__[key] = value
            with torch.no_grad():
                for x, value in tensors:
                    if not torch.equal(x, value):
                        x.copy_(value)
