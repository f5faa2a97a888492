"""What the demo trains: one small Llama at three schemes, sized for two cores and ten minutes."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bitquest.training import TrainConfig

TOKENIZER = "bpe:2048"

# name in tables, folder, scheme
SCHEMES = (("unquantized", "none", "none"), ("W4A4", "w4a4", "w4a4"), ("W1A1", "w1a1", "w1a1"))

_BASE = TrainConfig.from_dict(
    {
        # tied: the token table outweighs all 1-bit blocks, and once is enough of it
        "model": {"preset": "1M", "tie_word_embeddings": True},
        "data": {"context": 256},
        "optimizer": {"lr": 4e-3},
        "schedule": {"kind": "cosine", "warmup": 0.1},
        "train": {"steps": 500, "batch_size": 8, "device": "cpu"},
        "evaluate": {"every": 100, "batches": 10},
        "checkpoint": {"every": 100, "keep": 1},
        "log": {"every": 5},
    }
)


@dataclass(frozen=True)
class Recipe:
    """Training steps of each model; everything else is fixed."""

    steps: int = _BASE.train.steps

    def config(self, scheme: str, data: Path) -> TrainConfig:
        """The configuration of one of the runs."""
        return dataclasses.replace(
            _BASE,
            scheme=scheme,
            data=dataclasses.replace(_BASE.data, path=str(data)),
            train=dataclasses.replace(_BASE.train, steps=self.steps),
        )
