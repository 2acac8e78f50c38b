"""How the layers of a vector field are wired, found by running the field once.

Structured pruning and the removal of dead parameters need to know which layer reads which neuron, where time enters
and what a neuron emits once its inputs are gone. Class names do not tell; one evaluation on a random probe does: hooks
record each layer's input and output in the order of execution, and the autograd graph tells which time parameters act
between two layers. No table of activations is needed: what a neuron without inputs emits is observed, too. Only chains
are accepted (each layer reads the one before it, apart from time); anything else raises NotAChain and is left to the
caller.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Callable, Iterable

import torch
from torch import Tensor, nn

from ..field import UnsupportedFieldError
from ..masks import check_maskable, effective, live_mask

_TIME = 0.3712953  # a time that no constant of a network is likely to equal
_TIMES = (-0.7319, 0.0, _TIME, 1.0, 2.9173)
_BATCH = 5


class NotAChain(UnsupportedFieldError):
    """The vector field is not a plain chain of Linear layers, or could not be evaluated."""


@dataclass(eq=False)
class ChainLayer:
    """One Linear of the chain.

    columns: int64 [outputs of the layer before], the input column that reads each of its neurons (for the first layer:
        each state coordinate). Other columns are time's.
    time_parameters: (module, parameter name) of gates and time biases indexed by this layer's output neurons.
    """

    path: str
    module: nn.Linear
    columns: Tensor
    time_parameters: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        return effective(self.module, "weight")

    @property
    def matrix(self) -> str:
        """The path of its weight."""
        return f"{self.path}.weight" if self.path else "weight"


@dataclass(eq=False)
class Chain:
    """The layers of one vector field in the order of execution, and how to run it."""

    vector_field: nn.Module
    dim: int
    layers: list[ChainLayer]

    def without_inputs(self, index: int) -> tuple[Tensor, Tensor]:
        """What the neurons of layer `index` send to the next layer when their weights are zero and their bias is left:
        (values [out], constant bool [out]: the value does not depend on time). Found by running the field with the
        layer's output replaced by its bias."""
        layer, after = self.layers[index], self.layers[index + 1]
        bias = (
            effective(layer.module, "bias") if layer.module.bias is not None else torch.zeros_like(layer.weight[:, 0])
        )
        seen: list[Tensor] = []
        handles = [
            layer.module.register_forward_hook(lambda _module, _args, out: bias.expand_as(out)),
            after.module.register_forward_pre_hook(
                lambda _module, args: seen.append(args[0].detach()[:, after.columns])
            ),
        ]
        try:
            with torch.no_grad():
                for t in _TIMES:
                    _evaluate(self.vector_field, t, _probe(self.dim, layer.weight))
        finally:
            for handle in handles:
                handle.remove()
        values = torch.cat(seen)
        return values[0], (values == values[0]).all(0) & (not layer.time_parameters)


def vector_fields(module: nn.Module) -> list[nn.Module]:
    """The vector fields inside `module`: those of its ContinuousFlows, or the module itself."""
    found = [f for part in module.modules() for f in getattr(part, "vector_fields", ())]
    return found or [module]


