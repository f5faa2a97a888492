"""A command called in this process, and a run to call it on."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquest.training import TrainConfig, prepare, train


@pytest.fixture
def bitquest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """bitquest(word, …, code=0): the JSON object of stdout (None without), and what was said on stderr."""
    import bitquest.cli.app as app

    def call(*words: object, code: int = 0) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["bitquest", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            app.main()
        captured = capsys.readouterr()
        assert caught.value.code == code, captured.err
        assert "Traceback" not in captured.err
        return json.loads(captured.out) if captured.out else None, captured.err

    return call


def train_small(folder: Path, scheme: str, steps: int = 8, stop_after: int | None = None) -> Path:
    """A run of a few steps in folder/run, of the text in folder/text.txt; stopped early if asked."""
    if not (folder / "data").exists():
        (folder / "text.txt").write_text("one and two and three are six.\n" * 200)
        prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    fields = {
        "scheme": scheme,
        "model": {**shape, "num_attention_heads": 2, "num_key_value_heads": 2},
        "data": {"path": str(folder / "data"), "context": 32},
        "train": {"steps": steps, "batch_size": 2},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 4},
    }
    calls = iter(range(10**9))
    stop = None if stop_after is None else (lambda: next(calls) >= stop_after)
    train(TrainConfig.from_dict(fields), folder / "run", should_stop=stop)
    return folder / "run"


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished W1A1 run, its data beside it."""
    return train_small(tmp_path_factory.mktemp("run"), "w1a1")


@pytest.fixture(scope="session")
def unfinished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped on the way."""
    return train_small(tmp_path_factory.mktemp("unfinished"), "w4a4", steps=50, stop_after=5)


@pytest.fixture
def small_run() -> Callable[..., Path]:
    """small_run(folder, scheme): folder/run, of the text in folder/text.txt."""
    return train_small
