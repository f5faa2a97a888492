"""A trained model and its packed twin on the same tokens, layer beside layer.

Three passes over the same tokens. *Trained*: the trained model, recording what goes into and comes out of each layer.
*Forced*: the packed model, each packed layer fed the trained layer's recorded input, hence its codes. What a layer
computes, and what arrives at the next one, must then agree to float rounding: no error can hide behind another, none
adds up. *Free*: the packed model as it runs. Rounding may carry a value across a threshold there; its code flips, and
with few bits everything behind it differs visibly. A flip that is not the effect of an earlier one, a root, sits in a
row whose input still agrees to rounding.

T tokens (all leading dimensions), K in_features, N out_features.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitquest.evaluation.verify_static import PackedLayer, TrainedLayer, describe, packed_layers, trained_layers
from bitquest.models import Llama
from bitquest.nn import PackedLinear, QuantizedLinear
from bitquest.numerics.fake_quant import Encoded, dequantize
from bitquest.numerics.grids import Grid
from bitquest.numerics.rotations import Rotation

# The promise (METHOD, "Exact integer arithmetic"): outputs to 1e-5 relative, codes within 1e-5·Δ of a threshold.
OUTPUT_TOLERANCE = 1e-5
CODE_TOLERANCE = 1e-5
# Inputs that went through the glue between layers (norms, attention, SwiGLU, residual sums) in float32.
INPUT_TOLERANCE = 1e-5


Watch = Callable[[str, Tensor], None]  # of a layer's name and its input (B, T, K)


@dataclass
class Gap:
    """Squared norms of a difference and of what it is relative to, added up over all tokens."""

    difference: float = 0.0
    reference: float = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        expected = expected.double()
        self.difference += float((found.double() - expected).square().sum())
        self.reference += float(expected.square().sum())

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the reference."""
        if self.difference == 0:
            return 0.0
        return (self.difference / self.reference) ** 0.5 if self.reference else float("inf")


@dataclass
class Flips:
    """Codes compared, codes that differ, and the largest distance, in Δ, of one that does from its threshold."""

    codes: int = 0
    flipped: int = 0
    farthest: float = 0.0

    def add(self, codes: int, distances: Tensor) -> None:
        self.codes += codes
        self.flipped += distances.numel()
        if distances.numel():
            self.farthest = max(self.farthest, float(distances.max()))


@dataclass(frozen=True)
class Root:
    """A flip that no earlier one caused: where it is, and how far its value was from the threshold, in Δ."""

    layer: str
    token: int
    channel: int
    distance: float


@dataclass
class LayerFigures:
    """What the passes found at one layer, over all tokens so far."""

    output: Gap = field(default_factory=Gap)
    input: Gap = field(default_factory=Gap)
    step: Gap = field(default_factory=Gap)
    flips: Flips = field(default_factory=Flips)  # trained and packed layer, the same input
    rounding: Flips = field(default_factory=Flips)  # the packed layer's own input, which differs by rounding
    free: int = 0  # codes that differ in the free pass, effects of earlier flips included
    compared: bool = True  # False where the two layers quantize or rotate differently, so that codes mean other things


