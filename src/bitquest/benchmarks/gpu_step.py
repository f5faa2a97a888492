"""The whole training step of a preset, compiled: bf16, our layers, and the paper's quantizer in turn.

A step is forward, loss, backward, clipping and AdamW under bfloat16 autocast on float32 parameters, the Stepper of
`bitquest train`. Words are random; weights are those of a new model.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from bitquest.benchmarks.gpu_check import MODEL_ERROR, WrongResultError, check_training, gradients
from bitquest.benchmarks.gpu_context import Context, training_backend
from bitquest.benchmarks.gpu_layers import Emit
from bitquest.benchmarks.gpu_table import Job
from bitquest.benchmarks.gpu_timing import Call, compare
from bitquest.benchmarks.paper_quantizer import paper_
from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.models.llama import INIT_SIGMA
from bitquest.nn import QuantizedLinear, quantize_
from bitquest.training.config import OptimizerSection, TrainSection
from bitquest.training.optim import make_optimizer
from bitquest.training.step import Stepper, next_token_loss

_LEARNING_RATE = 1e-5  # small: the weights change, and the losses stay comparable
_LOSS_ERROR = 5e-3


def step(job: Job, context: Context, emit: Emit) -> None:
    """Both rows of the whole step: against bf16, then against the paper's quantizer on what memory is left."""
    sizes = context.sizes
    plain = _new_model(context)
    windows = torch.randint(0, sizes.vocabulary, (sizes.step_batch, sizes.step_context + 1), device=context.device)
    checks = _check(plain, job.scheme, windows, context)
    compiled = context.device.type == "cuda"
    ours_model = fuse_(quantize_(copy.deepcopy(plain), job.scheme, backend=context.backend))
    backend = training_backend(next(m for m in ours_model.modules() if isinstance(m, QuantizedLinear)))
    with torch.no_grad(), torch.autocast(context.device.type, torch.bfloat16):
        eager_loss = float(next_token_loss(ours_model, windows))
    ours = _Steps(ours_model, windows, compiled)
    compiled_loss = float(ours.once())
    checks["compiled loss against eager"] = {"found": abs(compiled_loss / eager_loss - 1), "allowed": _LOSS_ERROR}
    if not abs(compiled_loss / eager_loss - 1) <= _LOSS_ERROR:
        raise WrongResultError(f"the compiled model's loss is {compiled_loss:.5f}, and {eager_loss:.5f} is right")
    bf16 = _Steps(copy.deepcopy(plain), windows, compiled)
    emit(
        job.rows[0],
        {"rows": [_compare({"bf16": bf16, "ours": ours}, "bf16", compiled, backend, context)], "checks": checks},
    )
    del bf16
    context.free()
    paper = _Steps(paper_(copy.deepcopy(plain), job.scheme), windows, False)
    row = _compare({"paper": paper, "ours": ours}, "paper", compiled, backend, context)
    emit(job.rows[1], {"rows": [row], "checks": checks})


def _new_model(context: Context) -> Llama:
    sizes = context.sizes
    config = LlamaConfig.preset(sizes.preset, vocab_size=sizes.vocabulary, max_position_embeddings=sizes.step_context)
    with context.device:
        model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, INIT_SIGMA, generator=context.generator)
    return model


def _check(plain: Llama, scheme: str, windows: Tensor, context: Context) -> dict[str, Any]:
    """Loss, logits and gradients of a short text in float32, uncompiled, against the reference."""
    few = windows[:1, : min(windows.shape[1], 129)]
    found = []
    for backend in (context.backend, "torch"):
        model = quantize_(copy.deepcopy(plain), scheme, backend=backend)
        if backend != "torch":
            fuse_(model)
        torch.autograd.backward(next_token_loss(model, few))
        with torch.no_grad():
            found.append((model(few[:, :-1]), gradients(model)))
        del model
    (logits, ours), (expected, theirs) = found
    all_of_ours = torch.cat([gradient.flatten() for gradient in ours.values()])
    all_of_theirs = torch.cat([theirs[name].flatten() for name in ours])
    return check_training([("logits", logits, expected), ("gradients", all_of_ours, all_of_theirs)], MODEL_ERROR)


class _Steps:
    """A model that takes one step at each call."""

    def __init__(self, model: torch.nn.Module, windows: Tensor, compiled: bool) -> None:
        optimizer = make_optimizer(model, OptimizerSection())
        section = TrainSection(batch_size=windows.shape[0], precision="bf16", compile=compiled)
        self._stepper = Stepper(model, optimizer, section, 1.0, windows.device)
        self._windows = windows

    def once(self) -> Tensor:
        """The loss before the step."""
        return self._stepper.step(self._windows, _LEARNING_RATE).loss


def _compare(steps: dict[str, _Steps], baseline: str, compiled: bool, backend: str, context: Context) -> dict[str, Any]:
    calls: dict[str, list[Call]] = {name: [taken.once] for name, taken in steps.items()}
    rounds = max(3, context.rounds // 2) if context.rounds > 1 else 1
    times = compare(calls, baseline, rounds, context.device, graph=False)
    tokens = context.sizes.step_batch * context.sizes.step_context
    return {
        "shape": f"{context.sizes.preset}, {tokens} tokens",
        "memory": "past the L2",
        "compiled": compiled,
        "backend": backend,
        "tokens_per_second": tokens / times["ours"]["median_seconds"],
    } | times
