// Runs a CUDA kernel on the CPU: one fiber per CUDA thread, switched only where threads wait for each other.
//
// Checked besides what the sanitizers check: every access to shared memory lies inside the block's allocation and is
// aligned; no two threads touch a word, one of them writing, without a barrier in between; nothing touches a word
// that an asynchronous copy has under way (it holds garbage until the copying thread waits, which is the latest the
// hardware may deliver it); the lanes of a warp meet in the same instruction; no barrier waits for ever. Which
// thread runs next is drawn at random from a seed.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

// Keeps the callee-saved registers on this stack, its pointer in *from, and goes on where the stack `to` was left.
// (swapcontext would do, but calls the system twice, and the sanitizer clears a whole stack at each.)
extern "C" void emulator_switch(void** from, void* to);
#if defined(__x86_64__)
constexpr int SAVED_WORDS = 6;
asm(R"(
.text
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the emulator can switch stacks on x86-64 only"
#endif

namespace emulator {

constexpr int MANY = -2, NONE = -1, LANES = 32;
constexpr std::size_t STACK_BYTES = 128 * 1024;

[[noreturn]] inline void fail(const char* what, long where = 0) {
  std::fprintf(stderr, "emulator: %s (%ld)\n", what, where);
  std::_Exit(3);  // at once: this may be the stack of a fiber
}

// Threads that meet: a block or a warp.
struct Meeting {
  int members = 0, arrived = 0, generation = 0;
  const char* instruction = nullptr;
  std::vector<int> waiting;
};

struct Copy {
  std::uint32_t shared;
  const void* global;
  int bytes;
};

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  bool done = false;
  std::vector<Copy> open;                // copies not committed yet
  std::deque<std::vector<Copy>> groups;  // committed groups, oldest first
};

// Who touched a word of shared memory last. Epochs count the barriers of the block and of the warp.
struct Access {
  int block_epoch = NONE, warp_epoch = 0, warp = NONE, thread = NONE;
};
struct Word {
  Access read, write;
  bool in_flight = false;
};

struct Registers {
  std::uint32_t a[4], b[2];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<int> ready;
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<std::vector<Registers>> exchanged[2];  // by parity of the meeting: no second meeting before reuse
  std::unique_ptr<std::uint8_t[]> shared;
  std::uint32_t shared_bytes = 0;
  std::vector<Word> words;
  void* scheduler = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  std::function<void()> kernel;
  std::mt19937 random;
};

inline Block* block = nullptr;
inline int running = 0;
struct Index {
  unsigned x, y, z;
};
inline Index block_index{};

inline Index thread_index() { return {static_cast<unsigned>(running), 0, 0}; }

inline void switch_to_scheduler() {
  Thread& self = block->threads[running];
  __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake_stack, block->scheduler_stack,
                                 block->scheduler_stack_bytes);
  emulator_switch(&self.stack_pointer, block->scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

inline void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
  block->kernel();
  Thread& self = block->threads[running];
  for (const auto& group : self.groups) {
    if (!group.empty()) fail("a thread ended without waiting for its copies", running);
  }
  if (!self.open.empty()) fail("a thread ended with copies it did not commit", running);
  self.done = true;
  switch_to_scheduler();
}

// Returns once all members have arrived; the number of the meeting.
inline int meet(Meeting& meeting, const char* instruction) {
  if (meeting.arrived == 0) meeting.instruction = instruction;
  if (std::strcmp(meeting.instruction, instruction) != 0) fail("threads meet in different instructions", running);
  const int generation = meeting.generation;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.generation;
    block->ready.insert(block->ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  } else {
    meeting.waiting.push_back(running);
    while (meeting.generation == generation) switch_to_scheduler();
  }
  return generation;
}

inline Meeting& own_warp() { return block->warps[running / LANES]; }

// Everybody in the warp gives its registers and sees everybody's.
inline const std::vector<Registers>& exchange(const Registers& mine, const char* instruction) {
  const int warp = running / LANES, parity = own_warp().generation % 2;
  block->exchanged[parity][warp][running % LANES] = mine;
  meet(own_warp(), instruction);
  return block->exchanged[parity][warp];
}

inline Access here() { return {block->all.generation, own_warp().generation, running / LANES, running}; }

// Whether an earlier access is ordered before one made here and now by this thread.
inline bool ordered(const Access& before, const Access& now) {
  if (before.block_epoch != now.block_epoch) return true;
  return before.warp == now.warp && (before.warp_epoch != now.warp_epoch || before.thread == now.thread);
}

inline void check(std::uint32_t shared, int bytes, bool writes) {
  if (shared % bytes != 0) fail("misaligned access to shared memory", shared);
  if (shared + bytes > block->shared_bytes) fail("access beyond the shared memory of the block", shared);
  const Access now = here();
  for (std::uint32_t at = shared / 4; at <= (shared + bytes - 1) / 4; ++at) {
    Word& word = block->words[at];
    if (word.in_flight) fail("access to shared memory that a copy has under way", shared);
    if (!ordered(word.write, now)) fail(writes ? "write after write" : "read after write", shared);
    if (writes) {
      if (!ordered(word.read, now)) fail("write after read", shared);
      word.write = now;
    } else if (word.read.block_epoch != now.block_epoch) {
      word.read = now;
    } else if (word.read.warp != now.warp) {
      word.read.warp = MANY;
    } else if (word.read.warp_epoch != now.warp_epoch) {
      word.read = now;
    } else if (word.read.thread != now.thread) {
      word.read.thread = MANY;
    }
  }
}

template <typename T>
T load(std::uint32_t shared) {
  T value;
  check(shared, sizeof(T), false);
  std::memcpy(&value, block->shared.get() + shared, sizeof(T));
  return value;
}
template <typename T>
void store(std::uint32_t shared, const T& value) {
  check(shared, sizeof(T), true);
  std::memcpy(block->shared.get() + shared, &value, sizeof(T));
}

inline void start_copy(std::uint32_t shared, const void* global, int bytes) {
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0) fail("a copy from an address that is no multiple of 16");
  if (bytes < 0 || bytes > 16) fail("a copy of more than 16 bytes", bytes);
  check(shared, 16, true);
  std::memset(block->shared.get() + shared, 0xA5, 16);
  for (int i = 0; i < 4; ++i) block->words[shared / 4 + i].in_flight = true;
  block->threads[running].open.push_back({shared, global, bytes});
}
inline void commit_copies() {
  Thread& self = block->threads[running];
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
inline void wait_copies(std::size_t pending) {
  Thread& self = block->threads[running];
  while (self.groups.size() > pending) {
    for (const Copy& copy : self.groups.front()) {
      std::memset(block->shared.get() + copy.shared, 0, 16);
      if (copy.bytes) std::memcpy(block->shared.get() + copy.shared, copy.global, copy.bytes);
      for (int i = 0; i < 4; ++i) {
        block->words[copy.shared / 4 + i].in_flight = false;
        block->words[copy.shared / 4 + i].write = here();
      }
    }
    self.groups.pop_front();
  }
}

// The stack of thread i, kept from block to block.
inline char* stack_of(std::size_t i) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= i) stacks.push_back(std::make_unique<char[]>(STACK_BYTES));
  __asan_unpoison_memory_region(stacks[i].get(), STACK_BYTES);  // the last thread never left its outermost frame
  return stacks[i].get();
}

