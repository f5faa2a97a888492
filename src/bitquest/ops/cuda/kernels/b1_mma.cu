// y[t, n] = Σ_k x[t, k]·w[n, k] for x, w = ±1 stored as bits (1 is +1): the 1-bit product on tensor cores by mma.sync.
//
// A block computes BLOCK_M × BLOCK_N elements of y, a warp WARP_M × WARP_N of them in registers. The operands pass
// through a ring of STAGES tiles of BLOCK_K bytes a row in shared memory, filled by cp.async while earlier tiles are
// multiplied. 16-byte chunks of a row are swizzled by XOR, so that the 8 rows ldmatrix reads at once lie in different
// banks. mma m16n8k256 takes 16 rows of x and 8 of w, 32 bytes each: the geometry of int8's m16n8k32.
//
// The units count popc(x AND w) or popc(x XOR w). With a = ±1, P = the count and Σa the row sums of the integers:
//   XOR:  dot = K − 2·P                      sm_80, sm_86, sm_89: one BMMA
//   AND:  dot = 4·P − Σa_x − Σa_w − K        sm_90: one BMMA, where XOR would take two and logic on the operands
// Bits past K are zero in both operands, those past the last byte of a row by cp.async, and count nothing.
//
// Compiled with: BLOCK_M BLOCK_N WARP_M WARP_N BLOCK_K STAGES MIN_BLOCKS, USE_AND (0, 1) and OUT, the result's type:
// 0 int32 (dot itself), 1 float32, 2 bfloat16, 3 float16 (dot · (x_step/4) · w_step + bias in float32, rounded once).
#include <b1_primitives.cuh>

constexpr int WARPS_N = BLOCK_N / WARP_N;
constexpr int THREADS = BLOCK_M / WARP_M * WARPS_N * 32;
constexpr int M_TILES = WARP_M / 16;
constexpr int N_TILES = WARP_N / 8;
constexpr int CHUNKS = BLOCK_K / 16;            // 16-byte chunks of a row of a tile
constexpr int CHUNK_STEP = THREADS / CHUNKS;    // rows that all threads copy at once
constexpr int X_TILE_BYTES = BLOCK_M * BLOCK_K;
constexpr int STAGE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K;
constexpr int RING_BYTES = STAGES * STAGE_BYTES;
constexpr int OUT_BYTES = OUT <= 1 ? 4 : 2;
constexpr int STAGING_PITCH = WARP_N * OUT_BYTES + (OUT_BYTES == 4 ? 32 : 16);  // padded: rows begin in other banks
constexpr int STAGING_BYTES = 16 * STAGING_PITCH;                               // per warp, 16 rows at a time

// What the epilogue needs of each row of x and of w lies behind the ring: step, sum (and bias of w).
constexpr int X_STEP = RING_BYTES, X_SUM = X_STEP + 4 * BLOCK_M, W_STEP = X_SUM + 4 * BLOCK_M;
constexpr int W_SUM = W_STEP + 4 * BLOCK_N, BIAS = W_SUM + 4 * BLOCK_N, SHARED_BYTES = BIAS + 4 * BLOCK_N;

static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0, "a warp takes whole fragments");
static_assert(BLOCK_M % WARP_M == 0 && BLOCK_N % WARP_N == 0, "warps tile a block");
static_assert(CHUNKS == 4 || CHUNKS == 8, "the swizzle is made for rows of 64 or 128 bytes");
static_assert(BLOCK_M % CHUNK_STEP == 0 || CHUNK_STEP % BLOCK_M == 0, "copies of x take whole rounds");
static_assert(BLOCK_N % CHUNK_STEP == 0, "copies of w take whole rounds");
static_assert(STAGES >= 2, "a tile is filled while another is multiplied");
static_assert(THREADS / 32 * STAGING_BYTES <= RING_BYTES, "the results are staged in the ring");

// Where chunk `chunk` of row `row` of a tile lies in it.
DEVICE u32 swizzled(int row, int chunk) { return row * BLOCK_K + (chunk ^ row * CHUNKS / 8 % CHUNKS) * 16; }

// Starts copying BLOCK_K bytes, from byte `begin` on, of rows [first, first + ROWS) to a tile; zeros beyond the matrix.
template <int ROWS>
DEVICE void copy_tile(u32 tile, const u8* matrix, int first, int rows, i64 pitch, int begin, int row_bytes) {
  const int chunk = threadIdx.x % CHUNKS;
  const int left = row_bytes - begin - chunk * 16;  // of the row, from this chunk on
  const int bytes = left < 0 ? 0 : left < 16 ? left : 16;
  const u8* source = matrix + (bytes > 0 ? begin + chunk * 16 : 0);
#pragma unroll
  for (int step = 0; step < (ROWS + CHUNK_STEP - 1) / CHUNK_STEP; ++step) {
    const int row = threadIdx.x / CHUNKS + step * CHUNK_STEP;
    if (ROWS % CHUNK_STEP != 0 && row >= ROWS) break;
    const bool inside = first + row < rows;
    copy_async_16(tile + swizzled(row, chunk), source + (inside ? first + row : 0) * pitch, inside ? bytes : 0);
  }
}

