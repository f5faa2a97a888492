"""Multiple-choice questions from files, each format recognised by its fields and worded as lm-eval words it.

A format is a function from a record to an `Item`; prompts, delimiters and lengths are those of the task of the same
name in EleutherAI's lm-evaluation-harness 0.4.13 (`lm_eval/tasks`), so that the scores are comparable.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquest.errors import DataError
from bitquest.training.readers import json_records, kind_of

Record = dict[str, Any]
_DELIMITER = " "


@dataclass(frozen=True)
class Item:
    """One question: `continuations[i]` is predicted after `contexts[i]`, `gold` is the right one's number.

    lengths: characters of each choice, by which its log-likelihood is divided for acc_norm; the delimiter is not in it.
    line: where in its file it stands.
    """

    line: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """The questions of one file; format is the name of one of FORMATS."""

    path: Path
    format: str
    items: tuple[Item, ...]


class _WrongError(Exception):
    """What is wrong with a record; the reader adds where."""


# --- parts of records ----------------------------------------------------------------------------------------------


def _text(record: Record, name: str) -> str:
    return _as_text(record[name], repr(name))


def _as_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise _WrongError(f"{name} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _WrongError(f"{name} has half a surrogate pair, which is no text") from None
    return value


def _texts(value: object, name: str) -> list[str]:
    if not isinstance(value, list):
        raise _WrongError(f"{name} is {_kind(value)}, not a list of texts")
    return [_as_text(one, f"number {number} of {name}") for number, one in enumerate(value)]


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", dict: "an object", list: "a list", str: "text"}
    return names.get(type(value), "a number")


def _number(record: Record, name: str) -> int:
    """A label: 2, or "2" as some published files have it."""
    value = record[name]
    if value is None or value == "":
        raise _WrongError(f"{name!r} is empty: this item has no answer, as in the test split of some data sets")
    if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise _WrongError(f"{name!r} is {value!r}, not the number of a choice")
    return value


def _item(line: int, context: str, choices: list[str], gold: int, name: str, delimiter: str = _DELIMITER) -> Item:
    """The common case: one context, and choices behind a delimiter. `name` is what the file calls the label."""
    if len(choices) < 2:
        raise _WrongError(f"{len(choices)} choice{'s are' if not choices else ' is'} no question; give at least 2")
    for number, choice in enumerate(choices):
        if not choice.strip():
            raise _WrongError(f"choice {number} is empty")
    if not 0 <= gold < len(choices):
        raise _WrongError(f"{name!r} is {gold}, but the choices are numbered from 0 to {len(choices) - 1}")
    return Item(
        line,
        (context,) * len(choices),
        tuple(delimiter + choice for choice in choices),
        tuple(len(choice) for choice in choices),
        gold,
    )


# --- formats -------------------------------------------------------------------------------------------------------


def _mended(text: str) -> str:
    """HellaSwag's text without the marks of WikiHow in it. Twice the same space is left as lm-eval leaves it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(record: Record, line: int) -> Item:
    context = _text(record, "ctx_a") + " " + _text(record, "ctx_b").capitalize()
    endings = [_mended(ending) for ending in _texts(record["endings"], "'endings'")]
    return _item(
        line, _mended(f"{_text(record, 'activity_label')}: {context}"), endings, _number(record, "label"), "label"
    )


def _generic(record: Record, line: int) -> Item:
    delimiter = _as_text(record.get("delimiter", _DELIMITER), "'delimiter'")
    choices = _texts(record["choices"], "'choices'")
    return _item(line, _text(record, "context"), choices, _number(record, "answer"), "answer", delimiter)


def _lettered(record: Record, line: int, context: str, key: str) -> Item:
    """Choices as {"text": […], "label": ["A", …]} and the letter of the right one."""
    choices = record["choices"]
    if not isinstance(choices, dict) or not {"text", "label"} <= set(choices):
        raise _WrongError("'choices' is not an object with 'text' and 'label'")
    texts, labels = _texts(choices["text"], "'text'"), _texts(choices["label"], "'label'")
    if len(texts) != len(labels):
        raise _WrongError(f"'choices' has {len(texts)} texts and {len(labels)} labels")
    if key not in labels:
        raise _WrongError(f"'answerKey' is {key!r}, which is none of the labels {', '.join(labels)}")
    return _item(line, context, texts, labels.index(key), "answerKey")


