// Products of unsigned weight bytes v and int8 activations by vpdpbusd: every width that bit planes do not serve.
//
// Up to 3 rows: fields of the packed words are masked, not shifted, so that a word costs one `and` per 64 products.
// Field j is then v * 2^(bits * j), below 256; it has accumulators of its own, shifted once at the end. The floor is
// the bytes of the weight / bandwidth, or 4 cycles of vpdpbusd for 64 bytes of 1-bit weights, half a cycle at 8 bits.
// Up to 12 rows: fields are shifted and masked in registers, once for all rows.
// More: the words of two tiles of channels are unpacked to bytes (level 2 holds them) and a tile of 12 rows x 32
// channels stays in registers: 14 loads for 24 vpdpbusd, so that 128 products a cycle, 500 GMAC/s, are the floor.
#include "products.h"

namespace bq::avx512 {
namespace {

constexpr int kFull = 12;  // rows of a register tile
constexpr int kPair = 2;   // tiles of channels in it

template <int Bits>
inline __m512i field_mask(int j) {
    return _mm512_set1_epi8(static_cast<char>(((1 << Bits) - 1) << (Bits * j)));
}

// D of T rows x one tile of channels from the packed words, over `blocks` blocks in each of `groups` scale groups.
template <int Bits, int T>
void dots_few(const uint8_t *words, const int32_t *x, int64_t groups, int64_t blocks, int32_t *d) {
    constexpr int kFields = 8 / Bits;
    for (int64_t g = 0; g < groups; ++g, d += T * kLanes) {
        __m512i acc[8][T];
#pragma GCC unroll 8
        for (int q = 0; q < 8; ++q) {
#pragma GCC unroll 3
            for (int t = 0; t < T; ++t) acc[q][t] = _mm512_setzero_si512();
        }
        for (int64_t b = 0; b < blocks; ++b, words += Bits * 64, x += 8 * T) {
#pragma GCC unroll 8
            for (int w = 0; w < Bits; ++w) {
                _mm_prefetch(reinterpret_cast<const char *>(words + w * 64 + kAhead), _MM_HINT_T0);
                const __m512i word = _mm512_loadu_si512(words + w * 64);
#pragma GCC unroll 8
                for (int j = 0; j < kFields; ++j) {
                    const int q = w * kFields + j;
                    const __m512i v = Bits == 8 ? word : _mm512_and_si512(word, field_mask<Bits>(j));
#pragma GCC unroll 3
                    for (int t = 0; t < T; ++t) add_dots(acc[q][t], v, _mm512_set1_epi32(x[q * T + t]));
                }
            }
        }
#pragma GCC unroll 3
        for (int t = 0; t < T; ++t) {
            __m512i total = acc[0][t];  // field 0
#pragma GCC unroll 8
            for (int q = 1; q < 8; ++q) {
                const auto shift = static_cast<unsigned>(Bits * (q % kFields));
                total = _mm512_add_epi32(total, shift == 0 ? acc[q][t] : _mm512_srai_epi32(acc[q][t], shift));
            }
            _mm512_storeu_si512(d + t * kLanes, total);
        }
    }
}

// The same for up to 12 rows.
template <int Bits, int T>
void dots_some(const uint8_t *words, const int32_t *x, int64_t groups, int64_t blocks, int32_t *d) {
    constexpr int kFields = 8 / Bits;
    constexpr int kChains = T < 8 ? 2 : 1;  // per row: 8 dots must be under way
    const __m512i mask = field_mask<Bits>(0);
    for (int64_t g = 0; g < groups; ++g, d += T * kLanes) {
        __m512i acc[T][kChains];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            for (int c = 0; c < kChains; ++c) acc[t][c] = _mm512_setzero_si512();
        }
        for (int64_t b = 0; b < blocks; ++b, words += Bits * 64, x += 8 * T) {
#pragma GCC unroll 8
            for (int q = 0; q < 8; ++q) {
                const __m512i word = _mm512_loadu_si512(words + q / kFields * 64);
                const auto shift = static_cast<unsigned>(Bits * (q % kFields));
                const __m512i field = shift == 0 ? word : _mm512_srli_epi32(word, shift);
                const __m512i v = Bits == 8 ? word : _mm512_and_si512(field, mask);
#pragma GCC unroll 12
                for (int t = 0; t < T; ++t) add_dots(acc[t][q % kChains], v, _mm512_set1_epi32(x[q * T + t]));
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
            const __m512i total = kChains == 2 ? _mm512_add_epi32(acc[t][0], acc[t][kChains - 1]) : acc[t][0];
            _mm512_storeu_si512(d + t * kLanes, total);
        }
    }
}

// D of T rows x C tiles of channels from unpacked bytes; tile c begins at bytes + c * apart.
template <int T, int C>
void dots_bytes(const uint8_t *bytes, int64_t apart, const int32_t *x, int64_t groups, int64_t quads, int32_t *d) {
    for (int64_t g = 0; g < groups; ++g, d += T * C * kLanes) {
        __m512i acc[T][C];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[t][c] = _mm512_setzero_si512();
        }
        for (int64_t q = 0; q < quads; ++q, bytes += 64, x += T) {
            __m512i v[C];
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) v[c] = _mm512_loadu_si512(bytes + c * apart);
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) {
                const __m512i a = _mm512_set1_epi32(x[t]);
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) add_dots(acc[t][c], v[c], a);
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) _mm512_storeu_si512(d + (t * C + c) * kLanes, acc[t][c]);
        }
    }
}

