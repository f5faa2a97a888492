// One product in AVX-512: what its parts share. Kernels leave exact integers D in tiles of tokens x channels; `Finish`
// turns them into outputs. See layout.h for the weight's layout.
//
// The floors, counted on one core of an EPYC 9005 (Zen 5) at 4.2 GHz, its rates measured with loops of their own:
// vpdpbusd 2 a cycle (500 GMAC/s), vpopcntd 2, simple integer operations 4, 64-byte loads 2; read bandwidth of one core
// 255 GB/s from 1 MB of level 2, 120 from level 3, 45 from memory; of two, 150-190 from level 3, 60 from memory.
#pragma once

#include <immintrin.h>

#include "../layout.h"
#include "kernels_avx512.h"

namespace bq::avx512 {

constexpr int kLanes = 16;  // 32-bit lanes of a vector: channels of a tile

// L = (D << d_shift) + a_factor * A + (V << v_shift) + constant: the dot of one scale group in the integers of the
// levels (or, for bq_product, in the factors) from the D of the kernels, the sum A of the token's factors and the sum V
// of the v of the channel. Every factor on D and V is a power of two.
struct Correction {
    int32_t d_shift;
    int32_t a_factor;
    int32_t v_shift;
    bool has_v;
    int32_t constant;
};

struct Plan {
    ProductLayout layout;
    const uint8_t *words;
    const float *steps;
    const int32_t *sums;     // of v, int32[tile][sum_groups][lane], or null
    int64_t sum_groups;
    int64_t rows;            // tokens, T; three rows of digits to a token of floats
    int64_t channels;        // N
    int64_t width;           // K
    int64_t groups;          // G, the finer of the two groupings
    int64_t size;            // elements of such a group
    int64_t blocks;          // blocks of 32 in it
    Correction correct;
    bool wide;               // L may exceed 31 bits: 64-bit arithmetic, by `form_x` and `form_w`
    bq_form form_x;
    bq_form form_w;
    const int32_t *a_sums;   // (T, G): A; null for planes
    const int32_t *terms;    // (T, G): a_factor * A + constant; null for planes
    const float *x_scale;    // (T, x_groups): the step times both units
    int64_t x_groups;
    int32_t digits;          // 3: rows are digits of floats; else 1
    int32_t *integers;       // bq_product: (T, G, N); then `output` is not used
    bq_output output;
};

// How far ahead of the word being read a single row's kernels fetch weights: hardware prefetchers stop at each 4 KiB
// page, and a tile of 1-bit weights is two of them.
constexpr int64_t kAhead = 2048;

constexpr int64_t kGroupsAtOnce = 8;  // scale groups whose D wait for `finish`

// Tokens are worked on in tiles of `full` rows and one of `rest_height` >= rest_rows (0: none), padded with zeros.
struct Tiling {
    int64_t rows;
    int64_t full;
    int64_t full_tiles;
    int64_t rest_rows;
    int64_t rest_height;

    int64_t tiles() const { return full_tiles + (rest_height != 0 ? 1 : 0); }
    int64_t height(int64_t tile) const { return tile < full_tiles ? full : rest_height; }
    int64_t count(int64_t tile) const { return tile < full_tiles ? full : rest_rows; }
    int64_t padded() const { return full_tiles * full + rest_height; }
};

Tiling tiling_of(int64_t rows, int64_t full);

// products_pack.cpp: activations as the kernels read them, word[token tile][group][block][…][row of the tile].
// Bytes: 8 words of four int8 in a block, in the order of the quads of weights of `bits` (8: as they come). Planes: one
// word of bits per plane.
void pack_bytes(const Plan &plan, const int8_t *factors, int32_t bits, const Tiling &tiling, int32_t *words,
                int32_t *sums, int threads);
void pack_planes(const Plan &plan, const bq_activation &x, int32_t planes, const Tiling &tiling, int32_t *words,
                 int threads);
void expand_bits(const uint8_t *packed, int64_t rows, int64_t width, int8_t *factors);
// Float rows as three int8 digits each: x = step * (d0 + 256 d1 + 65536 d2), |rounding| <= step / 2,
// step = max|x| / 8355000; NaN where a value is not finite.
void split_floats(const bq_activation &x, int64_t width, int8_t *digits, float *steps, int threads);

// products_bytes.cpp, products_planes.cpp: everything but the packing of x.
void run_bytes(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int threads);
void run_planes(const Plan &plan, const Tiling &tiling, const int32_t *x_words, int x_planes, int threads);
// products_tables.cpp; rows of activations as they come, one after the other.
bool wants_tables(const Plan &plan);
int32_t run_tables(const Plan &plan, const int32_t *rows, int threads);
Tiling bytes_tiling(int64_t rows);
Tiling planes_tiling(int64_t rows, int w_planes, int x_planes);

// V of every scale group of the plan, int32[tile][group][lane]: the product with a token of ones.
void sum_weights(const Plan &plan, int32_t *sums, int threads);

// Where the kernels leave D: int32[group][height][tiles of channels][lane], `groups` of them from `group`, for `count`
// tokens (<= height) from t0 and `tiles` tiles of channels from `tile`.
struct Window {
    int64_t t0;
    int64_t count;
    int64_t height;
    int64_t tile;
    int64_t tiles;
    int64_t group;
    int64_t groups;
};

// products_finish.cpp: D to outputs. totals: float32[height][tiles][lane], kept by the caller from window to window.
void finish(const Plan &plan, const int32_t *d, float *totals, const Window &window);

// acc += the dots of four bytes each. In assembly because GCC 12 otherwise copies accumulators back and forth in the
// loops of these kernels, at the price of half their speed.
static inline void add_dots(__m512i &acc, __m512i v, __m512i a) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(v), "v"(a));
}
static inline void subtract(__m512i &acc, __m512i v) { asm("vpsubd %1, %0, %0" : "+v"(acc) : "v"(v)); }

}  // namespace bq::avx512
