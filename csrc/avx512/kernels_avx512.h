// The functions of the AVX-512 table (table.cpp). Every file of this folder is compiled with
// -mavx512{f,bw,vl,dq,vnni,vpopcntdq,vbmi,vbmi2,bitalg} -mgfni -mfma -mf16c -mbmi2: Ice Lake, Zen 4 and later.
#pragma once

#include "../kernels.h"

namespace bq::avx512 {

// quantize.cpp, rotate.cpp, dequantize.cpp
int32_t quantize_rows(const bq_quantizer &quantizer, const bq_rows &rows);
int32_t rotate_rows(const void *x, int64_t x_stride, int32_t x_dtype, int64_t rows, int64_t width, int32_t block,
                    const bq_prologue *prologue, void *out, int32_t out_dtype, int32_t threads);
int32_t mask_rotate(const void *gradient, int64_t stride, int32_t dtype, const uint8_t *mask, int64_t rows,
                    int64_t width, int32_t block, void *out, int32_t out_dtype, int32_t threads);
int32_t dequantize_rows(const uint8_t *packed, int32_t bits, const float *levels, const float *step, int64_t groups,
                        int64_t rows, int64_t width, void *out, int32_t out_dtype, int32_t threads);

// the product kernels
int32_t payload_bytes(const bq_weight &weight, int64_t *bytes);
int32_t prepare(const bq_weight &weight, uint8_t *payload, int32_t threads);
int32_t linear(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, const bq_output &output);
int32_t product(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads);

}  // namespace bq::avx512
