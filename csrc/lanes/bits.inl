// Weights of 1 and 2 bits times activations of few bits, or of 1 bit times 8: which kernel, and the loops around it.
#pragma once

#include "tables.inl"

namespace bq::BQ_SPACE {
namespace {

using BitsKernel = void (*)(const uint8_t *const *, int64_t, const uint8_t *, int64_t, int32_t *);

template <int XBits, int T>
BitsKernel bits_kernel_of_height(int64_t height, bool two) {
    if constexpr (T > kBitsRows) {
        return nullptr;
    } else {
        if (height == T) return two ? sum_tables<XBits, T, 2> : sum_tables<XBits, T, 1>;
        return nullptr;
    }
}

template <int XBits>
BitsKernel bits_kernel(int64_t height, bool two) {
    const BitsKernel all[] = {
        bits_kernel_of_height<XBits, 1>(height, two), bits_kernel_of_height<XBits, 2>(height, two),
        bits_kernel_of_height<XBits, 3>(height, two), bits_kernel_of_height<XBits, 4>(height, two),
        bits_kernel_of_height<XBits, 6>(height, two), bits_kernel_of_height<XBits, 8>(height, two),
    };
    for (const BitsKernel found : all) {
        if (found != nullptr) return found;
    }
    return nullptr;
}

template <int T>
BitsKernel split_kernel(bool two) {
    return two ? sum_split_tables<T, 2> : sum_split_tables<T, 1>;
}

BitsKernel split_kernel_of_height(int64_t height, bool two) {
    return height == 1 ? split_kernel<1>(two) : split_kernel<2>(two);
}

// What depends on the activation's width.
struct BitsTraits {
    int64_t rows;  // of a full tile
    int64_t portion;
    int64_t unit;
    void (*put)(uint8_t *, const int8_t *);
    BitsKernel (*kernel)(int64_t, bool);
};

template <int XBits>
BitsTraits bits_traits_of() {
    return {kBitsRows, Tables<XBits>::kPortion, Tables<XBits>::kUnit, Tables<XBits>::put, bits_kernel<XBits>};
}

BitsTraits bits_traits(int32_t x_bits) {
    switch (x_bits) {
    case 1: return bits_traits_of<1>();
    case 2: return bits_traits_of<2>();
    case 3: return bits_traits_of<3>();
    case 4: return bits_traits_of<4>();
    default: return {2, SplitTables::kPortion, SplitTables::kUnit, SplitTables::put, split_kernel_of_height};
    }
}

// D of both planes to that of the weight.
void join_planes(const int32_t *planes, int64_t rows, int32_t *d) {
    for (int64_t n = 0; n < rows * kBytes; ++n) {
        const int32_t *plane = planes + n / kBytes * 2 * kBytes + n % kBytes;
        d[n] = plane[0] + 2 * plane[kBytes];
    }
}

// V of every scale group of the plan, int32[tile][group][channel].
void count_weights(const Plan &plan, int32_t *sums) {
    const ProductLayout &l = plan.layout;
    const uint8_t *word = plan.words;
    std::memset(sums, 0, static_cast<size_t>(l.tiles * plan.groups * kBytes) * sizeof(int32_t));
    for (int64_t g = 0; g < l.tiles * plan.groups; ++g) {
        for (int64_t i = 0; i < plan.blocks * l.bits * kBytes; ++i) {
            sums[g * kBytes + i % kBytes] += __builtin_popcount(*word++) << (i / kBytes % l.bits);
        }
    }
}

constexpr int64_t kNear = 4;

// Two streams: the planes of a tile, or two tiles of one plane.
int32_t run_bits(const Plan &plan, const Tiling &tiling, const uint8_t *x, int32_t x_bits, int threads) {
    const ProductLayout &l = plan.layout;
    const BitsTraits is = bits_traits(x_bits);
    const int64_t block_bytes = l.bits * kBytes;
    const int64_t tile_bytes = l.groups * l.blocks * block_bytes;
    const int64_t group_bytes = plan.blocks * (kElements / is.portion) * is.unit;  // of a row of x
    const int64_t pair = l.bits == 2 ? 1 : 2;
    auto share = [&](int64_t begin, int64_t end, int) {
        alignas(64) int32_t d[kGroupsAtOnce * kBitsRows * 2 * kBytes];
        alignas(64) int32_t planes[kBitsRows * 2 * kBytes];
        alignas(64) float totals[kBitsRows * 2 * kBytes];
        // A few tiles of channels at a time, so that the memory of a tile of rows serves them all from a near cache.
        for (int64_t part = begin; part < end; part += kNear * pair) {
            for (int64_t i = 0; i < tiling.tiles(); ++i) {
                for (int64_t first = part; first < at_most(end, part + kNear * pair); first += pair) {
                    const int64_t tiles = at_most(end - first, pair);
                    const int64_t height = tiling.height(i);
                    const BitsKernel kernel = is.kernel(height, tiles * l.bits == 2);
                    for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                        const int64_t groups = at_most(plan.groups - g, kGroupsAtOnce);
                        for (int64_t j = 0; j < groups; ++j) {
                            const uint8_t *at = plan.words + first * tile_bytes + (g + j) * plan.blocks * block_bytes;
                            const uint8_t *from[2] = {at, at + (l.bits == 2 ? kBytes : tile_bytes)};
                            const int64_t row = i * tiling.full * plan.groups + (g + j) * height;
                            int32_t *to = d + j * height * tiles * kBytes;
                            kernel(from, block_bytes, x + row * group_bytes, plan.blocks, l.bits == 2 ? planes : to);
                            if (l.bits == 2) join_planes(planes, height, to);
                        }
                        finish(plan, d, totals, {i * tiling.full, tiling.count(i), height, first * kVectors,
                                                 tiles * kVectors, g, groups});
                    }
                }
            }
        }
    };
    parallel_for(threads, l.tiles, pair, share);
    return BQ_OK;
}

}  // namespace
}  // namespace bq::BQ_SPACE
