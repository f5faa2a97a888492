// Products of int8 activations with 2:4 sparse int8 weights on Hopper's tensor cores: y (T, N) from x (T, K) and the
// kept half of w (N, K).
//
// The sparse operand of the instruction is the one whose rows are the 64 rows of a product, so the weight takes that
// place: tiles of yᵀ, channels down, tokens across, transposed on the way out. Of every four places along K the weight
// keeps two bytes; `places` says which two, in the registers' own order, 1 KiB for 64 channels and 128 places of K:
// word [channels / 64][K / 128][half of 128][thread of the warpgroup] (wgmma.cuh has the layout).
// Weight integers have no offset (dropped ones are 0). Activations: a, or with EIGHT_BITS 2a + 1, corrected by the
// weights' row sums. What lies outside x and w arrives as zeros; `places` is padded with valid words.
//
// Blocks, ring, clusters and PINGPONG as in b1_wgmma.cu; here a cluster's blocks have neighbouring channels and the same
// tokens.
//
// Set by the launcher: COLUMNS (tokens of a tile), ROWS_64, STAGES, CLUSTER, PINGPONG, EIGHT_BITS, OUT, WHOLE (1: N is a
// multiple of 8).
#include <hopper_ptx.cuh>
#include <hopper.cuh>
#include <wgmma.cuh>

constexpr int STEP = 128;       // places along K of one step; bytes of a row of x
constexpr int KEPT = STEP / 2;  // bytes of a row of w
constexpr int PLACES = 1024;    // bytes of `places` for 64 channels, one step
constexpr int CONSUMER_ROWS = 64 * ROWS_64;
constexpr int ROWS = CONSUMER_ROWS * (PINGPONG ? 1 : 2);
constexpr int SHARE = COLUMNS / CLUSTER;
constexpr int X_BYTES = COLUMNS * STEP, W_BYTES = ROWS * KEPT, PLACES_BYTES = ROWS / 64 * PLACES;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES + PLACES_BYTES;
constexpr int RELEASES = 4 * (PINGPONG ? 1 : 2) * CLUSTER;

static_assert(ROWS <= 256 && SHARE <= 256 && SHARE % 8 == 0, "boxes of the copy engine");
static_assert(STAGE_BYTES % 1024 == 0 && X_BYTES % 1024 == 0, "swizzle atoms on their boundaries");

struct Work {
    int tokens, channels;         // T, N
    int steps;                    // ⌈K / 128⌉
    int tile_rows, tile_columns;  // ⌈N / (ROWS·CLUSTER)⌉, ⌈T / COLUMNS⌉
    float unit;                   // of a product of integers
};

DEVICE void produce(const TensorMap* x_map, const TensorMap* w_map, const u8* places, const Work& work, u32 stages,
                    const Barriers& at) {
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int tiles = work.tile_rows * work.tile_columns, last_block = (work.channels - 1) / 64;
    Ring<STAGES> ring;
    for (int index = BLOCK_INDEX / CLUSTER; index < tiles; index += GRID_SIZE / CLUSTER) {
        const Tile tile = tile_at(index, work.tile_rows, work.tile_columns);
        const int row = (tile.row * CLUSTER + rank) * ROWS, column = tile.column * COLUMNS + rank * SHARE;
        NO_UNROLL for (int step = 0; step < work.steps; ++step, ring.next()) {
            const u32 stage = stages + ring.stage() * STAGE_BYTES, barrier = at.full + ring.stage() * 8;
            const u32 x_stage = stage + rank * (SHARE * STEP);
            barrier_wait(at.empty + ring.stage() * 8, ring.parity() ^ 1);
            barrier_expect(barrier, STAGE_BYTES);
            tensor_load(stage + X_BYTES, w_map, barrier, step * KEPT, row, 0);
            if (CLUSTER > 1) {
                tensor_load_multicast(x_stage, x_map, barrier, step * STEP, column, 0, (1 << CLUSTER) - 1);
            } else {
                tensor_load(x_stage, x_map, barrier, step * STEP, column, 0);
            }
            NO_UNROLL for (int i = 0; i < ROWS / 64; ++i) {
                const int block = row / 64 + i < last_block ? row / 64 + i : last_block;  // beyond N: any valid words
                bulk_load(stage + X_BYTES + W_BYTES + i * PLACES,
                          places + (static_cast<u64>(block) * work.steps + step) * PLACES, PLACES, barrier);
            }
        }
    }
}

