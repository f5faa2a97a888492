"""The 1-bit kernels' own source, run on the CPU under the emulator and the sanitizers, against exact products."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from bitquest.numerics.packing import pack

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "src" / "bitquest" / "ops" / "cuda" / "kernels"
CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OUT_TYPES = (torch.int32, torch.float32, torch.bfloat16, torch.float16)


class Build(NamedTuple):
    """The macros of b1_mma.cu."""

    block_m: int
    block_n: int
    warp_m: int
    warp_n: int
    block_k: int
    stages: int
    use_and: int
    out: int

    def macros(self) -> list[str]:
        return [f"-D{name.upper()}={value}" for name, value in self._asdict().items()]


# Every tile that is launched, and one of 64-byte rows; both operations and all types of result among them.
BUILDS = (
    Build(128, 256, 64, 64, 128, 3, 1, 2),
    Build(128, 128, 64, 64, 64, 4, 0, 3),
    Build(64, 64, 32, 32, 64, 2, 1, 0),
    Build(16, 64, 16, 16, 128, 4, 0, 1),
)


@pytest.fixture(scope="module", params=BUILDS, ids=lambda build: "-".join(map(str, build)))
def program(request, tmp_path_factory) -> tuple[Build, Path]:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels cannot be compiled for the CPU")
    made = tmp_path_factory.mktemp("emulated") / "b1"
    options = ["-std=c++17", "-O1", "-g", *CHECKS, "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    options += ["-Wno-unknown-pragmas", "-Wno-parentheses", f"-I{HERE / 'emulator'}", f"-I{KERNELS}"]
    command = ["g++", *options, *request.param.macros(), str(HERE / "emulator" / "b1_main.cpp"), "-o", str(made)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("g++ has no sanitizers here")
    assert built.returncode == 0, built.stderr
    return request.param, made


def padded(codes: torch.Tensor) -> np.ndarray:
    """Bits in rows of whole 16-byte chunks, zero behind the last."""
    rows = pack(codes, 1).numpy()
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 16)))


def run(program: Path, build: Build, tokens: int, channels: int, width: int, *, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-1, 1, (n, width), generator=generator, dtype=torch.int8) for n in (tokens, channels))
    x_step, w_step, shift = (torch.randn(n, generator=generator) for n in (tokens, channels, channels))
    x_rows, w_rows = padded(x), padded(w)
    head = np.array([tokens, channels, width, x_rows.shape[1], w_rows.shape[1], bias, seed], dtype=np.int32)
    parts = (head, x_rows, w_rows, x_step.numpy(), w_step.numpy(), shift.numpy())
    ended = subprocess.run(
        [str(program)], input=b"".join(part.tobytes() for part in parts), capture_output=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr.decode()[-4000:]

    dot = (2 * x.double() + 1) @ (2 * w.double() + 1).t()
    expected = dot.to(torch.int32)
    if build.out:
        value = dot.float() * (x_step * 0.25).unsqueeze(1) * w_step
        expected = (value + shift if bias else value).to(OUT_TYPES[build.out])
    found = torch.frombuffer(bytearray(ended.stdout), dtype=expected.dtype).reshape(tokens, channels)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tokens", "channels", "width"),
    [
        (1, 1, 1),  # smaller than everything
        (3, 40, 300),  # rows of whole 16 bytes: vectors out
        (17, 67, 2049),  # one bit into a third tile of 1024, rows of odd length: elements out
        (130, 264, 140),  # a second block both ways
    ],
)
def test_equals_the_exact_product(program, tokens, channels, width):
    build, path = program
    run(path, build, tokens, channels, width, bias=tokens != 3, seed=tokens)


def test_nine_blocks_high_fill_a_band_and_begin_the_next(program):
    build, path = program
    if build.block_m > 16:
        pytest.skip("the order of blocks is the same code at every size")
    run(path, build, 8 * build.block_m + 5, 2 * build.block_n + 8, 129, bias=False, seed=5)
