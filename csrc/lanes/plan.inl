// Products for instruction sets with narrow vectors and byte products: one source that AVX2, AVX-VNNI and the kinds of
// NEON share. Included by one translation unit per set, which says BQ_SPACE and has included its "vectors.h" (the
// vectors and what is done to them) and defined Dots<Bits> (its byte products, see bytes.inl).
//
// Two ways to a product:
//   bytes  unsigned v of layout.h times int8 activations, channels in 32-bit lanes: every width.
//   bits   weights of 1 and 2 bits times activations of 1 to 4, channels in bytes: sums looked up by four bits of the
//          weight, see bits.inl.
// Both leave exact integers D in tiles of rows x channels; finish.inl makes outputs of them.
#pragma once

#include <cstring>

#include "../generic/floats.h"
#include "../layout.h"

namespace bq::BQ_SPACE {
namespace {

// L = (D << d_shift) + A * a_factor + V * v_factor + constant: the dot of one scale group in the integers of the levels
// (for bq_product: in the factors) from D, the sum A of the row's factors and the sum V of the channel's v. Computed
// modulo 2^32, which is exact where L fits.
struct Correction {
    int32_t d_shift;
    int32_t a_factor;
    int32_t v_factor;
    int32_t constant;
};

struct Plan {
    ProductLayout layout;
    const uint8_t *words;
    const float *steps;
    const int32_t *sums;  // of v, int32[tile][sum_groups][lane], or null
    int64_t sum_groups;
    int64_t rows;         // tokens, T; three rows of digits to a token of floats
    int64_t channels;     // N
    int64_t width;        // K
    int64_t groups;       // G, the finer of the two groupings
    int64_t size;         // elements of such a group
    int64_t blocks;       // blocks in it: of 32 elements, or of 8 where words are bits
    Correction correct;
    int32_t shift;        // the kernels multiplied v - shift: D lacks shift * A
    bool wide;            // L may exceed 31 bits: 64-bit arithmetic, by `form_x` and `form_w`
    bq_form form_x;
    bq_form form_w;
    const int32_t *a_sums;  // (T, G): A; null for bits
    const float *x_scale;   // (T, x_groups): the step times both units
    int64_t x_groups;
    int32_t digits;         // 3: rows are digits of floats; else 1
    int32_t *integers;      // bq_product: (T, G, N); then `output` is not used
    bq_output output;
};

constexpr int64_t kGroupsAtOnce = 8;  // scale groups whose D wait for `finish`

// Rows are worked on in tiles of `full` and one of `rest_height` >= rest_rows (0: none), padded with zeros.
struct Tiling {
    int64_t full;
    int64_t full_tiles;
    int64_t rest_rows;
    int64_t rest_height;

    Tiling(int64_t rows, int64_t height) : full(height), full_tiles(rows / height), rest_rows(rows % height) {
        rest_height = rest_rows;
        while (!has_kernel(rest_height)) ++rest_height;
        if (rest_height > full) rest_height = full;
    }

    // Heights for which kernels are compiled, besides the full one.
    static bool has_kernel(int64_t height) { return height <= 4 || height == 6 || height == 8 || height >= 12; }

    int64_t tiles() const { return full_tiles + (rest_height != 0 ? 1 : 0); }
    int64_t height(int64_t tile) const { return tile < full_tiles ? full : rest_height; }
    int64_t count(int64_t tile) const { return tile < full_tiles ? full : rest_rows; }
    int64_t padded() const { return full_tiles * full + rest_height; }
};

// Where row r of a tiling lies in memory of `row_units` units a row: [tile][unit][row of the tile].
struct Place {
    int64_t first;   // unit
    int64_t stride;  // from unit to unit
    bool real;       // not padding

    Place(const Tiling &tiling, int64_t row, int64_t row_units) {
        const int64_t tile = row < tiling.full_tiles * tiling.full ? row / tiling.full : tiling.full_tiles;
        const int64_t in_tile = row - tile * tiling.full;
        stride = tiling.height(tile);
        first = tile * tiling.full * row_units + in_tile;
        real = in_tile < tiling.count(tile);
    }
};

// Where the kernels leave D: int32[group][height][vectors][lane], `groups` of them from `group`, for `count` rows
// (<= height) from row `row` and `vectors` of channels from vector `vector`.
struct Window {
    int64_t row;
    int64_t count;
    int64_t height;
    int64_t vector;
    int64_t vectors;
    int64_t group;
    int64_t groups;
};

int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// Which of `coarse` groups the group g of `fine` ones lies in.
int64_t coarse_group(int64_t g, int64_t coarse, int64_t fine) {
    return coarse == fine ? g : coarse == 1 ? 0 : g * coarse / fine;
}

}  // namespace
}  // namespace bq::BQ_SPACE
