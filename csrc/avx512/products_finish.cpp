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

// The dot as float32 where it may take more than 31 bits: the sum of the factors' products is exact modulo 2^32 and
// below 2^31 (K < 2^17), the rest is 64-bit.
__m512 wide_dot(const Plan &plan, __m512i d, int32_t a_sum, const int32_t *v_sums) {
    alignas(64) int32_t part[kLanes];
    alignas(64) float dot[kLanes];
    _mm512_store_si512(part, d);
    const ProductLayout &l = plan.layout;
    const int64_t size = plan.size;
    for (int i = 0; i < kLanes; ++i) {
        const int64_t v_sum = v_sums == nullptr ? 0 : v_sums[i];
        const uint32_t modular = static_cast<uint32_t>(l.scale) * static_cast<uint32_t>(part[i]) +
                                 static_cast<uint32_t>(l.offset) * static_cast<uint32_t>(a_sum);
        const int64_t product = static_cast<int32_t>(modular);
        const int64_t w_sum = l.scale * v_sum + l.offset * size;
        const int64_t fx = plan.form_x.factor, ox = plan.form_x.offset, fw = plan.form_w.factor, ow = plan.form_w.offset;
        dot[i] = static_cast<float>(fx * fw * product + fx * ow * a_sum + ox * fw * w_sum + ox * ow * size);
    }
    return _mm512_load_ps(dot);
}

// A scale group's or row's share of the output, set down or added to what earlier groups left in `total`.
void settle(const Plan &plan, __m512 value, float *total, int64_t group, int64_t t, int64_t n, __mmask16 lanes) {
    if (plan.groups > 1) {
        if (group > 0) value = _mm512_add_ps(_mm512_loadu_ps(total), value);
        if (group + 1 < plan.groups) {
            _mm512_storeu_ps(total, value);
            return;
        }
    }
    store(plan, t, n, lanes, value);
}

// Three rows of digits are one token of floats.
void finish_digits(const Plan &plan, const int32_t *d, float *totals, int64_t row0, int64_t count, int64_t tile,
                   int64_t tiles, int64_t group) {
    const __m512i multiplier = _mm512_set1_epi32(plan.correct.multiplier);
    const __m512 base = _mm512_set1_ps(256.0f);
    for (int64_t i = 0; i < tiles && (tile + i) * kLanes < plan.channels; ++i) {
        const __m512 w_step = _mm512_load_ps(plan.steps + ((tile + i) * plan.groups + group) * kLanes);
        for (int64_t r = 0; r + 3 <= count; r += 3) {
            __m512 digit[3];
            for (int64_t j = 0; j < 3; ++j) {
                const int32_t a_sum = plan.a_sums[(row0 + r + j) * plan.groups + group];
                const __m512i raw = _mm512_loadu_si512(d + ((r + j) * tiles + i) * kLanes);
                digit[j] = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_mullo_epi32(raw, multiplier),
                                                               _mm512_set1_epi32(plan.correct.a_factor * a_sum)));
            }
            const __m512 whole = _mm512_fmadd_ps(_mm512_fmadd_ps(digit[2], base, digit[1]), base, digit[0]);
            const int64_t t = (row0 + r) / 3;
            const __m512 scale = _mm512_mul_ps(w_step, _mm512_set1_ps(plan.x_step[t] * plan.unit));
            settle(plan, _mm512_mul_ps(whole, scale), totals + (r * tiles + i) * kLanes, group, t, (tile + i) * kLanes,
                   lanes_of(plan, tile + i));
        }
    }
}

}  // namespace

void finish(const Plan &plan, const int32_t *d, float *totals, int64_t t0, int64_t count, int64_t tile, int64_t tiles,
            int64_t group) {
    if (plan.digits == 3) {
        finish_digits(plan, d, totals, t0, count, tile, tiles, group);
        return;
    }
    const ProductLayout &l = plan.layout;
    const int64_t w_group = group * l.groups / plan.groups;
    const int64_t x_group = group * plan.x_groups / plan.groups;
    const Correction &c = plan.correct;
    const __m512i multiplier = _mm512_set1_epi32(c.multiplier);
    for (int64_t i = 0; i < tiles && (tile + i) * kLanes < plan.channels; ++i) {
        const int64_t scale_at = ((tile + i) * l.groups + w_group) * kLanes;
        const int32_t *v_sums = plan.sums == nullptr ? nullptr : plan.sums + scale_at;
        const __m512 w_step = _mm512_load_ps(plan.steps + scale_at);
        __m512i of_channel = _mm512_set1_epi32(c.constant);
        if (c.v_factor != 0) {
            of_channel = _mm512_add_epi32(of_channel, _mm512_mullo_epi32(_mm512_load_si512(v_sums),
                                                                         _mm512_set1_epi32(c.v_factor)));
        }
        const __mmask16 lanes = lanes_of(plan, tile + i);
        const int64_t n = (tile + i) * kLanes;
        for (int64_t t = 0; t < count; ++t) {
            const int64_t token = t0 + t;
            const int32_t a_sum = plan.a_sums == nullptr ? 0 : plan.a_sums[token * plan.groups + group];
            const __m512i raw = _mm512_loadu_si512(d + (t * tiles + i) * kLanes);
            // Modulo 2^32, which is exact because the result fits.
            const auto of_token = static_cast<int32_t>(static_cast<uint32_t>(c.a_factor) * static_cast<uint32_t>(a_sum));
            const __m512i dot = _mm512_add_epi32(_mm512_mullo_epi32(raw, multiplier),
                                                 _mm512_add_epi32(of_channel, _mm512_set1_epi32(of_token)));
            if (plan.integers != nullptr) {
                _mm512_mask_storeu_epi32(plan.integers + (token * plan.groups + group) * plan.channels + n, lanes, dot);
                continue;
            }
            const __m512 exact = plan.wide ? wide_dot(plan, raw, a_sum, v_sums) : _mm512_cvtepi32_ps(dot);
            const float x_step = plan.x_step[token * plan.x_groups + x_group] * plan.unit;
            __m512 value = _mm512_mul_ps(_mm512_mul_ps(exact, _mm512_set1_ps(x_step)), w_step);
            settle(plan, value, totals + (t * tiles + i) * kLanes, group, token, n, lanes);
        }
    }
}

}  // namespace bq::avx512
