// Runs b1_sums and b1_mma under the emulator: a launch on standard input, its result on standard output.
#include <b1_sums.cu>
#include <b1_mma.cu>

struct Aligned {
  void operator()(u8* bytes) const { operator delete[](bytes, std::align_val_t{16}); }
};
using Bytes = std::unique_ptr<u8[], Aligned>;

// Exactly as large as promised: one byte further is an error to the sanitizer.
Bytes allocate(std::size_t count) {
  Bytes made(static_cast<u8*>(operator new[](count, std::align_val_t{16})));
  std::memset(made.get(), 0xCD, count);
  return made;
}
Bytes read_bytes(std::size_t count) {
  Bytes made = allocate(count);
  if (std::fread(made.get(), 1, count, stdin) != count) emulator::fail("the input ends early");
  return made;
}
template <typename T>
T* as(const Bytes& bytes) {
  return reinterpret_cast<T*>(bytes.get());
}

// `rows` rows as far apart as the kernel is told, and nothing behind the last.
Bytes read_rows(int rows, i64 pitch, int width) { return read_bytes((rows - 1) * pitch + (width + 7) / 8); }

Bytes read_row_values(bool given, int rows) { return given ? read_bytes(4 * rows) : nullptr; }

int write(const Bytes& bytes, std::size_t count) { return std::fwrite(bytes.get(), 1, count, stdout) == count ? 0 : 1; }

int main() {
  // What is launched, with what grid, and the kernel's own arguments; flags say which arrays are given.
  const Bytes head = read_bytes(13 * 4);
  const int* values = as<const int>(head);
  const unsigned seed = values[0];
  const int blocks = values[2], threads = values[3], shared_bytes = values[4];
  const int rows = values[5], channels = values[6], width = values[7];
  const i64 x_pitch = values[8], w_pitch = values[9];
  const bool has_steps = values[10], has_bias = values[11], has_sums = values[12];
  const Bytes x = read_rows(rows, x_pitch, width);
  if (values[1] == 0) {
    const Bytes sums = allocate(4 * rows);
    for (int index = 0; index < blocks; ++index) {
      emulator::run_block(index, threads, shared_bytes, seed,
                          [&] { b1_sums(x.get(), as<int>(sums), rows, width, x_pitch); });
    }
    return write(sums, 4 * rows);
  }
  if (threads != THREADS) emulator::fail("the kernel is made for another number of threads", threads);
  if (shared_bytes != SHARED_BYTES) emulator::fail("the kernel takes another size of shared memory", SHARED_BYTES);
  const Bytes w = read_rows(channels, w_pitch, width);
  const Bytes x_step = read_row_values(has_steps, rows), w_step = read_row_values(has_steps, channels);
  const Bytes bias = read_row_values(has_bias, channels);
  const Bytes x_sums = read_row_values(has_sums, rows), w_sums = read_row_values(has_sums, channels);
  const std::size_t bytes = static_cast<std::size_t>(rows) * channels * OUT_BYTES;
  const Bytes out = allocate(bytes);
  for (int index = 0; index < blocks; ++index) {
    emulator::run_block(index, threads, shared_bytes, seed, [&] {
      b1_mma(x.get(), w.get(), out.get(), as<float>(x_step), as<float>(w_step), as<float>(bias), as<int>(x_sums),
             as<int>(w_sums), rows, channels, width, x_pitch, w_pitch);
    });
  }
  return write(out, bytes);
}
