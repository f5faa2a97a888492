// A model of what Hopper's warpgroup kernels rest on: one fiber per thread of a cluster, shared memory, mbarriers, the
// copy engine with its swizzles, and asynchronous products.
//
// What is asynchronous happens as early or as late as the hardware may let it: copies land at random times (or at
// once), products read shared memory when they are issued or when their wait returns, and the thread that runs next is
// drawn at random. A stage that is refilled too early, read before it is full, or never released is then a wrong result
// or a deadlock, which the model reports. It knows nothing of memory proxies, fences or time.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

namespace model {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "hopper model: %s\n", what);
    std::exit(3);
}
inline void require(bool held, const char* what) {
    if (!held) fail(what);
}

constexpr u32 BASE = 1040;  // shared memory need not begin where the kernel would like it to
constexpr std::size_t STACK = 64 * 1024;

struct Barrier {
    u32 expected, pending, phase;
    long bytes;

    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = expected;
    }
    void arrive() {
        require(pending > 0, "more arrivals at a barrier than it counts");
        --pending;
        settle();
    }
};

// Threads that wait for each other, and what each of them shows the others.
struct Meeting {
    u32 size = 0, arrived = 0, turn = 0;
    u32 shown[2][32] = {};
};

struct Block {
    u32 rank, index;
    std::vector<u8> shared;
    std::map<u32, Barrier> barriers;
    std::map<int, Meeting> meetings;  // warpgroups by index, warps by 100 + index

    u8* at(u32 address, u32 bytes) {
        require(address >= BASE && address + bytes <= shared.size(), "an access outside shared memory");
        return shared.data() + address;
    }
    Barrier& barrier(u32 address) {
        require(address % 8 == 0 && barriers.count(address), "a barrier that was not initialised");
        return barriers.at(address);
    }
};

struct Product {
    int* sums;
    std::function<void(int*)> run;
};

struct Fiber {
    ucontext_t context;
    Block* block;
    u32 thread;
    std::function<bool()> ready;
    bool done = false;
    std::vector<std::vector<Product>> committed;
    std::vector<Product> issued;
};

// A box of a tensor of bytes of three dimensions (planes, rows, bytes), as cuTensorMapEncodeTiled would describe it.
struct Box {
    const u8* data;
    int planes, rows, bytes;
    long plane_pitch, row_pitch;
    int box_rows, box_bytes;  // box_bytes is the swizzle's span: 128 or 64
};

struct Copy {
    Block* target;
    u32 address, barrier, bytes;
    std::function<void(u8*)> fill;  // the bytes, unswizzled
    int span;                       // of the swizzle; 0: none
};

inline Fiber* current;
inline ucontext_t scheduler;
inline std::vector<Block*> cluster;
inline Meeting everyone;
inline std::vector<Copy> copies;
inline std::mt19937 chance;
inline bool late_products, eager_copies;
inline u32 grid;
inline std::function<void()> kernel;  // what every thread runs

// The swizzles act on absolute addresses: bits 4-6 take bits 7-9 (128 bytes), bits 4-5 take bits 7-8 (64 bytes).
inline u32 swizzled(u32 address, int span) {
    if (span == 0) return address;
    return address ^ ((address >> 7 & (span / 16 - 1)) << 4);
}

inline void land(const Copy& copy) {
    std::vector<u8> bytes(copy.bytes);
    copy.fill(bytes.data());
    for (u32 i = 0; i < copy.bytes; ++i) *copy.target->at(swizzled(copy.address + i, copy.span), 1) = bytes[i];
    Barrier& barrier = copy.target->barrier(copy.barrier);
    barrier.bytes -= copy.bytes;
    barrier.settle();
}

inline void start(Copy copy) {
    require(copy.address % (copy.span ? 1024 : 16) == 0, "a copy to an address that is not aligned to its swizzle");
    if (eager_copies) return land(copy);
    copies.push_back(std::move(copy));
}

inline void wait_until(std::function<bool()> ready) {
    if (ready()) return;
    current->ready = std::move(ready);
    swapcontext(&current->context, &scheduler);
}

inline void meet(Meeting& meeting, u32 size) {
    meeting.size = size;
    const u32 turn = meeting.turn;
    if (++meeting.arrived == size) {
        meeting.arrived = 0;
        ++meeting.turn;
    }
    wait_until([&meeting, turn] { return meeting.turn != turn; });
}

