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

// Which step, scale and sum of v the groups of a window read: positions in their arrays, from the first of a row.
struct Positions {
    int64_t w[kGroupsAtOnce];
    int64_t x[kGroupsAtOnce];
    int64_t v[kGroupsAtOnce];

    Positions(const Plan &plan, const Window &window) {
        for (int64_t j = 0; j < window.groups; ++j) {
            const int64_t g = window.group + j;
            w[j] = of(g, plan.layout.groups, plan.groups) * kLanes;
            x[j] = of(g, plan.x_groups, plan.groups);
            v[j] = of(g, plan.sum_groups, plan.groups) * kLanes;
        }
    }

  private:
    static int64_t of(int64_t group, int64_t coarse, int64_t fine) {
        return coarse == fine ? group : coarse == 1 ? 0 : group * coarse / fine;
    }
};

__m512i add_term(const Correction &c, __m512i d, int32_t term) {
    return _mm512_add_epi32(_mm512_sllv_epi32(d, _mm512_set1_epi32(c.d_shift)), _mm512_set1_epi32(term));
}

__m512i v_term(const Correction &c, const int32_t *v_sums) {
    return _mm512_sllv_epi32(_mm512_load_si512(v_sums), _mm512_set1_epi32(c.v_shift));
}

// The usual case: dots of less than 32 bits, float outputs. Digits: rows of a token.
template <bool HasV, int Digits>
void finish_floats(const Plan &plan, const int32_t *d, float *totals, const Window &window) {
    const Positions at(plan, window);
    const Correction c = plan.correct;
    const Window w = window;
    const int64_t apart = w.height * w.tiles * kLanes;  // from group to group
    const int64_t next_row = w.tiles * kLanes;
    const int64_t groups = plan.groups;
    const bool last = w.group + w.groups == groups;
    const __m512 base = _mm512_set1_ps(256.0f);
    for (int64_t i = 0; i < w.tiles && (w.tile + i) * kLanes < plan.channels; ++i) {
        const int64_t tile = w.tile + i;
        const float *w_steps = plan.steps + tile * plan.layout.groups * kLanes;
        const int32_t *v_sums = HasV ? plan.sums + tile * plan.sum_groups * kLanes : nullptr;
        const __mmask16 lanes = lanes_of(plan, tile);
        for (int64_t r = 0; r + Digits <= w.count; r += Digits) {
            const int64_t row = w.t0 + r, token = row / Digits;
            const float *scales = plan.x_scale + token * plan.x_groups;
            const int32_t *terms = plan.terms == nullptr ? nullptr : plan.terms + row * groups + w.group;
            const int32_t *from = d + r * next_row + i * kLanes;
            float *kept = totals + r * next_row + i * kLanes;
            __m512 total = w.group == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(kept);
            for (int64_t j = 0; j < w.groups; ++j, from += apart) {
                __m512i dot = add_term(c, _mm512_loadu_si512(from), terms == nullptr ? c.constant : terms[j]);
                if (HasV) dot = _mm512_add_epi32(dot, v_term(c, v_sums + at.v[j]));
                __m512 value = _mm512_cvtepi32_ps(dot);
                if (Digits == 3) {  // and 256 times the second row, and 65536 times the third
                    const __m512i second = add_term(c, _mm512_loadu_si512(from + next_row), terms[groups + j]);
                    const __m512i third = add_term(c, _mm512_loadu_si512(from + 2 * next_row), terms[2 * groups + j]);
                    value = _mm512_fmadd_ps(
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(third), base, _mm512_cvtepi32_ps(second)), base, value);
                }
                value = _mm512_mul_ps(value, _mm512_set1_ps(scales[at.x[j]]));
                total = _mm512_fmadd_ps(value, _mm512_load_ps(w_steps + at.w[j]), total);
            }
            if (last) {
                store(plan, token, tile * kLanes, lanes, total);
            } else {
                _mm512_storeu_ps(kept, total);
            }
        }
    }
}

