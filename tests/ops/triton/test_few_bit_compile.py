"""What the few-bit kernels compile to: wide loads, four products an instruction, tensor cores, no local memory."""

from typing import Any

import pytest

pytest.importorskip("triton")

_PRELUDE = """
import bitquest.ops.triton.few_bit_linear as m
from bitquest.numerics.grids import FP4, TERNARY, UniformGrid
from bitquest.numerics.integers import integer_form

def a8(tokens, grid, groups=1, channels=8192, width=28672):
    sums = torch.empty(channels, groups, dtype=torch.int32)
    m.a8_linear(
        torch.empty(tokens, width, dtype=torch.int8), torch.empty(tokens, 1),
        torch.empty(tokens, groups, dtype=torch.int32),
        torch.empty(channels, -(-width * grid.bits // 8), dtype=torch.uint8), torch.empty(channels, groups),
        integer_form(UniformGrid(8)), grid, w_sums=sums, out_dtype=torch.bfloat16)

def weight_only(tokens, grid, groups=1, channels=8192, width=28672):
    m.weight_only_linear(
        torch.empty(tokens, width, dtype=torch.bfloat16),
        torch.empty(channels, -(-width * grid.bits // 8), dtype=torch.uint8), torch.empty(channels, groups), grid,
        out_dtype=torch.bfloat16)

def b1(tokens, groups=1, channels=8192, width=28672):
    m.b1_vector(
        torch.empty(tokens, width // 8, dtype=torch.uint8), torch.empty(tokens, 1),
        torch.empty(channels, width // 8, dtype=torch.uint8), torch.empty(channels, groups), width,
        out_dtype=torch.bfloat16)
"""


def compiled(compiler: Any, code: str, capability: int) -> dict[str, Any]:
    """By name, each checked for local memory and for what fits an SM."""
    kernels = compiler.launches(_PRELUDE + code, capability)
    for kernel in kernels:
        # FP4 with groups leaves one value on the stack on sm_90, outside of the products.
        assert kernel.local_bytes <= (8 if "FP4" in code and kernel.name == "small_batch" else 0), kernel.report()
        assert kernel.shared_bytes <= 99 * 1024, kernel.report()
        assert kernel.registers * 32 * kernel.num_warps <= 65536, kernel.report()
    return {kernel.name: kernel for kernel in kernels}


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("bits", [1, 4])
def test_one_token_reads_16_bytes_and_multiplies_by_four(bits: int, capability: int, compiler: Any) -> None:
    kernel = compiled(compiler, f"a8(1, UniformGrid({bits}))", capability)["few_tokens"]
    fields, rows = 8 // bits, 4
    assert kernel.count(r"LDG\.E\.EF\.128") == 2 * rows, "weights: one tile ahead, one in the loop"
    assert kernel.count(r"LDG\.E(\.CONSTANT)?\.128") == fields, "activations: once for all rows of a thread"
    assert kernel.count(r"IDP\.4A\.S8\.S8") == rows * 4 * fields
    moves = kernel.count(r"(SHF|IMAD\.SHL|LOP3)\S*")
    assert moves <= 2 * rows * 4 * fields + 64, "more than a shift and a logic operation for four weights"
    assert kernel.registers <= 128, kernel.report()  # two programs of 8 warps on an SM


@pytest.mark.parametrize("capability", [80, 90])
def test_the_digits_of_a_float_share_the_weights(capability: int, compiler: Any) -> None:
    kernels = compiled(compiler, "weight_only(1, UniformGrid(2))", capability)
    kernel = kernels["few_tokens"]
    assert kernel.count(r"LDG\.E\.EF\.128") == 8
    assert kernel.count(r"IDP\.4A\.S8\.S8") == 3 * 4 * 4 * 4
    assert kernel.registers <= 128, kernel.report()
    assert "_digits" in kernels


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_a_small_batch_is_unpacked_on_the_way_to_the_tensor_cores(capability: int, compiler: Any) -> None:
    kernel = compiled(compiler, "a8(16, UniformGrid(2))", capability)["small_batch"]
    assert kernel.count(r"LDGSTS\.E\.BYPASS(\.LTC128B)?\.128"), "weights do not come by asynchronous copies of 16 bytes"
    assert kernel.count(r"IMMA\.16832\.S8\.S8\S*")
    products = kernel.count(r"IMMA\S*")
    assert kernel.count(r"LDSM\S*") <= products, "more than the packed bytes go through shared memory"
    assert kernel.count(r"STS\.\S+") <= 8, "unpacked weights go through shared memory"


def test_popcount_reads_16_bytes(compiler: Any) -> None:
    kernel = compiled(compiler, "b1(1)", 90)["few_tokens"]
    assert kernel.count("POPC") == 16
    assert kernel.count(r"LDG\.E\.EF\.128") == 8


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(
    "grid", ["UniformGrid(1)", "UniformGrid(2)", "UniformGrid(4)", "UniformGrid(8)", "TERNARY", "FP4"]
)
def test_everything_compiles_without_spills(grid: str, capability: int, compiler: Any) -> None:
    for tokens in (1, 2, 4, 8, 32):
        for groups in (1, 28672 // 128, 28672 // 32):
            compiled(compiler, f"a8({tokens}, {grid}, {groups}); weight_only({tokens}, {grid}, {groups})", capability)
    compiled(compiler, f"a8(1, {grid}, channels=77, width=1001); weight_only(9, {grid}, channels=512)", capability)
    compiled(compiler, "b1(3); b1(1, 28672 // 32); b1(1, 28672 // 128)", capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_candidate_compiles_without_spills(capability: int, compiler: Any) -> None:
    code = """
plain = m.few_candidates, m.batch_candidates
for i in range(4):
    m.few_candidates = lambda *a: plain[0](*a)[min(i, 2):]
    m.batch_candidates = lambda *a: plain[1](*a)[min(i, len(plain[1](*a)) - 1):]
    for bits in (1, 4):
        a8(2, UniformGrid(bits)); a8(32, UniformGrid(bits))
        weight_only(1, UniformGrid(bits)); weight_only(8, UniformGrid(bits))
"""
    compiled(compiler, code, capability)
