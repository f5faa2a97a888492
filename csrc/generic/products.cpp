// The products in portable C++, and the measure of every other table: exact sums of int16 factors, or of bits.
//
// Two payloads, both behind a ProductLayout, whose `planes` tells which it is:
//   factors  int8 factors (N, K), then float32 steps (N, G).
//   bits     dense uniform 1-bit weights for uniform activations of 1 to 4 bits: layout.h with one lane, so that the
//            words of a channel follow one another; planes of the activation are counted against them.
#include <cstring>

#include "../layout.h"
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

constexpr int64_t kRowsAtOnce = 4;  // rows of the activation that meet a row of the weight while it is at hand

struct Layout {
    int64_t steps;  // offset in bytes
    int64_t bytes;

    explicit Layout(const bq_weight &w)
        : steps(kLayoutBytes + round_up(w.channels * w.width, 64)),
          bytes(round_up(steps + w.channels * w.groups * 4, 64)) {}
};

bool wants_bits(const bq_weight &w) {
    return w.bits == 1 && w.x_bits <= 4 && w.x_uniform != 0 && w.sparse == 0 && w.integer == nullptr;
}

ProductLayout layout_of(const uint8_t *payload) {
    ProductLayout layout;
    std::memcpy(&layout, payload, sizeof(layout));
    return layout;
}

// Row t of the activation as int16 factors.
void factor_row(const bq_activation &x, int64_t t, int64_t width, int16_t *row) {
    if (x.factors != nullptr) {
        for (int64_t k = 0; k < width; ++k) row[k] = x.factors[t * width + k];
        return;
    }
    const uint8_t *bits = x.packed + t * ((width + 7) / 8);
    for (int64_t k = 0; k < width; ++k) row[k] = ((bits[k / 8] >> (k % 8)) & 1) != 0 ? 1 : -1;
}

int64_t dot(const int16_t *a, const int16_t *b, int64_t count) {
    int64_t total = 0;
    for (int64_t start = 0; start < count; start += 65536) {  // 2^16 products of 2^14 fit 31 bits
        const int64_t end = start + 65536 < count ? start + 65536 : count;
        int32_t part = 0;
        for (int64_t k = start; k < end; ++k) part += a[k] * b[k];
        total += part;
    }
    return total;
}

int64_t sum_of(const int16_t *a, int64_t count) {
    int32_t total = 0;  // K < 2^17, |a| <= 2^7
    for (int64_t k = 0; k < count; ++k) total += a[k];
    return total;
}

// How many bits of a and b differ.
int64_t count_different(const uint32_t *a, const uint32_t *b, int64_t words) {
    int64_t total = 0;
    for (int64_t start = 0; start < words; start += 16) {
        const int64_t end = start + 16 < words ? start + 16 : words;
        uint32_t bytes = 0;  // a count of at most 16 * 8 in each
        for (int64_t w = start; w < end; ++w) {
            uint32_t x = a[w] ^ b[w];
            x -= (x >> 1) & 0x55555555u;
            x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
            bytes += (x + (x >> 4)) & 0x0f0f0f0fu;
        }
        bytes = (bytes & 0x00ff00ffu) + ((bytes >> 8) & 0x00ff00ffu);
        total += (bytes & 0xffffu) + (bytes >> 16);
    }
    return total;
}

// The planes of row t: word[plane][group][block], as the words of a channel.
void plane_row(const bq_activation &x, int64_t t, int64_t width, int64_t groups, int32_t planes, uint32_t *words) {
    const int64_t size = width / groups, blocks = (size + 31) / 32;
    std::memset(words, 0, static_cast<size_t>(planes * groups * blocks) * 4);
    const uint8_t *packed = x.packed == nullptr ? nullptr : x.packed + t * ((width + 7) / 8);
    for (int64_t k = 0; k < width; ++k) {
        // 2u = a + 2^planes - 1
        const uint32_t u = packed != nullptr
                               ? (packed[k / 8] >> (k % 8)) & 1u
                               : static_cast<uint32_t>(x.factors[t * width + k] + (1 << planes) - 1) >> 1;
        const int64_t at = k / size * blocks + k % size / 32;
        for (int32_t p = 0; p < planes; ++p) words[p * groups * blocks + at] |= ((u >> p) & 1u) << (k % size % 32);
    }
}

// One product call, cut into shares of channels: `integers` or `output`.
struct Call {
    const bq_weight &w;
    const uint8_t *payload;
    const bq_activation &x;
    const bq_output *output;
    int32_t *integers;
    int64_t x_groups;
    int64_t groups;  // the finer of the two
    int64_t size;
    bool bits;

