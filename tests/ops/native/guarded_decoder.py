"""Run as a program: native decoding on arrays that touch a forbidden page, as guarded.py does for the other kernels."""

import sys

import guarded
import torch
from guarded import empty, release

from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.quantizer import Quantizer
from bitquest.ops import native, native_decoder, native_linear
from bitquest.ops.linear_spec import LinearSpec


def floats(*shape: int) -> torch.Tensor:
    return guarded.guarded(torch.randn(*shape))


def packed(width: int, channels: int, bits: int, x_bits: int | None) -> native_decoder.Layer:
    weight, activation = Quantizer(UniformGrid(bits)), None if x_bits is None else Quantizer(UniformGrid(x_bits))
    spec = LinearSpec(width, channels, weight, activation, 2)
    rows = native.quantize_rows(floats(channels, width), weight, 2, frozenset({"packed"}))
    form = integer_form(weight.grid)
    assert form is not None
    prepared = native_linear.prepare(rows.step, form, spec.input_form, width, packed=rows.packed)
    return native_decoder.Layer(spec, prepared, bias=floats(channels))


def dense(width: int, channels: int) -> native_decoder.Layer:
    return native_decoder.Layer(LinearSpec(width, channels, None, None, 1), dense=floats(channels, width))


def steps(heads: int, kv_heads: int, size: int, width: int, hidden: int, bits: int, x_bits: int | None) -> None:
    words, positions = 7, 5
    queries, keys = heads * size, kv_heads * size
    layers = {
        "q": packed(width, queries, bits, x_bits),
        "k": dense(width, keys),
        "v": packed(width, keys, bits, x_bits),
        "o": packed(queries, width, bits, x_bits),
        "gate": packed(width, hidden, bits, x_bits),
        "up": dense(width, hidden),
        "down": packed(hidden, width, bits, x_bits),
    }
    sizes = (width, size, size, queries, width, hidden)
    norms = {name: native_decoder.Norm(floats(n), 1e-5) for name, n in zip(native_decoder.NORMS, sizes, strict=True)}
    table = native.quantize_rows(floats(words, width), Quantizer(UniformGrid(4)), 2, frozenset({"packed"}))
    cache = tuple(floats(1, 1, kv_heads, positions, size) for _ in range(2))
    decoder = native_decoder.Decoder(
        native_decoder.Sizes(width, hidden, heads, kv_heads, size, words),
        [native_decoder.Block(norms, layers)],
        native_decoder.Table(packed=table.packed, step=table.step, grid=UniformGrid(4), block=2),
        native_decoder.Norm(floats(width), 1e-5),
        dense(width, words),
        (floats(positions, size), floats(positions, size)),
        cache,
    )
    for position in range(positions):
        decoder.step(words - 1 - position, position)
    release()


def main() -> None:
    for module in (native, native_linear, native_decoder):
        module.torch = guarded._Torch()  # type: ignore[attr-defined]
    torch.set_num_threads(2)
    for guarded.at_end in (True, False):
        for channels, width in ((1, 1), (3, 7), (9, 33), (18, 47), (3, 63)):
            for dtype in (torch.float32, torch.bfloat16):
                print("dense", guarded.at_end, channels, width, dtype, flush=True)
                w = empty(channels, width, dtype=dtype).copy_(torch.randn(channels, width))
                native_decoder.dense_vector(w, floats(width), floats(channels))
                release()
        for seen, size in ((1, 2), (5, 6), (16, 16), (17, 34), (3, 80)):
            print("attend", guarded.at_end, seen, size, flush=True)
            native_decoder.attend(floats(size), floats(seen, size), floats(seen, size))
            release()
            native_decoder.attend_rows(floats(2, seen, size), floats(1, seen, size), floats(1, seen, size))
            release()
        for bits, x_bits in ((1, 1), (4, 4), (1, 8), (4, None)):
            for shape in ((2, 1, 6, 10, 14), (3, 3, 2, 6, 34)):
                print("steps", guarded.at_end, bits, x_bits, shape, flush=True)
                steps(*shape, bits, x_bits)
    print("done", native.isa())


if __name__ == "__main__":
    sys.exit(main())
