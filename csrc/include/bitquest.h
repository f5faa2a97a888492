/* The C interface of BitQuEST's native CPU engine.
 *
 * Plain C, loaded with ctypes: pointers, 64-bit sizes, an error code from every function that can fail, no exception
 * and no allocation the caller can see. The definition of all that is computed here is src/bitquest/numerics.
 *
 * Letters: T rows (tokens) of an activation, K elements of a row, N output channels, G scale groups of a row (1 or
 * K / group size). Strides are in elements of the array they belong to; 0 stands for "dense".
 *
 * Formats (the same in every engine):
 *   factors  int8 (T, K): the integers a; level = unit * (factor * a + offset). Uniform grids up to 7 bits a = 2c + 1,
 *            8 bits a = c, ternary and FP4 from a table.
 *   packed   uint8 (T, ceil(K * bits / 8)): u = c + 2^(bits - 1), least significant bit first, rows byte-aligned,
 *            spare bits zero: the bytes of the file format.
 *   mask     uint8 (T, ceil(K / 8)): the trust mask, least significant bit first, spare bits zero; 1 passes the gradient.
 *   step     float32 (T, 1) or (T, G).
 *   sums     int32 (T, G): the sum of the factors of each scale group.
 * Nothing is read or written outside the arrays; T = 0 does nothing. Alignment is never required, except that prepared
 * weights lie on 64 bytes.
 */
#ifndef BITQUEST_H
#define BITQUEST_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define BQ_API __declspec(dllexport)
#else
#define BQ_API __attribute__((visibility("default")))
#endif

#define BQ_ABI_VERSION 2

enum {
    BQ_OK = 0,
    BQ_BAD_ARGUMENT = 1, /* sizes or pointers that contradict each other: a defect of the caller */
    BQ_UNSUPPORTED = 2,  /* a case this engine leaves to another backend; nothing was written */
    BQ_NO_MEMORY = 3,
    BQ_NO_ISA = 4 /* BITQUEST_ISA names an instruction set that this library or machine does not have */
};

enum { BQ_FLOAT32 = 0, BQ_BFLOAT16 = 1, BQ_FLOAT16 = 2 };

/* --- the library ------------------------------------------------------------------------------------------------ */

BQ_API int32_t bq_version(void);           /* BQ_ABI_VERSION of the library */
BQ_API const char *bq_source_hash(void);   /* of what it was compiled from (ops/native_sources.py), or "" */
BQ_API const char *bq_isa(void);           /* the set in use, or "" after BQ_NO_ISA */
BQ_API const char *bq_isa_available(void); /* all that are compiled in and present, best first, separated by spaces:
 * "avx512", "avxvnni", "avx2"; "neoni8mm", "neondot", "neon"; "portable" */
BQ_API const char *bq_message(int32_t error);
BQ_API int32_t bq_set_threads(int32_t threads); /* for calls that pass threads = 0; 1 until it is called */

/* --- rows of an activation or a weight to codes ----------------------------------------------------------------- */

enum { BQ_SCALE_GAUSSIAN = 0, BQ_SCALE_ABSMAX = 1, BQ_SCALE_ABSMEAN = 2, BQ_SCALE_GIVEN = 3 };
enum { BQ_MASK_RANGE = 0, BQ_MASK_DISTANCE = 1 };

/* A quantizer: constant per operand of a layer. s = multiplier * statistic + epsilon, step = s / max_level. */
typedef struct bq_quantizer {
    int32_t bits;           /* 1 to 8 */
    int32_t levels;         /* 0: the uniform grid of 2^bits levels; else the number of levels of a codebook */
    const float *level;     /* codebook: its levels in units of the step, increasing */
    const float *middle;    /* codebook: levels - 1 thresholds between them; a value on one goes down */
    const int8_t *integer;  /* codebook: the factor of each level */
    int32_t block;          /* rotation: 1 (none) or a power of two up to 128 that divides K; else BQ_UNSUPPORTED */
    int32_t scale;          /* BQ_SCALE_…; the statistic is the root mean square, the largest or the mean magnitude */
    int64_t group;          /* elements that share a step: 0 for the row, else a divisor of K */
    float multiplier;       /* alpha for GAUSSIAN, else 1 */
    float epsilon;
    float max_level;
    int32_t mask;           /* BQ_MASK_RANGE: low <= x / step <= high; BQ_MASK_DISTANCE: |x_q - x| <= high * step */
    float mask_low;
    float mask_high;
} bq_quantizer;

