"""Text from a model: prefill the prompt, then one token at a time through the key-value cache."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bitquest.errors import CheckpointError, ConfigError, DataError
from bitquest.inference.kv_cache import KVCache
from bitquest.inference.native_decode import NativeDecoder
from bitquest.inference.sampling import SamplingOptions, choose
from bitquest.inference.static_decode import StaticDecoder
from bitquest.models import Llama, Tokenizer, load_hf
from bitquest.models.fuse import fuse_


@dataclass
class Speed:
    """Tokens and seconds of one generation, filled in as it runs."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""  # what ended the text

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens per second, the prompt's prefill not counted."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0


def generate(
    model: Llama,
    prompt_ids: list[int],
    max_new_tokens: int,
    options: SamplingOptions | None = None,
    eos_id: int | None = None,
    speed: Speed | None = None,
) -> Iterator[int]:
    """New token ids, one by one, until `max_new_tokens`, `eos_id` (not handed out) or the model's last position.

    Raises DataError for an empty prompt, for ids the vocabulary has not, and for a prompt longer than the context.
    """
    return _generate(model, prompt_ids, max_new_tokens, options, eos_id, speed or Speed(), native=True)


def generate_by_layers(
    model: Llama, prompt_ids: list[int], max_new_tokens: int, options: SamplingOptions | None = None
) -> Iterator[int]:
    """As `generate`, but every token goes through the layers one by one.

    Native decoding adds attention up in another order, so that a code may flip there which does not here.
    """
    return _generate(model, prompt_ids, max_new_tokens, options, None, Speed(), native=False)


def _generate(
    model: Llama,
    prompt_ids: list[int],
    max_new_tokens: int,
    options: SamplingOptions | None,
    eos_id: int | None,
    speed: Speed,
    native: bool,
) -> Iterator[int]:
    options = options or SamplingOptions()
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if not prompt_ids:
        raise DataError("the prompt has no tokens; begin with the end-of-document token to start from nothing")
    if len(prompt_ids) > context:
        raise DataError(f"the prompt has {len(prompt_ids)} tokens, the model {context} positions; shorten the prompt")
    if min(prompt_ids) < 0 or max(prompt_ids) >= vocabulary:
        raise DataError(f"the prompt has ids outside the model's vocabulary of {vocabulary}: wrong tokenizer?")
    device = next(iter(model.buffers())).device
    generator = torch.Generator().manual_seed(options.seed)
    budget = min(max_new_tokens, context - len(prompt_ids) + 1)  # the last token needs no position: nothing follows it
    positions, dtype = len(prompt_ids) + budget - 1, model.model.norm.weight.dtype
    way = decoding_of(model) if native else "layers"
    cache = KVCache(model.config, positions=positions, dtype=dtype, device=device, native=way == "native")
    decoder = _decoder(model, cache, way) if budget > 1 else None
    token, fresh, started = -1, torch.tensor([prompt_ids], device=device), time.perf_counter()
    for number in range(budget):
        if number == 0 or decoder is None:
            with torch.no_grad():
                logits_V = model(fresh, cache, last=native)[0, -1]
        else:
            logits_V = decoder.step(token)
        token = choose(logits_V, options, generator)
        now = time.perf_counter()
        if number == 0:
            speed.prompt_tokens, speed.prompt_seconds = len(prompt_ids), now - started
        else:
            speed.tokens, speed.seconds = speed.tokens + 1, speed.seconds + now - started
        if token == eos_id:
            speed.stopped = "the end of the document"
            return
        yield token
        started = time.perf_counter()
        if decoder is None:
            fresh = torch.tensor([[token]], device=device)
    speed.stopped = "the number of tokens asked for" if budget == max_new_tokens else f"the context of {context} tokens"


def decoding_of(model: Llama) -> str:
    """How `generate` decodes this model: "native" (one call a token), "graph" (CUDA) or "layers", one by one."""
    if next(iter(model.buffers())).is_cuda:
        return "graph" if StaticDecoder.refuses(model) is None else "layers"
    return "native" if NativeDecoder.refuses(model) is None else "layers"


def _decoder(model: Llama, cache: KVCache, way: str) -> StaticDecoder | NativeDecoder | None:
    """What decodes faster than the model's own forward, if anything does."""
    if way == "graph":
        return StaticDecoder(model, cache)
    return NativeDecoder(model, cache) if way == "native" else None


class TextEngine:
    """A model and its tokenizer, ready to write.

    `open` takes a packed directory (bitquest export) or a Hugging Face Llama folder.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} words and the model {model.config.vocab_size}: "
                "they do not belong together"
            )
        self.model, self.tokenizer = model.eval(), tokenizer

    @staticmethod
    def open(folder: Path, backend: str = "auto", device: str = "cpu") -> "TextEngine":
        """Load a folder onto a device ("auto": a GPU if there is one).

        Raises CheckpointError, saying what to do instead, for one that cannot write text.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: expected a packed model (see bitquest export)")
        if (folder / "checkpoints").is_dir() or (folder / "config.toml").is_file():
            raise CheckpointError(
                f"{folder} is a training run; pack it first: bitquest export {folder} --out {folder.name}-packed"
            )
        from bitquest.export import load, read_tokenizer
        from bitquest.export.loader import usable_device

        target = usable_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if (folder / "manifest.json").is_file() and (folder / "model.safetensors").is_file():
            model, tokenizer = load(folder, device=target, backend=backend), read_tokenizer(folder)
            if not isinstance(model, Llama):
                raise CheckpointError(f"{folder} holds no Llama; load it in Python with bitquest.load(…, model=…)")
            if tokenizer is None:
                raise CheckpointError(f"{folder} has no tokenizer.json, so text cannot be turned into tokens")
            return TextEngine(fuse_(model), tokenizer)
        if (folder / "config.json").is_file():
            return TextEngine(load_hf(folder).to(target), Tokenizer.from_file(folder))
        raise CheckpointError(f"{folder} is neither a packed model nor a Hugging Face Llama: it has no config.json")

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt behind the token a document starts after: BOS if the tokenizer has one, else EOS."""
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eos_id
        return [first, *self.tokenizer.encode(prompt)]

    def write(
        self, prompt: str, max_new_tokens: int, options: SamplingOptions | None = None, speed: Speed | None = None
    ) -> Iterator[str]:
        """Pieces of text after the prompt as they are completed; ends at the end of the document or the context."""
        decoder, eos = self.tokenizer.stream_decoder(), self.tokenizer.eos_id
        # The decoder sees the prompt's end as well: some tokenizers drop a leading space at the start of a text.
        for token in self.tokenizer.encode(prompt):
            decoder.push(token)
        decoder.flush()
        for token in generate(self.model, self.prompt_ids(prompt), max_new_tokens, options, eos, speed):
            piece = decoder.push(token)
            if piece:
                yield piece
        rest = decoder.flush()
        if rest:
            yield rest
