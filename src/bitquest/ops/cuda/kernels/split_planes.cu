// Packed 2-bit codes, four a byte, to two planes of bits: plane 0 the low bits, plane 1 the high ones.
//
// packed: `rows` rows of `row_bytes` bytes, `packed_pitch` apart. planes: two times `rows` rows, `plane_pitch` bytes
// apart, a multiple of 8 as their address is; each row is written whole, zeros behind the codes. A thread makes 8 bytes
// of either plane from 16 bytes of codes.
#include <hopper_ptx.cuh>

// The even bits of 64, side by side.
DEVICE u64 even_bits(u64 bits) {
    bits &= 0x5555555555555555ull;
    bits = (bits | bits >> 1) & 0x3333333333333333ull;
    bits = (bits | bits >> 2) & 0x0f0f0f0f0f0f0f0full;
    bits = (bits | bits >> 4) & 0x00ff00ff00ff00ffull;
    bits = (bits | bits >> 8) & 0x0000ffff0000ffffull;
    return (bits | bits >> 16) & 0x00000000ffffffffull;
}

struct alignas(16) Codes {
    u64 low, high;
};

KERNEL(256, 1)
split_planes(const u8* packed, u8* planes, int rows, int row_bytes, long long packed_pitch, long long plane_pitch) {
    const u32 chunks = static_cast<u32>(plane_pitch / 8), all = rows * chunks;  // 16 bytes each: fewer than 2^32
    const bool aligned = packed_pitch % 16 == 0 && reinterpret_cast<u64>(packed) % 16 == 0;
    for (u32 i = BLOCK_INDEX * 256 + THREAD_INDEX; i < all; i += GRID_SIZE * 256) {
        const u32 row = i / chunks, chunk = i % chunks;
        const u8* source = packed + row * packed_pitch + 16ll * chunk;
        const int inside = row_bytes - 16 * static_cast<int>(chunk);
        u64 low = 0, high = 0;
        if (aligned && inside >= 16) {
            const Codes codes = *reinterpret_cast<const Codes*>(source);
            low = codes.low;
            high = codes.high;
        } else {
            NO_UNROLL for (int byte = 0; byte < 8 && byte < inside; ++byte) {
                low |= static_cast<u64>(source[byte]) << 8 * byte;
            }
            NO_UNROLL for (int byte = 8; byte < 16 && byte < inside; ++byte) {
                high |= static_cast<u64>(source[byte]) << 8 * (byte - 8);
            }
        }
        u64* target = reinterpret_cast<u64*>(planes + row * plane_pitch) + chunk;
        target[0] = even_bits(low) | even_bits(high) << 32;
        target[static_cast<u64>(rows) * chunks] = even_bits(low >> 1) | even_bits(high >> 1) << 32;
    }
}
