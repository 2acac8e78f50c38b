"""The CUDA engine of graphs: programs that `lower` writes, laid out by csrc/cuda/image.cpp. A whole solve is one launch, its
gradient another. The time is a last row of a program's state: what depends on time alone is computed by every tile."""

from __future__ import annotations

from typing import Any, Collection, Sequence

import torch
from torch import Tensor

from ..divergence import DivergencePlan
from ..field import Convolution, GraphField, Node
from ..field.graph import STATE, order
from . import shapes
from .base import Gradient, SolveRequest, SolveResult
from .cuda_device import BUILDERS, IMAGE_BYTES, DeviceImage
from .cuda_shapes import stages_of
from .cuda_solve import CudaSolver
from .graph_native import GraphNativeEngine, GraphProgram, ProgramSums, summands
from .instructions import code_of
from .lower import COTANGENT, TRACE_COTANGENT, GraphWriter, Place, state_bindings
from .native import address, times_gradient

MOST_ROWS = 0xFFFF  # of a node: a stream has 16 bits for a column


class CudaGraphWriter(GraphWriter):
    """registers: that a thread has for what lies between the instructions of a pointwise operation."""

    def __init__(self, builder: Any, field: GraphField, registers: int) -> None:
        super().__init__(builder, field, state_bindings(field, field.time), totals=True)
        self._registers = registers

    def _pointwise(
        self, rows: int, nodes: Sequence[Node], stored: Sequence[tuple[Node, Place]], traced: Sequence[Node],
        totals: Sequence[tuple[Node, Place]] = (),
    ) -> None:  # fmt: skip
        """In halves where there are too few registers: what the second half reads of the first has rows meanwhile."""
        summed = [node for node, _ in totals]
        code = code_of(nodes, [node for node, _ in stored], traced, lambda node: node in self._vector, summed)
        if len(nodes) < 2 or code.registers + len(traced) <= self._registers:
            return super()._pointwise(rows, nodes, stored, traced, totals)
        half = len(nodes) // 2
        first, second = set(nodes[:half]), nodes[half:]
        kept = {node for node, _ in stored}
        read = {operand for node in second for operand in node.operands} | (set(traced) - first)
        buffers: list[tuple[int, int, int]] = []
        between: list[tuple[Node, Place]] = []
        for node in nodes[:half]:
            if node in read and node not in kept:
                buffers.append((node.rows, 1, self._buffer(node.rows)))
                between.append((node, (buffers[-1][2], 0, 0)))
        stored_first = [*((node, place) for node, place in stored if node in first), *between]
        first_totals = [(node, place) for node, place in totals if node in first]
        self._pointwise(rows, nodes[:half], stored_first, [node for node in traced if node in first], first_totals)
        self._places.update(between)
        stored_second = [(node, place) for node, place in stored if node not in first]
        second_totals = [(node, place) for node, place in totals if node not in first]
        self._pointwise(rows, second, stored_second, [node for node in traced if node not in first], second_totals)
        self._free += buffers
        return None


