// The table of NEON with dot products: rows are those of NEON.
#include "../neon/kernels_neon.h"

namespace bq {
namespace neondot {
int32_t payload_bytes(const bq_weight &weight, int64_t *bytes);
int32_t prepare(const bq_weight &weight, uint8_t *payload, int32_t threads);
int32_t linear(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, const bq_output &output);
int32_t product(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads);
}  // namespace neondot

extern const Kernels kNeonDotKernels = {
    kNeonDot,
    "neondot",
    neon::quantize_rows,
    neon::rotate_rows,
    neon::mask_rotate,
    neon::dequantize_rows,
    neondot::payload_bytes,
    neondot::prepare,
    neondot::linear,
    neondot::product,
};

}  // namespace bq
