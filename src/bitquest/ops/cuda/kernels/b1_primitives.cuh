// The instructions that the 1-bit kernels are made of, each behind a small function, so that the tests can put the
// same functions of an emulator in their place (tests/ops/cuda/emulator). Nothing else in the kernels is PTX.
// Addresses of shared memory are 32-bit offsets of its own state space.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

#define DEVICE __device__ __forceinline__

extern __shared__ __align__(128) u8 dynamic_shared[];

DEVICE u32 shared_begin() { return static_cast<u32>(__cvta_generic_to_shared(dynamic_shared)); }

// Copies `bytes` (0 to 16) from global to shared memory and fills up to 16 with zeros. Past the L1, asynchronous.
DEVICE void copy_async_16(u32 shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(__cvta_generic_to_global(global)),
               "r"(bytes)
               : "memory");
}

// Closes a group of copies of this thread; groups complete in order.
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Four 8×16-byte matrices: lane l gives the address of row l % 8 of matrix l / 8, and receives of every matrix the
// 4 bytes at row l / 4, byte 4·(l % 4).
DEVICE void load_matrices(u32 (&fragment)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared)
               : "memory");
}

// sum[16][8] += popcount(a[16][256] op b[8][256]) over one warp, op being AND or XOR.
DEVICE void multiply_and(int (&sum)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
DEVICE void multiply_xor(int (&sum)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Ordinary accesses to shared memory, of 2, 4, 8 and 16 bytes.
DEVICE u16 load_shared_2(u32 shared) {
  u16 value;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(value) : "r"(shared) : "memory");
  return value;
}
DEVICE u32 load_shared_4(u32 shared) {
  u32 value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}
DEVICE uint2 load_shared_8(u32 shared) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(shared) : "memory");
  return value;
}
DEVICE uint4 load_shared_16(u32 shared) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(shared)
               : "memory");
  return value;
}
DEVICE void store_shared_4(u32 shared, u32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}
DEVICE void store_shared_8(u32 shared, u32 low, u32 high) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(low), "r"(high) : "memory");
}

// Bits of a float, and two floats rounded to nearest even in two halves of a word, the first in the low half.
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bfloat16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE u32 float16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Products and sums rounded one by one: never contracted to a fused multiply-add, so that they equal torch's.
DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }

DEVICE int count_ones(u32 word) { return __popc(word); }
DEVICE int sum_over_warp(int value) { return __reduce_add_sync(0xffffffffu, value); }
