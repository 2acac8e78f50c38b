"""A sparse nn.Linear for any model: products with the weights that are left, and gradients of these alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .field import Pattern
from .masks import effective
from .products.linear import product, rows_of
from .products.packed import BACKENDS, CPU_CLASSES, REMEDY, Where, packed_of


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
            self.values.uniform_(-1.0, 1.0).mul_(bound[rows_of(self.row_ptr, self.col)])
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
            layer.values.copy_(weight[rows_of(layer.row_ptr, layer.col), layer.col])
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
    def _where(self) -> Where:
        return Where(self.row_ptr, self.col, self.in_features, self.backend)

    @property
    def pattern(self) -> Pattern:
        """Where the weights are, on the CPU."""
        return packed_of(self._where).pattern

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
        flat = rows_of(self.row_ptr, self.col) * self.in_features + self.col
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
        if values.dtype not in CPU_CLASSES:
            raise ValueError(
                f"SparseLinear: the kernels compute in float32 and float64, not {values.dtype}; call .float() or "
                f".double(), {REMEDY}"
            )
        return product(x, values, bias, where)

    def _check_parameters(self, values: Tensor, bias: Tensor | None, where: Where) -> None:
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
        return any(part.requires_grad for part in module.get_submodule(f"parametrizations.{name}").parameters())
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
