// Products of weights of 1 and 2 bits with activations of 1 to 4, on machines that cannot count the bits of words.
//
// Channels lie in bytes: words are byte[tile][group][block][plane][channel], a byte being bit `plane` of v of 8
// consecutive elements. Four of those bits choose one of 16 sums of four activations, by the byte shuffle of the
// machine, for all channels at once: two operations for 4 * kBytes products, whatever the activation's width.
//
// With the weight 2v + 1 - 2^b = sum over planes p of 2^p s_p, s = 1 or -1, the activation 2u - c (c = 2^bits - 1), the
// entry for the bits of s is the sum of u where s = 1 and of c - u where s = -1, so that the dot of four elements is
// 2 * entry - 4c. Over K elements: L = 2 D - c (2^b - 1) K, D the sum of 2^p entry. Beyond the end of a group v = 0 and
// u = c, which add nothing.
#pragma once

#include "finish.inl"

namespace bq::BQ_SPACE {
namespace {

constexpr int kElements = 8;                  // in a byte
constexpr int kVectors = kBytes / kLanes;     // of 32-bit lanes, in a tile
constexpr int64_t kMostAtOnce = 65535 / 255;  // sums of a byte that fit 16 bits

// Bit `plane` of eight bytes, side by side.
uint8_t plane_byte(uint64_t eight, int plane) {
    return static_cast<uint8_t>(((eight >> plane) & 0x0101010101010101u) * 0x0102040810204080u >> 56);
}

// Every sum of four activations of XBits bits: [u of all four][bits of the weight].
template <int XBits>
struct SharedTables {
    uint8_t entry[(1 << (4 * XBits)) * 16];

    constexpr SharedTables() : entry() {
        constexpr int largest = (1 << XBits) - 1;
        for (int all = 0; all < 1 << (4 * XBits); ++all) {
            for (int bits = 0; bits < 16; ++bits) {
                int sum = 0;
                for (int i = 0; i < 4; ++i) {
                    const int u = (all >> (XBits * i)) & largest;
                    sum += ((bits >> i) & 1) != 0 ? u : largest - u;
                }
                entry[all * 16 + bits] = static_cast<uint8_t>(sum);
            }
        }
    }
};

// How a row's activations lie in memory: `kUnit` bytes for every `kPortion` elements, from their factors (`put`). 1 and 2
// bits: where in the shared tables theirs begins; 3 and 4 bits: the table itself.
template <int XBits>
struct Tables {
    static constexpr int kPortion = 4;
    static constexpr int kUnit = XBits <= 2 ? 2 : 16;
    static constexpr int64_t kAtOnce = 255 / (kElements * ((1 << XBits) - 1));  // blocks whose entries fit a byte
    static_assert(kAtOnce >= 2, "entries of two blocks fit a byte");

    // The entries of one block, of T rows and S streams.
    template <int T, int S>
    static void add(U8 (&part)[T][S], const U8 (&bits)[S], const uint8_t *x) {
        U8 low[S], high[S];
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
            low[s] = bits[s] & 15;
            high[s] = (U8)((U16)bits[s] >> 4) & 15;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const U8 first = table(x + t * kUnit);
            const U8 second = table(x + (T + t) * kUnit);
#pragma GCC unroll 2
            for (int s = 0; s < S; ++s) {
                add_bytes(part[t][s], lookup(first, low[s]));
                add_bytes(part[t][s], lookup(second, high[s]));
            }
        }
    }

    static U8 table(const uint8_t *x) {
        if constexpr (XBits <= 2) {
            static constexpr SharedTables<XBits> shared{};
            uint16_t at;
            std::memcpy(&at, x, sizeof at);
            return table16(shared.entry + at);
        } else {
            return table16(x);
        }
    }

    static void put(uint8_t *to, const int8_t *a) {
        constexpr uint32_t largest = (1 << XBits) - 1;
        if constexpr (XBits <= 2) {
            // u = (a + largest) / 2 in every byte, then the four side by side, by a product that has them in its top byte.
            uint32_t factors;
            std::memcpy(&factors, a, sizeof factors);
            const uint32_t twice = ((factors & 0x7f7f7f7fu) + largest * 0x01010101u) ^ (factors & 0x80808080u);
            const uint32_t u = (twice >> 1) & (largest * 0x01010101u);
            constexpr uint32_t gather = 1u << 24 | 1u << (16 + XBits) | 1u << (8 + 2 * XBits) | 1u << (3 * XBits);
            const auto at = static_cast<uint16_t>((u * gather >> 24) * 16);
            std::memcpy(to, &at, sizeof at);
        } else {
            typedef uint8_t Sixteen __attribute__((vector_size(16)));
            constexpr Sixteen chosen[4] = {
                {0, 255, 0, 255, 0, 255, 0, 255, 0, 255, 0, 255, 0, 255, 0, 255},
                {0, 0, 255, 255, 0, 0, 255, 255, 0, 0, 255, 255, 0, 0, 255, 255},
                {0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 255, 255, 255, 255},
                {0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255},
            };
            const int base = (4 * static_cast<int>(largest) - a[0] - a[1] - a[2] - a[3]) / 2;
            Sixteen entries = Sixteen{} + static_cast<uint8_t>(base);  // where no bit is set: the sum of c - u
            for (int i = 0; i < 4; ++i) entries += chosen[i] & static_cast<uint8_t>(a[i]);  // and 2u - c more for a bit
            std::memcpy(to, &entries, sizeof entries);
        }
    }
};

#if defined(__aarch64__)
// A machine that counts the bits of bytes: for one bit, the entry of 8 elements is how many bits of the weight are those
// of the activation. In memory are the opposite bits, once for each channel.
template <>
struct Tables<1> {
    static constexpr int kPortion = 8;
    static constexpr int kUnit = kBytes;
    static constexpr int64_t kAtOnce = 255 / kElements;

