// Rows to outputs in one call, so that a decoding step pays for one crossing of the interface and not for three.
#include "kernels.h"

using namespace bq;

namespace {

constexpr int64_t kMostBytes = 16 << 20;

// Parts of the scratch memory, each on 64 bytes.
struct Parts {
    int64_t bytes = 0;

    int64_t add(int64_t size) {
        const int64_t at = bytes;
        bytes += round_up(size, 64);
        return at;
    }
};

}  // namespace

int32_t bq_quantized_linear(const bq_quantizer *quantizer, const bq_rows *rows, const bq_form *form, int32_t count,
                            const void *const *prepared, const int64_t *prepared_bytes, const bq_output *outputs) {
    if (quantizer == nullptr || rows == nullptr || form == nullptr || count < 1) return BQ_BAD_ARGUMENT;
    if (prepared == nullptr || prepared_bytes == nullptr || outputs == nullptr) return BQ_BAD_ARGUMENT;
    bool floats = false;
    bool packed = false;
    bool factors = false;
    bool sums = false;
    for (int32_t i = 0; i < count; ++i) {
        const PreparedHeader *header = prepared_header(prepared[i], prepared_bytes[i]);
        if (header == nullptr || header->weight.width != rows->width) return BQ_BAD_ARGUMENT;
        const bq_weight &w = header->weight;
        if (i > 0 && floats != (w.x_bits == 16)) return BQ_BAD_ARGUMENT;
        floats = w.x_bits == 16;
        if (!floats && w.x_bits != quantizer->bits) return BQ_BAD_ARGUMENT;
        (w.x_bits == 1 ? packed : factors) = true;
        sums = sums || w.form.offset != 0;
    }
    const int64_t tokens = rows->rows;
    const int64_t width = rows->width;
    if (tokens < 0 || width < 1 || quantizer->group < 0) return BQ_BAD_ARGUMENT;
    if (tokens == 0) return BQ_OK;
    const int64_t groups = quantizer->group == 0 ? 1 : width / quantizer->group;
    if (tokens > kMostBytes / width) return BQ_UNSUPPORTED;  // before the sizes below could overflow
    Parts parts;
    const int64_t values_at = parts.add(floats ? tokens * width * 4 : 0);
    const int64_t factors_at = parts.add(!floats && factors ? tokens * width : 0);
    const int64_t packed_at = parts.add(!floats && packed ? tokens * ((width + 7) / 8) : 0);
    const int64_t sums_at = parts.add(!floats && sums ? tokens * groups * 4 : 0);
    const int64_t step_at = parts.add(floats ? 0 : tokens * groups * 4);
    if (parts.bytes > kMostBytes) return BQ_UNSUPPORTED;
    auto *memory = static_cast<uint8_t *>(scratch(3, static_cast<size_t>(parts.bytes)));
    if (memory == nullptr) return BQ_NO_MEMORY;

    bq_activation x{};
    x.rows = tokens;
    x.width = width;
    x.groups = groups;
    x.form = *form;
    int32_t done;
    if (floats) {
        auto *values = reinterpret_cast<float *>(memory + values_at);
        done = bq_rotate_rows(rows->x, rows->x_stride, rows->x_dtype, tokens, width, quantizer->block, rows->prologue,
                              values, BQ_FLOAT32, rows->threads);
        x.values = values;
        x.groups = 1;
    } else {
        bq_rows made = *rows;
        made.factors = factors ? reinterpret_cast<int8_t *>(memory + factors_at) : nullptr;
        made.packed = packed ? memory + packed_at : nullptr;
        made.mask = nullptr;
        made.sums = sums ? reinterpret_cast<int32_t *>(memory + sums_at) : nullptr;
        made.step = reinterpret_cast<float *>(memory + step_at);
        done = bq_quantize_rows(quantizer, &made);
        x.factors = made.factors;
        x.packed = made.packed;
        x.sums = made.sums;
        x.step = made.step;
    }
    for (int32_t i = 0; i < count && done == BQ_OK; ++i) {
        done = bq_linear(prepared[i], prepared_bytes[i], &x, &outputs[i]);
    }
    return done;
}
