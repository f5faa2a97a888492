"""A prepared folder of real-looking text, and configurations of models that train in milliseconds."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquest.training import TrainConfig, prepare

WORDS = ["the", "of", "and", "to", "a", "in", "that", "is", "for", "it", "as", "was", "with", "be", "by", "on", "not"]


def write_text(path: Path, lines: int = 400) -> Path:
    """Sentences of common words, with one word that takes more bytes than letters."""
    rng = random.Random(0)
    path.write_text("".join(" ".join(rng.choices([*WORDS, "Übung"], k=9)) + ".\n" for _ in range(lines)))
    return path


@pytest.fixture(name="write_text", scope="session")
def write_text_fixture() -> Callable[[Path, int], Path]:
    return write_text


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    prepare([write_text(folder / "text.txt")], "byte", folder / "data", val_fraction=0.1)
    return folder / "data"


@pytest.fixture
def make_config(data_dir: Path) -> Callable[..., TrainConfig]:
    """make_config(scheme=…, train={…}, …): a tiny run, with sections changed key by key."""

    def make(**changes: Any) -> TrainConfig:
        tables: dict[str, Any] = {
            "scheme": "w1a1",
            "seed": 3,
            "model": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            "data": {"path": str(data_dir), "context": 16},
            "optimizer": {"lr": 1e-2},
            "train": {"steps": 12, "batch_size": 4},
            "evaluate": {"every": 5, "batches": 2},
            "checkpoint": {"every": 4, "keep": 3},
            "log": {"every": 3},
        }
        for name, value in changes.items():
            if isinstance(value, dict):
                tables[name] = tables.get(name, {}) | value
            else:
                tables[name] = value
        return TrainConfig.from_dict(tables)

    return make
