// The functions of kernels/b1_primitives.cuh, emulated: fragment layouts as the PTX ISA gives them for
// ldmatrix.m8n8.x4.b16 and mma.m16n8k256.b1.
#pragma once

#include <cmath>

#include "emulator.hpp"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index)

struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};

DEVICE u32 shared_begin() { return 0; }
DEVICE void copy_async_16(u32 shared, const void* global, int bytes) { emulator::start_copy(shared, global, bytes); }
DEVICE void commit_copies() { emulator::commit_copies(); }
template <int Pending>
void wait_copies() {
  emulator::wait_copies(Pending);
}
DEVICE void block_barrier() { emulator::meet(emulator::block->all, "block_barrier"); }
DEVICE void warp_barrier() { emulator::meet(emulator::own_warp(), "warp_barrier"); }

DEVICE void load_matrices(u32 (&fragment)[4], u32 shared) {
  emulator::check(shared, 16, false);
  const auto& lanes = emulator::exchange({{shared}, {}}, "load_matrices");
  const int lane = emulator::running % 32;
  unsigned banks = 0;  // the 8 rows of a matrix are read at once: each 16 bytes wide, of 128 that are there
  for (int row = 0; row < 8; ++row) banks |= 1u << (lanes[lane / 8 * 8 + row].a[0] / 16 % 8);
  if (banks != 0xFF) emulator::fail("rows of a matrix lie in the same banks", shared);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const u32 row = lanes[8 * matrix + lane / 4].a[0];
    std::memcpy(&fragment[matrix], emulator::block->shared.get() + row + 4 * (lane % 4), 4);
  }
}

template <typename Operation>
void multiply(int (&sum)[4], const u32 (&a)[4], u32 b_low, u32 b_high, const char* name, Operation operation) {
  const auto& lanes = emulator::exchange({{a[0], a[1], a[2], a[3]}, {b_low, b_high}}, name);
  const int group = emulator::running % 32 / 4, in_group = emulator::running % 4;
  for (int i = 0; i < 4; ++i) {  // element i lies in row group (+ 8 for i ≥ 2), column 2·in_group + i % 2
    const int low_row = i / 2, column = 2 * in_group + i % 2;
    for (int part = 0; part < 4; ++part) {  // bits 32·part … of each half of k are the lane's `part` of a group of 4
      for (int half = 0; half < 2; ++half) {  // a0, a1: k < 128, rows group and group + 8; a2, a3: k ≥ 128
        const u32 x = lanes[4 * group + part].a[low_row + 2 * half], w = lanes[4 * column + part].b[half];
        sum[i] += __builtin_popcount(operation(x, w));
      }
    }
  }
}
DEVICE void multiply_and(int (&sum)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  multiply(sum, a, b_low, b_high, "multiply_and", [](u32 x, u32 w) { return x & w; });
}
DEVICE void multiply_xor(int (&sum)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  multiply(sum, a, b_low, b_high, "multiply_xor", [](u32 x, u32 w) { return x ^ w; });
}

DEVICE u16 load_shared_2(u32 shared) { return emulator::load<u16>(shared); }
DEVICE u32 load_shared_4(u32 shared) { return emulator::load<u32>(shared); }
DEVICE uint2 load_shared_8(u32 shared) { return emulator::load<uint2>(shared); }
DEVICE uint4 load_shared_16(u32 shared) { return emulator::load<uint4>(shared); }
DEVICE void store_shared_4(u32 shared, u32 value) { emulator::store(shared, value); }
DEVICE void store_shared_8(u32 shared, u32 low, u32 high) { emulator::store(shared, uint2{low, high}); }

DEVICE u32 bits_of(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
DEVICE float float_of(u32 bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
DEVICE u32 bfloat16_of(float value) {  // finite values only
  const u32 bits = bits_of(value);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 float16_of(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
DEVICE u32 bfloat16_pair(float low, float high) { return bfloat16_of(low) | bfloat16_of(high) << 16; }
DEVICE u32 float16_pair(float low, float high) { return float16_of(low) | float16_of(high) << 16; }
DEVICE float product(float a, float b) { return a * b; }  // compiled with -ffp-contract=off
DEVICE float sum(float a, float b) { return a + b; }
DEVICE int count_ones(u32 word) { return __builtin_popcount(word); }
DEVICE int sum_over_warp(int value) {
  int total = 0;
  for (const auto& lane : emulator::exchange({{static_cast<u32>(value)}, {}}, "sum_over_warp")) {
    total += static_cast<int>(lane.a[0]);
  }
  return total;
}
