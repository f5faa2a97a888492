"""The CUDA engine: what it hands to which kernel. Without a GPU the definition stands in for the CUDA kernels."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import SCHEMES, check_packed, check_training
from torch import Tensor

from bitquest.numerics import integer_linear
from bitquest.numerics.packing import unpack
from bitquest.ops import backend as backends
from bitquest.ops.backend import BackendReport, backend_report

TORCH = BackendReport("torch", True, "")
BITS = {"w1a1", "w1a1-norot"}
PLANES = {"w1a2", "w2a2"}
SPARSE = {"w4a4-2:4", "w4a4-4:8", "w1a1-2:4"}


def odd(planes: Tensor, width: int) -> Tensor:
    """The odd integers of planes (P, rows, ⌈K/8⌉): Σ 2^p·(±1)."""
    ones = [2 * unpack(plane, 1, width).to(torch.int32) + 1 for plane in planes]
    return torch.stack([one * 2**p for p, one in enumerate(ones)]).sum(0, dtype=torch.int32)


def row_sums(bits: Tensor, width: int) -> Tensor:
    return odd(bits[None], width).sum(1, dtype=torch.int32)


class StandIns:
    """The launchers of the CUDA kernels, by the definition; they check what they are handed."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sparse: Tensor | None = None

    def planes(
        self, x: Tensor, x_step: Tensor, x_sums: Tensor, w: Tensor, w_step: Tensor, w_sums: Tensor, width: int,
        *, bias: Tensor | None, out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        self.calls.append("planes")
        x_a, w_a = odd(x, width), odd(w, width)
        assert torch.equal(x_sums, x_a.sum(1, dtype=torch.int32))
        assert torch.equal(w_sums, w_a.sum(1, dtype=torch.int32))
        y = (x_a.double() @ w_a.double().t()).float() * x_step * w_step.t() / 4
        return (y if bias is None else y + bias).to(out_dtype)

    def hopper(self, x: Tensor, x_step: Tensor, x_sums: Tensor, w: Tensor, *rest: Any, **named: Any) -> Tensor:
        y = self.planes(x[None], x_step, x_sums, w[None], *rest, **named)
        self.calls[-1] = "hopper"
        return y

    def ampere(self, x: Tensor, x_step: Tensor, w: Any, w_step: Tensor, width: int, **named: Any) -> Tensor:
        x_sums = named.pop("x_sums")
        y = self.planes(x[None], x_step, x_sums, w.bits[None], w_step, w.sums, width, **named)
        self.calls[-1] = "ampere"
        return y

    def prepare_sparse(self, factors: Tensor, kept: Tensor, pair: bool) -> Any:
        from bitquest.ops.cuda import sparse

        made = sparse.prepare_sparse_weight(factors, kept, pair)
        self.sparse = sparse.arrange_activation(factors * kept, pair)
        return made

    def sparse_linear(
        self, x: Tensor, x_step: Tensor, w: Any, w_step: Tensor, x_form: Any, w_form: Any, *, bias: Any, out_dtype: Any
    ) -> Tensor:
        self.calls.append("sparse")
        assert self.sparse is not None
        assert w.values.shape == (self.sparse.shape[0], self.sparse.shape[1] // 2)
        y = integer_linear(x, x_step, self.sparse, w_step, x_form, w_form)
        return (y if bias is None else y + bias).to(out_dtype)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[StandIns]:
    """On the CPU, in place of the kernels, the probe and the device's type."""
    backend_report.cache_clear()
    made = StandIns()
    if device.type == "cpu":
        from bitquest.ops.cuda import engine

        vector = engine.b1_vector
        monkeypatch.setattr(engine, "b1_linear_hopper", made.hopper)
        monkeypatch.setattr(engine, "b1_linear", made.ampere)
        monkeypatch.setattr(engine, "planes_linear", made.planes)
        monkeypatch.setattr(engine, "prepare_sparse_weight", made.prepare_sparse)
        monkeypatch.setattr(engine, "sparse_linear", made.sparse_linear)
        monkeypatch.setattr(engine, "b1_vector", lambda *a, **k: made.calls.append("vector") or vector(*a, **k))
        monkeypatch.setattr(engine, "b1_row_sums", row_sums)
        monkeypatch.setattr(engine, "prepare_b1_weight", lambda packed, width: (packed, row_sums(packed, width)))
        monkeypatch.setattr(backends, "backend_report", lambda: (BackendReport("cuda", True, ""), TORCH))
        monkeypatch.setattr(backends, "_devices", lambda backend: ("cpu",))
    yield made
    backend_report.cache_clear()


def has(monkeypatch: pytest.MonkeyPatch, device: torch.device, one_bit: str | None, hopper: bool) -> None:
    """Kernels that are right on the machine that is played."""
    if device.type == "cpu":
        from bitquest.ops.cuda.engine import CudaEngine

        monkeypatch.setattr(CudaEngine, "_one_bit", one_bit)
        monkeypatch.setattr(CudaEngine, "_has_planes", hopper)
        monkeypatch.setattr(CudaEngine, "_has_sparse", hopper)


@pytest.mark.parametrize(
    "name", sorted({*BITS, *PLANES, *SPARSE, "w1a1-g128", "w4a4", "w1a8", "w1a16", "w2a2-ternary"})
)
@pytest.mark.parametrize(("tokens", "kernel"), [(1, "b1_wgmma"), (40, "b1_wgmma"), (40, "b1_mma"), (40, None)], ids=str)
def test_packed_layers(
    name: str, tokens: int, kernel: str | None, device: torch.device, stand_ins: StandIns,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert name in SCHEMES
    has(monkeypatch, device, kernel, hopper=kernel == "b1_wgmma")
    check_packed("cuda", device, name, tokens, 256, 33)
    expected: set[str] = set()
    if name in BITS and kernel is not None:
        expected = {"vector"} if tokens == 1 else {"hopper" if kernel == "b1_wgmma" else "ampere"}
    elif name in PLANES | SPARSE and kernel == "b1_wgmma" and tokens > 1:
        expected = {"planes" if name in PLANES else "sparse"}
    if device.type == "cpu":
        assert set(stand_ins.calls) == expected


@pytest.mark.parametrize("name", ["w1a1", "w1a1-norot", "w2a2", "w4a4-2:4"])
def test_training(name: str, device: torch.device, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, device, "b1_wgmma", hopper=True)
    check_training("cuda", device, name, 12, 128, 33)
    if device.type == "cpu":
        assert set(stand_ins.calls) == ({"hopper"} if name in BITS else set())


@pytest.mark.parametrize("kernel", ["b1_wgmma", "b1_mma", "planes", "sparse"])
def test_a_kernel_that_is_wrong_is_not_used(
    kernel: str, device: torch.device, stand_ins: StandIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-check on stand-ins: right ones pass, one wrong integer does not, nor one that cannot run."""
    from bitquest.errors import ConfigError
    from bitquest.ops.cuda import self_check

    if device.type != "cpu":
        assert self_check.is_right(kernel, device) or torch.cuda.get_device_capability() != (9, 0)
        return
    off = 0

    def product(x: Tensor, x_sums: Tensor, w: Tensor, w_sums: Tensor, width: int) -> Tensor:
        y = (odd(x, width).double() @ odd(w, width).double().t()).to(torch.int32)
        y[-1, -1] += off
        return y

    def sparse_product(x: Tensor, w: Any) -> Tensor:
        assert stand_ins.sparse is not None
        y = (x.double() @ stand_ins.sparse.double().t()).to(torch.int32)
        y[-1, -1] += off
        return y

    monkeypatch.setattr(
        self_check.hopper, "b1_product_hopper", lambda x, xs, w, ws, k: product(x[None], xs, w[None], ws, k)
    )
    monkeypatch.setattr(
        self_check.one_bit, "b1_product", lambda x, w, k, x_sums: product(x[None], x_sums, w[None], x_sums, k)
    )
    monkeypatch.setattr(self_check.planes, "planes_product", product)
    prepare = self_check.sparse.prepare_sparse_weight

    def remember(factors: Tensor, kept: Tensor, pair: bool) -> Any:
        stand_ins.sparse = self_check.sparse.arrange_activation(factors * kept, pair)
        return prepare(factors, kept, pair)

    monkeypatch.setattr(self_check.sparse, "prepare_sparse_weight", remember)
    monkeypatch.setattr(self_check.sparse, "sparse_product", sparse_product)
    self_check.is_right.cache_clear()
    assert self_check.is_right(kernel, device)
    off = 1
    self_check.is_right.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{kernel} is not used on cpu: its integers are not exact"):
        assert not self_check.is_right(kernel, device)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise ConfigError("no such unit")

    for module in (self_check.hopper, self_check.one_bit, self_check.planes, self_check.sparse):
        for name in ("b1_product_hopper", "b1_product", "planes_product", "sparse_product"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, refuse)
    self_check.is_right.cache_clear()
    with pytest.warns(RuntimeWarning, match="no such unit"):
        assert not self_check.is_right(kernel, device)
    self_check.is_right.cache_clear()