// The accumulators of one tile; the bases are those of this consumer's part of stage 0.
DEVICE void multiply_tile(int (&sum)[ROWS_64][COLUMNS / 2], int steps, u32 x_base, u32 w_base, u32 places_base,
                          const Barriers& at, u32 next, u32 lane, Ring<STAGES>& ring) {
    u32 last = 0;
    for (int step = 0; step < steps; ++step) {
        const u32 ahead = ring.stage() * STAGE_BYTES;
        const u64 x = matrix_descriptor<STEP>(x_base + ahead), w = matrix_descriptor<KEPT>(w_base + ahead);
        barrier_wait(at.full + ring.stage() * 8, ring.parity());
        u32 places[ROWS_64][2];
        UNROLL for (int r = 0; r < ROWS_64; ++r) UNROLL for (int k = 0; k < 2; ++k) {
            places[r][k] = read_word(places_base + ahead + r * PLACES + k * (PLACES / 2));
        }
        UNROLL for (int r = 0; r < ROWS_64; ++r) UNROLL for (int i = 0; i < COLUMNS / 2; ++i) pin(sum[r][i]);
        product_fence();
        UNROLL for (int k = 0; k < 2; ++k) UNROLL for (int r = 0; r < ROWS_64; ++r) {
            const u32 keep = k > 0 || step > 0;
            sparse_product(sum[r], w + (r * 64 * KEPT + k * KEPT / 2) / 16, x + k * STEP / 2 / 16, places[r][k], keep);
        }
        product_commit();
        if (step > 0) {
            product_wait<1>();
            release<CLUSTER>(last, lane);
        }
        last = at.empty + ring.stage() * 8;
        ring.next();
    }
    if (PINGPONG && lane == 0) barrier_arrive(next);
    product_wait<0>();
    release<CLUSTER>(last, lane);
    UNROLL for (int r = 0; r < ROWS_64; ++r) UNROLL for (int i = 0; i < COLUMNS / 2; ++i) pin(sum[r][i]);
}

struct Scales {
    const float *x_step, *w_step, *bias;  // (T), (N), (N) or null
    const int* w_sums;                    // (N), read with EIGHT_BITS
};

// What the rows (channels) and columns (tokens) of a consumer's tile need, in its own shared memory.
constexpr int X_STEP_AT = 0;
constexpr int SUM_AT = 4 * COLUMNS, STEP_AT = SUM_AT + 4 * CONSUMER_ROWS, BIAS_AT = STEP_AT + 4 * CONSUMER_ROWS;
constexpr int EDGE_BYTES = BIAS_AT + 4 * CONSUMER_ROWS;

DEVICE void fetch_edges(u32 edges, const Scales& scales, const Work& work, int row, int column, u32 thread) {
    for (int i = thread; OUT != INT32 && i < COLUMNS; i += WARPGROUP) {
        const int token = column + i;
        const float step = token < work.tokens ? multiply(scales.x_step[token], work.unit) : 0.0f;
        write_word(edges + X_STEP_AT + 4 * i, bits_of(step));
    }
    for (int i = thread; i < CONSUMER_ROWS; i += WARPGROUP) {
        const int channel = row + i;
        const bool inside = channel < work.channels;
        write_word(edges + SUM_AT + 4 * i, EIGHT_BITS && inside ? scales.w_sums[channel] : 0);
        if (OUT != INT32) {
            write_word(edges + STEP_AT + 4 * i, bits_of(inside ? scales.w_step[channel] : 0.0f));
            write_word(edges + BIAS_AT + 4 * i, bits_of(inside && scales.bias ? scales.bias[channel] : 0.0f));
        }
    }
}

