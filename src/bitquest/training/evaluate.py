"""The loss loop on held-out tokens, used while training and by everything that evaluates afterwards.

B sequences, T tokens of context, V words.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HeldOutLoss:
    """Summed negative log-likelihood in nats, and over how many predicted tokens."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Bits per UTF-8 byte, for text that has so many bytes per token."""
        return self.loss / math.log(2) / bytes_per_token


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    windows: Iterable[Tensor],
    device: torch.device,
    autocast: AbstractContextManager[object] | None = None,
) -> HeldOutLoss:
    """Loss of `model(tokens_BT) -> logits_BTV` on int64 windows (B, T+1); in eval mode, summed in float64.

    The sum stays on the device until the end. The model's mode is put back.
    """
    was_training = model.training
    model.eval()
    nats, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for window_BT1 in windows:
            window_BT1 = window_BT1.to(device)
            with autocast if autocast is not None else nullcontext():
                logits_BTV = model(window_BT1[:, :-1])
            target_BT = window_BT1[:, 1:]
            losses = F.cross_entropy(logits_BTV.float().flatten(0, 1), target_BT.flatten(), reduction="none")
            nats += losses.double().sum()
            tokens += target_BT.numel()
    finally:
        model.train(was_training)
    return HeldOutLoss(nats.item(), tokens)
