// From exact integers to outputs: correction, scales, bias, rounding to the output's dtype, tails.
#pragma once

#include "plan.inl"

namespace bq::BQ_SPACE {
namespace {

void store_outputs(const Plan &plan, int64_t t, int64_t n, F32 value) {
    const int64_t count = at_most(plan.channels - n, kLanes);
    const auto floats = static_cast<size_t>(count) * sizeof(float);
    if (plan.output.bias != nullptr) {
        F32 bias{};
        std::memcpy(&bias, plan.output.bias + n, floats);
        value += bias;
    }
    const int64_t at = t * plan.output.stride + n;
    if (plan.output.dtype == BQ_FLOAT32) {
        std::memcpy(static_cast<float *>(plan.output.out) + at, &value, floats);
        return;
    }
    uint16_t halves[kLanes];
    if (plan.output.dtype == BQ_BFLOAT16) {
        const U32 bits = (U32)value;
        const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const U32 nan = (U32)(value != value);
        narrow((nan & 0x7fc0u) | (~nan & rounded), halves);
    } else {
        to_halves(value, halves);
    }
    std::memcpy(static_cast<uint16_t *>(plan.output.out) + at, halves, static_cast<size_t>(count) * 2);
}

// Which step, scale and sum of v the groups of a window read: positions from those of the first group.
struct Positions {
    int64_t w[kGroupsAtOnce];
    int64_t x[kGroupsAtOnce];
    int64_t v[kGroupsAtOnce];

    Positions(const Plan &plan, const Window &window) {
        for (int64_t j = 0; j < window.groups; ++j) {
            const int64_t g = window.group + j;
            w[j] = coarse_group(g, plan.layout.groups, plan.groups) * plan.layout.lanes;
            x[j] = coarse_group(g, plan.x_groups, plan.groups);
            v[j] = coarse_group(g, plan.sum_groups, plan.groups) * plan.layout.lanes;
        }
    }
};

// The scales and sums of one vector of channels, of the first group.
struct Channels {
    const float *steps;
    const int32_t *sums;

