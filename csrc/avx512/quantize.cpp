// Rows to codes, fused: prologue, rotation, scale, rounding, mask, packing. The rotated row lies in the cache between
// the two passes (one for the scale, one for the codes), unscaled: the factor 1/sqrt(block) goes into the step.
#include <cstring>

#include "rows_avx512.h"

namespace bq::avx512 {
namespace {

enum class Grid { kOneBit, kUniform, kCodebook };

constexpr int64_t kCodes = 64;  // codes made at a time: four registers of floats, one of bytes

// What is the same for every row.
struct Plan {
    const bq_quantizer &q;
    const bq_rows &r;
    int64_t groups;
    int64_t packed_bytes;
    int64_t mask_bytes;
    float root;              // sqrt(block): a rotated value is the unscaled one divided by it
    __m512i first_weights;   // bytes: 1, 2^b, 1, 2^b, …
    __m512i second_weights;  // 16-bit words: 1, 2^(2b), …
    __m128i half_shift;      // 4b
    __m512i gather;          // the b low bytes of each 64-bit word, one after the other
    __m512i integers;        // codebook: factor of each u
    __m512 levels;           // codebook: level of each u

    Plan(const bq_quantizer &quantizer, const bq_rows &rows) : q(quantizer), r(rows) {
        groups = r.width / q.group;
        packed_bytes = (r.width * q.bits + 7) / 8;
        mask_bytes = (r.width + 7) / 8;
        root = std::sqrt(static_cast<float>(q.block));
        const int b = q.bits;
        first_weights = _mm512_set1_epi16(static_cast<int16_t>(1 | ((b < 8 ? 1 << b : 0) << 8)));
        second_weights = _mm512_set1_epi32(1 | ((b < 8 ? 1 << (2 * b) : 0) << 16));
        half_shift = _mm_cvtsi32_si128(4 * b);
        alignas(64) uint8_t bytes[64];
        for (int j = 0; j < 64; ++j) bytes[j] = static_cast<uint8_t>(j / b * 8 + j % b);
        gather = _mm512_load_si512(bytes);
        alignas(64) float values[16] = {};
        std::memset(bytes, 0, sizeof bytes);
        for (int i = 0; i < q.levels; ++i) {
            values[i] = q.level[i];
            if (q.integer != nullptr) bytes[i] = static_cast<uint8_t>(q.integer[i]);
        }
        integers = _mm512_load_si512(bytes);
        levels = _mm512_load_ps(values);
    }
};

// Steps of four registers. `step` is in units of the unscaled rotated values.
struct Steps {
    __m512 step[4];
    __m512 inverse[4];
};

// x / step, rounded as a division would be but for rare halves of a unit in the last place: a product, corrected once.
inline __m512 divide(__m512 x, __m512 step, __m512 inverse) {
    const __m512 t = _mm512_mul_ps(x, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(t, step, x), inverse, t);
}

// Four registers of 32-bit integers that fit 16 bits, minus one, to 64 bytes in order.
inline __m512i narrow_minus_one(const __m512i (&wide)[4]) {
    const __m512i one = _mm512_set1_epi16(1);
    const __m512i low = _mm512_sub_epi16(_mm512_packs_epi32(wide[0], wide[1]), one);
    const __m512i high = _mm512_sub_epi16(_mm512_packs_epi32(wide[2], wide[3]), one);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high));
}

inline __mmask64 join(const __mmask16 (&part)[4]) {
    return static_cast<__mmask64>(part[0]) | static_cast<__mmask64>(part[1]) << 16 |
           static_cast<__mmask64>(part[2]) << 32 | static_cast<__mmask64>(part[3]) << 48;
}

struct Coded {
    __m512i u;          // bytes
    __mmask64 bits;     // u as bits, where the grid has one bit
    __mmask64 trusted;
};

inline __mmask16 within(__m512 x, __m512 low, __m512 high) {
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), x, high, _CMP_LE_OQ);
}

