// One token through a whole Llama in one call: no language in between, no allocation, every step the definition's.
#include <cmath>
#include <cstring>

#include "decoding.h"
#include "kernels.h"

using namespace bq;

namespace {

// Below so many multiplications of floats, handing a part to another thread costs more than it saves.
constexpr int64_t kWorthThreads = 1 << 16;
// A step that reads fewer bytes stays on one thread: in it few products are worth sharing, and a worker that has gone to
// sleep in between takes longer to wake than the whole step.
constexpr int64_t kWorthWaking = 5 << 20;

const DecodingKernels &kernels() {
#if defined(BQ_HAVE_AVX512) || defined(BQ_HAVE_AVX2)
    const char *isa = bq_isa();
#endif
#if defined(BQ_HAVE_AVX512)
    if (std::strcmp(isa, "avx512") == 0) return kAvx512Decoding;
#endif
#if defined(BQ_HAVE_AVX2)
    if (std::strncmp(isa, "avx", 3) == 0) return kAvx2Decoding;
#endif
    return kPortableDecoding;
}

// Where the vectors of a step lie in the workspace.
struct Workspace {
    int64_t bytes = 0;
    float *stream, *normed, *q, *k, *v, *attended, *projected, *gate, *up, *product, *scores;

    Workspace(const bq_decoder &d, void *memory) {
        auto *base = static_cast<uint8_t *>(memory);
        auto part = [&](int64_t floats) {
            auto *at = base == nullptr ? nullptr : reinterpret_cast<float *>(base + bytes);
            bytes += round_up(floats * 4, 64);
            return at;
        };
        const int64_t queries = d.heads * d.head_size;
        const int64_t widest = d.width > d.hidden ? d.width : d.hidden;
        stream = part(d.width);
        normed = part(widest > queries ? widest : queries);
        q = part(queries);
        k = part(d.kv_heads * d.head_size);
        v = part(d.kv_heads * d.head_size);
        attended = part(queries);
        projected = part(d.width);
        gate = part(d.hidden);
        up = part(d.hidden);
        product = part(d.hidden);
        scores = part(d.heads * score_stride(d));
    }

