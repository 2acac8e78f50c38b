"""A GPU in pretence, for machines without one: within `PretendGpu()` tensors on its device stay in the CPU's memory,
and refuse what CUDA tensors refuse.

It knows torch's rules of devices: operands of an operation are on one device, except that 0-d CPU tensors may take part
in elementwise operations and CPU indices in indexing; a CPU tensor takes no index from a GPU; a CPU generator draws
nothing on a GPU; numpy reads no GPU memory. It counts what makes the host wait for the device: numbers read back, sizes
that depend on values, and copies from and to pageable memory.

What it cannot show: the kernels of native engines (so engine="reference"), code that asks for the device type "cuda",
streams, memory, CUDA's rounding.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("privateuseone", 0)  # "pretend:0" once it is registered
CPU = torch.device("cpu")
aten = torch.ops.aten

_COPIES = {"copy", "copy_", "_copy_from", "_to_copy"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
_WITH_NUMBERS = {"where", "masked_fill", "masked_fill_", "fill", "fill_", "lerp"}  # take a 0-d tensor for a number
# Their results' sizes, or they themselves, wait for values on the device.
_WAITING = {
    "_local_scalar_dense": "item", "nonzero": "nonzero", "equal": "equal", "masked_select": "masked_select",
    "_unique2": "unique", "unique_dim": "unique", "unique_consecutive": "unique", "bincount": "bincount",
    "repeat_interleave": "repeat_interleave",
}  # fmt: skip


class PretendTensor(Tensor):
    """A tensor on the pretended GPU; `held` is its CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "PretendTensor":
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=GPU, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_) -> str:
        return f"PretendTensor({self.held!r})"

    def tolist(self):
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)
        self.held = new.held

    def __deepcopy__(self, memo: dict) -> Tensor:
        if id(self) not in memo:
            made = self.detach().clone()
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made, self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, PretendGpu.active)


def _held(value):
    """The value, or list or tuple of values, with CPU tensors (torch's pytree would take most of the time)."""
    if isinstance(value, PretendTensor):
        return value.held
    return type(value)(map(_held, value)) if type(value) in (list, tuple) else value


def _wrapped(value):
    if isinstance(value, Tensor):
        return PretendTensor(value)
    return type(value)(map(_wrapped, value)) if type(value) in (list, tuple) else value


def _tensors(values) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value)


def _is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == GPU.type


def _complaint(func, tensors: list[Tensor]) -> RuntimeError:
    places = ", ".join(f"{'gpu' if isinstance(t, PretendTensor) else 'cpu'} {list(t.shape)}" for t in tensors)
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, a GPU and the CPU! "
        f"({func}: {places})"
    )


def _check_devices(func, name: str, args: tuple, kwargs: dict) -> None:
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    here = [t for t in tensors if not isinstance(t, PretendTensor)]
    if name in _COPIES or not here or len(here) == len(tensors):
        return
    if name in _INDEXING:
        target, indices, *rest = args
        if not isinstance(target, PretendTensor):
            raise RuntimeError(f"{func}: indices should be on cpu, where the indexed tensor is")
        if any(isinstance(v, Tensor) and not isinstance(v, PretendTensor) and v.dim() for v in rest):
            raise _complaint(func, tensors)
        return
    numbers = torch.Tag.pointwise in func.tags or name in _WITH_NUMBERS
    written = func._schema.arguments and func._schema.arguments[0].alias_info is not None
    if not numbers or any(t.dim() for t in here) or (written and not isinstance(args[0], PretendTensor)):
        raise _complaint(func, tensors)


