"""Links and commands on the pages lead to something."""

import re
import shlex
from urllib.parse import unquote

import pytest
import typer.main

from bitquest.cli.app import COMMANDS, app

GROUP = typer.main.get_command(app)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def _anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_relative_link_resolves(pages):
    broken = []
    for name, page in pages.items():
        for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
            if re.match(r"https?:", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in _anchors(target.read_text(encoding="utf-8"))):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_the_list_of_pages_links_every_page(pages):
    index = pages["docs/README.md"]
    links = _LINK.findall(index.read_text(encoding="utf-8"))
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in links}
    assert [name for name, page in pages.items() if page not in linked | {index}] == []


# --- commands ------------------------------------------------------------------------------------------------------


def _mentions(text: str) -> list[str]:
    """Every command line on a page that begins with bitquest: in blocks and in running text."""
    prose = _FENCED.sub("", text)
    fenced = "\n".join(_FENCED.findall(text)).replace("\\\n", " ")
    blocks = re.findall(r"^\$ (bitquest\b.*)$", fenced, re.MULTILINE)
    return blocks + [code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(r"bitquest( |$)", code)]


def _unknown(line: str) -> str | None:
    """What a command line names that does not exist."""
    words = shlex.split(line.replace("…", " "))[1:]
    if words and words[0] in COMMANDS and words[0] not in GROUP.commands:
        return None  # registered, and not there yet
    command = GROUP
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return words[0]
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    return next((w for w in words if w.startswith("--") and w.partition("=")[0] not in known), None)


def test_every_command_and_option_exists(pages):
    found = [(name, line) for name, page in pages.items() for line in _mentions(page.read_text(encoding="utf-8"))]
    assert len(found) > 50
    assert [(name, line) for name, line in found if _unknown(line)] == []


def _all_options(command) -> set[str]:
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(_all_options(inner) for inner in getattr(command, "commands", {}).values()))


def test_every_option_in_running_text_exists(pages):
    known = _all_options(GROUP) | {"--help"}
    unknown = {
        (name, option)
        for name, page in pages.items()
        for code in re.findall(r"`(--[^`\n]+)`", _FENCED.sub("", page.read_text(encoding="utf-8")))
        for option in re.findall(r"(--[a-z-]+)", code)
        if option not in known
    }
    assert unknown == set()


def test_the_readme_lists_every_command(pages):
    text = pages["README.md"].read_text(encoding="utf-8")
    assert [name for name in GROUP.commands if f"`bitquest {name}" not in text] == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("bitquest trian x.toml", "trian"),
        ("bitquest train x.toml --steps 3", "--steps"),
        ("bitquest data prepare a.txt --out b --vall c", "--vall"),
        ("bitquest bench", None),
        ("bitquest train … --set=a=b", None),
    ],
)
def test_an_unknown_word_is_noticed(line, wrong):
    assert _unknown(line) == wrong