template <Grid Kind>
inline Coded encode(const Plan &plan, const float *x, const Steps &steps, bool masked) {
    const bq_quantizer &q = plan.q;
    const bool by_range = q.mask == BQ_MASK_RANGE;
    const __m512 low = _mm512_set1_ps(q.mask_low);
    const __m512 high = _mm512_set1_ps(q.mask_high);
    Coded made{};
    __mmask16 trusted[4] = {};
    if constexpr (Kind == Grid::kOneBit) {
        __mmask16 above[4];
        for (int i = 0; i < 4; ++i) {
            const __m512 value = _mm512_load_ps(x + i * kLanes);
            above[i] = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ);
            if (!masked) continue;
            if (by_range) {
                trusted[i] = within(value, _mm512_mul_ps(low, steps.step[i]), _mm512_mul_ps(high, steps.step[i]));
            } else {
                const __m512 t = divide(value, steps.step[i], steps.inverse[i]);
                const __m512 level = _mm512_mask_blend_ps(above[i], _mm512_set1_ps(-0.5f), _mm512_set1_ps(0.5f));
                trusted[i] = _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_sub_ps(level, t)), high, _CMP_LE_OQ);
            }
        }
        made.bits = join(above);
        made.u = _mm512_maskz_set1_epi8(made.bits, 1);
    } else if constexpr (Kind == Grid::kUniform) {
        const float half = static_cast<float>(1 << (q.bits - 1));
        __m512i wide[4];
        for (int i = 0; i < 4; ++i) {
            const __m512 t = divide(_mm512_load_ps(x + i * kLanes), steps.step[i], steps.inverse[i]);
            __m512 up = _mm512_add_ps(t, _mm512_set1_ps(0.5f));
            up = _mm512_max_ps(up, _mm512_set1_ps(1 - half));  // a NaN takes the second operand: the lowest code
            up = _mm512_min_ps(up, _mm512_set1_ps(half));
            wide[i] = _mm512_cvtps_epi32(up);  // ties to even
            if (!masked) continue;
            if (by_range) {
                trusted[i] = within(t, low, high);
            } else {
                const __m512 level = _mm512_sub_ps(_mm512_cvtepi32_ps(wide[i]), _mm512_set1_ps(0.5f));
                trusted[i] = _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_sub_ps(level, t)), high, _CMP_LE_OQ);
            }
        }
        made.u = _mm512_add_epi8(narrow_minus_one(wide), _mm512_set1_epi8(static_cast<char>(1 << (q.bits - 1))));
    } else {
        __m512i wide[4];
        for (int i = 0; i < 4; ++i) {
            const __m512 t = divide(_mm512_load_ps(x + i * kLanes), steps.step[i], steps.inverse[i]);
            __m512i index = _mm512_setzero_si512();
            for (int m = 0; m + 1 < q.levels; ++m) {
                const __mmask16 beyond = _mm512_cmp_ps_mask(t, _mm512_set1_ps(q.middle[m]), _CMP_GT_OQ);
                index = _mm512_mask_add_epi32(index, beyond, index, _mm512_set1_epi32(1));
            }
            wide[i] = _mm512_add_epi32(index, _mm512_set1_epi32(1));
            if (!masked) continue;
            if (by_range) {
                trusted[i] = within(t, low, high);
            } else {
                const __m512 level = _mm512_permutexvar_ps(index, plan.levels);
                trusted[i] = _mm512_cmp_ps_mask(_mm512_abs_ps(_mm512_sub_ps(level, t)), high, _CMP_LE_OQ);
            }
        }
        made.u = narrow_minus_one(wide);
    }
    made.trusted = join(trusted);
    return made;
}

