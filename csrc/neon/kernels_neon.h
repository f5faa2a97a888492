// The functions of the NEON table that others borrow.
#pragma once

#include "../kernels.h"

namespace bq::neon {

int32_t quantize_rows(const bq_quantizer &quantizer, const bq_rows &rows);
int32_t rotate_rows(const void *x, int64_t x_stride, int32_t x_dtype, int64_t rows, int64_t width, int32_t block,
                    const bq_prologue *prologue, void *out, int32_t out_dtype, int32_t threads);
int32_t mask_rotate(const void *gradient, int64_t stride, int32_t dtype, const uint8_t *mask, int64_t rows,
                    int64_t width, int32_t block, void *out, int32_t out_dtype, int32_t threads);
int32_t dequantize_rows(const uint8_t *packed, int32_t bits, const float *levels, const float *step, int64_t groups,
                        int64_t rows, int64_t width, void *out, int32_t out_dtype, int32_t threads);

// products.cpp
int32_t payload_bytes(const bq_weight &weight, int64_t *bytes);
int32_t prepare(const bq_weight &weight, uint8_t *payload, int32_t threads);
int32_t linear(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, const bq_output &output);
int32_t product(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads);

}  // namespace bq::neon
