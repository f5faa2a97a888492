"""Runs a page of the documentation as its reader would: block after block, in one folder.

    ```console   each line that begins with `$ bitquest` is run; a block that shows an `error:` line must fail with
                 exactly that message, other lines shown must appear in what was printed (numbers may differ, `…` is
                 anything)
    ```python    executed; one namespace for the whole page
    ```toml      written to the file that its first line names, `# name.toml`
    ```sh        for the reader's shell, not run; holds no bitquest command

A comment right before a block changes that: `<!-- not run: reason -->` leaves it out, `<!-- tested with: --set … -->`
adds words to the block's commands, which keeps long ones short.
"""

import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUN, SHOWN = ("console", "python", "toml"), ("sh", "json", "hexdump", "bibtex", "")
_COMMENT = re.compile(r"<!-- (not run|tested with): (.+) -->")
_NUMBER = r"[-+]?[0-9][0-9.,:eE+-]*"


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text, first line's number on the page, and the comment before it."""

    language: str
    text: str
    line: int
    comment: tuple[str, str] | None = None


def read_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order. Raises ValueError for a fence of a language that nobody handles."""
    blocks, inside, comment = [], None, None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None:
            if line == "```":
                language, first, rows, before = inside
                blocks.append(Block(language, "\n".join(rows) + "\n", first, before))
                inside = None
            else:
                inside[2].append(line)
        elif line.startswith("```"):
            language = line[3:]
            if language not in (*RUN, *SHOWN):
                raise ValueError(f"{page}, line {number}: blocks of {language!r} are neither run nor known")
            inside, comment = (language, number + 1, [], comment), None
        elif line.strip():
            found = _COMMENT.fullmatch(line.strip())
            comment = (found[1], found[2]) if found else None
    if inside is not None:
        raise ValueError(f"{page}: the block of line {inside[1]} has no end")
    return blocks


def read_commands(text: str) -> list[tuple[str, list[str]]]:
    """The commands of a console block, each with the output lines that the page shows below it."""
    commands: list[tuple[str, list[str]]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command = command[:-1] + next(lines).strip()
            commands.append((command, []))
        elif commands:
            commands[-1][1].append(line)
        else:
            raise ValueError(f"a console block begins with a command, not with {line!r}")
    return commands


def _squeezed(line: str) -> str:
    """A line without what depends on the terminal's width: the frames of tables, runs of spaces."""
    return re.sub(r"[\u2500-\u259f\s]+", " ", line).strip()


def is_shown(line: str, printed: str) -> bool:
    """Whether a line of the page appears in the output, numbers aside."""
    parts = re.split(rf"({_NUMBER}|…)", _squeezed(line))
    pattern = "".join(".*?" if p == "…" else _NUMBER if n % 2 else re.escape(p) for n, p in enumerate(parts))
    return not _squeezed(line) or any(re.fullmatch(pattern, _squeezed(row)) for row in printed.splitlines())


@pytest.fixture
def run_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """run_page(page, names): run every block in tmp_path; `names` begins the namespace of its Python, which it returns.

    Fails with an AssertionError, or the Python block's own exception, naming the page and the line.
    """
    import bitquest.cli.app as app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def console(block: Block, where: str) -> None:
        for command, shown in read_commands(block.text):
            words = shlex.split(command)
            assert words[0] == "bitquest", f"{where}: only bitquest commands can be run, not {command!r}"
            if block.comment is not None:
                words += shlex.split(block.comment[1])
            errors = [line for line in shown if line.startswith("error:")]
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as caught:
                app.main()
            printed = "".join(capsys.readouterr())
            code = caught.value.code or 0
            assert bool(code) == bool(errors), f"{where}: {command!r} ended with {code}:\n{printed}"
            for line in errors:
                assert line in printed.splitlines(), f"{where}: expected {line!r}, got:\n{printed}"
            for line in shown:
                assert line in errors or is_shown(line, printed), f"{where}: {line!r} is not printed:\n{printed}"

    def toml(block: Block, where: str) -> None:
        tomllib.loads(block.text)
        named = re.match(r"# ([\w-]+\.toml)\n", block.text)
        assert named, f"{where}: the first line of a toml block names its file: # name.toml"
        (tmp_path / named[1]).write_text(block.text, encoding="utf-8")

    def run(page: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
        namespace = {"__name__": "__main__", **(names or {})}
        for block in read_blocks(page):
            where = f"{page.name}, line {block.line}"
            if block.comment is not None and block.comment[0] == "not run":
                continue
            if block.language == "console":
                console(block, where)
            elif block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
            elif block.language == "toml":
                toml(block, where)
            elif block.language == "sh":
                assert not re.search(r"^\s*bitquest\b", block.text, re.MULTILINE), f"{where}: use ```console"
        return namespace

    return run


@pytest.fixture(scope="session")
def pages() -> dict[str, Path]:
    """Every page by its path in the repository."""
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path for path in found}
