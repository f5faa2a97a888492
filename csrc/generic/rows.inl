// Rows to codes in plain C++, written so that a compiler can vectorize it. Included by one translation unit per
// instruction set, which says BQ_SPACE. Compiled without contraction, so that every rounding is the definition's.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "floats.h"

namespace bq::BQ_SPACE {
namespace {

constexpr int64_t kChunk = 128;  // elements worked on at a time: the largest block of the rotation

void load_row(const void *x, int32_t dtype, int64_t offset, int64_t width, float *row) {
    switch (dtype) {
    case BQ_FLOAT32: std::memcpy(row, static_cast<const float *>(x) + offset, width * sizeof(float)); break;
    case BQ_BFLOAT16: {
        const uint16_t *from = static_cast<const uint16_t *>(x) + offset;
        for (int64_t k = 0; k < width; ++k) row[k] = from_bfloat16(from[k]);
        break;
    }
    default: {
        const uint16_t *from = static_cast<const uint16_t *>(x) + offset;
        for (int64_t k = 0; k < width; ++k) row[k] = from_float16(from[k]);
    }
    }
}

void store_row(void *out, int32_t dtype, int64_t offset, int64_t width, const float *row) {
    switch (dtype) {
    case BQ_FLOAT32: std::memcpy(static_cast<float *>(out) + offset, row, width * sizeof(float)); break;
    case BQ_BFLOAT16: {
        uint16_t *to = static_cast<uint16_t *>(out) + offset;
        for (int64_t k = 0; k < width; ++k) to[k] = to_bfloat16(row[k]);
        break;
    }
    default: {
        uint16_t *to = static_cast<uint16_t *>(out) + offset;
        for (int64_t k = 0; k < width; ++k) to[k] = to_float16(row[k]);
    }
    }
}

// Sums of squares, of magnitudes, or the largest magnitude. Partial sums in float32 over 128 elements, then double:
// the result is good to a few units in the last place of a float32, whatever the width.
double statistic(const float *x, int64_t count, int32_t scale) {
    constexpr int kLanes = 16;
    double total = 0;
    float largest[kLanes] = {};
    for (int64_t start = 0; start < count; start += kChunk) {
        const int64_t length = count - start < kChunk ? count - start : kChunk;
        float part[kLanes] = {};
        const float *chunk = x + start;
        int64_t k = 0;
        for (; k + kLanes <= length; k += kLanes) {
            for (int i = 0; i < kLanes; ++i) {
                const float value = chunk[k + i];
                const float magnitude = std::fabs(value);
                if (scale == BQ_SCALE_GAUSSIAN) part[i] += value * value;
                else if (scale == BQ_SCALE_ABSMEAN) part[i] += magnitude;
                else largest[i] = magnitude > largest[i] || magnitude != magnitude ? magnitude : largest[i];
            }
        }
        for (; k < length; ++k) {
            const float value = chunk[k];
            const float magnitude = std::fabs(value);
            if (scale == BQ_SCALE_GAUSSIAN) part[0] += value * value;
            else if (scale == BQ_SCALE_ABSMEAN) part[0] += magnitude;
            else largest[0] = magnitude > largest[0] || magnitude != magnitude ? magnitude : largest[0];
        }
        for (int i = 0; i < kLanes; ++i) total += static_cast<double>(part[i]);
    }
    if (scale != BQ_SCALE_ABSMAX) return total;
    double most = 0;
    for (int i = 0; i < kLanes; ++i) {
        const double lane = largest[i];
        if (lane > most || lane != lane) most = lane;
    }
    return most;
}

float step_of(const bq_quantizer &q, const float *x, int64_t count) {
    double value = statistic(x, count, q.scale);
    if (q.scale == BQ_SCALE_GAUSSIAN) value = std::sqrt(value / static_cast<double>(count));
    if (q.scale == BQ_SCALE_ABSMEAN) value /= static_cast<double>(count);
    return (static_cast<float>(value) * q.multiplier + q.epsilon) / q.max_level;
}

void apply_prologue(const bq_prologue *prologue, int32_t dtype, int64_t row_index, int64_t width, float *row) {
    if (prologue == nullptr) return;
    if (prologue->kind == BQ_PROLOGUE_RMSNORM) {
        const double mean = statistic(row, width, BQ_SCALE_GAUSSIAN) / static_cast<double>(width);
        const float inverse = 1.0f / std::sqrt(static_cast<float>(mean) + prologue->epsilon);
        for (int64_t k = 0; k < width; ++k) row[k] = row[k] * inverse * prologue->weight[k];
        return;
    }
    const int64_t offset = row_index * prologue->up_stride;
    for (int64_t k = 0; k < width; ++k) {
        row[k] = row[k] / (1.0f + std::exp(-row[k])) * load_float(prologue->up, dtype, offset + k);
    }
}

// Blocks of the Sylvester-Hadamard transform, in place; width is a multiple of block.
void rotate_row(float *row, int64_t width, int32_t block) {
    if (block == 1) return;
    for (int half = 1; half < block; half *= 2) {
        for (int64_t start = 0; start < width; start += 2 * half) {
            float *a = row + start;
            float *b = a + half;
            for (int i = 0; i < half; ++i) {
                const float sum = a[i] + b[i];
                b[i] = a[i] - b[i];
                a[i] = sum;
            }
        }
    }
    const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
    for (int64_t k = 0; k < width; ++k) row[k] *= scale;
}

// Adding and subtracting 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
constexpr float kRounder = 12582912.0f;

// u = c + 2^(bits - 1) of up to 128 values in units of the step, and which of them the gradient passes.
void encode_chunk(const bq_quantizer &q, const float *t, int64_t length, uint8_t *u, uint8_t *trusted) {
    float nearest[kChunk];
    if (q.levels != 0) {
        for (int64_t k = 0; k < length; ++k) {
            int index = 0;
            for (int m = 0; m + 1 < q.levels; ++m) index += t[k] > q.middle[m];
            u[k] = static_cast<uint8_t>(index);
            nearest[k] = q.level[index];
        }
    } else if (q.bits == 1) {
        for (int64_t k = 0; k < length; ++k) {
            u[k] = t[k] > 0;
            nearest[k] = t[k] > 0 ? 0.5f : -0.5f;
        }
    } else {
        const float half = static_cast<float>(1 << (q.bits - 1));
        const int32_t shift = (1 << (q.bits - 1)) - 1;
        for (int64_t k = 0; k < length; ++k) {
            float up = t[k] + 0.5f;
            up = up > 1 - half ? up : 1 - half;  // a NaN takes the lowest code
            up = up < half ? up : half;
            const float rounded = (up + kRounder) - kRounder;
            u[k] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + shift);
            nearest[k] = rounded - 0.5f;
        }
    }
    if (trusted == nullptr) return;
    if (q.mask == BQ_MASK_RANGE) {
        for (int64_t k = 0; k < length; ++k) trusted[k] = (t[k] >= q.mask_low) & (t[k] <= q.mask_high);
    } else {
        for (int64_t k = 0; k < length; ++k) trusted[k] = std::fabs(nearest[k] - t[k]) <= q.mask_high;
    }
}

// Bits of `length` small integers, least significant first; the last byte is filled up with zeros.
void pack_chunk(const uint8_t *u, int64_t length, int bits, uint8_t *out) {
    for (int64_t k = 0; k < length; k += 8) {
        const int64_t here = length - k < 8 ? length - k : 8;
        uint64_t word = 0;
        for (int64_t i = 0; i < here; ++i) word |= static_cast<uint64_t>(u[k + i]) << (i * bits);
        const int64_t bytes = (here * bits + 7) / 8;
        for (int64_t i = 0; i < bytes; ++i) *out++ = static_cast<uint8_t>(word >> (8 * i));
    }
}

void factors_of(const bq_quantizer &q, const uint8_t *u, int64_t length, int8_t *a) {
    if (q.levels != 0) {
        for (int64_t k = 0; k < length; ++k) a[k] = q.integer[u[k]];
    } else if (q.bits == 8) {
        for (int64_t k = 0; k < length; ++k) a[k] = static_cast<int8_t>(u[k] ^ 0x80);
    } else {
        const int lowest = 1 - (1 << q.bits);
        for (int64_t k = 0; k < length; ++k) a[k] = static_cast<int8_t>(2 * u[k] + lowest);
    }
}

void quantize_row(const bq_quantizer &q, const bq_rows &r, int64_t t, float *row) {
    const int64_t width = r.width;
    load_row(r.x, r.x_dtype, t * r.x_stride, width, row);
    apply_prologue(r.prologue, r.x_dtype, t, width, row);
    rotate_row(row, width, q.block);
    const int64_t groups = width / q.group;
    const int64_t packed_bytes = (width * q.bits + 7) / 8;
    const int64_t mask_bytes = (width + 7) / 8;
    // A chunk never crosses a group; groups that are no multiple of 8 would share bytes of packed codes, so codes of a
    // whole row are gathered first and packed after.
    uint8_t *codes = reinterpret_cast<uint8_t *>(row + round_up(width, kChunk));
    uint8_t *trusted = codes + round_up(width, kChunk);
    for (int64_t g = 0; g < groups; ++g) {
        float *x = row + g * q.group;
        const float step = q.scale == BQ_SCALE_GIVEN ? r.given_step[t * r.given_stride + g] : step_of(q, x, q.group);
        if (r.step != nullptr) r.step[t * groups + g] = step;
        for (int64_t k = 0; k < q.group; ++k) x[k] /= step;
        for (int64_t k = 0; k < q.group; k += kChunk) {
            const int64_t length = q.group - k < kChunk ? q.group - k : kChunk;
            const int64_t at = g * q.group + k;
            encode_chunk(q, x + k, length, codes + at, r.mask == nullptr ? nullptr : trusted + at);
        }
    }
    if (r.packed != nullptr) pack_chunk(codes, width, q.bits, r.packed + t * packed_bytes);
    if (r.mask != nullptr) pack_chunk(trusted, width, 1, r.mask + t * mask_bytes);
    if (r.factors == nullptr && r.sums == nullptr) return;
    int8_t *a = r.factors != nullptr ? r.factors + t * width : reinterpret_cast<int8_t *>(trusted);
    factors_of(q, codes, width, a);
    if (r.sums == nullptr) return;
    for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t k = 0; k < q.group; ++k) sum += a[g * q.group + k];
        r.sums[t * groups + g] = sum;
    }
}

