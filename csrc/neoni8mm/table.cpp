// The table of NEON with mixed dot products: rows are those of NEON.
#include "../neon/kernels_neon.h"

namespace bq {
namespace neoni8mm {
int32_t payload_bytes(const bq_weight &weight, int64_t *bytes);
int32_t prepare(const bq_weight &weight, uint8_t *payload, int32_t threads);
int32_t linear(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, const bq_output &output);
int32_t product(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads);
}  // namespace neoni8mm

extern const Kernels kNeonI8mmKernels = {
    kNeonI8mm,
    "neoni8mm",
    neon::quantize_rows,
    neon::rotate_rows,
    neon::mask_rotate,
    neon::dequantize_rows,
    neoni8mm::payload_bytes,
    neoni8mm::prepare,
    neoni8mm::linear,
    neoni8mm::product,
};

}  // namespace bq
