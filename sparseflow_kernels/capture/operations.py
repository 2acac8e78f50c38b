"""aten operations by name, in the classes that the algebra of capture tells apart."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten

# Only move elements about: applied as is to row numbers, to sources of entries, to slope and offset.
STRUCTURAL = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "unsqueeze", "squeeze", "permute", "transpose", "t",
    "slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack", "index", "index_select", "gather", "take",
    "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "repeat", "flip", "roll", "_to_copy", "diagonal",
    "copy", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "chunk", "narrow", "movedim",
}
# The result only takes shape, dtype and device from its tensor argument.
FACTORIES = {
    "ones_like", "zeros_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "new_empty_strided", "_new_zeros_with_same_feature_meta",
}
FULL = {"full", "full_like", "new_full", "fill"}
ADDITIVE = {"add", "sub", "rsub", "fill"}
JOINTLY_LINEAR = STRUCTURAL | ADDITIVE | {"neg", "sum", "mean"}
BILINEAR = {"mul", "div", "mm", "bmm", "mv", "addmm", "baddbmm"}
SUMMAND_FIRST = {"addmm", "baddbmm"}  # bilinear in the arguments behind the first


def written(func) -> list[int]:
    """Positions of the arguments that func changes in place."""
    return [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def is_in_place(func) -> bool:
    """It returns an argument that it has changed. Others use theirs as room for what they compute besides."""
    returns = func._schema.returns
    return not returns or any(a.alias_info is not None and a.alias_info.is_write for a in returns)


def base_name(func) -> str:
    """The name without namespace, overload and the underscore of in-place variants."""
    name = func._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.startswith("__") and written(func) else name


def call(func, args, kwargs):
    """func without effect on its arguments."""
    if isinstance(func, torch._ops.OpOverload):
        for index in written(func):
            if index < len(args) and isinstance(args[index], Tensor):
                args = (*args[:index], args[index].clone(), *args[index + 1:])
    return func(*args, **kwargs)
