"""What sparse layers share: weights at the entries of a pattern alone, as parameters and in state dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .field import Pattern
from .masks import effective
from .products.packed import CPU_CLASSES, REMEDY, packed_of, rows_of


class SparseLayer(nn.Module):
    """A layer whose weight, as a matrix, has values at the entries of a pattern.

    values: Parameter [nnz], in the order of the pattern (CSR).  bias: Parameter [rows] or None.  row_ptr, col: int64
    buffers.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    row_ptr: Tensor
    col: Tensor
    _name = "SparseLayer"  # of the class that users know
    _sizes = ""  # the attributes that a state has to share

    def __init__(
        self, pattern: Pattern, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None, backend: str,
        backends: tuple[str, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        if backend not in backends:
            raise ValueError(f"{self._name}: backend must be one of {', '.join(map(repr, backends))}, not {backend!r}")
        self.backend = backend
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(pattern.shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        device = self.values.device
        self.register_buffer("row_ptr", torch.empty_like(pattern.row_ptr, device=device).copy_(pattern.row_ptr))
        self.register_buffer("col", torch.empty_like(pattern.col, device=device).copy_(pattern.col))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.values.is_meta:
            return
        lengths = self.row_ptr.diff().clamp(min=1)
        bound = lengths.to(self.values.dtype).rsqrt()
        with torch.no_grad():
            self.values.uniform_(-1.0, 1.0).mul_(bound[rows_of(self.row_ptr, self.col)])
            if self.bias is not None:
                self.bias.uniform_(-1.0, 1.0).mul_(bound)

    @classmethod
    def _mask_of(cls, module: nn.Module, how: str) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of a dense module as its forward uses them now. how: the caller, for messages."""
        weight = effective(module, "weight")
        bad = int(weight.isnan().sum())
        if bad:
            raise ValueError(
                f"{how}: {bad} of the {weight.numel()} entries of the weight are NaN, which is neither a zero nor a "
                "weight; look at the weight and at its mask"
            )
        return weight, None if module.bias is None else effective(module, "bias")

    def _take_over(self, module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
        """The numbers and flags of a dense module; weight: as a matrix."""
        with torch.no_grad():
            self.values.copy_(weight[rows_of(self.row_ptr, self.col), self.col])
            if bias is not None:
                self.bias.copy_(bias)
        self.values.requires_grad_(trained(module, "weight"))
        if bias is not None:
            self.bias.requires_grad_(trained(module, "bias"))
        return self.train(module.training)

    def _give(self, dense: nn.Module) -> Any:
        """A dense module with this one's numbers and flags."""
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        dense.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    @property
    def _where(self) -> Any:
        """The pattern, for `packed_of`; what `_check_parameters` looks at."""
        raise NotImplementedError

    @property
    def _shape(self) -> tuple[int, int]:
        """Of the weight as a matrix."""
        raise NotImplementedError

    @property
    def pattern(self) -> Pattern:
        """Where the weights are, on the CPU."""
        return packed_of(self._where).pattern

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    @property
    def density(self) -> float:
        return self.nnz / max(1, self._shape[0] * self._shape[1])

    def _matrix(self) -> Tensor:
        """The dense weight as a matrix; made anew at every call, differentiable in `values`."""
        rows, columns = self._shape
        self._check_parameters(self.values, self.bias, self._where)
        flat = rows_of(self.row_ptr, self.col) * columns + self.col
        zero = self.values.new_zeros(rows * columns)
        return zero.index_put((flat,), self.values).view(rows, columns)

    def _as_autocast(self, x: Tensor) -> Tensor:
        values = self.values
        if x.dtype != values.dtype and x.is_floating_point() and x.device == values.device and self.backend != "torch":
            if torch.is_autocast_enabled(x.device.type):
                return x.to(values.dtype)
        return x

    def _check_input(self, x: Tensor) -> None:
        values = self.values
        if x.dtype != values.dtype or x.device != values.device:
            raise ValueError(
                f"{self._name}: x is {x.dtype} on {x.device}, the layer {values.dtype} on {values.device}; move one of "
                "them with .to()"
            )
        if values.dtype not in CPU_CLASSES:
            raise ValueError(
                f"{self._name}: the kernels compute in float32 and float64, not {values.dtype}; call .float() or "
                f".double(), {REMEDY}"
            )

    def _check_parameters(self, values: Tensor, bias: Tensor | None, where: Any) -> None:
        """The kernels read raw memory."""
        if values.shape != where.col.shape:
            raise ValueError(
                f"{self._name}: values must be [{self.nnz}], one per entry of the pattern, not {list(values.shape)}"
            )
        if bias is not None and (
            bias.shape != (len(self.row_ptr) - 1,) or bias.dtype != values.dtype or bias.device != values.device
        ):
            raise ValueError(
                f"{self._name}: bias must be [{len(self.row_ptr) - 1}], {values.dtype} on {values.device} like the "
                f"values, not {list(bias.shape)}, {bias.dtype} on {bias.device}"
            )
        if where.col.device != values.device or where.row_ptr.device != values.device:
            raise ValueError(
                f"{self._name}: the values are on {values.device}, the pattern on {where.col.device}; call .to()"
            )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:  # fmt: skip
        row_ptr, col, values = (state_dict.get(prefix + name) for name in ("row_ptr", "col", "values"))
        if row_ptr is not None and col is not None and values is not None:
            try:
                self._take_pattern(row_ptr, col, values)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix or f'{self._name}: '}{error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_pattern(self, row_ptr: Tensor, col: Tensor, values: Tensor) -> None:
        """Make room for a state with this pattern."""
        rows, columns = self._shape
        if row_ptr.shape != (rows + 1,):
            raise ValueError(
                f"the state's pattern has {row_ptr.numel() - 1} rows, this layer {rows}; a state can be "
                f"loaded by a layer of the same {self._sizes} only"
            )
        if not row_ptr.is_meta:
            Pattern((rows, columns), row_ptr.cpu(), col.cpu())
        if values.shape != col.shape:
            raise ValueError(f"the state has {list(values.shape)} values for {list(col.shape)} entries")
        if col.shape == self.col.shape and not (col.is_meta or self.col.is_meta):
            pairs = (row_ptr, self.row_ptr), (col, self.col)
            if all(torch.equal(new.to(old.device), old) for new, old in pairs):
                return
        # new tensors: what is packed for the old pattern must not outlive it
        self.row_ptr, self.col = torch.empty_like(self.row_ptr), self.col.new_empty(col.shape)
        if values.shape != self.values.shape:
            self.values.grad = None
            self.values.data = self.values.data.new_empty(values.shape)


def trained(module: nn.Module, name: str) -> bool:
    """Does the parameter `name`, masked, parametrized or plain, want a gradient?"""
    if parametrize.is_parametrized(module, name):
        return any(part.requires_grad for part in module.get_submodule(f"parametrizations.{name}").parameters())
    parameter = module._parameters.get(f"{name}_orig", module._parameters.get(name))
    return parameter is not None and parameter.requires_grad
