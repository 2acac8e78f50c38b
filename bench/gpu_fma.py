"""A loop of multiply-adds over registers in Triton: nothing but the rate of the float32 units bounds it. Imported only
where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, CHAINS, UNROLL = 1024, 8, 4, 16
BLOCKS_PER_MULTIPROCESSOR = 8


@triton.jit
def multiply_adds(out, factor, term, loops, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Four chains x -> x * factor + term per element, `loops * UNROLL` links each; factor and term are known at run time
    only, and the sum is stored, so that nothing can be left out."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = place.to(tl.float32)
    x, y = tl.zeros_like(a) + factor, tl.zeros_like(a) + term
    b, c, d = a + 1.0, a + 2.0, a + 3.0
    for _ in range(loops):
        for _ in tl.static_range(UNROLL):
            a = tl.fma(a, x, y)
            b = tl.fma(b, x, y)
            c = tl.fma(c, x, y)
            d = tl.fma(d, x, y)
    tl.store(out + place, a + b + c + d)


def launch(out: Tensor, loops: int) -> int:
    """Runs it on out's device, out [n * BLOCK] float32; returns how many multiply-adds that was."""
    blocks = out.numel() // BLOCK
    multiply_adds[(blocks,)](out, 0.5, 1.0, loops, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=WARPS)
    return blocks * BLOCK * CHAINS * UNROLL * loops


def output(multiprocessors: int, device: torch.device) -> Tensor:
    return torch.empty(multiprocessors * BLOCKS_PER_MULTIPROCESSOR * BLOCK, dtype=torch.float32, device=device)
