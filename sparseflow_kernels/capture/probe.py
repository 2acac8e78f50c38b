"""Running a user's module without leaving a trace: its dtype and device, how it is called, test points."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._pytree import tree_map

from ..field import UnsupportedFieldError
from ..masks import check_has_numbers
from .refusal import NotFinite
from .seen import watched

TIME = 0.6180339887498949  # one that no number in a user's code is likely to equal


class Points:
    """The points that a module is called at: of `batch` samples of `dim` numbers, t of the shape `t_shape`. `state` makes
    a state of rows, and `call` is module(t, state)."""

    def time(self, t: float) -> Tensor:
        return torch.full(self.t_shape, t, dtype=self.dtype, device=self.device)

    def point(
        self, t: float = TIME, scale: float = 1.0, seed: int = 0, batch: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A t, and a random y [batch, dim]."""
        generator = torch.Generator().manual_seed(seed)
        y = scale * torch.randn(batch or self.batch, self.dim, generator=generator, dtype=torch.float64)
        return self.time(t), y.to(self.device, self.dtype)


@dataclass(frozen=True)
class Probe(Points):
    """How a module is called: forward(t, y) with y [batch, dim]."""

    dim: int
    t_shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    device: torch.device
    batched: bool = True  # False: forward takes one state y [dim]
    between: tuple[int, ...] = ()  # forward takes y [batch, *between, dim]; all of them 1
    only: str = ""  # why forward runs for this batch alone
    grad: bool = False  # forward differentiates, and relies on its caller for a state that requires a gradient

    def state(self, rows: Tensor) -> Any:
        """rows [batch, dim] as forward gets them."""
        return rows

    def call(self, module: nn.Module, t: Tensor, state: Any) -> Any:
        return self.run(module, t, state)

    def run(self, module: nn.Module, t: Tensor, y: Tensor) -> Tensor:
        """module(t, y) for y [batch, dim]."""
        return differentiable(lambda y: self._run(module, t, y), y, self.grad)

    def _run(self, module: nn.Module, t: Tensor, y: Tensor) -> Tensor:
        if not self.between:
            return module(t, y) if self.batched else torch.vmap(module, (None, 0))(t, y)
        y = y.view(y.shape[0], *self.between, self.dim)
        out = module(t, y)
        return out.reshape(y.shape[0], self.dim) if isinstance(out, Tensor) and out.shape == y.shape else out


def differentiable(run: Any, state: Any, grad: bool) -> Any:
    """run(state), where grad: of tensors that require a gradient, as a caller that trains gives them."""
    if not grad:
        return watched(lambda: run(state))
    with torch.enable_grad():
        state = tree_map(lambda x: x.requires_grad_(True), state)
        out = watched(lambda: run(state))
    cut = torch.ops.aten.detach.default  # no .detach(), which would be forward's own
    return tree_map(lambda x: cut(x) if isinstance(x, Tensor) else x, out)


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
        check_has_numbers(f"parameter {name!r}", parameter)
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


def unwrapped(module: Any) -> Any:
    """The module inside torch.compile's wrapper, whose parameters have other names."""
    while isinstance(module, nn.Module) and "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]
    return module


def check_like(like: Any, dim: int | None) -> None:
    """Raises TypeError and ValueError for what is no example of a state."""
    if isinstance(like, (tuple, list)):
        if not like or not all(isinstance(part, Tensor) for part in like):
            raise TypeError("like must be an example of the state y0: a tensor, or a tuple of tensors")
        if dim is not None:
            raise ValueError("like is a tuple of tensors, which says all sizes; dim is for a state [batch, dim]")
        if len({(part.dtype, part.device) for part in like}) > 1:
            raise TypeError("the tensors of like must be of one dtype, on one device")
        for part in like:
            _check_example(part, "each tensor of like must have at least one element, not")
        return
    if not isinstance(like, Tensor):
        raise TypeError(f"like must be a tensor, an example of the state y0, not {type(like).__name__}")
    _check_example(like, "like must be [..., dim] with at least one sample, not")
    last = like.shape[-1] if like.dim() else 1
    if dim is not None and last != dim:
        raise ValueError(f"dim is {dim}, but the last axis of like is {last}; one of them is enough")


def _check_example(part: Tensor, size: str) -> None:
    if part.numel() == 0:
        raise ValueError(f"{size} {list(part.shape)}")
    if part.dtype not in (torch.float32, torch.float64):
        parts = "; solve for torch.view_as_real(y0), with torch.view_as_complex inside forward" if part.is_complex() else ""
        raise TypeError(f"like must be float32 or float64, not {part.dtype}{parts}")


def check_settled(module: nn.Module) -> None:
    """Refuses spectral norms in training: every call moves them, so that the module has no field of its own."""
    for name, child in module.named_modules():
        hooks = [type(hook) for hook in child._forward_pre_hooks.values()]
        if child.training and (isinstance(child, _SpectralNorm) or SpectralNorm in hooks):
            raise UnsupportedFieldError(
                f"{name!r} is a spectral norm that updates itself at every call in training. Call .eval() on the module "
                "first"
            )


def dtype_and_device(module: nn.Module, example: Tensor | None) -> tuple[torch.dtype, torch.device]:
    parameters = list(module.parameters())
    for name, parameter in module.named_parameters():
        strided = parameter.layout == torch.strided
        if not bool(torch.isfinite(parameter.detach() if strided else parameter.detach().to_dense()).all()):
            raise NotFinite(f"parameter {name!r} holds NaN or infinite values; a vector field needs finite weights")
    for what, kinds in (("dtype", {real_dtype(p) for p in parameters}), ("device", {p.device for p in parameters})):
        if len(kinds) > 1:
            raise UnsupportedFieldError(
                f"the module's parameters have more than one {what} ({', '.join(sorted(map(str, kinds)))}); move them "
                "to one with module.to(...)"
            )
    free = torch.empty(0) if example is None else example
    like = next(iter([*parameters, *(b for b in module.buffers() if b.is_floating_point()), free]))
    dtype = real_dtype(like)
    if dtype not in (torch.float32, torch.float64):
        raise UnsupportedFieldError(f"the module's dtype is {dtype}; use module.float() or module.double()")
    if example is not None and (example.dtype, example.device) != (dtype, like.device):
        kind = ValueError if example.dtype == dtype else TypeError
        raise kind(
            f"like is {example.dtype} on {example.device}, the module {dtype} on {like.device}; move one of them "
            "with .to()"
        )
    return dtype, like.device


def real_dtype(x: Tensor) -> torch.dtype:
    """Its dtype; of a complex tensor that of its parts."""
    return x.dtype.to_real() if x.is_complex() else x.dtype


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """While this lasts, torch runs attention and recurrent layers by the single operations that they consist of."""
    quick, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns about other settings that it touches
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(quick)
        torch._C._set_mkldnn_enabled(onednn)
