"""The CUDA engine: `csrc/cuda` behind the engine protocol. A whole solve is one launch, its gradient another; all memory is
torch's, work goes to torch's current stream, and the host waits once for a solve, to read how it went."""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Collection

import torch
from torch import Tensor

from ..build_info import cuda_obstacle
from ..divergence import DivergencePlan
from ..field import TimeFunction, UnsupportedFieldError, VectorField
from ..numerics.tableaus import FixedTableau, Tableau
from . import shapes
from .adjoint import write_adjoint
from .base import Gradient, SolveRequest, SolveResult
from .native import NativeEngine, address, field_gradients, native_options, native_tableau, solve_of_nothing, times_gradient
from .program import Writer, write_program

FIRST_CAPACITY = 24  # steps that a solve can record at first; a longer one is run again with room for them
RECORD_BYTES = 256 << 20  # but no more than fit in here, at first
STEP_CAPACITY = 4096  # steps whose times and sizes are kept for the statistics
READ_AT_ONCE = 64  # of them, those that come along with the counts
IMAGE_BYTES = 2**31 - 16  # of a program
SUMS_BYTES = 1 << 30  # memory for the gradients that blocks add up, each in a place of its own
# Rows of a nearly dense layer share activations (csrc/cuda/block.cuh). By wavefronts of shared memory: a sparse row reaches
# 0.22 of the multiply-add rate, four dense ones about 0.6. Not yet measured on a GPU.
DENSE_ABOVE = 0.37

_DTYPES = {torch.float32: "F32", torch.float64: "F64"}
_STATUS = ("ok", "underflow", "non_finite", "max_num_steps", "interrupted")


class DeviceError(RuntimeError):
    """A launch failed, or what it left behind: the message says which, and whether the process can go on."""


