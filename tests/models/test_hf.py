"""Hugging Face checkpoints: the same logits as transformers, and clear refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitquest.errors import CheckpointError, ConfigError
from bitquest.models import Llama, LlamaConfig, Tokenizer, load_hf, save_hf
from bitquest.nn import quantize_

SMALL = {"vocab_size": 300, "max_position_embeddings": 64, "num_hidden_layers": 2}


def agree(ours: Llama, folder: Path, vocabulary: int) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_real_checkpoint(shared_data: Path) -> None:
    folder = shared_data / "checkpoints" / "stories15M"
    model = load_hf(folder)
    assert model.config.tie_word_embeddings
    agree(model, folder, model.config.vocab_size)


@pytest.mark.parametrize("overrides", [{"num_key_value_heads": 2}, {"tie_word_embeddings": True, "head_dim": 64}])
def test_written_checkpoints_are_transformers_checkpoints(tmp_path: Path, overrides: dict) -> None:
    model = Llama(LlamaConfig.preset("1M", **SMALL, **overrides)).init_weights(5)
    save_hf(model, tmp_path / "out", Tokenizer.byte_level())
    agree(model, tmp_path / "out", 300)
    again = load_hf(tmp_path / "out")
    assert again.config == LlamaConfig.from_json({**model.config.to_json(), "head_dim": model.config.head_size})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert Tokenizer.from_file(tmp_path / "out").sha256 == Tokenizer.byte_level().sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf(Llama(LlamaConfig.preset("1M", **SMALL)).init_weights(5), tmp_path / "hf")
    return tmp_path / "hf"


def test_shards(folder: Path) -> None:
    whole = load_hf(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load_hf(folder).lm_head.weight, whole.lm_head.weight)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors, which is not in"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "only 'llama'"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "biases"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope scaling 'llama3'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": "linear"}, "rope_parameters must be an object, not 'linear'"),
        ({"vocab_size": 301}, r"is \(300, 128\), expected \(301, 128\)"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"num_hidden_layers": 1}, "has a tensor"),
    ],
)
def test_refused_configurations(folder: Path, change: dict, message: str) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(CheckpointError, match=message):
        load_hf(folder)


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        load_hf(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:100])
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_hf(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model"):
        load_hf(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_hf(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_hf(copy)


def test_what_hugging_face_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="qk_norm"):
        save_hf(Llama(LlamaConfig.preset("1M", **SMALL, qk_norm=True)), tmp_path / "x")
    model = Llama(LlamaConfig.preset("1M", **SMALL))
    save_hf(model, tmp_path / "y")
    with pytest.raises(CheckpointError, match="exists"):
        save_hf(model, tmp_path / "y")
    from bitquest.nn import pack_

    with pytest.raises(ConfigError, match=r"bitquest\.save"):
        save_hf(pack_(quantize_(model, "w4a4")), tmp_path / "z")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["y"]
