"""GGUF files of random weights, so that llama.cpp can be timed on a model of any shape in any of its types.

The format: github.com/ggml-org/ggml, docs/gguf.md; the blocks of each type: ggml-common.h of the same project.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bitquest.models import LlamaConfig

_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8
_TILE_BYTES = 2**22  # random bytes that are repeated; more would only take longer to make


@dataclass(frozen=True)
class BlockType:
    """A ggml type: its number, elements and bytes of a block, and where a block has its float16 scales."""

    name: str
    number: int
    elements: int
    size: int
    scales_at: tuple[int, ...]  # empty: plain floats

    def size_of(self, elements: int) -> int:
        return elements // self.elements * self.size


TYPES: dict[str, BlockType] = {
    block.name: block
    for block in (
        BlockType("F32", 0, 1, 4, ()),
        BlockType("F16", 1, 1, 2, ()),
        BlockType("Q8_0", 8, 32, 34, (0,)),
        BlockType("Q4_0", 2, 32, 18, (0,)),
        BlockType("Q2_K", 10, 256, 84, (80, 82)),
        BlockType("TQ2_0", 35, 256, 66, (64,)),
        BlockType("TQ1_0", 34, 256, 54, (52,)),
        BlockType("Q1_0", 41, 128, 18, (0,)),
    )
}

# The types of a model's linear layers that llama.cpp is timed in.
PEER_TYPES = ("F16", "Q8_0", "Q4_0", "Q2_K", "TQ2_0", "TQ1_0", "Q1_0")


def write_gguf(path: Path, config: LlamaConfig, layers: str, tables: str, seed: int = 0) -> None:
    """A Llama whose linear layers are of the type `layers`, and token table and head of the type `tables`."""
    tensors = [(name, shape, TYPES[kind]) for name, shape, kind in _tensors(config, layers, tables)]
    keys = _keys(config)
    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
        for key, kind, value in keys:
            file.write(_string(key) + struct.pack("<I", kind))
            file.write(
                _string(value) if isinstance(value, str) else struct.pack("<I" if kind == _UINT32 else "<f", value)
            )
        offset = 0
        for name, shape, block in tensors:
            file.write(_string(name) + struct.pack("<I", len(shape)))
            file.write(struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", block.number, offset))
            offset += _padded(block.size_of(int(np.prod(shape))))
        file.write(bytes(-file.tell() % _ALIGNMENT))
        tiles: dict[str, bytes] = {}
        for _, shape, block in tensors:
            tile = tiles.setdefault(block.name, _tile(block, rng)) if len(shape) > 1 else struct.pack("<f", 1.0)
            _write_tiled(file, tile, block.size_of(int(np.prod(shape))))


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


def _keys(config: LlamaConfig) -> list[tuple[str, int, int | float | str]]:
    return [
        ("general.architecture", _STRING, "llama"),
        ("general.alignment", _UINT32, _ALIGNMENT),
        ("tokenizer.ggml.model", _STRING, "no_vocab"),
        ("llama.vocab_size", _UINT32, config.vocab_size),
        ("llama.context_length", _UINT32, config.max_position_embeddings),
        ("llama.embedding_length", _UINT32, config.hidden_size),
        ("llama.block_count", _UINT32, config.num_hidden_layers),
        ("llama.feed_forward_length", _UINT32, config.intermediate_size),
        ("llama.rope.dimension_count", _UINT32, config.head_size),
        ("llama.attention.head_count", _UINT32, config.num_attention_heads),
        ("llama.attention.head_count_kv", _UINT32, config.num_key_value_heads),
        ("llama.attention.layer_norm_rms_epsilon", _FLOAT32, config.rms_norm_eps),
    ]


def _tensors(config: LlamaConfig, layers: str, tables: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape as in torch, type) of every tensor."""
    d, hidden, v = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    yield "token_embd.weight", (v, d), tables
    for number in range(config.num_hidden_layers):
        block = f"blk.{number}."
        yield block + "attn_norm.weight", (d,), "F32"
        yield block + "ffn_norm.weight", (d,), "F32"
        for name, shape in (
            ("attn_q", (q, d)),
            ("attn_k", (kv, d)),
            ("attn_v", (kv, d)),
            ("attn_output", (d, q)),
            ("ffn_gate", (hidden, d)),
            ("ffn_up", (hidden, d)),
            ("ffn_down", (d, hidden)),
        ):
            yield f"{block}{name}.weight", shape, layers
    yield "output_norm.weight", (d,), "F32"
    yield "output.weight", (v, d), tables


def _tile(block: BlockType, rng: np.random.Generator) -> bytes:
    """A few million bytes of random blocks whose scales are those of weights of σ about 0.02."""
    if not block.scales_at:
        values = rng.standard_normal(_TILE_BYTES // block.size, dtype=np.float32) * 0.02
        return values.astype(np.float16 if block.size == 2 else np.float32).tobytes()
    blocks = rng.integers(0, 256, (_TILE_BYTES // block.size, block.size), dtype=np.uint8)
    # σ of the integers of random codes, roughly.
    largest = {"Q8_0": 74.0, "Q4_0": 4.6, "Q2_K": 12.0}.get(block.name, 1.0)
    for at in block.scales_at:
        scales = (rng.uniform(0.5, 1.5, len(blocks)) * 0.02 / largest).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.tobytes()


def _write_tiled(file: BinaryIO, tile: bytes, size: int) -> None:
    for _ in range(size // len(tile)):
        file.write(tile)
    file.write(tile[: size % len(tile)])
    file.write(bytes(-size % _ALIGNMENT))
