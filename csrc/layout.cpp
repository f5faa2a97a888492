#include "layout.h"

#include <cstring>

namespace bq {
namespace {

int32_t stored_bits(int32_t range) { return range < 2 ? 1 : range < 4 ? 2 : range < 16 ? 4 : 8; }

constexpr uint16_t kNone = 0xffff;

// What a code or a factor becomes.
struct Values {
    uint16_t of_code[256];
    uint16_t of_factor[256];  // by the factor as an unsigned byte; kNone: none of the grid's
    uint16_t byte_sum[256];   // of the values side by side in a byte

    Values(const bq_weight &w, const ProductLayout &l) {
        const int32_t codes = 1 << w.bits;
        for (int32_t i = 0; i < 256; ++i) {
            of_code[i] = of_factor[i] = kNone;
            byte_sum[i] = 0;
            for (int32_t j = 0; j < 8; j += l.bits) {
                byte_sum[i] = static_cast<uint16_t>(byte_sum[i] + ((i >> j) & ((1 << l.bits) - 1)));
            }
        }
        for (int32_t u = 0; u < codes; ++u) {
            const int32_t a = w.integer != nullptr ? w.integer[u] : w.bits == 8 ? u - 128 : 2 * u + 1 - codes;
            of_code[u] = static_cast<uint16_t>((a - l.offset) / l.scale);
            of_factor[static_cast<uint8_t>(a)] = of_code[u];
        }
        if (w.sparse != 0) of_factor[0] = static_cast<uint16_t>(-l.offset);
    }
};

// Codes u of a packed row, one a byte.
void unpack_row(const uint8_t *row, int64_t bytes, int32_t bits, int64_t width, uint8_t *codes) {
    const auto mask = static_cast<uint64_t>((1 << bits) - 1);
    for (int64_t k = 0, at = 0; k < width; k += 8, at += bits) {  // eight codes are `bits` bytes
        uint64_t word = 0;
        const int64_t left = bytes - at;
        std::memcpy(&word, row + at, static_cast<size_t>(left < 8 ? left : 8));  // little-endian machines only
        const int64_t count = width - k < 8 ? width - k : 8;
        for (int64_t i = 0; i < count; ++i, word >>= bits) codes[k + i] = static_cast<uint8_t>(word & mask);
    }
}

uint64_t eight(const uint8_t *v) {
    uint64_t word;
    std::memcpy(&word, v, 8);
    return word;
}

// Bit `plane` of 32 values.
uint32_t plane_word(const uint8_t *v, int32_t plane) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) {  // the product brings bit 0 of byte j to bit 56 + j
        const uint64_t bits = (eight(v + 8 * i) >> plane) & 0x0101010101010101u;
        word |= static_cast<uint32_t>((bits * 0x0102040810204080u) >> 56) << (8 * i);
    }
    return word;
}

// 32 / bits values, side by side.
uint32_t field_word(const uint8_t *v, int32_t bits) {
    if (bits == 1) return plane_word(v, 0);
    if (bits == 8) {
        uint32_t word;
        std::memcpy(&word, v, 4);
        return word;
    }
    if (bits == 4) {
        uint64_t x = eight(v);
        x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
        x = (x | x >> 8) & 0x0000ffff0000ffffu;
        return static_cast<uint32_t>(x | x >> 16);
    }
    uint32_t word = 0;
    for (int half = 0; half < 2; ++half) {
        uint64_t x = eight(v + 8 * half);
        x = (x | x >> 6) & 0x000f000f000f000fu;
        x = (x | x >> 12) & 0x000000ff000000ffu;
        word |= static_cast<uint32_t>((x | x >> 24) & 0xffffu) << (16 * half);
    }
    return word;
}

// The low bits of the 32 two-bit codes in 8 bytes, side by side.
uint32_t even_bits(uint64_t x) {
    x &= 0x5555555555555555u;
    x = (x | x >> 1) & 0x3333333333333333u;
    x = (x | x >> 2) & 0x0f0f0f0f0f0f0f0fu;
    x = (x | x >> 4) & 0x00ff00ff00ff00ffu;
    x = (x | x >> 8) & 0x0000ffff0000ffffu;
    return static_cast<uint32_t>(x | x >> 16);
}

class Filler {
  public:
    Filler(const bq_weight &weight, const ProductLayout &layout, uint8_t *payload)
        : w_(weight), l_(layout), values_(weight, layout), payload_(payload) {}

    int64_t scratch_bytes() const { return w_.width + 8 + l_.blocks * 32; }

