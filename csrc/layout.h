// The layout of a prepared weight that the integer products of every instruction set share.
//
// A factor is a = scale * v + offset with 0 <= v < 2^bits and bits one of 1, 2, 4, 8, so that v is the unsigned operand
// of the machine's byte products and needs no shift to be one; dots are corrected by sums of the other operand.
//
// Channels come in tiles of `lanes`, elements of a scale group in blocks of 32 (the last one padded with v = 0). A
// block of one channel is `bits` words of 32 bits, and the payload is
//     word[tile][group][block][bits][lane],
// so that one vector holds one word of every channel of a tile, and a dot runs down the lanes without ever crossing
// them. Two meanings of the words of a block:
//   fields  word d holds elements 32 / bits * d + i at bits [bits * i, bits * (i + 1)): the order of the file format.
//           (word >> bits * j) & mask leaves four bytes, one per eight bits of the word: the elements of "quad" j,
//           32 / bits * d + 8 / bits * byte + j, as byte products want them. Activations are laid in this order.
//   planes  word p holds bit p of v of all 32 elements, in order: for products by xor and popcount.
#pragma once

#include "kernels.h"

namespace bq {

struct ProductLayout {
    int32_t bits;    // 1, 2, 4 or 8
    int32_t planes;  // 1: words are bit planes
    int32_t scale;   // a = scale * v + offset
    int32_t offset;
    int32_t lanes;
    int32_t has_sums;   // 1: sums of v are there, int32[tile][group][lane]
    int64_t tiles;
    int64_t groups;     // scale groups of the weight
    int64_t size;       // elements of a group
    int64_t blocks;     // of 32 elements in a group
    int64_t sums_at;    // offsets in the payload, bytes; steps are float32[tile][group][lane]
    int64_t steps_at;
    int64_t bytes;
};
constexpr int64_t kLayoutBytes = 128;  // the payload begins with its ProductLayout, words follow
static_assert(sizeof(ProductLayout) <= kLayoutBytes, "the layout outgrew its place");

// What `weight` becomes. planes: the kernels want bit planes (dense uniform grids of 1 and 2 bits only).
int32_t product_layout(const bq_weight &weight, int32_t lanes, bool planes, ProductLayout *layout);

// Writes the whole payload. BQ_BAD_ARGUMENT: a factor that is none of the grid's.
int32_t fill_layout(const bq_weight &weight, const ProductLayout &layout, uint8_t *payload, int32_t threads);

}  // namespace bq
