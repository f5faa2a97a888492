// The functions of kernels/hopper_ptx.cuh, by the model.
#pragma once

#include "model.hpp"

#define DEVICE inline
#define KERNEL(THREADS, CLUSTER) extern "C" void
#define GRID_CONSTANT const
#define SHARED_MEMORY(name) u8* name = model::current->block->shared.data() + model::BASE
#define THREAD_INDEX (model::current->thread)
#define BLOCK_INDEX (model::current->block->index)
#define GRID_SIZE (model::grid)
#define UNROLL
#define NO_UNROLL

struct TensorMap {
    model::Box box;
};

DEVICE u32 shared_address(const void* pointer) {
    return static_cast<u32>(static_cast<const u8*>(pointer) - model::current->block->shared.data());
}
DEVICE u32 cluster_rank() { return model::current->block->rank; }
DEVICE void cluster_sync() {
    model::meet(model::everyone, static_cast<u32>(model::cluster.size()) * BLOCK_THREADS);
}
template <int COUNT>
void registers_give() {}
template <int COUNT>
void registers_take() {}

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    model::current->block->at(barrier, 8);
    model::current->block->barriers[barrier] = {arrivals, arrivals, 0, 0};
}
DEVICE void barrier_init_done() {}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    auto& made = model::current->block->barrier(barrier);
    made.bytes += bytes;
    made.arrive();
}
DEVICE void barrier_arrive(u32 barrier) { model::current->block->barrier(barrier).arrive(); }
DEVICE void barrier_arrive_at(u32 barrier, u32 rank) { model::cluster.at(rank)->barrier(barrier).arrive(); }
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    auto& made = model::current->block->barrier(barrier);
    model::wait_until([&made, parity] { return made.phase != parity; });
}

DEVICE void tensor_prefetch(const TensorMap*) {}
DEVICE void tensor_load_multicast(u32 target, const TensorMap* map, u32 barrier, int x, int y, int z, u16 mask) {
    const model::Box box = map->box;
    const auto fill = [box, x, y, z](u8* bytes) {
        for (int row = 0; row < box.box_rows; ++row) {
            for (int byte = 0; byte < box.box_bytes; ++byte) {
                const bool inside = z < box.planes && y + row < box.rows && x + byte < box.bytes;
                bytes[row * box.box_bytes + byte] =
                    inside ? box.data[z * box.plane_pitch + (y + row) * box.row_pitch + x + byte] : 0;
            }
        }
    };
    for (model::Block* block : model::cluster) {
        if (mask >> block->rank & 1) {
            model::start({block, target, barrier, static_cast<u32>(box.box_rows * box.box_bytes), fill, box.box_bytes});
        }
    }
}
DEVICE void tensor_load(u32 target, const TensorMap* map, u32 barrier, int x, int y, int z) {
    tensor_load_multicast(target, map, barrier, x, y, z, static_cast<u16>(1 << cluster_rank()));
}
DEVICE void bulk_load(u32 target, const void* source, u32 bytes, u32 barrier) {
    model::require(bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(source) % 16 == 0, "a bulk copy not by 16 bytes");
    model::start({model::current->block, target, barrier, bytes,
                  [source, bytes](u8* made) { std::memcpy(made, source, bytes); }, 0});
}

// The lanes of a warp issue and await products together.
DEVICE void product_fence() { model::exchange(0); }
DEVICE void product_commit() {
    model::current->committed.push_back(std::move(model::current->issued));
    model::current->issued.clear();
}
template <int PENDING>
void product_wait() {
    model::retire(PENDING);
    model::exchange(0);
}

DEVICE void warpgroup_sync(int index) { model::meet(model::current->block->meetings[index], 128); }
DEVICE void write_word(u32 address, u32 value) { std::memcpy(model::current->block->at(address, 4), &value, 4); }
DEVICE u32 read_word(u32 address) {
    u32 value;
    std::memcpy(&value, model::current->block->at(address, 4), 4);
    return value;
}
template <typename T>
void read_pair(u32 address, T& low, T& high) {
    model::require(address % 8 == 0, "a pair of words that is not aligned");
    std::memcpy(&low, model::current->block->at(address, 4), 4);
    std::memcpy(&high, model::current->block->at(address + 4, 4), 4);
}
DEVICE void pin(int&) {}

DEVICE u32 shuffle_xor(u32 value, int mask) { return model::exchange(value)[(THREAD_INDEX % 32) ^ mask]; }
DEVICE void warp_sync() { model::exchange(0); }
DEVICE u32 transpose_8x8(u32 pair) {
    const u32* shown = model::exchange(pair);
    const u32 row = THREAD_INDEX % 32 / 4, first = 2 * (THREAD_INDEX % 4);
    const auto element = [shown](u32 r, u32 c) { return shown[4 * r + c / 2] >> 16 * (c % 2) & 0xffff; };
    return element(first, row) | element(first + 1, row) << 16;
}

DEVICE float float_of(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
DEVICE u32 bits_of(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
DEVICE u32 bfloat16_bits(float value) {  // round to nearest, ties to even
    const u32 bits = bits_of(value);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 float16_bits(float value) {
    const _Float16 rounded = static_cast<_Float16>(value);
    u16 bits;
    std::memcpy(&bits, &rounded, 2);
    return bits;
}
DEVICE u32 pack_bfloat16(float low, float high) { return bfloat16_bits(low) | bfloat16_bits(high) << 16; }
DEVICE u32 pack_float16(float low, float high) { return float16_bits(low) | float16_bits(high) << 16; }
DEVICE float multiply(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
