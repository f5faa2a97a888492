// The products of AVX2 alone. vpmaddubsw adds the products of two pairs of bytes in 16 bits and saturates: with v below
// 16 and |a| <= 128 it gives at most 3840, so that eight of them, a block, still fit; 8-bit weights are multiplied as
// 16-bit integers by vpmaddwd instead, which is always exact.
#include "vectors.h"

#define BQ_SPACE avx2

namespace bq::avx2 {
namespace {

constexpr bool kSplits = true;  // 1-bit weights times 8 bits are looked up: fewer operations than byte products

template <int Bits>
struct Dots {  // 1, 2 and 4 bits
    static constexpr int kSteps = 8;
    static constexpr int kRows = 4;
    static constexpr int kTiles = 2;
    static constexpr int kChains = 1;
    static constexpr bool kByLane = false;
    static constexpr int32_t kShift = 0;
    using Sum = I32;
    struct Part {
        __m256i sums;
    };

    static I32 field(const uint8_t *words, int step) { return field_of<Bits>(words, step); }
    static void add(Sum &, Part &part, I32 v, I32 a) {
        add_shorts(part.sums, _mm256_maddubs_epi16((__m256i)v, (__m256i)a));
    }
    static void fold(Sum &sum, const Part &part) {
        sum += (I32)_mm256_madd_epi16(part.sums, _mm256_set1_epi16(1));
    }
    static I32 total(const Sum &sum) { return sum; }
};

template <>
struct Dots<8> {
    static constexpr int kSteps = 16;
    static constexpr int kRows = 4;
    static constexpr int kTiles = 2;
    static constexpr int kChains = 1;
    static constexpr bool kByLane = false;
    static constexpr int32_t kShift = 0;
    using Sum = I32;
    struct Part {};

    // The even bytes of a word, then the odd ones, in 16 bits.
    static I32 field(const uint8_t *words, int step) {
        const U16 word = load<U16>(words + step / 2 * kBytes);
        return (I32)(step % 2 == 0 ? word & 0xff : word >> 8);
    }
    static void add(Sum &sum, Part &, I32 v, I32 a) { add_words(sum, _mm256_madd_epi16((__m256i)v, (__m256i)a)); }
    static void fold(Sum &, const Part &) {}
    static I32 total(const Sum &sum) { return sum; }
};

}  // namespace
}  // namespace bq::avx2

#include "../lanes/products.inl"
