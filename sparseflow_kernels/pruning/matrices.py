"""Which parameters are weight matrices: what WT ranks entry by entry, and whose slices are FT's neurons.

Of torch's own layers the class tells. What people write themselves (`y @ self.W`) is told by the graph of the field: a
parameter is a matrix where products that mix rows read it, and not where it scales or shifts row by row. A parameter is
there once, however many modules hold it and however often it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..masks import check_maskable, effective, set_mask_
from .arguments import check_not_compiled
from .wiring import FieldGraphs, Numbering

_RECURRENT = (nn.RNNCellBase, nn.RNNBase)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(eq=False)
class WeightMatrix:
    """path: of the parameter, as in `module.named_parameters()`, without "_orig".  owners: every (module, name) that
    holds it.  axis: the one that counts neurons; None where only the graph tells."""

    path: str
    owners: tuple[tuple[nn.Module, str], ...]
    axis: int | None

    @property
    def value(self) -> Tensor:
        return effective(*self.owners[0])

    def mask_(self, mask: Tensor) -> None:
        """Of every module that holds it: they share the parameter, but each has its own mask."""
        for owner, name in self.owners:
            set_mask_(owner, name, mask)


def own_matrices(part: nn.Module) -> dict[str, int]:
    """Name -> axis of neurons, of the weight matrices of one of torch's own layers."""
    if isinstance(part, nn.Linear):
        return {"weight": 0} if part.in_features > 1 else {}
    if isinstance(part, _ConvNd):
        return {"weight": int(isinstance(part, _ConvTransposeNd))} if part.groups == 1 else {}
    if isinstance(part, nn.Bilinear):
        return {"weight": 0}
    names = {name.removesuffix("_orig") for name, p in part._parameters.items() if p is not None}
    if isinstance(part, _RECURRENT):
        return {name: 0 for name in sorted(names) if name.startswith("weight_")}
    if isinstance(part, nn.MultiheadAttention):
        return {name: 0 for name in _ATTENTION if name in names}
    return {}


def weight_matrices(
    module: nn.Module, layers: Iterable[nn.Module | str] | None = None, graphs: FieldGraphs | None = None
) -> dict[str, WeightMatrix]:
    """Path -> matrix, in the order of registration.

    These are the weights of nn.Linear (but those with one input, which are functions of time alone), of convolutions with
    groups == 1, of nn.Bilinear, of recurrent cells and attention, and bare parameters that the graph of a field shows to
    be read as matrices. layers: overrides the choice; modules or their paths (the `weight`, or all own parameters of two
    axes or more where there is none), or paths of parameters.

    Raises ValueError if nothing is prunable or an entry of `layers` is none of these.
    """
    graphs = FieldGraphs(module) if graphs is None else graphs
    numbering = graphs.numbering
    named = dict(module.named_modules())
    if layers is not None:
        chosen = _chosen(module, layers, named, numbering)
    else:
        chosen = {
            (path, name): axis for path, part in named.items() for name, axis in own_matrices(part).items()
        }
        chosen |= _bare(named, numbering, graphs, chosen)
    found: dict[str, WeightMatrix] = {}
    seen: set[int] = set()
    for path, part in named.items():
        for (of, name), axis in chosen.items():
            if of != path:
                continue
            item = numbering.item_of(part, name)
            if item is not None and id(item) in seen:
                continue
            owners = ((part, name),) if item is None else tuple(item.owners)
            if item is not None:
                seen.add(id(item))
            where = f"{path}.{name}" if path else name
            found[where] = WeightMatrix(where, owners, axis)
    if not found:
        unread = "".join(f" (its own parameters are not known: {error})" for error in graphs.refusals()[:1])
        raise ValueError(
            f"{type(module).__name__} has no prunable layer (nn.Linear with more than one input, a convolution, a "
            "recurrent cell, a parameter used as a matrix); name other modules with a weight matrix, or parameters, by "
            f"layers=...{unread}"
        )
    return found


