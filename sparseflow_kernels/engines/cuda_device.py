"""What every launch of the CUDA engines needs: the device's limits, images of programs in its memory, streams, and errors
said in words. All memory is torch's, work goes to torch's current stream."""

from __future__ import annotations

import itertools
import time
from functools import lru_cache
from typing import Any, Callable, ClassVar

import torch
from torch import Tensor

from ..build_info import cuda_obstacle
from ..divergence import DivergencePlan
from ..field import GraphField, VectorField
from ..numerics.tableaus import FixedTableau, Tableau
from .native import NativeEngine, native_tableau

IMAGE_BYTES = 2**31 - 16  # of a program
BUILDERS = {torch.float32: "BuilderF32", torch.float64: "BuilderF64"}


class DeviceError(RuntimeError):
    """A launch failed, or what it left behind: the message says which, and whether the process can go on."""


class DeviceImage:
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

    def renew(self, renew: Callable[[DeviceImage], None]) -> None:
        """renew: tells the new numbers, always in the same order."""
        self._collected, self._places = [], []
        renew(self)
        if not self._collected:
            return
        if self._map is None:
            sizes = [0, *itertools.accumulate(values.numel() for values in self._collected)]
            place = torch.cat([place for place, _ in self._places])
            entry = torch.cat([entry + first for (_, entry), first in zip(self._places, sizes)])
            self._map = place.to(self.memory.device), entry.to(self.memory.device)
        place, entry = self._map
        self._numbers[place] = torch.cat(self._collected).to(self._numbers.dtype)[entry]
        self._collected = []

    # as writers of programs call them

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

    def set_vector(self, vector: int, values: Tensor) -> None:
        self._collected.append(values.detach().flatten())
        if self._map is None:
            entry = torch.arange(values.numel())
            self._places.append((self.image.vector_place(vector) + entry, entry))


class CudaDevice(NativeEngine):
    """An engine on a CUDA device, and what it says to it."""

    name: ClassVar[str] = "cuda"
    device_type: ClassVar[str] = "cuda"

    @staticmethod
    def native():
        from .. import _cuda  # late: most installations have no GPU

        return _cuda

    @classmethod
    def _unready(cls, field: VectorField | GraphField) -> str | None:
        """Why no field of this device and dtype runs here; None if it may."""
        try:
            native = cls.native()
        except ImportError as error:
            return (
                f"the CUDA extension is not built ({error}); install the package where nvcc 12 or newer is found, with "
                "SPARSEFLOW_CUDA=on"
            )
        if field.device.type != cls.device_type:
            return f"the field is on {field.device}, the cuda engine needs it on a GPU: call .cuda()"
        if field.dtype not in BUILDERS:
            return f"the cuda engine computes in float32 and float64, not {field.dtype}: call .float() or .double()"
        return cuda_obstacle(probe(native), field.device.index or 0)

    @classmethod
    def _limits_of(cls, device: torch.device) -> dict:
        return probe(cls.native())["devices"][device.index or 0]

    def __init__(self, field: VectorField | GraphField, plan: DivergencePlan | None = None) -> None:
        super().__init__(field, plan)
        self._module = self.native()
        self._index = field.device.index or 0
        self._limits = self._limits_of(field.device)
        self._images: dict[str, DeviceImage] = {}
        self._streams: list[Any] = []
        self._tableaus: dict[int, tuple] = {}
        self._events: tuple[Any, Any] | None = None  # between which a launch is timed
        self._points: tuple[tuple[float, ...], Tensor] = (), torch.empty(0)
        if self.device.type == "cuda":
            interrupter(self.device)

    # ---- images

    def _image(self, kind: str) -> DeviceImage:
        """The image of the "forward" or the "adjoint" program."""
        if kind not in self._images:
            image = self._write_image(kind)
            self._images[kind] = DeviceImage(image, self.device, self.dtype)
            self._on_this_stream()  # which writes the image
        return self._images[kind]

    def _write_image(self, kind: str) -> Any:
        raise NotImplementedError

    def _renew_images(self, renew: Callable[[str, DeviceImage], None]) -> None:
        """Writes new numbers into the images, behind all launches that read the old ones."""
        self._on_this_stream()
        present = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        others = [stream for stream in self._streams if stream != present]
        for other in others:  # what was launched there reads the old numbers
            present.wait_stream(other)
        for kind, image in self._images.items():
            image.renew(lambda to, kind=kind: renew(kind, to))
        for other in others:
            other.wait_stream(present)

    # ---- streams, launches, memory

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _time(self, t: Tensor | float) -> tuple[Tensor | None, float]:
        """A time that is on the device stays there."""
        if isinstance(t, Tensor) and t.device.type == self.device.type and self.device.type == "cuda":
            return t.detach().to(self.dtype).reshape(1).contiguous(), 0.0
        return None, float(t)

    def _launch(self, function: Any, *arguments: Any, **more: Any) -> None:
        self._on_this_stream()
        try:
            if self._events is not None:
                self._events[0].record()
            function(*arguments, **more)
            if self._events is not None:
                self._events[1].record()
        except RuntimeError as error:
            raise DeviceError(f"engine 'cuda': {error}") from error

    def _launch_seconds(self, run: Callable[[], Any]) -> float:
        """Of the launch that `run` makes, the last one, by the device's events."""
        begin, end = self._events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            run()
        finally:
            self._events = None
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

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
            word, stream = interrupter(self.device)
            with torch.cuda.stream(stream):
                while not done.query():  # again, if the solve had not begun: its memory is cleared at the beginning
                    stop.copy_(word, non_blocking=True)  # by the copy engine: the kernel may hold all multiprocessors
                    time.sleep(0.001)
            torch.cuda.current_stream(self.device).wait_stream(stream)  # the last copy, before the memory is given away
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
        """The present stream joins those that use the images: their memory is not given away, and new numbers wait.

        While a CUDA graph is recorded no stream can wait for what is not recorded; whoever records has waited for the
        device before (`torch.cuda.graph` does), and the graph may run on any stream."""
        if self.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        if stream not in self._streams:
            for other in self._streams:
                stream.wait_stream(other)  # what was written there may still be on its way
            self._streams.append(stream)
        for image in self._images.values():
            if stream not in image.streams:
                image.streams.append(stream)
                image.memory.record_stream(stream)

    def _tableau(self, tableau: Tableau | FixedTableau) -> Any:
        if id(tableau) not in self._tableaus:  # kept beside it, so that no other one gets its id
            self._tableaus[id(tableau)] = tableau, self._module.Tableau(native_tableau(tableau))
        return self._tableaus[id(tableau)][1]

    def _on_the_device(self, points: tuple[float, ...]) -> Tensor:
        """Points of time, float64; the last ones asked for are at hand, and cost no copy."""
        if points != self._points[0]:
            self._points = points, torch.tensor(points, dtype=torch.float64, device=self.device)
        found = self._points[1]
        if self.device.type == "cuda":  # others may take their place while a kernel of this stream still reads these
            found.record_stream(torch.cuda.current_stream(self.device))
        return found


@lru_cache
def interrupter(device: torch.device) -> tuple[Tensor, Any]:
    """A word that ends a solve, where the copy engine reads it, and a stream of its own to send it by. Made before a
    kernel runs: memory cannot be pinned beside one."""
    return torch.ones(4, dtype=torch.uint8).pin_memory(), torch.cuda.Stream(device)


@lru_cache
def probe(native: Any) -> dict:
    return native.probe()
