"""The Triton engine is the reference: which kernel a layer gets at which number of tokens, and what it is handed."""

from collections.abc import Iterator

import pytest
import torch
from engine_cases import SCHEMES, TRAINED, check_no_tokens, check_packed, check_training

from bitquest.ops.backend import backend_report


@pytest.fixture(autouse=True)
def _probe_anew() -> Iterator[None]:
    """Whether Triton is there depends on the interpreter, which only the tests of this folder switch on."""
    backend_report.cache_clear()
    yield
    backend_report.cache_clear()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("tokens", "width", "out"), [(1, 128, 20), (35, 128, 33)])
def test_packed_layers(name: str, tokens: int, width: int, out: int, device: torch.device) -> None:
    check_packed("triton", device, name, tokens, width, out)


@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str, device: torch.device) -> None:
    check_training("triton", device, name, 9, 128, 33)


def test_no_tokens(device: torch.device) -> None:
    check_no_tokens("triton", device)
