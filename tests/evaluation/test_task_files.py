"""Files of questions: what is read from each format, and what is said about mistakes in them."""

import gzip
import json
import lzma

import pytest

from bitquest.errors import DataError
from bitquest.evaluation.task_files import FORMATS, read_task

HELLASWAG = {
    "activity_label": "Personal Care",
    "ctx_a": "[header] How to do it [title] First [step] Take a  [substeps] brush.",
    "ctx_b": "the LADY",
    "endings": ["waits. [substeps] Goes.", " runs ", "sits [title] Again."],
    "label": "2",
}
GENERIC = {"context": "One and", "choices": ["two.", "drei, süß"], "answer": 1}
LETTERED = {"text": ["yes", "no"], "label": ["A", "B"]}
OTHERS = {
    "arc": {"question": "Is it?", "choices": LETTERED, "answerKey": "B"},
    "openbookqa": {"question_stem": "It is", "choices": LETTERED, "answerKey": " B"},
    "piqa": {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 1},
    "winogrande": {"sentence": "Tom saw Tim when _ was ill.", "option1": "Tom", "option2": "Tim", "answer": "2"},
}


@pytest.fixture
def write(tmp_path):
    def write(*records, name="items.jsonl"):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return tmp_path / name

    return write


def test_hellaswag_is_mended_as_lm_eval_mends_it(write):
    task = read_task(write(HELLASWAG))
    [item] = task.items
    assert task.format == "hellaswag"
    assert item.contexts == ("Personal Care: How to do it. First Take a  brush. The lady",) * 3
    assert item.continuations == (" waits. Goes.", " runs", " sits. Again.")
    assert item.lengths == (12, 4, 12)
    assert (item.gold, item.line) == (2, 1)


def test_a_generic_question(write):
    task = read_task(write(GENERIC, "", GENERIC | {"delimiter": "", "note": "more fields do not matter"}))
    first, second = task.items
    assert task.format == "generic"
    assert first.continuations == (" two.", " drei, süß")
    assert second.continuations == ("two.", "drei, süß")
    assert first.lengths == second.lengths == (4, 9)  # characters, not bytes
    assert (first.line, second.line) == (1, 3)


def test_other_published_formats(write):
    found = {name: read_task(write(record)) for name, record in OTHERS.items()}
    assert {name: task.format for name, task in found.items()} == {name: name for name in OTHERS}
    items = {name: task.items[0] for name, task in found.items()}
    assert {item.gold for item in items.values()} == {1}
    assert items["arc"].contexts[0] == "Question: Is it?\nAnswer:"
    assert items["openbookqa"].contexts[0] == "It is"
    assert items["piqa"].contexts[0] == "Question: Open it\nAnswer:"
    assert items["piqa"].continuations == (" pull", " push")
    assert items["winogrande"].contexts == ("Tom saw Tim when Tom", "Tom saw Tim when Tim")
    assert items["winogrande"].continuations == (" was ill.",) * 2
    assert {*OTHERS, "hellaswag", "generic"} == set(FORMATS)


def test_compressed_files_and_a_limit(write, tmp_path):
    plain = write(*[GENERIC] * 5)
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    for name in ("items.jsonl", "a.jsonl.xz", "a.jsonl.gz"):
        assert len(read_task(tmp_path / name).items) == 5
        assert len(read_task(tmp_path / name, 3).items) == 3
    write(GENERIC, "not json")
    assert len(read_task(plain, 1).items) == 1  # no more is read than asked for


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (HELLASWAG | {"label": ""}, "'label' is empty: this item has no answer, as in the test split"),
        (HELLASWAG | {"label": "3"}, "'label' is 3, but the choices are numbered from 0 to 2"),
        (HELLASWAG | {"label": -1}, "'label' is -1, but"),
        (HELLASWAG | {"label": "c"}, "'label' is 'c', not the number of a choice"),
        (HELLASWAG | {"label": True}, "'label' is True, not the number"),
        (HELLASWAG | {"endings": ["a", "[title]", "c"]}, "choice 1 is empty"),
        (HELLASWAG | {"endings": ["a"]}, "1 choice is no question; give at least 2"),
        (HELLASWAG | {"endings": []}, "0 choices are no question"),
        (HELLASWAG | {"endings": "abc"}, "'endings' is text, not a list"),
        (HELLASWAG | {"endings": ["a", None]}, "number 1 of 'endings' is null, not text"),
        (HELLASWAG | {"ctx_b": 3}, "'ctx_b' is a number, not text"),
        ({k: v for k, v in HELLASWAG.items() if k != "label"}, "there is no 'label'; the file's format is hellaswag"),
        (HELLASWAG | {"ctx_a": "\ud800"}, "half a surrogate pair"),
        ('{"activity_label": ', "not valid JSON at column"),
        ("[1, 2]", "expected an object, found"),
    ],
)
def test_mistakes_name_file_and_line(write, record, match):
    path = write(HELLASWAG, "", record)
    with pytest.raises(DataError, match=match) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({k: v for k, v in HELLASWAG.items() if k != "label"}, "no 'label'; with it the format would be hellaswag"),
        ({"text": "a"}, "the fields 'text' are those of no known format; the generic one has 'context'"),
        ({}, "none"),
        (GENERIC | {"answer": 2}, "'answer' is 2, but the choices are numbered from 0 to 1"),
        (GENERIC | {"delimiter": 1}, "'delimiter' is a number"),
        (OTHERS["arc"] | {"answerKey": "E"}, "'answerKey' is 'E', which is none of the labels A, B"),
        (OTHERS["arc"] | {"choices": ["a", "b"]}, "'choices' is not an object with 'text' and 'label'"),
        (OTHERS["arc"] | {"choices": {"text": ["a"], "label": ["A", "B"]}}, "1 texts and 2 labels"),
        (OTHERS["winogrande"] | {"sentence": "No gap."}, "no gap"),
        (OTHERS["winogrande"] | {"answer": "0"}, "the options are numbered 1 and 2"),
    ],
)
def test_mistakes_in_the_first_record(write, record, match):
    with pytest.raises(DataError, match=match):
        read_task(write(record))


def test_mistakes_with_files(write, tmp_path):
    write(name="empty.jsonl")
    write("text", name="notes.txt")
    for name, match in [
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("empty.jsonl", "empty.jsonl: there is no question in it"),
        ("notes.txt", "notes.txt: questions are read from .jsonl"),
        (".", "this is a folder"),
    ]:
        with pytest.raises(DataError, match=match):
            read_task(tmp_path / name)
    with pytest.raises(DataError, match="0 items are none"):
        read_task(write(GENERIC), 0)
