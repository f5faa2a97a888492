// What this machine's processor has beyond what compilers have names for.
#pragma once

namespace bq {

bool has_avx_vnni();            // x86-64: vpdpbusd of AVX's registers
bool has_dot_products();        // Arm: sdot and udot
bool has_mixed_dot_products();  // Arm: usdot, of the matrix multiplications of bytes

}  // namespace bq
