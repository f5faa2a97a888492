// Products of bit planes by xor and popcount: 1-bit weights with activations of 1 to 4 bits, 2-bit with 1 and 2.
//
// With v = sum of 2^p v_p and u = sum of 2^q u_q, the dot of the odd integers 2v + 1 - 2^b and 2u + 1 - 2^c over K
// elements is (2^b - 1)(2^c - 1) K + 2 D with D = - sum over p, q of 2^(p + q) popcount(v_p xor u_q).
// Three operations on four pipes per 512 bit products: 683 a cycle, 2860 GMAC/s by one core (measured: the same in a
// loop of its own), divided by the number of pairs of planes; vpdpbusd does 500.
// Carry-save adders would save popcounts, but vpternlogd overwrites an operand and the copies cost what they save.
#include "products.h"

namespace bq::avx512 {
namespace {

constexpr int kPair = 2;  // tiles of channels in a register tile

// Accumulators: one per weight 2^(p + q), token and tile of channels; 24 of them.
constexpr int full_height(int w_planes, int x_planes) { return 24 / (kPair * (w_planes + x_planes - 1)); }

// D of T tokens x C tiles of channels, over `blocks` blocks in each of `groups` scale groups.
template <int W, int X, int T, int C>
void dots_planes(const uint8_t *words, int64_t apart, const int32_t *x, int64_t groups, int64_t blocks, int32_t *d) {
    for (int64_t g = 0; g < groups; ++g, d += T * C * kLanes) {
        __m512i acc[T][C][W + X - 1];
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
                for (int s = 0; s < W + X - 1; ++s) acc[t][c][s] = _mm512_setzero_si512();
            }
        }
        for (int64_t b = 0; b < blocks; ++b, words += W * 64, x += X * T) {
            __m512i v[C][W];
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
                for (int p = 0; p < W; ++p) v[c][p] = _mm512_loadu_si512(words + c * apart + p * 64);
            }
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int q = 0; q < X; ++q) {
                    const __m512i u = _mm512_set1_epi32(x[q * T + t]);
#pragma GCC unroll 2
                    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
                        for (int p = 0; p < W; ++p) {
                            subtract(acc[t][c][p + q], _mm512_popcnt_epi32(_mm512_xor_si512(v[c][p], u)));
                        }
                    }
                }
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) {
                __m512i total = acc[t][c][0];
#pragma GCC unroll 4
                for (int s = 1; s < W + X - 1; ++s) {
                    total = _mm512_add_epi32(total, _mm512_slli_epi32(acc[t][c][s], static_cast<unsigned>(s)));
                }
                _mm512_storeu_si512(d + (t * C + c) * kLanes, total);
            }
        }
    }
}

// The same for few tokens and one tile: one stream of weights, blocks in turn into kTurns sets of accumulators.
template <int W, int X, int T>
void dots_planes_few(const uint8_t *words, const int32_t *x, int64_t groups, int64_t blocks, int32_t *d) {
    constexpr int kTurns = T == 1 && W + X <= 4 ? 4 : 2;
    constexpr int kSums = W + X - 1;
    for (int64_t g = 0; g < groups; ++g, d += T * kLanes) {
        __m512i acc[kTurns][T][kSums];
#pragma GCC unroll 4
        for (int i = 0; i < kTurns; ++i) {
#pragma GCC unroll 2
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int s = 0; s < kSums; ++s) acc[i][t][s] = _mm512_setzero_si512();
            }
        }
        const auto block = [&](int turn) __attribute__((always_inline)) {
#pragma GCC unroll 2
            for (int p = 0; p < W; ++p) {
                _mm_prefetch(reinterpret_cast<const char *>(words + p * 64 + kAhead), _MM_HINT_T0);
                const __m512i v = _mm512_loadu_si512(words + p * 64);
#pragma GCC unroll 4
                for (int q = 0; q < X; ++q) {
#pragma GCC unroll 2
                    for (int t = 0; t < T; ++t) {
                        const __m512i u = _mm512_set1_epi32(x[q * T + t]);
                        subtract(acc[turn][t][p + q], _mm512_popcnt_epi32(_mm512_xor_si512(v, u)));
                    }
                }
            }
            words += W * 64;
            x += X * T;
        };
        int64_t b = 0;
        for (; b + kTurns <= blocks; b += kTurns) {
#pragma GCC unroll 4
            for (int i = 0; i < kTurns; ++i) block(i);
        }
        for (; b < blocks; ++b) block(0);
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
            __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int s = 0; s < kSums; ++s) {
                __m512i sum = acc[0][t][s];
#pragma GCC unroll 4
                for (int i = 1; i < kTurns; ++i) sum = _mm512_add_epi32(sum, acc[i][t][s]);
                total = _mm512_add_epi32(total, s == 0 ? sum : _mm512_slli_epi32(sum, static_cast<unsigned>(s)));
            }
            _mm512_storeu_si512(d + t * kLanes, total);
        }
    }
}

