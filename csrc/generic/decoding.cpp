// The float loops of a decoding step, compiled for portable C++ (NEON on Arm).
#include "decoding.inl"

namespace bq {
extern const DecodingKernels kPortableDecoding = {dense_rows, attend};
}  // namespace bq