    // False: a factor that is none of the grid's.
    bool tile(int64_t tile, uint8_t *memory) const {
        const int64_t tile_words = l_.groups * l_.blocks * l_.bits * l_.lanes;
        const int64_t tile_scales = l_.groups * l_.lanes;
        auto *words = reinterpret_cast<uint32_t *>(payload_ + kLayoutBytes) + tile * tile_words;
        auto *steps = reinterpret_cast<float *>(payload_ + l_.steps_at) + tile * tile_scales;
        auto *sums = reinterpret_cast<int32_t *>(payload_ + l_.sums_at) + tile * tile_scales;
        if ((tile + 1) * l_.lanes > w_.channels) {  // lanes without a channel
            std::memset(words, 0, static_cast<size_t>(tile_words) * 4);
            std::memset(steps, 0, static_cast<size_t>(tile_scales) * 4);
            if (l_.has_sums != 0) std::memset(sums, 0, static_cast<size_t>(tile_scales) * 4);
        }
        for (int64_t lane = 0; lane < l_.lanes; ++lane) {
            const int64_t n = tile * l_.lanes + lane;
            if (n >= w_.channels) break;
            for (int64_t g = 0; g < l_.groups; ++g) steps[g * l_.lanes + lane] = w_.step[n * l_.groups + g];
            if (!channel(words + lane, n, l_.has_sums != 0 ? sums + lane : nullptr, memory)) return false;
        }
        return true;
    }

  private:
    // v is u, of a dense uniform grid without empty levels, and blocks of 32 follow each other without a gap.
    bool in_order() const {
        return w_.kept == nullptr && w_.sparse == 0 && w_.integer == nullptr && w_.bits == l_.bits &&
               (l_.groups == 1 || l_.size % 32 == 0);
    }

    bool channel(uint32_t *words, int64_t n, int32_t *sums, uint8_t *memory) const {
        const int64_t bytes = (w_.width * w_.bits + 7) / 8;
        const uint8_t *row = w_.packed == nullptr ? nullptr : w_.packed + n * bytes;
        const bool ordered = in_order();
        if (ordered && row != nullptr && l_.planes != 0 && l_.bits == 2 && sums == nullptr) {
            split_row(words, row, bytes);
            return true;
        }
        if (ordered && row == nullptr && l_.bits == 8) {
            const auto *factors = reinterpret_cast<const uint8_t *>(w_.factors) + n * w_.width;
            copy_row(words, factors, w_.width, 0x80808080u);
            for (int64_t g = 0; g < l_.groups && sums != nullptr; ++g) {
                int32_t sum = 0;
                for (int64_t k = 0; k < l_.size; ++k) sum += factors[g * l_.size + k] ^ 0x80;
                sums[g * l_.lanes] = sum;
            }
            return true;
        }
        if (ordered && row != nullptr && (l_.planes == 0 || l_.bits == 1)) {  // the packed row already is the words
            copy_row(words, row, bytes, 0);
            for (int64_t g = 0; g < l_.groups && sums != nullptr; ++g) {
                const int64_t count = l_.groups == 1 ? bytes : l_.size * l_.bits / 8;
                int32_t sum = 0;
                for (int64_t i = 0; i < count; ++i) sum += values_.byte_sum[row[g * count + i]];
                sums[g * l_.lanes] = sum;
            }
            return true;
        }
        uint8_t *v = memory;
        if (row != nullptr) unpack_row(row, bytes, w_.bits, w_.width, v);
        const auto *factors = reinterpret_cast<const uint8_t *>(w_.factors);
        if (!map_row(row != nullptr ? v : factors + n * w_.width, n, v)) return false;
        uint8_t *padded = memory + w_.width + 8;
        for (int64_t g = 0; g < l_.groups; ++g) {
            std::memcpy(padded, v + g * l_.size, static_cast<size_t>(l_.size));
            std::memset(padded + l_.size, 0, static_cast<size_t>(l_.blocks * 32 - l_.size));
            if (sums != nullptr) {
                int32_t sum = 0;
                for (int64_t k = 0; k < l_.size; ++k) sum += padded[k];
                sums[g * l_.lanes] = sum;
            }
            uint32_t *to = words + g * l_.blocks * l_.bits * l_.lanes;
            for (int64_t w = 0; w < l_.blocks * l_.bits; ++w) {
                const uint8_t *from = l_.planes != 0 ? padded + w / l_.bits * 32 : padded + w * (32 / l_.bits);
                to[w * l_.lanes] = l_.planes != 0 ? plane_word(from, static_cast<int32_t>(w % l_.bits))
                                                  : field_word(from, l_.bits);
            }
        }
        return true;
    }

