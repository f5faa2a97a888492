// The products of kernels/wgmma.cuh, by the model: each thread works out its own accumulators from the two matrices that
// the descriptors show, as the PTX ISA lays them out.
#pragma once

#include "hopper_ptx.cuh"

namespace model {

// Byte `byte` of row `row` of the matrix behind a descriptor.
inline u32 place(u64 descriptor, int row, int byte) {
    const int span = descriptor >> 62 == 1 ? 128 : 64;
    require(descriptor >> 62 == 1 || descriptor >> 62 == 2, "a descriptor without a swizzle the model knows");
    const u32 start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    return swizzled(start + row / 8 * stride + row % 8 * span + byte, span);
}
inline void fetch(const Block* block, u64 descriptor, int row, int bytes, u8* target) {
    for (int chunk = 0; chunk < bytes; chunk += 16) {  // the swizzles move chunks of 16 bytes
        std::memcpy(target + chunk, const_cast<Block*>(block)->at(place(descriptor, row, chunk), 16), 16);
    }
}

// Row and column of accumulator i of a thread of a warpgroup.
inline int sum_row(u32 thread, int i) { return 16 * (thread / 32 % 4) + thread % 32 / 4 + 8 * (i / 2 % 2); }
inline int sum_column(u32 thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

}  // namespace model

template <int COUNT>
void bits_product(int (&sums)[COUNT], u64 a, u64 b, u32 keep) {
    const model::Block* block = model::current->block;
    const u32 thread = THREAD_INDEX;
    model::issue(sums, [=](int* target) {
        u64 x[2][4], w[4];
        for (int half = 0; half < 2; ++half) {
            model::fetch(block, a, model::sum_row(thread, 2 * half), 32, reinterpret_cast<u8*>(x[half]));
        }
        for (int column = 0; column < COUNT / 2; ++column) {  // this thread's columns, two neighbours every 8
            const int i = column / 2 * 4 + column % 2;
            model::fetch(block, b, model::sum_column(thread, i), 32, reinterpret_cast<u8*>(w));
            for (int half = 0; half < 2; ++half) {
                int& sum = target[i + 2 * half];
                if (!keep) sum = 0;
                for (int part = 0; part < 4; ++part) sum += __builtin_popcountll(x[half][part] & w[part]);
            }
        }
    });
}

template <int COUNT>
void sparse_product(int (&sums)[COUNT], u64 a, u64 b, u32 places, u32 keep) {
    const model::Block* block = model::current->block;
    const u32 thread = THREAD_INDEX, warp = thread / 32 % 4, lane = thread % 32;
    // Rows 16·warp + lane / 4 (+ 8): both halves of K of the metadata lie in the quad's four registers.
    const u32* quad = model::exchange(places) + lane / 4 * 4;
    const u32 meta[2][2] = {{quad[0], quad[2]}, {quad[1], quad[3]}};  // [row half][half of K]
    const auto indices = std::make_shared<std::vector<u32>>();
    for (int half = 0; half < 2; ++half) indices->insert(indices->end(), meta[half], meta[half] + 2);
    model::issue(sums, [=](int* target) {
        signed char w[2][64] = {}, kept[32], x[64];
        for (int half = 0; half < 2; ++half) {
            model::fetch(block, a, 16 * warp + lane / 4 + 8 * half, 32, reinterpret_cast<u8*>(kept));
            for (int i = 0; i < 32; ++i) {  // two kept of every four along K
                const u32 nibble = (*indices)[2 * half + i / 16] >> 4 * (i / 2 % 8) & 15;
                model::require((nibble & 3) < (nibble >> 2), "metadata that the ISA calls invalid");
                w[half][i / 2 * 4 + (nibble >> 2 * (i % 2) & 3)] = kept[i];
            }
        }
        for (int column = 0; column < COUNT / 2; ++column) {
            const int i = column / 2 * 4 + column % 2;
            model::fetch(block, b, model::sum_column(thread, i), 64, reinterpret_cast<u8*>(x));
            for (int half = 0; half < 2; ++half) {
                int& sum = target[i + 2 * half];
                if (!keep) sum = 0;
                for (int k = 0; k < 64; ++k) sum += w[half][k] * x[k];
            }
        }
    });
}
