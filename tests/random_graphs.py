"""Random vector fields as graphs: sums over depths, products, slices, concatenations, context, time, shared matrices."""

from __future__ import annotations

import torch
from sparseflow_kernels.field import Activation, Graph, GraphField, Matrix, Part, Pattern

UNARY = ("tanh", "sigmoid", "sin", "softplus", "abs", "square", "erf", "neg", "relu", "silu", "elu", "cube", "gelu")


def random_graph(
    seed: int, dtype: torch.dtype = torch.float64, nodes: int = 14, gaps: bool = False
) -> GraphField:  # fmt: skip
    """gaps: matrices have rows and columns without entries."""
    rng = torch.Generator().manual_seed(seed)
    pick = lambda n: int(torch.randint(n, (1,), generator=rng))
    g, parts = Graph(), []
    dim, width = 1 + pick(5), 2 + pick(9)
    state, time, context = GraphField.inputs(g, dim, pick(2) * (1 + pick(3)))

    def matrix(rows: int, cols: int) -> Matrix:
        mask = torch.rand(rows, cols, generator=rng) < 0.3 + 0.6 * torch.rand(1, generator=rng)
        if gaps:
            mask &= (torch.rand(rows, 1, generator=rng) < 0.7) & (torch.rand(cols, generator=rng) < 0.7)
        pattern = Pattern.from_mask(mask)
        values = torch.randn(pattern.nnz, generator=rng, dtype=torch.float64) / max(1, cols) ** 0.5
        parts.append(Part(values.to(dtype), pattern, f"m{len(parts)}"))
        return Matrix(pattern, len(parts) - 1)

    def vector(rows: int):
        parts.append(Part((0.4 * torch.randn(rows, generator=rng, dtype=torch.float64)).to(dtype)))
        return g.vector(len(parts) - 1, rows)

    known = [state, *([context] if context is not None else [])]
    known += [g.apply("sin", g.add(g.linear(matrix(width, 1), time), vector(width))), vector(width)]
    matrices = {}
    for _ in range(nodes):
        a = known[pick(len(known))]
        match pick(8):
            case 0 | 1:
                rows = (dim, width, width)[pick(3)]
                key = (rows, a.rows)
                if key not in matrices or pick(3):
                    matrices[key] = matrix(*key)
                new = g.linear(matrices[key], a)
                new = g.add(new, vector(rows)) if pick(2) else new
            case 2 | 3:
                name = UNARY[pick(len(UNARY))]
                fused = name in ("tanh", "sigmoid", "sin", "relu", "silu", "elu", "cube", "square", "gelu")
                new = g.activation(Activation(name), a) if fused else g.apply(name, a)
            case 4:
                same = [b for b in known if b.rows in (1, a.rows)]
                new = g.mul(a, g.apply("tanh", same[pick(len(same))]))
            case 5:
                same = [b for b in known if b.rows in (1, a.rows)]
                b = same[pick(len(same))]
                new = g.add(a, b) if pick(2) else g.sub(a, b)
            case 6:
                b = known[pick(len(known))]
                new = g.concatenate([a, b]) if a.rows + b.rows < 25 else g.total(a)
            case 7:
                index = torch.randint(a.rows, (1 + pick(a.rows),), generator=rng)
                first = pick(a.rows)
                new = g.select(a, index if pick(2) else torch.arange(first, a.rows))
        known.append(new)
    last = [node for node in known[4:] if node.per_sample][-3:] or [state]
    out = None
    for node in last:
        out = g.add(out, node if node.rows == dim else g.linear(matrix(dim, node.rows), node))
    out = g.apply("tanh", out) if pick(2) else out
    out = g.spread(out, dim)
    return GraphField(g, state, time, context, out, parts, torch.device("cpu"), dtype)
