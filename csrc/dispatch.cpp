// The C interface: checks what callers pass, and hands it to the instruction set chosen when the library is first used.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#include "processor.h"

namespace bq {
namespace {

bool machine_has(Isa isa) {
    switch (isa) {
    case kPortable: return true;
#if defined(__x86_64__)
    case kAvx2:
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    case kAvxVnni: return machine_has(kAvx2) && has_avx_vnni();
    case kAvx512:
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
               __builtin_cpu_supports("avx512bitalg") && __builtin_cpu_supports("gfni") &&
               __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
#if defined(BQ_HAVE_NEON)
    case kNeon: return true;  // part of every 64-bit Arm
    case kNeonDot: return has_dot_products();
    case kNeonI8mm: return has_dot_products() && has_mixed_dot_products();
#endif
    default: return false;
    }
}

// Best first.
const Kernels *const kTables[] = {
#if defined(BQ_HAVE_AVX512)
    &kAvx512Kernels,
#endif
#if defined(BQ_HAVE_AVXVNNI)
    &kAvxVnniKernels,
#endif
#if defined(BQ_HAVE_AVX2)
    &kAvx2Kernels,
#endif
#if defined(BQ_HAVE_NEONI8MM)
    &kNeonI8mmKernels,
#endif
#if defined(BQ_HAVE_NEONDOT)
    &kNeonDotKernels,
#endif
#if defined(BQ_HAVE_NEON)
    &kNeonKernels,
#endif
    &kPortableKernels,
};

struct Choice {
    const Kernels *kernels = nullptr;
    char available[64] = "";

    Choice() {
        const char *forced = std::getenv("BITQUEST_ISA");
        if (forced != nullptr && *forced == '\0') forced = nullptr;
        for (const Kernels *table : kTables) {
            if (!machine_has(table->isa)) continue;
            if (available[0] != '\0') std::strcat(available, " ");
            std::strcat(available, table->name);
            if (kernels == nullptr && (forced == nullptr || std::strcmp(forced, table->name) == 0)) kernels = table;
        }
    }
};

const Choice &choice() {
    static const Choice made;
    return made;
}

const Kernels *table_of(int32_t isa) {
    for (const Kernels *table : kTables) {
        if (table->isa == isa) return table;
    }
    return nullptr;
}

int32_t thread_count(int32_t asked) { return asked > 0 ? asked : default_threads(); }

bool is_float_dtype(int32_t dtype) { return dtype >= BQ_FLOAT32 && dtype <= BQ_FLOAT16; }

bool is_block(int32_t block, int64_t width) {
    return block >= 1 && (block & (block - 1)) == 0 && width % block == 0;
}

bool good_prologue(const bq_prologue *prologue) {
    if (prologue == nullptr || prologue->kind == BQ_PROLOGUE_NONE) return true;
    if (prologue->kind == BQ_PROLOGUE_RMSNORM) return prologue->weight != nullptr;
    return prologue->kind == BQ_PROLOGUE_SWIGLU && prologue->up != nullptr;
}

int32_t check_quantizer(const bq_quantizer &q, int64_t width) {
    if (q.bits < 1 || q.bits > 8) return BQ_BAD_ARGUMENT;
    if (q.levels != 0) {
        if (q.levels < 2 || q.levels > (1 << q.bits)) return BQ_BAD_ARGUMENT;
        if (q.level == nullptr || q.middle == nullptr) return BQ_BAD_ARGUMENT;
    }
    if (!is_block(q.block, width)) return BQ_BAD_ARGUMENT;
    if (q.scale < BQ_SCALE_GAUSSIAN || q.scale > BQ_SCALE_GIVEN) return BQ_BAD_ARGUMENT;
    if (q.mask != BQ_MASK_RANGE && q.mask != BQ_MASK_DISTANCE) return BQ_BAD_ARGUMENT;
    if (q.group < 0 || (q.group > 0 && width % q.group != 0)) return BQ_BAD_ARGUMENT;
    return BQ_OK;
}

bool good_weight(const bq_weight &w) {
    return w.channels >= 0 && w.width >= 1 && w.groups >= 1 && w.width % w.groups == 0 && w.bits >= 1 && w.bits <= 8 &&
           ((w.x_bits >= 1 && w.x_bits <= 8) || w.x_bits == 16) && !(w.sparse != 0 && w.form.offset != 0);
}

// The table whose layout a weight takes: the chosen one, or the portable one where that refuses.
const Kernels *table_for(const bq_weight &weight, int64_t *payload) {
    const Kernels *chosen = choice().kernels;
    if (chosen->payload_bytes != nullptr && chosen->payload_bytes(weight, payload) == BQ_OK) return chosen;
    if (kPortableKernels.payload_bytes(weight, payload) == BQ_OK) return &kPortableKernels;
    return nullptr;
}

int32_t check_activation(const bq_weight &w, const bq_activation &x) {
    if (x.rows < 0 || x.width != w.width) return BQ_BAD_ARGUMENT;
    if (x.rows == 0) return BQ_OK;
    if (w.x_bits == 16) return x.values != nullptr && x.values_stride >= w.width ? BQ_OK : BQ_BAD_ARGUMENT;
    if (x.factors == nullptr && !(w.x_bits == 1 && x.packed != nullptr)) return BQ_BAD_ARGUMENT;
    if (x.groups < 1 || w.width % x.groups != 0) return BQ_BAD_ARGUMENT;
    if (x.groups % w.groups != 0 && w.groups % x.groups != 0) return BQ_BAD_ARGUMENT;
    return BQ_OK;
}

}  // namespace

const PreparedHeader *prepared_header(const void *prepared, int64_t bytes) {
    if (prepared == nullptr || reinterpret_cast<uintptr_t>(prepared) % 64 != 0) return nullptr;
    if (bytes < kPreparedHeaderBytes) return nullptr;
    const auto *header = static_cast<const PreparedHeader *>(prepared);
    if (header->magic != kPreparedMagic || header->bytes != bytes) return nullptr;
    if (table_of(header->isa) == nullptr || !machine_has(static_cast<Isa>(header->isa))) return nullptr;
    return header;
}

}  // namespace bq

