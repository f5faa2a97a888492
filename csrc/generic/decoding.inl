// The float loops of a decoding step, sixteen lanes at a time. Included by one translation unit per instruction set.
#include "../decoding.h"

#include <cstring>

#include "floats.h"

namespace {

constexpr int64_t kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t LaneBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t LaneHalves __attribute__((vector_size(2 * kLanes)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

inline Lanes lanes_of(const float *from) {
    Lanes x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline Lanes lanes_of(const uint16_t *from) {  // bfloat16
    LaneHalves halves;
    std::memcpy(&halves, from, sizeof halves);
    const LaneBits bits = __builtin_convertvector(halves, LaneBits) << 16;
    Lanes x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float value_of(float x) { return x; }
inline float value_of(uint16_t x) { return from_bfloat16(x); }

inline float sum_of(Lanes x) {
    Eight half[2];
    std::memcpy(half, &x, sizeof x);
    const Eight eight = half[0] + half[1];
    Four quarter[2];
    std::memcpy(quarter, &eight, sizeof eight);
    const Four four = quarter[0] + quarter[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Dots of Rows rows of w with x. Two chains of sums a row, so that additions do not wait for each other.
template <int Rows, class Value>
void dots(const Value *w, int64_t stride, const float *x, int64_t width, float *out) {
    Lanes first[Rows] = {};
    Lanes second[Rows] = {};
    int64_t k = 0;
    for (; k + 2 * kLanes <= width; k += 2 * kLanes) {
        const Lanes x0 = lanes_of(x + k);
        const Lanes x1 = lanes_of(x + k + kLanes);
        for (int r = 0; r < Rows; ++r) {
            first[r] += lanes_of(w + r * stride + k) * x0;
            second[r] += lanes_of(w + r * stride + k + kLanes) * x1;
        }
    }
    if (k + kLanes <= width) {
        const Lanes x0 = lanes_of(x + k);
        for (int r = 0; r < Rows; ++r) first[r] += lanes_of(w + r * stride + k) * x0;
        k += kLanes;
    }
    for (int r = 0; r < Rows; ++r) {
        float total = sum_of(first[r] + second[r]);
        for (int64_t rest = k; rest < width; ++rest) total += value_of(w[r * stride + rest]) * x[rest];
        out[r] = total;
    }
}

// A row's dot is the same whether it is taken alone or beside others, so shares may begin anywhere.
template <class Value>
void dots_of_rows(const Value *w, const float *x, int64_t width, int64_t rows, float *out) {
    int64_t n = 0;
    for (; n + 4 <= rows; n += 4) dots<4>(w + n * width, width, x, width, out + n);
    for (; n < rows; ++n) dots<1>(w + n * width, width, x, width, out + n);
}

void dense_rows(const void *w, int32_t dtype, const float *x, const float *bias, int64_t width, int64_t begin,
                int64_t end, float *out) {
    if (dtype == BQ_BFLOAT16) {
        dots_of_rows(static_cast<const uint16_t *>(w) + begin * width, x, width, end - begin, out + begin);
    } else {
        dots_of_rows(static_cast<const float *>(w) + begin * width, x, width, end - begin, out + begin);
    }
    if (bias == nullptr) return;
    for (int64_t n = begin; n < end; ++n) out[n] += bias[n];
}

// e^x for x <= 0, to two units in the last place; 0 below -87.3, where float32 has no normal numbers left. NaN stays.
inline Lanes exp_of(Lanes x) {
    const LaneBits gone = x < -87.3f;
    const Lanes rounder = Lanes{} + 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer in the low bits
    const Lanes shifted = x * 1.44269504f + rounder;
    const Lanes n = shifted - rounder;
    const Lanes r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Lanes p = Lanes{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    LaneBits power;
    std::memcpy(&power, &shifted, sizeof power);
    LaneBits bits;
    std::memcpy(&bits, &p, sizeof bits);
    LaneBits given;
    std::memcpy(&given, &x, sizeof given);
    const LaneBits unknown = x != x;
    bits = (unknown & given) | (~(unknown | gone) & (bits + (power << 23)));
    std::memcpy(&p, &bits, sizeof bits);
    return p;
}

// out[c] = sum over s of p[s] values[s][c] for Count channels of sixteen.
template <int Count>
void weighted(const float *p, const float *values, int64_t stride, int64_t seen, float inverse, float *out) {
    Lanes total[Count] = {};
    for (int64_t s = 0; s < seen; ++s) {
        for (int i = 0; i < Count; ++i) total[i] += lanes_of(values + s * stride + i * kLanes) * p[s];
    }
    for (int i = 0; i < Count; ++i) {
        const Lanes scaled = total[i] * inverse;
        std::memcpy(out + i * kLanes, &scaled, sizeof scaled);
    }
}

void attend(const float *q, const float *keys, const float *values, int64_t seen, int64_t size, float scale,
            float *scores, float *out) {
    dots_of_rows(keys, q, size, seen, scores);
    float most = scores[0];
    for (int64_t s = 0; s < seen; ++s) most = scores[s] > most ? scores[s] : most;
    const int64_t padded = (seen + kLanes - 1) / kLanes * kLanes;
    for (int64_t s = seen; s < padded; ++s) scores[s] = -__builtin_inff();
    Lanes sums = {};
    for (int64_t s = 0; s < padded; s += kLanes) {
        const Lanes p = exp_of((lanes_of(scores + s) - most) * scale);
        sums += p;
        std::memcpy(scores + s, &p, sizeof p);
    }
    const float inverse = 1.0f / sum_of(sums);
    int64_t c = 0;
    for (; c + 4 * kLanes <= size; c += 4 * kLanes) weighted<4>(scores, values + c, size, seen, inverse, out + c);
    for (; c + kLanes <= size; c += kLanes) weighted<1>(scores, values + c, size, seen, inverse, out + c);
    for (; c < size; ++c) {
        float total = 0;
        for (int64_t s = 0; s < seen; ++s) total += scores[s] * values[s * size + c];
        out[c] = total * inverse;
    }
}

}  // namespace
