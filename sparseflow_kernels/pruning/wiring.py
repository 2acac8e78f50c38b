"""How the graphs of a module's vector fields are wired to its parameters, row by row and entry by entry.

The parameters of the module are numbered one after the other: an *element* is one entry of one of them. A *row* is a row of
a node. For each of its entries a product reads an element and a row, and adds to a row. With these numbers, what nothing
reads, what depends on what, and what a neuron without inputs emits are found by short walks over the nodes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field as dataclass_field
from typing import Iterator

import torch
from torch import Tensor, nn

from ..capture import capture_graph
from ..field import Convolution, GraphField, UnsupportedFieldError
from ..field.graph import Node, order
from ..field.primitives import PRIMITIVES
from ..masks import check_maskable, effective, refresh_, set_mask_
from ..origin import COMPUTED, Key, Origin
from .chain import vector_fields

NOBODYS, OF_MANY = -1, -2  # in place of an element: the entry belongs to no parameter, or is computed from several


@dataclass(eq=False)
class Item:
    """One parameter. owners: every (module, name) that holds it.  start: the number of its first element."""

    parameter: nn.Parameter
    start: int
    owners: list[tuple[nn.Module, str]] = dataclass_field(default_factory=list)

    @property
    def elements(self) -> slice:
        return slice(self.start, self.start + self.parameter.numel())


class Numbering:
    """The elements of a module's parameters, in the order of registration. count: how many there are."""

    def __init__(self, module: nn.Module) -> None:
        self.items: list[Item] = []
        self._by_id: dict[int, Item] = {}
        self.count = 0
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                item = self._by_id.get(id(parameter))
                if item is None:
                    item = self._by_id[id(parameter)] = Item(parameter, self.count)
                    self.items.append(item)
                    self.count += parameter.numel()
                plain = name.removesuffix("_orig") if f"{name.removesuffix('_orig')}_mask" in part._buffers else name
                item.owners.append((part, plain))

    def item_of(self, part: nn.Module, name: str) -> Item | None:
        """The parameter that a module holds under this name; None where the name is something computed."""
        parameter = part._parameters.get(f"{name}_orig", part._parameters.get(name))
        return None if parameter is None else self._by_id.get(id(parameter))

    def start_of(self, parameter: nn.Parameter) -> int:
        return self._by_id[id(parameter)].start

    def values(self) -> Tensor:
        """float64 [count]: the values of the elements, masks applied."""
        parts = [effective(*item.owners[0]).reshape(-1).double().cpu() for item in self.items]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def unmasked(self) -> Tensor:
        """bool [count]: elements that no mask holds at zero."""
        found = torch.ones(self.count, dtype=torch.bool)
        for item in self.items:
            for owner, name in item.owners:
                mask = owner._buffers.get(f"{name}_mask") if f"{name}_orig" in owner._parameters else None
                if mask is not None:
                    found[item.elements] &= (mask != 0).reshape(-1).cpu()
        return found

    def check_maskable(self, elements: Tensor) -> None:
        """Raises ValueError (`masks.check_maskable`) where one of these elements, bool [count], cannot be masked."""
        for item in self.items:
            if bool(elements[item.elements].any()):
                for owner, name in item.owners:
                    check_maskable(owner, name)

    def mask_(self, removed: Tensor) -> None:
        """Masks these elements, bool [count], in every module that holds them."""
        for item in self.items:
            gone = removed[item.elements]
            if bool(gone.any()):
                for owner, name in item.owners:
                    set_mask_(owner, name, ~gone.view(item.parameter.shape))