def _arc(record: Record, line: int) -> Item:
    return _lettered(record, line, f"Question: {_text(record, 'question')}\nAnswer:", _text(record, "answerKey"))


def _openbookqa(record: Record, line: int) -> Item:
    return _lettered(record, line, _text(record, "question_stem"), _text(record, "answerKey").lstrip())


def _piqa(record: Record, line: int) -> Item:
    context = f"Question: {_text(record, 'goal')}\nAnswer:"
    return _item(line, context, [_text(record, "sol1"), _text(record, "sol2")], _number(record, "label"), "label")


def _winogrande(record: Record, line: int) -> Item:
    """The options fill the gap, and what stands behind the gap is predicted; so there is nothing to normalise."""
    before, gap, behind = _text(record, "sentence").partition("_")
    if not gap or not behind.strip():
        raise _WrongError("'sentence' has no gap (_) with text behind it")
    gold = _number(record, "answer")
    if gold not in (1, 2):
        raise _WrongError(f"'answer' is {gold}, but the options are numbered 1 and 2")
    contexts = tuple(before + _text(record, name) for name in ("option1", "option2"))
    rest = behind.strip()
    return Item(line, contexts, (_DELIMITER + rest,) * 2, (len(rest),) * 2, gold - 1)


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record, int], Item]]] = {
    "hellaswag": (("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
    "arc": (("question", "choices", "answerKey"), _arc),
    "openbookqa": (("question_stem", "choices", "answerKey"), _openbookqa),
    "piqa": (("goal", "sol1", "sol2", "label"), _piqa),
    "winogrande": (("sentence", "option1", "option2", "answer"), _winogrande),
    "generic": (("context", "choices", "answer"), _generic),
}


# --- files ---------------------------------------------------------------------------------------------------------


def read_task(path: Path, limit: int | None = None) -> Task:
    """The questions of a .jsonl file (also .gz, .xz, .zst), the first `limit` of them.

    Raises DataError naming file and line for what is no question, and for a file without any.
    """
    if limit is not None and limit < 1:
        raise DataError(f"{limit} items are none to evaluate; give at least 1")
    if not path.is_file():
        raise DataError(
            f"{path}: {'this is a folder' if path.is_dir() else 'no such file'}; give a .jsonl of questions"
        )
    if kind_of(path) != ".jsonl":
        raise DataError(f"{path}: questions are read from .jsonl, one object a line")
    name, items = "", list[Item]()
    for line, record in json_records(path):
        where = f"{path}, line {line}"
        name = name or _format_of(record, where)
        fields, make = FORMATS[name]
        missing = [field for field in fields if field not in record]
        if missing:
            raise DataError(f"{where}: there is no {_and(missing)}; the file's format is {name}")
        try:
            items.append(make(record, line))
        except _WrongError as error:
            raise DataError(f"{where}: {error}") from None
        if len(items) == limit:
            break
    if not items:
        raise DataError(f"{path}: there is no question in it")
    return Task(path, name, tuple(items))


def _format_of(record: Record, where: str) -> str:
    """The format all of whose fields are there."""
    whole = [name for name, (fields, _) in FORMATS.items() if set(fields) <= set(record)]
    if whole:
        return whole[0]
    nearest = max(FORMATS, key=lambda name: len(set(FORMATS[name][0]) & set(record)) / len(FORMATS[name][0]))
    missing = [field for field in FORMATS[nearest][0] if field not in record]
    if len(missing) == 1:
        raise DataError(f"{where}: there is no {_and(missing)}; with it the format would be {nearest}")
    raise DataError(
        f"{where}: the fields {', '.join(map(repr, list(record)[:10])) or '(none)'} are those of no known format; the "
        f"generic one has 'context', 'choices' and 'answer' (known: {', '.join(FORMATS)})"
    )


def _and(names: list[str]) -> str:
    return " and no ".join(map(repr, names))
