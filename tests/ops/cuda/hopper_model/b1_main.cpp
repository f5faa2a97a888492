// Runs b1_wgmma under the model: 15 int32 (below), then the operands on standard input; y on standard output.
constexpr int BLOCK_THREADS = 384;
#include <b1_wgmma.cu>

int main() {
    enum { TOKENS, CHANNELS, WIDTH, X_PITCH, W_PITCH, BIAS, SEED, STEPS, TILE_ROWS, TILE_COLUMNS, GRID, SHARED_BYTES,
           X_BOX, W_BOX, COUNT };
    int head[COUNT];
    model::read_all(head, sizeof head);
    const int tokens = head[TOKENS], channels = head[CHANNELS], row_bytes = (head[WIDTH] + 7) / 8;
    const u8* x = model::read_guarded<u8>(static_cast<std::size_t>(X_PLANES) * tokens * head[X_PITCH]);
    const u8* w = model::read_guarded<u8>(static_cast<std::size_t>(W_PLANES) * channels * head[W_PITCH]);
    const float* x_step = model::read_guarded<float>(tokens);
    const float* w_step = model::read_guarded<float>(channels);
    const int* x_sums = model::read_guarded<int>(tokens);
    const int* w_sums = model::read_guarded<int>(channels);
    const float* bias = model::read_guarded<float>(channels);
    const std::size_t bytes = static_cast<std::size_t>(tokens) * channels * (OUT == INT32 || OUT == FLOAT32 ? 4 : 2);
    u8* out = model::guarded(bytes, WHOLE ? 16 : 4);
    const long x_pitch = head[X_PITCH], w_pitch = head[W_PITCH];
    const TensorMap x_map = {{x, X_PLANES, tokens, row_bytes, tokens * x_pitch, x_pitch, head[X_BOX], 128}};
    const TensorMap w_map = {{w, W_PLANES, channels, row_bytes, channels * w_pitch, w_pitch, head[W_BOX], 128}};
    const Work work = {tokens, channels, head[WIDTH], head[STEPS], head[TILE_ROWS], head[TILE_COLUMNS]};
    model::chance.seed(head[SEED]);
    model::late_products = head[SEED] % 2;
    model::eager_copies = head[SEED] / 2 % 2;
    model::grid = head[GRID];
    model::kernel = [&] {
        b1_wgmma(x_map, w_map, out, x_step, w_step, x_sums, w_sums, head[BIAS] ? bias : nullptr, work);
    };
    model::require(head[GRID] % CLUSTER == 0, "a grid that is no whole number of clusters");
    for (int first = 0; first < head[GRID]; first += CLUSTER) {
        model::run_cluster(first, CLUSTER, BLOCK_THREADS, head[SHARED_BYTES]);
    }
    return std::fwrite(out, 1, bytes, stdout) == bytes ? 0 : 1;
}