    static int64_t score_stride(const bq_decoder &d) { return round_up(d.positions, 16); }
};

// --- checks ------------------------------------------------------------------------------------------------------------

bool good_norm(const bq_norm &norm, bool needed) { return norm.weight != nullptr || !needed; }

bool good_layer(const bq_layer &layer, int64_t channels, int64_t width) {
    if (layer.channels != channels || layer.width != width) return false;
    if (layer.prepared == nullptr) {
        return layer.dense != nullptr && (layer.dtype == BQ_FLOAT32 || layer.dtype == BQ_BFLOAT16);
    }
    const PreparedHeader *header = prepared_header(layer.prepared, layer.prepared_bytes);
    if (header == nullptr || layer.quantizer == nullptr) return false;
    const bq_weight &w = header->weight;
    const bq_quantizer &q = *layer.quantizer;
    if (w.channels != channels || w.width != width || q.block < 1 || width % q.block != 0) return false;
    if (w.x_bits == 16) return true;
    return w.x_bits == q.bits && (q.scale == BQ_SCALE_GIVEN) == (layer.given_step != nullptr);
}

bool good_table(const bq_table &table, int64_t width) {
    if (table.dense != nullptr) return table.dtype >= BQ_FLOAT32 && table.dtype <= BQ_FLOAT16;
    return table.packed != nullptr && table.levels != nullptr && table.step != nullptr && table.bits >= 1 &&
           table.bits <= 8 && table.groups >= 1 && width % table.groups == 0 && table.block >= 1 &&
           width % table.block == 0;
}

bool good_block(const bq_decoder &d, const bq_block &b) {
    const int64_t queries = d.heads * d.head_size;
    const int64_t keys = d.kv_heads * d.head_size;
    return good_norm(b.attention_norm, true) && good_norm(b.mlp_norm, true) && good_layer(b.q, queries, d.width) &&
           good_layer(b.k, keys, d.width) && good_layer(b.v, keys, d.width) && good_layer(b.o, d.width, queries) &&
           good_layer(b.gate, d.hidden, d.width) && good_layer(b.up, d.hidden, d.width) &&
           good_layer(b.down, d.width, d.hidden);
}

bool good_decoder(const bq_decoder &d) {
    if (d.layers < 0 || d.width < 1 || d.hidden < 1 || d.heads < 1 || d.kv_heads < 1 || d.vocabulary < 1) return false;
    if (d.heads % d.kv_heads != 0 || d.head_size < 2 || d.head_size % 2 != 0 || d.positions < 1) return false;
    if (d.cos == nullptr || d.sin == nullptr || d.threads < 0) return false;
    if (d.layers > 0 && (d.blocks == nullptr || d.keys == nullptr || d.values == nullptr)) return false;
    for (int64_t i = 0; i < d.layers; ++i) {
        if (!good_block(d, d.blocks[i])) return false;
    }
    return good_table(d.embedding, d.width) && good_norm(d.final_norm, true) &&
           good_layer(d.head, d.vocabulary, d.width);
}

// --- the steps -----------------------------------------------------------------------------------------------------------

bq_prologue prologue_of(const bq_norm &norm) {
    bq_prologue made{};
    made.kind = norm.weight == nullptr ? BQ_PROLOGUE_NONE : BQ_PROLOGUE_RMSNORM;
    made.epsilon = norm.epsilon;
    made.weight = norm.weight;
    return made;
}

// Rows behind a prologue, in float32: a rotation of blocks of one.
int32_t apply(const bq_prologue &prologue, const float *x, int64_t rows, int64_t width, float *out) {
    return bq_rotate_rows(x, width, BQ_FLOAT32, rows, width, 1, &prologue, out, BQ_FLOAT32, 1);
}

void dense(const bq_layer &layer, const float *x, float *out, int32_t threads) {
    const DecodingKernels &kernel = kernels();
    auto share = [&](int64_t begin, int64_t end, int) {
        kernel.dense_rows(layer.dense, layer.dtype, x, layer.bias, layer.width, begin, end, out);
    };
    if (layer.channels * layer.width < kWorthThreads) threads = 1;
    parallel_for(threads, layer.channels, 16, share);
}

// The outputs of up to three layers that read x (K) behind one prologue. `normed` has room for K floats.
int32_t project(const bq_prologue &prologue, const float *x, int count, const bq_layer *const *layers,
                float *const *outs, float *normed, int32_t threads) {
    bool behind = prologue.kind == BQ_PROLOGUE_NONE;
    for (int i = 0; i < count;) {
        const bq_layer &first = *layers[i];
        if (first.prepared == nullptr) {
            if (!behind) {
                const int32_t done = apply(prologue, x, 1, first.width, normed);
                if (done != BQ_OK) return done;
                behind = true;
                x = normed;
            }
            dense(first, x, outs[i++], threads);
            continue;
        }
        bq_rows rows{};
        rows.x = x;
        rows.x_stride = first.width;
        rows.x_dtype = BQ_FLOAT32;
        rows.threads = threads;
        rows.rows = 1;
        rows.width = first.width;
        rows.prologue = behind ? nullptr : &prologue;
        rows.given_step = first.given_step;
        const void *prepared[3];
        int64_t bytes[3];
        bq_output outputs[3];
        int shared = 0;
        for (; i < count && layers[i]->prepared != nullptr && layers[i]->quantizer == first.quantizer &&
               layers[i]->given_step == first.given_step;
             ++i, ++shared) {
            const bq_layer &layer = *layers[i];
            prepared[shared] = layer.prepared;
            bytes[shared] = layer.prepared_bytes;
            outputs[shared] = {outs[i], layer.channels, layer.channels, BQ_FLOAT32, threads, layer.bias};
        }
        const int32_t done = bq_quantized_linear(first.quantizer, &rows, &first.form, shared, prepared, bytes, outputs);
        if (done != BQ_OK) return done;
    }
    return BQ_OK;
}

// Writes what the layers read, for who asked for it (bq_decoder.inputs): one part after the other, in their order.
struct Inputs {
    float *next;

