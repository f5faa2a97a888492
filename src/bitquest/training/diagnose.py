"""Looks at a run while it trains: every so many steps one look (look.py), and what has changed since the last.

    persistent   share of the elements masked at the last look that still are; of a weight, and of an input on the same
                 held-out tokens
    drift        mean of log2(Δ/Δ_start) over the rows (or groups) of an operand, Δ_start at the first look; spread is
                 its standard deviation. An input's Δ is that of the same tokens
    flipped      share of a weight's codes that differ from those at the last look; an element that N:M sparsity picks
                 up or drops counts
    returned     share of its codes that changed against the direction of their last change: oscillation as Nagel et
                 al. count it (arXiv 2203.11086, section 4), with looks for iterations. At one bit every second flip of
                 an element returns

A look is outside the timed steps and leaves training as it was, bit for bit. What the next one needs goes into each
checkpoint, packed: b bits of code, two of direction and one of mask for every quantized weight (one more if sparse), a
bit of mask for every element of the inputs, and the first steps. So a run that was stopped continues its series as if
it had not been; one whose checkpoint holds none (`diagnose.every` was 0) begins a series with its first look.
"""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitquest.models import Llama
from bitquest.numerics.packing import pack, unpack
from bitquest.ops.engine import bits_to_mask, mask_bits
from bitquest.training.checkpoint import Checkpoint
from bitquest.training.config import TrainConfig
from bitquest.training.data import Tokens
from bitquest.training.diagnostics import StepClock
from bitquest.training.loggers import Record
from bitquest.training.look import Look, OperandLook, look_at
from bitquest.training.step import autocast

PREFIX = "diagnose."  # of the names of its tensors in a checkpoint


class Codes(NamedTuple):
    """A weight's codes as numbers that order as its values do, and which way each moved last; int16 and int8 (N, K)."""

    rank: Tensor  # 2c + 1, odd, and 0 where N:M sparsity dropped the element
    direction: Tensor  # +1 up, −1 down, 0 never


def ranked(codes: Tensor, kept: Tensor | None) -> Tensor:
    """Ranks (int16) of int8 codes; see `Codes`."""
    rank = codes.to(torch.int16).mul_(2).add_(1)
    return rank if kept is None else rank.mul_(kept)


def turned(before: Codes, rank: Tensor) -> tuple[float, float, Tensor]:
    """(flipped, returned, new directions) of a weight whose ranks were `before.rank`."""
    moved = (rank - before.rank).sign_().to(torch.int8)
    flipped = moved != 0
    returned = moved * before.direction < 0
    size = max(1, rank.numel())
    return float(flipped.sum()) / size, float(returned.sum()) / size, torch.where(flipped, moved, before.direction)


def persistent_share(before: Tensor, mask: Tensor) -> float | None:
    """Of the elements masked before (bool) the share that still is; None if there were none."""
    count = float(before.sum())
    return float((before & mask).sum()) / count if count else None


