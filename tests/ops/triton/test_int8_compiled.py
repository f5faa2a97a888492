"""What the kernels of the s8 product compile to, ahead of time: instructions, registers, shared memory, no spills."""

from typing import Any

import pytest

pytest.importorskip("triton")
from bitquest.ops.triton.int8_linear import HAND_SCHEDULED, group_candidates, row_candidates
from bitquest.ops.triton.tuning import Config

_LAUNCH = """
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form
from bitquest.ops.triton import int8_linear as m
from bitquest.ops.triton.tuning import Config

m._check_operands = lambda *operands: None  # they lie on the CPU: nothing is launched

def launch(tokens, bits, groups, config, channels=512, width=1024, dtype=torch.bfloat16):
    x_a, w_a = (torch.zeros(rows, width, dtype=torch.int8) for rows in (tokens, channels))
    form = integer_form(UniformGrid(bits))
    x_step, w_step = (torch.ones(rows, groups) for rows in (tokens, channels))
    m.int8_linear(x_a, x_step, w_a, w_step, form, form, out_dtype=dtype, config=config)
"""


def _compiled(compiler: Any, capability: int, tokens: int, bits: int, config: Config, groups: int = 1) -> Any:
    made = compiler.launches(_LAUNCH + f"launch({tokens}, {bits}, {groups}, {config})", capability)
    assert len(made) == 1
    return made[0]


def _check_resources(kernel: Any, config: Config) -> None:
    assert kernel.local_bytes == 0, kernel.report()
    assert kernel.spills == 0, kernel.report()
    assert kernel.shared_bytes <= (227 if kernel.capability >= 90 else 163 if kernel.capability == 80 else 99) * 1024
    if config.descriptors:
        assert kernel.count(r"UTMALDG\.2D"), "tiles do not come by TMA"
        assert kernel.count(r"UTMASTG\.2D"), "the output does not leave by TMA"
    else:
        assert kernel.count(r"LDGSTS\.E\.BYPASS\.128"), "copies are not asynchronous and 16 bytes wide"
    if kernel.capability >= 90 and config.block_t >= 64:
        assert kernel.count(r"IGMMA\.\S+\.S8\.S8"), "the dot does not run on wgmma"
        assert not kernel.count(r"IMMA\.\S+")
    else:
        assert kernel.count(r"IMMA\.16832\.S8\.S8"), "the dot does not run on mma.sync"


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_default_compiles_to_tensor_cores_without_spills(capability: int, bits: int, compiler: Any) -> None:
    config = row_candidates(8192, capability)[0]
    _check_resources(_compiled(compiler, capability, 256, bits, config), config)


@pytest.mark.parametrize("capability", [80, 90])
def test_groups_and_few_tokens_compile_without_spills(capability: int, compiler: Any) -> None:
    config = group_candidates(8192, capability, 128)[0]
    _check_resources(_compiled(compiler, capability, 256, 8, config, groups=8), config)
    config = row_candidates(16, capability)[0]
    _check_resources(_compiled(compiler, capability, 16, 8, config), config)


@pytest.mark.parametrize("config", HAND_SCHEDULED[:1])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_loop_scheduled_by_hand_keeps_one_product_running(bits: int, config: Config, compiler: Any) -> None:
    kernel = _compiled(compiler, 90, 256, bits, config)
    _check_resources(kernel, config)
    loop = kernel.ptx[kernel.ptx.index("wgmma.fence") : kernel.ptx.index("wgmma.wait_group.sync.aligned 0")]
    assert loop.count("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8") == 8
    assert loop.count("wgmma.wait_group.sync.aligned 1") == 1
    assert kernel.count(r"IGMMA\.\S+") == 8
    assert kernel.count(r"WARPGROUP\.DEPBAR\S*") == 2  # the assembler has not made the products wait for each other
    # All warps have waited before a slot is filled again.
    refill = loop[loop.index("wgmma.wait_group.sync.aligned 1") :]
    assert refill.index("bar.sync") < refill.index("expect_tx") < refill.index("cp.async.bulk.tensor")


@pytest.mark.slow
def test_everything_scheduled_by_hand_compiles_without_spills(compiler: Any) -> None:
    for config in HAND_SCHEDULED:
        for options in ("", ", channels=77, width=96", ", dtype=torch.float32"):
            for kernel in compiler.launches(_LAUNCH + f"launch(300, 8, 1, {config}{options})", 90):
                assert kernel.spills == kernel.local_bytes == 0, kernel.report()
                assert kernel.count(r"IGMMA\.\S+")
        (product,) = compiler.launches(
            _LAUNCH + f"a = torch.zeros(256, 512, dtype=torch.int8)\nm.int8_product(a, a, config={config})", 90
        )
        assert product.spills == product.local_bytes == 0, product.report()


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
def test_every_candidate_compiles_without_spills(capability: int, compiler: Any) -> None:
    for tokens in (16, 64, 256):
        candidates = [*row_candidates(tokens, capability), *group_candidates(tokens, capability, 32)]
        for config in dict.fromkeys([*candidates, *group_candidates(tokens, capability, 128)]):
            groups = 1 if config in row_candidates(tokens, capability) else 1024 // config.block_k
            kernel = _compiled(compiler, capability, tokens, 8, config, groups)
            if capability == 89 and kernel.shared_bytes > 99 * 1024:
                continue  # tuning passes over what does not fit
            assert kernel.local_bytes == 0, kernel.report()
            assert kernel.spills == 0, kernel.report()
