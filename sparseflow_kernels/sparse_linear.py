"""A sparse nn.Linear for any model: products with the weights that are left, and gradients of these alone.

    sparseflow::linear, sparseflow::spmm_transposed, sparseflow::sddmm

The three operations are closed under differentiation: each is linear in both its factors, and the gradients of one are
the other two, so that backward passes can be differentiated as often as one likes. Eager calls run them as autograd
functions, which cost less than operators; torch.compile, torch.export and other tracers see the operators.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary

from .field import Pattern
from .pruning.masks import effective
from .threads import get_num_threads

BACKENDS = ("auto", "cpu", "triton", "torch")

_CPU_CLASSES = {torch.float32: "SparseLinearF32", torch.float64: "SparseLinearF64"}


# ------------------------------------------------------------------------------------------------------------- engines


class _CpuMatrix:
    """The native products of one layer; the same calls as `engines.triton.matrix.TritonMatrix`."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._native: dict[torch.dtype, Any] = {}

    def _of(self, dtype: torch.dtype) -> Any:
        if dtype not in self._native:
            try:
                from . import _cpu
            except ImportError as error:
                raise RuntimeError(
                    f"SparseLinear: the CPU extension is not built ({error}); install the package with pip, which "
                    f"compiles it, {_REMEDY}"
                ) from error
            rows, cols = self._pattern.shape
            if rows + cols + 2 > _cpu.MOST_ROWS or self._pattern.nnz > _cpu.MOST_ENTRIES:
                raise ValueError(
                    f"SparseLinear: {cols} and {rows} features with {self._pattern.nnz} weights are more than 32-bit offsets "
                    f"reach ({_cpu.MOST_ROWS} features, {_cpu.MOST_ENTRIES} weights); prune it, {_REMEDY}"
                )
            row_ptr, col = (index.to(torch.int32).numpy() for index in (self._pattern.row_ptr, self._pattern.col))
            self._native[dtype] = getattr(_cpu, _CPU_CLASSES[dtype])(rows, cols, row_ptr, col)
        return self._native[dtype]

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return self._multiply(False, x, values, bias)

    def backward_input(self, grad: Tensor, values: Tensor) -> Tensor:
        return self._multiply(True, grad, values, None)

    def _multiply(self, transposed: bool, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        native = self._of(x.dtype)
        x, values, bias = x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous()
        out = x.new_empty(len(x), self._pattern.shape[1 if transposed else 0])
        native.multiply(
            transposed, values.data_ptr(), x.data_ptr(), len(x), 0 if bias is None else bias.data_ptr(),
            get_num_threads(), out.data_ptr(),
        )  # fmt: skip
        return out

    def backward_values(self, grad: Tensor, x: Tensor) -> Tensor:
        grad, x = grad.contiguous(), x.contiguous()
        sums = x.new_empty(self._pattern.nnz)
        self._of(x.dtype).gradient(grad.data_ptr(), x.data_ptr(), len(x), get_num_threads(), sums.data_ptr())
        return sums


_REMEDY = 'or ask for torch\'s own product with backend="torch"'


def _triton_matrix(pattern: Pattern, device: torch.device) -> Any:
    try:
        from .engines.triton.matrix import TritonMatrix
        from .engines.triton.operator import interpreted
    except ImportError as error:
        raise RuntimeError(
            f"SparseLinear: tensors on {device} need the package triton, which cannot be imported ({error}); install "
            f'it with "pip install triton", {_REMEDY}'
        ) from error
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(
            f'SparseLinear: backend="triton" needs tensors on a CUDA device, not on {device}: call .cuda(), {_REMEDY} '
            "(on the CPU it runs in Triton's interpreter, for tests, where TRITON_INTERPRET=1 is set)"
        )
    return TritonMatrix(pattern, device)


class _Where(NamedTuple):
    """The arguments that say which layer an operation belongs to."""

    row_ptr: Tensor
    col: Tensor
    in_features: int
    backend: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_ptr.shape[0] - 1, self.in_features


class _Packed:
    """What is made of the index tensors of one layer: its pattern, and what the engines pack of it."""

    def __init__(self, where: _Where) -> None:
        self.pattern = Pattern(where.shape, where.row_ptr.cpu(), where.col.cpu())
        self.stamp = _stamp(where.row_ptr, where.col)
        self._matrices: dict[tuple[str, torch.device], Any] = {}

    def matrix(self, backend: str, device: torch.device) -> Any:
        """Raises RuntimeError where the backend cannot run here."""
        found = self._matrices.get((backend, device))
        if found is None:
            found = self._matrices[backend, device] = self._make(backend, device)
        return found

    def _make(self, backend: str, device: torch.device) -> Any:
        if backend == "triton" or (backend == "auto" and device.type == "cuda"):
            return _triton_matrix(self.pattern, device)
        if device.type == "cpu":
            return _CpuMatrix(self.pattern)
        what = "there are kernels for the CPU and for CUDA"
        if backend == "cpu":
            what = 'backend="cpu" needs tensors on the CPU'
        raise RuntimeError(f"SparseLinear: {what}, the tensors are on {device}: call .cpu(), {_REMEDY}")


def _stamp(row_ptr: Tensor, col: Tensor) -> tuple:
    """Equal as long as the same index tensors hold the same numbers."""
    if col.is_inference() or row_ptr.is_inference():  # they count no versions
        return row_ptr.data_ptr(), col.data_ptr()
    return row_ptr._version, col._version, col.data_ptr()


_packed = WeakTensorKeyDictionary()  # a layer's row_ptr -> _Packed


def _packed_of(where: _Where) -> _Packed:
    known = _packed.get(where.row_ptr)
    if known is None or known.stamp != _stamp(where.row_ptr, where.col):
        known = _packed[where.row_ptr] = _Packed(where)
    return known


# ----------------------------------------------------------------------------------------------------- three operations
# x [..., in], grad [..., out], values [nnz], bias [out]; all of one dtype on one device. Nobody differentiates in here.


def _flat(x: Tensor) -> Tensor:
    """[..., features] -> [batch, features]."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _run_linear(x: Tensor, values: Tensor, bias: Tensor | None, where: _Where) -> Tensor:
    """x W' + bias: [..., out]."""
    matrix = _packed_of(where).matrix(where.backend, x.device)
    return matrix.forward(_flat(x), values, bias).view(*x.shape[:-1], where.shape[0])


def _run_transposed(grad: Tensor, values: Tensor, where: _Where) -> Tensor:
    """grad W: [..., in]."""
    matrix = _packed_of(where).matrix(where.backend, grad.device)
    return matrix.backward_input(_flat(grad), values).view(*grad.shape[:-1], where.in_features)


def _run_sddmm(grad: Tensor, x: Tensor, where: _Where) -> Tensor:
    """grad' x at the entries of the pattern, summed over all other axes: [nnz]."""
    matrix = _packed_of(where).matrix(where.backend, x.device)
    return matrix.backward_values(_flat(grad), _flat(x))


_WHERE = "Tensor row_ptr, Tensor col, int in_features, str backend"


@torch.library.custom_op(
    "sparseflow::linear", mutates_args=(), schema=f"(Tensor x, Tensor values, Tensor? bias, {_WHERE}) -> Tensor"
)
def _linear_op(x, values, bias, *where):
    return _run_linear(x, values, bias, _Where(*where))


@_linear_op.register_fake
def _(x, values, bias, *where):
    return x.new_empty(*x.shape[:-1], _Where(*where).shape[0])


@torch.library.custom_op(
    "sparseflow::spmm_transposed", mutates_args=(), schema=f"(Tensor grad, Tensor values, {_WHERE}) -> Tensor"
)
def _transposed_op(grad, values, *where):
    return _run_transposed(grad, values, _Where(*where))


@_transposed_op.register_fake
def _(grad, values, *where):
    return grad.new_empty(*grad.shape[:-1], _Where(*where).in_features)


@torch.library.custom_op("sparseflow::sddmm", mutates_args=(), schema=f"(Tensor grad, Tensor x, {_WHERE}) -> Tensor")
def _sddmm_op(grad, x, *where):
    return _run_sddmm(grad, x, _Where(*where))


@_sddmm_op.register_fake
def _(grad, x, row_ptr, col, in_features, backend):
    return x.new_empty(col.shape[0])


# ------------------------------------------------------------------------------------------------------------ gradients


class _Calls(NamedTuple):
    """The operations as a derivative calls them: (two arguments, *where), the first also with a bias between."""

    linear: Callable
    spmm_transposed: Callable
    sddmm: Callable


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps the two factors and where."""
    row_ptr, col, *ctx.rest = inputs[-len(_Where._fields) :]
    ctx.save_for_backward(*inputs[:2], row_ptr, col)
    ctx.save_for_forward(*inputs[:2], row_ptr, col)


def _kept(ctx: Any) -> tuple[Tensor, Tensor, tuple]:
    left, right, row_ptr, col = ctx.saved_tensors
    return left, right, (row_ptr, col, *ctx.rest)


_NOTHING = (None,) * len(_Where._fields)


def _linear_gradient(calls: _Calls, ctx: Any, grad: Tensor) -> tuple:
    x, values, where = _kept(ctx)
    need_x, need_values, need_bias = ctx.needs_input_grad[:3]
    return (
        calls.spmm_transposed(grad, values, *where) if need_x else None,
        calls.sddmm(grad, x, *where) if need_values else None,
        _flat(grad).sum(0) if need_bias else None,
        *_NOTHING,
    )


def _transposed_gradient(calls: _Calls, ctx: Any, cotangent: Tensor) -> tuple:
    grad, values, where = _kept(ctx)
    return (
        calls.linear(cotangent, values, None, *where) if ctx.needs_input_grad[0] else None,
        calls.sddmm(grad, cotangent, *where) if ctx.needs_input_grad[1] else None,
        *_NOTHING,
    )


def _sddmm_gradient(calls: _Calls, ctx: Any, cotangent: Tensor) -> tuple:
    grad, x, where = _kept(ctx)
    return (
        calls.linear(x, cotangent, None, *where) if ctx.needs_input_grad[0] else None,
        calls.spmm_transposed(grad, cotangent, *where) if ctx.needs_input_grad[1] else None,
        *_NOTHING,
    )


_OPERATORS = _Calls(_linear_op, _transposed_op, _sddmm_op)

_linear_op.register_autograd(partial(_linear_gradient, _OPERATORS), setup_context=_setup)
_transposed_op.register_autograd(partial(_transposed_gradient, _OPERATORS), setup_context=_setup)
_sddmm_op.register_autograd(partial(_sddmm_gradient, _OPERATORS), setup_context=_setup)


def _sum_of(*terms: Tensor | None) -> Tensor | None:
    given = [term for term in terms if term is not None]
    return sum(given[1:], given[0]) if given else None


def _one_by_one(info: Any, in_dims: tuple, args: tuple, call: Callable) -> tuple[Tensor, int]:
    """vmap over what the kernels have no batch axis for."""

    def item(index: int) -> Tensor:
        return call(*(a if d is None else a.select(d, index) for a, d in zip(args, in_dims)))

    if info.batch_size == 0:
        raise ValueError("SparseLinear: vmap over no items")
    return torch.stack([item(index) for index in range(info.batch_size)]), 0


def _same_pattern(in_dims: tuple) -> None:
    if any(dim is not None for dim in in_dims[-len(_Where._fields) :]):
        raise ValueError(
            "SparseLinear: vmap over layers needs one pattern for all of them, and index tensors that are not stacked; "
            "stack the parameters only (values, bias), or call the layers one after another"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, values, bias, *where):
        return _run_linear(x, values, bias, _Where(*where))

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, grad):
        return _linear_gradient(_EAGER, ctx, grad)

    @staticmethod
    def jvp(ctx, x_t, values_t, bias_t, *_):
        x, values, where = _kept(ctx)
        tangent = _sum_of(
            None if x_t is None else _EAGER.linear(x_t, values, None, *where),
            None if values_t is None else _EAGER.linear(x, values_t, None, *where),
        )
        if tangent is None:
            return None if bias_t is None else bias_t.expand(*x.shape[:-1], -1).clone()
        return tangent if bias_t is None else tangent + bias_t

    @staticmethod
    def vmap(info, in_dims, x, values, bias, *where):
        _same_pattern(in_dims)
        if in_dims[0] is not None and in_dims[1] is None and in_dims[2] is None:
            return _EAGER.linear(x.movedim(in_dims[0], 0), values, bias, *where), 0
        return _one_by_one(info, in_dims, (x, values, bias, *where), _EAGER.linear)


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(grad, values, *where):
        return _run_transposed(grad, values, _Where(*where))

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, cotangent):
        return _transposed_gradient(_EAGER, ctx, cotangent)

    @staticmethod
    def jvp(ctx, grad_t, values_t, *_):
        grad, values, where = _kept(ctx)
        return _sum_of(
            None if grad_t is None else _EAGER.spmm_transposed(grad_t, values, *where),
            None if values_t is None else _EAGER.spmm_transposed(grad, values_t, *where),
        )

    @staticmethod
    def vmap(info, in_dims, grad, values, *where):
        _same_pattern(in_dims)
        if in_dims[0] is not None and in_dims[1] is None:
            return _EAGER.spmm_transposed(grad.movedim(in_dims[0], 0), values, *where), 0
        return _one_by_one(info, in_dims, (grad, values, *where), _EAGER.spmm_transposed)


class _Sddmm(torch.autograd.Function):
    @staticmethod
    def forward(grad, x, *where):
        return _run_sddmm(grad, x, _Where(*where))

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx, cotangent):
        return _sddmm_gradient(_EAGER, ctx, cotangent)

    @staticmethod
    def jvp(ctx, grad_t, x_t, *_):
        grad, x, where = _kept(ctx)
        return _sum_of(
            None if grad_t is None else _EAGER.sddmm(grad_t, x, *where),
            None if x_t is None else _EAGER.sddmm(grad, x_t, *where),
        )

    @staticmethod
    def vmap(info, in_dims, grad, x, *where):
        _same_pattern(in_dims)
        grad, x = (a if d is None else a.movedim(d, 0) for a, d in zip((grad, x), in_dims))
        # gradients by the sample have nothing to sum up
        if math.prod((x if in_dims[1] is not None else grad).shape[1:-1]) == 1:
            row, col = _rows(where[0], where[1]), where[1]
            products = grad.index_select(-1, row) * x.index_select(-1, col)
            return products.reshape(info.batch_size, -1), 0
        dims = tuple(None if d is None else 0 for d in in_dims)
        return _one_by_one(info, dims, (grad, x, *where), _EAGER.sddmm)


for _operator, _function in ((_linear_op, _Linear), (_transposed_op, _Transposed), (_sddmm_op, _Sddmm)):
    _operator.register_vmap(_function.vmap)


class _EagerLinear(_Linear):
    """The same where nothing but autograd looks on: setup_context, which torch.func needs, is slow."""

    @staticmethod
    def forward(ctx, x, values, bias, *where):
        _setup(ctx, (x, values, bias, *where), None)
        return _run_linear(x, values, bias, _Where(*where))

    setup_context = torch.autograd.Function.setup_context


def _traced(a: Tensor, b: Tensor) -> bool:
    """Is what runs now recorded, or made of tensors that hold no numbers, so that only operators will do?"""
    return (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
        or type(a) not in _PLAIN or type(b) not in _PLAIN or a.is_meta or b.is_meta
        or is_legacy_batchedtensor(a) or is_legacy_batchedtensor(b)
    )  # fmt: skip


_PLAIN = (Tensor, nn.Parameter)


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _either(run: Callable, function: Any, operator: Callable, a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    """An operation inside a derivative."""
    if _traced(a, b):
        return operator(a, b, *rest)
    if torch.is_grad_enabled() or _transformed():
        return function.apply(a, b, *rest)
    return run(a, b, *rest[: -len(_Where._fields)], _Where(*rest[-len(_Where._fields) :]))


_EAGER = _Calls(
    partial(_either, _run_linear, _Linear, _linear_op),
    partial(_either, _run_transposed, _Transposed, _transposed_op),
    partial(_either, _run_sddmm, _Sddmm, _sddmm_op),
)


def _linear(x: Tensor, values: Tensor, bias: Tensor | None, where: _Where) -> Tensor:
    if _traced(x, values):
        return _linear_op(x, values, bias, *where)
    if _transformed():
        return _Linear.apply(x, values, bias, *where)
    wanted = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        return _EagerLinear.apply(x, values, bias, *where)
    return _run_linear(x, values, bias, where)


def _rows(row_ptr: Tensor, col: Tensor) -> Tensor:
    """int64 [nnz]: the row of every entry."""
    return torch.repeat_interleave(row_ptr.diff(), output_size=col.shape[0])


# --------------------------------------------------------------------------------------------------------------- module


class SparseLinear(nn.Module):
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

    values: nn.Parameter
    bias: nn.Parameter | None
    row_ptr: Tensor
    col: Tensor

    def __init__(
        self, pattern: Pattern, bias: bool = True, *, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(pattern, Pattern):
            raise TypeError(
                f"SparseLinear: pattern must be a Pattern, not {type(pattern).__name__}; Pattern.from_mask makes one "
                "of a mask, SparseLinear.from_linear a layer of a pruned nn.Linear"
            )
        if backend not in BACKENDS:
            raise ValueError(f"SparseLinear: backend must be one of {', '.join(map(repr, BACKENDS))}, not {backend!r}")
        self.out_features, self.in_features = pattern.shape
        self.backend = backend
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
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
            self.values.uniform_(-1.0, 1.0).mul_(bound[_rows(self.row_ptr, self.col)])
            if self.bias is not None:
                self.bias.uniform_(-1.0, 1.0).mul_(bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear, backend: str = "auto") -> "SparseLinear":
        """The layer without its zeros, as its forward uses it now: masks of torch.nn.utils.prune and parametrizations
        are applied and gone. It keeps dtype, device, requires_grad and the training flag; its parameters are copies.

        Raises TypeError for anything but an nn.Linear, ValueError for a weight with NaN.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"SparseLinear.from_linear: an nn.Linear is needed, not {type(linear).__name__}")
        weight = effective(linear, "weight")
        bad = int(weight.isnan().sum())
        if bad:
            raise ValueError(
                f"SparseLinear.from_linear: {bad} of the {weight.numel()} entries of the weight are NaN, which is "
                "neither a zero nor a weight; look at the weight and at its mask"
            )
        bias = None if linear.bias is None else effective(linear, "bias")
        pattern = Pattern.from_mask(weight != 0)
        layer = cls(pattern, bias is not None, device=weight.device, dtype=weight.dtype, backend=backend)
        with torch.no_grad():
            layer.values.copy_(weight[_rows(layer.row_ptr, layer.col), layer.col])
            if bias is not None:
                layer.bias.copy_(bias)
        layer.values.requires_grad_(_trained(linear, "weight"))
        if bias is not None:
            layer.bias.requires_grad_(_trained(linear, "bias"))
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense nn.Linear with the same function: zeros where there is no weight, which training would fill."""
        linear = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, self.bias is not None, device=self.values.device,
            dtype=self.values.dtype,
        )  # fmt: skip
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        linear.weight.requires_grad_(self.values.requires_grad)
        if self.bias is not None:
            linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def _where(self) -> _Where:
        return _Where(self.row_ptr, self.col, self.in_features, self.backend)

    @property
    def pattern(self) -> Pattern:
        """Where the weights are, on the CPU."""
        return _packed_of(self._where).pattern

    @property
    def nnz(self) -> int:
        return self.col.shape[0]

    @property
    def density(self) -> float:
        return self.nnz / max(1, self.out_features * self.in_features)

    @property
    def weight(self) -> Tensor:
        """Dense [out, in], zeros where there is no weight; made anew at every call, differentiable in `values`."""
        self._check_parameters(self.values, self.bias, self._where)
        flat = _rows(self.row_ptr, self.col) * self.in_features + self.col
        zero = self.values.new_zeros(self.out_features * self.in_features)
        return zero.index_put((flat,), self.values).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        values, bias, backend = self.values, self.bias, self.backend
        if x.dtype != values.dtype and x.is_floating_point() and x.device == values.device and backend != "torch":
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(values.dtype)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear: x must be [..., {self.in_features}], not {list(x.shape)}")
        if backend == "torch":
            return F.linear(x, self.weight, bias)
        where = self._where
        self._check_parameters(values, bias, where)
        if x.dtype != values.dtype or x.device != values.device:
            raise ValueError(
                f"SparseLinear: x is {x.dtype} on {x.device}, the layer {values.dtype} on {values.device}; move one of "
                "them with .to()"
            )
        if values.dtype not in _CPU_CLASSES:
            raise ValueError(
                f"SparseLinear: the kernels compute in float32 and float64, not {values.dtype}; call .float() or "
                f".double(), {_REMEDY}"
            )
        return _linear(x, values, bias, where)

    def _check_parameters(self, values: Tensor, bias: Tensor | None, where: _Where) -> None:
        """The kernels read raw memory."""
        if values.shape != where.col.shape:
            raise ValueError(
                f"SparseLinear: values must be [{self.nnz}], one per entry of the pattern, not {list(values.shape)}"
            )
        if bias is not None and (
            bias.shape != (self.out_features,) or bias.dtype != values.dtype or bias.device != values.device
        ):
            raise ValueError(
                f"SparseLinear: bias must be [{self.out_features}], {values.dtype} on {values.device} like the values, "
                f"not {list(bias.shape)}, {bias.dtype} on {bias.device}"
            )
        if where.col.device != values.device or where.row_ptr.device != values.device:
            raise ValueError(
                f"SparseLinear: the values are on {values.device}, the pattern on {where.col.device}; call .to()"
            )

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        text += f"nnz={self.nnz}, density={self.density:.3g}"
        return text if self.backend == "auto" else f"{text}, backend={self.backend!r}"

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:  # fmt: skip
        row_ptr, col, values = (state_dict.get(prefix + name) for name in ("row_ptr", "col", "values"))
        if row_ptr is not None and col is not None and values is not None:
            try:
                self._take_pattern(row_ptr, col, values)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix or 'SparseLinear: '}{error}")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take_pattern(self, row_ptr: Tensor, col: Tensor, values: Tensor) -> None:
        """Make room for a state with this pattern."""
        if row_ptr.shape != (self.out_features + 1,):
            raise ValueError(
                f"the state's pattern has {row_ptr.numel() - 1} rows, this layer {self.out_features}; a state can be "
                "loaded by a layer of the same in_features and out_features only"
            )
        if not row_ptr.is_meta:
            Pattern((self.out_features, self.in_features), row_ptr.cpu(), col.cpu())
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


def _trained(module: nn.Module, name: str) -> bool:
    """Does the parameter `name`, masked, parametrized or plain, want a gradient?"""
    if parametrize.is_parametrized(module, name):
        return any(parameter.requires_grad for parameter in module.parametrizations[name].parameters())
    parameter = module._parameters.get(f"{name}_orig", module._parameters.get(name))
    return parameter is not None and parameter.requires_grad


# --------------------------------------------------------------------------------------------------------- whole models


def sparsify_(model: nn.Module, below: float = 0.5, backend: str = "auto") -> dict[str, SparseLinear]:
    """Replace, in place, every nn.Linear of a model of whose weights at most the share `below` is not zero.

    Masks and parametrizations are read as by `SparseLinear.from_linear`. Subclasses of nn.Linear stay as they are, and
    layers whose weight belongs to another layer as well. Hooks of replaced layers are lost. Make the optimizer
    afterwards.

    Returns the layers put in, by their names in `model.named_modules()`; `layer.nnz` and `layer.density` say what is
    left of each.

    Raises ValueError for `below` outside (0, 1], and where the model itself is an nn.Linear.
    """
    if isinstance(below, bool) or not isinstance(below, (int, float)) or not 0.0 < below <= 1.0:
        raise ValueError(f"sparsify_: below must be a number in (0, 1], a share of the weights, not {below!r}")
    if _is_linear(model):
        raise ValueError("sparsify_: the model itself is an nn.Linear; use SparseLinear.from_linear(model)")
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    made: dict[nn.Module, SparseLinear] = {}  # a layer may stand in several places
    replaced: dict[str, SparseLinear] = {}
    for path, linear in list(model.named_modules(remove_duplicate=False)):
        if not _is_linear(linear) or any(owners[id(parameter)] > 1 for parameter in linear.parameters()):
            continue
        if linear not in made:
            weight = effective(linear, "weight")
            if int(torch.count_nonzero(weight)) > below * weight.numel():
                continue
            made[linear] = SparseLinear.from_linear(linear, backend)
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = replaced[path] = made[linear]
    return replaced


def _is_linear(module: nn.Module) -> bool:
    return parametrize.type_before_parametrizations(module) is nn.Linear
