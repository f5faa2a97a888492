"""One look at a model in training: what quantization does to it on one batch of held-out text.

    gradient alignment   cosine of ∂L/∂h with and without quantization, h the output of a block; and of ∂L/∂W, W all
                         weights of the block's linear layers. The unquantized gradient is that of the very same
                         parameters on the same batch with quantization off (nn/unquantized.py), so it sees neither
                         rounding in the forward pass nor masks in the backward pass. arXiv 2502.05003 shows this
                         cosine block by block, from the top, where the backward pass begins, down (METHOD, results).
    masked               share of an operand's elements whose gradient the estimator masks (M = 0), and by the Gaussian
                         share expected of it
    error                ‖x_q − x_h‖²/‖x_h‖² of an operand, and how many times the least that its grid can do for a
                         Gaussian of σ = 1 (numerics/multipliers.py). Near 1: the rotation made the operand Gaussian.
    kurtosis             mean of z⁴ − 3, z the elements over the root mean square of those that share a step: 0 for a
                         Gaussian, above for heavy tails, which cost error
    step                 geometric mean of Δ over the rows (or groups) of an operand

What needs an earlier look (persistence, drift, flips) is in diagnose.py. Everything is computed from the definition of
the method, in float32, whichever backend trains. T tokens, K in_features, N out_features.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitquest.models import Llama
from bitquest.nn import QuantizedLinear, unquantized
from bitquest.nn.pending import PendingInput
from bitquest.numerics.fake_quant import Encoded
from bitquest.numerics.grids import Grid
from bitquest.numerics.multipliers import gaussian_mse, gaussian_step
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.numerics.scaling import GaussianMSE
from bitquest.ops.rows import apply_prologue
from bitquest.training.step import next_token_loss

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class OperandLook:
    """Figures of one operand, and what the next look compares itself with.

    expected_masked: the Gaussian share, None where the estimator or the scale rule has no closed form here.
    mask: bool (rows, K), True where the gradient is masked. encoded: codes and steps, of weights alone. log_step: ln Δ.
    """

    bits: int
    elements: int
    masked: float
    expected_masked: float | None
    error: float
    excess: float
    kurtosis: float
    step: float
    mask: Tensor
    log_step: Tensor
    encoded: Encoded | None = None


@dataclass(frozen=True)
class BlockLook:
    """Cosines of the gradients with and without quantization; None where one is zero or not finite."""

    output: float | None
    weights: float | None


@dataclass
class Look:
    """Blocks from the first, at the bottom, to the last, at the top. Layers by name; inputs by their first reader."""

    loss: float
    unquantized_loss: float
    blocks: list[BlockLook] = field(default_factory=list)
    alignments: dict[str, float | None] = field(default_factory=dict)
    weights: dict[str, OperandLook] = field(default_factory=dict)
    inputs: dict[str, OperandLook] = field(default_factory=dict)


def look_at(model: Llama, windows_BT1: Tensor, autocast: Autocast | None = None) -> Look:
    """Look at a model on int64 windows (B, T+1) on its device. Nothing of it changes: parameters, gradients, mode.

    autocast: makes the context of the training's precision, for both passes alike; None: as the caller has it.
    Raises ConfigError for a packed model.
    """
    names = {id(layer): name for name, layer in model.named_modules()}
    was_training, fresh = model.training, _fresh_steps(model)
    model.eval()  # each block is run once: activation checkpointing is for training
    try:
        with torch.random.fork_rng(devices=[windows_BT1.device] if windows_BT1.is_cuda else []), torch.enable_grad():
            inputs: dict[str, OperandLook] = {}
            with unquantized(model):
                loss_0, outputs_0, weights_0 = _gradients(model, windows_BT1, autocast or nullcontext)
            with _watched_inputs(model, names, inputs):
                loss, outputs, weights = _gradients(model, windows_BT1, autocast or nullcontext)
    finally:
        model.train(was_training)
        with torch.no_grad():
            for step in fresh:
                step.fill_(math.nan)
    made = Look(loss, loss_0, inputs=inputs)
    for number, block in enumerate(model.model.layers):
        prefix = names[id(block)] + "."
        mine = [name for name in weights if name.startswith(prefix)]
        made.alignments |= {name: cosine([weights[name]], [weights_0[name]]) for name in mine}
        whole = cosine([weights[name] for name in mine], [weights_0[name] for name in mine])
        made.blocks.append(BlockLook(cosine([outputs[number]], [outputs_0[number]]), whole))
    made.weights = {name: look for name, layer in _layers(model) if (look := weight_look(layer)) is not None}
    return made


def cosine(one: list[Tensor], other: list[Tensor]) -> float | None:
    """Of two gradients given in the same parts, summed in float64; None if one of them is zero or not finite."""
    dots = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(one, other, strict=True):
        a, b = a.detach().flatten().double(), b.detach().flatten().double()
        dots += torch.stack([a @ b, a @ a, b @ b]).cpu()
    product, square_a, square_b = (float(dot) for dot in dots)
    norms = math.sqrt(square_a) * math.sqrt(square_b)
    if not norms or not math.isfinite(product / norms):
        return None
    return max(-1.0, min(1.0, product / norms))  # rounding may leave that of equal gradients a little above one


def _layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear))


def _fresh_steps(model: nn.Module) -> list[Tensor]:
    """Learned steps of activations that the first training batch is yet to set; a look must leave them to it."""
    steps = (layer.activation_quantizer.step for _, layer in _layers(model))
    return [step for step in steps if step is not None and bool(step.isnan().any())]


def _gradients(model: Llama, windows_BT1: Tensor, autocast: Autocast) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    """Loss, ∂L/∂h of every block's output, ∂L/∂W of the blocks' linear layers by name; no `.grad` is touched."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _, __, h: outputs.append(h)) for block in model.model.layers]
    linear = {name: layer.weight for name, layer in model.named_modules() if _is_in_block(name, layer)}
    try:
        with autocast():
            loss = next_token_loss(model, windows_BT1)
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(loss, [*outputs, *linear.values()])
    return loss.item(), list(gradients[: len(outputs)]), dict(zip(linear, gradients[len(outputs) :], strict=True))