// The bytes v of `count` vectors of words in the order of the quads.
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

using PackedKernel = void (*)(const uint8_t *, const int32_t *, int64_t, int64_t, int32_t *);
using BytesKernel = void (*)(const uint8_t *, int64_t, const int32_t *, int64_t, int64_t, int32_t *);

template <int Bits>
PackedKernel packed_kernel(int64_t height) {
    switch (height) {
    case 1: return dots_few<Bits, 1>;
    case 2: return dots_few<Bits, 2>;
    case 3: return dots_few<Bits, 3>;
    case 4: return dots_some<Bits, 4>;
    case 6: return dots_some<Bits, 6>;
    case 8: return dots_some<Bits, 8>;
    default: return dots_some<Bits, kFull>;
    }
}

PackedKernel packed_kernel(int32_t bits, int64_t height) {
    switch (bits) {
    case 1: return packed_kernel<1>(height);
    case 2: return packed_kernel<2>(height);
    case 4: return packed_kernel<4>(height);
    default: return packed_kernel<8>(height);
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

int64_t tile_bytes(const ProductLayout &l) { return l.groups * l.blocks * l.bits * 64; }

int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// One tile of rows.
int32_t run_packed(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int threads) {
    const ProductLayout &l = plan.layout;
    const int64_t height = tiling.height(0);
    const PackedKernel kernel = packed_kernel(l.bits, height);
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[kGroupsAtOnce * kFull * kLanes];
        alignas(64) float totals[kFull * kLanes];
        for (int64_t tile = begin; tile < end; ++tile) {
            const uint8_t *words = plan.words + tile * tile_bytes(l);
            for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                const int64_t groups = at_most(plan.groups - g, kGroupsAtOnce);
                kernel(words + g * plan.blocks * l.bits * 64, x_words + g * plan.blocks * 8 * height, groups,
                       plan.blocks, d);
                finish(plan, d, totals, {0, tiling.count(0), height, tile, 1, g, groups});
            }
        }
    };
    parallel_for(threads, l.tiles, 1, share);
    return BQ_OK;
}

void unpack_tile(const Plan &plan, int64_t tile, uint8_t *bytes) {
    const ProductLayout &l = plan.layout;
    const uint8_t *words = plan.words + tile * tile_bytes(l);
    const int64_t count = tile_bytes(l) / 64;
    switch (l.bits) {
    case 1: unpack<1>(words, count, bytes); break;
    case 2: unpack<2>(words, count, bytes); break;
    default: unpack<4>(words, count, bytes); break;
    }
}

}  // namespace

Tiling bytes_tiling(int64_t rows) { return tiling_of(rows, kFull); }

int32_t run_bytes(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int threads) {
    if (tiling.tiles() == 1) return run_packed(plan, tiling, x_words, threads);
    const ProductLayout &l = plan.layout;
    const int64_t quads = plan.blocks * 8;
    const int64_t apart = plan.groups * quads * 64;  // bytes of a tile of channels
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        alignas(64) int32_t d[kGroupsAtOnce * kFull * kPair * kLanes];
        alignas(64) float totals[kFull * kPair * kLanes];
        auto *spare = l.bits == 8 ? nullptr : static_cast<uint8_t *>(scratch(1, static_cast<size_t>(kPair * apart)));
        if (l.bits != 8 && spare == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t first = begin; first < end; first += kPair) {
            const int64_t tiles = at_most(end - first, kPair);
            const uint8_t *bytes = l.bits == 8 ? plan.words + first * apart : spare;
            for (int64_t c = 0; c < tiles && l.bits != 8; ++c) unpack_tile(plan, first + c, spare + c * apart);
            for (int64_t i = 0; i < tiling.tiles(); ++i) {
                const int64_t height = tiling.height(i);
                const BytesKernel kernel = tiles == kPair ? bytes_kernel<kPair>(height) : bytes_kernel<1>(height);
                const int32_t *x = x_words + i * kFull * plan.groups * quads;
                for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                    const int64_t groups = at_most(plan.groups - g, kGroupsAtOnce);
                    kernel(bytes + g * quads * 64, apart, x + g * quads * height, groups, quads, d);
                    finish(plan, d, totals, {i * kFull, tiling.count(i), height, first, tiles, g, groups});
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

void sum_weights(const Plan &plan, int32_t *sums, int threads) {
    const ProductLayout &l = plan.layout;
    const PackedKernel kernel = packed_kernel(l.bits, 1);
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t ones[8];
        for (int32_t &quad : ones) quad = 0x01010101;
        for (int64_t tile = begin; tile < end; ++tile) {
            for (int64_t g = 0; g < plan.groups; ++g) {
                alignas(64) int32_t part[kLanes];
                __m512i total = _mm512_setzero_si512();
                for (int64_t b = 0; b < plan.blocks; ++b) {
                    const int64_t at = (g * plan.blocks + b) * l.bits * 64;
                    kernel(plan.words + tile * tile_bytes(l) + at, ones, 1, 1, part);
                    total = _mm512_add_epi32(total, _mm512_load_si512(part));
                }
                _mm512_store_si512(sums + (tile * plan.groups + g) * kLanes, total);
            }
        }
    };
    parallel_for(threads, l.tiles, 1, share);
}

}  // namespace bq::avx512
