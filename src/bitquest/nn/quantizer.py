"""What a layer holds for each operand: the frozen quantizer, and whatever is learned or cached."""

import ctypes
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bitquest.errors import ConfigError
from bitquest.numerics.fake_quant import Encoded, encode, fit_offset
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import NoRotation, Rotation
from bitquest.numerics.scaling import EPSILON, Learned
from bitquest.ops.engine import bits_to_mask
from bitquest.ops.registry import fake_quantize_backward_op, fake_quantize_op, quantizer_text, rotate_op
from bitquest.ops.rows import QuantizedRows

# --- the share of masked gradients ---------------------------------------------------------------------------------


class MaskedShare:
    """Counts, over everything a model quantizes while it records, the elements whose gradient the estimator masks."""

    def __init__(self, model: nn.Module) -> None:
        self.members = {id(module) for module in model.modules()}
        self._passed: list[Tensor] = []
        self._elements = 0

    def add(self, mask: Tensor, elements: int) -> None:
        self._passed.append(mask.sum() if mask.numel() else torch.tensor(elements))
        self._elements += elements

    @property
    def value(self) -> float:
        """Masked elements / all elements, weights and activations together; 0 where nothing was quantized."""
        if not self._elements:
            return 0.0
        return 1 - sum(int(passed) for passed in self._passed) / self._elements


_recording: list[MaskedShare] = []


@contextmanager
def record_masked_share(model: nn.Module) -> Iterator[MaskedShare]:
    """Record the share of masked gradient elements of the model's forward passes inside; torch.compile hides them."""
    share = MaskedShare(model)
    _recording.append(share)
    try:
        yield share
    finally:
        _recording.remove(share)


def _record(operand: nn.Module, mask: Tensor, elements: int) -> None:
    for share in _recording:
        if id(operand) in share.members:
            share.add(mask, elements)


def is_recording() -> bool:
    """Whether somebody wants to know the share of masked gradients."""
    return bool(_recording)


def record_rows(operand: nn.Module, rows: QuantizedRows, width: int) -> None:
    """Record rows (T, width) whose mask is bits."""
    assert rows.mask is not None
    tokens = next(part for part in (rows.factors, rows.packed) if part is not None).shape[0]
    _record(operand, bits_to_mask(rows.mask, width) if rows.mask.numel() else rows.mask, tokens * width)


# --- one quantization for the layers that read the same tensor -----------------------------------------------------


class _Shared(NamedTuple):
    """What a tensor became, for the other layers that read it."""

    owner: "weakref.ref[Tensor]"
    key: tuple[Any, ...]
    result: Any
    readers: set[int]


_shared: dict[int, _Shared] = {}  # by id of the tensor; beside it, not on it, so that it copies and saves as before


