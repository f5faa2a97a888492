"""One optimizer step: micro-batches, their mean gradient, clipping, the update; precision and compilation.

B sequences, T tokens of context, V words.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn import record_masked_share, weights_held
from bitquest.training.config import TrainSection
from bitquest.training.optim import AnyOptimizer

LossOf = Callable[[nn.Module, Tensor], Tensor]


def choose_device(name: str) -> torch.device:
    """The device `train.device` means. Raises ConfigError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but PyTorch sees no CUDA device here: use cpu or auto")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(name: str, device: torch.device) -> str:
    """float32 or bf16 for `train.precision`; auto is bf16 on a GPU that has it. ConfigError if the GPU lacks it."""
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16" and not has_bf16:
        raise ConfigError(f"train.precision is bf16, which {torch.cuda.get_device_name(device)} lacks: use float32")
    if name == "auto":
        return "bf16" if device.type == "cuda" and has_bf16 else "float32"
    return name


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """bf16 autocast, or a context that switches autocast off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def next_token_loss(model: nn.Module, window_BT1: Tensor) -> Tensor:
    """Mean nats per predicted token of int64 windows (B, T+1)."""
    logits_BTV = model(window_BT1[:, :-1])
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), window_BT1[:, 1:].flatten())


@dataclass(frozen=True)
class StepResult:
    """loss (nats per token) and grad_norm (before clipping), scalars still on the device; masked_share if recorded."""

    loss: Tensor
    grad_norm: Tensor
    masked_share: float | None

    def is_finite(self) -> bool:
        """Waits for the device."""
        return bool(torch.isfinite(self.loss + self.grad_norm))


class Stepper:
    """Takes optimizer steps on a model; nothing in it waits for the device unless the masked share is asked for.

    before_update(lr) is called when the gradients are there and the weights have not moved yet. loss_of(model, windows)
    is the mean loss to lower, `next_token_loss` if not given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer,
        section: TrainSection,
        clip: float,
        device: torch.device,
        before_update: Callable[[float], None] | None = None,
        loss_of: LossOf | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.accumulation, self.clip = section.accumulation, clip or float("inf")
        self.device, self._before_update = device, before_update
        self.precision = choose_precision(section.precision, device)
        self.compiled = section.compile
        # one shape, and an error instead of a silent return to eager: the model has no graph breaks
        loss_of = next_token_loss if loss_of is None else loss_of
        self._loss_of: LossOf = torch.compile(loss_of, dynamic=False, fullgraph=True) if section.compile else loss_of
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, windows_BT1: Tensor, lr: float, *, record: bool = False) -> StepResult:
        """One update from int64 windows (B, T+1), in `accumulation` equal parts whose gradients are averaged.

        record: also count the share of masked gradient elements, which waits for the device.
        """
        share = None
        if record and not self.compiled:
            with record_masked_share(self.model) as recorded:
                loss = self._gradients(windows_BT1)
            share = recorded.value
        else:
            if record:  # compiled code hides the masks: look at one sequence, uncompiled
                share = self._masked_share(windows_BT1[:1])
            loss = self._gradients(windows_BT1)
        grad_norm = nn.utils.clip_grad_norm_(self._parameters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self._before_update is not None:
            self._before_update(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm, share)

    def _gradients(self, windows_BT1: Tensor) -> Tensor:
        total = torch.zeros((), device=self.device)
        with weights_held(self.model):
            for part_BT1 in windows_BT1.chunk(self.accumulation):
                with autocast(self.device, self.precision):
                    loss = self._loss_of(self.model, part_BT1)
                torch.autograd.backward(loss / self.accumulation)
                total += loss.detach()
        return total / self.accumulation

    @torch.no_grad()
    def _masked_share(self, windows_BT1: Tensor) -> float:
        with record_masked_share(self.model) as recorded, autocast(self.device, self.precision):
            self.model(windows_BT1[:, :-1])
        return recorded.value
