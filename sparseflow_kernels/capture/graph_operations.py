"""What any aten operation makes of elements of a graph: by its rule, after a check of its dtypes.

Rules are registered where they stand: graph_functions (elementwise functions), graph_linear (products and convolutions),
graph_systems (linear systems), graph_reductions (sums, norms, softmax), graph_orders (largest values, sorting), graph_losses
(losses), graph_lookups (positions that depend on the state), graph_sampling (images between their
pixels) and graph_rules (what moves elements).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import (  # noqa: F401  they register their rules
    graph_functions,
    graph_linear,
    graph_losses,
    graph_orders,
    graph_reductions,
    graph_rules,
    graph_sampling,
    graph_systems,
)
from .elements import Elements
from .graph_rules import COPIES
from .operations import STRUCTURAL, base_name
from .refusal import refuse
from .registry import GRAPH
from .trees import tree_leaves
from .values import Constant, TimeValue

# Operations whose result is exact in any dtype where their arguments are whole numbers.
EXACT = {"add", "sub", "rsub", "mul", "neg", "sum", "minimum", "maximum", "where", "stack", "cat", *STRUCTURAL}


def apply_to_elements(e: Elements, func, args: tuple, kwargs: dict, out: Any) -> Any:
    """The result's elements. Raises UnsupportedFieldError for what no rule expresses."""
    base = base_name(func)
    GRAPH[base]  # an operation without a rule is refused for that, and not for its dtypes
    _check_dtypes(e, base, args, out)
    return GRAPH.apply(e, func, args, kwargs, out)


def _check_dtypes(e: Elements, base: str, args: tuple, out: Any) -> None:
    """Elements are numbers of the field's dtype; truth values are 0 and 1, and numbers of them whole numbers. Truth
    values may be numbers of another dtype until they meet the state: whole numbers are exact in all of them."""
    for tensor in tree_leaves(out):
        if isinstance(tensor, Tensor):
            dtype = tensor.dtype
            if (dtype.is_floating_point or dtype.is_complex) and dtype != e.table.dtype and base not in COPIES:
                if dtype.is_complex or base not in EXACT or not all(map(_whole, tree_leaves(args))):
                    refuse(f"a change of the state's dtype to {dtype} (by the operation {base})")
            if dtype != torch.bool and base.startswith(("bitwise_", "__and", "__or", "__xor")):
                refuse(f"the operation {base} on whole numbers made of the state")
            if dtype == torch.bool and base in ("add", "sub", "sum", "mean", "cumsum"):
                what = f"the operation {base} on truth values made of the state"
                refuse(what, "Use logical_or, or .to(y.dtype) first")
    if base == "view" and len(args) > 1 and isinstance(args[1], torch.dtype):
        refuse("the bits of the state viewed as another dtype")


def _whole(value: Any) -> bool:
    """It holds whole numbers: a state of another dtype than the field's does."""
    if isinstance(value, Constant):
        return value.source is None and bool((value.value == value.value.round()).all())
    return not isinstance(value, TimeValue) and not (isinstance(value, float) and value != round(value))