class FieldGraphs:
    """The graphs of the vector fields of a module, each read when it is first asked for. like: an example of the state."""

    def __init__(self, module: nn.Module, like: Tensor | tuple[Tensor, ...] | None = None) -> None:
        self.module, self.like = module, like
        self.numbering = Numbering(module)
        self.fields = list({id(f): f for f in vector_fields(module)}.values())
        self._dims = {id(f): part.dim for part in module.modules() for f in getattr(part, "vector_fields", ())}
        self._shapes = {  # of the states of those that are not [batch, dim]
            id(f): getattr(f, "pruning_shape", shape) for part in module.modules()
            if hasattr(part, "vector_fields") for f, shape in zip(part.vector_fields, getattr(part, "shapes", ()))
        }  # fmt: skip
        self._read: dict[int, tuple[GraphField, dict[Key, Origin]] | UnsupportedFieldError] = {}
        self.never_called: list[tuple[nn.Module, nn.Module]] = []  # (field, module that holds parameters)

    def read(self, field: nn.Module) -> tuple[GraphField, dict[Key, Origin]]:
        """The graph of a field, and the origins of its tensors. Raises UnsupportedFieldError where it cannot be read."""
        if id(field) not in self._read:
            try:
                self._read[id(field)] = self._capture(field)
            except UnsupportedFieldError as error:
                self._read[id(field)] = error
            except (TypeError, ValueError) as error:
                self._read[id(field)] = UnsupportedFieldError(f"{type(field).__name__}: {error}")
        found = self._read[id(field)]
        if isinstance(found, UnsupportedFieldError):
            raise found
        return found

    def _capture(self, field: nn.Module) -> tuple[GraphField, dict[Key, Origin]]:
        holders = [part for part in field.modules() if any(p is not None for p in part._parameters.values())]
        called: set[int] = set()
        handles = [part.register_forward_pre_hook(lambda one, _: called.add(id(one))) for part in holders]
        module = field
        if len(inspect.signature(field.forward).parameters) < 2:
            module = _WithoutTime(field)
        like = self.like
        if like is None and id(field) in self._shapes:
            first = next(p for p in field.parameters() if p.is_floating_point())
            like = torch.zeros(1, *self._shapes[id(field)], dtype=first.dtype, device=first.device)
        try:
            dim = self._dims.get(id(field)) if like is None else None
            found = capture_graph(module, dim, like)
        finally:
            for handle in handles:
                handle.remove()
        self.never_called += [(field, part) for part in holders if id(part) not in called]
        return found

    def refusals(self) -> list[UnsupportedFieldError]:
        """The errors of the fields that were asked for and could not be read."""
        return [found for found in self._read.values() if isinstance(found, UnsupportedFieldError)]

    def refresh_masks_(self) -> None:
        """Lets calls of a field refresh the masked parameters of modules that are never called themselves: others read these
        parameters, and no hook of the module's own would apply the mask again."""
        for field, part in self.never_called:
            refresh_(field, part)

    def wiring(self, fields: list[nn.Module] | None = None) -> "Wiring":
        """The wiring of those among these fields (None: all) that can be read. Parameters of the others are pinned."""
        wiring = Wiring(self.numbering)
        for field in self.fields if fields is None else fields:
            try:
                graph, origins = self.read(field)
            except UnsupportedFieldError:
                continue
            wiring.include(field, graph, origins)
        others = [f for f in self.fields if isinstance(self._read.get(id(f)), UnsupportedFieldError)]
        for field in others:  # how they use their parameters is not known
            wiring.pin(field.parameters())
        return wiring


