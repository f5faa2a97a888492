// What an instruction set provides: a table of functions. dispatch.cpp checks arguments, chooses the table, and falls
// back to the portable one, case by case, where a table refuses (null, or BQ_UNSUPPORTED).
//
// Rules for a translation unit of an instruction set: everything in an anonymous or its own namespace, no inline
// functions or containers of the standard library beyond <cstdint>, <cstddef>, <cstring> (see thread_pool.h).
#pragma once

#include "include/bitquest.h"
#include "thread_pool.h"

namespace bq {

// A prepared weight begins with this header; the layout of an instruction set follows it, 64-byte aligned.
struct PreparedHeader {
    uint32_t magic;
    int32_t isa;        // Isa of the table that wrote the payload
    bq_weight weight;   // its source pointers null
    int64_t bytes;      // whole buffer
};
constexpr uint32_t kPreparedMagic = 0x42715031;
constexpr int64_t kPreparedHeaderBytes = 192;
static_assert(sizeof(PreparedHeader) <= kPreparedHeaderBytes, "the header outgrew its place");

enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3, kAvxVnni = 4, kNeonDot = 5, kNeonI8mm = 6 };

// Functions get arguments that dispatch.cpp has checked: sizes agree, pointers that are needed are there, strides are
// filled in, threads >= 1, T >= 1, N >= 1, K >= 1. They may return BQ_UNSUPPORTED before writing anything.
struct Kernels {
    Isa isa;
    const char *name;

    int32_t (*quantize_rows)(const bq_quantizer &quantizer, const bq_rows &rows);
    int32_t (*rotate_rows)(const void *x, int64_t x_stride, int32_t x_dtype, int64_t rows, int64_t width, int32_t block,
                           const bq_prologue *prologue, void *out, int32_t out_dtype, int32_t threads);
    int32_t (*mask_rotate)(const void *gradient, int64_t stride, int32_t dtype, const uint8_t *mask, int64_t rows,
                           int64_t width, int32_t block, void *out, int32_t out_dtype, int32_t threads);
    int32_t (*dequantize_rows)(const uint8_t *packed, int32_t bits, const float *levels, const float *step,
                               int64_t groups, int64_t rows, int64_t width, void *out, int32_t out_dtype,
                               int32_t threads);

    // Products: payload is what follows the header, payload_bytes long. All five or none.
    int32_t (*payload_bytes)(const bq_weight &weight, int64_t *bytes);
    int32_t (*prepare)(const bq_weight &weight, uint8_t *payload, int32_t threads);
    int32_t (*linear)(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, const bq_output &output);
    int32_t (*product)(const bq_weight &weight, const uint8_t *payload, const bq_activation &x, int32_t *out,
                       int32_t threads);
};

extern const Kernels kPortableKernels;
#if defined(BQ_HAVE_AVX2)
extern const Kernels kAvx2Kernels;
#endif
#if defined(BQ_HAVE_AVXVNNI)
extern const Kernels kAvxVnniKernels;
#endif
#if defined(BQ_HAVE_AVX512)
extern const Kernels kAvx512Kernels;  // csrc/avx512/table.cpp
#endif
#if defined(BQ_HAVE_NEON)
extern const Kernels kNeonKernels;
#endif
#if defined(BQ_HAVE_NEONDOT)
extern const Kernels kNeonDotKernels;
#endif
#if defined(BQ_HAVE_NEONI8MM)
extern const Kernels kNeonI8mmKernels;
#endif

// The header of a prepared weight of `bytes`, or null if it is none that this library and machine read.
const PreparedHeader *prepared_header(const void *prepared, int64_t bytes);

// Help for `prepare`, portable: the int8 factors (K) of channel n, zero where not kept.
void weight_factors(const bq_weight &weight, int64_t channel, int8_t *factors);

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace bq
