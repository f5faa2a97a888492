// The AVX2 table (Haswell, Zen 1 and later): rows as the compiler vectorizes them.
#define BQ_SPACE avx2
#include "../generic/rows.inl"
#include "kernels_avx2.h"

namespace bq {

extern const Kernels kAvx2Kernels = {
    kAvx2,
    "avx2",
    avx2::quantize_rows,
    avx2::rotate_rows,
    avx2::mask_rotate,
    avx2::dequantize_rows,
    avx2::payload_bytes,
    avx2::prepare,
    avx2::linear,
    avx2::product,
};

}  // namespace bq
