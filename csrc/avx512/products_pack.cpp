// Activations in the order in which the product kernels read them. Small beside the product: once per call.
#include <cstring>

#include "products.h"

namespace bq::avx512 {
namespace {

// For two blocks of 32 elements, the element that byte i of the reordered blocks takes; see "quads" in layout.h.
__m512i quad_order(int32_t bits) {
    alignas(64) uint8_t order[64];
    const int fields = 8 / bits;
    for (int i = 0; i < 64; ++i) {
        const int quad = i % 32 / 4;
        order[i] = static_cast<uint8_t>(i / 32 * 32 + quad / fields * (32 / bits) + fields * (i % 4) + quad % fields);
    }
    return _mm512_load_si512(order);
}

__mmask64 first(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// Where row r of a token tile begins, and how far apart its words lie.
struct Place {
    int32_t *words;
    int64_t stride;
    bool real;  // not padding

    Place(const Tiling &tiling, int64_t row, int64_t row_words, int32_t *all) {
        const int64_t tile = row < tiling.full_tiles * tiling.full ? row / tiling.full : tiling.full_tiles;
        const int64_t in_tile = row - tile * tiling.full;
        stride = tiling.height(tile);
        words = all + tile * tiling.full * row_words + in_tile;
        real = in_tile < tiling.count(tile);
    }
};

void scatter(int32_t *to, int64_t stride, __m512i words, int64_t count) {
    if (stride == 1) {
        _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << count) - 1), words);
        return;
    }
    alignas(64) int32_t one[16];
    _mm512_store_si512(one, words);
    for (int64_t i = 0; i < count; ++i) to[i * stride] = one[i];
}

// Bits [at, at + count) of a row, count <= 32; the row is read no further than its `bytes`.
uint32_t bits_of(const uint8_t *row, int64_t bytes, int64_t at, int64_t count) {
    const int64_t left = bytes - at / 8;
    if (count == 32 && at % 8 == 0) {
        uint32_t whole;
        std::memcpy(&whole, row + at / 8, 4);
        return whole;
    }
    uint64_t word = 0;
    std::memcpy(&word, row + at / 8, static_cast<size_t>(left < 8 ? left : 8));
    word >>= at % 8;
    return static_cast<uint32_t>(count >= 32 ? word : word & ((1ull << count) - 1));
}

}  // namespace

Tiling tiling_of(int64_t rows, int64_t full) {
    static const int64_t heights[] = {1, 2, 3, 4, 6, 8, 12};  // for which there are kernels
    Tiling made{rows, full, rows / full, rows % full, 0};
    for (const int64_t height : heights) {
        if (made.rest_rows > 0 && made.rest_height == 0 && height >= made.rest_rows) made.rest_height = height;
    }
    return made;
}

void pack_bytes(const Plan &plan, const int8_t *factors, int32_t bits, const Tiling &tiling, int32_t *words,
                int32_t *sums, int threads) {
    const __m512i order = quad_order(bits);
    const __m512i ones = _mm512_set1_epi8(1);
    const int64_t group_words = plan.blocks * 8;
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const Place place(tiling, r, plan.groups * group_words, words);
            for (int64_t g = 0; g < plan.groups; ++g) {
                __m512i sum = _mm512_setzero_si512();
                for (int64_t w = 0; w < group_words; w += 16) {
                    const int64_t at = 4 * w;
                    __m512i a = _mm512_setzero_si512();
                    if (place.real && at < plan.size) {
                        const int8_t *from = factors + r * plan.width + g * plan.size + at;
                        a = _mm512_maskz_loadu_epi8(first(plan.size - at), from);
                    }
                    sum = _mm512_dpbusd_epi32(sum, ones, a);
                    scatter(place.words + (g * group_words + w) * place.stride, place.stride,
                            _mm512_permutexvar_epi8(order, a), group_words - w < 16 ? group_words - w : 16);
                }
                if (place.real) sums[r * plan.groups + g] = _mm512_reduce_add_epi32(sum);
            }
        }
    };
    parallel_for(threads, tiling.padded(), tiling.full, share);
}

