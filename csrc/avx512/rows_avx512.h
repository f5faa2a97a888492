// Rows in 512-bit registers: loading and storing of every dtype, the rotation, the prologues. Anonymous namespace: each
// file of this folder has its own copy.
#pragma once

#include <immintrin.h>

#include <cmath>

#include "kernels_avx512.h"

namespace bq::avx512 {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 128;  // eight registers, the largest block of the rotation

inline __mmask16 first_lanes(int64_t count) {
    return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Lanes that the mask leaves out are zero, and are not read.
template <int32_t Dtype>
inline __m512 load(const void *array, int64_t index, __mmask16 lanes) {
    if constexpr (Dtype == BQ_FLOAT32) {
        return _mm512_maskz_loadu_ps(lanes, static_cast<const float *>(array) + index);
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t *>(array) + index);
    if constexpr (Dtype == BQ_BFLOAT16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    return _mm512_cvtph_ps(halves);
}

inline __m256i to_bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

template <int32_t Dtype>
inline void store(void *array, int64_t index, __mmask16 lanes, __m512 x) {
    if constexpr (Dtype == BQ_FLOAT32) {
        _mm512_mask_storeu_ps(static_cast<float *>(array) + index, lanes, x);
    } else {
        const __m256i halves = Dtype == BQ_BFLOAT16 ? to_bfloat16(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
        _mm256_mask_storeu_epi16(static_cast<uint16_t *>(array) + index, lanes, halves);
    }
}

// x ± its neighbour at lane distance 1, 2, 4 or 8: lanes with that bit clear get the sum, the others the difference.
template <int Distance>
inline __m512 butterfly_lanes(__m512 x) {
    __m512 swapped;
    if constexpr (Distance == 1) swapped = _mm512_permute_ps(x, 0xb1);
    if constexpr (Distance == 2) swapped = _mm512_permute_ps(x, 0x4e);
    if constexpr (Distance == 4) swapped = _mm512_shuffle_f32x4(x, x, 0xb1);
    if constexpr (Distance == 8) swapped = _mm512_shuffle_f32x4(x, x, 0x4e);
    constexpr int negative = Distance == 1 ? 0xaaaa : Distance == 2 ? 0xcccc : Distance == 4 ? 0xf0f0 : 0xff00;
    const __m512 sign = _mm512_mask_blend_ps(negative, _mm512_set1_ps(1), _mm512_set1_ps(-1));
    return _mm512_fmadd_ps(x, sign, swapped);
}

template <int Distance>
inline void butterfly_registers(__m512 (&x)[8]) {
    for (int i = 0; i < 8; ++i) {
        if (i & Distance) continue;
        const __m512 sum = _mm512_add_ps(x[i], x[i + Distance]);
        x[i + Distance] = _mm512_sub_ps(x[i], x[i + Distance]);
        x[i] = sum;
    }
}

// Sylvester-Hadamard blocks of 2^Log over eight registers, without the factor 2^(-Log/2).
template <int Log>
inline void rotate(__m512 (&x)[8]) {
    if constexpr (Log >= 1)
        for (auto &part : x) part = butterfly_lanes<1>(part);
    if constexpr (Log >= 2)
        for (auto &part : x) part = butterfly_lanes<2>(part);
    if constexpr (Log >= 3)
        for (auto &part : x) part = butterfly_lanes<4>(part);
    if constexpr (Log >= 4)
        for (auto &part : x) part = butterfly_lanes<8>(part);
    if constexpr (Log >= 5) butterfly_registers<1>(x);
    if constexpr (Log >= 6) butterfly_registers<2>(x);
    if constexpr (Log >= 7) butterfly_registers<4>(x);
}

inline double sum(__m512 x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

// e^x to about one unit in the last place: 2^n · p(r), |r| <= ln 2 / 2, Taylor's polynomial of degree 7.
inline __m512 exponential(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    constexpr float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float coefficient : coefficients) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(p, n);
}

// How a row comes in: plain, or behind a prologue, whose constants of this row are here.
template <int32_t Dtype>
struct Reader {
    const void *x;
    int64_t offset;
    int64_t width;
    const bq_prologue *prologue;
    int64_t up_offset = 0;
    __m512 inverse = _mm512_setzero_ps();

    Reader(const void *array, int64_t row_stride, int64_t row, int64_t row_width, const bq_prologue *before)
        : x(array), offset(row * row_stride), width(row_width), prologue(before) {
        if (prologue == nullptr) return;
        up_offset = row * prologue->up_stride;
        if (prologue->kind != BQ_PROLOGUE_RMSNORM) return;
        double total = 0;
        for (int64_t start = 0; start < width; start += kChunk) {
            __m512 part = _mm512_setzero_ps();
            for (int64_t k = start; k < start + kChunk; k += kLanes) {
                const __m512 value = load<Dtype>(x, offset + k, first_lanes(width - k));
                part = _mm512_fmadd_ps(value, value, part);
            }
            total += sum(part);
        }
        const float mean = static_cast<float>(total / static_cast<double>(width));
        inverse = _mm512_set1_ps(1.0f / std::sqrt(mean + prologue->epsilon));
    }

    __m512 at(int64_t k, __mmask16 lanes) const {
        const __m512 value = load<Dtype>(x, offset + k, lanes);
        if (prologue == nullptr) return value;
        if (prologue->kind == BQ_PROLOGUE_RMSNORM) {
            const __m512 weight = _mm512_maskz_loadu_ps(lanes, prologue->weight + k);
            return _mm512_mul_ps(_mm512_mul_ps(value, inverse), weight);
        }
        const __m512 up = load<Dtype>(prologue->up, up_offset + k, lanes);
        const __m512 one = _mm512_set1_ps(1);
        const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), value));
        return _mm512_mul_ps(_mm512_div_ps(value, _mm512_add_ps(one, e)), up);
    }
};

// Calls body(std-like constant) with the logarithm of the block as a compile-time number.
template <int N>
struct Number {
    static constexpr int value = N;
};

template <class Body>
inline void with_log(int32_t block, Body &&body) {
    switch (block) {
    case 1: return body(Number<0>());
    case 2: return body(Number<1>());
    case 4: return body(Number<2>());
    case 8: return body(Number<3>());
    case 16: return body(Number<4>());
    case 32: return body(Number<5>());
    case 64: return body(Number<6>());
    default: return body(Number<7>());
    }
}

template <class Body>
inline void with_dtype(int32_t dtype, Body &&body) {
    switch (dtype) {
    case BQ_FLOAT32: return body(Number<BQ_FLOAT32>());
    case BQ_BFLOAT16: return body(Number<BQ_BFLOAT16>());
    default: return body(Number<BQ_FLOAT16>());
    }
}

}  // namespace
}  // namespace bq::avx512