    int32_t note(const bq_prologue &prologue, const float *x, int64_t width) {
        if (next == nullptr) return BQ_OK;
        float *to = next;
        next += width;
        return apply(prologue, x, 1, width, to);
    }
};

// Heads turned by the angles of a position, in place.
void turn(float *x, int64_t heads, int64_t size, const float *cos, const float *sin) {
    const int64_t half = size / 2;
    for (int64_t h = 0; h < heads; ++h, x += size) {
        for (int64_t c = 0; c < half; ++c) {
            const float first = x[c];
            const float second = x[c + half];
            x[c] = first * cos[c] - second * sin[c];
            x[c + half] = second * cos[c + half] + first * sin[c + half];
        }
    }
}

void add(float *to, const float *x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] += x[i];
}

int64_t weight_bytes(const bq_layer &layer) {
    if (layer.prepared != nullptr) return layer.prepared_bytes;
    return layer.channels * layer.width * (layer.dtype == BQ_FLOAT32 ? 4 : 2);
}

// Weights, keys and values that a step reads.
int64_t step_bytes(const bq_decoder &d, int64_t position) {
    int64_t bytes = weight_bytes(d.head) + 8 * d.layers * d.kv_heads * d.head_size * (position + 1);
    for (int64_t i = 0; i < d.layers; ++i) {
        const bq_block &b = d.blocks[i];
        const bq_layer *const layers[] = {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down};
        for (const bq_layer *layer : layers) bytes += weight_bytes(*layer);
    }
    return bytes;
}

int32_t embed(const bq_decoder &d, int64_t token, float *out) {
    const bq_table &table = d.embedding;
    if (table.dense != nullptr) {
        const int64_t size = table.dtype == BQ_FLOAT32 ? 4 : 2;
        const bq_prologue none{};
        const auto *row = static_cast<const uint8_t *>(table.dense) + token * d.width * size;
        return bq_rotate_rows(row, d.width, table.dtype, 1, d.width, 1, &none, out, BQ_FLOAT32, 1);
    }
    const uint8_t *row = table.packed + token * ((d.width * table.bits + 7) / 8);
    const float *step = table.step + token * table.step_stride;
    const int32_t done =
        bq_dequantize_rows(row, table.bits, table.levels, step, table.groups, 1, d.width, out, BQ_FLOAT32, 1);
    if (done != BQ_OK || table.block == 1) return done;
    return bq_rotate_rows(out, d.width, BQ_FLOAT32, 1, d.width, table.block, nullptr, out, BQ_FLOAT32, 1);
}

