// Float loops of a decoding step that memory bounds: one matrix times one vector, and attention over the cache. Compiled
// once per instruction set from generic/decoding.inl; the lanes are the same everywhere, and so is every rounding.
#pragma once

#include <cstdint>

namespace bq {

struct DecodingKernels {
    // out[n] = sum over k of w[n][k] x[k] + bias[n] for channels begin <= n < end; w float32 or bfloat16, rows dense.
    void (*dense_rows)(const void *w, int32_t dtype, const float *x, const float *bias, int64_t width, int64_t begin,
                       int64_t end, float *out);
    // out[c] = sum over s of softmax(scale q . keys[s]) values[s][c]. scores: room for `seen` rounded up to 16.
    void (*attend)(const float *q, const float *keys, const float *values, int64_t seen, int64_t size, float scale,
                   float *scores, float *out);
};

extern const DecodingKernels kPortableDecoding;
#if defined(BQ_HAVE_AVX2)
extern const DecodingKernels kAvx2Decoding;
#endif
#if defined(BQ_HAVE_AVX512)
extern const DecodingKernels kAvx512Decoding;
#endif

}  // namespace bq
