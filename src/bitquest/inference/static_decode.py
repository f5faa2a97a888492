"""Decoding one token at a time by replaying a captured CUDA graph: no Python, no allocation, no launches per layer.

A graph has fixed shapes, so attention runs over a window of the cache; there is one graph for each window that a text
grows into (256, 512, … positions). Capturing costs a few forward passes, so short texts stay with the first.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from bitquest.errors import DataError
from bitquest.inference.kv_cache import KVCache, WindowView
from bitquest.models import Llama
from bitquest.nn import PackedLinear, QuantizedEmbedding, QuantizedLinear
from bitquest.ops import Backend

SMALLEST_WINDOW = 256
_WARM_UP = 3  # passes before a capture: kernels are compiled, tuned and loaded, which no graph may contain


class Recording(Protocol):
    """Something recorded that can be run again."""

    def replay(self) -> None: ...


Record = Callable[[Callable[[], None]], Recording]


def record_cuda_graph(run: Callable[[], None]) -> Recording:
    """Warm up on a side stream, then capture."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class StaticDecoder:
    """Steps of one token on a filled cache. `step` returns logits (V,), valid until the next step."""

    def __init__(self, model: Llama, cache: KVCache, record: Record = record_cuda_graph) -> None:
        self.model, self.cache, self._record = model, cache, record
        device = cache.keys.device
        self._token = torch.zeros((cache.keys.shape[1], 1), dtype=torch.int64, device=device)
        self._view: WindowView | None = None
        self._recording: Recording | None = None
        self._logits_BTV: Tensor | None = None

    @staticmethod
    def refuses(model: Llama) -> str | None:
        """Why the model's steps cannot be captured, None if they can. The torch backend asks the host for tables."""
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                return f"{name} is quantized anew in every pass"
            if isinstance(module, PackedLinear) and module.running_backend == Backend.TORCH:
                return f"{name} runs on the torch backend"
        return None

    @torch.no_grad()
    def step(self, token: int) -> Tensor:
        """Feed one token at the next position. Raises DataError when the cache is full."""
        if self.cache.length >= self.cache.positions:
            raise DataError(
                f"the key-value cache holds {self.cache.positions} positions; {self.cache.length + 1} are needed"
            )
        if self._view is None or self.cache.length >= self._view.window:
            self._capture()
        assert self._view is not None and self._recording is not None
        self._token.fill_(token)
        self._view.position.fill_(self.cache.length)
        self._recording.replay()
        self.cache.advance(1)
        assert self._logits_BTV is not None
        return self._logits_BTV[0, -1]

    def _capture(self) -> None:
        window = SMALLEST_WINDOW
        while window <= self.cache.length:
            window *= 2
        # Warming up writes at the current position only, which the first step writes again.
        self._view = view = WindowView(self.cache, min(window, self.cache.positions))

        def run() -> None:
            self._logits_BTV = self.model(self._token, view)

        device = self.cache.keys.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._recording = self._record(run)