    Channels(const Plan &plan, int64_t vector) {
        const ProductLayout &l = plan.layout;
        const int64_t tile = vector * kLanes / l.lanes;
        const int64_t lane = vector * kLanes % l.lanes;
        steps = plan.steps + tile * l.groups * l.lanes + lane;
        sums = plan.sums == nullptr ? nullptr : plan.sums + tile * plan.sum_groups * l.lanes + lane;
    }
};

// L of one row and group.
template <bool HasV>
I32 corrected(const Plan &plan, const int32_t *d, int64_t row, int64_t g, const int32_t *v_sums) {
    const Correction &c = plan.correct;
    auto term = static_cast<uint32_t>(c.constant);
    if (plan.a_sums != nullptr) {
        term += static_cast<uint32_t>(c.a_factor) * static_cast<uint32_t>(plan.a_sums[row * plan.groups + g]);
    }
    U32 dot = (load<U32>(d) << c.d_shift) + term;
    if (HasV) dot += load<U32>(v_sums) * static_cast<uint32_t>(c.v_factor);
    return (I32)dot;
}

F32 to_floats(I32 x) { return __builtin_convertvector(x, F32); }

// The usual case: dots of less than 32 bits, float outputs. Digits: rows of a token.
template <bool HasV, int Digits>
void finish_floats(const Plan &plan, const int32_t *d, float *totals, const Window &w) {
    const Positions position(plan, w);
    const int64_t next_row = w.vectors * kLanes;
    const bool last = w.group + w.groups == plan.groups;
    for (int64_t i = 0; i < w.vectors && (w.vector + i) * kLanes < plan.channels; ++i) {
        const Channels at(plan, w.vector + i);
        for (int64_t r = 0; r + Digits <= w.count; r += Digits) {
            const int64_t row = w.row + r;
            const int64_t token = row / Digits;
            float *kept = totals + (r * w.vectors + i) * kLanes;
            F32 total = w.group == 0 ? F32{} : load<F32>(kept);
            for (int64_t j = 0; j < w.groups; ++j) {
                const int64_t g = w.group + j;
                const int32_t *from = d + (j * w.height + r) * next_row + i * kLanes;
                const int32_t *v = HasV ? at.sums + position.v[j] : nullptr;
                F32 value = to_floats(corrected<HasV>(plan, from, row, g, v));
                if (Digits == 3) {  // and 256 times the second row, and 65536 times the third
                    const F32 third = to_floats(corrected<HasV>(plan, from + 2 * next_row, row + 2, g, v));
                    const F32 second = to_floats(corrected<HasV>(plan, from + next_row, row + 1, g, v));
                    value += (third * 256.0f + second) * 256.0f;
                }
                value *= plan.x_scale[token * plan.x_groups + position.x[j]];
                total += value * load<F32>(at.steps + position.w[j]);
            }
            if (last) {
                store_outputs(plan, token, (w.vector + i) * kLanes, total);
            } else {
                store(kept, total);
            }
        }
    }
}

// The dot as float32 where it may take more than 31 bits: the sum of the factors' products is exact modulo 2^32 and
// below 2^31 (K < 2^17), the rest is 64-bit.
F32 wide_dot(const Plan &plan, const int32_t *d, int32_t a_sum, const int32_t *v_sums) {
    const ProductLayout &l = plan.layout;
    const int64_t fx = plan.form_x.factor, ox = plan.form_x.offset, fw = plan.form_w.factor, ow = plan.form_w.offset;
    const int64_t from_a = l.offset + l.scale * plan.shift;
    F32 made;
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t modular = static_cast<uint32_t>(l.scale) * static_cast<uint32_t>(d[i]) +
                                 static_cast<uint32_t>(from_a) * static_cast<uint32_t>(a_sum);
        const int64_t product = static_cast<int32_t>(modular);
        const int64_t v_sum = v_sums == nullptr ? 0 : v_sums[i];
        const int64_t w_sum = l.scale * v_sum + l.offset * plan.size;
        made[i] = static_cast<float>(fx * fw * product + fx * ow * a_sum + ox * fw * w_sum + ox * ow * plan.size);
    }
    return made;
}

// bq_product, and dots that may take more than 31 bits.
void finish_rare(const Plan &plan, const int32_t *d, float *totals, const Window &w) {
    const Positions position(plan, w);
    for (int64_t i = 0; i < w.vectors && (w.vector + i) * kLanes < plan.channels; ++i) {
        const int64_t n = (w.vector + i) * kLanes;
        const Channels at(plan, w.vector + i);
        for (int64_t r = 0; r < w.count; ++r) {
            const int64_t row = w.row + r;
            float *kept = totals + (r * w.vectors + i) * kLanes;
            for (int64_t j = 0; j < w.groups; ++j) {
                const int64_t g = w.group + j;
                const int32_t *from = d + ((j * w.height + r) * w.vectors + i) * kLanes;
                const int32_t *v = at.sums == nullptr ? nullptr : at.sums + position.v[j];
                if (plan.integers != nullptr) {
                    const I32 dot = plan.correct.v_factor != 0 ? corrected<true>(plan, from, row, g, v)
                                                               : corrected<false>(plan, from, row, g, nullptr);
                    std::memcpy(plan.integers + (row * plan.groups + g) * plan.channels + n, &dot,
                                static_cast<size_t>(at_most(plan.channels - n, kLanes)) * sizeof(int32_t));
                    continue;
                }
                F32 value = wide_dot(plan, from, plan.a_sums[row * plan.groups + g], v);
                value *= plan.x_scale[row * plan.x_groups + position.x[j]];
                value *= load<F32>(at.steps + position.w[j]);
                if (g > 0) value += load<F32>(kept);
                store(kept, value);
                if (g + 1 == plan.groups) store_outputs(plan, row, n, value);
            }
        }
    }
}

void finish(const Plan &plan, const int32_t *d, float *totals, const Window &window) {
    if (plan.integers != nullptr || plan.wide) {
        finish_rare(plan, d, totals, window);
    } else if (plan.digits == 3) {
        finish_floats<false, 3>(plan, d, totals, window);
    } else if (plan.correct.v_factor != 0) {
        finish_floats<true, 1>(plan, d, totals, window);
    } else {
        finish_floats<false, 1>(plan, d, totals, window);
    }
}

}  // namespace
}  // namespace bq::BQ_SPACE
