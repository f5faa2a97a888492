"""Formats at equal loss: each at the size that the scaling law gives it, on random weights of that shape, side by side.

A fast model that is a worse model is no gain: fewer bits need more parameters for the same loss. What is compared here
is therefore models of one loss, by bytes (token table and head included), decoding and prefill.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log
from typing import Any

import torch
from torch import nn

from bitquest.benchmarks.cpu_decode import Generating, PlainTorch, Runner
from bitquest.benchmarks.cpu_random import float_llama, model_bytes, packed_llama
from bitquest.benchmarks.cpu_table import QUICK, Sizes
from bitquest.benchmarks.cpu_timing import copies_past_cache, take_turns, thread_counts, times, torch_threads
from bitquest.errors import ConfigError
from bitquest.evaluation.scaling_fitted import FittedLaw
from bitquest.evaluation.scaling_law import PUBLISHED, efficiency_of, is_extrapolated
from bitquest.models import Llama, LlamaConfig
from bitquest.models.config import swiglu_size
from bitquest.models.fuse import fuse_
from bitquest.nn import Scheme

Say = Callable[[str], None]

BF16 = "bf16"
FORMATS = (BF16, "w8a8", "w4a4", "w4a8", "w2a8", "w2a2", "w1a8", "w1a1")
TABLES = "h8"  # token table and head of every quantized format: 8 bits, weight-only
TOKENS_PER_PARAMETER = 100.0
_ONE = ", one block"
_HEAD_SIZE = 128  # as in the presets, whose widths are also about 128 times their depths
_PROPORTIONS = 0.2  # proportions may be off by five times as much as sizes
_PREFILL_SECONDS = 20.0


def nearest_shape(parameters: float, vocabulary: int, positions: int = 1024) -> LlamaConfig:
    """The Llama in the presets' proportions of about this size, token table and head not counted.

    Widths are 128·n and depths about n; SwiGLU's hidden width, a multiple of 128, makes up for most of the difference.
    """

    def shape(width: int, layers: int, hidden: int) -> LlamaConfig:
        heads = width // _HEAD_SIZE
        return LlamaConfig(vocabulary, width, hidden, layers, heads, heads, positions)

    def distance(config: LlamaConfig) -> float:
        aspect = config.hidden_size / config.num_hidden_layers / _HEAD_SIZE
        hidden = config.intermediate_size / swiglu_size(config.hidden_size)
        size = config.non_embedding_parameters / parameters
        return abs(log(size)) + _PROPORTIONS * (abs(log(aspect)) + abs(log(hidden)))

    candidates = []
    for number in range(1, 257):
        width = number * _HEAD_SIZE
        for layers in {max(1, number + off) for off in (-2, -1, 0, 1)}:
            bare = shape(width, layers, 1).non_embedding_parameters  # with one hidden unit; each has 3·width·layers
            hidden = round((parameters - bare) / (3 * width * layers) / 128) * 128
            candidates.append(shape(width, layers, max(128, hidden)))
    return min(candidates, key=distance)


def measure_equal_loss(
    loss: float,
    threads: Sequence[int],
    repetitions: int,
    quick: bool,
    whole: bool,
    say: Say,
    law: FittedLaw | None = None,
) -> dict[str, Any]:
    """Every format of FORMATS at one loss, at the most threads. whole: measure every block, else a few and scale.

    law: fitted to runs of one's own (formats that it does not know are left out); None: the published one.
    Raises ConfigError for a loss that no size reaches, or that asks for models beyond any shape that is tried.
    """
    number, sizes = thread_counts(threads)[-1], QUICK if quick else Sizes()
    formats = {name: _planned(name, loss, sizes, law) for name in FORMATS if _knows(law, name)}
    if len(formats) < 2:
        raise ConfigError(f"--law: of {', '.join(FORMATS)} it knows {', '.join(formats) or 'none'}; two are compared")
    samplers: dict[str, dict[str, Callable[[], float]]] = {"decode": {}, "prefill": {}}
    for name, row in formats.items():
        say(f"{name}: {row['layers']} blocks of width {row['width']}")
        for label, runner in _runners(name, row, whole).items():
            samplers["decode"][label] = lambda runner=runner: runner.decode(sizes.decoded)  # type: ignore[misc]
            samplers["prefill"][label] = lambda runner=runner: runner.prefill(sizes.prompt)  # type: ignore[misc]
        del row["config"]
    with torch_threads(number):
        for phase, each in samplers.items():
            say(f"{phase}, {number} threads")
            budget = _PREFILL_SECONDS * len(each) if phase == "prefill" else float("inf")
            measured = times(take_turns(each, repetitions, budget=budget))
            tokens = sizes.prompt if phase == "prefill" else 1
            for name, row in formats.items():
                row[phase] = min(_scaled(name, row, measured, tokens), key=lambda made: made["median_seconds"])
    return {
        "quick": quick,
        "loss": loss,
        "tokens_per_parameter": TOKENS_PER_PARAMETER,
        "law": vars(PUBLISHED if law is None else law.law),
        "threads": number,
        "prompt": sizes.prompt,
        "vocabulary": sizes.vocabulary,
        "formats": formats,
        "winners": {
            "fastest decoding": max(formats, key=lambda name: formats[name]["decode"]["tokens_per_second"]),
            "fastest prefill": max(formats, key=lambda name: formats[name]["prefill"]["tokens_per_second"]),
            "fewest bytes": min(formats, key=lambda name: formats[name]["bytes"]),
        },
        "notes": [
            f"Token table and head, which the law leaves out: bf16 in bf16, {TABLES[1:]}-bit weight-only elsewhere.",
            "The law knows no 8-bit activations beside fewer-bit weights: they are taken as unquantized ones.",
            "bf16 is the better one of torch's bfloat16 and float32, with the bytes of bfloat16.",
            "Every block was measured."
            if whole
            else "Where a model has more blocks than were measured, they are scaled up.",
        ],
    }


def _knows(law: FittedLaw | None, name: str) -> bool:
    try:
        return law is None or bool(law.efficiency(name))
    except ConfigError:
        return False


def _planned(name: str, loss: float, sizes: Sizes, fitted: FittedLaw | None = None) -> dict[str, Any]:
    law, (efficiency, source) = PUBLISHED, efficiency_of(name)
    if fitted is not None:
        law, (efficiency, source) = fitted.law, fitted.efficiency(name)
    try:
        parameters = law.size(loss, efficiency, TOKENS_PER_PARAMETER)
    except ConfigError as error:
        raise ConfigError(f"--equal-loss, {name}: {error}") from None
    if parameters > 1e12:
        raise ConfigError(f"--equal-loss {loss:g}: {name} would need {parameters:.2g} parameters; take a higher loss")
    config = nearest_shape(parameters, sizes.vocabulary)
    notes = [] if source == name else [f"taken as {source}"]
    low, high = fitted.range.parameters if fitted is not None else (0.0, 0.0)
    if is_extrapolated(parameters) if fitted is None else not low <= parameters <= high:
        notes.append("beyond the sizes of the fit")
    own = config.non_embedding_parameters
    return {
        "config": config,
        "efficiency": efficiency,
        "efficiency_of": source,
        "parameters_by_law": parameters,
        "parameters": own,
        "loss_of_shape": law.loss(own, own * TOKENS_PER_PARAMETER, efficiency),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "hidden": config.intermediate_size,
        "notes": notes,
    }


def _runners(name: str, row: dict[str, Any], whole: bool) -> dict[str, Runner]:
    """Models of a few blocks, and of the first of them, by label; fills in bytes and how many blocks were made."""
    config: LlamaConfig = row["config"]
    one = config.non_embedding_parameters // config.num_hidden_layers
    bits = 16 if name == BF16 else int(name[1])
    blocks = config.num_hidden_layers if whole else min(config.num_hidden_layers, copies_past_cache(one * bits // 8))
    few = replace(config, num_hidden_layers=blocks)
    found: dict[str, Runner] = {}
    if name == BF16:
        for dtype in (torch.bfloat16, torch.float32):
            model = float_llama(few, dtype)
            if dtype == torch.bfloat16:
                row |= _all_bytes(model, config)
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            found[f"{label}{_ONE}"] = PlainTorch(_first_blocks(model, 1))
            found[label] = PlainTorch(model)
    else:
        model = packed_llama(few, Scheme.parse(f"{name}-{TABLES}"))
        row |= _all_bytes(model, config)
        fuse_(model)
        found[f"{name}{_ONE}"] = Generating(_first_blocks(model, 1))
        found[name] = Generating(model)
    row["blocks_measured"] = blocks
    return found


def _first_blocks(model: Llama, count: int) -> Llama:
    """A model of the first blocks of another, sharing its memory."""
    with torch.device("meta"):
        made = Llama(replace(model.config, num_hidden_layers=1))
    made.model.layers = nn.ModuleList(model.model.layers[:count])
    made.model.embed_tokens, made.model.norm = model.model.embed_tokens, model.model.norm
    made.model.cos, made.model.sin, made.lm_head = model.model.cos, model.model.sin, model.lm_head
    return made.eval()


def _all_bytes(few: Llama, config: LlamaConfig) -> dict[str, int]:
    """Bytes of the whole model from one with fewer blocks."""
    some, none = model_bytes(few), model_bytes(_first_blocks(few, 0))
    blocks, made = config.num_hidden_layers, few.config.num_hidden_layers
    return {name: none[name] + (some[name] - none[name]) // made * blocks for name in some}


def _scaled(name: str, row: dict[str, Any], measured: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """Seconds of the whole model, for each way that a format was measured in.

    What a block adds is the difference between the models of a few blocks and of one, shared among the blocks between.
    """
    found, made_blocks, blocks = [], row["blocks_measured"], row["layers"]
    for label, few in measured.items():
        if label.split()[0] != name or label.endswith(_ONE):
            continue
        made: dict[str, Any] = {"ran_as": label, "repetitions": few["repetitions"]}
        for by in ("median_seconds", "minimum_seconds"):
            added = max(few[by] - measured[label + _ONE][by], 0.0) / max(made_blocks - 1, 1)
            made[by] = few[by] + added * (blocks - made_blocks)
        made["one_block_seconds"] = measured[label + _ONE]["median_seconds"]
        made["tokens_per_second"] = tokens / made["median_seconds"]
        found.append(made)
    return found
