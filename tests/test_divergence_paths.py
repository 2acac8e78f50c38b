"""Exact traces of fields with many hidden rows: nothing is held that is as large as their square."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparseflow_kernels as sfk
from sparseflow_kernels import divergence_graph, divergence_paths
from sparseflow_kernels.divergence_graph import structure


class TwoConvolutions(nn.Module):
    def __init__(self, channels: int, width: int, physics: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.physics = physics

    def forward(self, t, x):
        out = self.down(torch.tanh(self.up(x)))
        return out - 2.0 * self.up.weight[0, 0, 0, 0] * x if self.physics else out


class Halves(nn.Module):
    """One of the halves moves by the other and itself: pieces of the state, put at their places."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 3)

    def forward(self, t, x):
        return torch.cat((x[:, 3:] * 0.5, self.down(torch.sin(self.up(x)))), 1)


FIELDS = {
    "convolutions": (lambda: TwoConvolutions(2, 5), (2, 4, 5)),
    "with a linear term": (lambda: TwoConvolutions(2, 5, physics=True), (2, 4, 5)),
    "halves": (Halves, (6,)),
}


def trace_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    one = lambda y: module(0.3, y[None])[0].flatten()
    return torch.stack([torch.autograd.functional.jacobian(one, y, create_graph=True).flatten(1).trace() for y in x])


@pytest.mark.parametrize("entries", [None, 7])
@pytest.mark.parametrize("name", FIELDS)
def test_the_trace_and_its_gradient_whatever_is_held_at_once(name, entries, monkeypatch):
    if entries is not None:
        monkeypatch.setattr(divergence_paths, "MOST_ENTRIES", entries)
        monkeypatch.setattr(divergence_graph, "AT_ONCE", entries)
    torch.manual_seed(0)
    make, shape = FIELDS[name]
    module, x = make().double(), torch.randn(3, *shape, dtype=torch.float64)
    field = sfk.compile(module, like=x, live=True)
    _, minus = sfk.with_divergence(field, "exact")(0.3, (x, torch.zeros(3, dtype=torch.float64)))
    wanted = trace_of(module, x)
    torch.testing.assert_close(-minus, wanted)
    parameters = list(module.parameters())
    gradients = [torch.autograd.grad(out.sum(), parameters, allow_unused=True, materialize_grads=True) for out in (-minus, wanted)]
    torch.testing.assert_close(*gradients)


def test_a_structure_in_pieces_is_the_whole(monkeypatch):
    field = sfk.compile(TwoConvolutions(2, 5), like=torch.zeros(1, 2, 4, 5)).vector_field
    whole = structure(field.output, field.state)
    monkeypatch.setattr(divergence_graph, "AT_ONCE", 300)
    assert torch.equal(structure(field.output, field.state), whole)
    monkeypatch.setattr(divergence_graph, "MOST_DIMENSIONS", 39)
    with pytest.raises(ValueError, match="40 numbers a sample.*hutchinson"):
        structure(field.output, field.state)


def test_the_report_of_an_image_field_holds_no_square_of_its_rows():
    x = torch.randn(1, 3, 28, 28)
    field = sfk.compile(TwoConvolutions(3, 64), like=x)  # 50,176 hidden rows: the square is 10 GB
    assert "exact divergence: graph form; term by term: paths, 50176 multiply-adds" in field.report()
    field = sfk.compile(TwoConvolutions(3, 32), like=torch.randn(1, 3, 64, 64))
    assert "exact divergence: planned where it is asked for, as 12288 numbers a sample take long" in field.report()


def test_where_a_path_takes_too_much_columns_are_taken(monkeypatch):
    monkeypatch.setattr(divergence_paths, "MOST_WORK", 100)
    torch.manual_seed(1)
    module, x = TwoConvolutions(1, 3).double(), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    field = sfk.compile(module, like=x)
    assert "colours" in field.divergence_plan("exact").reason
    _, minus = sfk.with_divergence(field, "exact")(0.3, (x, torch.zeros(2, dtype=torch.float64)))
    torch.testing.assert_close(-minus, trace_of(module, x))


def test_a_report_computes_no_numbers(monkeypatch):
    """The exact divergence of 600 rows behind a LayerNorm reads 600 columns that follow from the parameters: to say who
    runs it takes none of them."""
    from sparseflow_kernels.engines.graph_native import GraphNativeEngine

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.norm, self.write = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, t, x):
            return self.write(torch.tanh(self.norm(self.read(x))))

    module, x = Normed(), torch.randn(3, 6)
    field = sfk.compile(module)
    monkeypatch.setattr(GraphNativeEngine, "renew", lambda *_: pytest.fail("numbers were computed"))
    assert "6 colours" in field.report()
    monkeypatch.undo()
    assert torch.allclose(field(0.0, x), module(0.0, x), atol=1e-5)
