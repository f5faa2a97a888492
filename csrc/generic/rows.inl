// Rows to codes in plain C++, written so that a compiler can vectorize it. Included by one translation unit per
// instruction set, which says BQ_SPACE. Compiled without contraction, so that every rounding is the definition's.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../kernels.h"
#include "floats.h"
#include "vector.h"

namespace bq::BQ_SPACE {
namespace {

constexpr int64_t kChunk = 128;  // the largest block of the rotation

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

// Sum of squares, sum of magnitudes, or the largest magnitude. Partial sums in float32 over 128 elements, then double:
// the result is good to a few units in the last place of a float32, whatever the width.
template <int32_t Scale>
double statistic_of(const float *x, int64_t count) {
    double total = 0;
    Integers most{};  // magnitudes as integers: ordered alike, and a NaN is above everything
    for (int64_t start = 0; start < count; start += kChunk) {
        const int64_t length = count - start < kChunk ? count - start : kChunk;
        const float *chunk = x + start;
        Floats part = all(0);
        int64_t k = 0;
        for (; k + kWide <= length; k += kWide) {
            const Floats value = load(chunk + k);
            if constexpr (Scale == BQ_SCALE_GAUSSIAN) part += value * value;
            if constexpr (Scale == BQ_SCALE_ABSMEAN) part += magnitude(value);
            if constexpr (Scale == BQ_SCALE_ABSMAX) most = larger(most, as_integers(magnitude(value)));
        }
        if (k < length) {
            float rest[kWide] = {};
            std::memcpy(rest, chunk + k, static_cast<size_t>(length - k) * sizeof(float));
            const Floats value = load(rest);
            if constexpr (Scale == BQ_SCALE_GAUSSIAN) part += value * value;
            if constexpr (Scale == BQ_SCALE_ABSMEAN) part += magnitude(value);
            if constexpr (Scale == BQ_SCALE_ABSMAX) most = larger(most, as_integers(magnitude(value)));
        }
        for (int i = 0; i < kWide; ++i) total += static_cast<double>(part[i]);
    }
    if constexpr (Scale != BQ_SCALE_ABSMAX) return total;
    int32_t largest = 0;
    for (int i = 0; i < kWide; ++i) largest = most[i] > largest ? most[i] : largest;
    return static_cast<double>(bits_to_float(static_cast<uint32_t>(largest)));
}

double statistic(const float *x, int64_t count, int32_t scale) {
    if (scale == BQ_SCALE_ABSMEAN) return statistic_of<BQ_SCALE_ABSMEAN>(x, count);
    if (scale == BQ_SCALE_ABSMAX) return statistic_of<BQ_SCALE_ABSMAX>(x, count);
    return statistic_of<BQ_SCALE_GAUSSIAN>(x, count);
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

// Blocks of 2^Log of the Sylvester-Hadamard transform over one chunk, in registers as far as they reach.
template <int Log>
void rotate_chunk(float *row) {
    constexpr int kParts = kChunk / kWide;
    Floats x[kParts];
    const Floats scale = all(static_cast<float>(1.0 / std::sqrt(static_cast<double>(1 << Log))));
    for (int i = 0; i < kParts; ++i) {
        x[i] = load(row + i * kWide);
        if constexpr (Log >= 1) x[i] = butterfly<1>(x[i]);
        if constexpr (Log >= 2) x[i] = butterfly<2>(x[i]);
        if constexpr (Log >= 3 && kWide > 4) x[i] = butterfly<4>(x[i]);
    }
    for (int apart = 1; apart < (1 << Log) / kWide; apart *= 2) {
        for (int i = 0; i < kParts; ++i) {
            if ((i & apart) != 0) continue;
            const Floats sum = x[i] + x[i + apart];
            x[i + apart] = x[i] - x[i + apart];
            x[i] = sum;
        }
    }
    for (int i = 0; i < kParts; ++i) store(row + i * kWide, x[i] * scale);
}

// The rotation of a row in place; behind its end there is room up to the next multiple of a chunk, which is overwritten.
void rotate_row(float *row, int64_t width, int32_t block) {
    if (block == 1) return;
    const int64_t padded = round_up(width, kChunk);
    for (int64_t k = width; k < padded; ++k) row[k] = 0;
    for (int64_t k = 0; k < width; k += kChunk) {
        switch (block) {
        case 2: rotate_chunk<1>(row + k); break;
        case 4: rotate_chunk<2>(row + k); break;
        case 8: rotate_chunk<3>(row + k); break;
        case 16: rotate_chunk<4>(row + k); break;
        case 32: rotate_chunk<5>(row + k); break;
        case 64: rotate_chunk<6>(row + k); break;
        default: rotate_chunk<7>(row + k); break;
        }
    }
}

// Adding and subtracting 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
constexpr float kRounder = 12582912.0f;

// The code u of values t in units of the step, and (where asked for) the level it stands for.
inline Integers code_of(const bq_quantizer &q, Floats t, Floats *nearest) {
    if (q.levels != 0) {
        Integers index{};
        for (int m = 0; m + 1 < q.levels; ++m) {
            const Integers beyond = t > all(q.middle[m]);
            index -= beyond;  // a true lane is -1
            if (nearest != nullptr) *nearest = choose(beyond, all(q.level[m + 1]), m == 0 ? all(q.level[0]) : *nearest);
        }
        return index;
    }
    if (q.bits == 1) {
        const Integers above = t > all(0);
        if (nearest != nullptr) *nearest = choose(above, all(0.5f), all(-0.5f));
        return -above;
    }
    const Floats half = all(static_cast<float>(1 << (q.bits - 1)));
    const Floats least = 1 - half;
    Floats up = t + 0.5f;
    up = choose(up > least, up, least);  // a NaN takes the lowest code
    up = choose(up < half, up, half);
    const Floats rounder = all(kRounder);
    const Floats shifted = up + rounder;
    if (nearest != nullptr) *nearest = (shifted - rounder) - 0.5f;
    return as_integers(shifted) - as_integers(rounder) + ((1 << (q.bits - 1)) - 1);
}

// u = c + 2^(bits - 1) of `length` values x, and which of them the gradient passes, as bytes 0 and 1. Arrays and x reach
// to the next multiple of kBytes.
void encode(const bq_quantizer &q, const float *x, int64_t length, float step, uint8_t *u, uint8_t *trusted) {
    const bool masked = trusted != nullptr;
    const bool by_range = q.mask == BQ_MASK_RANGE;
    // One bit is a sign: there the limits are multiplied instead of all values divided.
    const bool one_bit = q.levels == 0 && q.bits == 1 && (!masked || by_range);
    const Floats delta = all(one_bit ? 1 : step);
    const Floats low = all(one_bit ? q.mask_low * step : q.mask_low);
    const Floats high = all(one_bit ? q.mask_high * step : q.mask_high);
    for (int64_t k = 0; k < length; k += kBytes) {
        Integers codes[4];
        Integers passes[4];
        for (int i = 0; i < 4; ++i) {
            const Floats value = load(x + k + i * kWide);
            const Floats t = one_bit ? value : value / delta;
            Floats nearest;
            codes[i] = code_of(q, t, masked && !by_range ? &nearest : nullptr);
            if (!masked) continue;
            passes[i] = -(by_range ? (t >= low) & (t <= high) : magnitude(nearest - t) <= high);
        }
        store_bytes(u + k, codes);
        if (masked) store_bytes(trusted + k, passes);
    }
}

// Bits of `length` small integers, least significant first; the last byte is filled up with zeros. u reaches to the next
// multiple of eight. Eight at a time: neighbours are pushed together as bytes, then as pairs, then as fours.
template <int Bits>
void pack_bits(const uint8_t *u, int64_t length, uint8_t *out) {
    constexpr uint64_t one = Bits < 8 ? (1ull << Bits) - 1 : 0xff;
    constexpr uint64_t two = Bits < 8 ? (1ull << (2 * Bits)) - 1 : 0xffff;
    constexpr uint64_t four = Bits < 8 ? (1ull << (4 * Bits)) - 1 : 0xffffffff;
    for (int64_t k = 0; k < length; k += 8) {
        uint64_t word;
        std::memcpy(&word, u + k, sizeof word);
        const int64_t here = length - k;
        if (here < 8) word &= (1ull << (8 * here)) - 1;
        if constexpr (Bits == 1) {  // byte i times 2^(56 - 7i) is bit i of the last byte
            *out++ = static_cast<uint8_t>((word * 0x0102040810204080ull) >> 56);
            continue;
        }
        word = (word & (one * 0x0001000100010001ull)) | ((word >> (8 - Bits)) & ((one << Bits) * 0x0001000100010001ull));
        word = (word & (two * 0x0000000100000001ull)) |
               ((word >> (16 - 2 * Bits)) & ((two << (2 * Bits)) * 0x0000000100000001ull));
        if constexpr (Bits < 8) word = (word & four) | ((word >> (32 - 4 * Bits)) & (four << (4 * Bits)));
        const int64_t bytes = here < 8 ? (here * Bits + 7) / 8 : Bits;
        std::memcpy(out, &word, static_cast<size_t>(bytes));
        out += bytes;
    }
}

void pack(const uint8_t *u, int64_t length, int bits, uint8_t *out) {
    switch (bits) {
    case 1: return pack_bits<1>(u, length, out);
    case 2: return pack_bits<2>(u, length, out);
    case 3: return pack_bits<3>(u, length, out);
    case 4: return pack_bits<4>(u, length, out);
    case 5: return pack_bits<5>(u, length, out);
    case 6: return pack_bits<6>(u, length, out);
    case 7: return pack_bits<7>(u, length, out);
    default: std::memcpy(out, u, static_cast<size_t>(length));
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
    // Groups that are no multiple of 8 would share bytes of packed codes: a whole row is encoded, then packed.
    uint8_t *codes = reinterpret_cast<uint8_t *>(row + round_up(width, kChunk));
    uint8_t *trusted = codes + round_up(width, kChunk) + kBytes;
    for (int64_t g = 0; g < groups; ++g) {
        float *x = row + g * q.group;
        const float step = q.scale == BQ_SCALE_GIVEN ? r.given_step[t * r.given_stride + g] : step_of(q, x, q.group);
        if (r.step != nullptr) r.step[t * groups + g] = step;
        // What reaches beyond the group writes codes there, which the next group overwrites: groups go in order.
        const int64_t at = g * q.group;
        encode(q, x, q.group, step, codes + at, r.mask == nullptr ? nullptr : trusted + at);
    }
    if (r.packed != nullptr) pack(codes, width, q.bits, r.packed + t * packed_bytes);
    if (r.mask != nullptr) pack(trusted, width, 1, r.mask + t * mask_bytes);
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

size_t row_bytes(int64_t width) {
    const int64_t padded = round_up(width, kChunk);
    return static_cast<size_t>(padded) * sizeof(float) + 2 * static_cast<size_t>(padded + kBytes);
}

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
    const uint32_t all_bits = (1u << bits) - 1;
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        float *row = static_cast<float *>(scratch(2, row_bytes(width)));
        if (row == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t *from = packed + t * bytes;
            for (int64_t k = 0; k < width; k += 8) {  // eight codes are `bits` bytes
                const int64_t left = bytes - k / 8 * bits;
                uint64_t word = 0;
                for (int64_t i = 0; i < bits && i < left; ++i) word |= static_cast<uint64_t>(from[k / 8 * bits + i]) << (8 * i);
                for (int64_t i = 0; i < 8; ++i) row[k + i] = levels[(word >> (i * bits)) & all_bits];
            }
            for (int64_t g = 0; g < groups; ++g) {
                const float delta = step[t * groups + g];
                for (int64_t k = g * group; k < (g + 1) * group; ++k) row[k] *= delta;
            }
            store_row(out, out_dtype, t * width, width, row);
        }
    };
    parallel_for(threads, rows, 1, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

}  // namespace bq::BQ_SPACE
