"""A run of a few steps and its packed model, for what compares the two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquest.export import save
from bitquest.training import TrainConfig, load_run, prepare, train


def train_and_pack(folder: Path, scheme: str, **model: Any) -> Path:
    """folder/run and folder/packed, of the text in folder/data; `model` changes the shape. Gives the folder."""
    if not (folder / "data").exists():
        (folder / "text.txt").write_text("the state of the union is strong and the people are one.\n" * 200)
        prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    fields = {
        "scheme": scheme,
        "seed": 1,
        "model": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            **model,
        },
        "data": {"path": str(folder / "data"), "context": 32},
        "optimizer": {"lr": 1e-2},
        "train": {"steps": 12, "batch_size": 4},
        "evaluate": {"every": 0, "batches": 1},
        "checkpoint": {"every": 6, "keep": 3},
    }
    train(TrainConfig.from_dict(fields), folder / "run")
    loaded = load_run(folder / "run")
    save(loaded.model, folder / "packed", loaded.tokenizer, {"step": loaded.step})
    return folder


@pytest.fixture
def trained_run() -> Callable[..., Path]:
    return train_and_pack


@pytest.fixture(scope="session")
def w1a1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_and_pack(tmp_path_factory.mktemp("w1a1"), "w1a1")


@pytest.fixture(scope="session")
def w2a16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_and_pack(tmp_path_factory.mktemp("w2a16"), "w2a16")
