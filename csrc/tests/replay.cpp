// Replays what the definition computed: reads golden vectors (tests/ops/native/golden.py writes them), runs every one
// through the C interface, with 1 and with 3 threads, and compares. For builds that Python cannot load: sanitizers,
// other processors. BITQUEST_ISA chooses the instruction set.
//
//   replay golden.bin        exit code 0: all equal; 1: some differ; 2: the file or the library cannot be used
//   replay --isas            prints the instruction sets that are there
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../include/bitquest.h"

namespace {

[[noreturn]] void give_up(const char *why) {
    std::fprintf(stderr, "replay: %s\n", why);
    std::exit(2);
}

#if !defined(__SANITIZE_ADDRESS__)
constexpr bool kGuarded = true;
#else
constexpr bool kGuarded = false;  // the sanitizer sees as much, and says more
#endif

// Memory that ends where a page begins that must not be touched: the first byte read beyond ends the program.
class Guarded {
  public:
    explicit Guarded(size_t size) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), inner_((size + page_) / page_ * page_) {
        if (!kGuarded) {
            if (posix_memalign(&memory_, 64, size > 0 ? size : 1) != 0) give_up("no memory");
            data = memory_;
            return;
        }
        memory_ = mmap(nullptr, inner_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory_ == MAP_FAILED) give_up("no memory");
        char *end = static_cast<char *>(memory_) + inner_;
        if (mprotect(end, page_, PROT_NONE) != 0) give_up("no memory");
        data = end - size;
    }
    Guarded(const Guarded &) = delete;
    Guarded(Guarded &&other) noexcept
        : data(other.data), page_(other.page_), inner_(other.inner_), memory_(other.memory_) {
        other.memory_ = nullptr;
    }
    ~Guarded() {
        if (memory_ == nullptr) return;
        kGuarded ? static_cast<void>(munmap(memory_, inner_ + page_)) : std::free(memory_);
    }

    void *data = nullptr;

  private:
    size_t page_;
    size_t inner_;
    void *memory_ = nullptr;
};

// Exactly as long as its contents.
struct Array : Guarded {
    explicit Array(size_t size) : Guarded(size), bytes(size) { std::memset(data, 0xa5, size); }

    template <class T>
    T *as() const {
        return bytes == 0 ? nullptr : static_cast<T *>(data);
    }

    size_t bytes;
};

struct Record {
    int64_t kind = 0;
    std::string name;
    std::vector<int64_t> integers;
    std::vector<float> floats;
    std::vector<Array> arrays;
};

void read_bytes(std::FILE *file, void *to, size_t bytes) {
    if (bytes > 0 && std::fread(to, 1, bytes, file) != bytes) give_up("the file ends early");
}

int64_t read_integer(std::FILE *file) {
    int64_t value = 0;
    read_bytes(file, &value, sizeof value);
    if (value < -(1ll << 40) || value > (1ll << 40)) give_up("the file is damaged");
    return value;
}

bool read_record(std::FILE *file, Record *record) {
    if (std::fread(&record->kind, 1, sizeof record->kind, file) != sizeof record->kind) return false;
    record->name.resize(static_cast<size_t>(read_integer(file)));
    read_bytes(file, &record->name[0], record->name.size());
    record->integers.resize(static_cast<size_t>(read_integer(file)));
    for (int64_t &value : record->integers) value = read_integer(file);
    record->floats.resize(static_cast<size_t>(read_integer(file)));
    read_bytes(file, record->floats.data(), record->floats.size() * sizeof(float));
    for (int64_t left = read_integer(file); left > 0; --left) {
        record->arrays.emplace_back(static_cast<size_t>(read_integer(file)));
        read_bytes(file, record->arrays.back().data, record->arrays.back().bytes);
    }
    return true;
}

int failures = 0;

void fail(const Record &record, int threads, const char *what, long long at, double made, double wanted) {
    if (++failures > 20) return;
    std::printf("%s, %d threads: %s[%lld] is %.9g, not %.9g\n", record.name.c_str(), threads, what, at, made, wanted);
}

template <class T>
void compare(const Record &record, int threads, const char *what, const Array &made, const Array &wanted,
             double relative = 0, double absolute = 0) {
    for (size_t i = 0; i < wanted.bytes / sizeof(T); ++i) {
        const double a = static_cast<double>(made.as<T>()[i]);
        const double b = static_cast<double>(wanted.as<T>()[i]);
        if (a == b || std::fabs(a - b) <= relative * std::fabs(b) + absolute) continue;
        return fail(record, threads, what, static_cast<long long>(i), a, b);
    }
}

bool ran(const Record &record, int threads, int32_t code) {
    if (code == BQ_OK) return true;
    ++failures;
    std::printf("%s, %d threads: %s\n", record.name.c_str(), threads, bq_message(code));
    return false;
}