// Of the tile whose first result is that of channel `row`, token `column`.
DEVICE void store_tile(const int (&sum)[ROWS_64][COLUMNS / 2], u8* out, u32 edges, const Work& work, int row,
                       int column, u32 warp, u32 lane) {
    constexpr int SIZE = OUT == INT32 || OUT == FLOAT32 ? 4 : 2;
    const int quad = lane % 4, channels = work.channels;
    const u32 row_edges = edges + 4 * (16 * warp + lane / 4), column_edges = edges + 8 * quad;
    // Where this lane's results go: 32-bit ones where the accumulators are, 16-bit ones transposed (below).
    const int right = work.channels - row - 16 * warp, below = work.tokens - column;
    out += (static_cast<u64>(column) * channels + row + 16 * warp) * SIZE;
    UNROLL for (int group = 0; group < COLUMNS / 16; ++group) UNROLL for (int r = 0; r < ROWS_64; ++r) {
        u32 word[4];  // [8 tokens][8 channels]
        int row_sum[2];
        float row_step[2], row_bias[2];
        UNROLL for (int half = 0; half < 2; ++half) {
            const u32 ahead = 4 * (64 * r + 8 * half);
            row_sum[half] = EIGHT_BITS ? read_word(row_edges + SUM_AT + ahead) : 0;
            if (OUT != INT32) {
                row_step[half] = float_of(read_word(row_edges + STEP_AT + ahead));
                row_bias[half] = float_of(read_word(row_edges + BIAS_AT + ahead));
            }
        }
        UNROLL for (int c = 0; c < 2; ++c) {
            float scale[2];
            if (OUT != INT32) read_pair(column_edges + X_STEP_AT + 4 * (16 * group + 8 * c), scale[0], scale[1]);
            UNROLL for (int half = 0; half < 2; ++half) {
                const int channel = 64 * r + 8 * half + static_cast<int>(lane / 4);
                float value[2];
                UNROLL for (int e = 0; e < 2; ++e) {
                    const int token = 16 * group + 8 * c + 2 * quad + e;
                    int dot = sum[r][4 * (2 * group + c) + 2 * half + e];
                    if (EIGHT_BITS) dot = 2 * dot + row_sum[half];
                    u32 bits = dot;
                    if (OUT != INT32) {
                        value[e] = add(multiply(multiply(float(dot), scale[e]), row_step[half]), row_bias[half]);
                        bits = bits_of(value[e]);
                    }
                    if (SIZE == 4 && token < below && channel < right) {
                        reinterpret_cast<u32*>(row_at<SIZE>(out, 1, token * channels))[channel] = bits;
                    }
                }
                if (SIZE == 2) word[2 * c + half] = transpose_8x8(pack_pair<OUT>(value[0], value[1]));
            }
        }
        if (SIZE == 2) {  // word 2c + half: token 8c + lane / 4, channels 8·half + 2·quad and the one after
            store_halves_transposed<WHOLE>(out, word, 16 * group, 64 * r, below, right, channels, lane);
        }
    }
}

KERNEL(THREADS, CLUSTER)
s8_sparse_wgmma(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const u8* places, u8* out,
                const float* x_step, const float* w_step, const int* w_sums, const float* bias,
                GRID_CONSTANT Work work) {
    SHARED_MEMORY(memory);
    const u32 stages = (shared_address(memory) + 1023) & ~1023u;
    const Barriers at = barriers_after<STAGES>(stages + STAGES * STAGE_BYTES);
    const u32 warp = THREAD_INDEX / 32, lane = THREAD_INDEX % 32;
    if (THREAD_INDEX == 0) {
        tensor_prefetch(&x_map);
        tensor_prefetch(&w_map);
        barriers_init<STAGES>(at, RELEASES);
    }
    cluster_sync();

    if (warp < 4) {
        registers_give<24>();
        if (warp == 0 && lane == 0) produce(&x_map, &w_map, places, work, stages, at);
        warp_sync();
    } else {
        registers_take<240>();
        const int consumer = warp / 4 - 1;
        const int row_in_tile = PINGPONG ? 0 : consumer * CONSUMER_ROWS;
        const u32 w_base = stages + X_BYTES + row_in_tile * KEPT;
        const u32 places_base = stages + X_BYTES + W_BYTES + row_in_tile / 64 * PLACES + 4 * (THREAD_INDEX % WARPGROUP);
        const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
        const int tiles = work.tile_rows * work.tile_columns;
        const Scales scales = {x_step, w_step, bias, w_sums};
        const u32 edges = at.end + consumer * EDGE_BYTES;
        const int stride = GRID_SIZE / CLUSTER;
        Ring<STAGES> ring;
        u32 turn = consumer ^ 1;
        if (PINGPONG && consumer == 1) ring.skip(work.steps);
        for (int index = BLOCK_INDEX / CLUSTER + (PINGPONG ? consumer * stride : 0); index < tiles;
             index += PINGPONG ? 2 * stride : stride) {
            const Tile tile = tile_at(index, work.tile_rows, work.tile_columns);
            const int row = (tile.row * CLUSTER + rank) * ROWS + row_in_tile, column = tile.column * COLUMNS;
            int sum[ROWS_64][COLUMNS / 2];
            warpgroup_sync(consumer);  // the tile before has been stored
            fetch_edges(edges, scales, work, row, column, THREAD_INDEX % WARPGROUP);
            if (PINGPONG) barrier_wait(at.turns + 8 * consumer, turn);
            multiply_tile(sum, work.steps, stages, w_base, places_base, at, at.turns + 8 * (consumer ^ 1), lane, ring);
            turn ^= 1;
            warpgroup_sync(consumer);
            store_tile(sum, out, edges, work, row, column, warp % 4, lane);
            if (PINGPONG) ring.skip(work.steps);
        }
    }
    cluster_sync();  // nobody leaves while the other block may still write here or arrive at barriers here
}
