"""The model a configuration describes: new, from a Hugging Face folder, or as a checkpoint's state describes it."""

from pathlib import Path
from typing import Any

from bitquest.errors import CheckpointError, ConfigError
from bitquest.models import Llama, LlamaConfig, Tokenizer, load_hf
from bitquest.nn import Scheme, quantize_
from bitquest.ops.backend import BackendError
from bitquest.training.checkpoint import Checkpoint, load_named
from bitquest.training.config import TrainConfig
from bitquest.training.data import Tokens


def new_model(config: TrainConfig, tokens: Tokens) -> Llama:
    """A model to begin with: random weights from the seed, or those of model.init_from; quantized layers in place.

    Raises ConfigError if the shape does not fit the data, the scheme or itself, naming the keys to change.
    """
    if config.model.init_from is not None:
        model = _pretrained(Path(config.model.init_from), config, tokens)
    else:
        model = Llama(config.model.llama_config(tokens.vocab_size, config.data.context))
        model.init_weights(config.seed)
    return _quantized(model, config, config.train.backend)


def _quantized(model: Llama, config: TrainConfig, backend: str) -> Llama:
    try:
        quantize_(model, Scheme.parse(config.scheme), backend=backend)
    except BackendError as error:
        raise ConfigError(f"train.backend = {backend!r}: {error}. Set it to auto, or see bitquest doctor") from None
    except ConfigError as error:
        raise ConfigError(
            f"scheme = {config.scheme!r} does not fit the model: {error} "
            "(change scheme, or model.hidden_size / model.intermediate_size)"
        ) from None
    return model


def _pretrained(folder: Path, config: TrainConfig, tokens: Tokens) -> Llama:
    model = load_hf(folder).float()
    shape = model.config
    if shape.vocab_size != tokens.vocab_size and not _same_tokenizer(folder, tokens):
        raise ConfigError(
            f"model.init_from = {folder} has a vocabulary of {shape.vocab_size}, the data in {config.data.path} "
            f"one of {tokens.vocab_size}: prepare the data with the model's own tokenizer "
            f"(bitquest data prepare … --tokenizer {folder})"
        )
    if tokens.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"model.init_from = {folder} has {shape.vocab_size} embeddings for a tokenizer of {tokens.vocab_size}: "
            "the folder's tokenizer does not belong to its weights"
        )
    if shape.max_position_embeddings < config.data.context:
        raise ConfigError(
            f"data.context = {config.data.context} is longer than the {shape.max_position_embeddings} positions "
            f"of {folder}: lower data.context"
        )
    return model


def _same_tokenizer(folder: Path, tokens: Tokens) -> bool:
    """Whether the folder's tokenizer made the data; then a larger, padded embedding table is fine."""
    if not (folder / "tokenizer.json").is_file():
        return False
    return bool(Tokenizer.from_file(folder).sha256 == tokens.tokenizer().sha256)


def restored_model(config: TrainConfig, checkpoint: Checkpoint, where: str, backend: str = "torch") -> Llama:
    """The model of a checkpoint, on the CPU, by default as the definition has it: on fake-quantized floats.

    Raises CheckpointError if its weights do not fit its description.
    """
    try:
        model = Llama(LlamaConfig.from_json(_entry(checkpoint, "model", where)))
    except ConfigError as error:
        raise CheckpointError(f"{where}: the model's shape in state.json is wrong: {error}") from None
    model = _quantized(model, config, backend)
    load_named(model.state_dict(), checkpoint.model, where)
    return model


def checkpoint_config(checkpoint: Checkpoint, where: str) -> TrainConfig:
    """The configuration a checkpoint was trained with."""
    try:
        return TrainConfig.from_dict(_entry(checkpoint, "config", where))
    except ConfigError as error:
        raise CheckpointError(f"{where}: the configuration in state.json is wrong: {error}") from None


def _entry(checkpoint: Checkpoint, name: str, where: str) -> dict[str, Any]:
    entry = checkpoint.state.get(name)
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: state.json has no object {name!r}")
    return entry