// arrays: level, middle, integer, x, and what is wanted: factors, packed, mask, sums, step
void replay_quantize(const Record &record, int threads) {
    const auto &n = record.integers;
    const auto &f = record.floats;
    const auto &a = record.arrays;
    bq_quantizer q{};
    q.bits = static_cast<int32_t>(n[0]);
    q.levels = static_cast<int32_t>(n[1]);
    q.block = static_cast<int32_t>(n[2]);
    q.scale = static_cast<int32_t>(n[3]);
    q.group = n[4];
    q.mask = static_cast<int32_t>(n[5]);
    q.multiplier = f[0];
    q.epsilon = f[1];
    q.max_level = f[2];
    q.mask_low = f[3];
    q.mask_high = f[4];
    q.level = a[0].as<float>();
    q.middle = a[1].as<float>();
    q.integer = a[2].as<int8_t>();
    Array factors(a[4].bytes), packed(a[5].bytes), mask(a[6].bytes), sums(a[7].bytes), step(a[8].bytes);
    bq_rows r{};
    r.x_dtype = static_cast<int32_t>(n[6]);
    r.rows = n[7];
    r.width = n[8];
    r.threads = threads;
    r.x = a[3].as<void>();
    r.factors = factors.as<int8_t>();
    r.packed = packed.as<uint8_t>();
    r.mask = mask.as<uint8_t>();
    r.sums = sums.as<int32_t>();
    r.step = step.as<float>();
    if (!ran(record, threads, bq_quantize_rows(&q, &r))) return;
    compare<int8_t>(record, threads, "factors", factors, a[4]);
    compare<uint8_t>(record, threads, "packed", packed, a[5]);
    compare<uint8_t>(record, threads, "mask", mask, a[6]);
    compare<int32_t>(record, threads, "sums", sums, a[7]);
    compare<float>(record, threads, "step", step, a[8], 2e-6);
}

// arrays: gradient float32, mask, wanted float32
void replay_mask_rotate(const Record &record, int threads) {
    const auto &n = record.integers;
    const auto &a = record.arrays;
    Array out(a[2].bytes);
    if (!ran(record, threads,
             bq_mask_rotate(a[0].data, 0, BQ_FLOAT32, a[1].as<uint8_t>(), n[0], n[1], static_cast<int32_t>(n[2]),
                            out.data, BQ_FLOAT32, threads))) {
        return;
    }
    compare<float>(record, threads, "rotated", out, a[2], 1e-5, 1e-5);
}

// arrays: packed, levels, step, wanted float32
void replay_dequantize(const Record &record, int threads) {
    const auto &n = record.integers;
    const auto &a = record.arrays;
    Array out(a[3].bytes);
    if (!ran(record, threads,
             bq_dequantize_rows(a[0].as<uint8_t>(), static_cast<int32_t>(n[0]), a[1].as<float>(), a[2].as<float>(),
                                n[1], n[2], n[3], out.data, BQ_FLOAT32, threads))) {
        return;
    }
    compare<float>(record, threads, "values", out, a[3]);
}

// arrays: weight packed, integer, kept, step, bias; activation factors, packed, sums, step, values; wanted product, y
void replay_linear(const Record &record, int threads) {
    const auto &n = record.integers;
    const auto &f = record.floats;
    const auto &a = record.arrays;
    bq_weight w{};
    w.channels = n[0];
    w.width = n[1];
    w.groups = n[2];
    w.bits = static_cast<int32_t>(n[3]);
    w.x_bits = static_cast<int32_t>(n[4]);
    w.x_uniform = static_cast<int32_t>(n[5]);
    w.sparse = a[2].bytes > 0 ? 1 : 0;
    w.form = {f[0], static_cast<int32_t>(n[6]), static_cast<int32_t>(n[7])};
    w.packed = a[0].as<uint8_t>();
    w.integer = a[1].as<int8_t>();
    w.kept = a[2].as<uint8_t>();
    w.step = a[3].as<float>();
    int64_t bytes = 0;
    if (!ran(record, threads, bq_weight_bytes(&w, &bytes))) return;
    const Guarded memory(static_cast<size_t>(bytes));
    void *prepared = memory.data;
    if (ran(record, threads, bq_prepare_weight(&w, prepared, threads))) {
        bq_activation x{};
        x.rows = n[8];
        x.width = w.width;
        x.groups = n[9];
        x.form = {f[1], static_cast<int32_t>(n[10]), static_cast<int32_t>(n[11])};
        x.factors = a[5].as<int8_t>();
        x.packed = a[6].as<uint8_t>();
        x.sums = a[7].as<int32_t>();
        x.step = a[8].as<float>();
        x.values = a[9].as<float>();
        Array out(a[11].bytes);
        bq_output to{};
        to.out = out.data;
        to.channels = w.channels;
        to.dtype = BQ_FLOAT32;
        to.threads = threads;
        to.bias = a[4].as<float>();
        if (ran(record, threads, bq_linear(prepared, bytes, &x, &to))) {
            compare<float>(record, threads, "y", out, a[11], 1e-5, f[2]);
        }
        if (a[10].bytes > 0) {
            Array exact(a[10].bytes);
            if (ran(record, threads, bq_product(prepared, bytes, &x, exact.as<int32_t>(), w.channels, threads))) {
                compare<int32_t>(record, threads, "product", exact, a[10]);
            }
        }
    }
}

}  // namespace

int main(int count, char **arguments) {
    if (count != 2) give_up("usage: replay golden.bin, or replay --isas");
    if (std::strcmp(arguments[1], "--isas") == 0) {
        std::puts(bq_isa_available());
        return 0;
    }
    if (bq_isa()[0] == '\0') give_up(bq_message(BQ_NO_ISA));
    std::FILE *file = std::fopen(arguments[1], "rb");
    if (file == nullptr) give_up("the file cannot be opened");
    int64_t records = 0;
    for (Record record; read_record(file, &record); record = Record(), ++records) {
        for (const int threads : {1, 3}) {
            switch (record.kind) {
            case 1: replay_quantize(record, threads); break;
            case 2: replay_mask_rotate(record, threads); break;
            case 3: replay_dequantize(record, threads); break;
            case 4: replay_linear(record, threads); break;
            default: give_up("an unknown kind of record");
            }
        }
    }
    std::fclose(file);
    std::printf("%s: %lld records, %d failures\n", bq_isa(), static_cast<long long>(records), failures);
    return failures == 0 && records > 0 ? 0 : 1;
}
