"""A sparse nn.Linear for any model: products with the weights that are left, and gradients of these alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .field import Pattern
from .products.linear import product
from .products.packed import BACKENDS, Where
from .sparse_layer import SparseLayer


class SparseLinear(SparseLayer):
    """y = x W' + b where W [out, in] has weights at the entries of a pattern only: a drop-in for a pruned nn.Linear.

    pattern: where the weights are.  bias: with a bias or without.  device, dtype: of the parameters, torch's defaults
    if None.  backend: who multiplies: "auto" is "cpu" for tensors on the CPU (kernels in C++) and "triton" for those on
    CUDA devices; "torch" is torch's product with the dense weight, for any device and dtype.

    values: Parameter [nnz], in the order of the pattern (CSR).  bias: Parameter [out] or None.  row_ptr, col: int64
    buffers, the pattern. A state dict holds all four, and can be loaded by a layer of the same shape with another
    pattern, whose `values` then change their size (make the optimizer after that).

    Like nn.Linear's, parameters start uniform in +-1 / sqrt(k), k the number of weights of a row.

    The engines compute in float32 and float64, in the dtype of the parameters. Under autocast, where nn.Linear would go
    down to bfloat16 or float16, x is converted to the parameters' dtype, which the result has. Results do not depend on
    the number of threads. It differentiates any number of times, in both modes, and works under torch.func,
    torch.compile and torch.export; torch.func.vmap runs what has values of its own for every item one after another.

    Raises TypeError, ValueError for an unknown backend, and in `forward`, for x of another size, dtype or device;
    RuntimeError where the backend is not installed or cannot run on the device.
    """

    _name = "SparseLinear"
    _sizes = "in_features and out_features"

    def __init__(
        self, pattern: Pattern, bias: bool = True, *, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        if not isinstance(pattern, Pattern):
            raise TypeError(
                f"SparseLinear: pattern must be a Pattern, not {type(pattern).__name__}; Pattern.from_mask makes one "
                "of a mask, SparseLinear.from_linear a layer of a pruned nn.Linear"
            )
        super().__init__(pattern, bias, device, dtype, backend, BACKENDS)
        self.out_features, self.in_features = pattern.shape

    @classmethod
    def from_linear(cls, linear: nn.Linear, backend: str = "auto") -> "SparseLinear":
        """The layer without its zeros, as its forward uses it now: masks of torch.nn.utils.prune and parametrizations
        are applied and gone. It keeps dtype, device, requires_grad and the training flag; its parameters are copies.

        Raises TypeError for anything but an nn.Linear, ValueError for a weight with NaN.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"SparseLinear.from_linear: an nn.Linear is needed, not {type(linear).__name__}")
        weight, bias = cls._mask_of(linear, "SparseLinear.from_linear")
        pattern = Pattern.from_mask(weight != 0)
        layer = cls(pattern, bias is not None, device=weight.device, dtype=weight.dtype, backend=backend)
        return layer._take_over(linear, weight, bias)

    def to_linear(self) -> nn.Linear:
        """The dense nn.Linear with the same function: zeros where there is no weight, which training would fill."""
        return self._give(nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None, device=self.values.device,
            dtype=self.values.dtype,
        ))  # fmt: skip

    @property
    def _where(self) -> Where:
        return Where(self.row_ptr, self.col, self.in_features, self.backend)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """Dense [out, in], zeros where there is no weight; made anew at every call, differentiable in `values`."""
        return self._matrix()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        values, bias = self.values, self.bias
        x = self._as_autocast(x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear: x must be [..., {self.in_features}], not {list(x.shape)}")
        if self.backend == "torch":
            return F.linear(x, self.weight, bias)
        where = self._where
        self._check_parameters(values, bias, where)
        self._check_input(x)
        return product(x, values, bias, where)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        text += f"nnz={self.nnz}, density={self.density:.3g}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"
