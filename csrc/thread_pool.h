// Threads for the kernels: a few persistent workers, static shares, so that any number of them gives the same bits.
//
// Declared without templates of the standard library: this header is compiled once per instruction set, and an inline
// function that two of them share would be linked from whichever came first, with instructions the machine may lack.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bq {

using Share = void (*)(void *context, int64_t begin, int64_t end, int thread);

// Runs `share` over [0, count) in at most `threads` contiguous ranges whose bounds are multiples of `grain`. The caller
// works too, as thread 0, and returns when all are done. threads <= 1, or a call from inside a share: in place.
void parallel(int threads, int64_t count, int64_t grain, Share share, void *context);

// Memory of the calling thread, 64-byte aligned, kept from call to call and grown when needed; one per slot.
// Null when there is no memory. What it holds is undefined at first.
void *scratch(int slot, size_t bytes);
constexpr int kScratchSlots = 4;  // 0 and 1: products; 2 and 3: quantization

void set_default_threads(int threads);
int default_threads();

}  // namespace bq

// for (lambda) in ranges: body(begin, end, thread). The lambda's type is local to its translation unit.
namespace {
template <class Body>
inline void parallel_for(int threads, int64_t count, int64_t grain, Body &body) {
    bq::parallel(
        threads, count, grain,
        [](void *context, int64_t begin, int64_t end, int thread) {
            (*static_cast<Body *>(context))(begin, end, thread);
        },
        &body);
}
}  // namespace
