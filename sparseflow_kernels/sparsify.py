"""Models without the zeros of their layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from .devices import lasting
from .masks import effective
from .sparse_conv import SparseConv2d
from .sparse_layer import SparseLayer
from .sparse_linear import SparseLinear

_MAKERS = {nn.Linear: SparseLinear.from_linear, nn.Conv2d: SparseConv2d.from_conv}


@lasting
def sparsify_(model: nn.Module, below: float = 0.5, backend: str = "auto") -> dict[str, SparseLayer]:
    """Replace, in place, every nn.Linear and nn.Conv2d of which at most the share `below` of the weights is not zero.

    Masks and parametrizations are read as by `SparseLinear.from_linear`. Subclasses of the two stay as they are, and
    layers whose weight belongs to another layer as well. Hooks of replaced layers are lost. Make the optimizer
    afterwards. backend: of the new layers; "triton" leaves convolutions as they are, for which it has no kernels.

    Returns the layers put in, by their names in `model.named_modules()`; `layer.nnz` and `layer.density` say what is
    left of each.

    Raises ValueError for `below` outside (0, 1], and where the model itself is such a layer.
    """
    if isinstance(below, bool) or not isinstance(below, (int, float)) or not 0.0 < below <= 1.0:
        raise ValueError(f"sparsify_: below must be a number in (0, 1], a share of the weights, not {below!r}")
    if _maker(model) is not None:
        kind = parametrize.type_before_parametrizations(model).__name__
        made = _maker(model)
        raise ValueError(f"sparsify_: the model itself is an nn.{kind}; use {made.__qualname__}(model)")
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    made: dict[nn.Module, SparseLayer] = {}  # a layer may stand in several places
    replaced: dict[str, SparseLayer] = {}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        maker = _maker(layer)
        if maker is None or any(owners[id(parameter)] > 1 for parameter in layer.parameters()):
            continue
        if backend == "triton" and isinstance(layer, nn.Conv2d):
            continue
        if layer not in made:
            weight = effective(layer, "weight")
            if int(torch.count_nonzero(weight)) > below * weight.numel():
                continue
            made[layer] = maker(layer, backend)
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = replaced[path] = made[layer]
    return replaced


def _maker(module: nn.Module):
    return _MAKERS.get(parametrize.type_before_parametrizations(module))
