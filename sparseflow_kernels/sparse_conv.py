"""A sparse nn.Conv2d for any model: products with the weights that are left, and gradients of these alone."""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .field import Pattern
from .products.convolution import Where, product
from .sparse_layer import SparseLayer

BACKENDS = ("auto", "cpu", "torch")
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


class SparseConv2d(SparseLayer):
    """A convolution of images that has weights at the entries of a pattern only: a drop-in for a pruned nn.Conv2d.

    pattern: where the weights are, in nn.Conv2d's weight as the matrix [out, in / groups * kernel height * width].
    kernel_size, stride, padding, dilation, groups, bias, padding_mode: as in nn.Conv2d; padding also "same" or "valid".
    device, dtype: of the parameters, torch's defaults if None.  backend: who computes: "auto" and "cpu" are the kernels
    in C++, for tensors on the CPU; "torch" is torch's convolution with the dense weight, for any device and dtype.

    values: Parameter [nnz], in the order of the pattern (CSR).  bias: Parameter [out] or None.  row_ptr, col: int64
    buffers, the pattern. States, initial values, dtypes, autocast, derivatives of any order, torch.func, torch.compile
    and torch.export are as in `SparseLinear`. Results do not depend on the number of threads. What comes out for an x
    in channels_last is in channels_last too.

    Raises TypeError, ValueError for arguments that make no convolution, and in `forward`, for x of another size, dtype
    or device; RuntimeError where the backend is not installed or cannot run on the device.
    """

    _name = "SparseConv2d"
    _sizes = "in_channels, out_channels, kernel_size and groups"

    def __init__(
        self, pattern: Pattern, kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0, dilation: int | Sequence[int] = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        if not isinstance(pattern, Pattern):
            raise TypeError(
                f"SparseConv2d: pattern must be a Pattern, not {type(pattern).__name__}; SparseConv2d.from_conv makes "
                "a layer of a pruned nn.Conv2d"
            )
        kernel, stride = _pair(kernel_size, "kernel_size", 1), _pair(stride, "stride", 1)
        dilation = _pair(dilation, "dilation", 1)
        taps = kernel[0] * kernel[1]
        if pattern.shape[1] % taps:
            raise ValueError(
                f"SparseConv2d: the pattern has {pattern.shape[1]} columns, which are no whole kernels of {kernel[0]} "
                f"x {kernel[1]} taps"
            )
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or pattern.shape[0] % groups:
            raise ValueError(
                f"SparseConv2d: groups must be a whole number that divides the {pattern.shape[0]} channels out, not "
                f"{groups!r}"
            )
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"SparseConv2d: padding_mode must be one of {', '.join(PADDING_MODES)}, not {padding_mode!r}"
            )
        super().__init__(pattern, bias, device, dtype, backend, BACKENDS)
        self.out_channels, self.in_channels = pattern.shape[0], pattern.shape[1] // taps * groups
        self.kernel_size, self.stride, self.dilation, self.groups = kernel, stride, dilation, groups
        self.padding = padding if isinstance(padding, str) else _pair(padding, "padding", 0)
        self.padding_mode = padding_mode
        self._around = self._zeros_around()

    def _zeros_around(self) -> tuple[int, int, int, int]:
        """(above, below, left, right)"""
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding == "same":
            if self.stride != (1, 1):
                raise ValueError(f"SparseConv2d: padding='same' needs stride 1, not {self.stride}")
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
        if isinstance(self.padding, str):
            raise ValueError(f"SparseConv2d: padding must be numbers, 'same' or 'valid', not {self.padding!r}")
        return self.padding[0], self.padding[0], self.padding[1], self.padding[1]

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, backend: str = "auto") -> "SparseConv2d":
        """The layer without its zeros, as its forward uses it now: masks of torch.nn.utils.prune and parametrizations
        are applied and gone. It keeps dtype, device, requires_grad and the training flag; its parameters are copies.

        Raises TypeError for anything but an nn.Conv2d, ValueError for a weight with NaN.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"SparseConv2d.from_conv: an nn.Conv2d is needed, not {type(conv).__name__}")
        weight, bias = cls._mask_of(conv, "SparseConv2d.from_conv")
        weight = weight.flatten(1)
        layer = cls(
            Pattern.from_mask(weight != 0), conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
            bias is not None, conv.padding_mode, device=weight.device, dtype=weight.dtype, backend=backend,
        )  # fmt: skip
        return layer._take_over(conv, weight, bias)

    def to_conv(self) -> nn.Conv2d:
        """The dense nn.Conv2d with the same function: zeros where there is no weight, which training would fill."""
        return self._give(nn.utils.skip_init(
            nn.Conv2d, self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, self.padding_mode, device=self.values.device, dtype=self.values.dtype,
        ))  # fmt: skip

    def _of_size(self, source: tuple, padding: tuple) -> Where:
        return Where(
            self.row_ptr, self.col, self.in_channels, self.groups, source, self.kernel_size, self.stride, padding,
            self.dilation, self.backend,
        )  # fmt: skip

    @property
    def _where(self) -> Where:
        return self._of_size((1, 1), self._around)

    @property
    def _shape(self) -> tuple[int, int]:
        return self._where.shape

    @property
    def weight(self) -> Tensor:
        """Dense [out, in / groups, height, width], zeros where there is no weight; made anew at every call,
        differentiable in `values`."""
        return self._matrix().view(self.out_channels, -1, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in, height, width] -> [..., out, height', width']."""
        values, bias, around = self.values, self.bias, self._around
        x = self._as_autocast(x)
        if x.dim() < 3 or x.shape[-3] != self.in_channels:
            raise ValueError(f"SparseConv2d: x must be [..., {self.in_channels}, height, width], not {list(x.shape)}")
        last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        if self.padding_mode != "zeros" and any(around):
            x, around = F.pad(x, (*around[2:], *around[:2]), self.padding_mode), (0, 0, 0, 0)
        where = self._of_size(tuple(x.shape[-2:]), around)
        if min(where.target) < 1:
            raise ValueError(
                f"SparseConv2d: images of {list(x.shape[-2:])} pixels with {list(around)} zeros above, below, left and "
                f"right are smaller than the kernel {list(self.kernel_size)} of dilation {list(self.dilation)}"
            )
        if self.backend == "torch":
            x = F.pad(x, (*around[2:], *around[:2])) if any(around) else x
            return F.conv2d(x, self.weight, bias, self.stride, 0, self.dilation, self.groups)
        self._check_parameters(values, bias, where)
        self._check_input(x)
        y = product(x, values, bias, where)
        return y.contiguous(memory_format=torch.channels_last) if last else y

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, usual in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
            if getattr(self, name) != usual:
                text += f", {name}={getattr(self, name)!r}"
        text += f", bias={self.bias is not None}, nnz={self.nnz}, density={self.density:.3g}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"


def _pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else value
    fits = isinstance(both, (tuple, list)) and len(both) == 2 and not isinstance(value, bool)
    if not fits or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in both):
        raise ValueError(f"SparseConv2d: {name} must be a whole number or two of them, {least} or more, not {value!r}")
    return tuple(both)
