// The portable table: every case of the interface, in plain C++17.
#define BQ_SPACE portable
#include "rows.inl"

namespace bq {
namespace portable {
int32_t payload_bytes(const bq_weight &weight, int64_t *bytes);
int32_t prepare(const bq_weight &weight, uint8_t *payload, int32_t threads);
int32_t linear(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, const bq_output &output);
int32_t product(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads);
}  // namespace portable

extern const Kernels kPortableKernels = {
    kPortable,
    "portable",
    portable::quantize_rows,
    portable::rotate_rows,
    portable::mask_rotate,
    portable::dequantize_rows,
    portable::payload_bytes,
    portable::prepare,
    portable::linear,
    portable::product,
};

}  // namespace bq
