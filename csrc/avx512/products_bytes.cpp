// Products of unsigned weight bytes v and int8 activations by vpdpbusd: every width that bit planes do not serve.
//
// One or a few tokens: fields of the packed words are masked, not shifted, so that a word costs one `and` per 64
// products. Field j is then v * 2^(bits * j), below 256; it has an accumulator of its own, shifted once at the end.
// Floor: bytes of the weight / bandwidth; 4 cycles of vpdpbusd for 64 bytes of 1-bit weights, half a cycle at 8 bits.
// More tokens: the words of two tiles of channels are unpacked to bytes (level 2 holds them) and a tile of 12 tokens x
// 32 channels stays in registers: 14 loads for 24 vpdpbusd, so 128 products a cycle, 500 GMAC/s, is the floor.
#include "products.h"

namespace bq::avx512 {
namespace {

constexpr int kFull = 12;   // tokens of a register tile
constexpr int kPair = 2;    // tiles of channels in it

template <int Bits>
inline __m512i field_mask(int j) {
    return _mm512_set1_epi8(static_cast<char>(((1 << Bits) - 1) << (Bits * j)));
}

// D of one tile of 16 channels and T tokens over `blocks` blocks, from the packed words.
template <int Bits, int T>
void dots_packed(const uint8_t *words, const int32_t *x, int64_t blocks, int32_t *d) {
    constexpr int kFields = 8 / Bits;
    __m512i acc[8][T];
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) acc[q][t] = _mm512_setzero_si512();
    }
    for (int64_t b = 0; b < blocks; ++b) {
#pragma GCC unroll 8
        for (int w = 0; w < Bits; ++w) {
            const __m512i word = _mm512_loadu_si512(words + (b * Bits + w) * 64);
#pragma GCC unroll 8
            for (int j = 0; j < kFields; ++j) {
                const int q = w * kFields + j;
                const __m512i v = Bits == 8 ? word : _mm512_and_si512(word, field_mask<Bits>(j));
#pragma GCC unroll 3
                for (int t = 0; t < T; ++t) {
                    acc[q][t] = _mm512_dpbusd_epi32(acc[q][t], v, _mm512_set1_epi32(x[(b * 8 + q) * T + t]));
                }
            }
        }
    }
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) {
        __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
            total = _mm512_add_epi32(total, _mm512_srai_epi32(acc[q][t], static_cast<unsigned>(Bits * (q % kFields))));
        }
        _mm512_storeu_si512(d + t * kLanes, total);
    }
}

// D of T tokens x C tiles of channels over `quads` quads of bytes; tile c begins at bytes + c * apart.
template <int T, int C>
void dots_bytes(const uint8_t *bytes, int64_t apart, const int32_t *x, int64_t quads, int32_t *d) {
    __m512i acc[T][C];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) acc[t][c] = _mm512_setzero_si512();
    }
    for (int64_t q = 0; q < quads; ++q) {
        __m512i v[C];
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) v[c] = _mm512_loadu_si512(bytes + c * apart + q * 64);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            const __m512i a = _mm512_set1_epi32(x[q * T + t]);
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[t][c] = _mm512_dpbusd_epi32(acc[t][c], v[c], a);
        }
    }
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) _mm512_storeu_si512(d + (t * C + c) * kLanes, acc[t][c]);
    }
}

// The bytes v of a tile in the order of the quads.
template <int Bits>
void unpack(const uint8_t *words, int64_t count, uint8_t *bytes) {
    constexpr int kFields = 8 / Bits;
    const __m512i mask = field_mask<Bits>(0);
    for (int64_t w = 0; w < count; ++w) {
        const __m512i word = _mm512_loadu_si512(words + w * 64);
#pragma GCC unroll 8
        for (int j = 0; j < kFields; ++j) {
            const __m512i v = _mm512_srli_epi32(word, static_cast<unsigned>(Bits * j));
            _mm512_store_si512(bytes + (w * kFields + j) * 64, _mm512_and_si512(v, mask));
        }
    }
}

using PackedKernel = void (*)(const uint8_t *, const int32_t *, int64_t, int32_t *);
using BytesKernel = void (*)(const uint8_t *, int64_t, const int32_t *, int64_t, int32_t *);

