"""The runner of the pages notices a page that is wrong."""

import pytest


@pytest.fixture
def write_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")

    def write(text):
        page = folder / "page.md"
        page.write_text(text.replace("'''", "```"), encoding="utf-8")
        return page

    return write


RIGHT = """
'''toml
# a.toml
scheme = "w1a1"
'''

'''console
$ bitquest train a.toml
error: a.toml: data.path is missing: the folder that `bitquest data prepare` wrote (--set data.path=…)
$ bitquest --version
bitquest 9.9.9
'''

'''python
x = 1
'''

'''python
assert x == 1
'''
"""

WRONG = {
    "another message": ("a.toml: data.path is missing:", "a.toml: data.path is there:"),
    "an error that does not come": ("bitquest 9.9.9", "error: broken"),
    "a failure that is not shown": ("error: a.toml: data.path", "note: a.toml: data.path"),
    "other output": ("bitquest 9.9.9", "bitquest nine"),
    "an unknown option": ("--version", "--vision"),
    "an unknown command": ("bitquest --version", "bitquest nurse"),
    "another program": ("$ bitquest --version", "$ true"),
    "a file without a name": ("# a.toml\n", ""),
    "output before a command": ("$ bitquest train a.toml\n", ""),
    "an unknown language": ("'''toml", "'''tmol"),
    "a block without an end": ("assert x == 1\n'''", "assert x == 1"),
    "a command in a shell block": ("'''console\n$ bitquest train", "'''sh\nbitquest train"),
    "Python that fails": ("x == 1", "x == 2"),
}


def test_a_right_page_passes(write_page, run_page):
    assert run_page(write_page(RIGHT))["x"] == 1


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_page_fails(write_page, run_page, what):
    old, new = WRONG[what]
    assert old in RIGHT
    with pytest.raises((AssertionError, ValueError)):
        run_page(write_page(RIGHT.replace(old, new)))


def test_a_block_can_be_left_out_with_a_reason(write_page, run_page):
    run_page(write_page("<!-- not run: takes a day -->\n'''python\n1 / 0\n'''\n"))
    with pytest.raises(ZeroDivisionError):
        run_page(write_page("<!-- not run -->\n'''python\n1 / 0\n'''\n"))


def test_a_comment_adds_words_to_the_next_block_only(write_page, run_page):
    command = "'''console\n$ bitquest data\nUsage: … data …\n'''\n"
    run_page(write_page(f"<!-- tested with: --help -->\n{command}"))
    with pytest.raises(AssertionError, match="line 7"):  # without words the help is an error of usage
        run_page(write_page(f"<!-- tested with: --help -->\n{command}{command}"))