class _Program:
    """An image on the device. New numbers of a field are written where they lie, in a few launches and without a look at
    the host."""

    def __init__(self, image: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.image = image
        self.memory = torch.from_numpy(image.bytes).to(device)
        self._numbers = self.memory.view(dtype)  # the image's size is a multiple of 16
        self.streams: list[Any] = []  # that have used it
        self._map: tuple[Tensor, Tensor] | None = None  # where in it, and which of all numbers in the order they come
        self._collected: list[Tensor] = []
        self._places: list[tuple[Tensor, Tensor]] = []

    def renew(self, writer: Writer, field: VectorField) -> None:
        self._collected, self._places = [], []
        writer.renew(self, field)
        if self._map is None:
            sizes = [0, *itertools.accumulate(values.numel() for values in self._collected)]
            place = torch.cat([place for place, _ in self._places])
            entry = torch.cat([entry + first for (_, entry), first in zip(self._places, sizes)])
            self._map = place.to(self.memory.device), entry.to(self.memory.device)
        place, entry = self._map
        self._numbers[place] = torch.cat(self._collected).to(self._numbers.dtype)[entry]
        self._collected = []

    # as `Writer.renew` calls them

    def set_values(self, matrix: int, values: Tensor) -> None:
        self._collected.append(values.detach().flatten())
        if self._map is None:
            self._places.append(tuple(torch.from_numpy(part) for part in self.image.matrix_places(matrix)))

    def set_modulation(self, modulation: int, **arrays: Tensor) -> None:
        places = self.image.modulation_places(modulation) if self._map is None else None
        for name, values in arrays.items():
            self._collected.append(values.detach().flatten())
            if places is not None:
                entry = torch.arange(places["n"])
                self._places.append((places[name] + entry, entry))


class CudaEngine(NativeEngine):
    """Sparse kernels in CUDA C++; a whole solve is one launch. float32 and float64, compute capability 8.0 and newer.

    step_control: "shared", "per_tile" and "per_sample" (a step size for every sample; no gradient).

    Tuning: which launch shape is the quickest is estimated from counts (csrc/cuda/plan.cpp); `tune` measures, and what it
    found is used for that field and batch from then on, in later processes too (`shapes.json` in the cache folder).
    """

    name: ClassVar[str] = "cuda"
    device_type: ClassVar[str] = "cuda"
    controls: ClassVar[tuple[str, ...]] = ("shared", "per_tile", "per_sample")

    @staticmethod
    def native():
        from .. import _cuda  # late: most installations have no GPU

        return _cuda

    @classmethod
    def unsupported(cls, field: VectorField) -> str | None:
        try:
            native = cls.native()
        except ImportError as error:
            return (
                f"the CUDA extension is not built ({error}); install the package where nvcc 12 or newer is found, with "
                "SPARSEFLOW_CUDA=on"
            )
        if field.device.type != cls.device_type:
            return f"the field is on {field.device}, the cuda engine needs it on a GPU: call .cuda()"
        if field.dtype not in _DTYPES:
            return f"the cuda engine computes in float32 and float64, not {field.dtype}: call .float() or .double()"
        obstacle = cuda_obstacle(_probe(native), field.device.index or 0)
        if obstacle is not None:
            return obstacle
        for layer in field.layers:
            if isinstance(layer.gate, TimeFunction) or isinstance(layer.shift, TimeFunction):
                return (
                    f"layer {layer.name!r} has a function of time that is neither a sigmoid gate nor linear, which a kernel "
                    "cannot call; the triton and reference engines can"
                )
            if max(layer.out_features, layer.in_features) > 0xFFFF:
                return f"layer {layer.name!r} is wider than 65535; the triton engine runs any width"
        if (size := _image_bytes(field)) >= IMAGE_BYTES:
            return (
                f"its weights take {size / 2**30:.1f} GB, more than the 2 GB that the cuda engine's 32-bit offsets reach; "
                "the triton engine runs it"
            )
        return None

    @classmethod
    def unsuited(cls, field: VectorField) -> str | None:
        # the least a tile takes: a layer's values and tangents and the next one's, four samples
        widths = [field.dim, *(layer.out_features for layer in field.layers)]
        bytes_needed = max(a + b for a, b in zip(widths, widths[1:])) * 2 * 4 * field.dtype.itemsize
        limit = cls._limits_of(field.device)["shared_per_block"]
        if bytes_needed <= limit // 2:
            return None
        return (
            f"four samples' activations of two layers take {bytes_needed} bytes, too much of the {limit} bytes of shared "
            "memory that the cuda engine keeps them in"
        )

    @classmethod
    def _limits_of(cls, device: torch.device) -> dict:
        return _probe(cls.native())["devices"][device.index or 0]

    def __init__(self, field: VectorField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._module = self.native()
        self._index = field.device.index or 0
        self._limits = self._limits_of(field.device)
        self._programs: dict[str, tuple[_Program, Writer]] = {}
        self._plans: dict[tuple, tuple[Any, int]] = {}
        self._streams: list[Any] = []
        self._tableaus: dict[int, tuple] = {}
        self._points: tuple[tuple[float, ...], Tensor] = (), torch.empty(0)
        self._capacity = FIRST_CAPACITY
        with self._guard():
            self._program("forward")  # what cannot be laid out is refused now

    # ------------------------------------------------------------------------------------------------- programs

    def _program(self, kind: str) -> tuple[_Program, Writer]:
        """The image of the "forward" or the "adjoint" program; its streams cut into pieces if they cannot stay on chip."""
        if kind not in self._programs:
            builder = getattr(self._module, f"Builder{_DTYPES[self.dtype]}")()
            write = write_program if kind == "forward" else write_adjoint
            writer = write(builder, self._field, self.plan)
            if writer.externals.functions:
                raise UnsupportedFieldError(
                    "engine 'cuda': the exact divergence of this field has too many paths to list, and an output gate: take "
                    "the Hutchinson estimate, or engine='triton'"
                )
            image = builder.image(cut=False, dense_above=_dense_above())
            if image.stream_bytes > self._limits["shared_per_block"] // 2:
                image = builder.image(cut=True, dense_above=_dense_above())
            writer.array = Tensor.detach  # from now on numbers stay where they are
            self._programs[kind] = _Program(image, self.device, self.dtype), writer
            self._on_this_stream()  # which writes the image
        return self._programs[kind]

    def update(self, field: VectorField) -> bool:
        if not self._takes_over(field):
            return False
        self._field = field
        self.stamp += 1
        with self._guard():
            self._on_this_stream()
            present = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            others = [stream for stream in self._streams if stream != present]
            for other in others:  # what was launched there reads the old numbers
                present.wait_stream(other)
            for program, writer in self._programs.values():
                program.renew(writer, field)
            for other in others:
                other.wait_stream(present)
        return True

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    # ------------------------------------------------------------------------------------------------- launch shapes

    def candidates(self, batch: int, stages: int = 7, kind: str = "forward", step_control: str = "shared") -> list[Any]:
        """The launch shapes that fit, the one expected to be the quickest first (csrc/cuda/plan.h)."""
        image = self._program(kind)[0].image
        return image.plans(self._limits, batch, stages, step_control != "shared", step_control == "per_sample")

    def plan_for(self, batch: int, stages: int, kind: str = "forward", step_control: str = "shared") -> tuple[Any, int]:
        """(launch shape, blocks) for a batch; the tuned one if there is one."""
        key = (kind, batch, stages, step_control)
        if key not in self._plans:
            found = self.candidates(batch, stages, kind, step_control)
            wanted = shapes.forced() or shapes.tuned(self._limits["name"], self._signature(*key))
            found.sort(key=lambda plan: plan.shape != wanted)  # the others in their order behind it
            for plan in found:
                blocks = self._blocks(plan, kind)
                if blocks > 0:
                    self._plans[key] = plan, blocks
                    break
            else:
                raise DeviceError(
                    f"engine 'cuda': no launch shape fits this field on {self._limits['name']} "
                    f"({self._limits['shared_per_block']} bytes of shared memory a block); use engine='triton'"
                )
        return self._plans[key]

    def _blocks(self, plan: Any, kind: str) -> int:
        """How many blocks to launch: no more than run at once, so that they can wait for each other. 0: none can."""
        try:
            at_once = self._program(kind)[0].image.occupancy(plan, self._index)
        except RuntimeError as error:
            raise DeviceError(str(error)) from error
        blocks = min(plan.tiles, at_once * self._limits["multiprocessors"])
        if kind == "adjoint":
            per_block = self._program(kind)[0].image.sums * self.dtype.itemsize
            blocks = max(min(blocks, 1), min(blocks, SUMS_BYTES // max(1, per_block)))
        return blocks

    def use(self, plan: Any, batch: int, stages: int, kind: str = "forward", step_control: str = "shared") -> None:
        """Run batches of this size in this shape from now on."""
        blocks = self._blocks(plan, kind)
        if blocks == 0:
            raise DeviceError(f"engine 'cuda': the shape {plan.shape} does not run on {self._limits['name']}")
        self._plans[kind, batch, stages, step_control] = plan, blocks

    def tune(self, request: SolveRequest, repeats: int = 3) -> list[tuple[tuple[int, ...], float]]:
        """Solve `request` in every shape that fits, and use the quickest from then on. Returns (shape, seconds), the
        quickest first. On a GPU only: elsewhere times mean nothing."""
        if self.device.type != "cuda":
            raise ValueError(f"tune: times are taken on a GPU, and this engine is on {self.device}")
        stages, batch, control = _stages(request), request.x.shape[0], request.step_control
        request = replace(request, record=False)
        self.plan_for(batch, stages, "forward", control)  # raises where no shape fits
        found = []
        for plan in self.candidates(batch, stages, "forward", control):
            if self._blocks(plan, "forward") == 0:
                continue
            self.use(plan, batch, stages, "forward", control)
            x, l = self._ready(request.x, "y0"), self._ready_density(request)
            noise = self._ready_noise(request.noise, x)
            best = math.inf
            with self._guard():
                for repeat in range(repeats + 1):  # the first one warms up
                    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    self._solve(request, x, l, noise, 0, STEP_CAPACITY, events)
                    if repeat > 0:
                        best = min(best, events[0].elapsed_time(events[1]) * 1e-3)
            found.append((plan, best))
        found.sort(key=lambda pair: pair[1])
        self.use(found[0][0], batch, stages, "forward", control)
        table = [(plan.shape, seconds) for plan, seconds in found]
        shapes.remember(self._limits["name"], self._signature("forward", batch, stages, control), table)
        return table

    def _signature(self, kind: str, batch: int, stages: int, step_control: str) -> str:
        """What a tuned shape holds for."""
        layers = "-".join(f"{layer.out_features}x{layer.in_features}:{layer.pattern.nnz}" for layer in self._field.layers)
        form = "none" if self.plan is None else type(self.plan.form).__name__
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{layers} {form} {dtype} {kind} batch {batch} stages {stages} {step_control}"

    def describe(self, batch: int = 1000) -> list[str]:
        """The form of each layer, and how a batch of this size would run."""
        program, writer = self._program("forward")
        whole = program.image.dense
        forms = [
            f"{number} {'four dense rows at a time' if whole[matrix] else 'sparse rows'} ({layer.pattern.density:.0%})"
            for number, (matrix, layer) in enumerate(zip(writer.weights, self._field.layers))
        ]
        plan, blocks = self.plan_for(batch, 7)
        key = self._signature("forward", batch, 7, "shared")
        source = "tuned" if shapes.tuned(self._limits["name"], key) == plan.shape else "by estimate"
        return [
            f"layers on the GPU: {', '.join(forms)} [dense from {_dense_above():.0%} on]",
            f"a solve of {batch} samples: one launch of {blocks} blocks; {plan.reason} [{source}]",
        ]

    # ------------------------------------------------------------------------------------------------- evaluations

    def evaluate(self, t: Tensor | float, y: Tensor) -> Tensor:
        return self._evaluate(t, self._ready(y, "y"), None, False)[0]

    def evaluate_with_divergence(self, t: Tensor | float, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.plan is None:
            raise ValueError("this engine was packed without a divergence: pack it with a plan")
        x = self._ready(x, "x")
        return self._evaluate(t, x, self._ready_noise(noise, x), True)

    def _evaluate(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, with_trace: bool
    ) -> tuple[Tensor, Tensor | None]:
        program, _ = self._program("forward")
        batch = x.shape[0]
        with self._guard():
            f, trace = torch.empty_like(x), x.new_empty(batch) if with_trace else None
            if batch == 0:
                return f, trace
            plan, blocks = self.plan_for(batch, 1)
            memory = self._bytes(blocks * plan.global_bytes)
            at, value = self._time(t)
            self._launch(
                program.image.evaluate, plan=plan, image=program.memory.data_ptr(), device=self._index, blocks=blocks,
                stream=self._stream(), global_memory=address(memory), batch=batch, x=x.data_ptr(), noise=address(noise),
                time_value=value, time=address(at), f=f.data_ptr(), trace=address(trace),
            )
        return f, trace

    def _time(self, t: Tensor | float) -> tuple[Tensor | None, float]:
        """A time that is on the device stays there."""
        if isinstance(t, Tensor) and t.device.type == self.device.type and self.device.type == "cuda":
            return t.detach().to(self.dtype).reshape(1).contiguous(), 0.0
        return None, float(t)

    def _launch(self, function: Any, *arguments: Any, **more: Any) -> None:
        self._on_this_stream()
        try:
            function(*arguments, **more)
        except RuntimeError as error:
            raise DeviceError(f"engine 'cuda': {error}") from error

    def _read(self, memory: Tensor) -> Tensor:
        """Memory of the device, on the host. What went wrong in a kernel is heard of here."""
        try:
            return memory.cpu()
        except RuntimeError as error:
            raise DeviceError(
                f"engine 'cuda': a kernel failed on {self._limits['name']}: {error}; the device's state in this process is "
                "lost if the error is a memory fault or a failed launch: then start the process anew"
            ) from error

    def _wait(self, stop: Tensor) -> None:
        """Until the present stream is done, with an ear for the keyboard: a solve may take long, and an interruption ends
        it at its next step."""
        if self.device.type != "cuda":
            return
        done = torch.cuda.Event()
        done.record()
        began = time.monotonic()
        try:
            while not done.query():
                if time.monotonic() - began > 0.02:
                    time.sleep(0.001)
        except KeyboardInterrupt:
            word = torch.ones(4, dtype=torch.uint8).pin_memory()
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                stop.copy_(word, non_blocking=True)  # by the copy engine: the kernel may hold all multiprocessors
            done.synchronize()
            raise
        except RuntimeError as error:
            raise DeviceError(f"engine 'cuda': a kernel failed on {self._limits['name']}: {error}") from error

    def _bytes(self, count: int) -> Tensor | None:
        return self._memory(count, "the blocks' workspaces") if count > 0 else None

    def _memory(self, count: int, what: str) -> Tensor:
        try:
            return torch.empty(count, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"engine 'cuda': {what} needs {count / 2**20:.0f} MB of memory for its solve; use a smaller batch ({error})"
            ) from error

    def _on_this_stream(self) -> None:
        """The present stream joins those that use the images: their memory is not given away, and new numbers wait."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if stream not in self._streams:
            for other in self._streams:
                stream.wait_stream(other)  # what was written there may still be on its way
            self._streams.append(stream)
        for program, _ in self._programs.values():
            if stream not in program.streams:
                program.streams.append(stream)
                program.memory.record_stream(stream)

    # ------------------------------------------------------------------------------------------------- solves

    def _tableau(self, tableau: Tableau | FixedTableau) -> Any:
        if id(tableau) not in self._tableaus:  # kept beside it, so that no other one gets its id
            self._tableaus[id(tableau)] = tableau, self._module.Tableau(native_tableau(tableau))
        return self._tableaus[id(tableau)][1]

    def _on_the_device(self, points: tuple[float, ...]) -> Tensor:
        """Points of time, float64; the last ones asked for are at hand, and cost no copy."""
        if points != self._points[0]:
            self._points = points, torch.tensor(points, dtype=torch.float64, device=self.device)
        return self._points[1]

    def solve(self, request: SolveRequest) -> SolveResult:
        x = self._ready(request.x, "y0")
        batch = x.shape[0]
        if request.step_control not in self.controls:
            raise ValueError(f"step_control must be one of {self.controls}, not {request.step_control!r}")
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a solve reads its outcome on the host, which a CUDA graph cannot capture; it is one launch already: call it "
                "outside the captured region"
            )
        l = self._ready_density(request)
        noise = self._ready_noise(request.noise, x)
        if request.record and request.step_control != "shared":
            raise ValueError(f"step_control={request.step_control!r} records no common steps for a gradient")
        if batch == 0:
            return solve_of_nothing(request, x)
        with self._guard():
            room = max(FIRST_CAPACITY, RECORD_BYTES // (2 * x.nbytes)) if x.nbytes else FIRST_CAPACITY
            capacity, step_capacity = min(self._capacity, room), STEP_CAPACITY
            result, accepted = self._solve(request, x, l, noise, capacity, step_capacity)
            if accepted > (capacity if request.record else step_capacity):  # again, with room for what it turned out to take
                result, _ = self._solve(request, x, l, noise, accepted, max(accepted, step_capacity))
            if request.record:
                self._capacity = max(FIRST_CAPACITY, accepted + accepted // 4)
        return result

    def _solve(
        self, request: SolveRequest, x: Tensor, l: Tensor | None, noise: Tensor | None, capacity: int, step_capacity: int,
        timed: list | None = None,
    ) -> tuple[SolveResult, int]:  # fmt: skip
        """The result, and how many steps were accepted; with fewer places some of them were not recorded."""
        program, _ = self._program("forward")
        batch, dim, outputs = x.shape[0], self.dim, len(request.times)
        adaptive = isinstance(request.tableau, Tableau)
        shared, stages = request.step_control == "shared", _stages(request)
        plan, blocks = self.plan_for(batch, stages, "forward", request.step_control)
        options = native_options(request.options)
        points = [*request.times.tolist(), *([] if request.grid is None else request.grid.tolist())]
        times = self._on_the_device((*points, *options["step_t"], *options["jump_t"]))
        xs = x.new_empty(outputs, batch, dim)
        ls = None if l is None else x.new_empty(outputs, batch)

        rows = dim + (l is not None)
        several = shared and plan.tiles > blocks
        if request.grid is not None:
            capacity = step_capacity = len(request.grid) - 1
        parts = {
            "barrier": 64, "next_tile": 64, "stop": 64,  # these begin at zero
            "stats": 64 * (1 if shared else plan.tiles), "steps": 16 * step_capacity if shared else 0, "blame": 16 * batch,
            "slots": 16 * self._module.SUMS * blocks, "global": blocks * plan.global_bytes,
            "tile_state": plan.tiles * 5 * rows * plan.shape[0] * x.element_size() if several else 0,
        }
        offsets, size = {}, 0
        for name, count in parts.items():
            offsets[name] = size
            size += (count + 127) // 128 * 128
        scratch = self._memory(size, f"a batch of {batch}")
        scratch[: offsets["stats"]].zero_()

        recorded: dict[str, Tensor] = {}
        if request.record:
            recorded["states"] = x.new_empty(capacity + 1, batch, dim)
            if adaptive:
                recorded["derivatives"] = x.new_empty(capacity + 1, batch, dim)
                recorded["x_slopes"] = torch.zeros_like(xs)
                if ls is not None:
                    recorded["l_slopes"] = torch.zeros_like(ls)
        names = ("states", "derivatives", "x_slopes", "l_slopes")
        arguments = {
            "image": program.memory.data_ptr(), "device": self._index, "blocks": blocks, "stream": self._stream(),
            "batch": batch, "x": x.data_ptr(), "l": address(l), "noise": address(noise), "shared": shared,
            "tableau": self._tableau(request.tableau),
            "rtol": (*request.rtol, 0.0)[:2], "atol": (*request.atol, 0.0)[:2], "options": options, "sign": request.sign,
            "perturb": request.perturb, "n_times": outputs, "n_grid": len(points) - outputs, "times": times.data_ptr(),
            "xs": xs.data_ptr(), "ls": address(ls), "record": request.record, "capacity": capacity,
            "step_capacity": step_capacity,
            **{name: address(recorded.get(name)) for name in names},
            **{name: scratch.data_ptr() + offset if parts[name] else 0 for name, offset in offsets.items()},
        }
        if timed is not None:
            timed[0].record()
        self._launch(program.image.solve, plan, arguments)
        if timed is not None:
            timed[1].record()
        self._wait(scratch[offsets["stop"] : offsets["stop"] + 4])

        # the one read; of the steps, as many come along as most solves take
        first_steps = min(step_capacity, READ_AT_ONCE)
        end = offsets["steps"] + 16 * first_steps if shared else offsets["steps"]
        told = self._read(scratch[offsets["stats"] : end])
        said = told[: parts["stats"]].view(torch.float64).view(-1, 8).tolist()
        nfe, accepted, rejected = (sum(column) for column in list(zip(*said))[:3])
        failed = [tile for tile, one in enumerate(said) if one[3]]
        status, t, dt, bad = "ok", 0.0, 0.0, ()
        if failed:
            code, t, dt = said[failed[0]][3:6]
            status = _STATUS[int(code)]
            blame = scratch[offsets["blame"] : offsets["blame"] + 16 * batch].view(torch.float64).view(2, batch).cpu()
            bad = _offending(blame if l is not None else blame[:1], dim, None if shared else failed, plan.shape[0])
        kept = min(int(accepted), step_capacity) if shared else 0
        steps = told[told.numel() - 16 * first_steps :] if shared else told[:0]
        if kept > first_steps:
            steps = scratch[offsets["steps"] : offsets["steps"] + 16 * kept].cpu()
        result = SolveResult(
            xs=xs, ls=ls, nfe=math.ceil(nfe / len(said)), accepted=int(accepted), rejected=int(rejected),
            steps=steps.view(torch.float64).view(-1, 2)[:kept].clone(), status=status, t=t, dt=dt, rows=bad,
        )
        if request.record:
            kept = min(kept, capacity)
            result.states = recorded["states"][: kept + 1]
            result.derivatives = recorded["derivatives"][: kept + 1] if adaptive else x.new_empty(0, batch, dim)
            if 2 * kept < capacity:  # a gradient may be long in coming
                result.states, result.derivatives = result.states.clone(), result.derivatives.clone()
            if adaptive:
                result.slopes = recorded["x_slopes"], recorded.get("l_slopes")
        return result, int(accepted) if shared else 0

    # ------------------------------------------------------------------------------------------------- gradients

    def _backward(self, batch: int, stages: int, arguments: dict) -> Tensor:
        """Launches the adjoint; the sums of all blocks, float64 on the device."""
        program, _ = self._program("adjoint")
        if batch == 0:
            return torch.zeros(program.image.sums, dtype=torch.float64, device=self.device)
        plan, blocks = self.plan_for(batch, stages, "adjoint")
        image = program.image
        sums = torch.zeros(blocks, image.sums, dtype=self.dtype, device=self.device)
        stage_sums = torch.zeros(blocks, image.stage_sums, dtype=self.dtype, device=self.device)
        memory = self._bytes(blocks * plan.global_bytes)
        self._launch(image.backward, plan, {
            "image": program.memory.data_ptr(), "device": self._index, "blocks": blocks, "stream": self._stream(),
            "batch": batch, "global": address(memory), "sums": sums.data_ptr(), "stage_sums": address(stage_sums),
            **arguments,
        })  # fmt: skip
        return sums.sum(0, dtype=torch.float64)

    def evaluate_backward(
        self, t: Tensor | float, x: Tensor, noise: Tensor | None, grad_f: Tensor, grad_trace: Tensor | None,
        wanted: Collection[str],
    ) -> Gradient:  # fmt: skip
        x, grad_f = self._ready(x, "x"), self._ready_like(grad_f, x, "grad_f")
        noise = self._ready_noise(noise, x)
        grad_trace = self._ready_channel(grad_trace, x.shape[:1], "grad_trace")
        with self._guard():
            grad_x = torch.empty_like(x)
            at, value = self._time(t)
            sums = self._backward(x.shape[0], 1, {
                "evaluate": True, "x": x.data_ptr(), "noise": address(noise), "grad_f": grad_f.data_ptr(),
                "grad_trace": address(grad_trace), "time": address(at), "time_value": value, "grad_x": grad_x.data_ptr(),
                "grad_l": 0,
            })  # fmt: skip
            tensors = self._tensors(sums) if "tensors" in wanted else ()
        return Gradient(tensors=tensors, x=grad_x, t=sums[-1].to(self.dtype) if "t" in wanted else None)

    def solve_backward(
        self, request: SolveRequest, result: SolveResult, grad_xs: Tensor, grad_ls: Tensor | None, wanted: Collection[str]
    ) -> Gradient:
        x, noise = self._ready(request.x, "y0"), self._ready_noise(request.noise, request.x)
        outputs, batch = len(request.times), x.shape[0]
        grad_xs, grad_ls = self._ready_cotangents(request, grad_xs, grad_ls)
        with self._guard():
            grad_x = torch.empty_like(x)
            grad_l = None if self.plan is None else x.new_empty(batch)
            times, steps = self._on_the_device(tuple(request.times.tolist())), result.steps.to(self.device)
            sums = self._backward(batch, _stages(request), {
                "evaluate": False, "x": 0, "noise": address(noise), "tableau": self._tableau(request.tableau),
                "sign": request.sign, "perturb": request.perturb, "n_times": outputs, "n_steps": len(steps),
                "times": times.data_ptr(), "steps": address(steps), "states": address(result.states),
                "derivatives": address(result.derivatives), "grad_xs": grad_xs.data_ptr(), "grad_ls": address(grad_ls),
                "grad_x": grad_x.data_ptr(), "grad_l": address(grad_l),
            })  # fmt: skip
            of_times = times_gradient(request, result, grad_xs, grad_ls, sums[-1]) if "times" in wanted else None
            tensors = self._tensors(sums) if "tensors" in wanted else ()
        return Gradient(tensors=tensors, x=grad_x, l=grad_l, times=of_times)

    def _tensors(self, sums: Tensor) -> tuple[Tensor, ...]:
        """A gradient, tensor by tensor of the field."""
        program, writer = self._program("adjoint")

        def of_matrix(number: int) -> Tensor:
            first, size = program.image.matrix_gradient(number)
            return sums[first : first + size]

        def of_modulation(number: int, name: str) -> Tensor:
            first, size = program.image.modulation_gradients(number)[name]
            return sums[first : first + size]

        return field_gradients(self._field, writer, of_matrix, of_modulation)


def _dense_above() -> float:
    text = os.environ.get("SPARSEFLOW_CUDA_DENSE_ABOVE", DENSE_ABOVE)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"SPARSEFLOW_CUDA_DENSE_ABOVE must be a density, like 0.37 (above 1: never), not {text!r}") from None


def _stages(request: SolveRequest) -> int:
    return len(request.tableau.b)


def _offending(blame: Tensor, dim: int, tiles: list[int] | None, width: int) -> tuple[int, ...]:
    """The rows that are to blame, among all or among those of the tiles that stopped: those that are not finite; if there
    are none, those whose own error is too large. blame: [1 or 2, batch], sums of squares over a component's elements."""
    among = torch.ones(blame.shape[1], dtype=torch.bool)
    if tiles is not None:
        among[:] = False
        for tile in tiles:
            among[tile * width : (tile + 1) * width] = True
    bad = ~torch.isfinite(blame).all(0) & among
    if not bool(bad.any()):
        bad = (blame > torch.tensor([float(dim), 1.0], dtype=blame.dtype)[: len(blame), None]).any(0) & among
    return tuple(bad.nonzero()[:, 0].tolist())


def _image_bytes(field: VectorField) -> int:
    """What the program takes on the device at least (csrc/cuda/image.cpp): its weights and, where rows are sparse, 16
    bits for the column of each."""
    total = 0
    for layer in field.layers:
        pattern, item = layer.pattern, field.dtype.itemsize
        whole = pattern.density > _dense_above() and min(pattern.shape) > 1
        total += pattern.shape[0] * pattern.shape[1] * item if whole else pattern.nnz * (item + 2)
        total += pattern.shape[0] * item
    return total


@lru_cache
def _probe(native: Any) -> dict:
    return native.probe()
