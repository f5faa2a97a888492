// The table of AVX2 with AVX-VNNI (Alder Lake and its successors without AVX-512): rows are those of AVX2.
#include "../avx2/kernels_avx2.h"

namespace bq {
namespace avxvnni {
int32_t payload_bytes(const bq_weight &weight, int64_t *bytes);
int32_t prepare(const bq_weight &weight, uint8_t *payload, int32_t threads);
int32_t linear(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, const bq_output &output);
int32_t product(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, int32_t *out, int32_t threads);
}  // namespace avxvnni

extern const Kernels kAvxVnniKernels = {
    kAvxVnni,
    "avxvnni",
    avx2::quantize_rows,
    avx2::rotate_rows,
    avx2::mask_rotate,
    avx2::dequantize_rows,
    avxvnni::payload_bytes,
    avxvnni::prepare,
    avxvnni::linear,
    avxvnni::product,
};

}  // namespace bq
