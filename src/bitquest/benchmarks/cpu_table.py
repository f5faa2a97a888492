"""What the CPU benchmark measures and what the project asks of itself: the table of targets, as data.

Every goal is a ratio that should be large: the baseline's time (or bytes) divided by ours. Targets are for 2 threads of
a machine with AVX-512 (VNNI, VPOPCNTDQ) and without AMX, weights warm.
"""

from dataclasses import dataclass

from bitquest.errors import ConfigError

BEST_OF_TORCH = "best of torch"  # the faster one of float32 and bfloat16
TORCH_BF16 = "torch bf16"
BEST_PEER, ONE_BIT_PEER, FOUR_BIT_PEER = "llama.cpp, its best", "llama.cpp Q1_0", "llama.cpp Q4_0"
FLOAT32 = "float32"


@dataclass(frozen=True)
class Goal:
    """target must be reached, beyond is hoped for; both are times the baseline, None where the table has none."""

    against: str
    target: float | None = None
    beyond: float | None = None


@dataclass(frozen=True)
class Case:
    """One line of the table. kind: layer, row, decode, prefill, step or memory; scheme and many (tokens): of what."""

    name: str
    kind: str
    title: str
    scheme: str
    goals: tuple[Goal, ...]
    many: bool = False


@dataclass(frozen=True)
class Sizes:
    """How large things are; `QUICK` is for trying the command out."""

    width: int = 4096  # layers are width × width
    many: int = 96  # tokens of the cases with many
    preset: str = "800M"
    vocabulary: int = 32000
    prompt: int = 256  # tokens of a prefill
    decoded: int = 8  # tokens of one sample of decoding
    step_width: int = 1024
    step_layers: int = 2
    step_batch: int = 4
    step_context: int = 256
    stream_bytes: int = 256 * 2**20
    ceiling: int = 2048  # side of the products that measure torch's ceilings


QUICK = Sizes(256, 8, "1M", 512, 16, 4, 128, 1, 2, 16, 2**22, 128)

ROW_TOKENS = 32  # rows of one call when the time of a row is measured; they fit a core's second-level cache
ROW_SECONDS = (2.0e-6, 1.3e-6)  # target and beyond for a row of 4096

_EVERY = (*(f"w{b}a{b}" for b in range(1, 9)), "w1a2", "w1a8", "w2a8", "w4a8", "w4a4-g128", "w4a4-2:4", "w4a4-4:8")
_WEIGHT_ONLY = tuple(f"w{b}a16" for b in range(1, 9))
_ONE = {"w1a1": (20, 40), "w2a2": (10, 18), "w4a4": (6, 10), "w1a8": (16, 30), "w2a8": (10, 18)}
_MANY = {"w1a1": (8, 10), "w1a8": (3.2, 4), "w2a8": (3.2, 4), **{f"w{b}a{b}": (3.2, 4) for b in range(2, 9)}}

# Eight-bit, weight-only token table and head, as `export` offers them; the bits of the head are the peers' Q8_0.
MODEL_SCHEMES = {"w1a1": "w1a1-h8", "w1a8-g128-norot": "w1a8-g128-norot-h8", "w4a4": "w4a4-h8"}


def _layer(scheme: str, many: bool) -> Case:
    target, beyond = (_MANY if many else _ONE).get(scheme, (None, None))
    count = "many tokens" if many else "1 token"
    goals = (Goal(BEST_OF_TORCH, target, beyond),)
    return Case(f"{scheme}-{'many' if many else 'one'}", "layer", f"{scheme.upper()}, {count}", scheme, goals, many)


def _tables() -> tuple[Case, ...]:
    layers = [_layer(scheme, many) for scheme in (*_EVERY, *_WEIGHT_ONLY) for many in (False, True)]
    rows = [Case(f"row-{b}", "row", f"rotate, quantize, pack a row, {b} bits", f"w{b}a{b}", ()) for b in (1, 4, 8)]
    model = [
        Case("decode-w1a1", "decode", "decoding, W1A1", "w1a1", (Goal(TORCH_BF16, 12, 24), Goal(ONE_BIT_PEER, 3.5, 6))),
        Case("prefill-w1a1", "prefill", "prefill, W1A1", "w1a1", (Goal(BEST_OF_TORCH, 6, 8), Goal(BEST_PEER, 8, 12))),
        Case(
            "decode-w1a8-g128",
            "decode",
            "decoding, W1A8 in Q1_0's grid",
            "w1a8-g128-norot",
            (Goal(ONE_BIT_PEER, 1.5, 3),),
        ),
        Case("decode-w4a4", "decode", "decoding, W4A4", "w4a4", (Goal(FOUR_BIT_PEER, 1.0, 1.3),)),
    ]
    training = [
        Case("step-w1a1", "step", "training step, W1A1", "w1a1", (Goal(FLOAT32, 1.0, 1.25),)),
        Case("memory-w4a4", "memory", "inputs kept for the backward, W4A4", "w4a4", (Goal(FLOAT32, 6.4),)),
        Case("memory-w1a1", "memory", "inputs kept for the backward, W1A1", "w1a1", (Goal(FLOAT32, 16),)),
    ]
    return (*layers, *rows, *model, *training)


CASES: dict[str, Case] = {case.name: case for case in _tables()}
GROUPS = {
    "layers": tuple(name for name, case in CASES.items() if case.kind == "layer"),
    "rows": tuple(name for name, case in CASES.items() if case.kind == "row"),
    "model": tuple(name for name, case in CASES.items() if case.kind in ("decode", "prefill")),
    "training": tuple(name for name, case in CASES.items() if case.kind in ("step", "memory")),
    "targets": tuple(n for n, c in CASES.items() if c.kind == "row" or any(g.target for g in c.goals)),
}


def chosen(names: tuple[str, ...]) -> list[Case]:
    """The cases of these names and groups, in the table's order; all without names. Raises ConfigError."""
    wanted: set[str] = set()
    for name in names:
        if name not in CASES and name not in GROUPS:
            raise ConfigError(f"there is no case {name!r}; there are {', '.join([*GROUPS, *CASES])}")
        wanted |= set(GROUPS.get(name, (name,)))
    return [case for case in CASES.values() if not names or case.name in wanted]
