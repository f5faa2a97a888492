import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real text, tokenizers and checkpoints; BITQUEST_DATA names it."""
    folder = os.environ.get("BITQUEST_DATA")
    if not folder:
        pytest.skip("BITQUEST_DATA is not set: no real text, tokenizer or checkpoint at hand")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"BITQUEST_DATA names {folder}, which is not a folder")
    return path
