// The NEON table (64-bit Arm): rows as the compiler vectorizes them.
#define BQ_SPACE neon
#include "../generic/rows.inl"
#include "kernels_neon.h"

namespace bq {

extern const Kernels kNeonKernels = {
    kNeon,
    "neon",
    neon::quantize_rows,
    neon::rotate_rows,
    neon::mask_rotate,
    neon::dequantize_rows,
    neon::payload_bytes,
    neon::prepare,
    neon::linear,
    neon::product,
};

}  // namespace bq
