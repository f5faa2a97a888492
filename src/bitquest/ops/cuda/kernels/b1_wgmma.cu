// Products of 1-bit planes on Hopper's tensor cores: y (T, N) from the planes of x (T, K) and of w (N, K).
//
// A b-bit code u (0 … 2^b − 1) is kept as b planes of bits, u = Σ 2^p·plane_p, and stands for the odd integer
// a = 2u − m, m = 2^b − 1 (1 bit: ±1). With S = Σ a over a row, which the pack step knows,
//     Σ a·c = 4·Σ u·v − m_w·S_x − m_x·S_w − m_x·m_w·K,      Σ u·v = Σ_{i, j} 2^(i + j)·popcount(plane_i AND plane_j).
// The plane pairs go by falling i + j, the accumulators double between two values of it: exact, and no more registers
// than one product takes. Bits beyond K and rows beyond T or N arrive from the copy engine as zeros and add nothing.
//
// A block is a producer warp, which keeps the copy engine STAGES steps of 1024 bits ahead, and two consumer
// warpgroups. PINGPONG 1: each consumer has its own tile, one multiplies while the other stores; a consumer begins when
// the other has issued the products of the tile before (waiting by parity, it may not run ahead of the ring by a turn).
// PINGPONG 0: they halve one tile. A cluster's blocks have neighbouring rows and the same columns: each fetches its
// share of w for all of them.
//
// Set by the launcher: COLUMNS (64, 128, 192, 256), ROWS_64 (64-row products per consumer), STAGES, CLUSTER (1, 2),
// PINGPONG, X_PLANES, W_PLANES, OUT (an Output), WHOLE (1: N is a multiple of 8, so that groups of 8 results lie inside
// or outside, on 16-byte boundaries).
#include <hopper_ptx.cuh>
#include <hopper.cuh>
#include <wgmma.cuh>

constexpr int STEP_BYTES = 128;    // of each row, a step along K: one swizzle span
constexpr int PRODUCT_BYTES = 32;  // of each row, one product
constexpr int CONSUMER_ROWS = 64 * ROWS_64;
constexpr int ROWS = CONSUMER_ROWS * (PINGPONG ? 1 : 2);
constexpr int SHARE = COLUMNS / CLUSTER;  // rows of w that one block fetches
constexpr int X_BYTES = ROWS * STEP_BYTES;
constexpr int W_BYTES = COLUMNS * STEP_BYTES;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int RELEASES = 4 * (PINGPONG ? 1 : 2) * CLUSTER;  // warps that read a stage, here and in the other block
constexpr int X_WEIGHT = (1 << X_PLANES) - 1, W_WEIGHT = (1 << W_PLANES) - 1;
constexpr int TOP = X_PLANES + W_PLANES - 2;

static_assert(ROWS <= 256 && SHARE <= 256 && SHARE % 8 == 0, "boxes of the copy engine");

// A kernel argument, not computed: the compiler then rereads it from constant memory and keeps no register for it.
struct Work {
    int tokens, channels, width;  // T, N, K
    int steps;                    // along K for one pair of planes: ⌈K / 1024⌉
    int tile_rows, tile_columns;  // ⌈T / (ROWS·CLUSTER)⌉, ⌈N / COLUMNS⌉
};

// Plane pairs (i, level − i) of one level run over i from first_plane to last_plane.
DEVICE int first_plane(int level) { return level < W_PLANES ? 0 : level - W_PLANES + 1; }
DEVICE int last_plane(int level) { return level < X_PLANES ? level : X_PLANES - 1; }

DEVICE void produce(const TensorMap* x_map, const TensorMap* w_map, const Work& work, u32 stages, const Barriers& at) {
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int tiles = work.tile_rows * work.tile_columns;
    Ring<STAGES> ring;
    for (int index = BLOCK_INDEX / CLUSTER; index < tiles; index += GRID_SIZE / CLUSTER) {
        const Tile tile = tile_at(index, work.tile_rows, work.tile_columns);
        const int row = (tile.row * CLUSTER + rank) * ROWS, column = tile.column * COLUMNS + rank * SHARE;
        for (int level = TOP; level >= 0; --level) {
            for (int plane = first_plane(level); plane <= last_plane(level); ++plane) {
                NO_UNROLL for (int step = 0; step < work.steps; ++step, ring.next()) {
                    const u32 x_stage = stages + ring.stage() * STAGE_BYTES;
                    const u32 w_stage = x_stage + X_BYTES + rank * (SHARE * STEP_BYTES);
                    const u32 barrier = at.full + ring.stage() * 8;
                    barrier_wait(at.empty + ring.stage() * 8, ring.parity() ^ 1);
                    barrier_expect(barrier, STAGE_BYTES);
                    tensor_load(x_stage, x_map, barrier, step * STEP_BYTES, row, plane);
                    if (CLUSTER > 1) {
                        tensor_load_multicast(w_stage, w_map, barrier, step * STEP_BYTES, column, level - plane,
                                              (1 << CLUSTER) - 1);
                    } else {
                        tensor_load(w_stage, w_map, barrier, step * STEP_BYTES, column, level - plane);
                    }
                }
            }
        }
    }
}