    static void put(uint8_t *to, const int8_t *a) {
        uint64_t signs;
        std::memcpy(&signs, a, sizeof signs);
        store(to, U8{} + plane_byte(signs, 7));
    }

    template <int T, int S>
    static void add(U8 (&part)[T][S], const U8 (&bits)[S], const uint8_t *x) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const U8 opposite = load<U8>(x + t * kUnit);
#pragma GCC unroll 2
            for (int s = 0; s < S; ++s) add_bytes(part[t][s], count_bits(bits[s] ^ opposite));
        }
    }
};
#endif

// D of T rows x S streams of bytes, `blocks` of them `stride` apart: int32[row][stream][channel].
template <int XBits, int T, int S>
void sum_tables(const uint8_t *const *streams, int64_t stride, const uint8_t *x, int64_t blocks, int32_t *d) {
    using Table = Tables<XBits>;
    const uint8_t *at[S];
    for (int s = 0; s < S; ++s) at[s] = streams[s];
    for (int i = 0; i < T * S * kBytes; ++i) d[i] = 0;
    while (blocks > 0) {
        U16 sums[T][S][2] = {};
        for (int64_t round = 0; round < kMostAtOnce && blocks > 0; ++round) {
            U8 part[T][S] = {};
            const int64_t here = at_most(Table::kAtOnce, blocks);
            blocks -= here;
            for (int64_t left = here; left > 0; --left, x += kElements / Table::kPortion * T * Table::kUnit) {
                U8 bits[S];
#pragma GCC unroll 2
                for (int s = 0; s < S; ++s) {
                    bits[s] = load<U8>(at[s]);
                    at[s] += stride;
                }
                Table::template add<T, S>(part, bits, x);
            }
            for (int t = 0; t < T; ++t) {
                for (int s = 0; s < S; ++s) widen(sums[t][s], part[t][s]);
            }
        }
        for (int t = 0; t < T; ++t) {
            for (int s = 0; s < S; ++s) spread(sums[t][s], d + (t * S + s) * kBytes);
        }
    }
}

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
    const BitsKernel all[] = {bits_kernel_of_height<XBits, 1>(height, two), bits_kernel_of_height<XBits, 2>(height, two),
                              bits_kernel_of_height<XBits, 3>(height, two), bits_kernel_of_height<XBits, 4>(height, two),
                              bits_kernel_of_height<XBits, 6>(height, two), bits_kernel_of_height<XBits, 8>(height, two)};
    for (const BitsKernel found : all) {
        if (found != nullptr) return found;
    }
    return nullptr;
}

// What depends on the activation's width.
struct BitsTraits {
    int64_t portion;
    int64_t unit;
    void (*put)(uint8_t *, const int8_t *);
    BitsKernel (*kernel)(int64_t, bool);
};

template <int XBits>
BitsTraits bits_traits_of() {
    return {Tables<XBits>::kPortion, Tables<XBits>::kUnit, Tables<XBits>::put, bits_kernel<XBits>};
}

BitsTraits bits_traits(int32_t x_bits) {
    switch (x_bits) {
    case 1: return bits_traits_of<1>();
    case 2: return bits_traits_of<2>();
    case 3: return bits_traits_of<3>();
    default: return bits_traits_of<4>();
    }
}

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
        for (int64_t first = begin; first < end; first += pair) {
            const int64_t tiles = at_most(end - first, pair);
            const int64_t streams = tiles * l.bits;
            for (int64_t i = 0; i < tiling.tiles(); ++i) {
                const int64_t height = tiling.height(i);
                const BitsKernel kernel = is.kernel(height, streams == 2);
                for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                    const int64_t groups = at_most(plan.groups - g, kGroupsAtOnce);
                    for (int64_t j = 0; j < groups; ++j) {
                        const uint8_t *at = plan.words + first * tile_bytes + (g + j) * plan.blocks * block_bytes;
                        const uint8_t *from[2] = {at, at + (l.bits == 2 ? kBytes : tile_bytes)};
                        const uint8_t *tables = x + (i * tiling.full * plan.groups + (g + j) * height) * group_bytes;
                        int32_t *to = d + j * height * tiles * kBytes;
                        kernel(from, block_bytes, tables, plan.blocks, l.bits == 2 ? planes : to);
                        for (int64_t n = 0; n < height * kBytes && l.bits == 2; ++n) {
                            const int32_t *plane = planes + n / kBytes * 2 * kBytes + n % kBytes;
                            to[n] = plane[0] + 2 * plane[kBytes];
                        }
                    }
                    finish(plan, d, totals, {i * tiling.full, tiling.count(i), height, first * kVectors,
                                             tiles * kVectors, g, groups});
                }
            }
        }
    };
    parallel_for(threads, l.tiles, pair, share);
    return BQ_OK;
}

}  // namespace
}  // namespace bq::BQ_SPACE
