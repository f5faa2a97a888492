// The AVX-512 table.
#include "kernels_avx512.h"

namespace bq {

extern const Kernels kAvx512Kernels = {
    kAvx512,
    "avx512",
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace bq