// The accumulators of one tile: Σ u·v of this consumer's rows. `next` is the barrier of the consumer that goes next.
DEVICE void multiply_tile(int (&sum)[ROWS_64][COLUMNS / 2], int steps, u32 x_base, u32 w_base, const Barriers& at,
                          u32 next, u32 lane, Ring<STAGES>& ring) {
    u32 keep = 0;
    NO_UNROLL for (int level = TOP; level >= 0; --level) {
        const int level_steps = steps * (last_plane(level) - first_plane(level) + 1);
        u32 last = 0;
        for (int step = 0; step < level_steps; ++step) {
            const u64 x = matrix_descriptor<STEP_BYTES>(x_base + ring.stage() * STAGE_BYTES);
            const u64 w = matrix_descriptor<STEP_BYTES>(w_base + ring.stage() * STAGE_BYTES);
            barrier_wait(at.full + ring.stage() * 8, ring.parity());
            UNROLL for (int r = 0; r < ROWS_64; ++r) UNROLL for (int i = 0; i < COLUMNS / 2; ++i) pin(sum[r][i]);
            product_fence();
            UNROLL for (int k = 0; k < STEP_BYTES / PRODUCT_BYTES; ++k) {
                UNROLL for (int r = 0; r < ROWS_64; ++r) {
                    const int ahead = r * (64 * STEP_BYTES) + k * PRODUCT_BYTES;
                    bits_product(sum[r], x + ahead / 16, w + k * PRODUCT_BYTES / 16, keep);
                }
                keep = 1;
            }
            product_commit();
            if (step > 0) {  // the step before has been read
                product_wait<1>();
                release<CLUSTER>(last, lane);
            }
            last = at.empty + ring.stage() * 8;
            ring.next();
        }
        if (PINGPONG && level == 0 && lane == 0) barrier_arrive(next);
        product_wait<0>();
        release<CLUSTER>(last, lane);
        UNROLL for (int r = 0; r < ROWS_64; ++r) UNROLL for (int i = 0; i < COLUMNS / 2; ++i) {
            pin(sum[r][i]);
            if (level > 0) sum[r][i] += sum[r][i];
        }
    }
}

struct Scales {
    const float *x_step, *w_step, *bias;  // (T), (N), (N) or null
    const int *x_sums, *w_sums;           // (T), (N)
};

// What the rows and columns of a consumer's tile need, in its own shared memory: fetched before the products, read
// after them (the registers are the accumulators' then).
constexpr int SUM_AT = 0, STEP_AT = 4 * COLUMNS, BIAS_AT = 8 * COLUMNS;      // of the columns
constexpr int X_SUM_AT = 12 * COLUMNS, X_STEP_AT = X_SUM_AT + 4 * CONSUMER_ROWS;  // of the rows
constexpr int EDGE_BYTES = X_STEP_AT + 4 * CONSUMER_ROWS;

DEVICE void fetch_edges(u32 edges, const Scales& scales, const Work& work, int row, int column, u32 thread) {
    for (int i = thread; i < COLUMNS; i += WARPGROUP) {
        const int channel = column + i;
        const bool inside = channel < work.channels;
        write_word(edges + SUM_AT + 4 * i, inside ? X_WEIGHT * scales.w_sums[channel] : 0);
        if (OUT != INT32) {
            write_word(edges + STEP_AT + 4 * i, bits_of(inside ? scales.w_step[channel] : 0.0f));
            write_word(edges + BIAS_AT + 4 * i, bits_of(inside && scales.bias ? scales.bias[channel] : 0.0f));
        }
    }
    for (int i = thread; i < CONSUMER_ROWS; i += WARPGROUP) {
        const int token = row + i;
        const bool inside = token < work.tokens;
        write_word(edges + X_SUM_AT + 4 * i,
                   (inside ? W_WEIGHT * scales.x_sums[token] : 0) + work.width * (X_WEIGHT * W_WEIGHT));
        if (OUT != INT32) {
            write_word(edges + X_STEP_AT + 4 * i, bits_of(inside ? multiply(scales.x_step[token], 0.25f) : 0.0f));
        }
    }
}

