"""Data, optimisation, checkpoints: from a text file to a trained model."""

from bitquest.training.config import TrainConfig, load_config
from bitquest.training.data import open_tokens
from bitquest.training.prepare import prepare
from bitquest.training.runs import LoadedRun, load_run
from bitquest.training.trainer import Display, DivergenceError, RunStart, TrainResult, train

__all__ = [
    "Display",
    "DivergenceError",
    "LoadedRun",
    "RunStart",
    "TrainConfig",
    "TrainResult",
    "load_config",
    "load_run",
    "open_tokens",
    "prepare",
    "train",
]