// 64 codes of b bits to 8b bytes at the front of a register: pairs, fours, eights, then the bytes pushed together.
inline __m512i pack(const Plan &plan, __m512i u) {
    const __m512i pairs = _mm512_maddubs_epi16(plan.first_weights, u);  // the weights unsigned: 2^7 is one
    const __m512i fours = _mm512_madd_epi16(pairs, plan.second_weights);
    const __m512i low = _mm512_and_si512(fours, _mm512_set1_epi64(0xffffffff));
    const __m512i high = _mm512_sll_epi64(_mm512_srli_epi64(fours, 32), plan.half_shift);
    return _mm512_permutexvar_epi8(plan.gather, _mm512_or_si512(low, high));
}

template <Grid Kind>
inline __m512i factors(const Plan &plan, const Coded &made) {
    if constexpr (Kind == Grid::kOneBit) {
        return _mm512_mask_blend_epi8(made.bits, _mm512_set1_epi8(-1), _mm512_set1_epi8(1));
    } else if constexpr (Kind == Grid::kCodebook) {
        return _mm512_permutexvar_epi8(made.u, plan.integers);
    } else {
        if (plan.q.bits == 8) return _mm512_xor_si512(made.u, _mm512_set1_epi8(static_cast<char>(0x80)));
        const __m512i lowest = _mm512_set1_epi8(static_cast<char>(1 - (1 << plan.q.bits)));
        return _mm512_add_epi8(_mm512_add_epi8(made.u, made.u), lowest);
    }
}

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// Writes what is wanted of 64 codes (fewer at the end of a row) and returns their factors, zero beyond the end.
template <Grid Kind, bool Whole>
inline __m512i write(const Plan &plan, int64_t t, int64_t k, const Coded &made) {
    const bq_rows &r = plan.r;
    const __mmask64 valid = Whole ? ~0ull : first_bytes(r.width - k);
    if (r.packed != nullptr) {
        uint8_t *to = r.packed + t * plan.packed_bytes + k * plan.q.bits / 8;
        if constexpr (Kind == Grid::kOneBit) {
            const uint64_t bits = made.bits & valid;
            if (Whole) {
                std::memcpy(to, &bits, 8);
            } else {
                _mm_mask_storeu_epi8(to, static_cast<__mmask16>(first_bytes(plan.mask_bytes - k / 8)),
                                     _mm_cvtsi64_si128(static_cast<int64_t>(bits)));
            }
        } else {
            const __m512i u = _mm512_maskz_mov_epi8(valid, made.u);
            const int64_t left = Whole ? 8 * plan.q.bits : plan.packed_bytes - k * plan.q.bits / 8;
            const __m512i bytes = plan.q.bits == 8 ? u : pack(plan, u);
            _mm512_mask_storeu_epi8(to, first_bytes(left), bytes);
        }
    }
    if (r.mask != nullptr) {
        uint8_t *to = r.mask + t * plan.mask_bytes + k / 8;
        const uint64_t bits = made.trusted & valid;
        if (Whole) {
            std::memcpy(to, &bits, 8);
        } else {
            _mm_mask_storeu_epi8(to, static_cast<__mmask16>(first_bytes(plan.mask_bytes - k / 8)),
                                 _mm_cvtsi64_si128(static_cast<int64_t>(bits)));
        }
    }
    if (r.factors == nullptr && r.sums == nullptr) return _mm512_setzero_si512();
    const __m512i a = _mm512_maskz_mov_epi8(valid, factors<Kind>(plan, made));
    if (r.factors != nullptr) _mm512_mask_storeu_epi8(r.factors + t * r.width + k, valid, a);
    return a;
}

inline double to_magnitude(__m512i bits) {
    const int32_t largest = _mm512_reduce_max_epi32(bits);
    float value;
    std::memcpy(&value, &largest, sizeof value);
    return value;
}

