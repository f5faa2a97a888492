// The AVX-512 table.
#include "kernels_avx512.h"

namespace bq {

using namespace avx512;

extern const Kernels kAvx512Kernels = {
    kAvx512,
    "avx512",
    quantize_rows,
    rotate_rows,
    mask_rotate,
    dequantize_rows,
    payload_bytes,
    prepare,
    linear,
    product,
};

}  // namespace bq
