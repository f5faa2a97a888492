import os
from pathlib import Path

import pytest
import torch

from bitquest.models import LlamaConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text, tokenizers and checkpoints; BITQUEST_DATA names it."""
    folder = os.environ.get("BITQUEST_DATA")
    if not folder:
        pytest.skip("BITQUEST_DATA is not set: no real text, tokenizer or checkpoint at hand")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"BITQUEST_DATA names {folder}, which is not a folder")
    return path


@pytest.fixture(scope="session")
def grouped_config() -> LlamaConfig:
    """A small Llama whose three heads share one key-value head."""
    return LlamaConfig(
        vocab_size=50,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
