// Products of unsigned weight bytes v and int8 activations by vpdpbusd: every width that bit planes do not serve.
//
// Up to 3 rows: fields of the packed words are masked, not shifted, so that a word costs one `and` per 64 products.
// Field j is then v * 2^(bits * j), below 256; it has accumulators of its own, shifted once at the end. The floor is
// the bytes of the weight / bandwidth, or 4 cycles of vpdpbusd for 64 bytes of 1-bit weights, half a cycle at 8 bits.
// More rows: fields are shifted and masked in registers, once for 12 rows, and a tile of 12 rows x 32 channels stays in
// registers: 14 loads for 24 vpdpbusd, so that 128 products a cycle, 500 GMAC/s, are the floor. Unpacking to bytes in
// memory first was slower at every number of rows: the shifts are free where vpdpbusd is what is waited for.
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

// D of T rows x C tiles of channels; the words of tile c begin at words + c * apart.
template <int Bits, int T, int C>
void dots_many(const uint8_t *words, int64_t apart, const int32_t *x, int64_t groups, int64_t blocks, int32_t *d) {
    constexpr int kFields = 8 / Bits;
    const __m512i mask = field_mask<Bits>(0);
    for (int64_t g = 0; g < groups; ++g, d += T * C * kLanes) {
        __m512i acc[T][C];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) acc[t][c] = _mm512_setzero_si512();
        }
        for (int64_t w = 0; w < blocks * Bits; ++w, words += 64, x += kFields * T) {
            __m512i word[C];
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) word[c] = _mm512_loadu_si512(words + c * apart);
#pragma GCC unroll 8
            for (int j = 0; j < kFields; ++j) {
                __m512i v[C];
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) {
                    const auto shift = static_cast<unsigned>(Bits * j);
                    const __m512i field = j == 0 ? word[c] : _mm512_srli_epi32(word[c], shift);
                    v[c] = Bits == 8 ? word[c] : _mm512_and_si512(field, mask);
                }
#pragma GCC unroll 12
                for (int t = 0; t < T; ++t) {
                    const __m512i a = _mm512_set1_epi32(x[j * T + t]);
#pragma GCC unroll 2
                    for (int c = 0; c < C; ++c) add_dots(acc[t][c], v[c], a);
                }
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) _mm512_storeu_si512(d + (t * C + c) * kLanes, acc[t][c]);
        }
    }
}

using FewKernel = void (*)(const uint8_t *, const int32_t *, int64_t, int64_t, int32_t *);
using ManyKernel = void (*)(const uint8_t *, int64_t, const int32_t *, int64_t, int64_t, int32_t *);

template <int T>
FewKernel few_kernel(int32_t bits) {
    switch (bits) {
    case 1: return dots_few<1, T>;
    case 2: return dots_few<2, T>;
    case 4: return dots_few<4, T>;
    default: return dots_few<8, T>;
    }
}

template <int Bits, int C>
ManyKernel many_kernel(int64_t height) {
    switch (height) {
    case 1: return dots_many<Bits, 1, C>;
    case 2: return dots_many<Bits, 2, C>;
    case 3: return dots_many<Bits, 3, C>;
    case 4: return dots_many<Bits, 4, C>;
    case 6: return dots_many<Bits, 6, C>;
    case 8: return dots_many<Bits, 8, C>;
    default: return dots_many<Bits, kFull, C>;
    }
}

template <int C>
ManyKernel many_kernel(int32_t bits, int64_t height) {
    switch (bits) {
    case 1: return many_kernel<1, C>(height);
    case 2: return many_kernel<2, C>(height);
    case 4: return many_kernel<4, C>(height);
    default: return many_kernel<8, C>(height);
    }
}

int64_t tile_bytes(const ProductLayout &l) { return l.groups * l.blocks * l.bits * 64; }

int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// One to three rows.
void run_few(const Plan &plan, int64_t rows, const int32_t *x_words, int threads) {
    const ProductLayout &l = plan.layout;
    const FewKernel kernel = rows == 1   ? few_kernel<1>(l.bits)
                             : rows == 2 ? few_kernel<2>(l.bits)
                                         : few_kernel<3>(l.bits);
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[kGroupsAtOnce * 3 * kLanes];
        alignas(64) float totals[3 * kLanes];
        for (int64_t tile = begin; tile < end; ++tile) {
            const uint8_t *words = plan.words + tile * tile_bytes(l);
            for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                const int64_t groups = at_most(plan.groups - g, kGroupsAtOnce);
                kernel(words + g * plan.blocks * l.bits * 64, x_words + g * plan.blocks * 8 * rows, groups,
                       plan.blocks, d);
                finish(plan, d, totals, {0, rows, rows, tile, 1, g, groups});
            }
        }
    };
    parallel_for(threads, l.tiles, 1, share);
}

}  // namespace

Tiling bytes_tiling(int64_t rows) { return tiling_of(rows, kFull); }

void run_bytes(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int threads) {
    if (tiling.padded() <= 3) {
        run_few(plan, tiling.rest_rows, x_words, threads);
        return;
    }
    const ProductLayout &l = plan.layout;
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[kGroupsAtOnce * kFull * kPair * kLanes];
        alignas(64) float totals[kFull * kPair * kLanes];
        for (int64_t first = begin; first < end; first += kPair) {
            const int64_t tiles = at_most(end - first, kPair);
            const uint8_t *words = plan.words + first * tile_bytes(l);
            for (int64_t i = 0; i < tiling.tiles(); ++i) {
                const int64_t height = tiling.height(i);
                const ManyKernel kernel =
                    tiles == kPair ? many_kernel<kPair>(l.bits, height) : many_kernel<1>(l.bits, height);
                const int32_t *x = x_words + i * kFull * plan.groups * plan.blocks * 8;
                for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                    const int64_t groups = at_most(plan.groups - g, kGroupsAtOnce);
                    kernel(words + g * plan.blocks * l.bits * 64, tile_bytes(l), x + g * plan.blocks * 8 * height,
                           groups, plan.blocks, d);
                    finish(plan, d, totals, {i * kFull, tiling.count(i), height, first, tiles, g, groups});
                }
            }
        }
    };
    parallel_for(threads, l.tiles, kPair, share);
}

void sum_weights(const Plan &plan, int32_t *sums, int threads) {
    const ProductLayout &l = plan.layout;
    const FewKernel kernel = few_kernel<1>(l.bits);
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
