"""The CUDA engine's part of streams, graphs and interruptions: by streams in pretence, which refuse what CUDA refuses,
and on a GPU by a graph that is recorded."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import DEVICE, F32, ON_GPU, TestedEngine, field_of, same_bits, states

from sparseflow_kernels.engines import cuda_device
from sparseflow_kernels.engines.cuda import CudaEngine


class Stream:
    """Notes who waits for whom, and refuses to while it is recorded."""

    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self.waits, self.recorded = name, waits, False

    def wait_stream(self, other: Stream) -> None:
        if self.recorded:
            raise RuntimeError("CUDA error: dependency created on uncaptured work in another stream")
        self.waits.append((self.name, other.name))


class Elsewhere(CudaEngine):
    device = torch.device("cuda", 0)


class Memory:
    """What an engine keeps on the device, as far as streams are concerned."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []  # of an image: those that have used it
        self.memory, self.readers = self, []

    def record_stream(self, stream: Stream) -> None:
        self.readers.append(stream.name)


@pytest.fixture
def waits() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def device(monkeypatch):
    """An engine's device in pretence, and what sets its present stream."""
    engine = object.__new__(Elsewhere)
    engine._streams, engine._images, engine._points = [], {"forward": Memory()}, ((0.0, 1.0), Memory())
    present = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: present[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: present[-1].recorded)
    return engine, present.append


def test_a_stream_that_is_recorded_waits_for_nobody(device, waits):
    engine, use = device
    first, second, recorded = (Stream(name, waits) for name in ("first", "second", "recorded"))
    recorded.recorded = True
    for stream in (first, recorded, second, first, recorded):
        use(stream)
        engine._on_this_stream()
    assert waits == [("second", "first")]
    assert engine._images["forward"].readers == ["first", "second"]
    recorded.recorded = False  # and used as it is, it waits like any other
    engine._on_this_stream()
    assert waits[1:] == [("recorded", "first"), ("recorded", "second")]


def test_times_at_hand_stay_for_the_stream_that_reads_them(device, waits):
    engine, use = device
    for name in ("first", "second"):
        use(Stream(name, waits))
        assert engine._on_the_device((0.0, 1.0)) is engine._points[1]
    assert engine._points[1].readers == ["first", "second"]


def test_an_interruption_allocates_nothing_and_is_said_until_it_is_heard(device, waits, monkeypatch):
    """The first word may be lost: the solve's memory is cleared when it begins."""
    engine, use = device
    use(Stream("solve", waits))
    said, pinned = [], []

    class Word:
        def copy_(self, source, non_blocking):
            assert non_blocking
            said.append(source)

    class Done:
        def record(self):
            pass

        def query(self):
            if not self.__dict__.setdefault("asked", False):
                self.asked = True
                raise KeyboardInterrupt
            return len(said) == 3

    class Aside:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda word: pinned.append(1) or word)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("aside", waits))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Aside())
    monkeypatch.setattr(torch.cuda, "Event", Done)
    cuda_device.interrupter.cache_clear()
    try:
        for _ in range(2):
            said.clear()
            with pytest.raises(KeyboardInterrupt):
                engine._wait(Word())
            assert len(said) == 3 and bool((said[0] == 1).all())
    finally:
        cuda_device.interrupter.cache_clear()
    assert len(pinned) == 1 and waits == [("solve", "aside")] * 2


@pytest.mark.skipif(not ON_GPU, reason="a graph is recorded on a GPU")
def test_an_evaluation_is_recorded_on_a_stream_the_engine_has_not_seen():
    engine = TestedEngine(field_of(dtype=F32))
    x, _ = states(33, engine.dim, F32)
    want = engine.evaluate(torch.tensor(0.25, device=DEVICE), x)
    at, place = torch.tensor(0.75, device=DEVICE), x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        found = engine.evaluate(at, place)
    at.fill_(0.25)
    graph.replay()
    same_bits(found, want)
