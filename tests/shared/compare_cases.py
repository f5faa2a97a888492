"""What the tests of comparisons train: a tiny model on random words."""

import random
from pathlib import Path

from bitquest.training import prepare

# The beginning of a TOML file: format it with `data`, the folder of tokens.
MODEL_AND_DATA = """
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2

[data]
path = "{data}"
context = 16
"""

THREE_STEPS = """
[train]
steps = 3
batch_size = 2
threads = 1

[evaluate]
every = 0
batches = 2

[log]
every = 1
"""


def prepare_words(folder: Path) -> Path:
    """Tokens of 300 sentences of nine random words, in folder/data."""
    rng = random.Random(0)
    (folder / "text.txt").write_text("".join(" ".join(rng.choices(["one", "two", "six"], k=9)) for _ in range(300)))
    prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    return folder / "data"
