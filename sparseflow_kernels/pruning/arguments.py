"""What the pruning functions are given: checks that they share."""

from __future__ import annotations

from torch import nn

from ..compiled_field import CompiledField


def check_not_compiled(module: nn.Module) -> None:
    """Raises ValueError for a compiled field and for a module that contains one."""
    for path, part in module.named_modules():
        if isinstance(part, CompiledField):
            where = f"{path!r} of this {type(module).__name__}" if path else "this module"
            raise ValueError(
                f"cannot prune {where}: it is a CompiledField, which holds only the weights that were there when it was "
                "compiled; prune the module, then compile it"
            )


def check_keep(keep: float, of: str) -> None:
    if not isinstance(keep, (int, float)) or isinstance(keep, bool) or not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must be a number in (0, 1], the share that stays; got {keep!r}")
    if of not in ("parameters", "weights"):
        raise ValueError(f"of must be 'parameters' (the paper's size) or 'weights'; got {of!r}")
