"""Packed layers against bf16 products: prefill, square products, and decoding of one token.

T tokens, K in_features, N out_features.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.benchmarks.gpu_check import check_packed
from bitquest.benchmarks.gpu_context import Context, packed_backend
from bitquest.benchmarks.gpu_table import Job
from bitquest.benchmarks.gpu_timing import compare
from bitquest.nn import PackedLinear, pack_, quantize_

Emit = Callable[[str, dict[str, Any]], None]

_MOST_COPIES = 12


def prefill(job: Job, context: Context, emit: Emit) -> None:
    """A layer of each 7B shape on thousands of tokens."""
    shapes = [(context.sizes.tokens, k, n) for k, n in context.sizes.prefill]
    emit(job.rows[0], measure_layers(job.scheme, shapes, context))


def square(job: Job, context: Context, emit: Emit) -> None:
    """One product of three equal sides."""
    side = dict(context.sizes.squares)[job.size]
    emit(job.rows[0], measure_layers(job.scheme, [(side, side, side)], context))


def decode(job: Job, context: Context, emit: Emit) -> None:
    """One token through one large layer."""
    k, n = context.sizes.decode
    emit(job.rows[0], measure_layers(job.scheme, [(1, k, n)], context))


def measure_layers(scheme: str, shapes: Sequence[tuple[int, int, int]], context: Context) -> dict[str, Any]:
    """Check and time a layer of `scheme` at each (T, K, N)."""
    rows, checks = [], {}
    for tokens, k, n in shapes:
        name = f"{tokens}×{k}×{n}"
        sets = _Sets(scheme, tokens, k, n, context)
        checks[name] = check_packed(sets.packed[0], sets.inputs[0])
        rows += [{"shape": name, **row} for row in sets.measure(context.rounds)]
        del sets
        context.free()
    return {"rows": rows, "checks": checks}


class _Sets:
    """Weights and inputs in as many copies as it takes to pass the L2 between two uses of one."""

    def __init__(self, scheme: str, tokens: int, k: int, n: int, context: Context) -> None:
        self.context, self.scheme = context, scheme
        self.work = {"operations": 2 * tokens * k * n, "tokens": tokens, "in_features": k, "out_features": n}
        self.floats: list[Tensor] = []
        self.packed: list[PackedLinear] = []
        self.inputs: list[Tensor] = []
        copies = 1
        while len(self.inputs) < copies:
            self._add(tokens, k, n)
            copies = self._copies(tokens, n)
        self.backend = packed_backend(self.packed[0])

    def _add(self, tokens: int, k: int, n: int) -> None:
        context = self.context
        with torch.no_grad():
            linear = nn.Linear(k, n, bias=False, device=context.device, dtype=torch.bfloat16)
            linear.weight.normal_(0.0, k**-0.5, generator=context.generator)
            self.floats.append(linear.weight.detach())
            trained = quantize_(nn.Sequential(linear), self.scheme, backend="torch")
            layer = pack_(trained, backend=context.backend)[0]  # type: ignore[index]
            assert isinstance(layer, PackedLinear)
            self.packed.append(layer)
            x = torch.empty(tokens, k, device=context.device, dtype=torch.bfloat16)
            self.inputs.append(x.normal_(generator=context.generator))

    def _copies(self, tokens: int, n: int) -> int:
        """Three times the L2 lies between two uses of one copy, by the least that the packed layer reads and writes."""
        codes = self.packed[0].packed
        assert codes is not None
        self.work["bytes"] = codes.numel() + 2 * (self.inputs[0].numel() + tokens * n)
        return min(_MOST_COPIES, max(2, math.ceil(3 * self.context.l2_bytes / self.work["bytes"])))

    def measure(self, rounds: int) -> list[dict[str, Any]]:
        """Past the L2, which counts; one copy, found in the L2 where it fits; and launched from Python one by one."""
        found = []
        one = slice(0, 1)
        for memory, part, graph in (("past the L2", slice(None), True), ("L2-warm", one, True), ("eager", one, False)):
            device = self.context.device
            with torch.no_grad():
                times = compare(
                    {
                        "bf16": [_bf16(x, w) for x, w in zip(self.inputs[part], self.floats[part], strict=True)],
                        "ours": [_call(m, x) for m, x in zip(self.packed[part], self.inputs[part], strict=True)],
                    },
                    "bf16",
                    rounds,
                    device,
                    graph,
                )
            seconds = times["ours"]["median_seconds"]
            rates = {
                "operations_per_second": self.work["operations"] / seconds,
                "bytes_per_second": self.work["bytes"] / seconds,
            }
            copies = len(self.inputs[part])
            found.append({"memory": memory, "copies": copies, "backend": self.backend, **self.work, **rates} | times)
        return found


def _bf16(x: Tensor, w: Tensor) -> Callable[[], object]:
    return lambda: F.linear(x, w)


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)
