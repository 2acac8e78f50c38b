"""Running a user's module without leaving a trace: its dtype and device, the shapes its forward takes, test points."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Iterator

import torch
from torch import Tensor, nn

from ..field import UnsupportedFieldError
from .refusal import REMEDY

SMALL = 32  # sizes of a state that are tried where the weights show none


@dataclass(frozen=True)
class Probe:
    """How a module is called: forward(t, y) with y [batch, dim]."""

    dim: int
    t_shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    device: torch.device
    batched: bool = True  # False: forward takes one state y [dim]

    def run(self, module: nn.Module, t: Tensor, y: Tensor) -> Tensor:
        """module(t, y) for y [batch, dim]."""
        return module(t, y) if self.batched else torch.vmap(module, (None, 0))(t, y)

    def point(
        self, t: float = 0.6180339887498949, scale: float = 1.0, seed: int = 0, batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A t (by default one that no number in a user's code is likely to equal), and a random y."""
        generator = torch.Generator().manual_seed(seed)
        y = scale * torch.randn(batch or self.batch, self.dim, generator=generator, dtype=torch.float64)
        return torch.full(self.t_shape, t, dtype=self.dtype, device=self.device), y.to(self.device, self.dtype)


def check_arguments(module: nn.Module, dim: int | None) -> None:
    """Raises TypeError for what cannot be called as module(t, y), ValueError for parameters without values."""
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        raise TypeError(f"dim must be an int, the size of the state, not {type(dim).__name__}")
    if dim is not None and dim < 1:
        raise ValueError(f"dim must be at least 1, not {dim}")
    wrap = (
        "wrap it in a module of your own with forward(self, t, y), the networks it calls being its submodules, so that "
        "their parameters are known"
    )
    if isinstance(module, type) or not isinstance(module, nn.Module):
        what = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        remedy = "; " + ("make an instance of it" if isinstance(module, type) else wrap) if callable(module) else ""
        raise TypeError(f"module_or_field must be an nn.Module with forward(t, y) or a VectorField, not {what}{remedy}")
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name!r} has no size yet; call the module once, for its lazy layers")
        if parameter.is_meta:
            raise ValueError(f"parameter {name!r} is on the meta device; materialise the module first")
    try:
        parameters = inspect.signature(module.forward)
    except (TypeError, ValueError):  # compiled code tells no signature
        return
    try:
        parameters.bind(None, None)
    except TypeError:
        raise TypeError(
            f"module {type(module).__name__} has forward{parameters}, but a vector field is called as forward(t, y); "
            f"{wrap}"
        ) from None


def find_probe(module: nn.Module, dim: int | None) -> Probe:
    """The one way to call the module that returns [batch, dim]."""
    dtype, device = _dtype_and_device(module)
    tensors = [*module.parameters(), *module.buffers()]
    # A state that is concatenated with t makes a matrix one wider.
    likely = {s for x in tensors if x.dim() in (1, 2) for s in x.shape} | {
        m.in_features - 1 for m in module.modules() if isinstance(m, nn.Linear)
    }
    attempts = _Attempts(module, dtype, device, {s for x in tensors for s in x.shape})
    # Where the weights do not show it (a state cut in parts, weights made by another network), sizes one by one.
    unlikely = [] if dim is not None else sorted(set(range(1, SMALL + 1)) - likely)
    rounds = itertools.product((True, False), (sorted(likely - {0}) if dim is None else [dim], unlikely))
    works = next(filter(None, (attempts.at(dims, batched) for batched, dims in rounds)), [])
    if len(works) == 1:
        return works[0]
    name = f"module {type(module).__name__}"
    if not works and attempts.takes_tuple:
        raise UnsupportedFieldError(
            f"{name}: forward(t, state) takes a tuple (y, log-density), so it is no field of one tensor. Compile the "
            "network inside it that maps (t, y) to dy/dt, and let sfk.with_divergence add the log-density"
        )
    if not works and attempts.returned is not None:
        raise ValueError(f"{name}: {attempts.returned}; a vector field returns one tensor shaped like y")
    error = attempts.error
    if dim is not None:
        raise UnsupportedFieldError(
            f"{name}: forward(t, y) failed for y [{attempts.batch}, {dim}] and t 0-d, [1, 1] or [1]: "
            f"{type(error).__name__}: {error}"
        ) from error
    images = next((path for path, m in module.named_modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if not works and images is not None:
        raise UnsupportedFieldError(f"{name}: {images!r} is a convolution; only states [batch, dim] are run. {REMEDY}.")
    found = ", ".join(str(probe.dim) for probe in works) or "none"
    hint = f" (the first try, {attempts.error_at}, said: {error})" if error is not None and not works else ""
    raise ValueError(
        f"{name}: the size of the state cannot be told from the weights (sizes that run: {found}); pass dim=...{hint}"
    )


class _Attempts:
    """Calls of a module with states of several sizes, and what came of them."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device, sizes: set[int]) -> None:
        self.module, self.dtype, self.device, self.sizes = module, dtype, device, sizes
        self.batch = 0
        self.error: Exception | None = None  # the first one, and where it was
        self.error_at = ""
        self.returned: str | None = None  # what else than a tensor shaped like y
        self.takes_tuple = False

    def at(self, dims: list[int], batched: bool) -> list[Probe]:
        """The probes that work, one per size at most."""
        # A batch size that nothing else has, so that no broadcast or transpose of the module's works by accident.
        taken = self.sizes | {d + k for d in dims for k in (-1, 0, 1, 2)}
        self.batch = next(n for n in itertools.count(7, 2) if n not in taken)
        ways = [
            [Probe(d, t_shape, self.batch, self.dtype, self.device, batched) for t_shape in ((), (1, 1), (1,))]
            for d in dims
        ]
        works = [probe for one in ways if (probe := next(filter(self._works, one), None)) is not None]
        if not works and batched:
            self._try_tuples(dims)
        return works

    def _works(self, probe: Probe) -> bool:
        t, y = probe.point()
        try:
            out = probe.run(self.module, t, y)
        except Exception as error:  # whatever the user's code raises says that this shape is not meant
            if self.error is None:
                self.error, self.error_at = error, f"y {list(y.shape)}"
            return False
        if isinstance(out, Tensor) and out.shape == y.shape:
            return True
        if probe.batched and self.returned is None:
            what = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            self.returned = f"forward(t, y) with y {list(y.shape)} returned {what}"
        return False

    def _try_tuples(self, dims: list[int]) -> None:
        for dim in dims:
            t, y = Probe(dim, (), self.batch, self.dtype, self.device).point()
            with contextlib.suppress(Exception):
                out = self.module(t, (y, y.new_zeros(self.batch, 1)))
                if isinstance(out, tuple) and isinstance(out[0], Tensor) and out[0].shape == y.shape:
                    self.takes_tuple = True


def _dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    parameters = list(module.parameters())
    for name, parameter in module.named_parameters():
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
    kinds = {"cpu", *(x.device.type for x, _ in tensors)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(gpus)))
        stack.enter_context(torch.inference_mode(False))
        for kind in filter(torch.amp.is_autocast_available, kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))  # the program is the module's in its own dtype
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
