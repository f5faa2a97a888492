// Row sums of ±1 stored as bits: Σa = 2·(ones) − width, for weights at load and activations that come without them.
#include <b1_primitives.cuh>

// bits: rows of `pitch` bytes beginning on 16 bytes, zero from bit `width` on. One warp per row, four warps a block.
extern "C" __global__ void __launch_bounds__(128) b1_sums(const u8* bits, int* sums, int rows, int width, i64 pitch) {
  const i64 row = static_cast<i64>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const uint4* chunk = reinterpret_cast<const uint4*>(bits + row * pitch);
  int ones = 0;
  for (int i = threadIdx.x % 32; i < (width + 127) / 128; i += 32) {
    const uint4 words = chunk[i];
    ones += count_ones(words.x) + count_ones(words.y) + count_ones(words.z) + count_ones(words.w);
  }
  ones = sum_over_warp(ones);
  if (threadIdx.x % 32 == 0) sums[row] = 2 * ones - width;
}