// One word for each of `count` rows of a block into shared memory; zeros beyond the matrix or where there is no array.
DEVICE void copy_words(u32 shared, const void* words, int count, int first, int rows) {
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const bool inside = words != nullptr && first + i < rows;
    store_shared_4(shared + 4 * i, inside ? static_cast<const u32*>(words)[first + i] : 0);
  }
}

// Multiplies one tile: every warp its WARP_M × WARP_N elements, 256 bits at a time.
DEVICE void multiply_tile(int (&count)[M_TILES][N_TILES][4], u32 tile, int warp_row, int warp_column) {
  const int lane = threadIdx.x % 32;
  // Matrices 0 to 3 of ldmatrix. Of x: rows 0–7 and 8–15 of the low 16 bytes, then of the high ones.
  const int x_row = warp_row + lane % 16, x_half = lane / 16;
  // Of w: low and high 16 bytes of rows 0–7, then of rows 8–15.
  const int w_row = warp_column + lane % 8 + lane / 16 * 8, w_half = lane / 8 % 2;
#pragma unroll
  for (int step = 0; step < BLOCK_K / 32; ++step) {
    u32 x[M_TILES][4], w[N_TILES / 2][4];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) load_matrices(x[i], tile + swizzled(x_row + 16 * i, 2 * step + x_half));
#pragma unroll
    for (int j = 0; j < N_TILES / 2; ++j) {
      load_matrices(w[j], tile + X_TILE_BYTES + swizzled(w_row + 16 * j, 2 * step + w_half));
    }
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
      for (int j = 0; j < N_TILES; ++j) {
        const u32 low = w[j / 2][j % 2 * 2], high = w[j / 2][j % 2 * 2 + 1];
        if constexpr (USE_AND) {
          multiply_and(count[i][j], x[i], low, high);
        } else {
          multiply_xor(count[i][j], x[i], low, high);
        }
      }
    }
  }
}

// The result's bits from a count, for one element.
DEVICE int dot_of(int count, int x_sum, int w_sum, int width) {
  return USE_AND ? 4 * count - x_sum - w_sum - width : width - 2 * count;
}
DEVICE float scaled(int dot, float x_step, float w_step, float bias, bool has_bias) {
  const float value = product(product(static_cast<float>(dot), product(x_step, 0.25f)), w_step);
  return has_bias ? sum(value, bias) : value;
}

// Two neighbours of a row of y into the staging area.
DEVICE void stage_pair(u32 staged, u32 ring, int row, int column, const int* counts, int width, bool has_bias) {
  const int x_sum = USE_AND ? load_shared_4(ring + X_SUM + 4 * row) : 0;
  const uint2 w_sum = USE_AND ? load_shared_8(ring + W_SUM + 4 * column) : uint2{0, 0};
  const int dot_0 = dot_of(counts[0], x_sum, w_sum.x, width), dot_1 = dot_of(counts[1], x_sum, w_sum.y, width);
  if constexpr (OUT == 0) {
    store_shared_8(staged, dot_0, dot_1);
    return;
  }
  const float x_step = float_of(load_shared_4(ring + X_STEP + 4 * row));
  const uint2 w_step = load_shared_8(ring + W_STEP + 4 * column), bias = load_shared_8(ring + BIAS + 4 * column);
  const float y_0 = scaled(dot_0, x_step, float_of(w_step.x), float_of(bias.x), has_bias);
  const float y_1 = scaled(dot_1, x_step, float_of(w_step.y), float_of(bias.y), has_bias);
  if constexpr (OUT == 1) {
    store_shared_8(staged, bits_of(y_0), bits_of(y_1));
  } else {
    store_shared_4(staged, OUT == 2 ? bfloat16_pair(y_0, y_1) : float16_pair(y_0, y_1));
  }
}

