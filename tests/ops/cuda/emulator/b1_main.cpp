// Runs b1_sums and b1_mma under the emulator: seven int32 and the operands on standard input, y on standard output.
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

Bytes sums_of(const u8* bits, int rows, int width, i64 pitch, unsigned seed) {
  Bytes sums = allocate(4 * rows);
  for (int index = 0; index < (rows + 3) / 4; ++index) {
    emulator::run_block(index, 128, 0, seed, [&] { b1_sums(bits, as<int>(sums), rows, width, pitch); });
  }
  return sums;
}

int main() {
  const Bytes head = read_bytes(7 * 4);
  const int *values = as<const int>(head), tokens = values[0], channels = values[1], width = values[2];
  const i64 x_pitch = values[3], w_pitch = values[4];
  const bool has_bias = values[5];
  const unsigned seed = values[6];
  const Bytes x = read_bytes(tokens * x_pitch), w = read_bytes(channels * w_pitch);
  const Bytes x_step = read_bytes(4 * tokens), w_step = read_bytes(4 * channels), bias = read_bytes(4 * channels);
  const Bytes x_sums = sums_of(x.get(), tokens, width, x_pitch, seed);
  const Bytes w_sums = sums_of(w.get(), channels, width, w_pitch, seed);
  const std::size_t bytes = static_cast<std::size_t>(tokens) * channels * OUT_BYTES;
  const Bytes out = allocate(bytes);
  const int blocks = (tokens + BLOCK_M - 1) / BLOCK_M * ((channels + BLOCK_N - 1) / BLOCK_N);
  for (int index = 0; index < blocks; ++index) {
    emulator::run_block(index, THREADS, SHARED_BYTES, seed, [&] {
      b1_mma(x.get(), w.get(), out.get(), as<float>(x_step), as<float>(w_step), has_bias ? as<float>(bias) : nullptr,
             as<int>(x_sums), as<int>(w_sums), tokens, channels, width, x_pitch, w_pitch);
    });
  }
  return std::fwrite(out.get(), 1, bytes, stdout) == bytes ? 0 : 1;
}
