"""The vector fields of a module as pruning sees them: chains of Linear layers where they are such, graphs elsewhere."""

from __future__ import annotations

from typing import Iterable

from torch import Tensor, nn

from .chain import Chain, NotAChain, trace_chain
from .matrices import weight_matrices
from .wiring import FieldGraphs


class Fields:
    """matrices: those of the module that are pruned.  all: its vector fields.  graphs: of those, read when asked for."""

    def __init__(
        self, module: nn.Module, layers: Iterable[nn.Module | str] | None, like: Tensor | tuple[Tensor, ...] | None
    ) -> None:
        self.graphs = FieldGraphs(module, like)
        self.matrices = weight_matrices(module, None if layers is None else list(layers), self.graphs)
        self.all = self.graphs.fields

    def chain(self, field: nn.Module) -> Chain:
        """Raises NotAChain."""
        inside = set(map(id, field.modules()))
        layers: dict[str, nn.Module] = {}
        for path, matrix in self.matrices.items():
            own = [(owner, name) for owner, name in matrix.owners if id(owner) in inside]
            if not own:
                continue
            if len(matrix.owners) > 1:
                raise NotAChain(f"{path}: it is shared by several layers")
            owner, name = own[0]
            if name != "weight":
                raise NotAChain(f"{path}: only chains of nn.Linear can be traced")
            layers[path.removesuffix("weight").removesuffix(".")] = owner
        return trace_chain(field, layers)

    def refresh_masks_(self) -> None:
        """See `FieldGraphs.refresh_masks_`."""
        self.graphs.refresh_masks_()
