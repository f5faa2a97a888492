// Operands in the order in which the kernels read them: activations, once per call, and weights of bits, once.
#pragma once

#include "bits.inl"
#include "bytes.inl"

namespace bq::BQ_SPACE {
namespace {

// The factors of a row's group from element `at`, `count` of them; what follows up to `room` is `filler`.
void load_factors(const int8_t *group, int64_t size, int64_t at, int64_t room, int8_t filler, int8_t *to) {
    const int64_t count = at_most(size - at, room);
    std::memset(to, filler, static_cast<size_t>(room));
    if (count > 0) std::memcpy(to, group + at, static_cast<size_t>(count));
}

int32_t two(int8_t low, int8_t high) {
    return static_cast<int32_t>((static_cast<uint32_t>(low) & 0xffffu) | static_cast<uint32_t>(high) << 16);
}

// Words of four int8 in the order of the weight's quads (layout.h), or of two int16: [tile][group][block][step][row].
void pack_bytes(const Plan &plan, const int8_t *factors, const Tiling &tiling, int32_t *words, int32_t *sums,
                int threads) {
    const int32_t bits = plan.layout.bits;
    const int64_t steps = bytes_traits(bits).steps;
    uint8_t order[32];  // the element that byte i of a block takes
    const int fields = 8 / bits;
    for (int i = 0; i < 32; ++i) {
        const int quad = i / 4;
        order[i] = static_cast<uint8_t>(quad / fields * (32 / bits) + fields * (i % 4) + quad % fields);
    }
    const Reorder reorder(order);
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const Place place(tiling, r, plan.groups * plan.blocks * steps);
            for (int64_t g = 0; g < plan.groups; ++g) {
                const int8_t *group = factors + r * plan.width + g * plan.size;
                for (int64_t b = 0; b < plan.blocks; ++b) {
                    int8_t padded[32] = {};
                    int32_t made[16];
                    const int8_t *from = padded;
                    if (place.real && plan.size - b * 32 >= 32) {
                        from = group + b * 32;
                    } else if (place.real) {
                        load_factors(group, plan.size, b * 32, 32, 0, padded);
                    }
                    reorder.block(from, made);
                    if (steps == 16) {  // the even and the odd bytes of a word, 16 bits each
                        for (int q = 7; q >= 0; --q) {
                            int8_t byte[4];
                            std::memcpy(byte, made + q, sizeof byte);
                            made[2 * q] = two(byte[0], byte[2]);
                            made[2 * q + 1] = two(byte[1], byte[3]);
                        }
                    }
                    int32_t *to = words + place.first + (g * plan.blocks + b) * steps * place.stride;
                    for (int64_t s = 0; s < steps; ++s) to[s * place.stride] = made[s];
                }
                if (!place.real) continue;
                int32_t sum = 0;
                for (int64_t k = 0; k < plan.size; ++k) sum += group[k];
                sums[r * plan.groups + g] = sum;
            }
        }
    };
    parallel_for(threads, tiling.padded(), tiling.full, share);
}

// Units of memory (Tables): [tile][group][portion][row].
void pack_bits(const Plan &plan, const int8_t *factors, int32_t x_bits, const Tiling &tiling, uint8_t *units,
               int threads) {
    const BitsTraits is = bits_traits(x_bits);
    const int64_t portions = plan.blocks * kElements / is.portion;  // of a group
    const auto filler = static_cast<int8_t>(x_bits == 8 ? 127 : (1 << x_bits) - 1);  // the largest
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t r = begin; r < end; ++r) {
            const Place place(tiling, r, plan.groups * portions);
            for (int64_t i = 0; i < plan.groups * portions; ++i) {
                const int8_t *group = factors + r * plan.width + i / portions * plan.size;
                const int64_t at = i % portions * is.portion;
                int8_t padded[kElements];
                const int8_t *from = padded;
                if (place.real && plan.size - at >= is.portion) {
                    from = group + at;
                } else {
                    load_factors(group, place.real ? plan.size : 0, at, is.portion, filler, padded);
                }
                is.put(units + (place.first + i * place.stride) * is.unit, from);
            }
        }
    };
    parallel_for(threads, tiling.padded(), tiling.full, share);
}

// Factors 1 and -1 of packed bits.
void expand_bits(const uint8_t *packed, int64_t rows, int64_t width, int8_t *factors) {
    const int64_t bytes = (width + 7) / 8;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < width; k += 8) {
            const uint64_t spread = packed[r * bytes + k / 8] * 0x0101010101010101u & 0x8040201008040201u;
            // A byte that is not zero has its bit 7 set here, and becomes 1; the others -1.
            const uint64_t carried = (spread & 0x7f7f7f7f7f7f7f7fu) + 0x7f7f7f7f7f7f7f7fu;
            const uint64_t ones = (carried | spread) >> 7 & 0x0101010101010101u;
            const uint64_t made = 0xffffffffffffffffu ^ ones * 0xfe;
            std::memcpy(factors + r * width + k, &made, static_cast<size_t>(at_most(width - k, 8)));
        }
    }
}

