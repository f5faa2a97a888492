// Products of unsigned weight bytes v and int8 activations, channels in 32-bit lanes; see layout.h for the words.
//
// An instruction set defines, for Bits of 1, 2, 4 and 8,
//   template <int Bits> struct Dots {
//       kSteps    vectors that a block of 32 elements becomes: 8 of four bytes a lane, or 16 of two 16-bit integers
//       kRows, kTiles   the tile of rows x vectors of channels that registers hold
//       kChains   at least so many additions must be under way: sums are split where a tile has fewer
//       kShift    the kernels multiply v - kShift (for machines without a mixed product); D lacks kShift * A
//       Sum, Part sums of 32 bits, and sums over a block in 16 bits where those are exact (else empty)
//       field(words, step)      one of those vectors
//       add(sum, part, v, a)    the products with the activation's word a in every lane
//       kByLane   there is add_lane(sum, part, v, a, lane) too, for the word in one lane of a
//       fold(sum, part)         at the end of a block
//       total(sum)              D, one channel a lane
//   };
#pragma once

#include "finish.inl"

namespace bq::BQ_SPACE {
namespace {

// D of T rows x C vectors of channels; vector c begins at words + c * apart.
template <int Bits, int T, int C>
void dots(const uint8_t *words, int64_t apart, const int32_t *x, int64_t groups, int64_t blocks, int32_t *d) {
    using D = Dots<Bits>;
    constexpr bool kByLane = D::kByLane && T % kLanes == 0;
    constexpr int kSplit = T * C >= D::kChains ? 1 : 2 * T * C >= D::kChains ? 2 : 4;
    for (int64_t g = 0; g < groups; ++g, d += T * C * kLanes) {
        typename D::Sum sum[kSplit][T][C] = {};
        for (int64_t b = 0; b < blocks; ++b, words += Bits * 4 * kLanes, x += D::kSteps * T) {
            typename D::Part part[T][C] = {};
#pragma GCC unroll 16
            for (int s = 0; s < D::kSteps; ++s) {
                I32 v[C];
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) v[c] = D::field(words + c * apart, s);
                I32 a{};
#pragma GCC unroll 12
                for (int t = 0; t < T; ++t) {
                    if constexpr (kByLane) {
                        if (t % kLanes == 0) a = load<I32>(x + s * T + t);
#pragma GCC unroll 2
                        for (int c = 0; c < C; ++c) {
                            D::add_lane(sum[s % kSplit][t][c], part[t][c], v[c], a, t % kLanes);
                        }
                    } else {
                        a = splat(x + s * T + t);
#pragma GCC unroll 2
                        for (int c = 0; c < C; ++c) D::add(sum[s % kSplit][t][c], part[t][c], v[c], a);
                    }
                }
            }
#pragma GCC unroll 12
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
                for (int c = 0; c < C; ++c) D::fold(sum[0][t][c], part[t][c]);
            }
        }
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int c = 0; c < C; ++c) {
                I32 total = D::total(sum[0][t][c]);
#pragma GCC unroll 4
                for (int i = 1; i < kSplit; ++i) total += D::total(sum[i][t][c]);
                store(d + (t * C + c) * kLanes, total);
            }
        }
    }
}

using Kernel = void (*)(const uint8_t *, int64_t, const int32_t *, int64_t, int64_t, int32_t *);

template <int Bits, int T>
Kernel kernel_of_height(int64_t height, bool pair) {
    using D = Dots<Bits>;
    if constexpr (T > D::kRows) {
        return nullptr;
    } else {
        if (height == T) return pair ? dots<Bits, T, D::kTiles> : dots<Bits, T, 1>;
        return nullptr;
    }
}