int32_t attention(const bq_decoder &d, int64_t index, int64_t position, const Workspace &w, Inputs &inputs,
                  int32_t threads) {
    const bq_block &b = d.blocks[index];
    const int64_t size = d.head_size;
    int32_t done = inputs.note(prologue_of(b.attention_norm), w.stream, d.width);
    const bq_layer *const readers[] = {&b.q, &b.k, &b.v};
    float *const outs[] = {w.q, w.k, w.v};
    if (done == BQ_OK) {
        done = project(prologue_of(b.attention_norm), w.stream, 3, readers, outs, w.normed, threads);
    }
    if (done == BQ_OK && b.q_norm.weight != nullptr) done = apply(prologue_of(b.q_norm), w.q, d.heads, size, w.q);
    if (done == BQ_OK && b.k_norm.weight != nullptr) done = apply(prologue_of(b.k_norm), w.k, d.kv_heads, size, w.k);
    if (done != BQ_OK) return done;
    turn(w.q, d.heads, size, d.cos + position * size, d.sin + position * size);
    turn(w.k, d.kv_heads, size, d.cos + position * size, d.sin + position * size);
    const int64_t head_stride = d.positions * size;
    float *keys = d.keys + index * d.kv_heads * head_stride;
    float *values = d.values + index * d.kv_heads * head_stride;
    for (int64_t h = 0; h < d.kv_heads; ++h) {
        const size_t bytes = static_cast<size_t>(size) * sizeof(float);
        std::memcpy(keys + h * head_stride + position * size, w.k + h * size, bytes);
        std::memcpy(values + h * head_stride + position * size, w.v + h * size, bytes);
    }
    const DecodingKernels &kernel = kernels();
    const int64_t seen = position + 1;
    const int64_t served = d.heads / d.kv_heads;  // query heads of a key-value head
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    auto share = [&](int64_t begin, int64_t end, int) {
        for (int64_t h = begin; h < end; ++h) {
            const int64_t at = h / served * head_stride;
            kernel.attend(w.q + h * size, keys + at, values + at, seen, size, scale,
                          w.scores + h * Workspace::score_stride(d), w.attended + h * size);
        }
    };
    parallel_for(2 * d.heads * seen * size < kWorthThreads ? 1 : threads, d.heads, 1, share);
    const bq_layer *const reader[] = {&b.o};
    float *const out[] = {w.projected};
    done = inputs.note(prologue_of(b.o_norm), w.attended, d.heads * size);
    if (done == BQ_OK) done = project(prologue_of(b.o_norm), w.attended, 1, reader, out, w.normed, threads);
    if (done == BQ_OK) add(w.stream, w.projected, d.width);
    return done;
}

int32_t mlp(const bq_decoder &d, const bq_block &b, const Workspace &w, Inputs &inputs, int32_t threads) {
    const bq_layer *const readers[] = {&b.gate, &b.up};
    float *const outs[] = {w.gate, w.up};
    int32_t done = inputs.note(prologue_of(b.mlp_norm), w.stream, d.width);
    if (done == BQ_OK) done = project(prologue_of(b.mlp_norm), w.stream, 2, readers, outs, w.normed, threads);
    if (done != BQ_OK) return done;
    bq_prologue gated{};
    gated.kind = BQ_PROLOGUE_SWIGLU;
    gated.up = w.up;
    gated.up_stride = d.hidden;
    const bq_layer *const reader[] = {&b.down};
    float *const out[] = {w.projected};
    if (b.down_norm.weight == nullptr) {
        done = inputs.note(gated, w.gate, d.hidden);
        if (done == BQ_OK) done = project(gated, w.gate, 1, reader, out, w.normed, threads);
    } else {
        done = apply(gated, w.gate, 1, d.hidden, w.product);
        if (done == BQ_OK) done = inputs.note(prologue_of(b.down_norm), w.product, d.hidden);
        if (done == BQ_OK) done = project(prologue_of(b.down_norm), w.product, 1, reader, out, w.normed, threads);
    }
    if (done == BQ_OK) add(w.stream, w.projected, d.width);
    return done;
}

}  // namespace

int32_t bq_decoder_bytes(const bq_decoder *decoder, int64_t *bytes) {
    if (*bq_isa() == '\0') return BQ_NO_ISA;
    if (decoder == nullptr || bytes == nullptr || !good_decoder(*decoder)) return BQ_BAD_ARGUMENT;
    *bytes = Workspace(*decoder, nullptr).bytes;
    return BQ_OK;
}