// Float rows as three int8 digits each: x = step * (d0 + 256 d1 + 65536 d2), |rounding| <= step / 2,
// step = max|x| / 8355000; NaN where a value is not finite.
void split_floats(const bq_activation &x, int64_t width, int8_t *digits, float *steps, int threads) {
    constexpr float kLargest = 8355000.0f;  // below 127 * 65536 + 127 * 256 + 127: every digit fits, rounded too
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            const float *row = x.values + t * x.values_stride;
            int32_t most = 0;  // magnitudes order like their bits, infinities and NaN above everything
            for (int64_t k = 0; k < width; ++k) {
                const auto magnitude = static_cast<int32_t>(float_to_bits(row[k]) & 0x7fffffffu);
                most = magnitude > most ? magnitude : most;
            }
            const bool odd = most >= 0x7f800000;
            const float largest = bits_to_float(static_cast<uint32_t>(most));
            // Below this no inverse would be finite; such a row is zero to 24 bits of any output that is not.
            const bool empty = largest < 1e-30f;
            steps[t] = odd ? __builtin_nanf("") : empty ? 0.0f : largest / kLargest;
            int8_t *to = digits + 3 * t * width;
            if (odd || empty) {
                std::memset(to, 0, static_cast<size_t>(3 * width));
                continue;
            }
            const float inverse = kLargest / largest;
            for (int64_t k = 0; k < width; ++k) {
                const auto whole = static_cast<int32_t>(__builtin_rintf(row[k] * inverse));
                const auto first = static_cast<int8_t>(whole);
                const int32_t rest = (whole - first) >> 8;
                const auto second = static_cast<int8_t>(rest);
                to[k] = first;
                to[width + k] = second;
                to[2 * width + k] = static_cast<int8_t>((rest - second) >> 8);
            }
        }
    };
    parallel_for(threads, x.rows, 1, share);
}

// The layout of a weight of bits, and its payload. BQ_BAD_ARGUMENT: a factor that is none of the grid's.
ProductLayout bits_layout(const bq_weight &w) {
    ProductLayout l{};
    l.bits = w.bits;
    l.planes = 1;
    l.scale = 2;
    l.offset = 1 - (1 << w.bits);
    l.lanes = kBytes;
    l.tiles = (w.channels + kBytes - 1) / kBytes;
    l.groups = w.groups;
    l.size = w.width / w.groups;
    l.blocks = (l.size + kElements - 1) / kElements;
    l.sums_at = round_up(kLayoutBytes + l.tiles * l.groups * l.blocks * l.bits * kBytes, 64);
    l.steps_at = l.sums_at;
    l.bytes = l.steps_at + round_up(l.tiles * l.groups * kBytes * 4, 64);
    return l;
}

bool fill_bits_channel(const bq_weight &w, const ProductLayout &l, int64_t n, int8_t *factors, uint8_t *to) {
    const int64_t row_bytes = (w.width + 7) / 8;
    if (w.packed != nullptr && w.bits == 1 && (l.groups == 1 || l.size % kElements == 0)) {
        for (int64_t i = 0; i < row_bytes; ++i) to[i * kBytes] = w.packed[n * row_bytes + i];
        return true;
    }
    weight_factors(w, n, factors);
    for (int64_t g = 0; g < l.groups; ++g) {
        for (int64_t b = 0; b < l.blocks; ++b, to += l.bits * kBytes) {
            uint8_t v[kElements];
            load_factors(factors + g * l.size, l.size, b * kElements, kElements, static_cast<int8_t>(l.offset),
                         reinterpret_cast<int8_t *>(v));
            unsigned bad = 0;
            for (uint8_t &one : v) {
                const auto twice = static_cast<uint8_t>(one - l.offset);
                bad |= twice & ~(2u * ((1u << l.bits) - 1));
                one = twice >> 1;
            }
            if (bad != 0) return false;
            uint64_t eight;
            std::memcpy(&eight, v, sizeof eight);
            for (int p = 0; p < l.bits; ++p) to[p * kBytes] = plane_byte(eight, p);
        }
    }
    return true;
}

int32_t fill_bits(const bq_weight &w, const ProductLayout &l, uint8_t *payload, int threads) {
    std::memset(payload, 0, static_cast<size_t>(l.bytes));  // lanes without a channel too
    std::memcpy(payload, &l, sizeof l);
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        auto *factors = static_cast<int8_t *>(scratch(0, static_cast<size_t>(w.width)));
        if (factors == nullptr) failed[thread] = BQ_NO_MEMORY;
        const int64_t last = at_most(end * kBytes, w.channels);
        for (int64_t n = begin * kBytes; n < last && failed[thread] == BQ_OK; ++n) {
            const int64_t tile = n / kBytes, lane = n % kBytes;
            uint8_t *to = payload + kLayoutBytes + tile * l.groups * l.blocks * l.bits * kBytes + lane;
            if (!fill_bits_channel(w, l, n, factors, to)) failed[thread] = BQ_BAD_ARGUMENT;
            auto *steps = reinterpret_cast<float *>(payload + l.steps_at) + tile * l.groups * kBytes + lane;
            for (int64_t g = 0; g < l.groups; ++g) steps[g * kBytes] = w.step[n * l.groups + g];
        }
    };
    parallel_for(threads, l.tiles, 1, share);
    for (const int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

}  // namespace
}  // namespace bq::BQ_SPACE
