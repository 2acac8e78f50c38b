"""Nested arguments and results of operations: what torch.utils._pytree does for any containers, for the few that
operations have, several times quicker. Capture does little else."""

from __future__ import annotations

from typing import Any, Callable, Iterable


def _is_record(x: Any) -> bool:
    """A named tuple, or a result with names as torch returns them; a torch.Size is none."""
    return isinstance(x, tuple) and (hasattr(x, "_fields") or hasattr(x, "n_fields"))


def tree_leaves(tree: Any) -> list:
    found: list = []
    _collect((tree,), found)
    return found


def _collect(items: Iterable[Any], found: list) -> None:
    for item in items:
        kind = type(item)
        if kind is tuple or kind is list:
            _collect(item, found)
        elif kind is dict:
            _collect(item.values(), found)
        elif isinstance(item, tuple) and _is_record(item):
            _collect(item, found)
        else:
            found.append(item)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """The tree with function(leaf) in place of every leaf; records become tuples."""
    kind = type(tree)
    if kind is tuple or _is_record(tree):
        return tuple([tree_map(function, item) for item in tree])
    if kind is list:
        return [tree_map(function, item) for item in tree]
    if kind is dict:
        return {key: tree_map(function, item) for key, item in tree.items()}
    return function(tree)
