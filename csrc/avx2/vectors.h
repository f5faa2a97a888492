// The vectors of AVX2, and what csrc/lanes asks of them beyond the operators of the language.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 8;     // of 32 bits
constexpr int kBytes = 32;
constexpr int kBitsRows = 4;  // rows of a register tile of products of bits

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

// sum += x. In assembly because GCC 12 otherwise adds many products to each other first, and runs out of registers.
inline void add_bytes(U8 &sum, U8 x) { asm("vpaddb %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add_shorts(__m256i &sum, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add_words(I32 &sum, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }

inline I32 splat(const int32_t *word) { return (I32)_mm256_set1_epi32(*word); }

// Sixteen bytes, for every half of a vector; and the one of them that each low half byte of `index` chooses.
inline U8 table16(const uint8_t *table) {
    return (U8)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
}

inline U8 lookup(U8 table, U8 index) { return (U8)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }

// sums += bytes, in an order that only `spread` knows.
inline void widen(U16 (&sums)[2], U8 bytes) {
    const __m256i zero = _mm256_setzero_si256();
    sums[0] += (U16)_mm256_unpacklo_epi8((__m256i)bytes, zero);
    sums[1] += (U16)_mm256_unpackhi_epi8((__m256i)bytes, zero);
}

// words = sums << Shift, in order; more of them: words += …
template <int Shift>
inline void spread(const U16 (&sums)[2], int32_t *words, bool first) {
    for (int i = 0; i < 4; ++i) {  // eight channels each
        const auto pair = (__m256i)sums[i % 2];
        const __m128i eight = i < 2 ? _mm256_castsi256_si128(pair) : _mm256_extracti128_si256(pair, 1);
        const I32 wide = (I32)_mm256_cvtepu16_epi32(eight) << Shift;
        store(words + 8 * i, first ? wide : load<I32>(words + 8 * i) + wide);
    }
}

// 32 bytes in another order, as eight words.
struct Reorder {
    __m256i low, high;  // which bytes come from the first 16, and from the last

    explicit Reorder(const uint8_t (&order)[32]) {
        const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(order));
        const __m256i last = _mm256_cmpgt_epi8(index, _mm256_set1_epi8(15));
        low = _mm256_or_si256(index, last);  // an index of 128 and more gives zero
        high = _mm256_sub_epi8(index, _mm256_set1_epi8(16));  // those of the first 16 become negative
    }

    void block(const int8_t *from, int32_t *words) const {
        const auto *bytes = reinterpret_cast<const uint8_t *>(from);
        const U8 first = lookup(table16(bytes), (U8)low);
        store(words, first | lookup(table16(bytes + 16), (U8)high));
    }
};

inline void narrow(U32 x, uint16_t *to) {  // below 2^16
    const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 8)));
}

inline void to_halves(F32 x, uint16_t *to) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
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

}  // namespace
