// The AVX2 table (Haswell, Zen 1 and later): rows as the compiler vectorizes them; products are the portable ones.
#define BQ_SPACE avx2
#include "../generic/rows.inl"

namespace bq {

extern const Kernels kAvx2Kernels = {
    kAvx2,
    "avx2",
    avx2::quantize_rows,
    avx2::rotate_rows,
    avx2::mask_rotate,
    avx2::dequantize_rows,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace bq
