// Rotation alone, forward and with the trust mask of the backward pass, and codes back to values.
#include <cstring>

#include "rows_avx512.h"

namespace bq::avx512 {
namespace {

template <int Log, int32_t To>
inline void rotate_and_store(__m512 (&x)[8], int64_t left, void *out, int64_t index) {
    rotate<Log>(x);
    const __m512 scale = _mm512_set1_ps(static_cast<float>(1.0 / std::sqrt(static_cast<double>(1 << Log))));
    for (int i = 0; i < 8; ++i) {
        const __m512 scaled = Log == 0 ? x[i] : _mm512_mul_ps(x[i], scale);
        store<To>(out, index + i * kLanes, first_lanes(left - i * kLanes), scaled);
    }
}

}  // namespace

int32_t rotate_rows(const void *x, int64_t x_stride, int32_t x_dtype, int64_t rows, int64_t width, int32_t block,
                    const bq_prologue *prologue, void *out, int32_t out_dtype, int32_t threads) {
    auto share = [&](int64_t begin, int64_t end, int) {
        with_log(block, [&](auto log) {
            with_dtype(x_dtype, [&](auto from) {
                with_dtype(out_dtype, [&](auto to) {
                    for (int64_t t = begin; t < end; ++t) {
                        const Reader<from.value> reader(x, x_stride, t, width, prologue);
                        for (int64_t k = 0; k < width; k += kChunk) {
                            __m512 parts[8];
                            for (int i = 0; i < 8; ++i) {
                                parts[i] = reader.at(k + i * kLanes, first_lanes(width - k - i * kLanes));
                            }
                            rotate_and_store<log.value, to.value>(parts, width - k, out, t * width + k);
                        }
                    }
                });
            });
        });
    };
    parallel_for(threads, rows, 1, share);
    return BQ_OK;
}

int32_t mask_rotate(const void *gradient, int64_t stride, int32_t dtype, const uint8_t *mask, int64_t rows,
                    int64_t width, int32_t block, void *out, int32_t out_dtype, int32_t threads) {
    const int64_t mask_bytes = (width + 7) / 8;
    auto share = [&](int64_t begin, int64_t end, int) {
        with_log(block, [&](auto log) {
            with_dtype(dtype, [&](auto from) {
                with_dtype(out_dtype, [&](auto to) {
                    for (int64_t t = begin; t < end; ++t) {
                        for (int64_t k = 0; k < width; k += kChunk) {
                            uint16_t trusted[8];
                            std::memset(trusted, 0xff, sizeof trusted);
                            if (mask != nullptr) {
                                const int64_t left = mask_bytes - k / 8;
                                std::memcpy(trusted, mask + t * mask_bytes + k / 8, left < 16 ? left : 16);
                            }
                            __m512 parts[8];
                            for (int i = 0; i < 8; ++i) {
                                const int64_t at = k + i * kLanes;
                                const __m512 g = load<from.value>(gradient, t * stride + at, first_lanes(width - at));
                                // A product, as in the definition: what is not finite stays visible.
                                const auto stopped = static_cast<__mmask16>(~trusted[i]);
                                parts[i] = _mm512_mask_mul_ps(g, stopped, g, _mm512_setzero_ps());
                            }
                            rotate_and_store<log.value, to.value>(parts, width - k, out, t * width + k);
                        }
                    }
                });
            });
        });
    };
    parallel_for(threads, rows, 1, share);
    return BQ_OK;
}

}  // namespace bq::avx512