// What lane `from` of this warp shows, every lane showing `value`.
inline const u32* exchange(u32 value) {
    Meeting& warp = current->block->meetings[100 + current->thread / 32];
    u32* shown = warp.shown[warp.turn % 2];
    shown[current->thread % 32] = value;
    meet(warp, 32);
    return shown;
}

inline void issue(int* sums, std::function<void(int*)> run) {
    if (!late_products) return run(sums);
    current->issued.push_back({sums, std::move(run)});
}

inline void retire(std::size_t pending) {
    auto& groups = current->committed;
    while (groups.size() > pending) {
        for (Product& product : groups.front()) product.run(product.sums);
        groups.erase(groups.begin());
    }
}

inline void enter() {
    kernel();
    current->done = true;
    require(current->committed.empty() && current->issued.empty(), "products that nobody waited for");
    swapcontext(&current->context, &scheduler);
}

inline void step(Fiber& fiber) {
    fiber.ready = nullptr;
    current = &fiber;
    swapcontext(&scheduler, &fiber.context);
}

// Run one cluster of `size` blocks of `threads` threads.
inline void run_cluster(u32 first_block, u32 size, u32 threads, u32 shared_bytes) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    cluster.clear();
    everyone = {};
    u8* stacks = static_cast<u8*>(mmap(nullptr, size * threads * STACK, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    require(stacks != MAP_FAILED, "no memory for the threads' stacks");
    for (u32 rank = 0; rank < size; ++rank) {
        blocks.push_back(std::make_unique<Block>());
        *blocks.back() = {rank, first_block + rank, std::vector<u8>(BASE + shared_bytes, 0xA5), {}, {}};
        cluster.push_back(blocks.back().get());
        for (u32 thread = 0; thread < threads; ++thread) {
            fibers.push_back(std::make_unique<Fiber>());
            Fiber& fiber = *fibers.back();
            fiber.block = cluster.back();
            fiber.thread = thread;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = stacks + (rank * threads + thread) * STACK;
            fiber.context.uc_stack.ss_size = STACK;
            makecontext(&fiber.context, enter, 0);
        }
    }
    for (std::size_t left = fibers.size(); left > 0;) {
        bool moved = false;
        const std::size_t offset = chance() % fibers.size(), stride = chance() % 2 ? 1 : fibers.size() - 1;
        for (std::size_t i = 0; i < fibers.size(); ++i) {
            Fiber& fiber = *fibers[(offset + i * stride) % fibers.size()];
            if (fiber.done || (fiber.ready && !fiber.ready())) continue;
            moved = true;
            if (chance() % 4 == 0) continue;  // this one is slow today
            step(fiber);
            left -= fiber.done;
        }
        if (!copies.empty() && (!moved || chance() % 2)) {
            const std::size_t chosen = chance() % copies.size();
            const Copy copy = copies[chosen];
            copies.erase(copies.begin() + chosen);
            land(copy);
            moved = true;
        }
        require(moved, "a deadlock");
    }
    require(copies.empty(), "copies still under way when the cluster ended");
    for (Block* block : cluster) {
        for (auto& [address, barrier] : block->barriers) require(barrier.bytes == 0, "a barrier that expects bytes");
    }
    munmap(stacks, size * threads * STACK);
}

// Memory that ends at a page that may not be touched (up to the alignment), filled with garbage.
inline u8* guarded(std::size_t bytes, std::size_t alignment) {
    const std::size_t page = 4096, whole = (bytes + page - 1) / page * page;
    u8* start = static_cast<u8*>(mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(start != MAP_FAILED, "no memory");
    mprotect(start + whole, page, PROT_NONE);
    std::memset(start, 0xCD, whole);
    return start + (whole - bytes) / alignment * alignment;
}

inline void read_all(void* target, std::size_t bytes) {
    require(std::fread(target, 1, bytes, stdin) == bytes, "the input ends early");
}
template <typename T>
T* read_guarded(std::size_t count) {
    T* made = reinterpret_cast<T*>(guarded(count * sizeof(T), sizeof(T)));
    read_all(made, count * sizeof(T));
    return made;
}

}  // namespace model
