// The product functions of a table: which way a pair of widths takes, and its plan.
#pragma once

#include "pack.inl"

namespace bq::BQ_SPACE {
namespace {

constexpr int64_t kLongestGroup = 65536;  // 255 * 128 * 2^16 < 2^31: D never wraps

bool wants_bits(const bq_weight &w) {
    if (w.sparse != 0 || w.integer != nullptr || w.x_uniform == 0 || w.bits > 2) return false;
    return w.bits * w.x_bits <= 4 || (kSplits && w.bits == 1 && w.x_bits == 8);
}

// What a call needs for itself, in one array of the calling thread.
struct Memory {
    int8_t *factors = nullptr;  // bits expanded, or digits
    uint8_t *x = nullptr;       // the packed activation
    int32_t *a_sums = nullptr;
    float *scales = nullptr;
    int32_t *v_sums = nullptr;

    bool take(int64_t factor_bytes, int64_t x_bytes, int64_t sum_count, int64_t scale_count, int64_t v_count) {
        const int64_t parts[] = {factor_bytes, x_bytes, sum_count * 4, scale_count * 4, v_count * 4};
        int64_t at[6] = {};
        for (int i = 0; i < 5; ++i) at[i + 1] = at[i] + round_up(parts[i], 64);
        auto *all = static_cast<uint8_t *>(scratch(0, static_cast<size_t>(at[5])));
        if (all == nullptr) return false;
        factors = reinterpret_cast<int8_t *>(all);
        x = all + at[1];
        a_sums = reinterpret_cast<int32_t *>(all + at[2]);
        scales = reinterpret_cast<float *>(all + at[3]);
        v_sums = reinterpret_cast<int32_t *>(all + at[4]);
        return true;
    }
};

// Every form of numerics/integers.py: factor * a + offset is a, or 2a + 1.
bool is_usual(const bq_form &form) {
    return (form.factor == 1 && form.offset == 0) || (form.factor == 2 && form.offset == 1);
}

// BQ_UNSUPPORTED: groupings whose blocks do not line up, unknown forms.
int32_t make_plan(const bq_weight &w, const uint8_t *payload, const bq_activation &x, Plan *plan) {
    ProductLayout &l = plan->layout;
    std::memcpy(&l, payload, sizeof(l));
    const bool floats = w.x_bits == 16;
    const int64_t block = l.planes != 0 ? kElements : 32;
    plan->words = payload + kLayoutBytes;
    plan->sums = l.has_sums != 0 ? reinterpret_cast<const int32_t *>(payload + l.sums_at) : nullptr;
    plan->sum_groups = l.groups;
    plan->steps = reinterpret_cast<const float *>(payload + l.steps_at);
    plan->digits = floats ? 3 : 1;
    plan->rows = x.rows * plan->digits;
    plan->channels = w.channels;
    plan->width = w.width;
    plan->x_groups = floats ? 1 : x.groups;
    plan->groups = plan->x_groups > w.groups ? plan->x_groups : w.groups;
    plan->size = w.width / plan->groups;
    plan->blocks = (plan->size + block - 1) / block;
    plan->shift = l.planes != 0 ? 0 : bytes_traits(l.bits).shift;
    plan->form_x = floats ? bq_form{1.0f, 1, 0} : x.form;
    plan->form_w = w.form;
    if (!is_usual(plan->form_w) || !is_usual(plan->form_x)) return BQ_UNSUPPORTED;
    if (plan->groups > w.groups && plan->size % block != 0) return BQ_UNSUPPORTED;
    if (l.planes == 0 && plan->form_x.offset != 0 && plan->sums == nullptr) return BQ_UNSUPPORTED;
    return BQ_OK;
}

// Dots of the levels' integers factor * a + offset with a = scale * v + offset of the layout.
Correction level_correction(const Plan &plan, int32_t x_bits) {
    const ProductLayout &l = plan.layout;
    if (l.planes != 0) {
        const int32_t w_largest = (1 << l.bits) - 1;
        const int32_t x_largest = (1 << x_bits) - 1;
        if (x_bits == 8 && plan.form_x.offset == 0) {  // not of the levels 2a + 1, but of a
            return {0, 0, -1, static_cast<int32_t>(-(x_largest - 1) / 2 * w_largest * plan.size)};
        }
        return {1, 0, 0, static_cast<int32_t>(-x_largest * w_largest * plan.size)};
    }
    const bq_form &fx = plan.form_x;
    const int32_t scale = plan.form_w.factor * l.scale;
    const int32_t offset = plan.form_w.factor * l.offset + plan.form_w.offset;
    const auto constant = static_cast<uint32_t>(fx.offset * offset) * static_cast<uint32_t>(plan.size);
    // The product of both is 1, 2 or 4: see make_plan.
    return {(fx.factor * scale) >> 1, fx.factor * (offset + scale * plan.shift), fx.offset * scale,
            static_cast<int32_t>(constant)};
}

bool is_wide(const Plan &plan) {
    if (plan.digits == 3) return false;  // a digit's dot is at most 255 * 128 * 65536, and `finish` scales digits itself
    if (plan.layout.planes != 0) return false;
    if (plan.form_x.offset == 0 && plan.form_w.offset == 0) return false;  // |a| <= 127: below 2^31 up to 2^17 elements
    return plan.size * 255 * 255 >= int64_t{1} << 31;
}

int32_t run(const bq_weight &w, const bq_activation &x, Plan *plan, int threads) {
    const ProductLayout &l = plan->layout;
    const bool bits = l.planes != 0;
    const bool floats = plan->digits == 3;
    const bool expand = !floats && x.factors == nullptr;
    const bool own_sums = plan->correct.v_factor != 0 && (bits || plan->groups > l.groups);
    const Tiling tiling = bits ? Tiling(plan->rows, bits_traits(w.x_bits).rows)
                               : bytes_tiling(plan->rows, l.bits, plan->digits);
    const int64_t unit = bits ? bits_traits(w.x_bits).unit * kElements / bits_traits(w.x_bits).portion
                              : 4 * bytes_traits(l.bits).steps;  // bytes of a block of a row
    const int64_t scales = x.rows * plan->x_groups;
    Memory memory;
    if (!memory.take(floats || expand ? plan->rows * w.width : 0, tiling.padded() * plan->groups * plan->blocks * unit,
                     bits ? 0 : plan->rows * plan->groups, scales, own_sums ? l.tiles * plan->groups * l.lanes : 0)) {
        return BQ_NO_MEMORY;
    }
    // Waking threads costs more than packing one row.
    const int packing = plan->rows * w.width > 65536 ? threads : 1;
    if (floats) split_floats(x, w.width, memory.factors, memory.scales, packing);
    if (expand) expand_bits(x.packed, x.rows, w.width, memory.factors);
    const int8_t *factors = floats || expand ? memory.factors : x.factors;
    const float *steps = floats ? memory.scales : x.step;
    const float both = plan->form_x.unit * plan->form_w.unit;
    for (int64_t i = 0; i < scales && steps != nullptr; ++i) memory.scales[i] = steps[i] * both;
    plan->x_scale = memory.scales;
    if (own_sums) {
        if (bits) {
            count_weights(*plan, memory.v_sums);
        } else {
            sum_weights(*plan, memory.v_sums, threads);
        }
        plan->sums = memory.v_sums;
        plan->sum_groups = plan->groups;
    }
    if (bits) {
        pack_bits(*plan, factors, w.x_bits, tiling, memory.x, packing);
        return run_bits(*plan, tiling, memory.x, w.x_bits, threads);
    }
    auto *words = reinterpret_cast<int32_t *>(memory.x);
    pack_bytes(*plan, factors, tiling, words, memory.a_sums, packing);
    plan->a_sums = memory.a_sums;
    return run_bytes(*plan, tiling, words, threads);
}

}  // namespace

int32_t payload_bytes(const bq_weight &w, int64_t *bytes) {
    if (w.width / w.groups > kLongestGroup) return BQ_UNSUPPORTED;
    if (wants_bits(w)) {
        *bytes = bits_layout(w).bytes;
        return BQ_OK;
    }
    ProductLayout layout;
    const int32_t done = product_layout(w, kLanes, false, &layout);
    *bytes = layout.bytes;
    return done;
}

int32_t prepare(const bq_weight &w, uint8_t *payload, int32_t threads) {
    if (wants_bits(w)) return fill_bits(w, bits_layout(w), payload, threads);
    ProductLayout layout;
    const int32_t done = product_layout(w, kLanes, false, &layout);
    return done != BQ_OK ? done : fill_layout(w, layout, payload, threads);
}

int32_t linear(const bq_weight &w, const uint8_t *payload, const bq_activation &x, const bq_output &output) {
    Plan plan{};
    const int32_t done = make_plan(w, payload, x, &plan);
    if (done != BQ_OK) return done;
    plan.output = output;
    plan.correct = level_correction(plan, w.x_bits);
    plan.wide = is_wide(plan);
    return run(w, x, &plan, output.threads);
}

int32_t product(const bq_weight &w, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads) {
    Plan plan{};
    bq_activation plain = x;
    bq_weight factors = w;
    plain.form = {1.0f, 1, 0};
    factors.form = {1.0f, 1, 0};
    const int32_t done = make_plan(factors, payload, plain, &plan);
    if (done != BQ_OK) return done;
    plan.integers = out;
    plan.correct = level_correction(plan, w.x_bits);
    return run(factors, x, &plan, threads);
}

}  // namespace bq::BQ_SPACE
