// The NEON table (64-bit Arm): rows as the compiler vectorizes them; products are the portable ones.
#define BQ_SPACE neon
#include "../generic/rows.inl"

namespace bq {

extern const Kernels kNeonKernels = {
    kNeon,
    "neon",
    neon::quantize_rows,
    neon::rotate_rows,
    neon::mask_rotate,
    neon::dequantize_rows,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace bq
