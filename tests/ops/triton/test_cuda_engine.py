"""The CUDA engine: what it hands to which kernel. Without a GPU the definition stands in for the 1-bit kernels."""

from collections.abc import Iterator

import pytest
import torch
from engine_cases import SCHEMES, TRAINED, check_packed, check_training
from torch import Tensor

from bitquest.numerics import UniformGrid, integer_form, integer_linear
from bitquest.numerics.packing import unpack
from bitquest.ops import backend as backends
from bitquest.ops.backend import BackendReport, backend_report


TORCH = BackendReport("torch", True, "")


def bits_product(x_bits: Tensor, x_step: Tensor, w_bits: Tensor, w_step: Tensor, width: int) -> Tensor:
    form = integer_form(UniformGrid(1))
    assert form is not None
    assert x_bits.dtype == w_bits.dtype == torch.uint8
    factors = [form.of_codes(unpack(bits, 1, width)) for bits in (x_bits, w_bits)]
    return integer_linear(factors[0], x_step, factors[1], w_step, form, form)


def row_sums(bits: Tensor, width: int) -> Tensor:
    return (2 * unpack(bits, 1, width).to(torch.int32) + 1).sum(1, dtype=torch.int32)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[list[str]]:
    """The kernels that ran. On the CPU they are replaced, and the probe and the device's type with them."""
    backend_report.cache_clear()
    calls: list[str] = []
    if device.type == "cpu":
        from bitquest.ops.cuda import engine

        def hopper(x_bits, x_step, x_sums, w_bits, w_step, w_sums, width, *, bias, out_dtype):  # type: ignore[no-untyped-def]
            calls.append("hopper")
            assert torch.equal(x_sums, row_sums(x_bits, width))
            assert torch.equal(w_sums, row_sums(w_bits, width))
            y = bits_product(x_bits, x_step, w_bits, w_step, width)
            return (y if bias is None else y + bias).to(out_dtype)

        def ampere(x_bits, x_step, weight, w_step, width, *, bias, out_dtype, x_sums):  # type: ignore[no-untyped-def]
            calls.append("ampere")
            assert torch.equal(x_sums, row_sums(x_bits, width))
            assert torch.equal(weight.sums, row_sums(weight.bits, width))
            y = bits_product(x_bits, x_step, weight.bits, w_step, width)
            return (y if bias is None else y + bias).to(out_dtype)

        vector = engine.b1_vector
        monkeypatch.setattr(engine, "b1_linear_hopper", hopper)
        monkeypatch.setattr(engine, "b1_linear", ampere)
        monkeypatch.setattr(engine, "b1_vector", lambda *a, **k: calls.append("vector") or vector(*a, **k))
        monkeypatch.setattr(engine, "b1_row_sums", row_sums)
        monkeypatch.setattr(engine, "prepare_b1_weight", lambda packed, width: (packed, row_sums(packed, width)))
        monkeypatch.setattr(backends, "backend_report", lambda: (BackendReport("cuda", True, ""), TORCH))
        monkeypatch.setattr(backends, "_devices", lambda backend: ("cpu",))
    yield calls
    backend_report.cache_clear()


@pytest.mark.parametrize("name", [name for name in SCHEMES if name.startswith("w1a1")] + ["w4a4", "w1a8"])
@pytest.mark.parametrize(("tokens", "kernel"), [(1, "vector"), (20, "hopper"), (20, "ampere")])
def test_packed_layers(
    name: str, tokens: int, kernel: str, device: torch.device, used: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cpu":
        reason = None if kernel == "hopper" else "not Hopper"
        monkeypatch.setattr("bitquest.ops.cuda.engine.refuses", lambda device: reason)
    check_packed("cuda", device, name, tokens, 256, 33)
    if device.type == "cpu":
        dense_bits = name in ("w1a1", "w1a1-norot")
        assert set(used) == ({kernel} if dense_bits else set())


@pytest.mark.parametrize("name", ["w1a1", "w1a1-norot", "w4a4"])
def test_training(name: str, device: torch.device, used: list[str]) -> None:
    assert name in TRAINED
    check_training("cuda", device, name, 12, 128, 33)
