// Products of 1-bit weights and int8 activations by table: for many tokens, half as fast again as vpdpbusd.
//
// Four 1-bit weights are an index into the 16 sums that four activations can have. vpermw looks up 32 such sums of 16
// bits at once: a word of 32 bits holds nibbles j of its lower and its upper half, so that one lookup per j < 4 finds,
// for 16 channels, two sums: entries 0 to 15 belong to elements 4j .. 4j + 3, entries 16 to 31 to 16 + 4j .. 19 + 4j.
// The floor is 2 lookups and 2 additions a cycle, 256 products, 1067 GMAC/s; a loop of nothing else reaches 945, this
// kernel 750. Keeping the tables of 16 blocks in level 1 and going over all channels with them made no difference.
// Tables are built once per tile of tokens (8 bytes per element, level 2 holds them) and cost a fiftieth of the product
// at 4096 channels.
// |sum| <= 4 * 128, so that 64 of them fit 16 bits: after 16 blocks they go over to 32.
#include "products.h"

namespace bq::avx512 {
namespace {

constexpr int kFull = 6;           // tokens of a register tile
constexpr int kTiles = 4;          // tiles of channels in it
constexpr int64_t kBlocksAtOnce = 16;
constexpr int64_t kParts = 4;      // of the channels: so that threads find work where tiles of tokens are few

// int16 table[block][j][token][32] of `count` tokens; rows hold 8 words of four factors in a block.
void build_tables(const int32_t *rows, int64_t blocks, int64_t count, int64_t height, int16_t *tables) {
    alignas(64) uint8_t bits[64];
    alignas(64) int16_t low_words[32];
    for (int m = 0; m < 16; ++m) {
        for (int i = 0; i < 4; ++i) bits[4 * m + i] = static_cast<uint8_t>((m >> i) & 1);
    }
    for (int i = 0; i < 32; ++i) low_words[i] = static_cast<int16_t>(i < 16 ? 2 * i : 32 + 2 * (i - 16));
    const __m512i chosen = _mm512_load_si512(bits), order = _mm512_load_si512(low_words);
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t t = 0; t < height; ++t) {
        for (int64_t b = 0; b < blocks; ++b) {
            const int32_t *row = rows + (t * blocks + b) * 8;
            for (int64_t j = 0; j < 4; ++j) {
                __m512i table = zero;
                if (t < count) {
                    const __m512i lower = _mm512_dpbusd_epi32(zero, chosen, _mm512_set1_epi32(row[j]));
                    const __m512i upper = _mm512_dpbusd_epi32(zero, chosen, _mm512_set1_epi32(row[j + 4]));
                    table = _mm512_permutex2var_epi16(lower, order, upper);
                }
                _mm512_store_si512(tables + ((b * 4 + j) * height + t) * 32, table);
            }
        }
    }
}

inline void add_words(__m512i &acc, __m512i v) { asm("vpaddw %1, %0, %0" : "+v"(acc) : "v"(v)); }

// D of T tokens x C tiles of channels, over `blocks` blocks in each of `groups` scale groups.
template <int T, int C>
void dots_tables(const uint8_t *words, int64_t apart, const int16_t *tables, int64_t groups, int64_t blocks,
                 int32_t *d) {
    const __m512i nibble = _mm512_set1_epi32(0x000f000f), upper = _mm512_set1_epi32(0x00100000);
    const __m512i ones = _mm512_set1_epi16(1);
    for (int64_t g = 0; g < groups; ++g, d += T * C * kLanes) {
        for (int64_t i = 0; i < T * C; ++i) _mm512_storeu_si512(d + i * kLanes, _mm512_setzero_si512());
        for (int64_t left = blocks; left > 0; left -= kBlocksAtOnce) {
            __m512i acc[T][C];
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) acc[t][c] = _mm512_setzero_si512();
            }
            for (int64_t b = left < kBlocksAtOnce ? left : kBlocksAtOnce; b > 0; --b, words += 64) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j, tables += T * 32) {
                    __m512i index[C];
#pragma GCC unroll 4
                    for (int c = 0; c < C; ++c) {
                        // Shifts wait for the same two pipes as lookups: by 8 bits is a load from the next byte. (It
                        // takes one byte of what follows the word, and ignores it.)
                        const __m512i word = _mm512_loadu_si512(words + c * apart + j / 2);
                        const __m512i low = j % 2 == 0 ? word : _mm512_srli_epi32(word, 4);
                        index[c] = _mm512_ternarylogic_epi32(low, nibble, upper, 0xea);  // low & nibble | upper
                    }
#pragma GCC unroll 6
                    for (int t = 0; t < T; ++t) {
                        const __m512i table = _mm512_load_si512(tables + t * 32);
#pragma GCC unroll 4
                        for (int c = 0; c < C; ++c) add_words(acc[t][c], _mm512_permutexvar_epi16(index[c], table));
                    }
                }
            }
