// Packed codes to values, 64 at a time: bytes are spread to eight codes a 64-bit lane, bits picked out of each lane.
#include "rows_avx512.h"

namespace bq::avx512 {
namespace {

constexpr int64_t kCodes = 64;

struct Unpacker {
    __m512i spread;  // byte i of lane L is byte L * bits + i
    __m512i pick;    // byte j of a lane begins at its bit j * bits
    __m512i mask;
    int bits;

    explicit Unpacker(int width) : bits(width) {
        alignas(64) uint8_t at[64];
        alignas(64) uint8_t from[64];
        for (int i = 0; i < 64; ++i) {
            at[i] = static_cast<uint8_t>(i % 8 < bits ? i / 8 * bits + i % 8 : 0);
            from[i] = static_cast<uint8_t>(i % 8 * bits);
        }
        spread = _mm512_load_si512(at);
        pick = _mm512_load_si512(from);
        mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    }

    // u of 64 codes, of which `left` bytes are there.
    __m512i operator()(const uint8_t *from, int64_t left) const {
        const int64_t wanted = 8 * bits < left ? 8 * bits : left;
        const __mmask64 bytes = wanted >= 64 ? ~0ull : (1ull << wanted) - 1;
        const __m512i packed = _mm512_maskz_loadu_epi8(bytes, from);
        if (bits == 8) return packed;
        return _mm512_and_si512(_mm512_multishift_epi64_epi8(pick, _mm512_permutexvar_epi8(spread, packed)), mask);
    }
};

// The level of each u.
struct Levels {
    const float *table;
    __m512 few;      // up to 16 of them
    bool in_register;
    bool uniform;    // the first, and one more each: then it is computed
    __m512 first;

    Levels(const float *levels, int bits) : table(levels), in_register(bits <= 4), uniform(true) {
        const int count = 1 << bits;
        few = _mm512_maskz_loadu_ps(first_lanes(count), levels);
        first = _mm512_set1_ps(levels[0]);
        for (int i = 0; i < count; ++i) uniform = uniform && levels[i] == levels[0] + static_cast<float>(i);
    }

    __m512 operator()(__m512i u) const {
        if (in_register) return _mm512_permutexvar_ps(u, few);
        if (uniform) return _mm512_add_ps(_mm512_cvtepi32_ps(u), first);
        return _mm512_i32gather_ps(u, table, 4);
    }
};

template <int32_t To>
void dequantize_row(const Unpacker &unpack, const Levels &levels, const uint8_t *from, const float *steps, int64_t group,
                    int64_t width, void *out, int64_t at) {
    const int64_t bytes = (width * unpack.bits + 7) / 8;
    const bool one_step = group == width;
    const __m512 whole = _mm512_set1_ps(steps[0]);
    for (int64_t k = 0; k < width; k += kCodes) {
        const int64_t begin = k * unpack.bits / 8;
        const __m512i u = unpack(from + begin, bytes - begin);
        const __m128i quarter[4] = {_mm512_castsi512_si128(u), _mm512_extracti32x4_epi32(u, 1),
                                    _mm512_extracti32x4_epi32(u, 2), _mm512_extracti32x4_epi32(u, 3)};
        for (int i = 0; i < 4; ++i) {
            const int64_t here = k + i * kLanes;
            if (here >= width) break;
            const __m512 step = one_step ? whole : _mm512_set1_ps(steps[here / group]);
            const __m512 value = _mm512_mul_ps(levels(_mm512_cvtepu8_epi32(quarter[i])), step);
            store<To>(out, at + here, first_lanes(width - here), value);
        }
    }
}

}  // namespace

int32_t dequantize_rows(const uint8_t *packed, int32_t bits, const float *levels, const float *step, int64_t groups,
                        int64_t rows, int64_t width, void *out, int32_t out_dtype, int32_t threads) {
    const int64_t group = width / groups;
    if (groups != 1 && group % kLanes != 0) return BQ_UNSUPPORTED;
    const int64_t bytes = (width * bits + 7) / 8;
    const Unpacker unpack(bits);
    const Levels level(levels, bits);
    auto share = [&](int64_t begin, int64_t end, int) {
        with_dtype(out_dtype, [&](auto to) {
            for (int64_t t = begin; t < end; ++t) {
                dequantize_row<to.value>(unpack, level, packed + t * bytes, step + t * groups, group, width, out,
                                         t * width);
            }
        });
    };
    parallel_for(threads, rows, 1, share);
    return BQ_OK;
}

}  // namespace bq::avx512