// 16 staged rows of a warp to memory: 16 bytes a lane where the rows of y begin on 16 bytes, else element by element.
DEVICE void write_rows(u8* out, u32 staging, i64 first_row, int first_column, int tokens, int channels) {
  const int lane = threadIdx.x % 32;
  if (channels * OUT_BYTES % 16 == 0) {
    constexpr int PIECES = WARP_N * OUT_BYTES / 16;
    for (int i = lane; i < 16 * PIECES; i += 32) {
      const i64 row = first_row + i / PIECES;
      const int column = first_column + i % PIECES * (16 / OUT_BYTES);
      if (row < tokens && column < channels) {
        const uint4 piece = load_shared_16(staging + i / PIECES * STAGING_PITCH + i % PIECES * 16);
        *reinterpret_cast<uint4*>(out + (row * channels + column) * OUT_BYTES) = piece;
      }
    }
    return;
  }
  for (int i = lane; i < 16 * WARP_N; i += 32) {
    const i64 row = first_row + i / WARP_N;
    const int column = first_column + i % WARP_N;
    if (row < tokens && column < channels) {
      const u32 staged = staging + i / WARP_N * STAGING_PITCH + i % WARP_N * OUT_BYTES;
      if constexpr (OUT_BYTES == 4) {
        reinterpret_cast<u32*>(out)[row * channels + column] = load_shared_4(staged);
      } else {
        reinterpret_cast<u16*>(out)[row * channels + column] = load_shared_2(staged);
      }
    }
  }
}

// x: tokens rows of ⌈width/8⌉ bytes, x_pitch apart, w: channels rows of as many, w_pitch apart; all begin on multiples
// of 16 bytes; spare bits are zero. Steps float32, sums int32 (read only with AND), bias float32 or null: one per row.
// One block per tile of y, in blockIdx.x; neighbours in time share rows of w (8 tiles high, then the next column).
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    b1_mma(const u8* x, const u8* w, u8* out, const float* x_step, const float* w_step, const float* bias,
           const int* x_sums, const int* w_sums, int tokens, int channels, int width, i64 x_pitch, i64 w_pitch) {
  const u32 ring = shared_begin();
  const int high = (tokens + BLOCK_M - 1) / BLOCK_M, wide = (channels + BLOCK_N - 1) / BLOCK_N;
  const int band = static_cast<int>(blockIdx.x) / (8 * wide);
  const int band_high = high - band * 8 < 8 ? high - band * 8 : 8;
  const int in_band = static_cast<int>(blockIdx.x) - band * 8 * wide;
  const int first_row = (band * 8 + in_band % band_high) * BLOCK_M, first_column = in_band / band_high * BLOCK_N;

  const int row_bytes = (width + 7) / 8;
  const int tiles = (row_bytes + BLOCK_K - 1) / BLOCK_K;
  const auto copy = [&](int tile) {
    const u32 stage = ring + tile % STAGES * STAGE_BYTES;
    copy_tile<BLOCK_M>(stage, x, first_row, tokens, x_pitch, tile * BLOCK_K, row_bytes);
    copy_tile<BLOCK_N>(stage + X_TILE_BYTES, w, first_column, channels, w_pitch, tile * BLOCK_K, row_bytes);
  };
  for (int tile = 0; tile < STAGES - 1; ++tile) {
    if (tile < tiles) copy(tile);
    commit_copies();
  }
  if constexpr (USE_AND) {
    copy_words(ring + X_SUM, x_sums, BLOCK_M, first_row, tokens);
    copy_words(ring + W_SUM, w_sums, BLOCK_N, first_column, channels);
  }
  if constexpr (OUT != 0) {
    copy_words(ring + X_STEP, x_step, BLOCK_M, first_row, tokens);
    copy_words(ring + W_STEP, w_step, BLOCK_N, first_column, channels);
    copy_words(ring + BIAS, bias, BLOCK_N, first_column, channels);
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / WARPS_N * WARP_M, warp_column = warp % WARPS_N * WARP_N;
  int count[M_TILES][N_TILES][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<STAGES - 2>();  // this thread's part of the tile is there …
    block_barrier();            // … everybody's is, and everybody is done with the tile before: its place is free
    if (tile + STAGES - 1 < tiles) copy(tile + STAGES - 1);
    commit_copies();  // an empty group at the end keeps the count of groups right
    multiply_tile(count, ring + tile % STAGES * STAGE_BYTES, warp_row, warp_column);
  }
  block_barrier();  // the ring becomes the staging area

  const u32 staging = ring + warp * STAGING_BYTES;
  const int in_tile_row = lane / 4, in_tile_column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < M_TILES; ++i) {
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = in_tile_row + 8 * half, column = 8 * j + in_tile_column;
        stage_pair(staging + row * STAGING_PITCH + column * OUT_BYTES, ring, warp_row + 16 * i + row,
                   warp_column + column, &count[i][j][2 * half], width, bias != nullptr);
      }
    }
    warp_barrier();
    write_rows(out, staging, first_row + warp_row + 16 * i, first_column + warp_column, tokens, channels);
    warp_barrier();
  }
}