def trace_chain(vector_field: nn.Module, layers: dict[str, nn.Module]) -> Chain:
    """The chain formed by `layers` (path -> nn.Linear, all inside `vector_field`). Raises NotAChain."""
    wrong = [path for path, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if wrong or not layers:
        raise NotAChain(f"{', '.join(wrong) or 'no layers'}: only chains of nn.Linear can be traced")
    records, outputs, y = _record(vector_field, layers)
    order = [path for path, _, _ in records]
    if sorted(order) != sorted(layers):
        raise NotAChain(f"every layer must run once per evaluation; these ran: {', '.join(order) or 'none'}")

    dim = outputs.shape[-1]
    chain: list[ChainLayer] = []
    for index, (path, x, _) in enumerate(records):
        width = dim if index == 0 else layers[order[index - 1]].out_features
        chain.append(ChainLayer(path, layers[path], _state_columns(path, x, width)))

    claimed = {id(p) for layer in layers.values() for p in layer._parameters.values() if p is not None}
    for index, (path, _, z) in enumerate(records):
        layer = chain[index]
        after = records[index + 1][1] if index + 1 < len(chain) else outputs
        leaves, nodes = _upstream(after)
        if z.grad_fn not in nodes:
            raise NotAChain(f"{path}: the layer after it does not read it; only plain chains can be traced")
        if any(
            other is not z and other.grad_fn in _upstream(after, stop=z.grad_fn)[1] for _, _, other in records[:index]
        ):
            raise NotAChain(f"{path}: an earlier layer's output goes round it (a skip connection)")
        if index + 1 < len(chain):
            if id(y) in _upstream(after, stop=z.grad_fn)[0]:
                raise NotAChain(f"{path}: the state goes round it (a skip connection)")
            if _mixes(z, after, chain[index + 1].columns):
                raise NotAChain(f"{path}: what follows mixes its neurons (a norm, a softmax)")
        for owner, name, parameter in _parameters_of(vector_field, leaves):
            if id(parameter) not in claimed:
                claimed.add(id(parameter))
                if parameter.ndim >= 1 and parameter.shape[0] == layer.module.out_features:
                    layer.time_parameters.append((owner, name))
    return Chain(vector_field, dim, chain)


def _probe(dim: int, like: Tensor) -> Tensor:
    return torch.randn(_BATCH, max(dim, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)


def _evaluate(vector_field: nn.Module, t: float, y: Tensor) -> Tensor:
    if len(inspect.signature(vector_field.forward).parameters) >= 2:
        return vector_field(torch.tensor(t, dtype=y.dtype, device=y.device), y)
    return vector_field(y)


def _mixes(z: Tensor, after: Tensor, columns: Tensor) -> bool:
    """Whether a neuron of after[:, columns] depends on another one of `z`: its derivative is then no diagonal matrix."""
    generator = torch.Generator().manual_seed(1)
    with torch.enable_grad():  # pruning runs without
        part = after[:, columns]
    one, other = (1.0 + torch.rand(2, *part.shape, generator=generator, dtype=torch.float64)).to(part)
    (a,), (b,) = (torch.autograd.grad(part, z, bar, retain_graph=True) for bar in (one, other))
    return not torch.allclose(a * other, b * one, rtol=1e-3, atol=1e-6 * float(a.abs().max()))


def _record(
    vector_field: nn.Module, layers: dict[str, nn.Module]
) -> tuple[list[tuple[str, Tensor, Tensor]], Tensor, Tensor]:
    """(path, input, output) of each layer in the order of execution, f(t, y) and y; everything in one autograd graph."""
    first = next(iter(layers.values()))
    records: list[tuple[str, Tensor, Tensor]] = []

    def hook(path: str) -> Callable:
        return lambda _module, args, out: records.append((path, args[0], out))

    failure: Exception | None = None
    frozen = [p for p in vector_field.parameters() if p.is_floating_point() and not p.requires_grad]
    handles = [layer.register_forward_hook(hook(path)) for path, layer in layers.items()]
    try:
        for parameter in frozen:  # the graph must show them
            parameter.requires_grad_(True)
        for dim in dict.fromkeys(layer.out_features for layer in reversed(layers.values())):  # the last one's, mostly
            records.clear()
            y = _probe(dim, first.weight.detach()).requires_grad_()
            try:
                with torch.enable_grad():
                    out = _evaluate(vector_field, _TIME, y)
                if isinstance(out, Tensor) and out.shape == y.shape and all(x.ndim == 2 for _, x, _ in records):
                    return records, out, y
                failure = ValueError(f"a state [{_BATCH}, {dim}] did not give a derivative of its own shape")
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                failure = error
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    raise NotAChain(f"{type(vector_field).__name__} could not be run as f(t, y) on a probe: {failure}")


def _state_columns(path: str, x: Tensor, width: int) -> Tensor:
    """Which columns of a layer's input [batch, in] are the neurons before it; others, at either end, are time's."""
    extra = x.shape[1] - width
    if extra < 0:
        raise NotAChain(f"{path}: reads {x.shape[1]} inputs, the layer before it has {width}; not a plain chain")
    if extra == 0:
        return torch.arange(width)
    time = torch.tensor(_TIME, dtype=x.dtype, device=x.device)
    front, back = x[:, :extra].detach(), x[:, width:].detach()
    for test in (lambda part: bool((part == time).all()), lambda part: bool((part == part[:1]).all())):
        if test(front) != test(back):  # telling apart needs exactly one of the two to look like time
            return torch.arange(width) + (extra if test(front) else 0)
    raise NotAChain(f"{path}: cannot tell which of its {x.shape[1]} inputs are time's and which the layer before's")


def _upstream(tensor: Tensor, stop: object = None) -> tuple[set[int], set]:
    """ids of the leaf tensors, and the graph nodes, upstream of `tensor`, not looking behind node `stop`."""
    leaves: set[int] = set()
    nodes: set = set()
    stack = [tensor.grad_fn] if tensor.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in nodes:
            continue
        nodes.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        if node is not stop:
            stack += [parent for parent, _ in node.next_functions if parent is not None]
    return leaves, nodes


def _parameters_of(module: nn.Module, leaves: set[int]) -> Iterable[tuple[nn.Module, str, nn.Parameter]]:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) in leaves:
                yield part, name.removesuffix("_orig"), parameter


# ------------------------------------------------------------------------------------------------- dead parameters


def neurons_read(chain: Chain, weights: dict[str, Tensor]) -> list[Tensor]:
    """bool [out] per layer: neurons whose output reaches the derivative, given bool weight masks by path."""
    read = [torch.ones(chain.layers[-1].module.out_features, dtype=torch.bool)]
    for layer in reversed(chain.layers[1:]):
        mask = weights[layer.matrix]
        rows = mask & read[0].to(mask.device).unsqueeze(1)
        read.insert(0, rows.any(0).cpu()[layer.columns])
    return read


def neurons_fed(chain: Chain, weights: dict[str, Tensor]) -> list[Tensor]:
    """bool [out] per layer: neurons that the state reaches, given bool weight masks by path."""
    fed = [torch.ones(chain.dim, dtype=torch.bool)]
    for layer in chain.layers:
        fed.append((weights[layer.matrix].cpu()[:, layer.columns] & fed[-1]).any(1))
    return fed[1:]


def reaches_derivative(chain: Chain, weights: dict[str, Tensor]) -> bool:
    """Whether any path of weights leads from the state to its derivative, given bool weight masks by path."""
    return bool(neurons_fed(chain, weights)[-1].any())


def connected_neurons(chain: Chain, weights: dict[str, Tensor]) -> list[Tensor]:
    """bool [out] per hidden layer: neurons on a path from the state to its derivative, given bool weight masks by path."""
    fed, read = neurons_fed(chain, weights), neurons_read(chain, weights)
    return [one & other for one, other in zip(fed[:-1], read[:-1])]


def row_parameters(layer: ChainLayer) -> list[tuple[nn.Module, str]]:
    """(module, name) of what belongs to single output neurons besides the weight: bias, gates, time biases."""
    bias = [(layer.module, "bias")] if layer.module.bias is not None else []
    return bias + layer.time_parameters


def check_row_parameters(chain: Chain) -> None:
    """Refuse what `row_parameters` cannot be masked of (`masks.check_maskable`)."""
    paths = {id(part): path for path, part in chain.vector_field.named_modules()}
    for layer in chain.layers:
        for owner, name in row_parameters(layer):
            check_maskable(owner, name, paths.get(id(owner), ""))


def broadcast_rows(rows: Tensor, like: Tensor) -> Tensor:
    """bool [out] -> the shape of `like` [out, ...]."""
    return rows.to(like.device).view(-1, *[1] * (like.ndim - 1)).expand(like.shape)


def live_parameters(layer: ChainLayer, rows: Tensor) -> int:
    """Non-zero bias and time parameters of the given neurons."""
    return sum(
        int(torch.count_nonzero(live_mask(owner, name) & broadcast_rows(rows, effective(owner, name))))
        for owner, name in row_parameters(layer)
    )