class Diagnosis:
    """The looks of one run; `tensors` is what a checkpoint keeps of them."""

    def __init__(
        self, config: TrainConfig, model: Llama, held_out: Tokens, precision: str, checkpoint: Checkpoint | None
    ) -> None:
        self.section, self.steps, self.model = config.diagnose, config.train.steps, model
        self._held_out, self._context, self._precision = held_out, config.data.context, precision
        self._device = next(model.parameters()).device
        self._windows_BT1: Tensor | None = None
        self._kept: dict[str, Tensor] = {}
        if checkpoint is not None and self.section.every:
            mine = {name: t for name, t in checkpoint.optimizer.items() if name.startswith(PREFIX)}
            self._kept = {name.removeprefix(PREFIX): tensor.to(self._device) for name, tensor in mine.items()}

    def look_if_due(self, step: int, clock: StepClock) -> Record | None:
        """The record of a look after `step` steps, outside the clock's time: at 0, every so many and after the last."""
        if not self.section.every or (step % self.section.every and step != self.steps):
            return None
        with clock.paused():
            return self.look(step)

    def tensors(self) -> dict[str, Tensor]:
        """What the next look compares itself with, by names that no parameter has."""
        return {PREFIX + name: tensor for name, tensor in self._kept.items()}

    def look(self, step: int) -> Record:
        """The record of metrics.jsonl for this step; see docs/howto/diagnose.md."""
        began = time.perf_counter()
        if self._windows_BT1 is None:
            batch_BT1 = next(iter(self._held_out.windows(self._context, self.section.sequences)))
            self._windows_BT1 = batch_BT1.to(self._device)
        look = look_at(self.model, self._windows_BT1, lambda: autocast(self._device, self._precision))
        record: Record = {"kind": "diagnose", "step": step, **self._steps(step), **look_fields(look)}
        for part, operands in (("weights", look.weights), ("inputs", look.inputs)):
            for name, operand in operands.items():
                record[part][name] |= self._changes(f"{part}.{name}", operand)
        return plain({**record, **summary(record), "seconds": time.perf_counter() - began})

    def _steps(self, step: int) -> dict[str, int | None]:
        """The step of the first look, and of the last before this one."""
        first, last = self._kept["steps"].tolist() if "steps" in self._kept else (step, None)
        self._kept["steps"] = torch.tensor([first, step])
        return {"first": first, "previous": last}

    def _changes(self, name: str, operand: OperandLook) -> dict[str, float | None]:
        """What has changed about an operand; what the next look needs of it replaces what this one needed."""
        log_start = self._get(f"{name}.log_step", operand.log_step)
        if log_start is None:
            log_start = self._kept[f"{name}.log_step"] = operand.log_step.clone()
        drift = (operand.log_step - log_start).double() / math.log(2)
        fields: dict[str, float | None] = {
            "drift": float(drift.mean()),
            "spread": float(drift.std(correction=0)),
            "persistent": None,
        }
        bits = mask_bits(operand.mask)
        before = self._get(f"{name}.mask", bits)
        if before is not None:
            fields["persistent"] = persistent_share(bits_to_mask(before, operand.mask.shape[-1]), operand.mask)
        self._kept[f"{name}.mask"] = bits
        return fields | (self._turns(name, operand) if operand.encoded is not None else {})

    def _turns(self, name: str, operand: OperandLook) -> dict[str, float | None]:
        assert operand.encoded is not None
        codes, kept = operand.encoded.codes, operand.encoded.kept
        rank, width, bits = ranked(codes, kept), codes.shape[-1], operand.bits
        flipped = returned = None
        direction = torch.zeros_like(codes)
        packed = pack(codes, bits, trusted=True)
        before = self._get(f"{name}.codes", packed)
        if before is not None:
            old_kept = None if kept is None else bits_to_mask(self._kept[f"{name}.kept"], width)
            old_rank = ranked(unpack(before, bits, width, trusted=True), old_kept)
            ups, downs = (bits_to_mask(self._kept[f"{name}.{way}"], width).to(torch.int8) for way in ("up", "down"))
            flipped, returned, direction = turned(Codes(old_rank, ups - downs), rank)
        self._kept[f"{name}.codes"] = packed
        self._kept[f"{name}.up"], self._kept[f"{name}.down"] = mask_bits(direction > 0), mask_bits(direction < 0)
        if kept is not None:
            self._kept[f"{name}.kept"] = mask_bits(kept)
        return {"flipped": flipped, "returned": returned}

    def _get(self, name: str, like: Tensor) -> Tensor | None:
        """What was kept, unless it is of other tokens or another model than this look's."""
        kept = self._kept.get(name)
        return kept if kept is not None and kept.shape == like.shape else None


# --- records ---------------------------------------------------------------------------------------------------------

_FIGURES = ("elements", "masked", "expected_masked", "error", "excess", "kurtosis", "step")


def look_fields(look: Look) -> dict[str, Any]:
    """A look as JSON: blocks from the bottom up, weights and inputs by layer."""
    weights = {name: {"alignment": value} for name, value in look.alignments.items()}
    for name, operand in look.weights.items():
        weights[name] = weights.get(name, {}) | _figures(operand)
    return {
        "loss": look.loss,
        "unquantized_loss": look.unquantized_loss,
        "blocks": [{"output": block.output, "weights": block.weights} for block in look.blocks],
        "weights": weights,
        "inputs": {name: _figures(operand) for name, operand in look.inputs.items()},
    }


def _figures(operand: OperandLook) -> dict[str, Any]:
    return {name: getattr(operand, name) for name in _FIGURES}


def summary(record: Mapping[str, Any]) -> dict[str, float | None]:
    """A few numbers of a whole look: cosines at the ends of the model, means over elements of weights and of inputs."""
    blocks = record["blocks"]
    made = {
        "alignment_top": blocks[-1]["output"],
        "alignment_bottom": blocks[0]["output"],
        "alignment_weights": _mean(blocks, "weights"),
    }
    for part in ("weights", "inputs"):
        for figure in ("masked", "persistent", "excess", "drift"):
            made[f"{figure}_{part}"] = _mean(record[part].values(), figure)
    return made | {figure: _mean(record["weights"].values(), figure) for figure in ("flipped", "returned")}


def _mean(entries: Any, figure: str) -> float | None:
    """Over the entries that have the figure, weighted by their elements."""
    pairs = [(e[figure], e.get("elements", 1)) for e in entries if e.get(figure) is not None]
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs) if pairs else None


def plain(record: Record) -> Record:
    """The same with floats of six digits, of which a record has hundreds, and None for what is not finite."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [short(inner) for inner in value]
        if isinstance(value, float):
            return float(f"{value:.6g}") if math.isfinite(value) else None
        return value

    return {key: short(value) for key, value in record.items()}
