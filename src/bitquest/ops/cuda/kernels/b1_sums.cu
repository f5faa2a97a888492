// Row sums of ±1 stored as bits: Σa = 2·(ones) − width, for weights at load and activations that come without them.
#include <b1_primitives.cuh>

// bits: `rows` rows of ⌈width/8⌉ bytes, `pitch` apart, each beginning on a multiple of 16; spare bits are zero.
// One warp per row, four warps a block.
extern "C" __global__ void __launch_bounds__(128) b1_sums(const u8* bits, int* sums, int rows, int width, i64 pitch) {
  const i64 row = static_cast<i64>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const u8* bytes = bits + row * pitch;
  const uint4* chunks = reinterpret_cast<const uint4*>(bytes);
  const int lane = threadIdx.x % 32, row_bytes = (width + 7) / 8;
  int ones = 0;
  for (int i = lane; i < row_bytes / 16; i += 32) {
    const uint4 words = chunks[i];
    ones += count_ones(words.x) + count_ones(words.y) + count_ones(words.z) + count_ones(words.w);
  }
  if (lane < row_bytes % 16) ones += count_ones(bytes[row_bytes / 16 * 16 + lane]);
  ones = sum_over_warp(ones);
  if (lane == 0) sums[row] = 2 * ones - width;
}