class Lockstep:
    """Runs both models and keeps the figures of every layer. Models with equal layer names and shapes only.

    roots: of every layer and call with any, the one at the earliest token.
    """

    def __init__(self, trained: Llama, packed: Llama) -> None:
        self.trained, self.packed = trained, packed
        theirs = packed_layers(packed)
        self.pairs = {name: (layer, theirs[name]) for name, layer in trained_layers(trained).items()}
        self.layers = {name: LayerFigures() for name in self.pairs}
        self.logits = Gap()
        self.roots: list[Root] = []
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._codes: dict[str, tuple[Encoded, Encoded]] = {}
        self._position = 0
        for name, (layer, twin) in self.pairs.items():
            self.layers[name].compared = _quantize_alike(layer, twin)

    def run(
        self,
        tokens_BT: Tensor,
        caches: tuple[Any, Any, Any] | None = None,
        freely: Callable[[Watch], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, T, V) of the trained, the forced and the free pass. caches: one for each, to go on from.

        freely: what makes the free pass in place of the packed model's forward; it tells Watch each layer's input.
        """
        first, second, third = caches if caches is not None else (None, None, None)
        self._position = first.length if first is not None else 0
        twins = {name: twin for name, (_, twin) in self.pairs.items()}
        with torch.no_grad():
            with _hooked({name: layer for name, (layer, _) in self.pairs.items()}, self._record, self._record_output):
                trained = self.trained(tokens_BT, first)
            with _hooked(twins, self._force, self._compare_output):
                forced = self.packed(tokens_BT, second)
            if freely is not None:
                free = freely(self._watch)
            else:
                with _hooked(twins, self._watch, None):
                    free = self.packed(tokens_BT, third)
        self.logits.add(forced, trained)
        for held in (self._inputs, self._outputs, self._codes):
            held.clear()
        return trained, forced, free

    # --- the trained pass ---

    def _record(self, name: str, x: Tensor) -> None:
        self._inputs[name] = x

    def _record_output(self, name: str, y: Tensor) -> None:
        self._outputs[name] = y

    # --- the forced pass ---

    def _force(self, name: str, x: Tensor) -> Tensor:
        recorded, figures = self._inputs[name], self.layers[name]
        figures.input.add(x, recorded)
        layer, twin = self.pairs[name]
        if figures.compared and isinstance(layer, QuantizedLinear) and isinstance(twin, PackedLinear):
            was, now, own = layer.encode_input(recorded), twin.encode_input(recorded), twin.encode_input(x)
            if was is not None and now is not None and own is not None:
                self._codes[name] = was, now
                figures.step.add(now.step, was.step)
                figures.flips.add(was.codes.numel(), self._distances(name, was, now))
                figures.rounding.add(was.codes.numel(), self._distances(name, was, own))
        return recorded

    def _compare_output(self, name: str, y: Tensor) -> Tensor | None:
        """Compare what trained and packed layer made of the same codes; that is also what goes on from here."""
        forced = None
        if name in self._codes and not torch.equal(self._codes[name][0].codes, self._codes[name][1].codes):
            y = forced = y - self._effect_of_flips(name).to(y.dtype)
        self.layers[name].output.add(y, self._outputs[name])
        return forced

    def _effect_of_flips(self, name: str) -> Tensor:
        """What the packed layer's differing codes change in its output (…, N): counted as flips, not as an error."""
        (was, now), layer = self._codes[name], self.pairs[name][0]
        grid = _input_grid(layer)
        change = dequantize(now.codes, was.step, grid).double() - dequantize(was.codes, was.step, grid).double()
        return change @ layer.quantized_weight().double().T

    # --- the free pass ---

    def _watch(self, name: str, x: Tensor) -> None:
        if name not in self._codes:
            return
        (was, _), recorded, twin = self._codes[name], self._inputs[name], self.pairs[name][1]
        assert isinstance(twin, PackedLinear)
        now = twin.encode_input(x)
        assert now is not None
        differ_TK = (now.codes != was.codes).flatten(0, -2)
        self.layers[name].free += int(differ_TK.sum())
        if not bool(differ_TK.any()):
            return
        recorded_TK = recorded.flatten(0, -2)
        deviation_T = (x.flatten(0, -2) - recorded_TK).norm(dim=-1)
        is_root_T = deviation_T <= INPUT_TOLERANCE * recorded_TK.norm(dim=-1)
        places = differ_TK.nonzero()
        rooted = is_root_T[places[:, 0]]
        if bool(rooted.any()):
            tokens = places[rooted, 0] % x.shape[-2]  # rows of a batch are other windows: count within one
            earliest = int(tokens.argmin())
            distance = float(self._distances(name, was, now)[rooted][earliest])
            channel = int(places[rooted, 1][earliest])
            self.roots.append(Root(name, self._position + int(tokens[earliest]), channel, distance))

    # --- codes ---

    def _distances(self, name: str, was: Encoded, now: Encoded) -> Tensor:
        """For each code that differs, how far its trained value lies from the farthest threshold crossed, in Δ."""
        differ = was.codes != now.codes
        if not bool(differ.any()):
            return torch.empty(0)
        layer = self.pairs[name][0]
        x_h = layer.rotation.apply(self._inputs[name]).double()
        steps = was.step.double().repeat_interleave(x_h.shape[-1] // was.step.shape[-1], -1)
        in_steps = x_h / steps
        return threshold_distances(in_steps[differ], was.codes[differ], now.codes[differ], _input_grid(layer))


def _input_grid(layer: TrainedLayer) -> Grid:
    assert isinstance(layer, QuantizedLinear) and layer.activation_quantizer.spec is not None
    return layer.activation_quantizer.spec.grid


def _quantize_alike(layer: TrainedLayer, twin: PackedLayer) -> bool:
    was, now = describe(layer), describe(twin)
    return bool(was["activation"] == now["activation"] and was["rotation"] == now["rotation"])


class _Quantized(nn.Module):
    """Stands for a weight quantizer whose weight no longer changes: hands out what it made."""

    def __init__(self, layer: TrainedLayer) -> None:
        super().__init__()
        self.spec = layer.weight_quantizer.spec
        self.values: Tensor = layer.weight_quantizer(layer.weight, layer.rotation)

    def forward(self, weight: Tensor, rotation: Rotation) -> Tensor:
        return self.values


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Inside, a trained model's weights are quantized once, not in every call: texts are written token by token."""
    layers = trained_layers(model).values()
    before = [layer.weight_quantizer for layer in layers]
    try:
        with torch.no_grad():
            for layer in layers:
                layer.weight_quantizer = _Quantized(layer)  # type: ignore[assignment]
        yield
    finally:
        for layer, quantizer in zip(layers, before, strict=True):
            layer.weight_quantizer = quantizer


def threshold_distances(in_steps: Tensor, codes: Tensor, others: Tensor, grid: Grid) -> Tensor:
    """|value − threshold| in Δ for the farthest of the thresholds between each two differing codes. All (F,)."""
    levels = torch.tensor(grid.levels, dtype=torch.float64, device=in_steps.device)
    thresholds = (levels[1:] + levels[:-1]) / 2
    half = 2 ** (grid.bits - 1)
    low = torch.minimum(codes, others).long() + half
    high = torch.maximum(codes, others).long() + half - 1
    return torch.maximum((in_steps - thresholds[low]).abs(), (in_steps - thresholds[high]).abs())


@contextmanager
def _hooked(
    layers: Mapping[str, nn.Module],
    before: Callable[[str, Tensor], Tensor | None],
    after: Callable[[str, Tensor], Tensor | None] | None,
) -> Iterator[None]:
    """Call before(name, input) and after(name, output) at every layer; a result replaces the input or output."""
    handles = []

    def enter(name: str) -> Callable[..., Any]:
        return lambda module, inputs: None if (x := before(name, inputs[0])) is None else (x,)

    def leave(name: str) -> Callable[..., Tensor | None]:
        assert after is not None
        return lambda module, inputs, output: after(name, output)

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(enter(name)))
            if after is not None:
                handles.append(layer.register_forward_hook(leave(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