using namespace bq;

#define BQ_REQUIRE_ISA()                                   \
    do {                                                   \
        if (choice().kernels == nullptr) return BQ_NO_ISA; \
    } while (false)

const char *bq_isa(void) { return choice().kernels == nullptr ? "" : choice().kernels->name; }

const char *bq_isa_available(void) { return choice().available; }

const char *bq_message(int32_t error) {
    switch (error) {
    case BQ_OK: return "no error";
    case BQ_BAD_ARGUMENT: return "sizes or pointers that do not fit together";
    case BQ_UNSUPPORTED: return "a case the native engine leaves to another backend";
    case BQ_NO_MEMORY: return "out of memory";
    case BQ_NO_ISA: return "BITQUEST_ISA names an instruction set that is not available here";
    default: return "unknown error";
    }
}

int32_t bq_set_threads(int32_t threads) {
    if (threads < 1) return BQ_BAD_ARGUMENT;
    set_default_threads(threads);
    return BQ_OK;
}

int32_t bq_quantize_rows(const bq_quantizer *quantizer, const bq_rows *rows) {
    BQ_REQUIRE_ISA();
    if (quantizer == nullptr || rows == nullptr) return BQ_BAD_ARGUMENT;
    bq_quantizer q = *quantizer;
    bq_rows r = *rows;
    if (r.rows < 0 || r.width < 1 || !is_float_dtype(r.x_dtype) || !good_prologue(r.prologue)) return BQ_BAD_ARGUMENT;
    const int32_t checked = check_quantizer(q, r.width);
    if (checked != BQ_OK) return checked;
    if (q.scale == BQ_SCALE_GIVEN && r.given_step == nullptr) return BQ_BAD_ARGUMENT;
    if ((r.factors != nullptr || r.sums != nullptr) && q.levels != 0 && q.integer == nullptr) return BQ_UNSUPPORTED;
    if (q.block > 128) return BQ_UNSUPPORTED;
    if (r.rows == 0) return BQ_OK;
    if (r.x == nullptr) return BQ_BAD_ARGUMENT;
    if (q.group == 0) q.group = r.width;
    if (r.x_stride == 0) r.x_stride = r.width;
    r.threads = thread_count(r.threads);
    bq_prologue prologue;
    if (r.prologue != nullptr) {
        prologue = *r.prologue;
        if (prologue.up_stride == 0) prologue.up_stride = r.width;
        r.prologue = prologue.kind == BQ_PROLOGUE_NONE ? nullptr : &prologue;
    }
    const Kernels *chosen = choice().kernels;
    if (chosen->quantize_rows != nullptr) {
        const int32_t done = chosen->quantize_rows(q, r);
        if (done != BQ_UNSUPPORTED) return done;
    }
    return kPortableKernels.quantize_rows(q, r);
}

