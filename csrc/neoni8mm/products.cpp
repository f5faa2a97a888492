// The products of NEON with mixed dot products (Armv8.6, Neoverse V1 and N2, Apple M2): usdot adds four products of
// unsigned by signed bytes to 32-bit sums.
#include "../neon/vectors.h"

#define BQ_SPACE neoni8mm

namespace bq::neoni8mm {
namespace {

constexpr bool kSplits = false;  // 1-bit weights times 8 bits are not looked up: byte products are fewer operations

template <int Bits>
struct Dots {
    static constexpr int kSteps = 8;
    static constexpr int kRows = 12;
    static constexpr int kTiles = 2;
    static constexpr int kChains = 8;
    static constexpr bool kByLane = true;
    static constexpr int32_t kShift = 0;
    using Sum = I32;
    struct Part {};

    static I32 field(const uint8_t *words, int step) { return field_of<Bits>(words, step); }
    static void add(Sum &sum, Part &, I32 v, I32 a) {
        sum = (I32)vusdotq_s32((int32x4_t)sum, (uint8x16_t)v, (int8x16_t)a);
    }
    static void add_lane(Sum &sum, Part &, I32 v, I32 a, int lane) {
        const auto s = (int32x4_t)sum;
        const auto x = (uint8x16_t)v;
        const auto y = (int8x16_t)a;
        switch (lane) {  // an operand of the instruction: known when the loops are unrolled
        case 0: sum = (I32)vusdotq_laneq_s32(s, x, y, 0); break;
        case 1: sum = (I32)vusdotq_laneq_s32(s, x, y, 1); break;
        case 2: sum = (I32)vusdotq_laneq_s32(s, x, y, 2); break;
        default: sum = (I32)vusdotq_laneq_s32(s, x, y, 3); break;
        }
    }
    static void fold(Sum &, const Part &) {}
    static I32 total(const Sum &sum) { return sum; }
};

}  // namespace
}  // namespace bq::neoni8mm

#include "../lanes/products.inl"
