// The products of AVX2 with AVX-VNNI: vpdpbusd adds four products of bytes to 32-bit sums, exactly.
#include "../avx2/vectors.h"

#define BQ_SPACE avxvnni

namespace bq::avxvnni {
namespace {

constexpr bool kSplits = true;  // 1-bit weights times 8 bits are looked up: fewer operations than byte products

template <int Bits>
struct Dots {
    static constexpr int kSteps = 8;
    static constexpr int kRows = 6;
    static constexpr int kTiles = 2;
    static constexpr int kChains = 8;  // a result waits for 4 or 5 cycles, and two begin in each
    static constexpr bool kByLane = false;
    static constexpr int32_t kShift = 0;
    using Sum = I32;
    struct Part {};

    static I32 field(const uint8_t *words, int step) { return field_of<Bits>(words, step); }
    // In assembly because GCC 12 otherwise copies the sums back and forth.
    static void add(Sum &sum, Part &, I32 v, I32 a) { asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(v), "x"(a)); }
    static void fold(Sum &, const Part &) {}
    static I32 total(const Sum &sum) { return sum; }
};

}  // namespace
}  // namespace bq::avxvnni

#include "../lanes/products.inl"