enum { BQ_PROLOGUE_NONE = 0, BQ_PROLOGUE_RMSNORM = 1, BQ_PROLOGUE_SWIGLU = 2 };

/* What is done to a row, in float32, before it is rotated. */
typedef struct bq_prologue {
    int32_t kind;
    float epsilon;        /* RMSNORM: x / sqrt(mean x^2 + epsilon) * weight */
    const float *weight;  /* RMSNORM: float32 (K) */
    const void *up;       /* SWIGLU: silu(x) * up, (T, K) of x's dtype */
    int64_t up_stride;
} bq_prologue;

typedef struct bq_rows {
    const void *x;        /* (T, K) of x_dtype */
    int64_t x_stride;
    int32_t x_dtype;      /* BQ_FLOAT32, BQ_BFLOAT16 or BQ_FLOAT16 */
    int32_t threads;
    int64_t rows;         /* T */
    int64_t width;        /* K */
    const bq_prologue *prologue; /* may be null */
    const float *given_step;     /* BQ_SCALE_GIVEN: positive; (T, G), or one row for all with given_stride 0 */
    int64_t given_stride;        /* here 0 means "the same row for all" */
    /* Wanted results; null where not wanted. All are dense. */
    int8_t *factors;
    uint8_t *packed;
    uint8_t *mask;
    int32_t *sums;
    float *step;
} bq_rows;

BQ_API int32_t bq_quantize_rows(const bq_quantizer *quantizer, const bq_rows *rows);

/* xH in float32 arithmetic; x and out may be the same array if their dtypes are. */
BQ_API int32_t bq_rotate_rows(const void *x, int64_t x_stride, int32_t x_dtype, int64_t rows, int64_t width,
                              int32_t block, const bq_prologue *prologue, void *out, int32_t out_dtype,
                              int32_t threads);

/* (gradient * mask) H; a null mask passes everything. */
BQ_API int32_t bq_mask_rotate(const void *gradient, int64_t stride, int32_t dtype, const uint8_t *mask, int64_t rows,
                              int64_t width, int32_t block, void *out, int32_t out_dtype, int32_t threads);

/* Values in rotated space from packed codes: step * level(u). levels: 2^bits floats. step: (T, groups). */
BQ_API int32_t bq_dequantize_rows(const uint8_t *packed, int32_t bits, const float *levels, const float *step,
                                  int64_t groups, int64_t rows, int64_t width, void *out, int32_t out_dtype,
                                  int32_t threads);

/* --- products --------------------------------------------------------------------------------------------------- */

/* level = unit * (factor * a + offset), numerics/integers.py. */
typedef struct bq_form {
    float unit;
    int32_t factor;
    int32_t offset;
} bq_form;

/* A weight, and the activation it will be multiplied by: this decides the layout. */
typedef struct bq_weight {
    int64_t channels;     /* N */
    int64_t width;        /* K */
    int64_t groups;       /* scale groups of a row: 1, or a divisor of K */
    int32_t bits;         /* of the weight's codes, 1 to 8 */
    int32_t x_bits;       /* of the activation's codes, 1 to 8; 16: float32 activations (weight-only) */
    int32_t x_uniform;    /* 1: the activation's grid is uniform (its factors are odd, or codes at 8 bits); 0: a codebook's */
    int32_t sparse;       /* 1: `kept` is given */
    bq_form form;         /* of the weight */
    /* The source, read by bq_prepare_weight only; exactly one of packed and factors. */
    const uint8_t *packed;  /* (N, ceil(K * bits / 8)) */
    const int8_t *factors;  /* (N, K), zero where not kept */
    const int8_t *integer;  /* the factor of every u, 2^bits of them; null on uniform grids, and only there */
    const uint8_t *kept;    /* bytes 0 or 1 (N, K), null for dense weights; needs form.offset = 0 */
    const float *step;      /* (N, groups) */
} bq_weight;

