"""Every kernel the triton engine launches, compiled ahead of time for sm_80 and sm_90, with no GPU: what an engine would
launch is recorded, specialised as Triton would, and compiled to a cubin, which must not spill registers."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import states
from graph_fields import FIELDS, graph_of
from random_fields import random_field

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparseflow_kernels import divergence  # noqa: E402
from sparseflow_kernels.activations import ACTIVATIONS  # noqa: E402
from sparseflow_kernels.engines.base import SolveRequest  # noqa: E402
from sparseflow_kernels.engines.triton import (  # noqa: E402
    TritonEngine,
    gradient_sums,
    graph_engine,
    matrix,
    operator,
    pointwise,
    reversal,
    solve,
    workspace,
)
from sparseflow_kernels.engines.triton.builder import Expression  # noqa: E402
from sparseflow_kernels.field import GraphField, Pattern  # noqa: E402
from sparseflow_kernels.numerics.step_control import StepOptions  # noqa: E402
from sparseflow_kernels.numerics.tableaus import METHODS  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# bytes a thread may put aside: the assembler of older Tritons parks a few registers, however few are in use
SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64
LAUNCHING = (operator, workspace, gradient_sums, solve, reversal)
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int8: "*i8"}


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as its launch asks for it."""

    kernel: Any
    signature: tuple
    constants: tuple
    divisible: tuple
    warps: int

    @staticmethod
    def of(kernel, arguments, constants, warps) -> "Variant":
        names = kernel.arg_names
        given = dict(zip(names, arguments)) | constants
        assert sorted(given) == sorted(names) and len(arguments) + len(constants) == len(names), kernel.__name__
        signature, fixed, divisible = [], [], []
        for place, (name, parameter) in enumerate(zip(names, kernel.params)):
            value, indifferent = given[name], parameter.do_not_specialize
            if name in constants or value is None or (type(value) is int and value == 1 and not indifferent):
                signature.append((name, "constexpr"))
                fixed.append(((place,), value))
            elif isinstance(value, torch.Tensor):
                signature.append((name, TYPES[value.dtype]))
                if value.data_ptr() % 16 == 0 and not indifferent:
                    divisible.append((place,))
            else:
                assert type(value) is int, f"{kernel.__name__}: {name} is {value!r}, whose precision Triton would cut"
                signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
                if value % 16 == 0 and not indifferent:
                    divisible.append((place,))
        return Variant(kernel, tuple(signature), tuple(fixed), tuple(divisible), warps)

    def resources(self, capability: int, tmp_path: Path, stack_allowed: int = SPILLED) -> str:
        source = ASTSource(
            self.kernel, dict(self.signature), dict(self.constants),
            {place: [["tt.divisibility", 16]] for place in self.divisible},
        )  # fmt: skip
        options = dict(num_warps=self.warps, enable_fp_fusion=True)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        dumped = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        (line,) = [line for line in dumped.stdout.splitlines() if "REG:" in line]
        (stack,) = re.findall(r"STACK:(\d+)", line)
        assert int(stack) <= stack_allowed and "LOCAL:0" in line, f"{self.kernel.__name__} {self.constants}: {line}"
        return line


@pytest.fixture
def launched(monkeypatch):
    """The variants of all launches, none of which happens."""
    found: dict[Variant, None] = {}

    def record(kernel, programs, *arguments, warps=4, **constants):
        if programs > 0:
            assert programs < 2**31
            found[Variant.of(kernel, arguments, constants, warps)] = None

    for module in LAUNCHING:
        monkeypatch.setattr(module, "launch", record)
    for engine in (TritonEngine, graph_engine.GraphTritonEngine):
        monkeypatch.setattr(engine, "unsupported", staticmethod(lambda field: None))
    return found


