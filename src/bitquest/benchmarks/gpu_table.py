"""What the GPU benchmark measures and what the project asks of itself: the table of targets, as data.

Speed-ups are over the same work in bfloat16 in the same run (above 1 is faster), rotation and quantization included.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table. `target` is what must be reached, `beyond` what is hoped for, `limit` the hardware's."""

    name: str
    title: str
    target: float | None
    beyond: float | None
    limit: str = ""
    against: str = "torch.matmul bf16"


@dataclass(frozen=True)
class Job:
    """What is measured in one go: rows of the table that share their data. `limit` is in seconds.

    kind names the function that measures it; scheme and size say what of.
    """

    kind: str
    rows: tuple[str, ...]
    scheme: str = ""
    size: str = ""
    limit: float = 90.0


@dataclass(frozen=True)
class Sizes:
    """How large the data is. (K, N): in_features, out_features."""

    tokens: int = 8192
    prefill: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 11008), (11008, 4096))
    squares: tuple[tuple[str, int], ...] = (("8192", 8192), ("4096", 4096))
    decode: tuple[int, int] = (8192, 28672)
    block_width: int = 2048
    block_hidden: int = 5632
    block_tokens: int = 32768
    preset: str = "430M"
    vocabulary: int = 32000
    step_batch: int = 32
    step_context: int = 512
    copy_bytes: int = 2**31
    floors: tuple[int, ...] = (8192, 4096)


TINY = Sizes(
    tokens=48,
    prefill=((128, 128), (128, 192), (192, 128)),
    squares=(("8192", 128), ("4096", 64)),
    decode=(256, 128),
    block_width=128,
    block_hidden=256,
    block_tokens=64,
    preset="1M",
    vocabulary=257,
    step_batch=2,
    step_context=16,
    copy_bytes=2**20,
    floors=(128,),
)

_PREFILL = "prefill, ≥ 8192 tokens, 7B shapes"
_DECODE = "decode of 1 token, 8192×28672"
_BLOCK = "training: linear layers of a 2048-wide block, 32k tokens"
_STEP = "whole training step, 430M, compiled, W4A4"

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("prefill-w4a4", f"W4A4 {_PREFILL}", 1.65, 1.85, "2× (s8 rate)"),
        Row("w1a1-8192", "W1A1 8192³", 5.0, 7.5, "16× peak; 9.6 POPS published"),
        Row("w1a1-4096", "W1A1 4096³", 3.0, 4.2, "quantization about 25 % of the time"),
        Row("decode-w4", f"W4 {_DECODE}, CUDA graph", 3.0, 3.5, "4×"),
        Row("decode-w2", f"W2 {_DECODE}, CUDA graph", 5.0, 6.5, "8×"),
        Row("decode-w1", f"W1 {_DECODE}, CUDA graph", 7.0, 11.0, "16×"),
        Row("decode-w1a8", f"W1A8 {_DECODE}, CUDA graph", 7.0, 11.0, "16×"),
        Row("decode-w2a8", f"W2A8 {_DECODE}, CUDA graph", 5.0, 6.5, "8×"),
        Row("block-w4a4", f"W4A4 {_BLOCK}", 1.0, 1.1, "1.5× with a bf16 backward", "bf16 layers"),
        Row("block-w1a1", f"W1A1 {_BLOCK}", 1.0, 1.25, "1.5× with a bf16 backward", "bf16 layers"),
        Row("step-bf16", _STEP, 0.95, 1.05, "", "the same model in bf16, compiled"),
        Row("prefill-w8a8", f"W8A8 {_PREFILL}", 1.65, 1.85, "2× (s8 rate)"),
        Row("prefill-fp4", f"FP4 {_PREFILL}", 1.65, 1.85, "2× (s8 rate)"),
        Row("w2a2", "W2A2 8192³", 1.7, 2.6, ""),
        Row("sparse-w4a4", f"W4A4, 4:8 weights, {_PREFILL}", 2.2, 2.8, "4×"),
        Row("step-paper", _STEP, 1.8, 2.5, "", "the paper's quantizer: dense rotation, eager mask"),
    )
}

# In this order: what matters most and costs least first, for a budget that may not reach the end.
JOBS: tuple[Job, ...] = (
    Job("floors", ("floors",)),
    Job("prefill", ("prefill-w4a4",), "w4a4"),
    Job("square", ("w1a1-8192",), "w1a1", "8192"),
    Job("square", ("w1a1-4096",), "w1a1", "4096"),
    Job("decode", ("decode-w4",), "w4a16"),
    Job("decode", ("decode-w2",), "w2a16"),
    Job("decode", ("decode-w1",), "w1a16"),
    Job("decode", ("decode-w1a8",), "w1a8"),
    Job("decode", ("decode-w2a8",), "w2a8"),
    Job("block", ("block-w4a4",), "w4a4", limit=120),
    Job("block", ("block-w1a1",), "w1a1", limit=120),
    Job("step", ("step-bf16", "step-paper"), "w4a4", limit=200),
    Job("prefill", ("prefill-w8a8",), "w8a8"),
    Job("prefill", ("prefill-fp4",), "w4a4-fp4"),
    Job("square", ("w2a2",), "w2a2", "8192"),
    Job("prefill", ("sparse-w4a4",), "w4a4-4:8"),
)