constexpr size_t row_bytes(int64_t width) { return static_cast<size_t>(width + kChunk) * (sizeof(float) + 2); }

}  // namespace

int32_t quantize_rows(const bq_quantizer &q, const bq_rows &r) {
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        float *row = static_cast<float *>(scratch(2, row_bytes(r.width)));
        if (row == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t t = begin; t < end; ++t) quantize_row(q, r, t, row);
    };
    parallel_for(r.threads, r.rows, 1, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

int32_t rotate_rows(const void *x, int64_t x_stride, int32_t x_dtype, int64_t rows, int64_t width, int32_t block,
                    const bq_prologue *prologue, void *out, int32_t out_dtype, int32_t threads) {
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        float *row = static_cast<float *>(scratch(2, row_bytes(width)));
        if (row == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t t = begin; t < end; ++t) {
            load_row(x, x_dtype, t * x_stride, width, row);
            apply_prologue(prologue, x_dtype, t, width, row);
            rotate_row(row, width, block);
            store_row(out, out_dtype, t * width, width, row);
        }
    };
    parallel_for(threads, rows, 1, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

int32_t mask_rotate(const void *gradient, int64_t stride, int32_t dtype, const uint8_t *mask, int64_t rows,
                    int64_t width, int32_t block, void *out, int32_t out_dtype, int32_t threads) {
    const int64_t mask_bytes = (width + 7) / 8;
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        float *row = static_cast<float *>(scratch(2, row_bytes(width)));
        if (row == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t t = begin; t < end; ++t) {
            load_row(gradient, dtype, t * stride, width, row);
            if (mask != nullptr) {
                const uint8_t *bits = mask + t * mask_bytes;
                // A product, as in the definition: a NaN or an infinity stays visible where the gradient is stopped.
                for (int64_t k = 0; k < width; ++k) row[k] *= static_cast<float>((bits[k / 8] >> (k % 8)) & 1);
            }
            rotate_row(row, width, block);
            store_row(out, out_dtype, t * width, width, row);
        }
    };
    parallel_for(threads, rows, 1, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

int32_t dequantize_rows(const uint8_t *packed, int32_t bits, const float *levels, const float *step, int64_t groups,
                        int64_t rows, int64_t width, void *out, int32_t out_dtype, int32_t threads) {
    const int64_t bytes = (width * bits + 7) / 8;
    const int64_t group = width / groups;
    const uint32_t all = (1u << bits) - 1;
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t *from = packed + t * bytes;
            for (int64_t g = 0; g < groups; ++g) {
                const float delta = step[t * groups + g];
                for (int64_t k = g * group; k < (g + 1) * group; ++k) {
                    const int64_t bit = k * bits;
                    uint32_t word = from[bit / 8];
                    if (bit % 8 + bits > 8) word |= static_cast<uint32_t>(from[bit / 8 + 1]) << 8;
                    store_float(out, out_dtype, t * width + k, levels[(word >> (bit % 8)) & all] * delta);
                }
            }
        }
    };
    parallel_for(threads, rows, 1, share);
    return BQ_OK;
}

}  // namespace bq::BQ_SPACE