def run(field, kind, method, batch, form=None, backward=True):
    """A solve and its gradient; numbers mean nothing, because nothing is launched."""
    plan = None if kind is None else divergence.plan(field, kind)
    graph = isinstance(field, GraphField)
    engine = (graph_engine.GraphTritonEngine if graph else TritonEngine)(field, plan, form)
    x, noise = states(batch, field.dim, field.dtype)
    fixed = method in ("rk4", "euler")
    grid = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    tolerances = (1e-3,) * (1 if kind is None else 2)
    request = SolveRequest(
        x, None if kind is None else x.new_zeros(batch), grid, 1, METHODS[method], tolerances, tolerances,
        StepOptions(first_step=0.5), grid=grid if fixed else None, noise=noise if kind == "hutchinson" else None,
        record=backward, context=x.new_zeros(batch, field.context.rows) if graph and field.context is not None else None,
    )  # fmt: skip
    result = engine.solve(request)
    if backward:
        engine.solve_backward(request, result, result.xs, result.ls, ("x", "l", "tensors"))


@pytest.mark.parametrize("kind", ["exact", "hutchinson"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_everything_is_on_the_fields_device(form, kind, monkeypatch):
    """Fields on the meta device, so that nothing left on the CPU can hide."""
    seen = set()

    def check(kernel, programs, *arguments, warps=4, **constants):
        for name, value in zip(kernel.arg_names, arguments):
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", f"{kernel.__name__}: {name}"
        seen.add(kernel.__name__)

    for module in LAUNCHING:
        monkeypatch.setattr(module, "launch", check)
    monkeypatch.setattr(TritonEngine, "unsupported", staticmethod(lambda field: None))
    field = random_field([4, 40, 32, 4], 0.4, gate=True, shift=True)
    plan = divergence.plan(field, kind)
    engine = TritonEngine(field.map_tensors(lambda tensor: tensor.to("meta")), plan, form)
    solver = solve.Solver(engine.program, METHODS["dopri5"], 100, 1, None, print)
    backward = reversal.Reversal(engine._adjoint_program()[0], METHODS["dopri5"], 100, 1, print)
    solver.work.run("prologue")
    for sequence in (solver.step, *backward.pulls):
        for bound in sequence.launches:
            bound()
    assert {"affine", "modulate", "begin", "finish", "total", "keep", "pull", "modulation_gradient"} <= seen


@pytest.mark.parametrize("name,kind", [("conditional", "hutchinson"), ("residual", "exact")])
def test_everything_of_a_graph_is_on_its_device(name, kind, monkeypatch):
    seen = set()

    def check(kernel, programs, *arguments, warps=4, **constants):
        for name, value in zip(kernel.arg_names, arguments):
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", f"{kernel.__name__}: {name}"
        seen.add(kernel.__name__)

    for module in LAUNCHING:
        monkeypatch.setattr(module, "launch", check)
    monkeypatch.setattr(graph_engine.GraphTritonEngine, "unsupported", staticmethod(lambda field: None))
    field = graph_of(FIELDS[name])[0]
    plan = divergence.plan(field, kind)
    engine = graph_engine.GraphTritonEngine(field.map_tensors(lambda tensor: tensor.to("meta")), plan)
    solver = solve.Solver(engine._program(False).native, METHODS["dopri5"], 100, 1, None, print)
    backward = reversal.Reversal(engine._program(True).native, METHODS["dopri5"], 100, 1, print, graph=True)
    for sequence in (solver.step, *backward.pulls):
        for bound in sequence.launches:
            bound()
    backward.graph_sums.take(0)
    assert {"pointwise", "product", "begin", "finish", "dense_gradient" if "dense_gradient" in seen else "gradient", "spread"} <= seen


def compile_all(launched, tmp_path, capability):
    assert launched
    for variant in launched:
        variant.resources(capability, tmp_path)


@pytest.mark.parametrize("form,dtype,capability", [
    ("sparse", torch.float32, 90), ("dense", torch.float32, 80),
    pytest.param("sparse", torch.float64, 80, marks=pytest.mark.slow),
    pytest.param("dense", torch.float64, 90, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_gated_field(form, dtype, capability, launched, tmp_path):
    """Every kind of kernel: tangents, reductions, path sums, gates and shifts; forwards and back."""
    field = random_field([6, 64, 48, 6], 0.3, gate=True, shift=True, dtype=dtype)
    run(field, "exact" if form == "sparse" else "hutchinson", "bosh3", 1000, form)
    compile_all(launched, tmp_path, capability)


@pytest.mark.slow
def test_other_fields_methods_and_shapes(launched, tmp_path):
    run(random_field([3, 32, 3], 0.5, dtype=torch.float32), "exact", "rk4", 100)
    wide = random_field([21, 210, 21], 0.1, output_gate=False, dtype=torch.float32)
    run(wide, "hutchinson", "dopri5", 10000, backward=False)
    run(random_field([2, 16, 16, 16, 2], 0.5, dtype=torch.float32), "exact", "rk4", 1)
    compile_all(launched, tmp_path, 90)


@pytest.mark.slow
def test_activations(launched, tmp_path):
    for name in ACTIVATIONS:
        run(random_field([4, 32, 4], 0.3, activation=name, dtype=torch.float32), "exact", "euler", 1024)
    kernels = ("affine", "keep")
    for variant in [v for v in launched if v.kernel.__name__ not in kernels]:
        del launched[variant]
    compile_all(launched, tmp_path, 90)


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_one_matrix(form, launched, tmp_path):
    for dtype in (torch.float32, torch.float64):
        pattern = Pattern.from_mask(torch.rand(64, 48) < 0.3)
        own = matrix.TritonMatrix(pattern, "cpu", form)
        values, x, grad = (torch.zeros(*size, dtype=dtype) for size in ((pattern.nnz,), (1000, 48), (1000, 64)))
        own.forward(x, values, grad[0]), own.forward(x, values), own.backward_input(grad, values)
        own.backward_values(grad, x)
    compile_all(launched, tmp_path, 90)


@pytest.mark.parametrize("name,dtype,capability", [
    ("conditional", torch.float32, 90), ("residual", torch.float32, 80),
    *(pytest.param(name, dtype, capability, marks=pytest.mark.slow) for name, dtype, capability in (
        ("conditional", torch.float64, 80), ("gru", torch.float32, 90), ("points", torch.float32, 80),
        ("hamiltonian", torch.float32, 80), ("mixed", torch.float64, 90),
    )),
])  # fmt: skip
def test_a_graph(name, dtype, capability, launched, tmp_path):
    run(graph_of(FIELDS[name], dtype)[0], "hutchinson", "bosh3", 1000)
    assert any(variant.kernel.__name__ == "pointwise" for variant in launched)
    for variant in launched:  # sines of large arguments are reduced by way of a table in memory
        variant.resources(capability, tmp_path, 64 if variant.kernel.__name__ == "pointwise" else SPILLED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_of_an_expression(dtype, tmp_path):
    """In one kernel, that adds them up."""
    code = []
    for op in sorted(pointwise.INSTRUCTIONS):
        code.append((op, 4, 0, 0 if op in pointwise.OF_VECTORS else 1, 2, 1.7))
        code.append((3, 3, 3, 4, 0, 0.0) if code[1:] else (0, 3, 4, 0, 0, 0.0))
    expression = Expression(3, 1, 2, 1, (*code, (28, 4, 3, 0, 0, 3.0)))
    kernel = pointwise.kernel_of(expression, (False, True, False), (False,), (False, True))
    memory, numbers = torch.zeros(64, 1008, dtype=dtype), torch.zeros(16, dtype=dtype)
    arguments = (memory, 1008, 5, 3, memory[:3], 0, 16, 32, 48, numbers)
    variant = Variant.of(kernel, arguments, dict(ROWS=1, BATCH=256), 4)
    variant.resources(90, tmp_path, 256)
