// The products of NEON with dot products (Armv8.2, Cortex-A55 and A76, Apple M1): sdot adds four products of signed
// bytes to 32-bit sums.
#include "../neon/vectors.h"

#define BQ_SPACE neondot

namespace bq::neondot {
namespace {

template <int Bits>
struct Dots {
    static constexpr int kSteps = 8;
    static constexpr int kRows = 12;
    static constexpr int kTiles = 2;
    static constexpr int kChains = 8;
    static constexpr int32_t kShift = Bits == 8 ? 128 : 0;
    using Sum = I32;
    struct Part {};

    static I32 field(const uint8_t *words, int step) { return signed_field_of<Bits>(words, step); }
    static void add(Sum &sum, Part &, I32 v, I32 a) {
        sum = (I32)vdotq_s32((int32x4_t)sum, (int8x16_t)v, (int8x16_t)a);
    }
    static void fold(Sum &, const Part &) {}
    static I32 total(const Sum &sum) { return sum; }
};

}  // namespace
}  // namespace bq::neondot

#include "../lanes/products.inl"
