"""Compiled fields made from plain data and a chosen engine class, without capture; shared by the solver tests."""

from __future__ import annotations

from typing import ClassVar

import torch
from random_fields import random_field

from sparseflow_kernels.compiled_field import CompiledField
from sparseflow_kernels.divergence_field import with_divergence
from sparseflow_kernels.engines.base import Engine, SolveRequest, SolveResult
from sparseflow_kernels.engines.reference import ReferenceEngine
from sparseflow_kernels.field import VectorField


class OpaqueEngine(ReferenceEngine):
    """The reference without autograd, as a native engine is; keeps the requests it was given."""

    name: ClassVar[str] = "opaque"
    differentiable: ClassVar[bool] = False
    requests: ClassVar[list[SolveRequest]] = []

    def solve(self, request: SolveRequest) -> SolveResult:
        assert request.replay is None, "only differentiable engines are asked to replay"
        assert request.x.is_contiguous() and not request.times.requires_grad
        OpaqueEngine.requests.append(request)
        with torch.no_grad():
            return super().solve(request)


class PlainField(CompiledField):
    """A field without simplification, on the engine class given."""

    def __init__(self, program: VectorField, engine: type[Engine]) -> None:
        super().__init__(program, "reference")
        self._engine_class = engine

    @property
    def engine(self) -> type[Engine]:
        return self._engine_class

    def packed(self, kind: str | None = None) -> Engine:
        return self._engine_class(self.vector_field, None if kind is None else self.divergence_plan(kind))


def compiled(dim=3, hidden=(8, 7), engine=OpaqueEngine, kind=None, **options):
    """A PlainField on a random program with gates and shifts, or that with its divergence."""
    field = PlainField(random_field([dim, *hidden, dim], 0.6, gate=True, shift=True, **options), engine)
    return field if kind is None else with_divergence(field, kind)
