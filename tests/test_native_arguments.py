"""Numbers that reach native code: what cannot be meant is refused with the argument's name, before anything is run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparseflow_kernels.engines.cpu import CpuEngine
from sparseflow_kernels.engines.native import native_options, native_tableau
from sparseflow_kernels.field import Activation, Layer, Pattern, VectorField
from sparseflow_kernels.numerics.step_control import StepOptions
from sparseflow_kernels.numerics.tableaus import METHODS

_cpu = pytest.importorskip("sparseflow_kernels._cpu")
NAN, INF, HUGE = math.nan, math.inf, 2**70


def refused(name: str, call, *values, **named) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        call(*values, **named)


@pytest.fixture
def program():
    return _program()


def _program(adjoint: bool = False):
    first, last = (Pattern.from_mask(torch.ones(shape, dtype=torch.bool)) for shape in ((4, 2), (2, 4)))
    field = VectorField([
        Layer(first, torch.ones(8), torch.ones(4), activation=Activation("tanh")), Layer(last, torch.ones(8), torch.zeros(2))
    ])  # fmt: skip
    engine = CpuEngine(field)
    return engine._adjoint_program()[0] if adjoint else engine.program


class TestMeasurements:
    @pytest.mark.parametrize("bench", [_cpu.bench_spmm, _cpu.bench_sddmm])
    def test_matrices(self, bench):
        good = dict(rows=8, cols=8, density=0.5, seed=1, repeats=1)
        assert bench(**good)[1] > 0
        for name in ("rows", "cols", "repeats"):
            for wrong in (-1, 0, 2**31, HUGE, NAN, 1.5, "2", None):
                refused(name, bench, **(good | {name: wrong}))
        for wrong in (-0.1, 1.1, NAN, INF, "a", None):
            refused("density", bench, **(good | {"density": wrong}))
        for wrong in (-1, 2**32, NAN):
            refused("seed", bench, **(good | {"seed": wrong}))
        refused("rows", bench, **(good | {"rows": 2**20, "cols": 2**20}))

    def test_rates(self):
        assert _cpu.activation_rate(1, 1) > 0
        for wrong in (-1, 11, 99, HUGE, NAN, 1.0):
            refused("id", _cpu.activation_rate, wrong)
        for wrong in (-1, 0, HUGE, NAN):
            refused("repeats", _cpu.activation_rate, 1, wrong)
        for wrong in (-1.0, 0.0, NAN, INF, 1e9):
            refused("seconds", _cpu.fma_peak, wrong)
        for a, b in ((0.0, 1.0), (NAN, 1.0), (INF, 1.0), (1.0, NAN)):
            refused("activation", _cpu.activation_f32, 1, a, b, np.zeros(3, np.float32))


class TestPrograms:
    def test_widths(self, program):
        adjoint, layer = _program(adjoint=True), _cpu.SparseLinearF32(1, 1, np.array([0, 1]), np.array([0]))
        for one in (program, adjoint, layer):
            one.force_width(0)
            one.force_width(-1)
            for wrong in (-2, 5, 100, 2**31 - 1, -(2**31)):
                refused("force_width", one.force_width, wrong)
            for wrong in (HUGE, NAN, 0.0, None):
                refused("index", one.force_width, wrong)
        for without in (2, 4):  # tile widths that have no kernels for gradients
            refused("force_width", adjoint.force_width, without)
        for wrong in (-1, 5):
            refused("workspace_bytes", program.workspace_bytes, wrong)
        for wrong in (-1, HUGE, 2**31 - 1, NAN):
            refused("batch", adjoint.width, wrong)
            refused("batch", adjoint.op_seconds, wrong)

    def test_evaluate(self, program):
        x, f = torch.ones(3, 2), torch.empty(3, 2)
        good = dict(t=0.0, x=x.data_ptr(), noise=0, batch=3, threads=1, f=f.data_ptr(), trace=0)
        program.evaluate(**good)
        for wrong in (-1, 2**31 - 1, 2**31, HUGE, NAN, 3.0):
            refused("batch", program.evaluate, **(good | {"batch": wrong}))
        for wrong in (-1, 0, 2**31, HUGE, NAN, 1.0):
            refused("threads", program.evaluate, **(good | {"threads": wrong}))
        for name in ("x", "f"):
            refused(name, program.evaluate, **(good | {name: 0}))
            refused(name, program.evaluate, **(good | {name: x.data_ptr() + 1}))
        program.evaluate(**(good | {"batch": 0, "x": 0, "f": 0}))

    def test_solve(self, program):
        x, xs = torch.ones(3, 2), torch.empty(2, 3, 2)
        good = dict(
            x=x.data_ptr(), l=0, noise=0, batch=3, times=[0.0, 1.0], sign=1, tableau=native_tableau(METHODS["dopri5"]),
            rtol=(1e-3, 0.0), atol=(1e-3, 0.0), options=native_options(StepOptions()), grid=[], perturb=False, per_tile=False,
            record=False, record_stages=False, threads=1, xs=xs.data_ptr(), ls=0,
        )  # fmt: skip
        assert program.solve(**good)["status"] == "ok"
        wrong = {
            "batch": (-1, HUGE, NAN), "threads": (0, -1, HUGE), "sign": (0, 2, -2, NAN), "x": (0, x.data_ptr() + 2), "xs": (0,),
            "times": ([0.0, NAN], [1.0, 0.0], [0.0, 0.0], [0.0, INF]), "grid": ([0.0, NAN], [1.0, 0.0]),
            "rtol": ((-1e-3, 0.0), (NAN, 0.0), ("a", 0.0)), "atol": ((-1e-3, 0.0), (1e-3, NAN)),
        }  # fmt: skip
        for name, values in wrong.items():
            for value in values:
                refused(name, program.solve, **(good | {name: value}))
        for name in ("min_step", "max_step", "safety", "ifactor", "dfactor"):
            refused(name, program.solve, **(good | {"options": good["options"] | {name: NAN}}))
        for value in (NAN, 1.5, HUGE):
            refused("max_num_steps", program.solve, **(good | {"options": good["options"] | {"max_num_steps": value}}))
        for name in ("step_t", "jump_t"):
            for value in ([NAN], [0.5, 0.2]):
                refused(name, program.solve, **(good | {"options": good["options"] | {name: value}}))

    def test_gradients(self):
        program = _program(adjoint=True)
        x, grad = torch.ones(3, 2), torch.empty(3, 2)
        good = dict(
            t=0.0, x=x.data_ptr(), noise=0, batch=3, threads=1, grad_f=x.data_ptr(), grad_trace=0, grad_x=grad.data_ptr()
        )
        program.evaluate(**good)
        for name in ("x", "grad_f", "grad_x"):
            refused(name, program.evaluate, **(good | {name: 0}))
        for name, values in {"batch": (-1, HUGE, NAN), "threads": (0, -5, NAN)}.items():
            for value in values:
                refused(name, program.evaluate, **(good | {name: value}))
        states, steps = torch.ones(2, 3, 2).numpy(), np.array([[0.0, 1.0]])
        good = dict(
            noise=0, batch=3, times=[0.0, 1.0], sign=1, tableau=native_tableau(METHODS["euler"]), perturb=False, steps=steps,
            states=states, derivatives=np.zeros(0, np.float32), threads=1, grad_xs=0, grad_ls=0,
            grad_x=grad.data_ptr(), grad_l=0,
        )  # fmt: skip
        cotangents = torch.ones(2, 3, 2)
        good["grad_xs"] = cotangents.data_ptr()
        program.solve(**good)
        wrong = {
            "batch": (-1, HUGE), "threads": (0,), "sign": (0, 5), "times": ([0.0, NAN], [1.0, 0.0]), "grad_xs": (0,),
            "grad_x": (0,), "steps": (np.zeros((1, 3)), np.zeros(2)),
        }  # fmt: skip
        for name, values in wrong.items():
            for value in values:
                refused(name, program.solve, **(good | {name: value}))


class TestIndices:
    """Index arrays of builders and layers."""

    WRONG = {
        "fractions": np.array([0.0, 1.7]), "whole fractions": np.array([0.0, 1.0]), "bools": np.array([False, True]),
        "beyond 32 bits": np.array([0, 2**32 + 1]), "below": np.array([0, -(2**40)]), "two axes": np.array([[0, 1]]),
        "unsigned": np.array([0, 2**64 - 1], np.uint64), "text": np.array(["0", "1"]),
    }  # fmt: skip

    @pytest.mark.parametrize("what", WRONG)
    @pytest.mark.parametrize("name", ["BuilderF32", "BuilderF64"])
    def test_of_builders(self, what, name):
        wrong, good, values = self.WRONG[what], np.array([0, 1]), np.ones(1, np.float32)
        builder = getattr(_cpu, name)()
        refused("row_ptr", builder.matrix, 1, 2, wrong, np.array([0]), values)
        refused("col", builder.matrix, 1, 2, good, wrong, values)
        refused("entry", builder.gated_matrix, 1, 2, good, np.array([0]), wrong, good, np.ones(2, np.float32), 0)
        refused("gate", builder.gated_matrix, 1, 2, good, np.array([0]), good, wrong, np.ones(2, np.float32), 0)
        refused("row_ptr", builder.external_matrix, 1, 2, wrong, np.array([0]), 0)
        refused("factor_row", builder.product, 0, (0, 0), (0, 0), factor_row=wrong)
        refused("factor2_row", builder.product, 0, (0, 0), (0, 0), factor2_row=wrong)
        refused("factor_row", builder.reduction, 0, (0, 0), factor_row=wrong)

    @pytest.mark.parametrize("what", WRONG)
    def test_of_layers(self, what):
        for name in ("SparseLinearF32", "SparseLinearF64"):
            refused("row_ptr", getattr(_cpu, name), 1, 2, self.WRONG[what], np.array([0]))
            refused("col", getattr(_cpu, name), 1, 2, np.array([0, 1]), self.WRONG[what])

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64])
    def test_any_whole_numbers_will_do(self, dtype):
        builder = _cpu.BuilderF32()
        assert builder.matrix(1, 2, np.array([0, 1], dtype), np.array([1], dtype), np.ones(1, np.float32)) == 0

    def test_negative_ones(self):
        builder = _cpu.BuilderF32()
        x, f = builder.buffer(2), builder.buffer(1)
        builder.matrix(1, 2, np.array([0, 1]), np.array([-1]), np.ones(1, np.float32))
        builder.product(0, (x, 0), (f, 0))
        builder.roles(2, False, x, x)
        with pytest.raises(ValueError, match="matrix 0: column -1 is outside"):
            builder.compile()


class TestLists:
    """An adjoint's lists in a program that is none."""

    def builder(self):
        builder = _cpu.BuilderF32()
        x, h = builder.buffer(2), builder.buffer(2)
        kept = builder.buffer(2, 3)
        builder.matrix(2, 2, np.array([0, 1, 2]), np.array([0, 1]), np.ones(2, np.float32))
        builder.modulation(np.zeros(2, np.float32))
        builder.affine(0, (x, 0), (h, 0), 0, 1)
        builder.roles(2, False, x, h)
        return builder, x, h, kept

    def test_are_refused(self):
        for what in ("keep", "keep out of range", "reverse", "gradient out of range", "sum"):
            builder, x, h, kept = self.builder()
            if what.startswith("keep"):
                source = (99, 0) if "range" in what else (x, 0)
                builder.keep(0, source, (h, 0), kept, 0, 1, 1.0, 1.0, False, False, False)
            elif what == "reverse":
                builder.product(0, (x, 0), (h, 0), list="reverse")
            elif what == "sum":
                builder.sum(2, False)
            else:
                builder.gradient(0, (77, 0), (88, 5), 12)
            with pytest.raises(ValueError, match="keep, reverse and sums belong to an adjoint"):
                builder.compile()

    def test_the_program_without_them_is_good(self):
        self.builder()[0].compile()