/* Bytes that the prepared weight takes. Only sizes, bits, form and integer are read. */
BQ_API int32_t bq_weight_bytes(const bq_weight *weight, int64_t *bytes);

/* Fills `prepared` (64-byte aligned, bq_weight_bytes long): integers in the layout of the product's kernel, steps and
 * row sums. It holds no pointers and may be moved, but only this library on this instruction set reads it. */
BQ_API int32_t bq_prepare_weight(const bq_weight *weight, void *prepared, int32_t threads);

/* An activation. The arrays that a product reads, by the pair the weight was prepared for:
 *   x_bits = 1:      packed, if not null; else factors
 *   x_bits = 2 to 8: factors, and sums where the weight's form has an offset (null: they are computed)
 *   x_bits = 16:     values
 */
typedef struct bq_activation {
    int64_t rows;          /* T */
    int64_t width;         /* K, as the weight's */
    const int8_t *factors; /* (T, K) dense */
    const uint8_t *packed; /* (T, ceil(K * bits / 8)) dense */
    const int32_t *sums;   /* (T, groups) */
    const float *values;   /* float32 (T, K), rotated, row stride values_stride */
    int64_t values_stride;
    const float *step;     /* (T, groups); not read for values */
    int64_t groups;        /* scale groups of a row; the finer of the two groupings subdivides the coarser */
    bq_form form;
} bq_activation;

typedef struct bq_output {
    void *out;             /* (T, N) of dtype */
    int64_t channels;      /* N, as the weight's */
    int64_t stride;
    int32_t dtype;         /* BQ_FLOAT32, BQ_BFLOAT16 or BQ_FLOAT16 */
    int32_t threads;
    const float *bias;     /* float32 (N), may be null */
} bq_output;

/* x W^T + bias, from one row to many, integer dots exact and scaled once: out = sum over groups of
 * x_step * w_step * unit_x * unit_w * (integer dot of the levels), rounded once to the output's dtype.
 * `prepared_bytes` is the size of the array, so that a weight of another size or library is refused. */
BQ_API int32_t bq_linear(const void *prepared, int64_t prepared_bytes, const bq_activation *x,
                         const bq_output *output);

/* Rows to outputs in one call, for decoding: quantizes (or, for weights prepared for floats, only rotates) the rows and
 * multiplies them by `count` weights that share them. What `rows` says of results is not read. The integers lie in memory
 * that the calling thread keeps: BQ_UNSUPPORTED where they would take more than 16 MiB. */
BQ_API int32_t bq_quantized_linear(const bq_quantizer *quantizer, const bq_rows *rows, const bq_form *form,
                                   int32_t count, const void *const *prepared, const int64_t *prepared_bytes,
                                   const bq_output *outputs);

/* The integer dots alone, sum over k of x_a * w_a, for tests: int32 (T, G, N), G the finer number of groups, `channels`
 * the N of the array. Refused (BQ_UNSUPPORTED) for float activations. */
BQ_API int32_t bq_product(const void *prepared, int64_t prepared_bytes, const bq_activation *x, int32_t *out,
                          int64_t channels, int32_t threads);

/* --- decoding: one token through a whole Llama ------------------------------------------------------------------- */

/* A linear layer: a prepared weight with the quantizer of its input, or a matrix of floats. */
typedef struct bq_layer {
    int64_t channels;              /* N */
    int64_t width;                 /* K */
    const void *prepared;          /* null: dense */
    int64_t prepared_bytes;
    const bq_quantizer *quantizer; /* of a weight prepared for floats only the block is read. Layers that read one input
                                    * and name one quantizer and one given step share the codes */
    const float *given_step;       /* BQ_SCALE_GIVEN: one row of steps, else null */
    bq_form form;                  /* of the input's grid */
    const void *dense;             /* (N, K) of dtype: BQ_FLOAT32 or BQ_BFLOAT16 */
    int32_t dtype;
    const float *bias;             /* float32 (N), may be null */
} bq_layer;

