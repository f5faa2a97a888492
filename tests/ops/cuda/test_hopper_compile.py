"""What NVRTC makes of the warpgroup kernels for sm_90a, read from the machine code: no GPU is needed."""

import re
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from bitquest.ops.cuda import sparse
from bitquest.ops.cuda.cache import headers, source
from bitquest.ops.cuda.hopper import ARCHITECTURE, SHARED_BYTES, TILES, plan
from bitquest.ops.cuda.nvrtc import CompilerMissingError, load_nvrtc

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)", re.MULTILINE)


def disassembler() -> Path:
    """nvdisasm of Triton's package."""
    found = find_spec("triton")
    path = Path(found.origin or "").parent / "backends" / "nvidia" / "bin" / "nvdisasm" if found else Path()
    if not path.is_file():
        pytest.skip("no nvdisasm: Triton is not installed")
    return path


def machine_code(name: str, options: tuple[str, ...], folder: Path) -> list[tuple[str, str]]:
    """Every instruction of a kernel and its operands."""
    tool = disassembler()
    try:
        compiler = load_nvrtc()
    except CompilerMissingError as error:
        pytest.skip(str(error))
    image = compiler.compile(source(name), name=name, architecture=ARCHITECTURE, options=options, headers=headers())
    (folder / "made.cubin").write_bytes(image)
    listed = subprocess.run([str(tool), "-c", str(folder / "made.cubin")], capture_output=True, text=True, check=True)
    return INSTRUCTION.findall(listed.stdout)


def check(code: list[tuple[str, str]], products: str, count: int, loads: set[str]) -> None:
    """Registers moved as planned, nothing spilled, products issued back to back, copies by the copy engine."""
    names = Counter(name for name, _ in code)
    assert not [name for name in names if name.startswith(("LDL", "STL"))], "registers spill"
    moved = [operands.strip(" ;") for name, operands in code if name.startswith("USETMAXREG")]
    assert sorted(moved) == ["0x18", "UP0, 0xf0"], "setmaxnreg was not taken"
    assert names[products] == count
    assert len([name for name in names if "GMMA" in name]) == 1
    # The compiler makes products wait for each other where it cannot follow their registers: it would show here.
    assert names["WARPGROUP.ARRIVE"] == 1
    assert names["WARPGROUP.DEPBAR.LE"] == 2
    assert {name for name in names if name.startswith(("UTMALDG", "UBLKCP"))} == loads
    assert any(name.startswith("SYNCS.PHASECHK.TRANS64.TRYWAIT") for name in names)


# Planes of (x, w), type of y, length of a row of y: every kind of epilogue, every number of planes.
FIRST = ((1, 1, 2, 8),)
REST = (
    (2, 2, 3, 1),
    (1, 1, 0, 8),
    (1, 1, 1, 8),
    (2, 2, 2, 8),
    (2, 1, 3, 8),
    (1, 2, 0, 8),
    (1, 1, 3, 1),
    (2, 2, 1, 1),
    (2, 2, 0, 1),
)


@pytest.mark.parametrize("variants", [FIRST, pytest.param(REST, marks=pytest.mark.slow)], ids=["first", "rest"])
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "-".join(map(str, tile)))
def test_b1_wgmma_becomes_the_machine_code_it_was_written_for(tile, variants, tmp_path):
    for x_planes, w_planes, out, channels in variants:
        if channels == 1 and tile.columns >= 192:
            continue  # never launched (choose_tile)
        made = plan(4096, channels, 4096, (x_planes, w_planes), out, tile, multiprocessors=132)
        assert made.shared_bytes <= SHARED_BYTES
        code = machine_code("b1_wgmma.cu", made.options, tmp_path)
        loads = {"UTMALDG.3D", "UTMALDG.3D.MULTICAST"} if tile.cluster == 2 else {"UTMALDG.3D"}
        check(code, f"BGMMA.64x{tile.columns}x256.AND.POPC", 4 * tile.rows_64, loads)


# Activations of 8 bits or fewer, type of y, length of a row of y.
SPARSE_FIRST = ((False, 2, 8),)
SPARSE_REST = tuple((eight, out, channels) for eight in (False, True) for out in range(4) for channels in (8, 1))


@pytest.mark.parametrize(
    "variants", [SPARSE_FIRST, pytest.param(SPARSE_REST, marks=pytest.mark.slow)], ids=["first", "rest"]
)
@pytest.mark.parametrize("tile", sparse.TILES, ids=lambda tile: "-".join(map(str, tile)))
def test_s8_sparse_wgmma_becomes_the_machine_code_it_was_written_for(tile, variants, tmp_path):
    for eight_bits, out, channels in variants:
        made = sparse.sparse_plan(4096, channels, 4096, eight_bits, out, tile, multiprocessors=132)
        assert made.shared_bytes <= SHARED_BYTES
        code = machine_code("s8_sparse_wgmma.cu", made.options, tmp_path)
        loads = {"UTMALDG.3D", "UTMALDG.3D.MULTICAST", "UBLKCP.S.G"}
        check(code, f"IGMMA.SP.64x{tile.columns}x64.S8.S8", 2 * tile.rows_64, loads)


def test_split_planes_keeps_to_registers_and_wide_accesses(tmp_path):
    names = Counter(name for name, _ in machine_code("split_planes.cu", (), tmp_path))
    assert not [name for name in names if name.startswith(("LDL", "STL"))]
    assert names["LDG.E.128"] >= 1
    assert names["STG.E.64"] >= 2
