"""How kernels are defined and launched."""

from __future__ import annotations

import inspect
from typing import Any, Callable

import triton

Launch = Callable[[], None]  # a launch with all its arguments

LANES = 16  # a batch is padded to a multiple, so that rows are aligned and loads are wide
FLAT = 256  # elements of a program over flat arrays


def interpreted() -> bool:
    """Do kernels run in Triton's interpreter (TRITON_INTERPRET=1, read when they are defined)?"""
    return bool(triton.knobs.runtime.interpret)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def jit(indifferent: tuple[str, ...]) -> Callable:
    """triton.jit. indifferent: names of arguments whose size or alignment changes nothing in a kernel, so that it is not
    compiled anew for them."""

    def decorate(function: Callable) -> Any:
        own = inspect.signature(function).parameters
        return triton.jit(function, do_not_specialize=[name for name in indifferent if name in own])

    return decorate


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: Any) -> None:
    """Run `programs` programs on torch's current stream; none is no launch. Multiply-adds are fused, whatever Triton's
    default: the reductions of `elementwise` are written for it."""
    if programs >= 2**31:
        raise ValueError(f"a kernel would need {programs} programs, more than a GPU takes: use smaller batches")
    if programs > 0:
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=True, **constants)