void pack_planes(const Plan &plan, const bq_activation &x, int32_t planes, const Tiling &tiling, int32_t *words,
                 int threads) {
    const __m512i largest = _mm512_set1_epi8(static_cast<char>((1 << planes) - 1));
    const int64_t row_bytes = (plan.width + 7) / 8;
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const Place place(tiling, r, plan.groups * plan.blocks * planes, words);
            for (int64_t b = 0; b < plan.groups * plan.blocks; ++b) {
                int32_t *to = place.words + b * planes * place.stride;
                const int64_t in_group = b % plan.blocks * 32;
                const int64_t at = b / plan.blocks * plan.size + in_group;
                const int64_t count = plan.size - in_group < 32 ? plan.size - in_group : 32;
                if (!place.real) {
                    for (int32_t p = 0; p < planes; ++p) to[p * place.stride] = 0;
                } else if (planes == 1 && x.packed != nullptr) {
                    to[0] = static_cast<int32_t>(bits_of(x.packed + r * row_bytes, row_bytes, at, count));
                } else {  // 2u = a + 2^planes - 1: bit p of u is bit p + 1 of the sum
                    const auto held = static_cast<__mmask32>(first(count));
                    const __m256i a = _mm256_maskz_loadu_epi8(held, x.factors + r * plan.width + at);
                    const __m256i twice = _mm256_maskz_add_epi8(held, a, _mm512_castsi512_si256(largest));
                    for (int32_t p = 0; p < planes; ++p) {
                        const __m256i bit = _mm256_set1_epi8(static_cast<char>(2 << p));
                        to[p * place.stride] = static_cast<int32_t>(_mm256_test_epi8_mask(twice, bit));
                    }
                }
            }
        }
    };
    parallel_for(threads, tiling.padded(), tiling.full, share);
}

void expand_bits(const uint8_t *packed, int64_t rows, int64_t width, int8_t *factors) {
    const int64_t bytes = (width + 7) / 8;
    const __m256i plus = _mm256_set1_epi8(1);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < width; k += 32) {
            const int64_t count = width - k < 32 ? width - k : 32;
            const __mmask32 up = bits_of(packed + r * bytes, bytes, k, count);
            const __m256i a = _mm256_mask_blend_epi8(up, _mm256_set1_epi8(-1), plus);
            _mm256_mask_storeu_epi8(factors + r * width + k, static_cast<__mmask32>(first(count)), a);
        }
    }
}

void split_floats(const bq_activation &x, int64_t width, int8_t *digits, float *steps, int threads) {
    // Below 127 * 65536 + 127 * 256 + 127, so that every digit fits, rounded too.
    constexpr float kLargest = 8355000.0f;
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            const float *row = x.values + t * x.values_stride;
            __m512 most = _mm512_setzero_ps();
            __mmask16 odd = 0;  // lanes with a value that is not finite
            for (int64_t k = 0; k < width; k += 16) {
                const auto held = static_cast<__mmask16>(first(width - k));
                const __m512 value = _mm512_maskz_loadu_ps(held, row + k);
                odd |= _mm512_fpclass_ps_mask(value, 0x99);  // quiet and signalling NaN, both infinities
                most = _mm512_max_ps(most, _mm512_abs_ps(value));
            }
            const float largest = _mm512_reduce_max_ps(most);
            // Below this no inverse would be finite; such a row is zero to 24 bits of any output that is not.
            const bool empty = largest < 1e-30f;
            steps[t] = odd != 0 ? __builtin_nanf("") : empty ? 0.0f : largest / kLargest;
            const __m512 inverse = _mm512_set1_ps(odd != 0 || empty ? 0.0f : kLargest / largest);
            int8_t *to = digits + 3 * t * width;
            for (int64_t k = 0; k < width; k += 16) {
                const auto held = static_cast<__mmask16>(first(width - k));
                const __m512 value = _mm512_maskz_loadu_ps(held, row + k);
                __m512i left = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
                if (odd != 0) left = _mm512_setzero_si512();
                for (int j = 0; j < 3; ++j) {
                    const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(left, 24), 24);
                    _mm_mask_storeu_epi8(to + j * width + k, held, _mm512_cvtepi32_epi8(digit));
                    left = _mm512_srai_epi32(_mm512_sub_epi32(left, digit), 8);
                }
            }
        }
    };
    parallel_for(threads, x.rows, 1, share);
}

}  // namespace bq::avx512
