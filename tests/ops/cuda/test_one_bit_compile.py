"""What NVRTC makes of the 1-bit kernels, read from the machine code of every architecture: no GPU is needed."""

from collections import Counter

import pytest

from bitquest.ops.cuda.driver import DeviceLimits
from bitquest.ops.cuda.one_bit import TILES, launch_of

DEVICES = {
    "sm_80": DeviceLimits(80, 108, 166_912, 167_936),
    "sm_86": DeviceLimits(86, 82, 101_376, 102_400),
    "sm_89": DeviceLimits(89, 128, 101_376, 102_400),
    "sm_90": DeviceLimits(90, 132, 232_448, 233_472),
    "sm_90a": DeviceLimits(90, 132, 232_448, 233_472),
}
WIDE, SQUARE, SMALL, FLAT = TILES
FIRST = (("sm_80", WIDE, 2), ("sm_86", SQUARE, 3), ("sm_89", SMALL, 0), ("sm_90", WIDE, 2), ("sm_90", FLAT, 1))
ALL = [pytest.param(name, tile, out, marks=pytest.mark.slow) for name in DEVICES for tile in TILES for out in range(4)]


@pytest.mark.parametrize(("architecture", "tile", "out"), [*FIRST, *ALL])
def test_one_product_each_and_nothing_spills(instructions, architecture, tile, out):
    limits = DEVICES[architecture]
    launch = launch_of(tile, limits)
    found = Counter(instructions("b1_mma.cu", architecture, launch.options(limits.capability >= 90, out)))
    assert not [name for name in found if name.startswith(("LDL", "STL"))], "registers spill"
    # One unit instruction per product of 16×8×256, of the kind this architecture has; no emulation by other products.
    operation = "AND" if limits.capability >= 90 else "XOR"
    products = {name: count for name, count in found.items() if "MMA" in name}
    steps = launch.block_k // 32
    assert products == {f"BMMA.168256.{operation}.POPC": tile.warp_m // 16 * (tile.warp_n // 8) * steps}
    assert found["LDSM.16.M88.4"] == (tile.warp_m // 16 + tile.warp_n // 16) * steps
    copies = (tile.block_m + tile.block_n) * launch.block_k // 16 / tile.threads
    asynchronous = {name: count for name, count in found.items() if name.startswith("LDGSTS")}
    assert list(asynchronous) == ["LDGSTS.E.BYPASS.128.ZFILL"]
    assert asynchronous["LDGSTS.E.BYPASS.128.ZFILL"] >= 2 * copies  # once ahead of the loop and once in it
    assert found["STG.E.128"] >= 1


def test_hopper_would_take_two_products_for_xor(instructions):
    """Why it is given AND and the row sums."""
    tile = FLAT
    launch = launch_of(tile, DEVICES["sm_90"])
    found = Counter(instructions("b1_mma.cu", "sm_90", launch.options(False, 0)))
    counted = tile.warp_m // 16 * (tile.warp_n // 8) * launch.block_k // 32
    assert {name: count for name, count in found.items() if "MMA" in name} != {"BMMA.168256.XOR.POPC": counted}
    assert "BMMA.168256.AND.POPC" in found


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_row_sums_read_16_bytes_at_a_time(instructions, architecture):
    found = Counter(instructions("b1_sums.cu", architecture, ()))
    assert any(name.startswith("LDG.E.128") for name in found)
    assert any(name.startswith("REDUX") for name in found)
