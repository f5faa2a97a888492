"""What the compiler makes of the quantization kernels, ahead of time: resources, and the instructions they rest on.

`pytest -m slow -s` compiles every common shape for sm_80, sm_89 and sm_90 and prints what each takes.
"""

from typing import Any

import pytest

START = """
import bitquest as bq
from bitquest.ops.rows import RMSNorm, SwiGLU
from bitquest.ops.triton.dequantize import dequantize_rows
from bitquest.ops.triton.quantize import quantize_rows, rotate_rows
from bitquest.ops.triton.quantize_backward import mask_rotate, rms_norm_backward, swiglu_backward

def new(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)
"""
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # of one block
COPY_16_BYTES = r"(LDG|LDGSTS)\.E\.(BYPASS\.)?(LTC128B\.)?128\S*"
TENSOR_CORES = r"(HMMA|HGMMA)\S*"


def quantize(width: int, grid: str, more: str = "", want: str = "'packed', 'mask'") -> str:
    quantizer = f"bq.Quantizer(grid={grid}{', estimator=bq.Clip(1.3)' if '(1)' in grid else ''})"
    return f"quantize_rows(new(4096, {width}), {quantizer}, 128, want=frozenset({{{want}}}){more})"


TRAINING = "'factors', 'packed', 'mask', 'sums'"
FORWARD = {
    "K=2048 4 bits": quantize(2048, "bq.UniformGrid(4)"),
    "K=4096 4 bits": quantize(4096, "bq.UniformGrid(4)"),
    "K=8192 4 bits": quantize(8192, "bq.UniformGrid(4)"),
    "K=2048 1 bit": quantize(2048, "bq.UniformGrid(1)"),
    "K=4096 1 bit": quantize(4096, "bq.UniformGrid(1)"),
    "K=8192 1 bit": quantize(8192, "bq.UniformGrid(1)"),
    "K=4096 4 bits, all parts": quantize(4096, "bq.UniformGrid(4)", want=TRAINING),
    "K=4096 8 bits, all parts": quantize(4096, "bq.UniformGrid(8)", want=TRAINING),
    "K=2560 4 bits": quantize(2560, "bq.UniformGrid(4)"),
    "K=11008 4 bits": quantize(11008, "bq.UniformGrid(4)"),
    "K=4096 FP4": quantize(4096, "bq.numerics.FP4", want="'factors', 'packed', 'mask'"),
    "K=2048 norm": quantize(2048, "bq.UniformGrid(4)", ", prologue=RMSNorm(new(2048), 1e-5)", "'factors', 'mask'"),
    "K=4096 norm": quantize(4096, "bq.UniformGrid(4)", ", prologue=RMSNorm(new(4096), 1e-5)", "'factors', 'mask'"),
    "K=5632 gate": quantize(5632, "bq.UniformGrid(4)", ", prologue=SwiGLU(new(4096, 5632))", "'factors', 'mask'"),
}
BITS = "new(4096, 256, dtype=torch.uint8)"
BACKWARD = {
    "mask": f"mask_rotate(new(4096, 2048), {BITS}, 128)",
    "gate": f"swiglu_backward(new(4096, 2048), {BITS}, new(4096, 2048), new(4096, 2048), 128)",
    "norm": f"rms_norm_backward(new(4096, 2048), {BITS}, new(4096, 2048), new(2048), 1e-5, 128)",
}
PLAIN = {
    "rotate": "rotate_rows(new(4096, 2048), 128, dtype=torch.bfloat16)",
    "from packed": "dequantize_rows(new(4096, 1024, dtype=torch.uint8), new(4096, 1, dtype=torch.float32), "
    "bq.UniformGrid(4), 2048, dtype=torch.bfloat16)",
    "from factors": "dequantize_rows(new(4096, 2048, dtype=torch.int8), new(4096, 1, dtype=torch.float32), "
    "bq.UniformGrid(4), 2048, dtype=torch.bfloat16)",
}
LONG = {
    "K=11008 gate": quantize(11008, "bq.UniformGrid(4)", ", prologue=SwiGLU(new(4096, 11008))", "'factors', 'mask'"),
    "K=28672 4 bits": quantize(28672, "bq.UniformGrid(4)"),
    "K=32768 float32": quantize(32768, "bq.UniformGrid(4)").replace("32768)", "32768, dtype=torch.float32)"),
}


def compiled(compiler: Any, code: str, capability: int) -> Any:
    """The one kernel that the code launches, if it can be launched on this capability."""
    (made,) = compiler.launches(START + code, capability)
    print(made.report())
    assert made.shared_bytes <= SHARED_BYTES[capability]
    assert made.registers * 32 * made.num_warps <= 65536
    return made


def check_rotation(made: Any) -> None:
    assert made.spills <= (2 if made.capability == 89 else 0)  # one value, where ptxas stops at 128 registers itself
    assert made.count(TENSOR_CORES) > 0
    assert made.count(COPY_16_BYTES) > 0
    if made.capability == 90:
        assert made.count(r"HGMMA\S*") > 0


@pytest.mark.parametrize("case", ["K=4096 4 bits", "K=2048 1 bit", "K=4096 norm", "K=5632 gate"])
def test_quantization_on_hopper(case: str, compiler: Any) -> None:
    check_rotation(compiled(compiler, FORWARD[case], 90))


def test_quantization_on_ampere_and_ada(compiler: Any) -> None:
    check_rotation(compiled(compiler, FORWARD["K=4096 4 bits"], 80))
    check_rotation(compiled(compiler, FORWARD["K=2048 1 bit"], 89))


@pytest.mark.parametrize("case", BACKWARD)
def test_backward_on_hopper(case: str, compiler: Any) -> None:
    check_rotation(compiled(compiler, BACKWARD[case], 90))


def test_dequantization_writes_16_bytes_at_a_time(compiler: Any) -> None:
    for case in ("from packed", "from factors"):
        made = compiled(compiler, PLAIN[case], 90)
        assert made.spills == 0
        assert made.count(r"STG\.E\.128\S*") == made.count(r"STG\S*") > 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("case", [*FORWARD, *BACKWARD, "rotate"])
def test_every_common_shape(case: str, capability: int, compiler: Any) -> None:
    check_rotation(compiled(compiler, {**FORWARD, **BACKWARD, **PLAIN}[case], capability))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("case", LONG)
def test_long_rows_fit(case: str, capability: int, compiler: Any) -> None:
    """They may spill: a row has to stay in the registers of one program."""
    if "float32" in case and capability < 90:
        pytest.skip("refused where it is launched: shared memory")
    compiled(compiler, LONG[case], capability)