using FewKernel = void (*)(const uint8_t *, const int32_t *, int64_t, int64_t, int32_t *);

template <int T>
FewKernel few_kernel(int w_planes, int x_planes) {
    if (w_planes == 2) return x_planes == 1 ? dots_planes_few<2, 1, T> : dots_planes_few<2, 2, T>;
    switch (x_planes) {
    case 1: return dots_planes_few<1, 1, T>;
    case 2: return dots_planes_few<1, 2, T>;
    case 3: return dots_planes_few<1, 3, T>;
    default: return dots_planes_few<1, 4, T>;
    }
}

using Kernel = void (*)(const uint8_t *, int64_t, const int32_t *, int64_t, int64_t, int32_t *);

template <int W, int X, int T>
Kernel kernel_of_height(int64_t height, bool pair) {
    if constexpr (T > full_height(W, X)) {
        return nullptr;
    } else {
        if (height == T) return pair ? dots_planes<W, X, T, 2> : dots_planes<W, X, T, 1>;
        return nullptr;
    }
}

template <int W, int X>
Kernel kernel_of_planes(int64_t height, bool pair) {
    const Kernel all[] = {kernel_of_height<W, X, 1>(height, pair), kernel_of_height<W, X, 2>(height, pair),
                          kernel_of_height<W, X, 3>(height, pair), kernel_of_height<W, X, 4>(height, pair),
                          kernel_of_height<W, X, 6>(height, pair), kernel_of_height<W, X, 8>(height, pair),
                          kernel_of_height<W, X, 12>(height, pair)};
    for (const Kernel found : all) {
        if (found != nullptr) return found;
    }
    return nullptr;
}

Kernel kernel_of(int w_planes, int x_planes, int64_t height, bool pair) {
    if (w_planes == 2) {
        return x_planes == 1 ? kernel_of_planes<2, 1>(height, pair) : kernel_of_planes<2, 2>(height, pair);
    }
    switch (x_planes) {
    case 1: return kernel_of_planes<1, 1>(height, pair);
    case 2: return kernel_of_planes<1, 2>(height, pair);
    case 3: return kernel_of_planes<1, 3>(height, pair);
    default: return kernel_of_planes<1, 4>(height, pair);
    }
}

}  // namespace

Tiling planes_tiling(int64_t rows, int w_planes, int x_planes) {
    return tiling_of(rows, full_height(w_planes, x_planes));
}

// One or two tokens.
void run_few(const Plan &plan, int64_t rows, const int32_t *x_words, int x_planes, int threads) {
    const ProductLayout &l = plan.layout;
    const int64_t tile_bytes = l.groups * l.blocks * l.bits * 64;
    const FewKernel kernel = rows == 1 ? few_kernel<1>(l.bits, x_planes) : few_kernel<2>(l.bits, x_planes);
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[kGroupsAtOnce * 2 * kLanes];
        alignas(64) float totals[2 * kLanes];
        for (int64_t tile = begin; tile < end; ++tile) {
            for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                const int64_t groups = plan.groups - g < kGroupsAtOnce ? plan.groups - g : kGroupsAtOnce;
                kernel(plan.words + tile * tile_bytes + g * plan.blocks * l.bits * 64,
                       x_words + g * plan.blocks * x_planes * rows, groups, plan.blocks, d);
                finish(plan, d, totals, {0, rows, rows, tile, 1, g, groups});
            }
        }
    };
    parallel_for(threads, l.tiles, 1, share);
}

void run_planes(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int x_planes, int threads) {
    if (tiling.full_tiles == 0 && tiling.rest_rows <= 2) {
        run_few(plan, tiling.rest_rows, x_words, x_planes, threads);
        return;
    }
    const ProductLayout &l = plan.layout;
    const int64_t tile_bytes = l.groups * l.blocks * l.bits * 64;
    const int64_t group_bytes = plan.blocks * l.bits * 64;
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[kGroupsAtOnce * 12 * kPair * kLanes];
        alignas(64) float totals[12 * kPair * kLanes];
        for (int64_t first = begin; first < end; first += kPair) {
            const int64_t tiles = end - first < kPair ? end - first : kPair;
            for (int64_t i = 0; i < tiling.tiles(); ++i) {
                const int64_t height = tiling.height(i);
                const Kernel kernel = kernel_of(l.bits, x_planes, height, tiles == kPair);
                const int32_t *x = x_words + i * tiling.full * plan.groups * plan.blocks * x_planes;
                for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                    const int64_t groups = plan.groups - g < kGroupsAtOnce ? plan.groups - g : kGroupsAtOnce;
                    kernel(plan.words + first * tile_bytes + g * group_bytes, tile_bytes,
                           x + g * plan.blocks * x_planes * height, groups, plan.blocks, d);
                    finish(plan, d, totals, {i * tiling.full, tiling.count(i), height, first, tiles, g, groups});
                }
            }
        }
    };
    parallel_for(threads, l.tiles, kPair, share);
}

}  // namespace bq::avx512
