"""docs/api.md lists every public name, and what it says of each is so."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import bitquest as bq

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
# Rooms all of whose names are on the page; of the others it lists some.
WHOLE = ("bitquest", "bitquest.training", "bitquest.export", "bitquest.inference", "bitquest.models")


def _entries() -> list[tuple[str, str, str, str]]:
    """(module, section, name, arguments or '') of everything that an entry begins with."""
    found, module, section = [], "", ""
    for line in PAGE.splitlines():
        if line.startswith("## "):
            module = line[3:]
        elif line.startswith("### "):
            section = line[4:]
        elif line.startswith("- "):
            head = re.match(r"- (`[^`]+`(?:, `[^`]+`)*):", line)
            assert head, f"an entry begins with `name` or `name(arguments)`, then a colon: {line}"
            for code in re.findall(r"`([^`]+)`", head[1]):
                name, _, arguments = code.partition("(")
                found.append((module, section, name, f"({arguments}" if arguments else ""))
    return found


ENTRIES = _entries()
IDS = [f"{module}.{name}" for module, _, name, _ in ENTRIES]


def _resolve(module: str, name: str) -> Any:
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _parameters(function: Any) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]


@pytest.mark.parametrize(("module", "section", "name", "arguments"), ENTRIES, ids=IDS)
def test_an_entry_has_the_real_signature(module, section, name, arguments):
    value = _resolve(module, name)
    if arguments:
        written = eval(f"lambda {arguments[1:-1]}: 0", {n: getattr(bq, n) for n in bq.__all__})  # noqa: S307
        assert _parameters(value) == _parameters(written)


@pytest.mark.parametrize("module", WHOLE)
def test_every_public_name_has_an_entry(module):
    listed = {name.partition(".")[0] for where, _, name, _ in ENTRIES if where == module}
    assert set(importlib.import_module(module).__all__) - listed == set()


def test_every_error_has_an_entry():
    import bitquest.errors

    errors = {name for name, value in vars(bitquest.errors).items() if inspect.isclass(value)}
    assert errors == {name for where, _, name, _ in ENTRIES if where == "bitquest.errors"}


@pytest.mark.parametrize(("module", "section", "name", "arguments"), ENTRIES, ids=IDS)
def test_an_entry_is_in_the_files_its_section_names(module, section, name, arguments):
    owner = _resolve(module, name.partition(".")[0])
    if not (inspect.isclass(owner) or inspect.isfunction(owner)):
        return  # a constant knows no file
    text = PAGE.partition(f"\n## {module}\n")[2].partition(f"### {section}\n")[2]
    sources = re.findall(r"\(\.\./(src/[^)]+)\)", text.partition("\n- ")[0])
    file = inspect.getsourcefile(inspect.unwrap(owner))
    assert file is not None
    assert Path(file).relative_to(ROOT).as_posix() in sources