template <int T>
PackedKernel packed_kernel(int32_t bits) {
    switch (bits) {
    case 1: return dots_packed<1, T>;
    case 2: return dots_packed<2, T>;
    case 4: return dots_packed<4, T>;
    default: return dots_packed<8, T>;
    }
}

template <int C>
BytesKernel bytes_kernel(int64_t height) {
    switch (height) {
    case 1: return dots_bytes<1, C>;
    case 2: return dots_bytes<2, C>;
    case 3: return dots_bytes<3, C>;
    case 4: return dots_bytes<4, C>;
    case 6: return dots_bytes<6, C>;
    case 8: return dots_bytes<8, C>;
    default: return dots_bytes<kFull, C>;
    }
}

int32_t run_few(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int threads) {
    const ProductLayout &l = plan.layout;
    const int64_t height = tiling.rest_height;
    const PackedKernel kernel = height == 1   ? packed_kernel<1>(l.bits)
                                : height == 2 ? packed_kernel<2>(l.bits)
                                              : packed_kernel<3>(l.bits);
    const int64_t tile_bytes = l.groups * l.blocks * l.bits * 64;
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[3 * kLanes];
        alignas(64) float totals[3 * kLanes];
        for (int64_t tile = begin; tile < end; ++tile) {
            for (int64_t g = 0; g < plan.groups; ++g) {
                const uint8_t *words = plan.words + tile * tile_bytes + g * plan.blocks * l.bits * 64;
                kernel(words, x_words + g * plan.blocks * 8 * height, plan.blocks, d);
                finish(plan, d, totals, 0, tiling.rest_rows, tile, 1, g);
            }
        }
    };
    parallel_for(threads, l.tiles, 1, share);
    return BQ_OK;
}

void unpack_tile(const Plan &plan, int64_t tile, uint8_t *bytes) {
    const ProductLayout &l = plan.layout;
    const int64_t count = l.groups * l.blocks * l.bits;
    const uint8_t *words = plan.words + tile * count * 64;
    switch (l.bits) {
    case 1: unpack<1>(words, count, bytes); break;
    case 2: unpack<2>(words, count, bytes); break;
    default: unpack<4>(words, count, bytes); break;
    }
}

}  // namespace

Tiling bytes_tiling(int64_t rows) { return tiling_of(rows, kFull); }

int32_t run_bytes(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int threads) {
    if (tiling.full_tiles == 0 && tiling.rest_height <= 3) return run_few(plan, tiling, x_words, threads);
    const ProductLayout &l = plan.layout;
    const int64_t quads = plan.blocks * 8;
    const int64_t apart = plan.groups * quads * 64;  // bytes of a tile of channels
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        alignas(64) int32_t d[kFull * kPair * kLanes];
        alignas(64) float totals[kFull * kPair * kLanes];
        auto *spare = l.bits == 8 ? nullptr : static_cast<uint8_t *>(scratch(1, static_cast<size_t>(kPair * apart)));
        if (l.bits != 8 && spare == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t first = begin; first < end; first += kPair) {
            const int64_t tiles = end - first < kPair ? end - first : kPair;
            const uint8_t *bytes = l.bits == 8 ? plan.words + first * apart : spare;
            for (int64_t c = 0; c < tiles && l.bits != 8; ++c) unpack_tile(plan, first + c, spare + c * apart);
            for (int64_t i = 0; i < tiling.tiles(); ++i) {
                const int64_t height = tiling.height(i);
                const BytesKernel kernel = tiles == kPair ? bytes_kernel<kPair>(height) : bytes_kernel<1>(height);
                const int32_t *x = x_words + i * kFull * plan.groups * quads;
                for (int64_t g = 0; g < plan.groups; ++g) {
                    kernel(bytes + g * quads * 64, apart, x + g * quads * height, quads, d);
                    finish(plan, d, totals, i * kFull, tiling.count(i), first, tiles, g);
                }
            }
        }
    };
    parallel_for(threads, l.tiles, kPair, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

}  // namespace bq::avx512