    // A row's bytes as words, with the bits of `flip` the other way round; zero behind it.
    void copy_row(uint32_t *to, const uint8_t *row, int64_t bytes, uint32_t flip) const {
        const int64_t whole = bytes / 4;
        for (int64_t w = 0; w < whole; ++w) {
            uint32_t word;
            std::memcpy(&word, row + 4 * w, 4);
            to[w * l_.lanes] = word ^ flip;
        }
        for (int64_t w = whole; w < l_.groups * l_.blocks * l_.bits; ++w) to[w * l_.lanes] = 0;
        if (bytes % 4 != 0) {
            uint32_t word = 0;
            std::memcpy(&word, row + 4 * whole, static_cast<size_t>(bytes % 4));
            to[whole * l_.lanes] = word ^ (flip & ((1u << (bytes % 4 * 8)) - 1));
        }
    }

    // Two-bit codes to the two planes of each block.
    void split_row(uint32_t *to, const uint8_t *row, int64_t bytes) const {
        for (int64_t b = 0; b < l_.groups * l_.blocks; ++b) {
            const int64_t left = bytes - 8 * b;
            uint64_t codes = 0;
            std::memcpy(&codes, row + 8 * b, static_cast<size_t>(left < 8 ? left : 8));
            to[2 * b * l_.lanes] = even_bits(codes);
            to[(2 * b + 1) * l_.lanes] = even_bits(codes >> 1);
        }
    }

    // Codes or factors of channel n to v.
    bool map_row(const uint8_t *from, int64_t n, uint8_t *v) const {
        const uint16_t *table = w_.packed != nullptr ? values_.of_code : values_.of_factor;
        const uint8_t *kept = w_.kept == nullptr || w_.packed == nullptr ? nullptr : w_.kept + n * w_.width;
        const auto zero = static_cast<uint8_t>(-l_.offset);
        uint16_t all = 0;
        for (int64_t k = 0; k < w_.width; ++k) {
            const uint16_t value = table[from[k]];
            all |= value;
            v[k] = static_cast<uint8_t>(value);
        }
        for (int64_t k = 0; k < w_.width && kept != nullptr; ++k) v[k] = kept[k] != 0 ? v[k] : zero;
        return all < 256;
    }

    const bq_weight &w_;
    const ProductLayout &l_;
    const Values values_;
    uint8_t *payload_;
};

}  // namespace

int32_t product_layout(const bq_weight &w, int32_t lanes, bool planes, ProductLayout *made) {
    ProductLayout l{};
    if (w.integer != nullptr) {  // a codebook
        int32_t low = w.sparse != 0 ? 0 : 127;
        int32_t high = w.sparse != 0 ? 0 : -128;
        for (int32_t u = 0; u < 1 << w.bits; ++u) {
            low = w.integer[u] < low ? w.integer[u] : low;
            high = w.integer[u] > high ? w.integer[u] : high;
        }
        l.scale = 1;
        l.offset = low;
        l.bits = stored_bits(high - low);
    } else if (w.bits == 8) {
        l.scale = 1;
        l.offset = -128;
        l.bits = 8;
    } else if (w.sparse != 0) {  // the odd integers and zero
        l.scale = 1;
        l.offset = 1 - (1 << w.bits);
        l.bits = stored_bits(-2 * l.offset);
    } else {
        l.scale = 2;
        l.offset = 1 - (1 << w.bits);
        l.bits = stored_bits((1 << w.bits) - 1);
    }
    l.planes = planes && l.scale == 2 && l.bits <= 2 ? 1 : 0;
    l.lanes = lanes;
    l.has_sums = w.x_bits == 8 ? 1 : 0;  // only activations of 8 bits have an offset
    l.tiles = (w.channels + lanes - 1) / lanes;
    l.groups = w.groups;
    l.size = w.width / w.groups;
    l.blocks = (l.size + 31) / 32;
    const int64_t scales = round_up(l.tiles * l.groups * lanes * 4, 64);
    l.sums_at = round_up(kLayoutBytes + l.tiles * l.groups * l.blocks * l.bits * lanes * 4, 64);
    l.steps_at = l.sums_at + (l.has_sums != 0 ? scales : 0);
    l.bytes = l.steps_at + scales;
    *made = l;
    return BQ_OK;
}

int32_t fill_layout(const bq_weight &weight, const ProductLayout &layout, uint8_t *payload, int32_t threads) {
    std::memset(payload, 0, kLayoutBytes);
    std::memcpy(payload, &layout, sizeof(layout));
    const Filler filler(weight, layout, payload);
    int32_t failed[256] = {};
    auto share = [&](int64_t begin, int64_t end, int thread) {
        auto *memory = static_cast<uint8_t *>(scratch(0, static_cast<size_t>(filler.scratch_bytes())));
        if (memory == nullptr) failed[thread] = BQ_NO_MEMORY;
        for (int64_t tile = begin; tile < end && failed[thread] == BQ_OK; ++tile) {
            if (!filler.tile(tile, memory)) failed[thread] = BQ_BAD_ARGUMENT;
        }
    };
    parallel_for(threads, layout.tiles, 1, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

}  // namespace bq
