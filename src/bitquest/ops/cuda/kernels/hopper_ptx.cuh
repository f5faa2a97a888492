// Hopper's own instructions, one small function each, for the warpgroup kernels (sm_90a).
//
// A kernel here is written against these functions alone. The tests compile the same kernel by a C++ compiler against a
// model of them (tests/ops/cuda/hopper_model), which is how its index arithmetic and its pipeline are tested without a
// GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// What cuTensorMapEncodeTiled writes: opaque, 128 bytes, 64-byte aligned, passed by value.
struct alignas(64) TensorMap {
    u8 bytes[128];
};

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// --- clusters -------------------------------------------------------------------------------------------------------

DEVICE u32 cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Every thread of the cluster arrives and waits; orders what came before it for the whole cluster.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// --- register budget of a warpgroup ---------------------------------------------------------------------------------

template <int COUNT>
DEVICE void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
DEVICE void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// --- mbarriers ------------------------------------------------------------------------------------------------------

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other block of the cluster (before cluster_sync).
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrive, and expect `bytes` from the copy engine before the phase ends.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive at the barrier with this shared address in block `rank` of the cluster.
DEVICE void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\t"
        "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// Wait until the phase with this parity has ended. A fresh barrier counts as past its phase of parity 1: a waiter must
// never be two phases ahead.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
            "selp.u32 %0, 1, 0, p;\n\t}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// --- the copy engine ------------------------------------------------------------------------------------------------

DEVICE void tensor_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(map)) : "memory");
}

// One box at (x bytes, row y, plane z); what lies outside the tensor arrives as zeros and counts as bytes.
DEVICE void tensor_load(u32 target, const TensorMap* map, u32 barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(target),
        "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}

// The same box to the same shared address of every block in `mask`, completing on each one's own barrier.
DEVICE void tensor_load_multicast(u32 target, const TensorMap* map, u32 barrier, int x, int y, int z, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
        "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(mask)
        : "memory");
}

// Contiguous bytes (a multiple of 16, both ends aligned to 16).
DEVICE void bulk_load(u32 target, const void* source, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
        "l"(reinterpret_cast<u64>(source)), "r"(bytes), "r"(barrier)
        : "memory");
}

// --- warpgroup products ---------------------------------------------------------------------------------------------

DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most `PENDING` committed groups of products are unfinished.
template <int PENDING>
DEVICE void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The 128 threads of consumer warpgroup `index` meet (hardware barrier 0 is the whole block's).
DEVICE void warpgroup_sync(int index) { asm volatile("bar.sync %0, 128;" ::"r"(index + 1) : "memory"); }

// Shared memory by address. Reads are volatile: the assembler would otherwise fetch early what is used late, and the
// registers belong to the accumulators.
DEVICE void write_word(u32 address, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE u32 read_word(u32 address) {
    u32 value;
    asm volatile("ld.volatile.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
DEVICE void read_pair(u32 address, int& low, int& high) {
    asm volatile("ld.volatile.shared.v2.b32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "r"(address) : "memory");
}
DEVICE void read_pair(u32 address, float& low, float& high) {
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(low), "=f"(high) : "r"(address) : "memory");
}

// Keep the compiler from moving uses of an accumulator across this point.
DEVICE void pin(int& accumulator) { asm volatile("" : "+r"(accumulator)::"memory"); }

// --- within a warp --------------------------------------------------------------------------------------------------

DEVICE u32 shuffle_xor(u32 value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
DEVICE void warp_sync() { __syncwarp(); }

// Transpose the warp's 8×8 matrix of 16-bit values: lane 4r + q holds columns 2q and 2q + 1 of row r.
DEVICE u32 transpose_8x8(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// --- rounding -------------------------------------------------------------------------------------------------------

DEVICE u32 pack_bfloat16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE u32 pack_float16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE float float_of(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }  // never fused with a following addition
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }

#define KERNEL(THREADS, CLUSTER) extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
#define GRID_CONSTANT const __grid_constant__
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) u8 name[]
#define THREAD_INDEX threadIdx.x
#define BLOCK_INDEX blockIdx.x
#define GRID_SIZE gridDim.x
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