// The dot as float32 where it may take more than 31 bits: the sum of the factors' products is exact modulo 2^32 and
// below 2^31 (K < 2^17), the rest is 64-bit.
__m512 wide_dot(const Plan &plan, __m512i d, int32_t a_sum, const int32_t *v_sums) {
    alignas(64) int32_t part[kLanes];
    alignas(64) float made[kLanes];
    _mm512_store_si512(part, d);
    const ProductLayout &l = plan.layout;
    const int64_t fx = plan.form_x.factor, ox = plan.form_x.offset, fw = plan.form_w.factor, ow = plan.form_w.offset;
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t modular = static_cast<uint32_t>(l.scale) * static_cast<uint32_t>(part[i]) +
                                 static_cast<uint32_t>(l.offset) * static_cast<uint32_t>(a_sum);
        const int64_t product = static_cast<int32_t>(modular);
        const int64_t v_sum = v_sums == nullptr ? 0 : v_sums[i];
        const int64_t w_sum = l.scale * v_sum + l.offset * plan.size;
        made[i] = static_cast<float>(fx * fw * product + fx * ow * a_sum + ox * fw * w_sum + ox * ow * plan.size);
    }
    return _mm512_load_ps(made);
}

// bq_product, and dots that may take more than 31 bits.
void finish_rare(const Plan &plan, const int32_t *d, float *totals, const Window &w) {
    const Positions at(plan, w);
    for (int64_t i = 0; i < w.tiles && (w.tile + i) * kLanes < plan.channels; ++i) {
        const int64_t tile = w.tile + i, n = tile * kLanes;
        const __mmask16 lanes = lanes_of(plan, tile);
        for (int64_t r = 0; r < w.count; ++r) {
            const int64_t token = w.t0 + r;
            float *kept = totals + (r * w.tiles + i) * kLanes;
            for (int64_t j = 0; j < w.groups; ++j) {
                const int64_t g = w.group + j;
                const __m512i raw = _mm512_loadu_si512(d + ((j * w.height + r) * w.tiles + i) * kLanes);
                if (plan.integers != nullptr) {
                    const int32_t term =
                        plan.terms == nullptr ? plan.correct.constant : plan.terms[token * plan.groups + g];
                    _mm512_mask_storeu_epi32(plan.integers + (token * plan.groups + g) * plan.channels + n, lanes,
                                             add_term(plan.correct, raw, term));
                    continue;
                }
                const int32_t *v_sums = plan.sums == nullptr ? nullptr : plan.sums + tile * plan.sum_groups * kLanes;
                const __m512 dot = wide_dot(plan, raw, plan.a_sums[token * plan.groups + g],
                                            v_sums == nullptr ? nullptr : v_sums + at.v[j]);
                const __m512 scaled = _mm512_mul_ps(dot, _mm512_set1_ps(plan.x_scale[token * plan.x_groups + at.x[j]]));
                __m512 value = _mm512_mul_ps(
                    scaled, _mm512_load_ps(plan.steps + tile * plan.layout.groups * kLanes + at.w[j]));
                if (g > 0) value = _mm512_add_ps(_mm512_loadu_ps(kept), value);
                _mm512_storeu_ps(kept, value);
                if (g + 1 == plan.groups) store(plan, token, n, lanes, value);
            }
        }
    }
}

}  // namespace

void finish(const Plan &plan, const int32_t *d, float *totals, const Window &window) {
    if (plan.integers != nullptr || plan.wide) {
        finish_rare(plan, d, totals, window);
    } else if (plan.digits == 3) {
        finish_floats<false, 3>(plan, d, totals, window);
    } else if (plan.correct.has_v) {
        finish_floats<true, 1>(plan, d, totals, window);
    } else {
        finish_floats<false, 1>(plan, d, totals, window);
    }
}

}  // namespace bq::avx512
