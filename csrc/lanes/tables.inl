// Products of weights of 1 and 2 bits with activations of 1 to 4 bits, and of 1 bit with 8, by looking sums up.
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

// How a row's activations lie in memory: `kUnit` bytes for every `kPortion` elements, from their factors (`put`).
// 1 and 2 bits: where in the shared tables theirs begins; 3 and 4 bits: the table itself.
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
            // u = (a + largest) / 2 in every byte, then the four side by side: in the top byte of a product.
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
// A machine that counts the bits of bytes: for one bit, the entry of 8 elements is how many bits of the weight are
// those of the activation. In memory are the opposite bits, once for each channel.
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
    for (bool first = true; blocks > 0; first = false) {
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
            for (int s = 0; s < S; ++s) spread<0>(sums[t][s], d + (t * S + s) * kBytes, first);
        }
    }
}

// Activations of 8 bits, a = u - 128: entries e of up to 4 * 255 in two bytes, e = low + 64 * high.
struct SplitTables {
    static constexpr int kPortion = 4;
    static constexpr int kUnit = 32;
    static constexpr int64_t kLowAtOnce = 2;   // blocks of two entries below 64
    static constexpr int64_t kHighAtOnce = 8;  // and of two entries below 16
    static constexpr int64_t kRounds = 64;     // of kHighAtOnce blocks, whose sums fit 16 bits

    static void put(uint8_t *to, const int8_t *a) {
        typedef uint16_t Wide __attribute__((vector_size(32)));
        typedef uint8_t Sixteen __attribute__((vector_size(16)));
        constexpr uint16_t all = 0xffff;
        constexpr Wide chosen[4] = {
            {0, all, 0, all, 0, all, 0, all, 0, all, 0, all, 0, all, 0, all},
            {0, 0, all, all, 0, 0, all, all, 0, 0, all, all, 0, 0, all, all},
            {0, 0, 0, 0, all, all, all, all, 0, 0, 0, 0, all, all, all, all},
            {0, 0, 0, 0, 0, 0, 0, 0, all, all, all, all, all, all, all, all},
        };
        const int base = 4 * 127 - a[0] - a[1] - a[2] - a[3];  // where no bit is set: the sum of 255 - u
        Wide entries = Wide{} + static_cast<uint16_t>(base);
        for (int i = 0; i < 4; ++i) entries += chosen[i] & static_cast<uint16_t>(2 * a[i] + 1);
        const Sixteen low = __builtin_convertvector(entries & 63, Sixteen);
        const Sixteen high = __builtin_convertvector(entries >> 6, Sixteen);
        std::memcpy(to, &low, sizeof low);
        std::memcpy(to + 16, &high, sizeof high);
    }

    template <int T, int S>
    static void add(U8 (&lows)[T][S], U8 (&highs)[T][S], const uint8_t *(&at)[S], int64_t stride, const uint8_t *&x) {
        U8 index[2][S];
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
            const U8 bits = load<U8>(at[s]);
            at[s] += stride;
            index[0][s] = bits & 15;
            index[1][s] = (U8)((U16)bits >> 4) & 15;
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t, x += kUnit) {
                const U8 low = table16(x);
                const U8 high = table16(x + 16);
#pragma GCC unroll 2
                for (int s = 0; s < S; ++s) {
                    add_bytes(lows[t][s], lookup(low, index[half][s]));
                    add_bytes(highs[t][s], lookup(high, index[half][s]));
                }
            }
        }
    }
};

// As sum_tables.
template <int T, int S>
void sum_split_tables(const uint8_t *const *streams, int64_t stride, const uint8_t *x, int64_t blocks, int32_t *d) {
    const uint8_t *at[S];
    for (int s = 0; s < S; ++s) at[s] = streams[s];
    for (bool first = true; blocks > 0; first = false) {
        U16 lows[T][S][2] = {};
        U16 highs[T][S][2] = {};
        for (int64_t round = 0; round < SplitTables::kRounds && blocks > 0; ++round) {
            U8 high[T][S] = {};
            int64_t left = at_most(SplitTables::kHighAtOnce, blocks);
            blocks -= left;
            for (; left > 0; left -= SplitTables::kLowAtOnce) {
                U8 low[T][S] = {};
                SplitTables::add<T, S>(low, high, at, stride, x);
                if (left > 1) SplitTables::add<T, S>(low, high, at, stride, x);
                for (int t = 0; t < T; ++t) {
                    for (int s = 0; s < S; ++s) widen(lows[t][s], low[t][s]);
                }
            }
            for (int t = 0; t < T; ++t) {
                for (int s = 0; s < S; ++s) widen(highs[t][s], high[t][s]);
            }
        }
        for (int t = 0; t < T; ++t) {
            for (int s = 0; s < S; ++s) {
                spread<0>(lows[t][s], d + (t * S + s) * kBytes, first);
                spread<6>(highs[t][s], d + (t * S + s) * kBytes, false);
            }
        }
    }
}

}  // namespace
}  // namespace bq::BQ_SPACE