// Of the tile whose first result is at `row`, `column`; `warp` is one of the consumer's four.
DEVICE void store_tile(const int (&sum)[ROWS_64][COLUMNS / 2], u8* out, u32 edges, const Work& work, int row,
                       int column, u32 warp, u32 lane) {
    constexpr int SIZE = OUT == INT32 || OUT == FLOAT32 ? 4 : 2;
    const int quad = lane % 4, within = 16 * warp + lane / 4;  // the row of this lane's first accumulator
    const int below = work.tokens - row - within, right = work.channels - column;
    out += (static_cast<u64>(row + within) * work.channels + column) * SIZE;
    const u32 row_edges = edges + 4 * within, column_edges = edges + 8 * quad;
    UNROLL for (int group = 0; group < COLUMNS / 32; ++group) UNROLL for (int r = 0; r < ROWS_64; ++r) {
        u32 word[2][4];
        int row_sum[2];
        float row_scale[2];
        UNROLL for (int half = 0; half < 2; ++half) {
            const int ahead = 64 * r + 8 * half;
            row_sum[half] = read_word(row_edges + X_SUM_AT + 4 * ahead);
            if (OUT != INT32) row_scale[half] = float_of(read_word(row_edges + X_STEP_AT + 4 * ahead));
        }
        UNROLL for (int c = 0; c < 4; ++c) {
            const int first = 32 * group + 8 * c;
            int sum_low, sum_high;
            float step_low, step_high, bias_low, bias_high;
            read_pair(column_edges + SUM_AT + 4 * first, sum_low, sum_high);
            if (OUT != INT32) {
                read_pair(column_edges + STEP_AT + 4 * first, step_low, step_high);
                read_pair(column_edges + BIAS_AT + 4 * first, bias_low, bias_high);
            }
            UNROLL for (int half = 0; half < 2; ++half) {
                const int* dot = &sum[r][16 * group + 4 * c + 2 * half];
                const int low = 4 * dot[0] - row_sum[half] - sum_low;
                const int high = 4 * dot[1] - row_sum[half] - sum_high;
                u32 bits[2] = {static_cast<u32>(low), static_cast<u32>(high)};
                if (OUT != INT32) {
                    const float y = add(multiply(multiply(float(low), row_scale[half]), step_low), bias_low);
                    const float z = add(multiply(multiply(float(high), row_scale[half]), step_high), bias_high);
                    bits[0] = bits_of(y);
                    bits[1] = bits_of(z);
                    if (SIZE == 2) word[half][c] = pack_pair<OUT>(y, z);
                }
                if (SIZE == 4 && 64 * r + 8 * half < below) {
                    store_pair<WHOLE>(row_at<SIZE>(out, 64 * r + 8 * half, work.channels), bits[0], bits[1],
                                      first + 2 * quad, right);
                }
            }
        }
        UNROLL for (int half = 0; SIZE == 2 && half < 2; ++half) {
            store_halves<WHOLE>(row_at<SIZE>(out, 64 * r + 8 * half, work.channels), word[half], 32 * group,
                                64 * r + 8 * half < below, right, quad);
        }
    }
}

KERNEL(THREADS, CLUSTER)
b1_wgmma(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, u8* out, const float* x_step,
         const float* w_step, const int* x_sums, const int* w_sums, const float* bias, GRID_CONSTANT Work work) {
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
        if (warp == 0 && lane == 0) produce(&x_map, &w_map, work, stages, at);
        warp_sync();
    } else {
        registers_take<240>();
        const int consumer = warp / 4 - 1;
        const int row_in_tile = PINGPONG ? 0 : consumer * CONSUMER_ROWS;
        const u32 x_base = stages + row_in_tile * STEP_BYTES, w_base = stages + X_BYTES;
        const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
        const int tiles = work.tile_rows * work.tile_columns;
        const int skipped = work.steps * X_PLANES * W_PLANES;  // the other consumer's, with PINGPONG
        const Scales scales = {x_step, w_step, bias, x_sums, w_sums};
        const u32 edges = at.end + consumer * EDGE_BYTES;
        const int stride = GRID_SIZE / CLUSTER;
        Ring<STAGES> ring;
        u32 turn = consumer ^ 1;  // the parity to wait for; the first consumer's first tile waits for nothing
        if (PINGPONG && consumer == 1) ring.skip(skipped);
        for (int index = BLOCK_INDEX / CLUSTER + (PINGPONG ? consumer * stride : 0); index < tiles;
             index += PINGPONG ? 2 * stride : stride) {
            const Tile tile = tile_at(index, work.tile_rows, work.tile_columns);
            const int row = (tile.row * CLUSTER + rank) * ROWS + row_in_tile, column = tile.column * COLUMNS;
            int sum[ROWS_64][COLUMNS / 2];
            warpgroup_sync(consumer);  // the tile before has been stored
            fetch_edges(edges, scales, work, row, column, THREAD_INDEX % WARPGROUP);
            if (PINGPONG) barrier_wait(at.turns + 8 * consumer, turn);
            multiply_tile(sum, work.steps, x_base, w_base, at, at.turns + 8 * (consumer ^ 1), lane, ring);
            turn ^= 1;
            warpgroup_sync(consumer);
            store_tile(sum, out, edges, work, row, column, warp % 4, lane);
            if (PINGPONG) ring.skip(skipped);
        }
    }
    cluster_sync();  // nobody leaves while the other block may still write here or arrive at barriers here
}