    Call(const bq_weight &weight, const uint8_t *from, const bq_activation &activation)
        : w(weight),
          payload(from),
          x(activation),
          output(nullptr),
          integers(nullptr),
          x_groups(weight.x_bits == 16 ? 1 : activation.groups),
          groups(x_groups > weight.groups ? x_groups : weight.groups),
          size(weight.width / groups),
          bits(layout_of(from).planes != 0) {}

    bool blocks_line_up() const { return !bits || groups == w.groups || size % 32 == 0; }

    float scale(int64_t t, int64_t g) const {
        const float unit = w.x_bits == 16 ? w.form.unit : x.form.unit * w.form.unit;
        return w.x_bits == 16 ? unit : x.step[t * x_groups + g * x_groups / groups] * unit;
    }

    void put(int64_t t, int64_t n, float total) const {
        if (output->bias != nullptr) total += output->bias[n];
        store_float(output->out, output->dtype, t * output->stride + n, total);
    }

    void put_integer(int64_t t, int64_t g, int64_t n, int64_t value) const {
        integers[(t * groups + g) * w.channels + n] = static_cast<int32_t>(value);
    }

    int32_t run(int32_t threads) const {
        int32_t failed[256] = {};
        auto share = [&](int64_t begin, int64_t end, int thread) {
            const bool done = bits              ? bits_share(begin, end)
                              : w.x_bits == 16 ? floats_share(begin, end)
                                               : factors_share(begin, end);
            if (!done) failed[thread] = BQ_NO_MEMORY;
        };
        parallel_for(threads, w.channels, 16, share);
        for (int32_t code : failed) {
            if (code != BQ_OK) return code;
        }
        return BQ_OK;
    }

    bool factors_share(int64_t begin, int64_t end) const {
        const Layout layout(w);
        const auto *steps = reinterpret_cast<const float *>(payload + layout.steps);
        auto *memory = static_cast<int16_t *>(scratch(0, static_cast<size_t>((kRowsAtOnce + 1) * w.width) * 2));
        if (memory == nullptr) return false;
        int16_t *b = memory + kRowsAtOnce * w.width;
        auto *sums = static_cast<int64_t *>(scratch(1, static_cast<size_t>((kRowsAtOnce + 1) * groups) * 8));
        if (sums == nullptr) return false;
        int64_t *b_sums = sums + kRowsAtOnce * groups;
        const bool offsets = x.form.offset != 0 || w.form.offset != 0;
        for (int64_t t0 = 0; t0 < x.rows; t0 += kRowsAtOnce) {
            const int64_t count = x.rows - t0 < kRowsAtOnce ? x.rows - t0 : kRowsAtOnce;
            for (int64_t t = 0; t < count; ++t) {
                factor_row(x, t0 + t, w.width, memory + t * w.width);
                const int16_t *a = memory + t * w.width;
                for (int64_t g = 0; g < groups; ++g) sums[t * groups + g] = sum_of(a + g * size, size);
            }
            for (int64_t n = begin; n < end; ++n) {
                const int8_t *row = reinterpret_cast<const int8_t *>(payload + kLayoutBytes) + n * w.width;
                for (int64_t k = 0; k < w.width; ++k) b[k] = row[k];
                for (int64_t g = 0; g < groups && offsets; ++g) b_sums[g] = sum_of(b + g * size, size);
                for (int64_t t = 0; t < count; ++t) {
                    const int16_t *a = memory + t * w.width;
                    float total = 0;
                    for (int64_t g = 0; g < groups; ++g) {
                        const int64_t at = g * size;
                        int64_t exact = dot(a + at, b + at, size);
                        if (integers != nullptr) {
                            put_integer(t0 + t, g, n, exact);
                            continue;
                        }
                        exact *= x.form.factor * w.form.factor;
                        if (offsets) {
                            exact += sums[t * groups + g] * x.form.factor * w.form.offset;
                            exact += b_sums[g] * x.form.offset * w.form.factor;
                            exact += size * x.form.offset * w.form.offset;
                        }
                        const float w_step = steps[n * w.groups + g * w.groups / groups];
                        total += static_cast<float>(exact) * scale(t0 + t, g) * w_step;
                    }
                    if (integers == nullptr) put(t0 + t, n, total);
                }
            }
        }
        return true;
    }