#pragma GCC unroll 6
            for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) {
                    int32_t *to = d + (t * C + c) * kLanes;
                    const __m512i sums = _mm512_madd_epi16(acc[t][c], ones);
                    _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_loadu_si512(to), sums));
                }
            }
        }
    }
}

using Kernel = void (*)(const uint8_t *, int64_t, const int16_t *, int64_t, int64_t, int32_t *);

template <int C>
Kernel kernel_of(int64_t height) {
    switch (height) {
    case 1: return dots_tables<1, C>;
    case 2: return dots_tables<2, C>;
    case 3: return dots_tables<3, C>;
    case 4: return dots_tables<4, C>;
    default: return dots_tables<kFull, C>;
    }
}

}  // namespace

bool wants_tables(const Plan &plan) {
    return plan.layout.bits == 1 && plan.rows >= kFull && plan.layout.tiles >= 16;
}

int32_t run_tables(const Plan &plan, const int32_t *rows, int threads) {
    const ProductLayout &l = plan.layout;
    const Tiling tiling = tiling_of(plan.rows, kFull);
    const int64_t all_blocks = plan.groups * plan.blocks;
    const int64_t apart = all_blocks * 64;
    const int64_t part_tiles = round_up((l.tiles + kParts - 1) / kParts, kTiles);
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        alignas(64) int32_t d[kGroupsAtOnce * kFull * kTiles * kLanes];
        alignas(64) float totals[kFull * kTiles * kLanes];
        auto *tables = static_cast<int16_t *>(scratch(1, static_cast<size_t>(all_blocks * 4 * kFull * 64)));
        if (tables == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        int64_t built = -1;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t i = item / kParts, part = item % kParts;
            const int64_t height = tiling.height(i);
            if (i != built) {
                build_tables(rows + i * kFull * all_blocks * 8, all_blocks, tiling.count(i), height, tables);
                built = i;
            }
            const int64_t last = (part + 1) * part_tiles < l.tiles ? (part + 1) * part_tiles : l.tiles;
            for (int64_t tile = part * part_tiles; tile < last;) {
                const int64_t tiles = last - tile >= kTiles ? kTiles : 1;
                const Kernel kernel = tiles == kTiles ? kernel_of<kTiles>(height) : kernel_of<1>(height);
                for (int64_t g = 0; g < plan.groups; g += kGroupsAtOnce) {
                    const int64_t groups = plan.groups - g < kGroupsAtOnce ? plan.groups - g : kGroupsAtOnce;
                    kernel(plan.words + tile * apart + g * plan.blocks * 64, apart,
                           tables + g * plan.blocks * 4 * height * 32, groups, plan.blocks, d);
                    finish(plan, d, totals, {i * kFull, tiling.count(i), height, tile, tiles, g, groups});
                }
                tile += tiles;
            }
        }
    };
    parallel_for(threads, tiling.tiles() * kParts, 1, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

}  // namespace bq::avx512
