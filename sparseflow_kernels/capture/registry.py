"""What an operation does, by its name: the tables that rules are registered in, and the refusal of what has none.

A rule takes (reading, func, args, kwargs, out): what it works on, the operation, the arguments as abstract values, and the
result `out` on the tensors; it returns the abstract result.
"""

from __future__ import annotations

from typing import Any, Callable, NoReturn

from ..field import UnsupportedFieldError
from .operations import base_name
from .refusal import REMEDY, NeedsContext, NotFinite, refuse
from .values import StateValue, TimeValue

Rule = Callable[[Any, Any, tuple, dict, Any], Any]


class Registry:
    """Rules by the operations' base names."""

    def __init__(self) -> None:
        self._rules: dict[str, Rule] = {}

    def rule(self, *names: str) -> Callable[[Rule], Rule]:
        """Registers a rule for operations of these names."""

        def register(function: Rule) -> Rule:
            self._rules.update(dict.fromkeys(names, function))
            return function

        return register

    def __getitem__(self, name: str) -> Rule:
        """Raises UnsupportedFieldError where there is none."""
        return self._rules[name] if name in self._rules else _no_rule(name)

    def apply(self, reading: Any, func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
        """The rule of func. Raises UnsupportedFieldError where there is none, or where it cannot cope."""
        rule = self[base_name(func)]
        try:
            return rule(reading, func, args, kwargs, out)
        except (UnsupportedFieldError, NotFinite, NeedsContext):
            raise
        except Exception as error:  # an overload or a shape that no rule here thought of
            refuse(f"the operation {func} on the state ({type(error).__name__}: {error})", REMEDY, error)


def _no_rule(name: str) -> NoReturn:
    refuse(f"the operation {name} on the state")


CHAIN, GRAPH = Registry(), Registry()  # the rules of a module that is read as a chain, and as a graph


def argument(args: tuple, kwargs: dict, position: int, name: str, default: Any = None) -> Any:
    """An argument of an operation, by its position or its name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def number(args: tuple, kwargs: dict, position: int, name: str, default: float | None) -> float | None:
    """An argument that must be a number of the code. Raises UnsupportedFieldError for one that depends on t."""
    value = argument(args, kwargs, position, name, default)
    if isinstance(value, (TimeValue, StateValue)):
        refuse(f"an activation whose {name} depends on t")
    return float(value) if isinstance(value, (int, float)) else value