def check_matrices(matrices: dict[str, WeightMatrix], module: nn.Module) -> None:
    """Raises ValueError for a matrix that masks cannot be laid on, and for one that is not finite."""
    paths = {id(part): path for path, part in module.named_modules()}
    for matrix in matrices.values():
        for owner, name in matrix.owners:
            check_maskable(owner, name, paths.get(id(owner), ""))
    for path, matrix in matrices.items():
        if not bool(torch.isfinite(matrix.value).all()):
            raise ValueError(f"{path} has non-finite entries; pruning by magnitude has no meaning there")


def _chosen(
    module: nn.Module, layers: Iterable[nn.Module | str], named: dict[str, nn.Module], numbering: Numbering
) -> dict[tuple[str, str], int | None]:
    paths = {id(part): path for path, part in named.items()}
    chosen: dict[tuple[str, str], int | None] = {}
    for entry in layers:
        path = entry if isinstance(entry, str) else paths.get(id(entry))
        if path in named:
            names = _names_of(named[path])
        else:
            path, _, name = (path or "").rpartition(".")
            names = [name] if path in named and _is_matrix(named[path], name) else []
        if not names:
            raise ValueError(
                f"layers: {entry!r} is not a Linear, a Conv2d or another module with a weight matrix inside "
                f"{type(module).__name__}, and no parameter of two axes or more; give such modules, or paths as in "
                "module.named_modules() or module.named_parameters()"
            )
        axes = own_matrices(named[path])
        chosen |= {(path, name): axes.get(name, 0 if name == "weight" else None) for name in names}
    return chosen


def _names_of(part: nn.Module) -> list[str]:
    if _is_matrix(part, "weight"):
        return ["weight"]
    names = dict.fromkeys(name.removesuffix("_orig") for name in part._parameters)
    return [name for name in names if _is_matrix(part, name)]


def _is_matrix(part: nn.Module, name: str) -> bool:
    value = getattr(part, name, None)
    return isinstance(value, Tensor) and value.ndim >= 2 and not name.endswith(("_orig", "_mask"))


def _bare(
    named: dict[str, nn.Module], numbering: Numbering, graphs: FieldGraphs, known: dict
) -> dict[tuple[str, str], int | None]:
    """Parameters of people's own modules that are read as matrices."""
    taken = {id(numbering.item_of(named[path], name)) for path, name in known}
    waiting = []
    for path, part in named.items():
        if type(part).__module__.startswith("torch.") and not isinstance(part, (nn.ParameterList, nn.ParameterDict)):
            continue
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                plain = name.removesuffix("_orig")
                item = numbering.item_of(part, plain)
                if item is not None and id(item) not in taken:
                    waiting.append((path, plain, item))
    if not waiting:
        return {}
    mixing = graphs.wiring().elements_that_mix()
    return {
        (path, name): None
        for path, name, item in waiting
        if bool(mixing[item.start : item.start + item.parameter.numel()].any())
    }


def check_can_be_pruned(module: nn.Module, layers: Iterable[nn.Module | str] | None = None) -> None:
    """Refuse what masks cannot be laid on, before anything is changed.

    module, layers: as `weight_matrices` takes them. Raises ValueError for a compiled field, or a module that contains
    one, and for a layer whose weight is computed from other parameters (weight_norm, spectral_norm and other
    parametrizations, of torch.nn.utils or torch.nn.utils.parametrize), naming the layer and what to do.
    """
    check_not_compiled(module)
    check_matrices(weight_matrices(module, layers), module)


def prunable_layers(module: nn.Module, layers: Iterable[nn.Module | str] | None = None) -> dict[str, nn.Module]:
    """Path -> layer, in registration order, of every layer whose `weight` is one of the `weight_matrices`.

    Matrices of other names (of recurrent cells, of attention, bare parameters) are not among them. Raises ValueError if
    there is no such layer, or as `weight_matrices` does.
    """
    named = dict(module.named_modules())
    found = {}
    for matrix in weight_matrices(module, layers).values():
        for owner, name in matrix.owners:
            if name == "weight":
                found |= {path: part for path, part in named.items() if part is owner}
    if not found:
        raise ValueError(f"{type(module).__name__} has no prunable layer; its matrices have names of their own")
    return {path: part for path, part in named.items() if path in found}
