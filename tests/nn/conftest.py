import pytest

from bitquest.models import LlamaConfig


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
