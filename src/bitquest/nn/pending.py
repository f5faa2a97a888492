"""A layer's input before the last cheap step that makes it: a norm, or a gated product, left to the quantizing kernel.

The kernel that rotates and rounds an input reads every element anyway; given x and the norm's weight it can take the
norm on the way, and the normed tensor is never written. A model hands a `PendingInput` where it would hand the tensor
(models/fuse.py); quantized layers take either.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitquest.ops.rows import Prologue, apply_prologue


class PendingInput:
    """x (…, K) that is to be read behind `prologue`. Layers that read it share what they make of it."""

    def __init__(self, x: Tensor, prologue: Prologue) -> None:
        self.x, self.prologue = x, prologue
        self._made: dict[tuple[Any, ...], Any] = {}

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        """compute(), or what it gave another reader under the same key."""
        if key not in self._made:
            self._made[key] = compute()
        return self._made[key]

    def tensor(self) -> Tensor:
        """The tensor itself, in x's dtype, for readers that fuse nothing."""
        made: Tensor = self.once(("tensor",), lambda: apply_prologue(self.x, self.prologue).to(self.x.dtype))
        return made


def as_tensor(x: "Tensor | PendingInput") -> Tensor:
    return x.tensor() if isinstance(x, PendingInput) else x