class _WithoutTime(nn.Module):
    """f(t, y) of a field that takes y alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(y)


@dataclass(eq=False)
class Product:
    """The entries of a linear node: each adds scale * element * (row `of` of the operand) to row `into` of the node.

    into, of, element: int64 [entries], rows counted from the node's first.  scale: float64 [entries].  fixed: float64
    [entries], the values of entries that belong to no parameter.
    """

    into: Tensor
    of: Tensor
    element: Tensor
    scale: Tensor
    fixed: Tensor


class Wiring:
    """The nodes of one or more graphs, operands before what reads them.

    start: node -> the number of its first row.  rows: how many rows there are.  products, vectors: the entries of linear and
    of vector nodes; of a vector `into` and `of` are its rows.  seen: bool [elements], those that the graphs read.
    pinned: bool [elements], those that are used in ways that are not followed.
    """

    def __init__(self, numbering: Numbering) -> None:
        self.numbering = numbering
        self.nodes: list[Node] = []
        self.start: dict[Node, int] = {}
        self.rows = 0
        self.outputs: list[Node] = []
        self.products: dict[Node, Product] = {}
        self.vectors: dict[Node, Product] = {}
        self.pinned = torch.zeros(numbering.count, dtype=torch.bool)
        self.seen = torch.zeros(numbering.count, dtype=torch.bool)
        self.fields: list[nn.Module] = []

    def include(self, module: nn.Module, field: GraphField, origins: dict[Key, Origin]) -> None:
        parameters = dict(module.named_parameters())
        parameters |= {f"inner.{name}": p for name, p in parameters.items()}  # as _WithoutTime names them
        parts = [self._elements(origins[number, "values"], parameters) for number in range(len(field.parts))]
        self.outputs.append(field.output)
        self.fields.append(module)
        for node in order([field.output]):
            self.nodes.append(node)
            self.start[node] = self.rows
            self.rows += node.rows
            if node.kind == "linear":
                self.products[node] = _entries(node, parts)
                self._see(self.products[node])
            elif node.kind == "vector":
                element, scale, fixed = parts[node.part]
                index = torch.arange(node.rows)
                self.vectors[node] = Product(index, index, element, scale, fixed)
                self._see(self.vectors[node])
            elif node.kind == "time" and isinstance(node.function, nn.Module):
                self.pin(node.function.parameters())

    def _see(self, product: Product) -> None:
        self.seen[product.element[product.element >= 0]] = True

    def pin(self, parameters: Iterator[nn.Parameter]) -> None:
        for parameter in parameters:
            item = self.numbering._by_id.get(id(parameter))
            if item is not None:
                self.pinned[item.elements] = True

    def _elements(self, origin: Origin, parameters: dict[str, nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
        start = lambda name: self.numbering.start_of(parameters[name])
        starts = torch.tensor([*(start(name) for name in origin.parameters), 0, 0])
        plain = origin.parameter >= 0
        element = torch.where(plain, starts[origin.parameter] + origin.index, origin.parameter)
        if origin.computed:
            for read in origin.expression.origins():
                for one in read.read():
                    for name, own in one.elements():
                        self.pinned[start(name) + own] = True
            for name in origin.needs_whole():
                self.pin([parameters[name]])
        assert COMPUTED == OF_MANY
        return element, origin.scale, origin.value.double().cpu()

    # -------------------------------------------------------------------------------------------------- walks

    def elements_that_mix(self) -> Tensor:
        """bool [count]: elements of matrices whose products read more than one row."""
        found = torch.zeros(self.numbering.count, dtype=torch.bool)
        for node, product in self.products.items():
            if node.operands[0].rows > 1 or node.transposed:
                found[product.element[product.element >= 0]] = True
        return found

    def read(self, alive: Tensor) -> tuple[Tensor, Tensor]:
        """(bool [rows], the rows that the derivatives depend on; bool [elements], the elements that they depend on). alive: bool
        [elements], those that are not held at zero."""
        alive, used = _padded(alive), torch.zeros(self.numbering.count + 2, dtype=torch.bool)
        read = torch.zeros(self.rows, dtype=torch.bool)
        for output in self.outputs:
            self.of(read, output)[:] = True
        for node in reversed(self.nodes):
            own = self.of(read, node)
            if not bool(own.any()):
                continue
            if node.kind == "linear":
                product = self.products[node]
                on = own[product.into] & alive[product.element]
                used[product.element[on]] = True
                self.of(read, node.operands[0])[product.of[on]] = True
            elif node.kind == "vector":
                used[self.vectors[node].element[own]] = True
            elif node.kind == "rows":
                at = 0
                for operand, (first, count) in zip(node.operands, node.pieces):
                    self.of(read, operand)[first : first + count] |= own[at : at + count]
                    at += count
            else:
                for operand in node.operands:
                    self.of(read, operand).logical_or_(own if operand.rows == node.rows else own.any())
        return read, used[:-2]

    def dead(self, alive: Tensor) -> Tensor:
        """bool [elements]: those that change nothing, because the derivatives depend on nothing that they are part of."""
        return self.seen & ~self.pinned & ~self.read(alive)[1]

    def returns_alone(self, alive: Tensor) -> Tensor:
        """bool [elements]: those that products read and whose return, were they pruned, would change nothing, or would bring
        other elements back too."""
        read, _ = self.read(alive)
        free = torch.zeros(self.rows, dtype=torch.bool)  # rows that depend on no element
        for node in self.nodes:
            own = self.of(free, node)
            if node.kind == "rows":
                own.copy_(self.pieces(free, node))
            elif node.operands and node.kind != "linear":
                own.copy_(self.joined(free, node, torch.logical_and, True))
            elif node.kind in ("input", "number", "constant", "time"):
                own[:] = True
        useful, costly = (torch.zeros(self.numbering.count + 2, dtype=torch.bool) for _ in range(2))
        for node, product in self.products.items():
            on = self.of(read, node)[product.into]
            there = (self.of(read, node.operands[0]) | self.of(free, node.operands[0]))[product.of]
            useful[product.element[on]] = True
            costly[product.element[on & ~there]] = True
        return (self.seen & ~useful[:-2]) | costly[:-2]

    def reached(self, alive: Tensor) -> list[bool]:
        """For every field, whether its derivative depends on its state."""
        fed = self.fed(alive)
        return [bool(self.of(fed, output).any()) for output in self.outputs]

    def fed(self, alive: Tensor) -> Tensor:
        """bool [rows]: those that depend on the state. alive: bool [elements], those that are not held at zero."""
        alive, fed = _padded(alive), torch.zeros(self.rows, dtype=torch.bool)
        for node in self.nodes:
            own = self.of(fed, node)
            if node.kind == "input":
                own[:] = node.name == "state"
            elif node.kind == "linear":
                product = self.products[node]
                own[product.into[self.of(fed, node.operands[0])[product.of] & alive[product.element]]] = True
            else:
                own.copy_(self.pieces(fed, node) if node.kind == "rows" else self.joined(fed, node, torch.logical_or, False))
        return fed

    def emitted(self, values: Tensor, t: float) -> Tensor:
        """float64 [rows]: the values of the rows at time t and for some state. values: float64 [elements]."""
        values, found = torch.cat([values, values.new_zeros(2)]), torch.zeros(self.rows, dtype=torch.float64)
        for node in self.nodes:
            own = self.of(found, node)
            if node.kind == "input":
                own.copy_(torch.full((node.rows,), t) if node.name == "time" else torch.linspace(-0.7, 0.9, node.rows))
            elif node.kind in ("linear", "vector"):
                product = (self.products if node.kind == "linear" else self.vectors)[node]
                weight = torch.where(product.element >= 0, product.scale * values[product.element], product.fixed)
                if node.kind == "linear":
                    weight = weight * self.of(found, node.operands[0])[product.of]
                own.index_add_(0, product.into, weight)
            elif node.kind == "number":
                own.fill_(node.value)
            elif node.kind == "constant":
                own.copy_(node.tensor)
            elif node.kind == "time":
                like = next(iter(self.numbering.items)).parameter if self.numbering.items else found
                with torch.no_grad():
                    own.copy_(node.function(torch.tensor(t, dtype=like.dtype, device=like.device)).double().cpu())
            elif node.kind == "rows":
                own.copy_(self.pieces(found, node))
            else:
                operands = [self.of(found, operand) for operand in node.operands]
                own.copy_(PRIMITIVES[node.kind].value(*operands).expand(node.rows))
        return found

    def of(self, rows: Tensor, node: Node) -> Tensor:
        """The part of a tensor [rows, ...] that belongs to a node."""
        return rows[self.start[node] : self.start[node] + node.rows]

    def pieces(self, rows: Tensor, node: Node) -> Tensor:
        """What a tensor [rows, ...] should hold for a concatenation, from what it holds for the operands."""
        return torch.cat([
            self.of(rows, operand)[first : first + count] for operand, (first, count) in zip(node.operands, node.pieces)
        ])  # fmt: skip

    def joined(self, rows: Tensor, node: Node, join, start: int | bool) -> Tensor:
        """What a tensor [rows] should hold for an elementwise node: `start`, joined with what it holds for each operand."""
        total = torch.full((node.rows,), start, dtype=rows.dtype)
        for operand in node.operands:
            total = join(total, self.of(rows, operand).expand(node.rows))
        return total


def _padded(alive: Tensor) -> Tensor:
    """alive [elements] with two more entries that are true, which the numbers NOBODYS and OF_MANY find at the end."""
    return torch.cat([alive, torch.ones(2, dtype=torch.bool)])


def _entries(node: Node, parts: list[tuple[Tensor, Tensor, Tensor]]) -> Product:
    matrix = node.matrix
    row, column, entry = matrix.places
    n = entry.numel()
    into, of = (column, row) if node.transposed else (row, column)
    if matrix.part is None:
        ones = torch.ones(n, dtype=torch.float64)
        return Product(into, of, torch.full((n,), NOBODYS if matrix.constant else OF_MANY), ones, ones)
    chosen = parts[matrix.part]
    if matrix.entries is not None:
        chosen = tuple(values[matrix.entries] for values in chosen)
    if isinstance(matrix, Convolution):
        chosen = tuple(values[entry] for values in chosen)
    return Product(into, of, *chosen)
