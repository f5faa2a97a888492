"""A whole Llama's decoding step in the compiled CPU engine, csrc/decode.cpp: one call a token.

What is described here are pointers: the tensors behind them are kept alive with the description, and must stay where
they are. inference/native_decode.py describes a model. D width, F hidden width of the gated product, H query heads,
G key-value heads, C channels of a head, S positions, V vocabulary. Everything is float32 but codes.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import Grid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import packed_width
from bitquest.ops import native
from bitquest.ops import native_abi as abi
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.native_linear import _NO_FORM, _ROTATION_ONLY, _form

_ALIGNMENT = 64


class CLayer(Structure):
    _fields_ = [
        ("channels", c_int64),
        ("width", c_int64),
        ("prepared", c_void_p),
        ("prepared_bytes", c_int64),
        ("quantizer", c_void_p),
        ("given_step", c_void_p),
        ("form", abi.CForm),
        ("dense", c_void_p),
        ("dtype", c_int32),
        ("bias", c_void_p),
    ]


class CNorm(Structure):
    _fields_ = [("weight", c_void_p), ("epsilon", c_float)]


NORMS = ("attention_norm", "q_norm", "k_norm", "o_norm", "mlp_norm", "down_norm")
LAYERS = ("q", "k", "v", "o", "gate", "up", "down")


class CBlock(Structure):
    _fields_ = [*((name, CNorm) for name in NORMS), *((name, CLayer) for name in LAYERS)]


class CTable(Structure):
    _fields_ = [
        ("dense", c_void_p),
        ("dtype", c_int32),
        ("bits", c_int32),
        ("packed", c_void_p),
        ("levels", c_void_p),
        ("step", c_void_p),
        ("step_stride", c_int64),
        ("groups", c_int64),
        ("block", c_int32),
    ]


class CDecoder(Structure):
    _fields_ = [
        ("layers", c_int64),
        ("width", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_size", c_int64),
        ("vocabulary", c_int64),
        ("positions", c_int64),
        ("blocks", c_void_p),
        ("embedding", CTable),
        ("final_norm", CNorm),
        ("head", CLayer),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_int64),
        ("threads", c_int32),
        ("inputs", c_void_p),
    ]


_SIGNATURES = {
    "bq_decoder_bytes": [POINTER(CDecoder), POINTER(c_int64)],
    "bq_decode_token": [POINTER(CDecoder), c_int64, c_int64, c_void_p],
    "bq_dense_vector": [POINTER(CLayer), c_void_p, c_void_p, c_int32],
    "bq_attend_rows": [
        *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int64, c_void_p, c_int32),
    ],
    "bq_attend": [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p],
}


@cache
def _declare(library: ctypes.CDLL) -> str | None:
    try:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = c_int32, arguments
    except AttributeError:
        return "the compiled engine was built before it could decode; install BitQuEST again"
    return None


def library() -> ctypes.CDLL:
    """The loaded library. Raises ConfigError, with the reason, where it cannot decode."""
    found = native.library()
    reason = _declare(found)
    if reason is not None:
        raise ConfigError(f"native engine: {reason}")
    return found


def unavailable() -> str | None:
    """Why no model decodes in native code here, None if models can."""
    try:
        library()
    except ConfigError as reason:
        return str(reason)
    return None


@dataclass(frozen=True)
class Layer:
    """A linear layer. prepared: of native_linear.prepare, for `spec`; or dense: float32 or bfloat16 (N, K)."""

    spec: LinearSpec
    prepared: Tensor | None = None
    given_step: Tensor | None = None  # float32 (1, G): of a learned activation quantizer
    dense: Tensor | None = None
    bias: Tensor | None = None  # (N)


@dataclass(frozen=True)
class Norm:
    """x / rms(x) · weight."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Block:
    """norms: by the names of NORMS; q_norm, k_norm, o_norm and down_norm may be missing. layers: by those of LAYERS."""

    norms: dict[str, Norm | None]
    layers: dict[str, Layer]


@dataclass(frozen=True)
class Table:
    """Rows (V, D) of the tokens: `dense`, or packed codes and float32 steps (V, 1), (V, groups) or (1, 1)."""

    dense: Tensor | None = None
    packed: Tensor | None = None
    step: Tensor | None = None
    grid: Grid | None = None
    block: int = 1


