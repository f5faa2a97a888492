// Runs s8_sparse_wgmma under the model: int32 (below), then the operands on standard input; y on standard output.
constexpr int BLOCK_THREADS = 384;
#include <s8_sparse_wgmma.cu>

int main() {
    enum { TOKENS, CHANNELS, WIDTH, X_PITCH, W_PITCH, BIAS, SEED, STEPS, TILE_ROWS, TILE_COLUMNS, GRID, SHARED_BYTES,
           X_BOX, W_BOX, COUNT };
    int head[COUNT];
    float unit;
    model::read_all(head, sizeof head);
    model::read_all(&unit, sizeof unit);
    const int tokens = head[TOKENS], channels = head[CHANNELS], width = head[WIDTH];
    const long x_pitch = head[X_PITCH], w_pitch = head[W_PITCH];
    const u8* x = model::read_guarded<u8>(tokens * x_pitch);
    const u8* w = model::read_guarded<u8>(channels * w_pitch);
    const std::size_t places_bytes = static_cast<std::size_t>((channels + 63) / 64) * head[STEPS] * 1024;
    u8* places = model::guarded(places_bytes, 16);
    model::read_all(places, places_bytes);
    const float* x_step = model::read_guarded<float>(tokens);
    const float* w_step = model::read_guarded<float>(channels);
    const int* w_sums = model::read_guarded<int>(channels);
    const float* bias = model::read_guarded<float>(channels);
    const std::size_t bytes = static_cast<std::size_t>(tokens) * channels * (OUT == INT32 || OUT == FLOAT32 ? 4 : 2);
    u8* out = model::guarded(bytes, WHOLE ? 16 : 4);
    const TensorMap x_map = {{x, 1, tokens, width, 0, x_pitch, head[X_BOX], 128}};
    const TensorMap w_map = {{w, 1, channels, width / 2, 0, w_pitch, head[W_BOX], 64}};
    const Work work = {tokens, channels, head[STEPS], head[TILE_ROWS], head[TILE_COLUMNS], unit};
    model::chance.seed(head[SEED]);
    model::late_products = head[SEED] % 2;
    model::eager_copies = head[SEED] / 2 % 2;
    model::grid = head[GRID];
    model::kernel = [&] {
        s8_sparse_wgmma(x_map, w_map, places, out, x_step, w_step, w_sums, head[BIAS] ? bias : nullptr, work);
    };
    model::require(head[GRID] % CLUSTER == 0, "a grid that is no whole number of clusters");
    for (int first = 0; first < head[GRID]; first += CLUSTER) {
        model::run_cluster(first, CLUSTER, BLOCK_THREADS, head[SHARED_BYTES]);
    }
    return std::fwrite(out, 1, bytes, stdout) == bytes ? 0 : 1;
}
