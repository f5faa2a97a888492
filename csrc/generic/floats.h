// bfloat16 and float16 to float32 and back, bit by bit: the same on every machine. Round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "../include/bitquest.h"

namespace {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bfloat16(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

inline float from_float16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    // 2^112 moves the exponent from float16's bias to float32's, and makes normal numbers of subnormal ones.
    const float scaled = bits_to_float(magnitude << 13) * 5192296858534827628530496329220096.0f;
    return bits_to_float(sign | float_to_bits(scaled));
}

inline uint16_t to_float16(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return sign | 0x7e00u;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and beyond
    if (magnitude < 0x38800000u) {                        // subnormal: the addition rounds to multiples of 2^-24
        const float rounded = bits_to_float(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (float_to_bits(rounded) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline float load_float(const void *array, int32_t dtype, int64_t index) {
    switch (dtype) {
    case BQ_FLOAT32: return static_cast<const float *>(array)[index];
    case BQ_BFLOAT16: return from_bfloat16(static_cast<const uint16_t *>(array)[index]);
    default: return from_float16(static_cast<const uint16_t *>(array)[index]);
    }
}

inline void store_float(void *array, int32_t dtype, int64_t index, float value) {
    switch (dtype) {
    case BQ_FLOAT32: static_cast<float *>(array)[index] = value; break;
    case BQ_BFLOAT16: static_cast<uint16_t *>(array)[index] = to_bfloat16(value); break;
    default: static_cast<uint16_t *>(array)[index] = to_float16(value); break;
    }
}

}  // namespace
