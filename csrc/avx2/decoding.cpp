// The float loops of a decoding step, compiled for AVX2.
#include "../generic/decoding.inl"

namespace bq {
extern const DecodingKernels kAvx2Decoding = {dense_rows, attend};
}  // namespace bq
