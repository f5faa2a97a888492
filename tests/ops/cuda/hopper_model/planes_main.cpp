// Runs split_planes: rows, row_bytes, packed_pitch, plane_pitch (int32), then the codes; planes on standard output.
constexpr int BLOCK_THREADS = 256;
#include <split_planes.cu>

int main() {
    int head[4];
    model::read_all(head, sizeof head);
    const std::size_t rows = head[0], bytes = (rows - 1) * head[2] + head[1], made_bytes = 2 * rows * head[3];
    u8* packed = model::guarded(bytes, head[2] % 16 ? 1 : 16);
    model::read_all(packed, bytes);
    u8* planes = model::guarded(made_bytes, 16);
    model::Block block{};
    model::Fiber fiber{};
    fiber.block = &block;
    model::current = &fiber;
    model::grid = 2;
    for (block.index = 0; block.index < 2; ++block.index) {
        for (fiber.thread = 0; fiber.thread < 256; ++fiber.thread) {
            split_planes(packed, planes, head[0], head[1], head[2], head[3]);
        }
    }
    return std::fwrite(planes, 1, made_bytes, stdout) == made_bytes ? 0 : 1;
}
