// The float loops of a decoding step, compiled for AVX-512.
#include "../generic/decoding.inl"

namespace bq {
extern const DecodingKernels kAvx512Decoding = {dense_rows, attend};
}  // namespace bq
