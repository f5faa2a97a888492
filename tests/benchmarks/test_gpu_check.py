"""The benchmark refuses to time what is wrong: each kind of mistake in a layer is found."""

import math

import pytest
import torch
from torch import nn

from bitquest.benchmarks.gpu_check import WrongResultError, check_packed, check_training, relative_error, without_tuning
from bitquest.nn import PackedLinear, pack_, quantize_
from bitquest.numerics.fake_quant import Encoded


def _layer(scheme, k=96, n=40):
    torch.manual_seed(0)
    return pack_(quantize_(nn.Sequential(nn.Linear(k, n)), scheme, backend="torch"), backend="torch")[0]


def _x(tokens=33, k=96, dtype=torch.bfloat16):
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("scheme", ["w1a1", "w2a2", "w4a4", "w8a8", "w4a4-fp4", "w4a4-4:8", "w1a8", "w4a4-g32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_right_layer_passes(scheme, dtype):
    checks = check_packed(_layer(scheme), _x(dtype=dtype))
    assert len(checks) == 4
    assert all(check["found"] <= check["allowed"] for check in checks.values())


@pytest.mark.parametrize("scheme", ["w1a16", "w4a16", "w4a16-g32"])
def test_a_right_weight_only_layer_passes(scheme):
    assert list(check_packed(_layer(scheme), _x())) == ["output, norms"]


def _one_element(y):
    y = y.clone()
    y[3, 5] += 0.05 * y.abs().mean()
    return y


@pytest.mark.parametrize(
    ("harm", "scheme", "message"),
    [
        (_one_element, "w4a4", "units of its rounding"),
        (lambda y: y * 1.01, "w4a4", "units of its rounding"),
        (lambda y: y.index_fill(0, torch.tensor([32]), math.nan), "w4a4", "units of its rounding"),
        (lambda y: y.index_fill(0, torch.tensor([32]), 0.0), "w4a16", "output, norms"),
        (lambda y: y * math.inf, "w4a16", "output, norms"),
        (lambda y: y.float(), "w4a4", "the output is torch.float32"),
        (lambda y: y[:, :-1], "w4a4", "the output is"),
    ],
)
def test_a_wrong_output_is_found(monkeypatch, harm, scheme, message):
    layer, forward = _layer(scheme), PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: harm(forward(self, x)))
    with pytest.raises(WrongResultError, match=message):
        check_packed(layer, _x())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda e: Encoded(e.codes, e.step * 1.001, None), "steps of the input"),
        (lambda e: Encoded((e.codes + 3).clamp_max(7), e.step, None), "levels apart"),
        (lambda e: Encoded((e.codes + 1).clamp_max(7), e.step, None), "share that differs"),
    ],
)
def test_wrong_codes_are_found(monkeypatch, harm, message):
    layer, encode = _layer("w4a4"), PackedLinear.encode_input
    monkeypatch.setattr(PackedLinear, "encode_input", lambda self, x: harm(encode(self, x)))
    with pytest.raises(WrongResultError, match=message):
        check_packed(layer, _x())


def test_gradients_are_compared_by_norms():
    a = torch.randn(50, 50)
    assert relative_error(a, a) == 0
    assert relative_error(torch.full((2,), math.nan), torch.ones(2)) == math.inf
    assert check_training([("x", a * 1.01, a)])["x"]["found"] == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(WrongResultError, match="gradient of w"):
        check_training([("x", a, a), ("gradient of w", a * 1.1, a)])


def test_tuning_is_off_inside_and_as_before_outside(monkeypatch):
    import os

    for before in ("1", None):
        monkeypatch.delenv("BITQUEST_TUNE", raising=False)
        if before is not None:
            monkeypatch.setenv("BITQUEST_TUNE", before)
        with without_tuning():
            assert os.environ["BITQUEST_TUNE"] == "0"
        assert os.environ.get("BITQUEST_TUNE") == before