def _is_in_block(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and name.startswith("model.layers.")


# --- operands --------------------------------------------------------------------------------------------------------


@contextmanager
def _watched_inputs(model: Llama, names: dict[int, str], found: dict[str, OperandLook]) -> Iterator[None]:
    """Look at every quantized input on its way: once for all layers that read it with one quantizer."""
    seen: dict[tuple[Any, ...], Any] = {}

    def watch(layer: nn.Module, arguments: tuple[Any, ...], _: Tensor) -> None:
        assert isinstance(layer, QuantizedLinear)
        operand, x = layer.activation_quantizer, arguments[0]
        # a learned step is each layer's own; `seen` keeps x, so that its id stays its own
        key = (id(x), operand.text, layer.rotation.block, id(layer) if operand.step is not None else 0)
        if operand.spec is not None and key not in seen:
            seen[key] = x
            found[names[id(layer)]] = input_look(layer, x)

    handles = [layer.register_forward_hook(watch) for _, layer in _layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def input_look(layer: QuantizedLinear, x: Tensor | PendingInput) -> OperandLook:
    """Figures of a quantized layer's input (…, K), given as the layer is given it."""
    if isinstance(x, PendingInput):
        x = apply_prologue(x.x, x.prologue)
    x_TK = x.detach().reshape(-1, layer.in_features).float()
    encoded, spec = layer.encode_input(x_TK), layer.activation_quantizer.spec
    assert encoded is not None and spec is not None
    values, mask = layer.activation_quantizer.values_and_mask(x_TK, layer.rotation)
    return _operand_look(x_TK, values, mask, encoded, spec, layer.rotation, keep_codes=False)


@torch.no_grad()
def weight_look(layer: QuantizedLinear) -> OperandLook | None:
    """Figures of a layer's weight (N, K); None if it is not quantized."""
    encoded, spec = layer.encode_weight(), layer.weight_quantizer.spec
    if encoded is None or spec is None:
        return None
    w_NK = layer.weight.detach().float()
    values, mask = layer.weight_quantizer.values_and_mask(w_NK, layer.rotation)
    return _operand_look(w_NK, values, mask, encoded, spec, layer.rotation, keep_codes=True)


def _operand_look(
    x: Tensor, values: Tensor, mask: Tensor, encoded: Encoded, spec: Quantizer, rotation: Rotation, *, keep_codes: bool
) -> OperandLook:
    x_h = rotation.apply(x)
    masked = mask.logical_not() if mask.numel() else torch.zeros_like(x_h, dtype=torch.bool)
    # sums over millions of float32: in float64
    square = x_h.square().sum(dtype=torch.float64)
    error = float((values.float() - x_h).square().sum(dtype=torch.float64) / square) if float(square) else 0.0
    return OperandLook(
        bits=spec.bits,
        elements=x.numel(),
        masked=float(masked.sum()) / max(1, x.numel()),
        expected_masked=gaussian_masked_share(spec),
        error=error,
        excess=error / gaussian_optimum(spec.grid),
        kurtosis=excess_kurtosis(spec.granularity.grouped(x_h)),
        step=float(encoded.step.double().log().mean().exp()),
        mask=masked,
        log_step=encoded.step.log(),
        encoded=encoded if keep_codes else None,
    )


def excess_kurtosis(grouped: Tensor) -> float:
    """Mean over all elements of z⁴ less 3, z = x over the root mean square of its group; groups of zeros left out.

    grouped (…, elements that share a step). A Gaussian in groups of n gives −6/(n + 2), which is −0.05 for 128.
    """
    second = grouped.square().mean(-1, dtype=torch.float64)
    fourth = grouped.double().pow(4).mean(-1)
    ratios = (fourth / second.square())[second > 0]
    return float(ratios.mean()) - 3 if ratios.numel() else 0.0


def gaussian_optimum(grid: Grid) -> float:
    """The least mean squared error of rounding N(0, 1) to the grid's levels at any step."""
    levels = tuple(grid.levels)
    return gaussian_mse(levels, gaussian_step(levels))


def gaussian_masked_share(spec: Quantizer) -> float | None:
    """Share of N(0, 1) that the estimator masks at the Gaussian fit: 2Φ(−α(1 + 1/(2^b − 1))) for trust on b bits."""
    limits = spec.estimator.range(spec.grid) if isinstance(spec.scale, GaussianMSE) and not spec.is_sparse else None
    if limits is None:
        return None
    step = spec.grid.clip_multiplier / spec.grid.max_level

    def tail(x: float) -> float:
        return 0.5 * math.erfc(x / math.sqrt(2))

    return tail(-limits[0] * step) + tail(limits[1] * step)
