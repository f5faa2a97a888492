// From exact integers to outputs: correction, scales, bias, rounding to the output's dtype, tails.
#include "products.h"

namespace bq::avx512 {
namespace {

__mmask16 lanes_of(const Plan &plan, int64_t tile) {
    const int64_t left = plan.channels - tile * kLanes;
    return left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
}

__m256i to_bfloat16(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(_mm512_srli_epi32(rounded, 16), nan, 0x7fc0));
}

void store(const Plan &plan, int64_t t, int64_t n, __mmask16 lanes, __m512 value) {
    if (plan.output.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, plan.output.bias + n));
    const int64_t at = t * plan.output.stride + n;
    if (plan.output.dtype == BQ_FLOAT32) {
        _mm512_mask_storeu_ps(static_cast<float *>(plan.output.out) + at, lanes, value);
        return;
    }
    const __m256i half = plan.output.dtype == BQ_BFLOAT16
                             ? to_bfloat16(value)
                             : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_mask_storeu_epi16(static_cast<uint16_t *>(plan.output.out) + at, lanes, half);
}

// One vector of outputs: its place, and what of the plan belongs to it.
struct Cell {
    const Plan &plan;
    int64_t row;    // of the packed activation
    int64_t tile;
    __mmask16 lanes;

    const float *w_step(int64_t group) const {
        const int64_t groups = plan.layout.groups;
        const int64_t at = groups == plan.groups ? group : groups == 1 ? 0 : group * groups / plan.groups;
        return plan.steps + (tile * groups + at) * kLanes;
    }

    const int32_t *v_sums(int64_t group) const {
        if (plan.sums == nullptr) return nullptr;
        const int64_t at = plan.sum_groups == plan.groups ? group : group * plan.sum_groups / plan.groups;
        return plan.sums + (tile * plan.sum_groups + at) * kLanes;
    }

    float x_scale(int64_t token, int64_t group) const {
        const int64_t groups = plan.x_groups;
        const int64_t at = groups == plan.groups ? group : groups == 1 ? 0 : group * groups / plan.groups;
        return plan.x_scale[token * groups + at];
    }

    // L modulo 2^32, which is L unless the plan is wide.
    __m512i dot(__m512i d, int64_t of_row, int64_t group) const {
        const Correction &c = plan.correct;
        const int32_t term = plan.terms == nullptr ? c.constant : plan.terms[of_row * plan.groups + group];
        __m512i sum = _mm512_add_epi32(_mm512_sllv_epi32(d, _mm512_set1_epi32(c.d_shift)), _mm512_set1_epi32(term));
        if (c.has_v) {
            const __m512i v = _mm512_load_si512(v_sums(group));
            sum = _mm512_add_epi32(sum, _mm512_sllv_epi32(v, _mm512_set1_epi32(c.v_shift)));
        }
        return sum;
    }

    // L as float32 where it may take more than 31 bits: the sum of the factors' products is exact modulo 2^32 and below
    // 2^31 (K < 2^17), the rest is 64-bit.
    __m512 wide_dot(__m512i d, int64_t group) const {
        alignas(64) int32_t part[kLanes];
        alignas(64) float made[kLanes];
        _mm512_store_si512(part, d);
        const ProductLayout &l = plan.layout;
        const int64_t fx = plan.form_x.factor, ox = plan.form_x.offset;
        const int64_t fw = plan.form_w.factor, ow = plan.form_w.offset;
        const int32_t *v = v_sums(group);
        const int32_t a_sum = plan.a_sums[row * plan.groups + group];
        for (int i = 0; i < kLanes; ++i) {
            const uint32_t modular = static_cast<uint32_t>(l.scale) * static_cast<uint32_t>(part[i]) +
                                     static_cast<uint32_t>(l.offset) * static_cast<uint32_t>(a_sum);
            const int64_t product = static_cast<int32_t>(modular);
            const int64_t w_sum = v == nullptr ? 0 : l.scale * static_cast<int64_t>(v[i]) + l.offset * plan.size;
            made[i] = static_cast<float>(fx * fw * product + fx * ow * a_sum + ox * fw * w_sum + ox * ow * plan.size);
        }
        return _mm512_load_ps(made);
    }
};

}  // namespace

void finish(const Plan &plan, const int32_t *d, float *totals, const Window &w) {
    const int64_t apart = w.height * w.tiles * kLanes;  // from group to group
    const int64_t digits = plan.digits;
    const __m512 base = _mm512_set1_ps(256.0f);
    for (int64_t i = 0; i < w.tiles && (w.tile + i) * kLanes < plan.channels; ++i) {
        const int64_t n = (w.tile + i) * kLanes;
        for (int64_t r = 0; r + digits <= w.count; r += digits) {
            const Cell cell{plan, w.t0 + r, w.tile + i, lanes_of(plan, w.tile + i)};
            const int64_t token = cell.row / digits;
            const int32_t *from = d + (r * w.tiles + i) * kLanes;
            float *kept = totals + (r * w.tiles + i) * kLanes;
            __m512 total = w.group == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(kept);
            for (int64_t g = w.group; g < w.group + w.groups; ++g, from += apart) {
                const __m512i raw = _mm512_loadu_si512(from);
                const __m512i dot = cell.dot(raw, cell.row, g);
                if (plan.integers != nullptr) {
                    int32_t *to = plan.integers + (token * plan.groups + g) * plan.channels + n;
                    _mm512_mask_storeu_epi32(to, cell.lanes, dot);
                    continue;
                }
                __m512 value = plan.wide ? cell.wide_dot(raw, g) : _mm512_cvtepi32_ps(dot);
                if (digits == 3) {  // value + 256 of the second row + 65536 of the third
                    const __m512i second = _mm512_loadu_si512(from + w.tiles * kLanes);
                    const __m512i third = _mm512_loadu_si512(from + 2 * w.tiles * kLanes);
                    __m512 high = _mm512_cvtepi32_ps(cell.dot(third, cell.row + 2, g));
                    high = _mm512_fmadd_ps(high, base, _mm512_cvtepi32_ps(cell.dot(second, cell.row + 1, g)));
                    value = _mm512_fmadd_ps(high, base, value);
                }
                value = _mm512_mul_ps(value, _mm512_set1_ps(cell.x_scale(token, g)));
                total = _mm512_add_ps(total, _mm512_mul_ps(value, _mm512_load_ps(cell.w_step(g))));
            }
            if (plan.integers != nullptr) continue;
            if (w.group + w.groups < plan.groups) {
                _mm512_storeu_ps(kept, total);
            } else {
                store(plan, token, n, cell.lanes, total);
            }
        }
    }
}

}  // namespace bq::avx512
