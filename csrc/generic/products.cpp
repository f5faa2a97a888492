// The products in portable C++: int8 factors and exact sums. Slow, and the measure of every other table.
//
// The payload: int8 factors (N, K), then float32 steps (N, G), then int64 sums of the factors (N, G).
#include <cstring>

#include "../kernels.h"
#include "floats.h"

namespace bq {

void weight_factors(const bq_weight &weight, int64_t channel, int8_t *factors) {
    const int64_t width = weight.width;
    if (weight.factors != nullptr) {
        std::memcpy(factors, weight.factors + channel * width, static_cast<size_t>(width));
        return;
    }
    const int64_t bytes = (width * weight.bits + 7) / 8;
    const uint8_t *from = weight.packed + channel * bytes;
    const uint8_t *kept = weight.kept == nullptr ? nullptr : weight.kept + channel * width;
    const uint32_t all = (1u << weight.bits) - 1;
    const int lowest = 1 - (1 << weight.bits);
    for (int64_t k = 0; k < width; ++k) {
        const int64_t bit = k * weight.bits;
        uint32_t word = from[bit / 8];
        if (bit % 8 + weight.bits > 8) word |= static_cast<uint32_t>(from[bit / 8 + 1]) << 8;
        const uint32_t u = (word >> (bit % 8)) & all;
        int a = weight.integer != nullptr ? weight.integer[u]
                : weight.bits == 8        ? static_cast<int>(u) - 128
                                          : 2 * static_cast<int>(u) + lowest;
        if (kept != nullptr && kept[k] == 0) a = 0;
        factors[k] = static_cast<int8_t>(a);
    }
}

namespace portable {
namespace {

struct Layout {
    int64_t steps;  // offsets in bytes
    int64_t sums;
    int64_t bytes;

    explicit Layout(const bq_weight &w)
        : steps(round_up(w.channels * w.width, 64)),
          sums(round_up(steps + w.channels * w.groups * 4, 64)),
          bytes(round_up(sums + w.channels * w.groups * 8, 64)) {}
};

// A row of the activation as int8 factors.
const int8_t *activation_row(const bq_activation &x, int64_t t, int64_t width, int8_t *spare) {
    if (x.factors != nullptr) return x.factors + t * width;
    const uint8_t *bits = x.packed + t * ((width + 7) / 8);
    for (int64_t k = 0; k < width; ++k) spare[k] = ((bits[k / 8] >> (k % 8)) & 1) != 0 ? 1 : -1;
    return spare;
}

int64_t dot(const int8_t *a, const int8_t *b, int64_t count) {
    int64_t total = 0;
    for (int64_t start = 0; start < count; start += 65536) {  // 2^16 products of 2^14 fit 31 bits
        const int64_t end = start + 65536 < count ? start + 65536 : count;
        int32_t part = 0;
        for (int64_t k = start; k < end; ++k) part += a[k] * b[k];
        total += part;
    }
    return total;
}

}  // namespace

int32_t payload_bytes(const bq_weight &weight, int64_t *bytes) {
    *bytes = Layout(weight).bytes;
    return BQ_OK;
}

int32_t prepare(const bq_weight &w, uint8_t *payload, int32_t threads) {
    const Layout layout(w);
    std::memset(payload, 0, static_cast<size_t>(layout.bytes));  // the gaps too: equal weights are equal bytes
    auto *steps = reinterpret_cast<float *>(payload + layout.steps);
    auto *sums = reinterpret_cast<int64_t *>(payload + layout.sums);
    const int64_t group = w.width / w.groups;
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; ++n) {
            auto *row = reinterpret_cast<int8_t *>(payload) + n * w.width;
            weight_factors(w, n, row);
            for (int64_t g = 0; g < w.groups; ++g) {
                steps[n * w.groups + g] = w.step[n * w.groups + g];
                int64_t sum = 0;
                for (int64_t k = 0; k < group; ++k) sum += row[g * group + k];
                sums[n * w.groups + g] = sum;
            }
        }
    };
    parallel_for(threads, w.channels, 16, share);
    return BQ_OK;
}

int32_t linear(const bq_weight &w, const uint8_t *payload, const bq_activation &x, const bq_output &output) {
    const Layout layout(w);
    const auto *steps = reinterpret_cast<const float *>(payload + layout.steps);
    const bool floats = w.x_bits == 16;
    const int64_t x_groups = floats ? w.groups : x.groups;
    const int64_t groups = x_groups > w.groups ? x_groups : w.groups;
    const int64_t group = w.width / groups;
    const float unit = floats ? w.form.unit : x.form.unit * w.form.unit;
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        auto *spare = static_cast<int8_t *>(scratch(0, static_cast<size_t>(w.width)));
        if (spare == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t t = 0; t < x.rows; ++t) {
            const int8_t *a = floats ? nullptr : activation_row(x, t, w.width, spare);
            for (int64_t n = begin; n < end; ++n) {
                const int8_t *b = reinterpret_cast<const int8_t *>(payload) + n * w.width;
                float total = 0;
                for (int64_t g = 0; g < groups; ++g) {
                    const int64_t at = g * group;
                    const float w_step = steps[n * w.groups + g * w.groups / groups];
                    if (floats) {
                        double part = 0;
                        for (int64_t k = at; k < at + group; ++k) {
                            const float level = static_cast<float>(w.form.factor * b[k] + w.form.offset);
                            part += static_cast<double>(x.values[t * x.values_stride + k]) * level;
                        }
                        total += static_cast<float>(part) * (w_step * unit);
                        continue;
                    }
                    int64_t exact = dot(a + at, b + at, group) * x.form.factor * w.form.factor;
                    if (w.form.offset != 0 || x.form.offset != 0) {
                        int64_t a_sum = 0;
                        int64_t b_sum = 0;
                        for (int64_t k = at; k < at + group; ++k) {
                            a_sum += a[k];
                            b_sum += b[k];
                        }
                        exact += a_sum * x.form.factor * w.form.offset + b_sum * x.form.offset * w.form.factor;
                        exact += group * x.form.offset * w.form.offset;
                    }
                    const float x_step = x.step[t * x_groups + g * x_groups / groups];
                    total += static_cast<float>(exact) * (x_step * unit) * w_step;
                }
                if (output.bias != nullptr) total += output.bias[n];
                store_float(output.out, output.dtype, t * output.stride + n, total);
            }
        }
    };
    parallel_for(output.threads, w.channels, 16, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

int32_t product(const bq_weight &w, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads) {
    const int64_t groups = x.groups > w.groups ? x.groups : w.groups;
    const int64_t group = w.width / groups;
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        auto *spare = static_cast<int8_t *>(scratch(0, static_cast<size_t>(w.width)));
        if (spare == nullptr) {
            failed[thread] = BQ_NO_MEMORY;
            return;
        }
        for (int64_t t = 0; t < x.rows; ++t) {
            const int8_t *a = activation_row(x, t, w.width, spare);
            for (int64_t g = 0; g < groups; ++g) {
                for (int64_t n = begin; n < end; ++n) {
                    const int8_t *b = reinterpret_cast<const int8_t *>(payload) + n * w.width;
                    out[(t * groups + g) * w.channels + n] =
                        static_cast<int32_t>(dot(a + g * group, b + g * group, group));
                }
            }
        }
    };
    parallel_for(threads, w.channels, 16, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

}  // namespace portable
}  // namespace bq