template <int Bits>
Kernel kernel_of(int64_t height, bool pair) {
    const Kernel all[] = {kernel_of_height<Bits, 1>(height, pair), kernel_of_height<Bits, 2>(height, pair),
                          kernel_of_height<Bits, 3>(height, pair), kernel_of_height<Bits, 4>(height, pair),
                          kernel_of_height<Bits, 6>(height, pair), kernel_of_height<Bits, 8>(height, pair),
                          kernel_of_height<Bits, 12>(height, pair)};
    for (const Kernel found : all) {
        if (found != nullptr) return found;
    }
    return nullptr;
}

// What the rest of this set has to know of Dots<bits>.
struct BytesTraits {
    int64_t steps;
    int64_t rows;
    int64_t tiles;
    int32_t shift;
    Kernel (*kernel)(int64_t, bool);
};

template <int Bits>
BytesTraits traits() {
    return {Dots<Bits>::kSteps, Dots<Bits>::kRows, Dots<Bits>::kTiles, Dots<Bits>::kShift, kernel_of<Bits>};
}

BytesTraits bytes_traits(int32_t bits) {
    switch (bits) {
    case 1: return traits<1>();
    case 2: return traits<2>();
    case 4: return traits<4>();
    default: return traits<8>();
    }
}

// The three digits of a float must lie in one tile.
Tiling bytes_tiling(int64_t rows, int32_t bits, int32_t digits) {
    const int64_t most = bytes_traits(bits).rows;
    return Tiling(rows, digits == 3 ? most - most % 3 : most);
}

int32_t run_bytes(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int threads) {
    const ProductLayout &l = plan.layout;
    const BytesTraits is = bytes_traits(l.bits);
    const int64_t group_bytes = plan.blocks * l.bits * 4 * kLanes;
    const int64_t apart = plan.groups * group_bytes;
    const int64_t group_words = plan.blocks * is.steps;
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[kGroupsAtOnce * 12 * 2 * kLanes];
        alignas(64) float totals[12 * 2 * kLanes];
        for (int64_t first = begin; first < end; first += is.tiles) {
            const int64_t tiles = end - first < is.tiles ? 1 : is.tiles;
            for (int64_t i = 0; i < tiling.tiles(); ++i) {
                const int64_t height = tiling.height(i);
                const Kernel kernel = is.kernel(height, tiles == is.tiles);
                const int32_t *x = x_words + i * tiling.full * plan.groups * group_words;
                for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                    const int64_t groups = at_most(plan.groups - g, kGroupsAtOnce);
                    kernel(plan.words + first * apart + g * group_bytes, apart, x + g * group_words * height, groups,
                           plan.blocks, d);
                    finish(plan, d, totals, {i * tiling.full, tiling.count(i), height, first, tiles, g, groups});
                }
            }
        }
    };
    parallel_for(threads, l.tiles, is.tiles, share);
    return BQ_OK;
}

// V of every scale group of the plan, int32[tile][group][lane]: the product with a row of ones.
void sum_weights(const Plan &plan, int32_t *sums, int threads) {
    const ProductLayout &l = plan.layout;
    const BytesTraits is = bytes_traits(l.bits);
    const Kernel kernel = is.kernel(1, is.tiles == 1);
    const int64_t block_bytes = l.bits * 4 * kLanes;
    int32_t ones[16];
    for (int32_t &word : ones) word = is.steps == 8 ? 0x01010101 : 0x00010001;
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) {
            for (int64_t g = 0; g < plan.groups; ++g) {
                int32_t part[kLanes];
                I32 total{};
                for (int64_t b = 0; b < plan.blocks; ++b) {
                    const int64_t at = ((tile * plan.groups + g) * plan.blocks + b) * block_bytes;
                    kernel(plan.words + at, 0, ones, 1, 1, part);
                    total += load<I32>(part) + 32 * is.shift;
                }
                store(sums + (tile * plan.groups + g) * kLanes, total);
            }
        }
    };
    parallel_for(threads, l.tiles, 1, share);
}

}  // namespace
}  // namespace bq::BQ_SPACE
