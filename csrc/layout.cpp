#include "layout.h"

#include <cstring>

namespace bq {
namespace {

int32_t stored_bits(int32_t range) { return range < 2 ? 1 : range < 4 ? 2 : range < 16 ? 4 : 8; }

// Word w of a packed row of `bytes` bytes; what lies beyond the row is zero.
uint32_t row_word(const uint8_t *row, int64_t bytes, int64_t w) {
    uint32_t word = 0;
    const int64_t left = bytes - 4 * w;
    if (left > 0) std::memcpy(&word, row + 4 * w, static_cast<size_t>(left < 4 ? left : 4));
    return word;  // little-endian machines only, as the file format
}

// The packed rows already are the words.
bool rows_are_words(const bq_weight &w, const ProductLayout &l) {
    return w.packed != nullptr && w.kept == nullptr && w.integer == nullptr && w.bits == l.bits &&
           (l.planes == 0 || l.bits == 1) && (l.groups == 1 || l.size % 32 == 0);
}

void put(uint32_t *block, const ProductLayout &l, int64_t element, uint32_t v) {
    if (l.planes != 0) {
        for (int32_t p = 0; p < l.bits; ++p) block[p * l.lanes] |= ((v >> p) & 1u) << element;
        return;
    }
    const int64_t in_word = 32 / l.bits;
    block[element / in_word * l.lanes] |= v << (element % in_word * l.bits);
}

class Filler {
  public:
    Filler(const bq_weight &weight, const ProductLayout &layout, uint8_t *payload)
        : w_(weight), l_(layout), payload_(payload), group_words_(layout.blocks * layout.bits * layout.lanes) {}

    // False: a factor that is none of the grid's.
    bool tile(int64_t tile, int8_t *factors) const {
        auto *words = reinterpret_cast<uint32_t *>(payload_ + kLayoutBytes) + tile * l_.groups * group_words_;
        std::memset(words, 0, static_cast<size_t>(l_.groups * group_words_) * 4);
        auto *steps = reinterpret_cast<float *>(payload_ + l_.steps_at) + tile * l_.groups * l_.lanes;
        std::memset(steps, 0, static_cast<size_t>(l_.groups * l_.lanes) * 4);
        int32_t *sums = nullptr;
        if (l_.has_sums != 0) {
            sums = reinterpret_cast<int32_t *>(payload_ + l_.sums_at) + tile * l_.groups * l_.lanes;
            std::memset(sums, 0, static_cast<size_t>(l_.groups * l_.lanes) * 4);
        }
        for (int64_t lane = 0; lane < l_.lanes; ++lane) {
            const int64_t n = tile * l_.lanes + lane;
            if (n >= w_.channels) break;
            for (int64_t g = 0; g < l_.groups; ++g) steps[g * l_.lanes + lane] = w_.step[n * l_.groups + g];
            if (rows_are_words(w_, l_) && sums == nullptr) {
                copy_row(words + lane, n);
            } else {
                weight_factors(w_, n, factors);
                if (!factor_row(words + lane, factors, sums == nullptr ? nullptr : sums + lane)) return false;
            }
        }
        return true;
    }

  private:
    void copy_row(uint32_t *to, int64_t n) const {
        const int64_t bytes = (w_.width * w_.bits + 7) / 8;
        const uint8_t *row = w_.packed + n * bytes;
        const int64_t whole = bytes / 4;
        for (int64_t w = 0; w < whole; ++w) std::memcpy(to + w * l_.lanes, row + 4 * w, 4);
        if (bytes % 4 != 0) to[whole * l_.lanes] = row_word(row, bytes, whole);
    }

    bool factor_row(uint32_t *to, const int8_t *factors, int32_t *sums) const {
        for (int64_t g = 0; g < l_.groups; ++g) {
            uint32_t *group = to + g * group_words_;
            int32_t sum = 0;
            for (int64_t k = 0; k < l_.size; ++k) {
                const int32_t scaled = factors[g * l_.size + k] - l_.offset;
                const int32_t v = l_.scale == 2 ? scaled >> 1 : scaled;
                if (v < 0 || v >= 1 << l_.bits || v * l_.scale != scaled) return false;
                put(group + k / 32 * l_.bits * l_.lanes, l_, k % 32, static_cast<uint32_t>(v));
                sum += v;
            }
            if (sums != nullptr) sums[g * l_.lanes] = sum;
        }
        return true;
    }

    const bq_weight &w_;
    const ProductLayout &l_;
    uint8_t *payload_;
    int64_t group_words_;
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
        auto *factors = static_cast<int8_t *>(scratch(0, static_cast<size_t>(weight.width)));
        if (factors == nullptr) failed[thread] = BQ_NO_MEMORY;
        for (int64_t tile = begin; tile < end && failed[thread] == BQ_OK; ++tile) {
            if (!filler.tile(tile, factors)) failed[thread] = BQ_BAD_ARGUMENT;
        }
    };
    parallel_for(threads, layout.tiles, 1, share);
    for (int32_t code : failed) {
        if (code != BQ_OK) return code;
    }
    return BQ_OK;
}

}  // namespace bq
