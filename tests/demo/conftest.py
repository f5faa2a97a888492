import itertools

import pytest

from bitquest.demo.corpus import Corpus, library
from bitquest.demo.recipe import Recipe
from bitquest.demo.stages import demo


@pytest.fixture(scope="session")
def small_corpus():
    """Two hundred of the library's smaller files."""
    whole = library()
    files = tuple(sorted(file for file in whole.files if 2_000 < file.stat().st_size < 12_000)[:200])
    return Corpus("200 small files", whole.credit, files, whole.prompts)


class Listener:
    """Remembers what it is told."""

    def __init__(self):
        self.stages, self.progress = [], []

    def on_stage(self, text):
        self.stages.append(text)

    def on_progress(self, what, done, total):
        self.progress.append((what, done, total))

    def run(self, name):
        return None


@pytest.fixture(scope="session")
def made(tmp_path_factory, small_corpus):
    """A demo of two steps, stopped in its first run, and then finished: the directory, both results and listeners."""
    out, results, listeners = tmp_path_factory.mktemp("demo") / "demo", [], []
    for stop_at in (2, 10**9):
        asked, listener = itertools.count(1), Listener()
        listeners.append(listener)
        results.append(
            demo(
                out,
                small_corpus,
                listener,
                recipe=Recipe(2),
                should_stop=lambda asked=asked, stop_at=stop_at: next(asked) >= stop_at,
            )
        )
    return out, results, listeners


@pytest.fixture
def listener():
    return Listener()
