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

struct Memory {
    int8_t *factors;   // bits expanded, or digits
    int32_t *words;
    int32_t *a_sums;
    float *steps;      // of digits
};

bool take_memory(int64_t rows, int64_t width, int64_t x_words, int64_t sums, Memory *memory) {
    const int64_t factors = round_up(rows * width, 64);
    const int64_t words = round_up(x_words * 4, 64);
    const int64_t a_sums = round_up(sums * 4, 64);
    auto *all = static_cast<uint8_t *>(scratch(0, static_cast<size_t>(factors + words + a_sums + rows * 4)));
    if (all == nullptr) return false;
    memory->factors = reinterpret_cast<int8_t *>(all);
    memory->words = reinterpret_cast<int32_t *>(all + factors);
    memory->a_sums = reinterpret_cast<int32_t *>(all + factors + words);
    memory->steps = reinterpret_cast<float *>(all + factors + words + a_sums);
    return true;
}

// BQ_UNSUPPORTED: groupings whose blocks do not line up.
int32_t make_plan(const bq_weight &w, const uint8_t *payload, const bq_activation &x, Plan *plan) {
    ProductLayout &l = plan->layout;
    std::memcpy(&l, payload, sizeof(l));
    const bool floats = w.x_bits == 16;
    plan->words = payload + kLayoutBytes;
    plan->sums = l.has_sums != 0 ? reinterpret_cast<const int32_t *>(payload + l.sums_at) : nullptr;
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
    if (finer_x && (plan->size % 32 != 0 || offset_x)) return BQ_UNSUPPORTED;  // sums of v are per group of the weight
    if (offset_x && plan->sums == nullptr) return BQ_UNSUPPORTED;
    plan->blocks = (plan->size + 31) / 32;
    plan->form_x = floats ? bq_form{1.0f, 1, 0} : x.form;
    plan->form_w = w.form;
    plan->unit = plan->form_x.unit * w.form.unit;
    plan->x_step = x.step;
    return BQ_OK;
}

// Dots of the levels' integers factor * a + offset with a = scale * v + offset of the layout.
Correction level_correction(const Plan &plan) {
    const bq_form &fx = plan.form_x;
    const int32_t scale = plan.form_w.factor * plan.layout.scale;
    const int32_t offset = plan.form_w.factor * plan.layout.offset + plan.form_w.offset;
    const auto size = static_cast<uint32_t>(plan.size);
    return {fx.factor * scale, fx.factor * offset, fx.offset * scale,
            static_cast<int32_t>(static_cast<uint32_t>(fx.offset * offset) * size)};
}

bool is_wide(const Plan &plan, const bq_weight &w) {
    if (plan.form_x.offset == 0 && w.form.offset == 0) return false;  // |a| <= 127: below 2^31 up to 2^17 elements
    return plan.size * 255 * 255 >= int64_t{1} << 31;
}

int32_t run(const bq_weight &w, const bq_activation &x, Plan *plan, int threads) {
    const bool planes = plan->layout.planes != 0;
    const Tiling tiling = planes ? planes_tiling(plan->rows, plan->layout.bits, w.x_bits) : bytes_tiling(plan->rows);
    const int64_t block_words = planes ? w.x_bits : 8;
    const bool expand = !planes && plan->digits == 1 && x.factors == nullptr;
    Memory memory{};
    if (!take_memory(plan->digits == 3 || expand ? plan->rows : 0, w.width,
                     tiling.padded() * plan->groups * plan->blocks * block_words, plan->rows * plan->groups, &memory)) {
        return BQ_NO_MEMORY;
    }
    // Waking threads costs more than packing one row.
    const int packing = plan->rows * w.width > 65536 ? threads : 1;
    if (planes) {
        const int32_t levels = ((1 << plan->layout.bits) - 1) * ((1 << w.x_bits) - 1);
        plan->correct = {-2, 0, 0, static_cast<int32_t>(levels * plan->size)};
        plan->a_sums = nullptr;
        pack_planes(*plan, x, w.x_bits, tiling, memory.words, packing);
        return run_planes(*plan, tiling, memory.words, w.x_bits, threads);
    }
    const int8_t *factors = x.factors;
    if (plan->digits == 3) {
        split_floats(x, w.width, memory.factors, memory.steps, packing);
        factors = memory.factors;
        plan->x_step = memory.steps;
    } else if (expand) {
        expand_bits(x.packed, x.rows, w.width, memory.factors);
        factors = memory.factors;
    }
    pack_bytes(*plan, factors, tiling, memory.words, memory.a_sums, packing);
    plan->a_sums = memory.a_sums;
    return run_bytes(*plan, tiling, memory.words, threads);
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