int32_t bq_rotate_rows(const void *x, int64_t x_stride, int32_t x_dtype, int64_t rows, int64_t width, int32_t block,
                       const bq_prologue *prologue, void *out, int32_t out_dtype, int32_t threads) {
    BQ_REQUIRE_ISA();
    if (rows < 0 || width < 1 || !is_float_dtype(x_dtype) || !is_float_dtype(out_dtype)) return BQ_BAD_ARGUMENT;
    if (!is_block(block, width) || !good_prologue(prologue)) return BQ_BAD_ARGUMENT;
    if (block > 128) return BQ_UNSUPPORTED;
    if (rows == 0) return BQ_OK;
    if (x == nullptr || out == nullptr) return BQ_BAD_ARGUMENT;
    bq_prologue filled;
    if (prologue != nullptr) {
        filled = *prologue;
        if (filled.up_stride == 0) filled.up_stride = width;
        prologue = filled.kind == BQ_PROLOGUE_NONE ? nullptr : &filled;
    }
    const Kernels *chosen = choice().kernels;
    const Kernels *table = chosen->rotate_rows != nullptr ? chosen : &kPortableKernels;
    return table->rotate_rows(x, x_stride == 0 ? width : x_stride, x_dtype, rows, width, block, prologue, out,
                              out_dtype, thread_count(threads));
}

int32_t bq_mask_rotate(const void *gradient, int64_t stride, int32_t dtype, const uint8_t *mask, int64_t rows,
                       int64_t width, int32_t block, void *out, int32_t out_dtype, int32_t threads) {
    BQ_REQUIRE_ISA();
    if (rows < 0 || width < 1 || !is_float_dtype(dtype) || !is_float_dtype(out_dtype)) return BQ_BAD_ARGUMENT;
    if (!is_block(block, width)) return BQ_BAD_ARGUMENT;
    if (block > 128) return BQ_UNSUPPORTED;
    if (rows == 0) return BQ_OK;
    if (gradient == nullptr || out == nullptr) return BQ_BAD_ARGUMENT;
    const Kernels *chosen = choice().kernels;
    const Kernels *table = chosen->mask_rotate != nullptr ? chosen : &kPortableKernels;
    return table->mask_rotate(gradient, stride == 0 ? width : stride, dtype, mask, rows, width, block, out,
                              out_dtype, thread_count(threads));
}

int32_t bq_dequantize_rows(const uint8_t *packed, int32_t bits, const float *levels, const float *step, int64_t groups,
                           int64_t rows, int64_t width, void *out, int32_t out_dtype, int32_t threads) {
    BQ_REQUIRE_ISA();
    if (rows < 0 || width < 1 || bits < 1 || bits > 8 || groups < 1 || width % groups != 0) return BQ_BAD_ARGUMENT;
    if (!is_float_dtype(out_dtype)) return BQ_BAD_ARGUMENT;
    if (rows == 0) return BQ_OK;
    if (packed == nullptr || levels == nullptr || step == nullptr || out == nullptr) return BQ_BAD_ARGUMENT;
    const Kernels *chosen = choice().kernels;
    threads = thread_count(threads);
    if (chosen->dequantize_rows != nullptr) {
        const int32_t done =
            chosen->dequantize_rows(packed, bits, levels, step, groups, rows, width, out, out_dtype, threads);
        if (done != BQ_UNSUPPORTED) return done;
    }
    return kPortableKernels.dequantize_rows(packed, bits, levels, step, groups, rows, width, out, out_dtype, threads);
}

