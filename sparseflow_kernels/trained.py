"""What a compiled field trains: the entries of its module's parameters that the field reads, and nothing else.

A tensor of the field whose entries are entries of parameters, each used once and as it is, is trained itself; zeros
between them (of masks) have no gradient and stay. All others are made anew from held elements of the parameters
(`origin`): entries that are scaled, shared between places, computed from parameters, or mixed with other constants.
What has nothing to do with a parameter is fixed.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from .field import GraphField, UnsupportedFieldError, VectorField
from .origin import COMPUTED, CONSTANT, Derivation, Key, Origin, Recipe


FAR_MOVES = (1.0, 1.0, 10.0, 1000.0)  # times the mean size of a parameter's entries


@dataclass
class Held:
    """Elements of one parameter of a module. elements: int64 [n], ascending; None for all of them, `values` in the
    parameter's own shape then.  values: what they are.  trained: the parameter requires a gradient.  moving: it is no
    parameter, and its zeros are no pruned entries.  fresh: nor are those of this parameter, which is trained; None:
    `is_fresh` says."""

    elements: Tensor | None
    values: Tensor
    trained: bool
    moving: bool = False
    fresh: bool | None = None

    @property
    def grows(self) -> bool:
        """Its zeros are no pruned entries."""
        if self.moving or self.fresh is not None:
            return self.moving or bool(self.fresh)
        return self.trained and is_fresh(self.values)

    def take(self, elements: Tensor) -> Tensor:
        where = elements if self.elements is None else torch.searchsorted(self.elements, elements)
        return self.values.reshape(-1)[where.to(self.values.device)]

    @staticmethod
    def together(parts: list["Held"]) -> "Held":
        """Of different elements of one parameter."""
        if len(parts) == 1:
            return parts[0]
        elements, order = torch.cat([part.elements for part in parts]).sort()
        values = torch.cat([part.values for part in parts])
        return Held(elements, values[order.to(values.device)], parts[0].trained)

    @staticmethod
    def by_module(
        module: nn.Module, moving: Mapping[str, Tensor] | None = None, zeros: bool = False
    ) -> dict[str, "Held"]:
        """moving: tensors beside the parameters that are taken for some.  zeros: exact zeros of trained parameters are
        trained; else they are pruned entries, where a parameter is not as it was initialised."""
        found = {}
        for name, p in module.named_parameters():
            found[name] = Held(None, p.detach(), p.requires_grad, fresh=True if zeros and p.requires_grad else None)
        for name, tensor in (moving or {}).items():
            found[name] = Held(None, tensor.detach(), tensor.requires_grad, moving=True)
        return found

    @staticmethod
    def by_tensors(field: VectorField) -> tuple[dict[Key, Origin], dict[str, "Held"]]:
        """A field that is data is its own module: each of its tensors is a parameter, named as in tensors()."""
        named = dict(field.tensors())
        origins = {key: Origin.of_parameter(name, named[name]) for key, name in zip(keys_of(field), named)}
        return origins, {name: Held(None, tensor.detach(), True) for name, tensor in named.items()}


def keys_of(field: VectorField) -> list[Key]:
    """Of all tensors, in the order of VectorField.tensors()."""
    return [(number, name) for number, layer in enumerate(field.layers) for name, _ in layer.tensors()]


def is_fresh(values: Tensor) -> bool:
    """A parameter as it was initialised, whose zeros are no pruned entries: zero altogether, or with all other entries
    of one size, as those of an identity are, and those that are left by pruning never."""
    others = values[values != 0].abs()
    return others.numel() != 1 and bool((others == others[:1]).all())


def starts_at_zero(origin: Origin, held: Mapping[str, Held]) -> Tensor:
    """bool [n]: which zeros of a tensor are where training starts, and not pruned: entries of a trained parameter that
    is still as it was initialised, and results that are zero only until such a parameter, or one that is not zero, has
    moved."""
    fresh = [held[name].grows for name in origin.parameters]
    found = torch.tensor([*fresh, False, False])[origin.parameter]  # -1 and -2: no plain entries
    found &= (origin.scale != 0).cpu()  # under a mask
    if origin.computed:
        recipe = Recipe({name: h.elements for name, h in held.items()})
        now = {name: h.values for name, h in held.items()}
        for detached in (None, now):  # a straight-through estimate moves in its gradient alone
            moved = Derivation(recipe, _moved(held), detached).tensor(origin)
            found |= (origin.parameter == COMPUTED) & (moved != 0).cpu()
    return found


def may_come_back(origin: Origin, held: Mapping[str, Held]) -> Tensor:
    """bool [n]: which zeros of a tensor are those of a clamp, a threshold, a rounding: computed from parameters, and
    zero until these have moved far. Products with pruned entries are zero wherever the others move."""
    found = origin.parameter == COMPUTED
    if not bool(found.any()):
        return found
    generator, back = torch.Generator().manual_seed(0), torch.zeros_like(found)
    recipe = Recipe({name: h.elements for name, h in held.items()})
    for size in FAR_MOVES:
        far = {}
        for name, h in held.items():
            noise = torch.randn(h.values.shape, generator=generator).to(h.values)
            far[name] = torch.where(h.values == 0, h.values, size * h.values.abs().mean() * noise)
        back |= (Derivation(recipe, far).tensor(origin) != 0).cpu()
    return found & back


def zeros_to_keep(origins: Mapping[Key, Origin], held: Mapping[str, Held]) -> dict[int, Tensor]:
    """Layer -> bool [nnz]: `starts_at_zero` of its weights."""
    return {
        number: starts_at_zero(origin, held)
        for (number, name), origin in origins.items() if name == "values" and not bool(origin.value.all())
    }


def _moved(held: Mapping[str, Held]) -> dict[str, Tensor]:
    """Other values of the parameters that are trained, near by; pruned entries stay zero."""
    generator, found = torch.Generator().manual_seed(0), {}
    for name, h in held.items():
        noise = (0.01 + 0.01 * torch.rand(h.values.shape, generator=generator)).to(h.values)
        noise = noise * (1.0 - 1.5j) if noise.is_complex() else noise  # both parts move
        moved = h.values + noise if h.grows else h.values * (1.0 + noise)
        found[name] = moved if h.trained or h.moving else h.values
    return found


@contextlib.contextmanager
def without_zeros(
    parameters: Mapping[str, nn.Parameter], held: Mapping[str, Held], trained: Mapping[str, bool]
) -> Iterator[None]:
    """For as long as this lasts, the parameters without zeros that are no pruned weights: those of parameters that
    are as they were initialised, and those that are zero in the field too, which training has not moved."""
    before = []
    for name, h in held.items():
        parameter = parameters.get(name)
        fresh = parameter is not None and trained[name] and is_fresh(parameter.detach())
        if parameter is None or (h.elements is None and not fresh):
            continue
        elements = torch.arange(parameter.numel()) if h.elements is None else h.elements
        within = elements < parameter.numel()
        elements, values = elements[within].to(parameter.device), h.values.reshape(-1)[within.to(h.values.device)]
        zeros = elements[(parameter.reshape(-1)[elements] == 0) & (fresh | (values == 0).to(parameter.device))]
        if zeros.numel():
            before.append((parameter, zeros))
            write(parameter, zeros, torch.full(zeros.shape, 0.01))
    try:
        yield
    finally:
        for parameter, zeros in before:
            write(parameter, zeros, torch.zeros(zeros.shape))


def write(parameter: nn.Parameter, elements: Tensor | None, values: Tensor) -> None:
    """Elements of a parameter; None: all of them. Without a graph: under torch.no_grad."""
    values = values.detach().to(parameter)
    if elements is None:
        parameter.copy_(values)
    elif parameter.dim() == 0:
        parameter.copy_(values.reshape(()) if values.numel() else parameter)
    else:
        where = torch.unravel_index(elements.to(parameter.device), parameter.shape)
        parameter.index_put_(where, values)


class Shares:
    """Which tensors of a field are trained themselves (`own`), which are `fixed`, and which are `derived`: made by
    `recipe`, from elements that are held for them."""

    def __init__(
        self, origins: Mapping[Key, Origin], held: Mapping[str, Held], whole: Iterable[str] = (), live: bool = False
    ) -> None:  # fmt: skip
        """origins: of all tensors of the field.  held: every parameter that they name.  whole: names of parameters that
        are held whole in any case.  live: all of them are, being the module's own, and no tensor is trained itself."""
        whole = sorted({*whole, *(name for origin in origins.values() for name in origin.needs_whole())})
        uses: dict[str, list[Tensor]] = {}
        for origin in origins.values():
            for part in origin.read():
                for name, elements in part.elements():
                    uses.setdefault(name, []).append(elements)
        shared = {}  # name -> elements that are used more than once
        for name, several in uses.items():
            elements, counts = torch.cat(several).unique(return_counts=True)
            shared[name] = elements[counts > 1]

        def itself(origin: Origin) -> bool:
            return (
                not origin.computed and bool(origin.scale[origin.parameter != CONSTANT].eq(1).all())
                and not bool(origin.value[(origin.parameter == CONSTANT).to(origin.value.device)].any())
                and len({held[name].trained for name, _ in origin.elements()}) == 1
                and not any(
                    name in whole or bool(torch.isin(elements, shared[name]).any())
                    for name, elements in origin.elements()
                )
            )  # fmt: skip

        self.trained = {name: h.trained for name, h in held.items()}
        self.fixed = [key for key, origin in origins.items() if origin.constant]
        self.own = [key for key, origin in origins.items() if not live and not origin.constant and itself(origin)]
        taken = {*self.fixed, *self.own}
        self.derived = [key for key in origins if key not in taken]
        needed: dict[str, list[Tensor]] = {}
        for key in self.derived:
            for part in origins[key].read():
                for name, elements in part.elements():
                    needed.setdefault(name, []).append(elements)
        if live:
            whole = sorted({*whole, *needed})
        self.recipe = Recipe({
            **{name: torch.cat(several).unique() for name, several in needed.items() if name not in whole},
            **dict.fromkeys(whole),
        })  # fmt: skip

    def __eq__(self, other: object) -> bool:
        """Alike but for the names of parameters."""
        if not isinstance(other, Shares) or (self.own, self.fixed) != (other.own, other.fixed):
            return False
        mine, theirs = list(self.recipe.held.values()), list(other.recipe.held.values())
        return len(mine) == len(theirs) and all(
            a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(mine, theirs)
        )


@torch.no_grad()
def check_made_again(field: VectorField | GraphField, make: Callable[[], list[Tensor]]) -> None:
    """Raises UnsupportedFieldError where make(), the field's tensors made of what is held, gives others than were
    read."""
    remedy = "use the module uncompiled with sfk.odeint, which hands it to torchdiffeq"
    try:
        made = make()
    except Exception as error:
        raise UnsupportedFieldError(
            "compile: what the module computes from its parameters cannot be computed again "
            f"({type(error).__name__}: {error}); {remedy}"
        ) from error
    for (name, read), again in zip(field.tensors(), made, strict=True):
        size = 1.0 + (float(read.abs().max()) if read.numel() else 0.0)
        if bool(((again - read).abs() > 4000 * torch.finfo(read.dtype).eps * size).any()):
            raise UnsupportedFieldError(
                f"compile: {name} of the field is computed from the module's parameters, and comes to something else "
                f"when it is computed again; {remedy}"
            )


class Entries(nn.Module):
    """Parameters in a tree of modules, under the dotted names that they have in the module they come from."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(leaf, parameter)