def once_per_input(x: Tensor, reader: nn.Module, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
    """compute(), or what it gave another reader of this very tensor object, unchanged since, under the same key.

    q, k and v read one tensor, and so do gate and up: it is rotated and quantized once. A reader that comes a second
    time has it computed anew, so a write that raises no version (through `.data`, NumPy or another view of the memory)
    is seen by the next pass. The result is dropped with x, when x is written to, and when its gradient flows back, for
    then its part of the graph is spent. A leaf that wants a gradient is held by its own graph, which would never be
    freed: there nothing is shared, nor between a checkpointed part and its surroundings.
    """
    if not can_be_recognised(x) or (x.is_leaf and x.requires_grad):
        return compute()
    number, grad = id(x), torch.is_grad_enabled()
    key = (*key, x.data_ptr(), x._version, x.requires_grad, grad, _saving_hook() if grad else 0)
    shared = _shared.get(number)
    if shared is not None and shared.owner() is x and shared.key == key and id(reader) not in shared.readers:
        shared.readers.add(id(reader))
        return shared.result

    def drop(_: Any) -> None:
        _shared.pop(number, None)

    result = compute()
    in_graph = getattr(result, "handle", result)
    if isinstance(in_graph, Tensor) and in_graph.requires_grad:
        in_graph.register_hook(drop)
    _shared[number] = _Shared(weakref.ref(x, drop), key, result, {id(reader)})
    return result


def can_be_recognised(tensor: Tensor) -> bool:
    """Whether a result for this tensor may be kept: it has memory and a version of its own by which to know it again.

    Inference tensors count no versions, fake tensors have no memory. Under torch.compile nothing needs to be kept: the
    compiler removes the repeated operator itself.
    """
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and not torch.compiler.is_compiling() and not tensor.is_inference()


def may_be_kept(device: torch.device) -> bool:
    """Whether what is computed now may serve a later pass.

    Tensors made for inference cannot be saved for a backward pass, and those of a CUDA graph being captured hold
    nothing yet; what a graph would take from before its capture would stay as it was in every replay.
    """
    if torch.compiler.is_compiling():
        return True
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not torch.is_inference_mode_enabled() and not capturing


def _saving_hook() -> int:
    """Identity of the innermost saved-tensor hook: activation checkpointing has one for each part and each pass."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return 0 if hooks is None else id(hooks[0])


# --- the two operands ----------------------------------------------------------------------------------------------


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `.to`, `.half` and the like do to a tensor, without changing its dtype: steps are float32, codes int8."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

    return move


class _Operand(nn.Module):
    """A quantizer of one operand; `spec` None rotates only. A learned step is the parameter `step`, Δ · `unit`."""

    step: Tensor | None

    def __init__(self, spec: Quantizer | None, step: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.text = quantizer_text(spec) if spec is not None else ""
        self.unit = spec.scale.unit(spec.grid) if spec is not None and isinstance(spec.scale, Learned) else 1.0
        if step is None:
            self.register_parameter("step", None)
        else:
            self.step = nn.Parameter(step * self.unit)

    def respecify(self, spec: Quantizer | None) -> None:
        """Quantize by another specification from now on. Neither it nor the present one may have a learned step."""
        assert self.step is None and (spec is None or not spec.is_learned), "a learned step belongs to its quantizer"
        self.spec, self.text = spec, quantizer_text(spec) if spec is not None else ""

    def effective_step(self) -> Tensor | None:
        """The Δ in use, positive whatever training does to the parameter; None where the scale rule computes it."""
        return None if self.step is None else (self.step.abs() / self.unit).clamp_min(EPSILON)

    def encode(self, operand: Tensor, rotation: Rotation) -> Encoded | None:
        """Codes, step and kept mask of the operand (…, K); None if it is not quantized."""
        if self.spec is None:
            return None
        return encode(operand.detach(), self.spec, rotation, self.effective_step())

    def _rotated(self, operand: Tensor, rotation: Rotation) -> Tensor:
        return operand if rotation.block == 1 else rotate_op(operand, rotation.block)

    def values_and_mask(self, operand: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """What the operand (…, K) becomes in rotated space, and M (bool, its shape; empty: every element passes)."""
        values, mask, _ = fake_quantize_op(operand, self.effective_step(), self.text, rotation.block)
        return values, mask

    def _quantized(self, operand: Tensor, rotation: Rotation) -> Tensor:
        values, mask = self.values_and_mask(operand, rotation)
        if _recording and not torch.compiler.is_compiling():
            _record(self, mask, operand.numel())
        return values

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return repr(self.spec)


def regularized_clips(model: nn.Module) -> frozenset[str]:
    """Names of the learned clips that weight decay applies to: PACT regularizes α (arXiv 1805.06085, section 3)."""
    return frozenset(
        f"{name}.step"
        for name, operand in model.named_modules()
        if isinstance(operand, _Operand) and operand.spec is not None and _is_pact(operand.spec)
    )


def _is_pact(spec: Quantizer) -> bool:
    """Whether the operand's step is a clip learned as PACT learns it."""
    return isinstance(spec.scale, Learned) and spec.scale.gradient == "pact"


class ActivationQuantizer(_Operand):
    """Quantizes a layer's input, once for all layers that read the same tensor.

    A learned step is one per layer, shape (1, 1), NaN until the first input sets it to where its rule starts. With a
    learned offset β, shape (1,), the operand is Q(x_h − β) + β in rotated space (LSQ+).
    """

    offset: Tensor | None

    def __init__(self, spec: Quantizer | None) -> None:
        super().__init__(
            spec, torch.full((1, 1), torch.nan, dtype=torch.float32) if spec is not None and spec.is_learned else None
        )
        has_offset = spec is not None and isinstance(spec.scale, Learned) and spec.scale.offset
        self.register_parameter("offset", nn.Parameter(torch.zeros(1, dtype=torch.float32)) if has_offset else None)

    def _start(self, x: Tensor, rotation: Rotation) -> None:
        assert self.step is not None and self.spec is not None
        if not bool(self.step.isnan().any()):
            return
        if torch.compiler.is_compiling():
            raise ConfigError("a learned activation step starts from data: run one forward pass before torch.compile")
        flat = x.detach().reshape(-1, x.shape[-1])
        with torch.no_grad():
            if self.offset is None:
                self.step.copy_(encode(flat, self.spec, rotation).step * self.unit)
            else:
                step, offset = fit_offset(rotation.apply(flat), self.spec)
                self.step.copy_(step * self.unit)
                self.offset.copy_(offset)

    def encode(self, operand: Tensor, rotation: Rotation) -> Encoded | None:
        """Codes and step of the operand (…, K), of x_h − β with an offset; None if it is not quantized."""
        if self.offset is None:
            return super().encode(operand, rotation)
        shifted = rotation.resolve(operand.shape[-1]).apply(operand.detach()) - self.offset.detach()
        return super().encode(shifted, NoRotation())

    def _quantized(self, operand: Tensor, rotation: Rotation) -> Tensor:
        if self.offset is None:
            return super()._quantized(operand, rotation)
        # Autograd gives LSQ+'s gradients: M to x and, since β enters twice, 1 − M to β.
        shifted = self._rotated(operand, rotation).to(torch.float32) - self.offset
        return (super()._quantized(shifted, NoRotation()) + self.offset).to(operand.dtype)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x (…, K) quantized, or only rotated, in rotated space and in x's dtype."""
        if self.spec is None:
            if rotation.block == 1:
                return x
            result: Tensor = once_per_input(x, self, ("", rotation.block), lambda: self._rotated(x, rotation))
        elif self.step is not None:
            self._start(x, rotation)
            result = self._quantized(x, rotation)
        else:
            result = once_per_input(x, self, (self.text, rotation.block), lambda: self._quantized(x, rotation))
        return result


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class _GradientOfCached(torch.autograd.Function):
    """Hangs the backward pass of fake quantization on values that were computed earlier."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, mask: Tensor, block: int) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.block = block
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return fake_quantize_backward_op(gradients[0], mask, ctx.block), None, None, None


class _CachedWeight(NamedTuple):
    """A quantized weight, and what the weight was when it was made."""

    weight: "weakref.ref[Tensor]"
    key: tuple[Any, ...]
    values: Tensor
    mask: Tensor


class WeightQuantizer(_Operand):
    """Quantizes a layer's weight (N, K) once per optimizer step, however many micro-batches use it.

    The cache is for eager training: without gradients, with a learned step and under torch.compile the weight is always
    quantized afresh. It is renewed when the weight is another tensor, when its storage, version or
    contents change, and after any torch optimizer's step (fused optimizers write without raising the version). On a GPU
    the contents are not looked at, which would stall it: code that changes a weight through `.data` there, other than
    by an optimizer, calls `forget()`.
    """

    def __init__(self, spec: Quantizer | None, weight: Tensor, rotation: Rotation) -> None:
        learned = spec is not None and spec.is_learned
        super().__init__(spec, encode(weight.detach(), spec, rotation).step if learned and spec is not None else None)
        self._cached: _CachedWeight | None = None

    def forget(self) -> None:
        """Drop the cached quantized weight."""
        self._cached = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget()  # .to() and the like give the weight other memory, perhaps of an earlier address
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}  # copies of the module start without a cache

    def forward(self, weight: Tensor, rotation: Rotation) -> Tensor:
        """The weight (N, K) quantized, or only rotated, in rotated space and in its dtype."""
        if self.spec is None:
            return self._rotated(weight, rotation)
        known = can_be_recognised(weight) and may_be_kept(weight.device)
        if self.step is not None or not torch.is_grad_enabled() or not known:
            return self._quantized(weight, rotation)
        key = (weight_state(weight), weight.dtype, rotation.block)
        cached = self._cached
        if cached is None or cached.weight() is not weight or cached.key != key:
            with torch.no_grad():
                values, mask, _ = fake_quantize_op(weight, None, self.text, rotation.block)
            cached = self._cached = _CachedWeight(weakref.ref(weight), key, values, mask)
        if _recording:
            _record(self, cached.mask, weight.numel())
        result: Tensor = _GradientOfCached.apply(weight, cached.values, cached.mask, rotation.block)
        return result


def weight_state(weight: Tensor) -> tuple[int, ...]:
    """Numbers that differ once the weight does."""
    contents = 0
    if weight.device.type == "cpu":
        # A checksum that sees order, and reads faster than torch sums integers.
        # Not through NumPy, whose arrays forbid FSDP to free the gathered weight's memory.
        whole = weight.detach().contiguous()
        size = whole.numel() * whole.element_size()
        contents = zlib.crc32((ctypes.c_char * size).from_address(whole.data_ptr())) if size else 0
    return (weight.data_ptr(), weight._version, _optimizer_steps, contents)
