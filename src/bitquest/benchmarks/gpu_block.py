"""Training the linear layers of one block, forward and backward, against the same layers in bfloat16.

q, k, v, o, gate, up and down as in a Llama block: q, k, v read one tensor, and so do gate and up. Weights are bfloat16
on both sides; each pass quantizes every weight once, as an optimizer step of one micro-batch does. Norms, attention and
SwiGLU are left out on both sides.

T tokens, D width, F hidden width.
"""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from bitquest.benchmarks.gpu_check import check_training, gradients
from bitquest.benchmarks.gpu_context import Context, training_backend
from bitquest.benchmarks.gpu_layers import Emit
from bitquest.benchmarks.gpu_table import Job
from bitquest.benchmarks.gpu_timing import compare
from bitquest.nn import QuantizedLinear, quantize_
from bitquest.nn.integer_training import weights_held

_READS = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}


class BlockLinears(nn.Module):
    """The seven layers, by name; `forward` takes the four tensors that they read."""

    def __init__(self, width: int, hidden: int, device: torch.device, generator: torch.Generator) -> None:
        super().__init__()
        shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        for name in _READS:
            k, n = shapes.get(name, (width, width))
            linear = nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16)
            with torch.no_grad():
                linear.weight.normal_(0.0, k**-0.5, generator=generator)
            self.add_module(name, linear)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [cast(nn.Module, getattr(self, name))(inputs[number]) for name, number in _READS.items()]


class _Data:
    """Inputs that want gradients, and the gradients that come back, in bfloat16."""

    def __init__(self, tokens: int, width: int, hidden: int, context: Context) -> None:
        def normal(columns: int) -> Tensor:
            made = torch.empty(tokens, columns, device=context.device, dtype=torch.bfloat16)
            return made.normal_(generator=context.generator)

        self.inputs = [normal(columns).requires_grad_() for columns in (width, width, width, hidden)]
        self.gradients = [normal(hidden if name in ("gate_proj", "up_proj") else width) for name in _READS]

    def of(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Copies in another dtype, with the same values."""
        return [x.detach().to(dtype).requires_grad_() for x in self.inputs], [g.to(dtype) for g in self.gradients]


def _run(block: nn.Module, inputs: list[Tensor], gradients_: list[Tensor], backward: bool = True) -> list[Tensor]:
    """One pass. Layers see views, as they would see what a norm made: what is no leaf is shared by its readers."""
    block.zero_grad(set_to_none=True)
    for x in inputs:
        x.grad = None
    with weights_held(block):
        outputs = block([x.view_as(x) for x in inputs])
        if backward:
            torch.autograd.backward(outputs, gradients_)
    return cast(list[Tensor], outputs)


def _check(plain: BlockLinears, ours: nn.Module, data: _Data, scheme: str) -> dict[str, Any]:
    """Outputs and gradients against fake quantization in float32."""
    found = _run(ours, data.inputs, data.gradients)
    reference = quantize_(copy.deepcopy(plain).float(), scheme, backend="torch")
    inputs, given = data.of(torch.float32)
    expected = _run(reference, inputs, given)
    triples = [(f"output of {name}", a, b) for name, a, b in zip(_READS, found, expected, strict=True)]
    for number, (a, b) in enumerate(zip(data.inputs, inputs, strict=True)):
        assert a.grad is not None
        assert b.grad is not None
        triples.append((f"gradient of input {number}", a.grad, b.grad))
    theirs = gradients(reference)
    triples += [(f"gradient of {name}", gradient, theirs[name]) for name, gradient in gradients(ours).items()]
    return check_training(triples)


def block(job: Job, context: Context, emit: Emit) -> None:
    """Forward and backward of the seven layers, and forward alone."""
    sizes = context.sizes
    plain = BlockLinears(sizes.block_width, sizes.block_hidden, context.device, context.generator)
    ours = quantize_(copy.deepcopy(plain), job.scheme, backend=context.backend)
    backends = {training_backend(m) for m in ours.modules() if isinstance(m, QuantizedLinear)}
    data = _Data(sizes.block_tokens, sizes.block_width, sizes.block_hidden, context)
    checks = _check(plain, ours, data, job.scheme)
    context.free()
    rows = []
    for part, backward in (("forward and backward", True), ("forward", False)):
        times = compare(
            {
                "bf16": [_pass(plain, data, backward)],
                "ours": [_pass(ours, data, backward)],
            },
            "bf16",
            context.rounds,
            context.device,
            graph=False,
        )
        weights = sum(p.numel() for p in plain.parameters())
        operations = (6 if backward else 2) * weights * sizes.block_tokens
        found = {
            "shape": f"{sizes.block_tokens} tokens, {part}",
            "memory": "past the L2" if backward else "forward only",
            "backend": " and ".join(sorted(backends)),
            "operations": operations,
            "operations_per_second": operations / times["ours"]["median_seconds"],
        }
        rows.append(found | times)
    emit(job.rows[0], {"rows": rows, "checks": checks})


def _pass(module: nn.Module, data: _Data, backward: bool) -> Callable[[], object]:
    return lambda: _run(module, data.inputs, data.gradients, backward)