// The first pass: rotates a row into `row` and returns the statistic of the whole of it.
template <int Log, int32_t Dtype>
double rotate_row(const bq_quantizer &q, const Reader<Dtype> &reader, float *row) {
    __m512d totals[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    __m512i largest = _mm512_setzero_si512();  // magnitudes as integers: ordered alike, and a NaN is above everything
    const int64_t width = reader.width;
    for (int64_t start = 0; start < width; start += kChunk) {
        __m512 x[8];
        if (width - start >= kChunk) {
            for (int i = 0; i < 8; ++i) x[i] = reader.at(start + i * kLanes, 0xffff);
        } else {
            for (int i = 0; i < 8; ++i) {
                const int64_t k = start + i * kLanes;
                x[i] = reader.at(k, first_lanes(width - k));
            }
        }
        rotate<Log>(x);
        for (int i = 0; i < 8; ++i) _mm512_store_ps(row + start + i * kLanes, x[i]);
        if (q.scale == BQ_SCALE_GAUSSIAN) {
            // Float32 over a chunk, double over the row: good to a unit in the last place at any width.
            __m512 even = _mm512_mul_ps(x[0], x[0]);
            __m512 odd = _mm512_mul_ps(x[1], x[1]);
            for (int i = 2; i < 8; i += 2) {
                even = _mm512_fmadd_ps(x[i], x[i], even);
                odd = _mm512_fmadd_ps(x[i + 1], x[i + 1], odd);
            }
            const __m512 part = _mm512_add_ps(even, odd);
            totals[0] = _mm512_add_pd(totals[0], _mm512_cvtps_pd(_mm512_castps512_ps256(part)));
            totals[1] = _mm512_add_pd(totals[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1)));
        } else if (q.scale == BQ_SCALE_ABSMEAN) {
            __m512 part = _mm512_setzero_ps();
            for (const __m512 value : x) part = _mm512_add_ps(part, _mm512_abs_ps(value));
            totals[0] = _mm512_add_pd(totals[0], _mm512_cvtps_pd(_mm512_castps512_ps256(part)));
            totals[1] = _mm512_add_pd(totals[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1)));
        } else if (q.scale == BQ_SCALE_ABSMAX) {
            for (const __m512 value : x) largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(value)));
        }
    }
    if (q.scale == BQ_SCALE_ABSMAX) return to_magnitude(largest);
    return _mm512_reduce_add_pd(_mm512_add_pd(totals[0], totals[1]));
}

// The statistic of one scale group of the rotated row.
double group_statistic(const bq_quantizer &q, const float *row) {
    __m512d total = _mm512_setzero_pd();
    __m512i largest = _mm512_setzero_si512();  // magnitudes as integers: ordered alike, and a NaN is above everything
    for (int64_t k = 0; k < q.group; k += kLanes) {
        const __m512 value = _mm512_load_ps(row + k);
        if (q.scale == BQ_SCALE_ABSMAX) {
            largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(value)));
            continue;
        }
        const __m512 part = q.scale == BQ_SCALE_GAUSSIAN ? _mm512_mul_ps(value, value) : _mm512_abs_ps(value);
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_castps512_ps256(part)));
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_extractf32x8_ps(part, 1)));
    }
    return q.scale == BQ_SCALE_ABSMAX ? to_magnitude(largest) : _mm512_reduce_add_pd(total);
}

// The step, from a statistic of unscaled values.
float step_of(const Plan &plan, double statistic) {
    const bq_quantizer &q = plan.q;
    const double count = static_cast<double>(q.group);
    double value = statistic / plan.root;
    if (q.scale == BQ_SCALE_GAUSSIAN) value = std::sqrt(statistic / (count * q.block));
    if (q.scale == BQ_SCALE_ABSMEAN) value /= count;
    return (static_cast<float>(value) * q.multiplier + q.epsilon) / q.max_level;
}