@dataclass(frozen=True)
class Sizes:
    """D, F, H, G, C, V."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int


class Decoder:
    """A described Llama. `step` gives float32 logits (V,), valid until the next step.

    cos, sin: float32 (at least S, C). keys, values: the cache, float32 (layers, 1, G, S, C), filled here at each
    step's position. Raises ConfigError for tensors that do not fit together.
    """

    def __init__(
        self,
        sizes: Sizes,
        blocks: Sequence[Block],
        embedding: Table,
        final_norm: Norm,
        head: Layer,
        angles: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
    ) -> None:
        self._library = library()
        self._held: list[object] = []
        self._sizes, (self._keys, self._values) = sizes, cache
        positions = self._keys.shape[3]
        shape = (len(blocks), 1, sizes.kv_heads, positions, sizes.head_size)
        for name, memory in (("keys", self._keys), ("values", self._values)):
            if memory.shape != shape or not _plain(memory):
                raise ConfigError(f"native engine: the {name} of the cache are no float32 memory of {shape}")
        for table in angles:
            if table.shape[0] < positions or table.shape[1:] != (sizes.head_size,) or not _plain(table):
                raise ConfigError(f"native engine: the angles are no float32 table of {positions} positions")
        self._held += [*cache, *angles]
        made = (CBlock * len(blocks))(*[self._block(block) for block in blocks])
        self._held.append(made)
        self._c = c = CDecoder(
            len(blocks),
            sizes.width,
            sizes.hidden,
            sizes.heads,
            sizes.kv_heads,
            sizes.head_size,
            sizes.vocabulary,
            positions,
            ctypes.addressof(made),
            self._table(embedding),
            self._norm(final_norm, sizes.width),
            self._layer(head),
            *[table.data_ptr() for table in (*angles, *cache)],
        )
        size = c_int64()
        native.done(self._library.bq_decoder_bytes(byref(c), byref(size)), "describing a model to decode")
        workspace = torch.empty(size.value + _ALIGNMENT, dtype=torch.uint8)
        c.workspace = -(-workspace.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        c.workspace_bytes = size.value
        self._logits = torch.empty(sizes.vocabulary, dtype=torch.float32)
        self._held.append(workspace)
        self._reference, self._out = byref(c), self._logits.data_ptr()
        self._parts = [
            *[sizes.width, sizes.heads * sizes.head_size, sizes.width, sizes.hidden] * len(blocks),
            sizes.width,
        ]

    def watch(self) -> list[Tensor]:
        """What the layers read at every later step, filled in by it: float32, behind norms, before rotations.

        Of each block (D,) for q, k and v, (H·C,) for o, (D,) for gate and up, (F,) for down; at last (D,) for the head.
        """
        inputs = torch.empty(sum(self._parts), dtype=torch.float32)
        self._c.inputs = inputs.data_ptr()
        self._held.append(inputs)
        return list(inputs.split(self._parts))

    def step(self, token: int, position: int) -> Tensor:
        """Logits after `token` at `position`; the cache holds the positions before it, and this one afterwards."""
        self._c.threads = torch.get_num_threads()
        code = self._library.bq_decode_token(self._reference, token, position, self._out)
        if code:
            native.done(code, f"decoding token {token} at position {position}")
        return self._logits

    def _keep(self, what: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]) -> int:
        """The address of a matrix, made contiguous."""
        native.matrix(what, tensor, dtypes, shape)
        made = tensor.detach().contiguous()
        self._held.append(made)
        return made.data_ptr()

    def _vector(self, what: str, tensor: Tensor, size: int) -> int:
        return self._keep(what, tensor.detach().to(torch.float32).unsqueeze(0), (torch.float32,), (1, size))

    def _block(self, block: Block) -> CBlock:
        s = self._sizes
        sizes = dict(
            zip(NORMS, (s.width, s.head_size, s.head_size, s.heads * s.head_size, s.width, s.hidden), strict=True)
        )
        norms = [self._norm(block.norms[name], sizes[name]) for name in NORMS]
        return CBlock(*norms, *[self._layer(block.layers[name]) for name in LAYERS])

    def _norm(self, norm: Norm | None, size: int) -> CNorm:
        return CNorm() if norm is None else CNorm(self._vector("a norm's weight", norm.weight, size), norm.eps)

    def _layer(self, layer: Layer) -> CLayer:
        spec = layer.spec
        c = CLayer(channels=spec.out_features, width=spec.in_features)
        if layer.bias is not None:
            c.bias = self._vector("a bias", layer.bias, spec.out_features)
        if layer.prepared is None:
            assert layer.dense is not None
            dtypes, shape = (torch.float32, torch.bfloat16), (spec.out_features, spec.in_features)
            c.dense, c.dtype = self._keep("a matrix", layer.dense, dtypes, shape), native.DTYPES[layer.dense.dtype]
            return c
        given = layer.given_step is not None
        quantizer = native._quantizer(spec.activation or _ROTATION_ONLY, spec.block, given)
        c.prepared, c.prepared_bytes = layer.prepared.data_ptr(), layer.prepared.numel()
        c.quantizer = ctypes.addressof(quantizer.c)
        self._held += [layer.prepared, quantizer]
        if layer.given_step is not None:
            groups = spec.in_features // quantizer.groups_of if quantizer.groups_of else 1
            c.given_step = self._keep("the step of x", layer.given_step, (torch.float32,), (1, groups))
        form = _NO_FORM if spec.activation is None else integer_form(spec.activation.grid)
        if form is None:
            raise ConfigError("native engine: this codebook has no integers to multiply")
        c.form = _form(form)
        return c

    def _table(self, table: Table) -> CTable:
        rows, width = self._sizes.vocabulary, self._sizes.width
        c = CTable(block=table.block)
        if table.dense is not None:
            c.dense = self._keep("the token table", table.dense, native.FLOATS, (rows, width))
            c.dtype = native.DTYPES[table.dense.dtype]
            return c
        assert table.packed is not None and table.step is not None and table.grid is not None
        c.packed = self._keep(
            "the token table", table.packed, (torch.uint8,), (rows, packed_width(width, table.grid.bits))
        )
        levels = native._levels(table.grid)
        c.bits, c.levels = table.grid.bits, ctypes.addressof(levels)
        c.groups = table.step.shape[1]
        c.step_stride = 0 if table.step.shape[0] == 1 else c.groups
        c.step = self._keep("its steps", table.step, (torch.float32,), (table.step.shape[0], c.groups))
        if table.step.shape[0] not in (1, rows):
            raise ConfigError(f"native engine: the token table has {rows} rows and {table.step.shape[0]} steps")
        self._held.append(levels)
        return c


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def dense_vector(w: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """w x + bias (N,) in float32 from w (N, K), float32 or bfloat16, and float32 x (K,). For tests."""
    native.matrix("w", w, (torch.float32, torch.bfloat16), (None, x.numel()))
    w, x, out = w.contiguous(), x.contiguous(), torch.empty(w.shape[0], dtype=torch.float32)
    c = CLayer(channels=w.shape[0], width=w.shape[1], dense=w.data_ptr(), dtype=native.DTYPES[w.dtype])
    if bias is not None:
        bias = bias.contiguous()
        c.bias = bias.data_ptr()
    code = library().bq_dense_vector(byref(c), x.data_ptr(), out.data_ptr(), torch.get_num_threads())
    native.done(code, f"product of {tuple(w.shape)} and a vector")
    return out


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one head, q (C,), over keys and values (S, C), all float32. For tests."""
    seen, size = keys.shape
    q, keys, values = q.contiguous(), keys.contiguous(), values.contiguous()
    scores = torch.empty(-(-seen // 16) * 16, dtype=torch.float32)
    out = torch.empty(size, dtype=torch.float32)
    held = (q, keys, values, scores, out)
    code = library().bq_attend(*[t.data_ptr() for t in held[:3]], seen, size, *[t.data_ptr() for t in held[3:]])
    native.done(code, "attention")
    return out


def attend_rows(q_HTC: Tensor, keys_GSC: Tensor, values_GSC: Tensor) -> Tensor:
    """Causal attention (H, T, C) of a prompt's last T positions over all S, float32, as `Decoder.step` attends.

    Head h reads keys and values h·G/H. keys and values may be views of a longer cache, alike, rows dense.
    """
    (heads, rows, size), (kv_heads, seen, _) = q_HTC.shape, keys_GSC.shape
    alike = (
        keys_GSC.shape == values_GSC.shape and keys_GSC.stride() == values_GSC.stride() and keys_GSC.shape[2] == size
    )
    dense = q_HTC.stride(2) == keys_GSC.stride(2) == 1 and keys_GSC.stride(1) == size
    floats = all(t.is_cpu and t.dtype == torch.float32 for t in (q_HTC, keys_GSC, values_GSC))
    if not (alike and dense and floats and rows <= seen):
        raise ConfigError(f"native engine: no attention of {tuple(q_HTC.shape)} over {tuple(keys_GSC.shape)}")
    out_THC = torch.empty(rows, heads, size, dtype=torch.float32)
    code = library().bq_attend_rows(
        *(q_HTC.data_ptr(), q_HTC.stride(0), q_HTC.stride(1), heads, rows),
        *(keys_GSC.data_ptr(), values_GSC.data_ptr(), keys_GSC.stride(0), kv_heads),
        *(seen - rows, size, out_THC.data_ptr(), torch.get_num_threads()),
    )
    native.done(code, f"attention of {tuple(q_HTC.shape)} over {tuple(keys_GSC.shape)}")
    return out_THC.transpose(0, 1)