int32_t bq_weight_bytes(const bq_weight *weight, int64_t *bytes) {
    BQ_REQUIRE_ISA();
    if (weight == nullptr || bytes == nullptr || !good_weight(*weight)) return BQ_BAD_ARGUMENT;
    int64_t payload = 0;
    if (table_for(*weight, &payload) == nullptr) return BQ_UNSUPPORTED;
    *bytes = kPreparedHeaderBytes + payload;
    return BQ_OK;
}

int32_t bq_prepare_weight(const bq_weight *weight, void *prepared, int32_t threads) {
    BQ_REQUIRE_ISA();
    if (weight == nullptr || prepared == nullptr || !good_weight(*weight)) return BQ_BAD_ARGUMENT;
    if (reinterpret_cast<uintptr_t>(prepared) % 64 != 0) return BQ_BAD_ARGUMENT;
    if (weight->channels > 0) {
        if ((weight->packed == nullptr) == (weight->factors == nullptr) || weight->step == nullptr) return BQ_BAD_ARGUMENT;
        if (weight->packed != nullptr && (weight->sparse != 0) != (weight->kept != nullptr)) return BQ_BAD_ARGUMENT;
    }
    int64_t payload = 0;
    const Kernels *table = table_for(*weight, &payload);
    if (table == nullptr) return BQ_UNSUPPORTED;
    PreparedHeader header{};
    header.magic = kPreparedMagic;
    header.isa = table->isa;
    header.weight = *weight;
    header.weight.packed = nullptr;
    header.weight.factors = nullptr;
    header.weight.integer = nullptr;
    header.weight.kept = nullptr;
    header.weight.step = nullptr;
    header.bytes = kPreparedHeaderBytes + payload;
    std::memset(prepared, 0, kPreparedHeaderBytes);
    int32_t done = BQ_OK;
    if (weight->channels > 0) {
        done = table->prepare(*weight, static_cast<uint8_t *>(prepared) + kPreparedHeaderBytes, thread_count(threads));
    }
    if (done == BQ_OK) std::memcpy(prepared, &header, sizeof(header));  // last: an unfinished weight is not one
    return done;
}

int32_t bq_linear(const void *prepared, int64_t prepared_bytes, const bq_activation *x, const bq_output *output) {
    BQ_REQUIRE_ISA();
    const PreparedHeader *header = prepared_header(prepared, prepared_bytes);
    if (header == nullptr || x == nullptr || output == nullptr) return BQ_BAD_ARGUMENT;
    const bq_weight &w = header->weight;
    bq_activation filled = *x;
    if (filled.values_stride == 0) filled.values_stride = w.width;
    const int32_t checked = check_activation(w, filled);
    if (checked != BQ_OK) return checked;
    if (filled.rows == 0 || w.channels == 0) return BQ_OK;
    bq_output to = *output;
    if (to.channels != w.channels || to.out == nullptr || !is_float_dtype(to.dtype)) return BQ_BAD_ARGUMENT;
    if (w.x_bits != 16 && filled.step == nullptr) return BQ_BAD_ARGUMENT;
    if (to.stride == 0) to.stride = w.channels;
    to.threads = thread_count(to.threads);
    const auto *payload = static_cast<const uint8_t *>(prepared) + kPreparedHeaderBytes;
    return table_of(header->isa)->linear(w, payload, filled, to);
}

int32_t bq_product(const void *prepared, int64_t prepared_bytes, const bq_activation *x, int32_t *out,
                   int64_t channels, int32_t threads) {
    BQ_REQUIRE_ISA();
    const PreparedHeader *header = prepared_header(prepared, prepared_bytes);
    if (header == nullptr || x == nullptr) return BQ_BAD_ARGUMENT;
    const bq_weight &w = header->weight;
    if (w.x_bits == 16) return BQ_UNSUPPORTED;
    const int32_t checked = check_activation(w, *x);
    if (checked != BQ_OK) return checked;
    if (x->rows == 0 || w.channels == 0) return BQ_OK;
    if (out == nullptr || channels != w.channels) return BQ_BAD_ARGUMENT;
    const auto *payload = static_cast<const uint8_t *>(prepared) + kPreparedHeaderBytes;
    return table_of(header->isa)->product(w, payload, *x, out, thread_count(threads));
}