    bool floats_share(int64_t begin, int64_t end) const {
        const Layout layout(w);
        const auto *steps = reinterpret_cast<const float *>(payload + layout.steps);
        auto *levels = static_cast<float *>(scratch(0, static_cast<size_t>(w.width) * 4));
        if (levels == nullptr) return false;
        for (int64_t n = begin; n < end; ++n) {
            const int8_t *row = reinterpret_cast<const int8_t *>(payload + kLayoutBytes) + n * w.width;
            for (int64_t k = 0; k < w.width; ++k) {
                levels[k] = static_cast<float>(w.form.factor * row[k] + w.form.offset);
            }
            for (int64_t t = 0; t < x.rows; ++t) {
                const float *a = x.values + t * x.values_stride;
                float total = 0;
                for (int64_t g = 0; g < groups; ++g) {
                    double part[4] = {};  // sums side by side, in an order that no compiler may change
                    int64_t k = g * size;
                    for (; k + 4 <= (g + 1) * size; k += 4) {
                        for (int i = 0; i < 4; ++i) part[i] += static_cast<double>(a[k + i]) * levels[k + i];
                    }
                    for (; k < (g + 1) * size; ++k) part[0] += static_cast<double>(a[k]) * levels[k];
                    const double whole = (part[0] + part[1]) + (part[2] + part[3]);
                    total += static_cast<float>(whole) * (steps[n * w.groups + g] * scale(t, g));
                }
                put(t, n, total);
            }
        }
        return true;
    }

    bool bits_share(int64_t begin, int64_t end) const {
        const ProductLayout l = layout_of(payload);
        const auto *steps = reinterpret_cast<const float *>(payload + l.steps_at);
        const int64_t blocks = (size + 31) / 32, plane_words = groups * blocks, planes = w.x_bits;
        const int64_t row_words = planes * plane_words;
        auto *memory = static_cast<uint32_t *>(scratch(0, static_cast<size_t>(kRowsAtOnce * row_words) * 4));
        if (memory == nullptr) return false;
        for (int64_t t0 = 0; t0 < x.rows; t0 += kRowsAtOnce) {
            const int64_t count = x.rows - t0 < kRowsAtOnce ? x.rows - t0 : kRowsAtOnce;
            for (int64_t t = 0; t < count; ++t) {
                plane_row(x, t0 + t, w.width, groups, w.x_bits, memory + t * row_words);
            }
            for (int64_t n = begin; n < end; ++n) {
                const auto *row = reinterpret_cast<const uint32_t *>(payload + kLayoutBytes) + n * plane_words;
                for (int64_t t = 0; t < count; ++t) {
                    float total = 0;
                    for (int64_t g = 0; g < groups; ++g) {
                        int64_t exact = ((1 << planes) - 1) * size;
                        for (int64_t p = 0; p < planes; ++p) {
                            const uint32_t *a = memory + t * row_words + p * plane_words + g * blocks;
                            exact -= 2 * (count_different(a, row + g * blocks, blocks) << p);
                        }
                        if (integers != nullptr) {
                            put_integer(t0 + t, g, n, exact);
                            continue;
                        }
                        const float w_step = steps[n * l.groups + g * l.groups / groups];
                        total += static_cast<float>(exact) * scale(t0 + t, g) * w_step;
                    }
                    if (integers == nullptr) put(t0 + t, n, total);
                }
            }
        }
        return true;
    }
};

}  // namespace

int32_t payload_bytes(const bq_weight &w, int64_t *bytes) {
    *bytes = Layout(w).bytes;
    if (!wants_bits(w)) return BQ_OK;
    ProductLayout layout;
    const int32_t done = product_layout(w, 1, true, &layout);
    *bytes = layout.bytes;
    return done;
}

int32_t prepare(const bq_weight &w, uint8_t *payload, int32_t threads) {
    if (wants_bits(w)) {
        ProductLayout made;
        const int32_t done = product_layout(w, 1, true, &made);
        return done != BQ_OK ? done : fill_layout(w, made, payload, threads);
    }
    const Layout layout(w);
    std::memset(payload, 0, kLayoutBytes);
    auto *steps = reinterpret_cast<float *>(payload + layout.steps);
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t n = begin; n < end; ++n) {
            weight_factors(w, n, reinterpret_cast<int8_t *>(payload + kLayoutBytes) + n * w.width);
            std::memcpy(steps + n * w.groups, w.step + n * w.groups, static_cast<size_t>(w.groups) * 4);
        }
    };
    parallel_for(threads, w.channels, 16, share);
    return BQ_OK;
}

int32_t linear(const bq_weight &w, const uint8_t *payload, const bq_activation &x, const bq_output &output) {
    Call call(w, payload, x);
    if (!call.blocks_line_up()) return BQ_UNSUPPORTED;
    call.output = &output;
    return call.run(output.threads);
}

int32_t product(const bq_weight &w, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads) {
    Call call(w, payload, x);
    if (!call.blocks_line_up()) return BQ_UNSUPPORTED;
    call.integers = out;
    return call.run(threads);
}

}  // namespace portable
}  // namespace bq
