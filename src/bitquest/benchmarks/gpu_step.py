"""The whole training step of a preset, compiled: bf16, our layers, and the paper's quantizer in turn.

A step is forward, loss, backward, clipping and AdamW under bfloat16 autocast on float32 parameters, the Stepper of
`bitquest train`. Words are random; weights are those of a new model.
"""

import copy
import traceback
from typing import Any, cast

import torch
from torch import Tensor

from bitquest.benchmarks.gpu_check import (
    LAYER_ERROR,
    MODEL_ERROR,
    gradients,
    relative_error,
    require,
    without_tuning,
)
from bitquest.benchmarks.gpu_context import Context, training_backend
from bitquest.benchmarks.gpu_layers import Emit
from bitquest.benchmarks.gpu_table import Job
from bitquest.benchmarks.gpu_timing import Call, compare
from bitquest.benchmarks.paper_quantizer import paper_
from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.models.llama import INIT_SIGMA
from bitquest.nn import QuantizedLinear, quantize_
from bitquest.nn.pending import as_tensor
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
    with without_tuning():
        checks = _check(plain, job.scheme, windows, context)
    context.free()
    ours_model = fuse_(quantize_(copy.deepcopy(plain), job.scheme, backend=context.backend))
    backend = training_backend(next(m for m in ours_model.modules() if isinstance(m, QuantizedLinear)))
    with torch.no_grad(), torch.autocast(context.device.type, torch.bfloat16):
        eager_loss = float(next_token_loss(ours_model, windows))
    compiled, outcome = is_compiled(context), {}
    ours = _Steps(ours_model, windows, compiled)
    try:
        compiled_loss = float(ours.once())
    except torch._dynamo.exc.TorchDynamoException as error:  # what follows is for information: no row is met by it
        traceback.print_exc()
        compiled, outcome = False, {"status": "failed", "reason": f"torch.compile: {str(error).splitlines()[0]}"}
        ours = _Steps(ours_model, windows, compiled)
    else:
        require("loss, compiled against uncompiled", abs(compiled_loss / eager_loss - 1), _LOSS_ERROR, checks)
    bf16 = _Steps(copy.deepcopy(plain), windows, compiled)

    def measured(steps: dict[str, _Steps], baseline: str) -> dict[str, Any]:
        row = _compare(steps, baseline, compiled, backend, context)
        if outcome:
            row["memory"] = "uncompiled"
        return {"rows": [row], "checks": checks, **outcome}

    emit(job.rows[0], measured({"bf16": bf16, "ours": ours}, "bf16"))
    del bf16
    context.free()
    paper = _Steps(paper_(copy.deepcopy(plain), job.scheme), windows, False)
    emit(job.rows[1], measured({"paper": paper, "ours": ours}, "paper"))


def is_compiled(context: Context) -> bool:
    """Whether the step is compiled: on a GPU, where it counts."""
    return context.device.type == "cuda"


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
    """A short text in float32, uncompiled: every layer on its own input and gradient, then logits and all gradients."""
    few = windows[:1, : min(windows.shape[1], 129)]
    ours = fuse_(quantize_(copy.deepcopy(plain), scheme, backend=context.backend))
    theirs = quantize_(copy.deepcopy(plain), scheme, backend="torch")
    seen = _run_watched(ours, few)
    checks: dict[str, Any] = {}
    outputs, weights = {}, {}
    for name, (x, y, gradient) in seen.items():
        reference, layer = theirs.get_submodule(name), ours.get_submodule(name)
        expected = reference(x)
        torch.autograd.backward(expected, gradient)
        outputs[name] = relative_error(y, expected)
        weights[name] = relative_error(cast(Tensor, layer.weight.grad), cast(Tensor, reference.weight.grad))
    for what, errors in (("outputs", outputs), ("weights' gradients", weights)):
        worst = max(errors, key=lambda name: errors[name])
        require(f"{what} of {len(errors)} layers, the worst in {worst}", errors[worst], LAYER_ERROR, checks)
    theirs.zero_grad(set_to_none=True)
    torch.autograd.backward(next_token_loss(theirs, few))
    with torch.no_grad():
        require("logits", relative_error(ours(few[:, :-1]), theirs(few[:, :-1])), MODEL_ERROR, checks)
    found, expected_ = gradients(ours), gradients(theirs)
    errors = {name: relative_error(found[name], expected_[name]) for name in expected_}
    worst = max(errors, key=lambda name: errors[name])
    require(f"gradients, the worst that of {worst}", errors[worst], 1.5 * MODEL_ERROR, checks)
    return checks


def _run_watched(model: torch.nn.Module, windows: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Loss and backward pass; each quantized layer's input, output and the gradient of the output, by name."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    handles = []

    def watch(name: str, layer: QuantizedLinear) -> None:
        def hook(_: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, y = as_tensor(inputs[0]).detach(), output.detach()
            output.register_hook(lambda gradient: seen.update({name: (x, y, gradient)}))  # type: ignore[no-untyped-call]

        handles.append(layer.register_forward_hook(hook))

    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            watch(name, module)
    torch.autograd.backward(next_token_loss(model, windows))
    for handle in handles:
        handle.remove()
    return seen


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
