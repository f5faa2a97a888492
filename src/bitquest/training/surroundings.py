"""What a run needs around it: absolute paths, threads, generators, enough data, and what changed since it stopped."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bitquest.errors import DataError
from bitquest.files import sha256
from bitquest.training.config import TrainConfig
from bitquest.training.data import Tokens
from bitquest.training.step import choose_device

_CPU_RNG, _CUDA_RNG = "rng.cpu", "rng.cuda"


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Paths that mean the same from every folder, as config.toml records them."""
    data = dataclasses.replace(config.data, path=str(Path(config.data.path).expanduser().absolute()))
    model = config.model
    if model.init_from is not None:
        model = dataclasses.replace(model, init_from=str(Path(model.init_from).expanduser().absolute()))
    recipe = config.recipe
    if recipe.teacher:
        recipe = dataclasses.replace(recipe, teacher=str(Path(recipe.teacher).expanduser().absolute()))
    return dataclasses.replace(config, data=data, model=model, recipe=recipe)


@contextmanager
def surroundings(config: TrainConfig) -> Iterator[None]:
    """Thread count, random generators and, on a GPU, deterministic kernels; the caller's are put back afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    device = choose_device(config.train.device)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # a kernel without a deterministic form warns
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # kernels write it all
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


def check_length(tokens: Tokens, split: str, config: TrainConfig) -> None:
    needed = config.data.context + 1
    if tokens.count < needed:
        raise DataError(
            f"{config.data.path}: the {split} split has {tokens.count} tokens, and one sequence needs {needed} "
            f"(data.context + 1): lower data.context = {config.data.context}, or prepare more text"
        )


def data_digest(config: TrainConfig) -> str:
    return sha256(Path(config.data.path) / "manifest.json")


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the random generators, as checkpoints keep them."""
    states = {_CPU_RNG: torch.get_rng_state()}
    if device.type == "cuda":
        states[_CUDA_RNG] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(saved: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(saved[_CPU_RNG])
    if device.type == "cuda" and _CUDA_RNG in saved:
        torch.cuda.set_rng_state(saved[_CUDA_RNG], device)


def changes(before: dict[str, Any], now: dict[str, Any]) -> tuple[str, ...]:
    """A notice for each thing that keeps a resumption from being bit-identical."""
    return tuple(
        f"{name} was {before[name]} and is {now[name]}: the run goes on, but not bit for bit as it would have"
        for name in now
        if name in before and before[name] != now[name]
    )
