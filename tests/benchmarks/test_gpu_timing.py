"""Bursts on a GPU, without one: what is captured, how often, and what happens where a capture fails."""

import contextlib
import importlib.util

import pytest
import torch

from bitquest.benchmarks.gpu_timing import compare, prepare, seconds_of

GPU = torch.device("cuda")


class FakeGPU:
    """Time passes when work is launched: `cost` seconds a call; a graph replays what was called while it captured."""

    def __init__(self, cost):
        self.now, self.cost, self.capturing, self.launches, self.refuses = 0.0, cost, None, 0, False

    def call(self):
        self.launches += 1
        if self.capturing is not None:
            if self.refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            self.capturing.append(self.cost)
        else:
            self.now += self.cost

    def event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()

    def graph_class(self):
        gpu = self

        class Graph:
            def __init__(self):
                self.calls = []

            def replay(self):
                gpu.now += sum(self.calls)

        return Graph

    @contextlib.contextmanager
    def capture(self, graph):
        self.capturing = graph.calls
        try:
            yield
        finally:
            self.capturing = None


@pytest.fixture
def fake(monkeypatch):
    def make(cost):
        gpu = FakeGPU(cost)

        class Stream:
            def wait_stream(self, _):
                pass

        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", gpu.graph_class())
        monkeypatch.setattr(torch.cuda, "graph", gpu.capture)
        return gpu

    return make


@pytest.mark.parametrize(("cost", "copies", "passes"), [(1.1e-5, 4, 23), (3e-4, 2, 2), (5e-3, 3, 1), (1e-9, 1, 256)])
def test_a_burst_is_a_graph_of_a_millisecond(fake, cost, copies, passes):
    gpu = fake(cost)
    burst = prepare([gpu.call] * copies, GPU)
    assert (burst.graph, burst.calls, burst.note) == (True, copies * passes, "")
    before, launched = gpu.now, gpu.launches
    burst.run()
    assert gpu.now - before == pytest.approx(cost * copies * passes)
    assert gpu.launches == launched  # a replay launches nothing from Python
    assert seconds_of([gpu.call] * copies, 3, GPU).median == pytest.approx(cost)


def test_without_a_graph_calls_are_launched(fake):
    gpu = fake(1e-4)
    burst = prepare([gpu.call], GPU, graph=False)
    launched = gpu.launches
    burst.run()
    assert (burst.graph, burst.calls) == (False, 10)
    assert gpu.launches - launched == 10


def test_a_capture_that_fails_is_noted(fake):
    gpu = fake(1e-4)
    gpu.refuses = True
    found = compare({"bf16": [gpu.call], "ours": [gpu.call]}, "bf16", 2, GPU)
    assert found["ours"]["cuda_graph"] is False
    assert found["ours"]["note"] == ("not captured as a CUDA graph: operation not permitted when stream is capturing")
    assert found["ours"]["speedup_of_medians"] == pytest.approx(1)


@pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="NVRTC is not installed")
def test_the_empty_kernel_compiles():
    from bitquest.benchmarks.gpu_floors import _EMPTY_KERNEL
    from bitquest.ops.cuda.nvrtc import load_nvrtc

    assert load_nvrtc().compile(_EMPTY_KERNEL, name="empty.cu", architecture="sm_90")[:4] == b"\x7fELF"
