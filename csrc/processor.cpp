#include "processor.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#include <cstdint>
#endif

namespace bq {
namespace {

#if defined(__aarch64__) && defined(__linux__)
constexpr unsigned long kDotProducts = 1ul << 20;      // HWCAP_ASIMDDP
constexpr unsigned long kMixedDotProducts = 1ul << 13;  // HWCAP2_I8MM
#elif defined(__aarch64__) && defined(__APPLE__)
bool says(const char *name) {
    int32_t value = 0;
    size_t bytes = sizeof value;
    return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 && value != 0;
}
#endif

}  // namespace

bool has_avx_vnni() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && ((a >> 4) & 1) != 0;
#else
    return false;
#endif
}

bool has_dot_products() {
#if defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    return says("hw.optional.arm.FEAT_DotProd");
#else
    return false;
#endif
}

bool has_mixed_dot_products() {
#if defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP2) & kMixedDotProducts) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
    return says("hw.optional.arm.FEAT_I8MM");
#else
    return false;
#endif
}

}  // namespace bq