/* x / sqrt(mean x^2 + epsilon) * weight; a null weight: no norm. */
typedef struct bq_norm {
    const float *weight;
    float epsilon;
} bq_norm;

/* H query heads and H_kv key-value heads of C channels, D the width of the stream, F that of the gated product. */
typedef struct bq_block {
    bq_norm attention_norm;  /* (D) */
    bq_norm q_norm;          /* (C), may be missing; so may k_norm, o_norm and down_norm */
    bq_norm k_norm;
    bq_norm o_norm;          /* (H C) */
    bq_norm mlp_norm;        /* (D) */
    bq_norm down_norm;       /* (F) */
    bq_layer q, k, v, o, gate, up, down;
} bq_block;

/* The rows of the tokens, (V, D): floats, or packed codes with float32 steps, rotated back in blocks. */
typedef struct bq_table {
    const void *dense;     /* of dtype, any of the three; null: packed */
    int32_t dtype;
    int32_t bits;
    const uint8_t *packed; /* (V, ceil(D * bits / 8)) */
    const float *levels;   /* 2^bits: the level of every u, in units of the step */
    const float *step;     /* (V, groups), or one row for all with step_stride 0 */
    int64_t step_stride;
    int64_t groups;
    int32_t block;
} bq_table;

typedef struct bq_decoder {
    int64_t layers;
    int64_t width;       /* D */
    int64_t hidden;      /* F */
    int64_t heads;       /* H, a multiple of kv_heads */
    int64_t kv_heads;    /* H_kv */
    int64_t head_size;   /* C, even */
    int64_t vocabulary;  /* V */
    int64_t positions;   /* S: of the cache and of the tables of angles */
    const bq_block *blocks;
    bq_table embedding;
    bq_norm final_norm;  /* (D) */
    bq_layer head;       /* (V, D) */
    const float *cos;    /* (S, C), halves side by side: channel i turns with channel i + C / 2 */
    const float *sin;
    float *keys;         /* (layers, H_kv, S, C), dense */
    float *values;
    void *workspace;     /* bq_decoder_bytes long, on 64 bytes; used by one call at a time */
    int64_t workspace_bytes;
    int32_t threads;
    float *inputs;       /* null; or what the layers read is written here, behind norms and products, before rotations:
                          * of each block (D) for q, k and v, (H C) for o, (D) for gate and up, (F) for down, and at
                          * last (D) for the head. For checks: the very values that were rounded */
} bq_decoder;

/* Checks all sizes, pointers and weights but the workspace, and says how long that must be. */
BQ_API int32_t bq_decoder_bytes(const bq_decoder *decoder, int64_t *bytes);

/* Logits float32 (V) of the token at `position`; its keys and values are stored, those of the positions before it are
 * read. The stream, the norms, the angles and the softmax are float32. For a decoder that bq_decoder_bytes has passed;
 * nothing is allocated but what the products keep for the calling thread. After an error the position is undefined. */
BQ_API int32_t bq_decode_token(const bq_decoder *decoder, int64_t token, int64_t position, float *logits);

/* The vector kernels of a step, for tests: out = w x + bias (w of layer->dense); attention of one head over `seen` rows
 * of keys and values, scores: room for `seen` rounded up to 16. */
BQ_API int32_t bq_dense_vector(const bq_layer *layer, const float *x, float *out, int32_t threads);
BQ_API int32_t bq_attend(const float *q, const float *keys, const float *values, int64_t seen, int64_t head_size,
                         float *scores, float *out);

/* Causal attention of a prompt: row t of the new ones sees the positions 0 to first + t, as `bq_decode_token` does it.
 * q (H, T, C) by its strides, channels dense; keys and values (H_kv, S, C) by head_stride, S >= first + T; out (T, H, C). */
BQ_API int32_t bq_attend_rows(const float *q, int64_t q_head_stride, int64_t q_row_stride, int64_t heads, int64_t rows,
                              const float *keys, const float *values, int64_t head_stride, int64_t kv_heads,
                              int64_t first, int64_t head_size, float *out, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
