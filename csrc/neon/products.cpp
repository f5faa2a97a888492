// The products of the NEON that every 64-bit Arm has: 16-bit products of signed bytes. With v below 16 and |a| <= 128
// eight of them, a block, fit the 16 bits that they are added in; of 8-bit weights, each is added to 32 bits at once.
#include "vectors.h"

#define BQ_SPACE neon

namespace bq::neon {
namespace {

struct TwoSums {  // of channels 0 and 1, and 2 and 3: two lanes each
    int32x4_t first, second;
};

constexpr bool kSplits = true;  // 1-bit weights times 8 bits are looked up: fewer operations than byte products

template <int Bits>
struct Dots {  // 1, 2 and 4 bits
    static constexpr int kSteps = 8;
    static constexpr int kRows = 4;
    static constexpr int kTiles = 2;
    static constexpr int kChains = 1;
    static constexpr bool kByLane = false;
    static constexpr int32_t kShift = 0;
    using Sum = TwoSums;
    struct Part {
        int16x8_t first, second;
    };

    static I32 field(const uint8_t *words, int step) { return field_of<Bits>(words, step); }
    static void add(Sum &, Part &part, I32 v, I32 a) {
        part.first = vmlal_s8(part.first, vget_low_s8((int8x16_t)v), vget_low_s8((int8x16_t)a));
        part.second = vmlal_high_s8(part.second, (int8x16_t)v, (int8x16_t)a);
    }
    static void fold(Sum &sum, const Part &part) {
        sum.first = vpadalq_s16(sum.first, part.first);
        sum.second = vpadalq_s16(sum.second, part.second);
    }
    static I32 total(const Sum &sum) { return (I32)vpaddq_s32(sum.first, sum.second); }
};

template <>
struct Dots<8> {
    static constexpr int kSteps = 8;
    static constexpr int kRows = 4;
    static constexpr int kTiles = 2;
    static constexpr int kChains = 1;
    static constexpr bool kByLane = false;
    static constexpr int32_t kShift = 128;
    using Sum = TwoSums;
    struct Part {};

    static I32 field(const uint8_t *words, int step) { return signed_field_of<8>(words, step); }
    static void add(Sum &sum, Part &, I32 v, I32 a) {
        sum.first = vpadalq_s16(sum.first, vmull_s8(vget_low_s8((int8x16_t)v), vget_low_s8((int8x16_t)a)));
        sum.second = vpadalq_s16(sum.second, vmull_high_s8((int8x16_t)v, (int8x16_t)a));
    }
    static void fold(Sum &, const Part &) {}
    static I32 total(const Sum &sum) { return (I32)vpaddq_s32(sum.first, sum.second); }
};

}  // namespace
}  // namespace bq::neon

#include "../lanes/products.inl"