template <Grid Kind>
void encode_row(const Plan &plan, int64_t t, const float *row, const float *steps) {
    const bq_quantizer &q = plan.q;
    const bq_rows &r = plan.r;
    const bool masked = r.mask != nullptr;
    const int64_t width = r.width;
    const bool one_step = plan.groups == 1;
    Steps four;
    auto set = [&](int i, float step) {
        four.step[i] = _mm512_set1_ps(step * plan.root);
        four.inverse[i] = _mm512_set1_ps(1.0f / (step * plan.root));
    };
    if (one_step) {
        for (int i = 0; i < 4; ++i) set(i, steps[0]);
    }
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i total = _mm512_setzero_si512();
    auto finish = [&](int64_t k, __m512i a) {
        if (r.sums == nullptr) return;
        total = _mm512_dpbusd_epi32(total, ones, a);
        const int64_t end = k + kCodes;
        const bool long_groups = one_step || q.group >= kCodes;
        if (long_groups && end % q.group != 0 && end < width) return;
        int32_t *sums = r.sums + t * plan.groups;
        if (long_groups) {
            sums[k / q.group] = _mm512_reduce_add_epi32(total);
        } else {
            const int lanes = static_cast<int>(q.group / 4);
            for (int64_t at = k; at < end && at < width; at += q.group) {
                const auto part = static_cast<__mmask16>(((1u << lanes) - 1) << ((at - k) / 4));
                sums[at / q.group] = _mm512_mask_reduce_add_epi32(part, total);
            }
        }
        total = _mm512_setzero_si512();
    };
    auto prepare = [&](int64_t k) {
        if (one_step) return;
        for (int i = 0; i < 4; ++i) {
            const int64_t at = k + i * kLanes;
            set(i, at < width ? steps[at / q.group] : 1.0f);
        }
    };
    int64_t k = 0;
    for (; k + kCodes <= width; k += kCodes) {
        prepare(k);
        finish(k, write<Kind, true>(plan, t, k, encode<Kind>(plan, row + k, four, masked)));
    }
    if (k < width) {
        prepare(k);
        finish(k, write<Kind, false>(plan, t, k, encode<Kind>(plan, row + k, four, masked)));
    }
}

template <int Log, int32_t Dtype>
void quantize_row(const Plan &plan, int64_t t, float *row) {
    const bq_quantizer &q = plan.q;
    const bq_rows &r = plan.r;
    const Reader<Dtype> reader(r.x, r.x_stride, t, r.width, r.prologue);
    const double whole = rotate_row<Log, Dtype>(q, reader, row);
    float *steps = row + round_up(r.width, kChunk);
    for (int64_t g = 0; g < plan.groups; ++g) {
        if (q.scale == BQ_SCALE_GIVEN) {
            steps[g] = r.given_step[t * r.given_stride + g];
        } else {
            steps[g] = step_of(plan, plan.groups == 1 ? whole : group_statistic(q, row + g * q.group));
        }
        if (r.step != nullptr) r.step[t * plan.groups + g] = steps[g];
    }
    if (q.levels != 0) {
        encode_row<Grid::kCodebook>(plan, t, row, steps);
    } else if (q.bits == 1) {
        encode_row<Grid::kOneBit>(plan, t, row, steps);
    } else {
        encode_row<Grid::kUniform>(plan, t, row, steps);
    }
}

}  // namespace

int32_t quantize_rows(const bq_quantizer &q, const bq_rows &r) {
    // A register of floats never crosses a group, and 64 codes cross none or hold whole ones.
    const bool regular = q.group == r.width || q.group % kCodes == 0 || q.group == 32 || q.group == 16;
    if (!regular || q.levels > 16) return BQ_UNSUPPORTED;
    const Plan plan(q, r);
    const size_t bytes = static_cast<size_t>(round_up(r.width, kChunk) + plan.groups) * sizeof(float);
    bool failed = false;  // set by any thread, never cleared
    auto share = [&](int64_t begin, int64_t end, int) {
        float *row = static_cast<float *>(scratch(2, bytes));
        if (row == nullptr) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        with_log(q.block, [&](auto log) {
            with_dtype(r.x_dtype, [&](auto dtype) {
                for (int64_t t = begin; t < end; ++t) quantize_row<log.value, dtype.value>(plan, t, row);
            });
        });
    };
    parallel_for(r.threads, r.rows, 1, share);
    return failed ? BQ_NO_MEMORY : BQ_OK;
}

}  // namespace bq::avx512
