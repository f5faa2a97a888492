// What the warpgroup kernels share: descriptors, the ring of stages, the order of tiles, the stores of results.
#pragma once

#include <hopper_ptx.cuh>

// --- shared matrix descriptors --------------------------------------------------------------------------------------

// Rows of 128 (or 64) bytes along K, stacked, swizzled by the copy engine: 8 rows are one swizzle atom, so the stride
// between atoms is 8 rows. Fields in units of 16 bytes: start address (bits 0-13), leading offset (16-29, unused when
// swizzled along K), stride (32-45), swizzle (62-63: 1 = 128 bytes, 2 = 64 bytes). Atoms are aligned to their size.
template <int ROW_BYTES>
DEVICE u64 matrix_descriptor(u32 address) {
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64, "rows of 128 or 64 bytes");
    const u64 swizzle = ROW_BYTES == 128 ? 1 : 2;
    return (swizzle << 62) | (static_cast<u64>(8 * ROW_BYTES / 16) << 32) | (1ull << 16) |
           static_cast<u64>((address & 0x3ffff) >> 4);
}

// --- the ring of stages ---------------------------------------------------------------------------------------------

// Where a role stands in the ring: the stage, and the parity of the ring's current turn, in one register.
template <int DEPTH>
struct Ring {
    u32 position = 0;  // 0 … 2·DEPTH − 1

    DEVICE u32 stage() const { return position < DEPTH ? position : position - DEPTH; }
    DEVICE u32 parity() const { return position >= DEPTH; }
    DEVICE void next() { position = position + 1 == 2 * DEPTH ? 0 : position + 1; }
    DEVICE void skip(u32 steps) { position = (position + steps) % (2 * DEPTH); }
};

// --- the order of tiles ---------------------------------------------------------------------------------------------

// Tile `index` of rows × columns tiles: bands of at most BAND rows, so that tiles in flight share both operands' rows
// in the L2 cache.
struct Tile {
    int row, column;
};

template <int BAND>
DEVICE Tile tile_at(int index, int rows, int columns) {
    const int area = BAND * columns;
    const int first = index / area * BAND;
    const int height = rows - first < BAND ? rows - first : BAND;
    const int within = index % area;
    return {first + within % height, within / height};
}

// --- results --------------------------------------------------------------------------------------------------------

enum Output { INT32 = 0, FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

template <int KIND>
DEVICE u32 pack_pair(float low, float high) {
    return KIND == BFLOAT16 ? pack_bfloat16(low, high) : pack_float16(low, high);
}

// Four lanes hold a 4×4 matrix of words, a row each; afterwards a column each.
DEVICE void transpose_quad(u32 (&word)[4], int quad) {
    const bool odd = quad & 1, high = quad & 2;
    const u32 a = shuffle_xor(odd ? word[0] : word[1], 1), b = shuffle_xor(odd ? word[2] : word[3], 1);
    (odd ? word[0] : word[1]) = a;
    (odd ? word[2] : word[3]) = b;
    const u32 c = shuffle_xor(high ? word[0] : word[2], 2), d = shuffle_xor(high ? word[1] : word[3], 2);
    (high ? word[0] : word[2]) = c;
    (high ? word[1] : word[3]) = d;
}

struct alignas(16) Words4 {
    u32 word[4];
};

struct alignas(8) Words2 {
    u32 word[2];
};

// The row `ahead` rows of `columns` results further on. Computed where it is used: kept addresses would cost registers.
template <int SIZE>
DEVICE u8* row_at(u8* row, int ahead, int columns) {
    pin(columns);
    return row + static_cast<u64>(ahead * SIZE) * columns;
}

// Two neighbouring 32-bit results of a row, the first in column `column` (even) of `columns`. EVEN: `columns` is even.
template <bool EVEN>
DEVICE void store_pair(u8* row, u32 low, u32 high, int column, int columns) {
    u32* target = reinterpret_cast<u32*>(row) + column;
    if constexpr (EVEN) {
        if (column < columns) *reinterpret_cast<Words2*>(target) = {low, high};
    } else {
        if (column < columns) target[0] = low;
        if (column + 1 < columns) target[1] = high;
    }
}

// 32 neighbouring 16-bit results of a row, spread over the four lanes of a quad: word c of lane q holds columns
// first + 8c + 2q and the one after. BY_8: `columns` is a multiple of 8.
template <bool BY_8>
DEVICE void store_halves(u8* row, u32 (&word)[4], int first, bool inside, int columns, int quad) {
    u16* target = reinterpret_cast<u16*>(row);
    if constexpr (BY_8) {
        transpose_quad(word, quad);
        const int column = first + 8 * quad;
        if (inside && column < columns) {
            *reinterpret_cast<Words4*>(target + column) = {word[0], word[1], word[2], word[3]};
        }
    } else {
        UNROLL for (int c = 0; c < 4; ++c) {
            const int column = first + 8 * c + 2 * quad;
            if (inside && column < columns) target[column] = static_cast<u16>(word[c]);
            if (inside && column + 1 < columns) target[column + 1] = static_cast<u16>(word[c] >> 16);
        }
    }
}
