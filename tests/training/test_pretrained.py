"""Fine-tuning from a Hugging Face folder: where weights come from, and vocabularies that do not match."""

import pytest
import torch

from bitquest.errors import ConfigError
from bitquest.models import Llama, LlamaConfig, Tokenizer, save_hf
from bitquest.training import load_run, train
from bitquest.training.checkpoint import read_checkpoint


def pretrained(folder, vocab_size=257, tokenizer=True, positions=64):
    shape = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions,
    )  # fmt: skip
    model = Llama(shape)
    model.init_weights(99)
    save_hf(model, folder, Tokenizer.byte_level() if tokenizer else None)
    return model


@pytest.fixture
def tune(make_config):
    def make(folder, **changes):
        config = make_config(**changes).to_dict()
        return type(make_config()).from_dict(config | {"model": {"init_from": str(folder)}})

    return make


def test_training_starts_from_the_folders_weights(tune, tmp_path):
    model = pretrained(tmp_path / "hf")
    config = tune(tmp_path / "hf", optimizer={"lr": 1e-12, "weight_decay": 0})
    train(config, tmp_path / "run")
    saved = read_checkpoint(tmp_path / "run").model
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=1e-9, msg=name)
    for path in (tmp_path / "hf").iterdir():
        path.unlink()
    loaded = load_run(tmp_path / "run")  # the folder is not needed any more
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_a_fine_tuning_goes_on_bit_identically_without_the_folder(tune, tmp_path):
    pretrained(tmp_path / "hf")
    config = tune(tmp_path / "hf")
    train(config, tmp_path / "straight")
    calls = []
    train(config, tmp_path / "stopped", should_stop=lambda: calls.append(0) or len(calls) >= 5)
    (tmp_path / "hf").rename(tmp_path / "gone")
    assert train(config, tmp_path / "stopped").resumed_from == 5
    one, two = (read_checkpoint(tmp_path / name).model for name in ("straight", "stopped"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_another_vocabulary_is_refused_with_both_numbers(tune, tmp_path):
    pretrained(tmp_path / "hf", vocab_size=300, tokenizer=False)
    with pytest.raises(ConfigError, match=r"vocabulary of 300.*one of 257.*--tokenizer .*hf"):
        train(tune(tmp_path / "hf"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_padded_table_of_the_same_tokenizer_is_taken(tune, tmp_path):
    pretrained(tmp_path / "hf", vocab_size=320)
    assert train(tune(tmp_path / "hf"), tmp_path / "run").finished


def test_a_table_too_small_for_its_tokenizer_is_refused(tune, tmp_path):
    pretrained(tmp_path / "hf", vocab_size=200)
    with pytest.raises(ConfigError, match="200 embeddings for a tokenizer of 257"):
        train(tune(tmp_path / "hf"), tmp_path / "run")


def test_a_context_beyond_the_models_positions_is_refused(tune, tmp_path):
    pretrained(tmp_path / "hf", positions=8)
    with pytest.raises(ConfigError, match=r"data\.context = 16 is longer than the 8 positions"):
        train(tune(tmp_path / "hf"), tmp_path / "run")
