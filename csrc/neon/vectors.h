// The vectors of 64-bit Arm, and what csrc/lanes asks of them beyond the operators of the language.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-schedule-insns")  // which runs GCC 12 out of registers in these kernels; processors reorder
#endif

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 4;     // of 32 bits
constexpr int kBytes = 16;
constexpr int kBitsRows = 8;  // rows of a register tile of products of bits

typedef int32_t I32 __attribute__((vector_size(kBytes)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));
typedef float F32 __attribute__((vector_size(kBytes)));
typedef uint16_t U16 __attribute__((vector_size(kBytes)));
typedef uint8_t U8 __attribute__((vector_size(kBytes)));

template <class V>
inline V load(const void *from) {
    V x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class V>
inline void store(void *to, V x) {
    std::memcpy(to, &x, sizeof x);
}

// sum += x. In assembly because GCC 12 otherwise adds many of them to each other first, and runs out of registers.
inline void add_bytes(U8 &sum, U8 x) { asm("add %0.16b, %0.16b, %1.16b" : "+w"(sum) : "w"(x)); }

inline I32 splat(const int32_t *word) { return (I32)vdupq_n_s32(*word); }

// Sixteen bytes; and the one of them that each byte of `index`, below 16, chooses.
inline U8 table16(const uint8_t *table) { return (U8)vld1q_u8(table); }

inline U8 lookup(U8 table, U8 index) { return (U8)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index); }

// Every bit of a vector counted within its byte.
inline U8 count_bits(U8 x) { return (U8)vcntq_u8((uint8x16_t)x); }

// sums += bytes, in an order that only `spread` knows.
inline void widen(U16 (&sums)[2], U8 bytes) {
    sums[0] = (U16)vaddw_u8((uint16x8_t)sums[0], vget_low_u8((uint8x16_t)bytes));
    sums[1] = (U16)vaddw_high_u8((uint16x8_t)sums[1], (uint8x16_t)bytes);
}

// words = sums << Shift, in order; more of them: words += …
template <int Shift>
inline void spread(const U16 (&sums)[2], int32_t *words, bool first) {
    for (int i = 0; i < 4; ++i) {  // four channels each
        const auto eight = (uint16x8_t)sums[i / 2];
        const I32 wide = (I32)(i % 2 == 0 ? vmovl_u16(vget_low_u16(eight)) : vmovl_high_u16(eight)) << Shift;
        store(words + 4 * i, first ? wide : load<I32>(words + 4 * i) + wide);
    }
}

// 32 bytes in another order, as eight words.
struct Reorder {
    uint8x16_t order[2];

    explicit Reorder(const uint8_t (&from)[32]) : order{vld1q_u8(from), vld1q_u8(from + 16)} {}

    void block(const int8_t *from, int32_t *words) const {
        const auto *bytes = reinterpret_cast<const uint8_t *>(from);
        const uint8x16x2_t all = {{vld1q_u8(bytes), vld1q_u8(bytes + 16)}};
        for (int i = 0; i < 2; ++i) store(words + 4 * i, vqtbl2q_u8(all, order[i]));
    }
};

inline void narrow(U32 x, uint16_t *to) { vst1_u16(to, vmovn_u32((uint32x4_t)x)); }  // below 2^16

inline void to_halves(F32 x, uint16_t *to) {
    const float16x4_t halves = vcvt_f16_f32((float32x4_t)x);
    std::memcpy(to, &halves, sizeof halves);
}

// Field `step` of the words of a block, as unsigned bytes: see "quads" in layout.h.
template <int Bits>
inline I32 field_of(const uint8_t *words, int step) {
    constexpr int kFields = 8 / Bits;
    constexpr uint32_t kMask = ((1u << Bits) - 1) * 0x01010101u;
    const U32 word = load<U32>(words + step / kFields * kBytes);
    if constexpr (Bits == 8) return (I32)word;
    return (I32)((word >> (Bits * (step % kFields))) & kMask);
}

// The same for machines that multiply signed bytes only: bytes of 8 bits less 128.
template <int Bits>
inline I32 signed_field_of(const uint8_t *words, int step) {
    if constexpr (Bits == 8) return (I32)(load<U8>(words + step * kBytes) ^ 0x80);
    return field_of<Bits>(words, step);
}

}  // namespace
