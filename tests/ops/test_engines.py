"""The native engine is the reference."""

import pytest
import torch
from engine_cases import SCHEMES, TRAINED, check_no_tokens, check_packed, check_training

from bitquest.ops.native import availability

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not availability()[0], reason=availability()[1])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("tokens", "width", "out"), [(1, 128, 64), (3, 384, 65), (33, 256, 130)])
def test_packed_layers(name: str, tokens: int, width: int, out: int) -> None:
    check_packed("native", CPU, name, tokens, width, out)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(("tokens", "width", "out"), [(5, 128, 33), (48, 384, 64)])
def test_training(name: str, tokens: int, width: int, out: int) -> None:
    check_training("native", CPU, name, tokens, width, out)


def test_no_tokens() -> None:
    check_no_tokens("native", CPU)
