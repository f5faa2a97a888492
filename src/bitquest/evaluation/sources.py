"""What an evaluation is given on the command line: a model of any kind, and text of any kind."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bitquest.errors import CheckpointError, DataError
from bitquest.evaluation.perplexity import Stream, pieces_stream
from bitquest.export import is_packed, load, read_tokenizer
from bitquest.export.loader import usable_device
from bitquest.models import Llama, Tokenizer, load_hf
from bitquest.ops.backend import resolve_backend
from bitquest.training.data import Tokens, open_tokens
from bitquest.training.readers import find_inputs, is_known, pieces
from bitquest.training.runs import is_run, load_run

VALIDATION = "val"


@dataclass(frozen=True)
class OpenedModel:
    """A model in eval mode and its tokenizer; kind is "packed", "run" or "huggingface"."""

    model: Llama
    tokenizer: Tokenizer
    kind: str


def open_model(path: Path, step: int | None = None, backend: str = "auto", device: str = "cpu") -> OpenedModel:
    """On a device: a packed model, a run's checkpoint (the newest, or `step`), or a Hugging Face Llama folder.

    Raises CheckpointError, or FormatError for a packed model, saying what is wrong and what to do.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory; give a packed model, a run, or a Hugging Face Llama folder")
    target = usable_device(device)
    resolve_backend(backend)  # a misspelt one is a mistake for every kind of model
    if is_run(path):
        run = load_run(path, step)
        return OpenedModel(run.model.to(target), run.tokenizer, "run")
    if step is not None:
        raise CheckpointError(f"{path} is no run directory, so there is no step {step} to choose")
    if is_packed(path):
        model, tokenizer = load(path, device=target, backend=backend), read_tokenizer(path)
        if not isinstance(model, Llama):
            raise CheckpointError(f"{path} holds no Llama; load it in Python with bitquest.load(…, model=…)")
        if tokenizer is None:
            raise CheckpointError(f"{path} has no tokenizer.json, so text cannot be turned into tokens")
        return OpenedModel(model, tokenizer, "packed")
    if (path / "config.json").is_file():
        return OpenedModel(load_hf(path).to(target).eval(), Tokenizer.from_file(path), "huggingface")
    raise CheckpointError(
        f"{path} is neither a packed model (bitquest export), nor a run (bitquest train), nor a Hugging Face Llama"
    )


def open_stream(path: Path, tokenizer: Tokenizer, limit: int | None = None) -> Stream:
    """Tokens to predict: the validation split of prepared data, or text files (also compressed, and folders of them).

    A file named as neither .txt nor .jsonl is read as text; a folder's such files are left out. limit: at most so many
    tokens. Raises DataError: missing, empty, or prepared with another tokenizer.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{limit} tokens are none to evaluate; give at least 1")
    if (path / "manifest.json").is_file():
        return _prepared_stream(path, tokenizer, limit)
    try:
        if path.is_file() and not is_known(path):
            found = pieces(path, kind=".txt")
        else:
            found = (piece for file in find_inputs([path]) for piece in pieces(file))
        return pieces_stream(tokenizer, found, limit)
    except DataError as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from None


def _prepared_stream(path: Path, tokenizer: Tokenizer, limit: int | None) -> Stream:
    data = open_tokens(path, VALIDATION)
    if data.tokenizer().sha256 != tokenizer.sha256:
        raise DataError(
            f"{path} was prepared with another tokenizer (a vocabulary of {data.vocab_size}) than the model's "
            f"({tokenizer.vocab_size}); prepare it with the model's tokenizer.json, or give the text itself"
        )
    if not data.count:
        raise DataError(f"{path}: its validation split is empty")
    count = data.count if limit is None else min(limit, data.count)
    ids = data.read(0, count)
    size = data.utf8_bytes if count == data.count else _utf8_bytes(data, ids, tokenizer)
    return Stream(torch.cat([torch.tensor([data.eos_id]), ids]), size)


def _utf8_bytes(data: Tokens, ids: torch.Tensor, tokenizer: Tokenizer) -> int:
    """Bytes that a part of the split stands for, document by document; a character cut at the end counts as begun."""
    ends = [*(ids == data.eos_id).nonzero().flatten().tolist(), ids.numel()]
    size, begin = 0, 0
    for end in ends:
        size += len(tokenizer.decode(ids[begin:end].tolist()).replace("\N{REPLACEMENT CHARACTER}", "?").encode("utf-8"))
        begin = end + 1
    return size