def _run(func, args: tuple, kwargs: dict, gpu: "PretendGpu | None"):
    name = func._schema.name.split("::")[1]
    outer = func.namespace not in ("aten", "prim", "prims")  # an operator that is made of others
    on_gpu = any(isinstance(t, PretendTensor) for t in (*_tensors(args), *_tensors(kwargs.values())))
    wanted = kwargs.get("device")
    if outer and on_gpu:
        raise NotImplementedError(f"{func}: the pretended GPU runs torch's own operations only")
    if on_gpu:
        _check_devices(func, name, args, kwargs)
    generator = kwargs.get("generator") or next((a for a in args if isinstance(a, torch.Generator)), None)
    to_gpu = _is_gpu(wanted) if wanted is not None else on_gpu
    if generator is not None and (to_gpu or on_gpu) and generator.device.type == "cpu":
        raise RuntimeError("Expected a generator on the GPU, found one on the CPU")
    if gpu is not None:
        gpu.count(func, name, args, kwargs, on_gpu, to_gpu)
    inner = {**kwargs, "device": CPU} if wanted is not None and _is_gpu(wanted) else kwargs
    if inner.get("pin_memory"):
        inner = {**inner, "pin_memory": False}
    out = func(*_held(args), **{key: _held(value) for key, value in inner.items()})
    if name == "copy_" and not isinstance(args[0], PretendTensor):
        return args[0]
    if not to_gpu:
        return out
    out = _wrapped(out)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_gpu else out


_library = torch.library.Library("aten", "IMPL", "PrivateUse1")  # lives as long as what is registered


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if PretendGpu.active is not None:
        PretendGpu.active.count(aten.copy_.default, "copy_", (target, source), {}, True, True)
    _held(target).copy_(_held(source))
    return target


@functools.cache
def _register() -> None:
    """Once per process, for good: torch has such a backend now."""
    compiler, root = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None:
        pytest.skip("the pretended GPU needs g++")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run(
            [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", source, "-o", library,
             f"-L{root / 'lib'}", "-lc10"], check=True,
        )  # fmt: skip
        ctypes.CDLL(str(library))
    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", _Backend())
    torch._C._acc.register_python_privateuseone_hook(_HOOKS)
    # torch.tensor(..., device=...) comes here past every mode
    _library.impl("empty_strided", lambda *a, device=None, **k: PretendTensor(torch.empty_strided(*a, **k, device=CPU)))
    _library.impl("_copy_from", _copy_from)


class _Backend:
    """The module torch.pretend, as far as torch looks into it."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


_HOOKS = _Hooks()


class PretendGpu(TorchDispatchMode):
    """The context in which there is such a GPU. waits: what made the host wait, by kind; places: and where."""

    active: "PretendGpu | None" = None
    device = GPU

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # it would import the compiler
        return False

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.places: collections.Counter[tuple[str, str]] = collections.Counter()

    def __enter__(self) -> "PretendGpu":
        _register()
        PretendGpu.active = self
        return super().__enter__()

    def __exit__(self, *error) -> None:
        PretendGpu.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self)

    def count(self, func, name: str, args: tuple, kwargs: dict, on_gpu: bool, to_gpu: bool) -> None:
        """Notes an operation that makes the host wait."""
        kind = None
        if name in _WAITING and on_gpu:
            kind = _WAITING[name]
            if name == "repeat_interleave" and kwargs.get("output_size") is not None:
                kind = None
        elif name in _INDEXING and on_gpu:
            if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
                kind = "index by a mask"
            elif any(isinstance(i, Tensor) and not isinstance(i, PretendTensor) for i in args[1]):
                kind = "copy to the device"  # of the indices
        elif name == "_to_copy" and on_gpu != to_gpu:
            kind = "copy to the device" if to_gpu else "copy to the host"
        elif name == "copy_" and isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor):
            kind = "copy to the device" if isinstance(args[0], PretendTensor) else "copy to the host"
        if kind is not None:
            self.waits[kind] += 1
            frame = sys._getframe()
            while frame is not None and "sparseflow_kernels" not in frame.f_code.co_filename:
                frame = frame.f_back
            place = f"{frame.f_code.co_filename.split('sparseflow_kernels/')[-1]}:{frame.f_lineno}" if frame else ""
            self.places[kind, place] += 1

    def reset(self) -> None:
        self.waits.clear()
        self.places.clear()

    def by_file(self) -> collections.Counter[tuple[str, str]]:
        """places without their lines."""
        found: collections.Counter[tuple[str, str]] = collections.Counter()
        for (kind, place), count in self.places.items():
            found[kind, place.split(":")[0]] += count
        return found
