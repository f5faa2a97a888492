"""Hugging Face Llama checkpoints, both ways: config.json, safetensors (one file or shards), tokenizer.json."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitquest.errors import CheckpointError, ConfigError
from bitquest.models.config import LlamaConfig
from bitquest.models.llama import Llama
from bitquest.models.tokenizer import Tokenizer

_OPTIONS = ("qk_norm", "norm_before_o_proj", "norm_before_down_proj")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is no Hugging Face checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return fields


def config_from_hf(fields: dict[str, Any], where: str) -> LlamaConfig:
    """The LlamaConfig of a Hugging Face config.json. Raises CheckpointError for what this Llama cannot compute."""
    if fields.get("model_type") != "llama":
        raise CheckpointError(f"{where} describes a {fields.get('model_type')!r} model; only 'llama' can be read")
    if fields.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: activation {fields['hidden_act']!r} is not supported, only 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if fields.get(key):
            raise CheckpointError(f"{where}: {key} is set; layers with biases are not supported")
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{where}: rope_parameters must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{where}: rope scaling {kind!r} is not supported, only the default rotary embedding")
    missing = [key for key in _SIZES if key not in fields]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}")
    try:
        return LlamaConfig(
            **{key: fields[key] for key in _SIZES},
            num_key_value_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
            rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", fields.get("rope_theta", 10000.0)),
            tie_word_embeddings=fields.get("tie_word_embeddings", False),
            head_dim=fields.get("head_dim"),
            **{key: fields.get(key, False) for key in _OPTIONS},
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


def config_to_hf(config: LlamaConfig, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The config.json that Hugging Face's LlamaForCausalLM reads. Raises ConfigError for options it does not have."""
    used = [key for key in _OPTIONS if getattr(config, key)]
    if used:
        raise ConfigError(f"Hugging Face's Llama has no {', '.join(used)}; use bitquest.save for this model")
    fields: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{key: getattr(config, key) for key in _SIZES},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }
    if tokenizer is not None:
        fields |= {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    return fields


def _tensor_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if file.parent != folder or not file.is_file():
                raise CheckpointError(f"{index} names {file.name}, which is not in {folder}")
        return files
    raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")


def load_hf(folder: str | os.PathLike[str]) -> Llama:
    """The Llama of a Hugging Face folder, weights as float32 whatever they are stored as.

    Raises CheckpointError for a missing, damaged or foreign checkpoint, naming the file or tensor.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: expected a Hugging Face checkpoint")
    config = config_from_hf(_read_json(path / "config.json"), str(path / "config.json"))
    files = _tensor_files(path)
    with torch.device("meta"):
        model = Llama(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (no mapping)
                    if name.endswith("rotary_emb.inv_freq") or (
                        name == "lm_head.weight" and config.tie_word_embeddings
                    ):
                        continue  # computed, or the embedding under its second name
                    if name not in wanted:
                        raise CheckpointError(f"{file} has a tensor {name!r} that a Llama of this config has not")
                    shape = torch.Size(tensors.get_slice(name).get_shape())
                    if shape != wanted[name]:
                        raise CheckpointError(f"{file}: {name} is {tuple(shape)}, expected {tuple(wanted[name])}")
                    found[name] = tensors.get_tensor(name).to(torch.float32)
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None
    if config.tie_word_embeddings and "model.embed_tokens.weight" in found:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, among them {missing[0]}")
    model = Llama(config)
    model.load_state_dict(found)
    return model


def save_hf(model: Llama, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
    """Write a plain Llama as a Hugging Face folder (float32 safetensors), aside first, then renamed into place.

    Raises ConfigError for a quantized model or one with options Hugging Face's Llama lacks, CheckpointError if the
    folder exists.
    """
    path = Path(folder)
    if path.exists():
        raise CheckpointError(f"{path} exists; choose a new folder")
    config = config_to_hf(model.config, tokenizer)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    foreign = set(state) - {name for name, _ in _plain_names(model.config)}
    if foreign:
        raise ConfigError(
            f"{sorted(foreign)[0]} is no tensor of a plain Llama; quantized models are kept by bitquest.save"
        )
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_file(state, aside / "model.safetensors", metadata={"format": "pt"})
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(aside / "tokenizer.json")
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _plain_names(config: LlamaConfig) -> list[tuple[str, torch.Size]]:
    """Names and shapes of a plain Llama's tensors."""
    with torch.device("meta"):
        return [(name, tensor.shape) for name, tensor in Llama(config).state_dict().items()]