int32_t bq_decode_token(const bq_decoder *decoder, int64_t token, int64_t position, float *logits) {
    if (*bq_isa() == '\0') return BQ_NO_ISA;
    if (decoder == nullptr || logits == nullptr) return BQ_BAD_ARGUMENT;
    const bq_decoder &d = *decoder;
    if (token < 0 || token >= d.vocabulary || position < 0 || position >= d.positions) return BQ_BAD_ARGUMENT;
    if (d.workspace == nullptr || reinterpret_cast<uintptr_t>(d.workspace) % 64 != 0) return BQ_BAD_ARGUMENT;
    const Workspace w(d, d.workspace);
    if (d.workspace_bytes < w.bytes) return BQ_BAD_ARGUMENT;
    int32_t threads = d.threads > 0 ? d.threads : default_threads();
    if (step_bytes(d, position) < kWorthWaking) threads = 1;
    Inputs inputs{d.inputs};
    int32_t done = embed(d, token, w.stream);
    for (int64_t i = 0; i < d.layers && done == BQ_OK; ++i) {
        done = attention(d, i, position, w, inputs, threads);
        if (done == BQ_OK) done = mlp(d, d.blocks[i], w, inputs, threads);
    }
    if (done == BQ_OK) done = inputs.note(prologue_of(d.final_norm), w.stream, d.width);
    if (done != BQ_OK) return done;
    const bq_layer *const reader[] = {&d.head};
    float *const out[] = {logits};
    return project(prologue_of(d.final_norm), w.stream, 1, reader, out, w.normed, threads);
}

int32_t bq_dense_vector(const bq_layer *layer, const float *x, float *out, int32_t threads) {
    if (*bq_isa() == '\0') return BQ_NO_ISA;
    if (layer == nullptr || layer->prepared != nullptr || layer->width < 1 || layer->channels < 0) return BQ_BAD_ARGUMENT;
    if (layer->channels == 0) return BQ_OK;
    if (x == nullptr || out == nullptr || !good_layer(*layer, layer->channels, layer->width)) return BQ_BAD_ARGUMENT;
    dense(*layer, x, out, threads > 0 ? threads : default_threads());
    return BQ_OK;
}

int32_t bq_attend(const float *q, const float *keys, const float *values, int64_t seen, int64_t head_size,
                  float *scores, float *out) {
    if (*bq_isa() == '\0') return BQ_NO_ISA;
    if (seen < 1 || head_size < 1) return BQ_BAD_ARGUMENT;
    if (q == nullptr || keys == nullptr || values == nullptr || scores == nullptr || out == nullptr) return BQ_BAD_ARGUMENT;
    kernels().attend(q, keys, values, seen, head_size, 1.0f / std::sqrt(static_cast<float>(head_size)), scores, out);
    return BQ_OK;
}

int32_t bq_attend_rows(const float *q, int64_t q_head_stride, int64_t q_row_stride, int64_t heads, int64_t rows,
                       const float *keys, const float *values, int64_t head_stride, int64_t kv_heads, int64_t first,
                       int64_t head_size, float *out, int32_t threads) {
    if (*bq_isa() == '\0') return BQ_NO_ISA;
    if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0 || rows < 0 || first < 0 || head_size < 1) return BQ_BAD_ARGUMENT;
    if (head_stride < (first + rows) * head_size) return BQ_BAD_ARGUMENT;
    if (rows == 0) return BQ_OK;
    if (q == nullptr || keys == nullptr || values == nullptr || out == nullptr) return BQ_BAD_ARGUMENT;
    const DecodingKernels &kernel = kernels();
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_size));
    const size_t bytes = static_cast<size_t>(round_up(first + rows, 16)) * sizeof(float);
    bool failed = false;  // set by any thread, never cleared
    // A head's keys and values stay in the cache while its rows go by.
    auto share = [&](int64_t begin, int64_t end, int) {
        auto *scores = static_cast<float *>(scratch(0, bytes));
        if (scores == nullptr) {
            __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
            return;
        }
        for (int64_t h = begin; h < end; ++h) {
            const int64_t at = h / (heads / kv_heads) * head_stride;
            for (int64_t t = 0; t < rows; ++t) {
                kernel.attend(q + h * q_head_stride + t * q_row_stride, keys + at, values + at, first + t + 1, head_size,
                              scale, scores, out + (t * heads + h) * head_size);
            }
        }
    };
    parallel_for(threads > 0 ? threads : default_threads(), heads, 1, share);
    return failed ? BQ_NO_MEMORY : BQ_OK;
}
