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

constexpr int WARPGROUP = 128;
constexpr int THREADS = 3 * WARPGROUP;  // a producer, of which one thread works, and two consumers

// Of each stage: full (its bytes have arrived), empty (its readers are done). Of each consumer: its turn has come.
struct Barriers {
    u32 full, empty, turns, end;
};

template <int DEPTH>
DEVICE Barriers barriers_after(u32 stages_end) {
    return {stages_end, stages_end + 8 * DEPTH, stages_end + 16 * DEPTH, stages_end + 16 * DEPTH + 16};
}

template <int DEPTH>
DEVICE void barriers_init(const Barriers& at, u32 releases) {
    for (int stage = 0; stage < DEPTH; ++stage) {
        barrier_init(at.full + 8 * stage, 1);
        barrier_init(at.empty + 8 * stage, releases);
    }
    barrier_init(at.turns, 4);
    barrier_init(at.turns + 8, 4);
    barrier_init_done();
}

// This warp has read a stage: its first lanes say so to each block of the cluster.
template <int BLOCKS>
DEVICE void release(u32 barrier, u32 lane) {
    if (lane < BLOCKS) barrier_arrive_at(barrier, lane);
}

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

struct Tile {
    int row, column;
};

// Tile `index` of rows × columns tiles: bands of at most 8 rows, so that tiles in flight share both operands in L2.
DEVICE Tile tile_at(int index, int rows, int columns) {
    constexpr int BAND = 8;
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

// 16 × 16 16-bit results of a warp, of 16 rows of y from row `ahead` on and 16 columns from `across` on: word 2c + h of
// lane 4r + q holds columns 8h + 2q and the one after of row 8c + r. `y` is at row 0, column 0 of the warp's part of
// the tile, which ends `below` rows and `right` columns further on; rows are `pitch` long. BY_8: `pitch` is a multiple
// of 8.
template <bool BY_8>
DEVICE void store_halves_transposed(u8* y, u32 (&word)[4], int ahead, int across, int below, int right, int pitch,
                                    u32 lane) {
    const int quad = lane % 4;
    if constexpr (BY_8) {
        transpose_quad(word, quad);  // lane q now holds word q of its quad: row 8·(q / 2) + r, columns 8·(q mod 2) on
        const int row = ahead + 8 * (quad / 2) + static_cast<int>(lane / 4), column = across + 8 * (quad % 2);
        if (row < below && column < right) {
            *reinterpret_cast<Words4*>(row_at<2>(y, row, pitch) + 2 * column) = {word[0], word[1], word[2], word[3]};
        }
    } else {
        UNROLL for (int i = 0; i < 4; ++i) {
            const int row = ahead + 8 * (i / 2) + static_cast<int>(lane / 4), column = across + 8 * (i % 2) + 2 * quad;
            u16* target = reinterpret_cast<u16*>(row_at<2>(y, row, pitch)) + column;
            if (row < below && column < right) target[0] = static_cast<u16>(word[i]);
            if (row < below && column + 1 < right) target[1] = static_cast<u16>(word[i] >> 16);
        }
    }
}
