#include "thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#include <sched.h>
#endif

namespace bq {
namespace {

constexpr int kMostThreads = 256;
// How long a worker looks for the next job before it sleeps. Long enough to bridge the gap between two layers of a
// decoding step, short enough that an idle process leaves a shared machine alone.
constexpr std::chrono::microseconds kSpin{50};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline void give_way() {
#if defined(_WIN32)
    std::this_thread::yield();
#else
    sched_yield();
#endif
}

struct Job {
    Share share;
    void *context;
    int64_t count;
    int64_t grain;
    int threads;
};

void run_share(const Job &job, int index) {
    const int64_t grains = (job.count + job.grain - 1) / job.grain;
    const int64_t begin = grains * index / job.threads * job.grain;
    int64_t end = grains * (index + 1) / job.threads * job.grain;
    if (end > job.count) end = job.count;
    if (begin < end) job.share(job.context, begin, end, index);
}

struct alignas(64) Slot {
    std::atomic<uint64_t> ticket{0};  // 2·generation: open; 2·generation + 1: taken
};

thread_local bool inside_share = false;

class Pool {
  public:
    // False: another thread of the process is using the pool, and the caller works alone.
    bool run(const Job &job) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) return false;
        hire(job.threads - 1);
        job_ = job;
        pending_.store(job.threads - 1, std::memory_order_relaxed);
        const uint64_t generation = generation_.load(std::memory_order_relaxed) + 1;
        for (int i = 1; i < job.threads; ++i) slots_[i].ticket.store(2 * generation, std::memory_order_release);
        generation_.store(generation, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        inside_share = true;
        run_share(job, 0);
        // What no worker has begun is done here: a worker may be asleep, or its core busy with another program.
        for (int i = 1; i < job.threads; ++i) attempt(i, generation);
        inside_share = false;
        for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins) {
            relax();
            if (spins > 2000) give_way();
        }
        return true;
    }

  private:
    void hire(int wanted) {
        while (hired_ < wanted) {
            try {
                const uint64_t seen = generation_.load(std::memory_order_relaxed);
                std::thread([this, index = hired_ + 1, seen] { work(index, seen); }).detach();
            } catch (const std::system_error &) {
                return;  // no more threads to be had: the caller does their shares
            }
            ++hired_;
        }
    }

    void attempt(int index, uint64_t generation) {
        uint64_t open = 2 * generation;
        // Only an open ticket is taken: until it is done job_ stays as it is, so a late worker never sees a torn job.
        if (slots_[index].ticket.compare_exchange_strong(open, open + 1, std::memory_order_acq_rel)) {
            run_share(job_, index);
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    void work(int index, uint64_t seen) {
        inside_share = true;
        for (;;) {
            uint64_t now = generation_.load(std::memory_order_acquire);
            const auto start = std::chrono::steady_clock::now();
            for (int spins = 1; now == seen; ++spins) {
                relax();
                now = generation_.load(std::memory_order_acquire);
                if (now == seen && spins % 64 == 0 && std::chrono::steady_clock::now() - start > kSpin) break;
            }
            if (now == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleeping_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
                sleeping_.fetch_sub(1, std::memory_order_seq_cst);
                now = generation_.load(std::memory_order_acquire);
            }
            seen = now;
            attempt(index, seen);
        }
    }

    std::mutex owner_;
    Job job_{};
    int hired_ = 0;
    alignas(64) std::atomic<uint64_t> generation_{0};
    alignas(64) std::atomic<int> pending_{0};
    alignas(64) std::atomic<int> sleeping_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
    Slot slots_[kMostThreads];
};

// Never freed: its workers are detached and live as long as the process.
std::atomic<Pool *> the_pool{nullptr};
std::atomic<int> threads_by_default{1};

Pool *pool() {
    Pool *found = the_pool.load(std::memory_order_acquire);
    if (found != nullptr) return found;
    Pool *made = new (std::nothrow) Pool();
    if (made == nullptr) return nullptr;
    if (the_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) {
#if !defined(_WIN32)
        static std::once_flag once;
        // A forked child has no workers, and locks in whatever state they were: it starts with a new pool.
        std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); }); });
#endif
        return made;
    }
    delete made;
    return found;
}

struct Scratch {
    void *memory[kScratchSlots] = {};
    size_t bytes[kScratchSlots] = {};

    ~Scratch() {
        for (void *part : memory) release(part);
    }

    static void release(void *part) {
#if defined(_WIN32)
        _aligned_free(part);
#else
        std::free(part);
#endif
    }
};

thread_local Scratch own_scratch;

}  // namespace

void parallel(int threads, int64_t count, int64_t grain, Share share, void *context) {
    if (count <= 0) return;
    const int64_t grains = (count + grain - 1) / grain;
    if (threads > grains) threads = static_cast<int>(grains);
    if (threads > kMostThreads) threads = kMostThreads;
    const Job job{share, context, count, grain, threads < 1 ? 1 : threads};
    if (job.threads > 1 && !inside_share) {
        Pool *shared = pool();
        if (shared != nullptr && shared->run(job)) return;
    }
    share(context, 0, count, 0);
}

void *scratch(int slot, size_t bytes) {
    Scratch &own = own_scratch;
    if (own.bytes[slot] >= bytes && own.memory[slot] != nullptr) return own.memory[slot];
    const size_t wanted = ((bytes + bytes / 4) + 4095) / 4096 * 4096 + 4096;
    Scratch::release(own.memory[slot]);
    own.bytes[slot] = 0;
#if defined(_WIN32)
    own.memory[slot] = _aligned_malloc(wanted, 64);
#else
    own.memory[slot] = nullptr;
    if (posix_memalign(&own.memory[slot], 64, wanted) != 0) own.memory[slot] = nullptr;
#endif
    if (own.memory[slot] != nullptr) own.bytes[slot] = wanted;
    return own.memory[slot];
}

void set_default_threads(int threads) { threads_by_default.store(threads < 1 ? 1 : threads); }
int default_threads() { return threads_by_default.load(); }

}  // namespace bq