class GraphCudaEngine(GraphNativeEngine, CudaSolver):
    """As `CudaEngine`, for fields that are graphs; its gradients too are its own."""

    @classmethod
    def unsupported(cls, field: GraphField) -> str | None:
        if (reason := cls._unready(field)) is not None:
            return reason
        if field.layout.is_tuple and len(field.layout.shapes) >= (most := cls.native().COMPONENTS):
            return (
                f"its state is a tuple of {len(field.layout.shapes)} tensors, and the cuda engine knows fewer than {most} "
                "norms; the triton engine runs it"
            )
        size = 0
        for node in order([field.output]):
            where = node.origin or f"an operation ({node.kind})"
            if node.kind == "time":
                return (
                    f"{node.origin or 'some of what it reads of t'} is a function of time in Python, which a kernel cannot "
                    "call; the triton and reference engines can"
                )
            if isinstance(node.matrix, Convolution):
                return f"{where} is a convolution, which the cuda engine has no kernels for"
            if node.rows > MOST_ROWS:
                return f"{where} has {node.rows} rows, more than {MOST_ROWS}; the triton engine runs any width"
            if node.matrix is not None:
                if max(node.matrix.shape) > MOST_ROWS:
                    return (
                        f"{where} is a product of {max(node.matrix.shape)} rows, more than {MOST_ROWS}; the triton engine "
                        "runs any width"
                    )
                size += node.matrix.pattern.nnz * (field.dtype.itemsize + 2)
        if size >= IMAGE_BYTES:
            return (
                f"its weights take {size / 2**30:.1f} GB, more than the 2 GB that the cuda engine's 32-bit offsets reach; "
                "the triton engine runs it"
            )
        return None

    @classmethod
    def unsuited(cls, field: GraphField) -> str | None:
        # the least a tile takes: what a product reads and what it makes, four samples
        nodes = order([field.output])
        products = [sum(node.matrix.shape) for node in nodes if node.matrix is not None and node.per_sample]
        bytes_needed = max(products, default=0) * 4 * field.dtype.itemsize
        limit = cls._limits_of(field.device)["shared_per_block"]
        if bytes_needed <= limit // 2:
            return None
        return (
            f"four samples of a product take {bytes_needed} bytes, too much of the {limit} bytes of shared memory that the "
            "cuda engine keeps them in"
        )

    def __init__(self, field: GraphField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._writers: dict[str, CudaGraphWriter] = {}
        self._programs: dict[str, GraphProgram] = {}
        with self._guard():
            self._image("forward")  # what cannot be laid out is refused now

    # ---- programs

    def _image(self, kind: str) -> DeviceImage:
        if kind not in self._images:
            image = super()._image(kind)
            self._programs[kind] = GraphProgram(image, self._writers[kind])
            with self._guard():
                image.renew(lambda _: self.renew(self._programs[kind]))
        return self._images[kind]

    def _write_image(self, kind: str) -> Any:
        field, g = self._field, self._field.graph
        trace = None if self.plan is None else self.plan.form.trace
        builder = getattr(self._module, BUILDERS[self.dtype])()
        writer = self._writers[kind] = CudaGraphWriter(builder, field, self._module.REGISTERS)
        if kind == "adjoint":
            names = {COTANGENT: g.input(COTANGENT, field.dim, STATE), TRACE_COTANGENT: g.input(TRACE_COTANGENT, 1, STATE)}
            writer.write_adjoint(field.output, trace, names)
        else:
            writer.write(field.output, [] if trace is None else summands(trace))
        return self._laid_out(builder)

    def update(self, field: GraphField) -> bool:
        if not self._takes_over(field):
            return False
        with self._guard():
            self._take(field)
            self.stamp += 1
            self._renew_images(lambda kind, _: self.renew(self._programs[kind]))
        return True

    def _layers(self) -> str:
        nodes = [node for node in order([self._field.output]) if node.matrix is not None and not node.matrix.constant]
        products = "-".join(f"{node.rows}x{node.operands[0].rows}:{node.matrix.pattern.nnz}" for node in nodes)
        return f"graph of {self._image('forward').image.workspace_rows} rows {products}"

    def describe(self, batch: int = 1000) -> list[str]:
        """How a batch of this size would run."""
        plan, blocks = self.plan_for(batch, 7)
        key = self._signature("forward", batch, 7, "shared")
        source = "tuned" if shapes.tuned(self._limits["name"], key) == plan.shape else "by estimate"
        return [f"a solve of {batch} samples: one launch of {blocks} blocks; {plan.reason} [{source}]"]

    def _given(
        self, kind: str, noise: Tensor | None, context: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None]:
        self._image(kind)
        return None, self._context(self._programs[kind], self._ready_context(context, batch), noise, batch)

    # ---- evaluations

    def evaluate(self, t: Tensor | float, y: Tensor, context: Tensor | None = None) -> Tensor:
        x, time, own_times = self._state_and_time(t, y)
        noise = x.new_zeros(len(x), self.dim) if self.plan is not None and self.plan.kind == "hutchinson" else None
        return self._evaluate(time, x, noise, False, context, own_times)[0]

    def evaluate_with_divergence(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("this engine was packed without a divergence: pack it with a plan")
        noise = self._ready_noise(noise, self._ready(x, "x"))
        x, time, own_times = self._state_and_time(t, x)
        return self._evaluate(time, x, noise, True, context, own_times)

    def solve(self, request: SolveRequest) -> SolveResult:
        self._ready_context(request.context, len(request.x))
        return super().solve(request)

    # ---- gradients

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str], context: Tensor | None = None,
    ) -> Gradient:  # fmt: skip
        x = self._ready(x, "x")
        noise, context = self._ready_noise(noise, x), self._ready_context(context, len(x))
        grad_f = self._ready_like(grad_f, x, "grad_f")
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        point, time, own_times = self._state_and_time(t, x)
        with self._guard():
            grad_x = torch.empty_like(x)
            grad_times = x.new_zeros(len(x)) if own_times else None
            at, value = (None, 0.0) if own_times else self._time(time)
            _, rows = self._given("adjoint", noise, context, len(x))
            grad_rows = None if rows is None else torch.zeros_like(rows)
            sums = self._backward(len(x), 1, {
                "evaluate": True, "x": point.data_ptr(), "noise": 0, "grad_f": grad_f.data_ptr(),
                "grad_trace": address(grad_trace), "time": address(at), "time_value": value, "grad_x": grad_x.data_ptr(),
                "grad_l": 0, "context": address(rows), "grad_context": address(grad_rows), "own_times": own_times,
                "grad_times": address(grad_times),
            })  # fmt: skip
        found, _ = self._gradient(self._programs["adjoint"], self._sums(sums), context, noise, grad_rows, wanted)
        found.x = grad_x
        if "t" in wanted:
            found.t = grad_times.reshape(t.shape) if own_times else sums[-1].to(self.dtype)
        return found

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        outputs, batch = len(request.times), x.shape[0]
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        context = self._ready_context(request.context, batch)
        with self._guard():
            grad_x = torch.empty_like(x)
            grad_l = None if self.plan is None else x.new_empty(batch)
            times, steps = self._on_the_device(tuple(request.times.tolist())), result.steps.to(self.device)
            _, rows = self._given("adjoint", noise, context, batch)
            grad_rows = None if rows is None else torch.zeros_like(rows)
            sums = self._backward(batch, stages_of(request), {
                "evaluate": False, "x": 0, "noise": 0, "tableau": self._tableau(request.tableau),
                "sign": request.sign, "perturb": request.perturb, "n_times": outputs, "n_steps": len(steps),
                "times": times.data_ptr(), "steps": address(steps), "states": address(result.states),
                "derivatives": address(result.derivatives), "grad_xs": grad_xs.data_ptr(), "grad_ls": address(grad_ls),
                "grad_x": grad_x.data_ptr(), "grad_l": address(grad_l), "context": address(rows),
                "grad_context": address(grad_rows),
            })  # fmt: skip
            of_times = times_gradient(request, result, grad_xs, grad_ls, sums[-1]) if "times" in wanted else None
        found, _ = self._gradient(self._programs["adjoint"], self._sums(sums), context, noise, grad_rows, wanted)
        found.x, found.l, found.times = grad_x, grad_l, of_times
        return found

    def _sums(self, sums: Tensor) -> ProgramSums:
        image, writer = self._image("adjoint").image, self._writers["adjoint"]

        def of_matrix(number: int) -> Tensor:
            first, size = image.matrix_gradient(number)
            return sums[first : first + size]

        vectors = {}
        for number, _ in writer.vectors:
            first, size = image.vector_gradient(number)
            if first >= 0:
                vectors[number] = sums[first : first + size]
        none = sums.new_zeros(0)
        return ProgramSums(of_matrix, vectors, none, none)