// Runs one block of `threads` threads with so many bytes of dynamic shared memory, which begin as garbage.
inline void run_block(unsigned index, int threads, std::uint32_t shared_bytes, unsigned seed,
                      const std::function<void()>& kernel) {
  Block made;
  block = &made;
  block_index = {index, 0, 0};
  made.kernel = kernel;
  made.random.seed(seed + index);
  made.threads.resize(threads);
  made.all.members = threads;
  made.warps.resize(threads / LANES);
  for (Meeting& warp : made.warps) warp.members = LANES;
  for (auto& slot : made.exchanged) slot.assign(threads / LANES, std::vector<Registers>(LANES));
  made.shared_bytes = shared_bytes;
  made.shared = std::make_unique<std::uint8_t[]>(shared_bytes);
  std::memset(made.shared.get(), 0x5A, shared_bytes);
  made.words.resize((shared_bytes + 3) / 4);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = made.threads[i];
    thread.stack = stack_of(i);
    void** top = reinterpret_cast<void**>(thread.stack + STACK_BYTES) - 2;  // a multiple of 16, as a call leaves it
    top[0] = reinterpret_cast<void*>(enter);
    thread.stack_pointer = top - SAVED_WORDS;
    made.ready.push_back(i);
  }
  while (!made.ready.empty()) {
    std::swap(made.ready[made.random() % made.ready.size()], made.ready.back());
    running = made.ready.back();
    made.ready.pop_back();
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, made.threads[running].stack, STACK_BYTES);
    emulator_switch(&made.scheduler, made.threads[running].stack_pointer);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }
  for (int i = 0; i < threads; ++i) {
    if (!made.threads[i].done) fail("a thread waits for ever", i);
  }
}

}  // namespace emulator
