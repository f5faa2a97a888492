"""The trained layer running on integers: packed codes, one exact product, one scale per token and channel.

T tokens, K in_features, N out_features.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn.linear import QuantizedLinear
from bitquest.nn.pending import PendingInput
from bitquest.nn.quantizer import keeping_dtype, once_per_input
from bitquest.numerics.fake_quant import Encoded
from bitquest.numerics.packing import pack, unpack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.numerics.scaling import Learned
from bitquest.ops.backend import Backend, WrongDeviceError, backend_for, engine, resolve_backend
from bitquest.ops.engine_ops import on_device, packed_linear, quantize_rows, rotate_rows
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.registry import quantizer_text
from bitquest.ops.rows import ENGINE_DTYPES, PackedWeight, Prologue, QuantizedRows, flattened


class _Prepared(NamedTuple):
    """The weight in its backend's layout, and what that was made from."""

    sources: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    backend: Backend
    input_parts: frozenset[str]
    parts: tuple[Tensor, ...]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count their writes


class PackedLinear(nn.Module):
    """The trained layer on integers: packed codes, steps, and an exact integer product; no float weight.

    codes: int8 (N, K), centred, 0 where `kept` (bool, N:M sparsity) is False; kept as `packed`, uint8 (N, ⌈K·bits/8⌉),
    which may be given instead. step: float32 Δ, (N, 1), (N, groups) or (1, 1). activation_step: the trained Δ of a
    learned activation quantizer. float_weight: the rotated float32 weight, for a layer whose weight is not quantized.
    backend: which code runs it; what it needs beside the codes is prepared once. Raises ConfigError for sparse 8-bit
    weights, which have no int8 form, and for a backend that does not run such a layer.
    """

    packed: Tensor | None
    step: Tensor | None
    kept: Tensor | None
    bias: Tensor | None
    activation_step: Tensor | None
    float_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Quantizer | None,
        activation: Quantizer | None,
        rotation: Rotation,
        codes: Tensor | None = None,
        packed: Tensor | None = None,
        step: Tensor | None = None,
        kept: Tensor | None = None,
        bias: Tensor | None = None,
        activation_step: Tensor | None = None,
        float_weight: Tensor | None = None,
        backend: str | Backend = Backend.AUTO,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_spec, self.activation_spec = weight, activation
        self.rotation = rotation.resolve(in_features)
        self.backend = resolve_backend(backend)
        if activation is not None and isinstance(activation.scale, Learned) and activation.scale.offset:
            raise ConfigError(
                "activations with a learned offset (LSQ+) have no packed form: it would be subtracted from each input, "
                "and its product with the weight added to each output; train with lsq to export"
            )
        if weight is not None:
            weight.check(in_features)
            if kept is not None and weight.grid.bits == 8:
                raise ConfigError("sparse 8-bit weights cannot be packed: m·(2c + 1) needs 9 bits; use at most 7")
            if codes is not None:
                packed = pack(codes, weight.bits)
        for name, tensor in (
            ("packed", packed),
            ("step", step),
            ("kept", kept),
            ("bias", bias),
            ("activation_step", activation_step),
            ("float_weight", float_weight),
        ):
            self.register_buffer(name, tensor)
        self._spec = LinearSpec(in_features, out_features, weight, activation, self.rotation.block)
        self._input_text = quantizer_text(activation) if activation is not None else ""
        self._prepared: _Prepared | None = None
        self.register_load_state_dict_post_hook(lambda layer, _: layer.prepare())
        self.prepare()

    @staticmethod
    def of(layer: QuantizedLinear, backend: str | Backend = Backend.AUTO) -> "PackedLinear":
        """The packed form of a trained layer."""
        encoded = layer.encode_weight()
        step = layer.activation_quantizer.effective_step()
        return PackedLinear(
            layer.in_features,
            layer.out_features,
            weight=layer.weight_quantizer.spec,
            activation=layer.activation_quantizer.spec,
            rotation=layer.rotation,
            codes=None if encoded is None else encoded.codes,
            step=None if encoded is None else encoded.step,
            kept=None if encoded is None else encoded.kept,
            bias=None if layer.bias is None else layer.bias.detach().clone(),
            activation_step=None if step is None else step.detach().clone(),
            float_weight=layer.quantized_weight() if encoded is None else None,
            backend=backend,
        )

    @property
    def codes(self) -> Tensor | None:
        """The weight's codes, int8 (N, K), unpacked at every look; None if the weight is not quantized."""
        if self.packed is None or self.weight_spec is None:
            return None
        return unpack(self.packed, self.weight_spec.bits, self.in_features)

    @codes.setter
    def codes(self, codes: Tensor | None) -> None:
        assert codes is None or self.weight_spec is not None
        if codes is not None and tuple(codes.shape) != (self.out_features, self.in_features):
            raise ConfigError(f"codes are ({self.out_features}, {self.in_features}), not {tuple(codes.shape)}")
        self.packed = None if codes is None or self.weight_spec is None else pack(codes, self.weight_spec.bits)
        self.prepare()

    def encode_weight(self) -> Encoded | None:
        """The stored codes, steps and kept mask; None if the weight is not quantized."""
        codes = self.codes
        return None if codes is None or self.step is None else Encoded(codes, self.step, self.kept)

    def encode_input(self, x: Tensor) -> Encoded | None:
        """Codes (…, K) and steps that the layer's own backend makes of this input; None if it is not quantized."""
        if self.activation_spec is None:
            return None
        flat = x.detach().reshape(-1, self.in_features)
        rows = self._quantized(flat, None, frozenset({"packed"}), self._ready().backend)
        assert rows.packed is not None
        codes = unpack(rows.packed, self.activation_spec.bits, self.in_features)
        given = self.activation_step is not None
        step = rows.step if given else rows.step.reshape(*x.shape[:-1], rows.step.shape[-1])
        return Encoded(codes.reshape(x.shape), step, None)

    def forward(self, x_TK: Tensor | PendingInput) -> Tensor:
        """x (…, K) to (…, N) in x's dtype: integers in, integers multiplied, one scale per token and channel."""
        if x_TK.shape[-1] != self.in_features:
            raise ConfigError(f"this layer reads {self.in_features} features, not {x_TK.shape[-1]}")
        ready = self._ready()
        key = ("packed", ready.backend, self._input_text, self.rotation.block, ready.input_parts)
        rows: QuantizedRows | Tensor
        if self.activation_step is not None:  # a step of this layer's own: nobody else reads the same rows
            x = x_TK.tensor() if isinstance(x_TK, PendingInput) else x_TK
            rows = self._rows(x, None, ready)
        elif isinstance(x_TK, PendingInput):
            pending = x_TK
            rows = pending.once(key, lambda: self._rows(pending.x, pending.prologue, ready))
        else:
            tensor = x_TK
            rows = once_per_input(tensor, self, key, lambda: self._rows(tensor, None, ready))
        dtype = x_TK.dtype if x_TK.dtype in ENGINE_DTYPES else torch.float32
        y = packed_linear(rows, ready.parts, self.bias, self._spec, dtype, ready.backend.value)
        return y.reshape(*x_TK.shape[:-1], self.out_features).to(x_TK.dtype)

    def _rows(self, x: Tensor, prologue: Prologue | None, ready: _Prepared) -> QuantizedRows | Tensor:
        flat, prologue = x.detach().reshape(-1, self.in_features), flattened(prologue)
        if flat.dtype not in ENGINE_DTYPES:
            flat = flat.to(torch.float32)
        if self.activation_spec is None:
            return rotate_rows(flat, self.rotation.block, ready.backend.value, prologue)
        return self._quantized(flat, prologue, ready.input_parts, ready.backend)

    def _quantized(self, x: Tensor, prologue: Prologue | None, want: frozenset[str], backend: Backend) -> QuantizedRows:
        return quantize_rows(
            x, self._input_text, self.rotation.block, want, backend.value, self.activation_step, prologue
        )

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        held = self.packed if self.packed is not None else self.float_weight
        return torch.device("meta") if held is None else held.device

    @property
    def running_backend(self) -> Backend:
        """Which backend runs this layer on the device it is on."""
        return self._ready().backend

    def use(self, backend: str | Backend) -> None:
        """Run on another backend from now on. ConfigError if it is not available or does not run such a layer."""
        self.backend, self._prepared = resolve_backend(backend), None
        self.prepare()

    def prepare(self) -> None:
        """Lay the weight out for the backend of the device it is on; done when the layer is made, loaded and moved."""
        if self.device.type != "meta":
            with suppress(WrongDeviceError):  # it may yet be moved; until then forward says so
                self._ready()

    def _ready(self) -> _Prepared:
        """The prepared weight, made again if the codes, steps or mask are not what it was made from."""
        made = self._prepared
        if torch.compiler.is_compiling():  # the compiler cannot follow versions
            if made is None:
                raise ConfigError("this layer is not laid out for a backend yet: call prepare() before torch.compile")
            return made
        sources = (self.packed, self.step, self.kept, self.float_weight)
        versions = tuple(_version(t) for t in sources if t is not None)
        same = made is not None and all(a is b for a, b in zip(made.sources, sources, strict=True))
        if made is None or not same or made.versions != versions:
            backend = backend_for(self.backend, self._spec, self.device.type)
            with torch.no_grad(), on_device(next(t for t in sources if t is not None)):
                used = engine(backend.value)
                parts = used.prepare(self._spec, PackedWeight(self.packed, self.step, self.kept, self.float_weight))
                made = _Prepared(sources, versions, backend, used.input_parts(self._spec), parts)
            self._prepared = made
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepared = None
        moved = super()._apply(keeping_dtype(fn), recurse)
        self.prepare()
        return moved

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_prepared": None}  # copies of the module prepare their own

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.prepare()

    def _named_backend(self) -> str:
        made = self._prepared
        return self.backend if made is None or made.backend == self.backend else f"{self.backend} ({made.backend})"

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weight={self.weight_spec}, "
            f"activation={self.activation_spec}, rotation={self.rotation}, backend={self._named_backend()}"
        )


def running_backends(model: nn.Module) -> str:
    """The names of the backends that run a model's packed layers, "torch" where it has none."""
    names = {layer.running_backend.value for layer in model.modules() if isinstance(layer, PackedLinear)}
    return ", ".join(sorted(names)) or Backend.TORCH.value
