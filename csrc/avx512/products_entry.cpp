// The product functions of the AVX-512 table: which kernel a pair of widths takes, and its plan.
#include <cstring>

#include "products.h"

namespace bq::avx512 {
namespace {

constexpr int64_t kLongestGroup = 65536;  // 255 * 128 * 2^16 < 2^31: D never wraps

// Bit planes where they beat vpdpbusd: up to four pairs of planes.
bool wants_planes(const bq_weight &w) {
    return w.sparse == 0 && w.integer == nullptr && w.x_uniform != 0 && w.bits * w.x_bits <= 4;
}

// What a call needs for itself, in one array of the calling thread.
struct Memory {
    int8_t *factors = nullptr;   // bits expanded, or digits
    int32_t *words = nullptr;    // the packed activation
    int32_t *a_sums = nullptr;
    int32_t *terms = nullptr;
    float *scales = nullptr;
    int32_t *v_sums = nullptr;

    bool take(int64_t factor_bytes, int64_t word_count, int64_t sum_count, int64_t scale_count, int64_t v_count) {
        const int64_t parts[] = {factor_bytes,  word_count * 4,  sum_count * 4,
                                 sum_count * 4, scale_count * 4, v_count * 4};
        int64_t at[7] = {};
        for (int i = 0; i < 6; ++i) at[i + 1] = at[i] + round_up(parts[i], 64);
        auto *all = static_cast<uint8_t *>(scratch(0, static_cast<size_t>(at[6])));
        if (all == nullptr) return false;
        factors = reinterpret_cast<int8_t *>(all);
        words = reinterpret_cast<int32_t *>(all + at[1]);
        a_sums = reinterpret_cast<int32_t *>(all + at[2]);
        terms = reinterpret_cast<int32_t *>(all + at[3]);
        scales = reinterpret_cast<float *>(all + at[4]);
        v_sums = reinterpret_cast<int32_t *>(all + at[5]);
        return true;
    }
};

int32_t log2_of(int32_t power) { return 31 - __builtin_clz(static_cast<uint32_t>(power)); }

// Every form of numerics/integers.py: factor * a + offset is a, or 2a + 1.
bool is_usual(const bq_form &form) {
    return (form.factor == 1 && form.offset == 0) || (form.factor == 2 && form.offset == 1);
}

// BQ_UNSUPPORTED: groupings whose blocks do not line up.
int32_t make_plan(const bq_weight &w, const uint8_t *payload, const bq_activation &x, Plan *plan) {
    ProductLayout &l = plan->layout;
    std::memcpy(&l, payload, sizeof(l));
    const bool floats = w.x_bits == 16;
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
    const bool finer_x = plan->groups > w.groups;
    const bool offset_x = !floats && x.form.offset != 0;
    if (finer_x && plan->size % 32 != 0) return BQ_UNSUPPORTED;
    if (offset_x && plan->sums == nullptr) return BQ_UNSUPPORTED;
    if (!is_usual(w.form) || (!floats && !is_usual(x.form))) return BQ_UNSUPPORTED;
    plan->blocks = (plan->size + 31) / 32;
    plan->form_x = floats ? bq_form{1.0f, 1, 0} : x.form;
    plan->form_w = w.form;
    return BQ_OK;
}

// Dots of the levels' integers factor * a + offset with a = scale * v + offset of the layout.
Correction level_correction(const Plan &plan) {
    const bq_form &fx = plan.form_x;
    const int32_t scale = plan.form_w.factor * plan.layout.scale;
    const int32_t offset = plan.form_w.factor * plan.layout.offset + plan.form_w.offset;
    const auto constant = static_cast<uint32_t>(fx.offset * offset) * static_cast<uint32_t>(plan.size);
    return {log2_of(fx.factor * scale), fx.factor * offset, fx.offset != 0 ? log2_of(fx.offset * scale) : 0,
            fx.offset != 0, static_cast<int32_t>(constant)};
}

bool is_wide(const Plan &plan, const bq_weight &w) {
    if (plan.digits == 3) return false;  // a digit's dot is at most 255 * 128 * 65536, and `finish` scales digits itself
    if (plan.form_x.offset == 0 && w.form.offset == 0) return false;  // |a| <= 127: below 2^31 up to 2^17 elements
    return plan.size * 255 * 255 >= int64_t{1} << 31;
}

int32_t run(const bq_weight &w, const bq_activation &x, Plan *plan, int threads) {
    const bool tables = w.x_bits > 3 && wants_tables(*plan);  // fewer bits: planes are faster
    const bool planes = plan->layout.planes != 0 && !tables;
    const bool floats = plan->digits == 3;
    const bool expand = !planes && !floats && x.factors == nullptr;
    const bool own_sums = plan->correct.has_v && plan->groups > plan->layout.groups;
    const Tiling tiling = tables   ? tiling_of(plan->rows, 1)
                          : planes ? planes_tiling(plan->rows, plan->layout.bits, w.x_bits)
                                   : bytes_tiling(plan->rows);
    const int64_t words = tiling.padded() * plan->groups * plan->blocks * (planes ? w.x_bits : 8);
    const int64_t scales = x.rows * plan->x_groups;
    Memory memory;
    if (!memory.take(floats || expand ? plan->rows * w.width : 0, words, planes ? 0 : plan->rows * plan->groups, scales,
                     own_sums ? plan->layout.tiles * plan->groups * kLanes : 0)) {
        return BQ_NO_MEMORY;
    }
    // Waking a thread costs a microsecond or two: not for one row, nor for half a million products.
    const int packing = plan->rows * w.width > 65536 ? threads : 1;
    if (plan->rows * w.width * w.channels < 1 << 19) threads = 1;
    if (floats) split_floats(x, w.width, memory.factors, memory.scales, packing);
    const float *steps = floats ? memory.scales : x.step;
    const float unit = plan->form_x.unit * plan->form_w.unit;
    for (int64_t i = 0; i < scales && steps != nullptr; ++i) memory.scales[i] = steps[i] * unit;
    plan->x_scale = memory.scales;
    if (planes) {
        const int32_t levels = ((1 << plan->layout.bits) - 1) * ((1 << w.x_bits) - 1);
        plan->correct = {1, 0, 0, false, static_cast<int32_t>(levels * plan->size)};
        pack_planes(*plan, x, w.x_bits, tiling, memory.words, packing);
        run_planes(*plan, tiling, memory.words, w.x_bits, threads);
        return BQ_OK;
    }
    if (expand) expand_bits(x.packed, x.rows, w.width, memory.factors);
    pack_bytes(*plan, floats || expand ? memory.factors : x.factors, tables ? 8 : plan->layout.bits, tiling,
               memory.words, memory.a_sums, packing);
    const auto factor = static_cast<uint32_t>(plan->correct.a_factor);
    const auto constant = static_cast<uint32_t>(plan->correct.constant);
    for (int64_t i = 0; i < plan->rows * plan->groups; ++i) {  // modulo 2^32: exact, because the dot fits
        memory.terms[i] = static_cast<int32_t>(factor * static_cast<uint32_t>(memory.a_sums[i]) + constant);
    }
    plan->a_sums = memory.a_sums;
    plan->terms = memory.terms;
    if (own_sums) {
        sum_weights(*plan, memory.v_sums, threads);
        plan->sums = memory.v_sums;
        plan->sum_groups = plan->groups;
    }
    if (tables) return run_tables(*plan, memory.words, threads);
    run_bytes(*plan, tiling, memory.words, threads);
    return BQ_OK;
}

}  // namespace

int32_t payload_bytes(const bq_weight &w, int64_t *bytes) {
    if (w.width / w.groups > kLongestGroup) return BQ_UNSUPPORTED;
    ProductLayout layout;
    const int32_t done = product_layout(w, kLanes, wants_planes(w), &layout);
    *bytes = layout.bytes;
    return done;
}

int32_t prepare(const bq_weight &w, uint8_t *payload, int32_t threads) {
    ProductLayout layout;
    const int32_t done = product_layout(w, kLanes, wants_planes(w), &layout);
    return done != BQ_OK ? done : fill_layout(w, layout, payload, threads);
}

int32_t linear(const bq_weight &w, const uint8_t *payload, const bq_activation &x, const bq_output &output) {
    Plan plan{};
    const int32_t done = make_plan(w, payload, x, &plan);
    if (done != BQ_OK) return done;
    plan.output = output;
    plan.correct = level_correction(plan);
    plan.wide = is_wide(plan, w);
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
    plan.correct = level_correction(plan);
    return run(factors, x, &plan, threads);
}

}  // namespace bq::avx512
