// A register of floats by the vector extension of GCC and Clang: one source that becomes SSE2, AVX2 or NEON. Every
// operation is one of the C++ language on each lane, rounded as there.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX2__)
constexpr int kWide = 8;
#else
constexpr int kWide = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWide)));
typedef int32_t Integers __attribute__((vector_size(4 * kWide)));

inline Floats load(const float *from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(float *to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline Floats all(float value) { return Floats{} + value; }

inline Integers as_integers(Floats x) {
    Integers bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline Floats as_floats(Integers x) {
    Floats value;
    std::memcpy(&value, &x, sizeof value);
    return value;
}

// Where `choice` is all ones a, else b.
inline Floats choose(Integers choice, Floats a, Floats b) {
    return as_floats((choice & as_integers(a)) | (~choice & as_integers(b)));
}

inline Integers larger(Integers a, Integers b) {
    const Integers choice = a > b;
    return (choice & a) | (~choice & b);
}

inline Floats magnitude(Floats x) { return as_floats(as_integers(x) & 0x7fffffff); }

// x ± its neighbour at lane distance 1, 2 or (eight lanes) 4: lanes with that bit clear get the sum, the others the
// difference.
template <int Distance>
inline Floats butterfly(Floats x) {
    static_assert(Distance < kWide, "within a register");
    Floats sign;
    for (int i = 0; i < kWide; ++i) sign[i] = (i & Distance) != 0 ? -1.0f : 1.0f;
#if !defined(__clang__)
    Integers order;
    for (int i = 0; i < kWide; ++i) order[i] = i ^ Distance;
    const Floats swapped = __builtin_shuffle(x, order);
#elif defined(__AVX2__)
    constexpr int d = Distance;
    const Floats swapped = __builtin_shufflevector(x, x, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d, 4 ^ d, 5 ^ d, 6 ^ d, 7 ^ d);
#else
    constexpr int d = Distance;
    const Floats swapped = __builtin_shufflevector(x, x, 0 ^ d, 1 ^ d, 2 ^ d, 3 ^ d);
#endif
    return x * sign + swapped;
}

// Lanes of four registers, each 0 to 255, as bytes.
constexpr int kBytes = 4 * kWide;

inline void store_bytes(uint8_t *to, const Integers (&x)[4]) {
#if defined(__AVX2__)
    __m256i part[4];
    std::memcpy(part, x, sizeof part);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(part[0], part[1]), _mm256_packs_epi32(part[2], part[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_permutevar8x32_epi32(bytes, order));
#elif defined(__SSE2__)
    __m128i part[4];
    std::memcpy(part, x, sizeof part);
    const __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(part[0], part[1]), _mm_packs_epi32(part[2], part[3]));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), bytes);
#elif defined(__aarch64__)
    uint32x4_t part[4];
    std::memcpy(part, x, sizeof part);
    const uint16x8_t low = vcombine_u16(vmovn_u32(part[0]), vmovn_u32(part[1]));
    const uint16x8_t high = vcombine_u16(vmovn_u32(part[2]), vmovn_u32(part[3]));
    vst1q_u8(to, vcombine_u8(vmovn_u16(low), vmovn_u16(high)));
#else
    for (int i = 0; i < kBytes; ++i) to[i] = static_cast<uint8_t>(x[i / kWide][i % kWide]);
#endif
}

}  // namespace
