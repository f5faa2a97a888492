"""Tokenizers: always a Hugging Face tokenizer.json, whether byte-level, trained here, or somebody else's."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from bitquest.errors import DataError
from bitquest.files import write_text_atomic

END_OF_TEXT = "<|endoftext|>"
# What published tokenizers call the end of a document, in the order they are looked for.
_EOS_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "<|endofsequence|>", "[EOS]", "[SEP]")
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
_OWN_KEY = "bitquest"
LARGEST_BPE = 1 << 24


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    return [table[b] for b in range(256)]


class Tokenizer:
    """Text to ids and back. `eos_id` separates documents; encoding adds no special tokens of its own.

    Make one with `byte_level()`, `train_bpe(…)` or `from_file(…)`. Raises DataError for files that are none.
    """

    def __init__(self, backend: Backend, eos_id: int, bos_id: int | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "</s>" in somebody's text is those characters, not the end of it
        self.backend, self.eos_id, self.bos_id = backend, eos_id, bos_id

    # --- making one ---

    @staticmethod
    def byte_level() -> "Tokenizer":
        """One id per byte, ids equal to byte values; 256 ends a document. Any text goes through unchanged."""
        vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        _byte_level(backend)
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return Tokenizer(backend, 256)

    @staticmethod
    def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE of `vocab_size` words (at least 257) trained on the texts; its last id ends a document."""
        if not 257 <= vocab_size <= LARGEST_BPE:
            raise DataError(
                f"a BPE vocabulary has at least 257 words (256 bytes and the end) and at most {LARGEST_BPE}, "
                f"not {vocab_size}"
            )
        backend = Backend(models.BPE())
        _byte_level(backend)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, special_tokens=[], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        return Tokenizer(backend, backend.get_vocab(with_added_tokens=True)[END_OF_TEXT])

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a tokenizer.json, or of a folder with one (a Hugging Face checkpoint, a prepared dataset).

        The end-of-document token is taken from tokenizer_config.json, special_tokens_map.json or config.json beside the
        file, else from its well-known names.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"no tokenizer at {file}: expected a Hugging Face tokenizer.json or a folder with one")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{file} is not a tokenizer.json: it is not UTF-8 text") from None
        return Tokenizer.from_json(text, str(file), _named_specials(file.parent))

    @staticmethod
    def from_json(text: str, where: str, named: dict[str, Any] | None = None) -> "Tokenizer":
        """The tokenizer of the text of a tokenizer.json; `where` names it in messages."""
        try:
            fields = json.loads(text)
            own = fields.pop(_OWN_KEY, None)
            backend = Backend.from_str(json.dumps(fields))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where} is not a Hugging Face tokenizer.json: {error}") from None
        if isinstance(own, dict):
            size, eos, bos = backend.get_vocab_size(), own.get("eos_token_id"), own.get("bos_token_id")
            if not isinstance(eos, int) or not 0 <= eos < size or not (bos is None or isinstance(bos, int)):
                raise DataError(f"{where}: the special tokens under {_OWN_KEY!r} are not in its vocabulary")
            return Tokenizer(backend, eos, bos)
        named = named or {}
        eos = _special(backend, named.get("eos_token"), named.get("eos_token_id"), _EOS_NAMES)
        if eos is None:
            raise DataError(
                f"{where} names no end-of-document token; put tokenizer_config.json with an eos_token beside it"
            )
        return Tokenizer(backend, eos, _special(backend, named.get("bos_token"), named.get("bos_token_id"), _BOS_NAMES))

    # --- using it ---

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def is_byte_level(self) -> bool:
        """Whether ids below 256 are the bytes themselves and nothing else but the end exists."""
        return self.vocab_size == 257 and self.sha256 == Tokenizer.byte_level().sha256

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens; a special token's name in the text is text.

        Raises DataError for a text with half a surrogate pair, as Python makes of bytes that are no UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"the text is not Unicode at character {error.start}: give it as UTF-8") from None
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, encoded in parallel."""
        return [list(e.ids) for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=True))

    def stream_decoder(self) -> "StreamDecoder":
        """Decodes one id at a time."""
        return StreamDecoder(self.decode)

    # --- keeping it ---

    def to_json(self) -> str:
        """The text of a tokenizer.json that `from_file` reads back, the end of document included."""
        fields = json.loads(self.backend.to_str())
        found = (_special(self.backend, None, None, _EOS_NAMES), _special(self.backend, None, None, _BOS_NAMES))
        if found != (self.eos_id, self.bos_id):  # only then: other readers of tokenizer.json refuse unknown keys
            fields[_OWN_KEY] = {"eos_token_id": self.eos_id, "bos_token_id": self.bos_id}
        return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        """Digest of `to_json`: equal for equal tokenizers."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer.json aside, wait until it is on the disk, and rename it into place. OSError names it."""
        write_text_atomic(Path(path), self.to_json())


class StreamDecoder:
    """Text of ids as they come: what is pushed and flushed, joined, is what decoding all ids at once gives."""

    # Enough context for a decoder that joins words with what stands before them.
    _CONTEXT = 8

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0  # ids whose text has been handed out

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._shown = len(self._ids)
        return text

    def flush(self) -> str:
        """What is left, unfinished characters as U+FFFD."""
        text = self._pending()
        self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        start = max(0, self._shown - self._CONTEXT)
        before = self._decode(self._ids[start : self._shown])
        return self._decode(self._ids[start:])[len(before) :]


def _byte_level(backend: Backend) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()


def _named_specials(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer.json call the special tokens."""
    named: dict[str, Any] = {}
    for name in ("config.json", "special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DataError(f"{file} is not valid JSON: {error}") from None
        if isinstance(fields, dict):
            wanted = ("eos_token", "bos_token", "eos_token_id", "bos_token_id")
            named |= {key: fields[key] for key in wanted if fields.get(key) is not None}
    return named


def _special(backend: Backend, name: Any, number: Any, known: Sequence[str]) -> int | None:
    if isinstance(name, dict):
        name = name.get("content")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if isinstance(name, str) and name in vocabulary:
        return int(vocabulary[name])
    if isinstance(number, int) and 0 <= number < len(vocabulary):
        return number
    return next((int(vocabulary[n]) for n in known if n in vocabulary), None)
