"""`verify`: proof that a packed model is the trained one, on the user's own run and text.

Seven checks, each of which can fail by itself: what the files say (description), every weight code and step (weights),
every other tensor bit for bit (tensors), each packed layer on the trained layer's recorded input (layers), the codes of
those inputs (activation codes), greedy texts, and perplexities. All in float32 with autocast off. Where the packed
model says that its embedding and head were rounded after training, the trained model's are rounded in the same way
before anything is compared: the checks stay exact, and the report says what they are about.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitquest.errors import CheckpointError, ConfigError, FormatError
from bitquest.evaluation.perplexity import windows
from bitquest.evaluation.sources import open_stream
from bitquest.evaluation.verify_greedy import check_greedy, prompts_from
from bitquest.evaluation.verify_lockstep import (
    CODE_TOLERANCE,
    INPUT_TOLERANCE,
    OUTPUT_TOLERANCE,
    Flips,
    Lockstep,
    weights_quantized_once,
)
from bitquest.evaluation.verify_report import Check, VerifyReport
from bitquest.evaluation.verify_static import check_description, check_tensors, check_weights, is_comparable
from bitquest.export import load
from bitquest.export.reader import open_packed
from bitquest.models import Llama
from bitquest.nn import TableRounding, round_tables_
from bitquest.training.checkpoint import list_steps
from bitquest.training.runs import load_run

Progress = Callable[[str, int, int], None]

# Perplexities of one text: with equal codes only float rounding is left. Flips change the odd token's loss, either way:
# with them 1 % is allowed, and on fewer than a thousand tokens as much as ten nats shared among them. Where flips are
# many (grouped-query attention, first positions) the windows tell what they may add up to: four standard errors of a
# sum of changes that go either way, for at least so many windows, and at most 10 %.
PERPLEXITY_TOLERANCE = 1e-5
FLIPPED_PERPLEXITY_TOLERANCE = 1e-2
_FLIPPED_NATS = 10.0
_STANDARD_ERRORS, _FEWEST_WINDOWS, _LARGEST_TOLERANCE = 4.0, 32, 0.1
_TOKENS_AT_ONCE = 512
_DYNAMIC = ("layers", "activation codes", "greedy tokens", "perplexity")


def verify(
    run_dir: str | Path,
    packed_dir: str | Path,
    data: str | Path | None = None,
    *,
    step: int | None = None,
    tokens: int = 2048,
    texts: int = 3,
    new_tokens: int = 32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare a packed model with the checkpoint it came from; see the checks of the report.

    data: text or prepared data that was not trained on, default the run's validation split. step: the checkpoint,
    default the one the packed model names. tokens: how many to run both models on. texts, new_tokens: greedy texts.
    progress(what, done, total). Raises CheckpointError, FormatError and DataError where there is nothing to compare.
    """
    run_dir, packed_dir = Path(run_dir), Path(packed_dir)
    if tokens < 1 or texts < 1 or new_tokens < 1:
        raise ConfigError("verify needs at least one token, one text and one new token")
    report = progress or (lambda what, done, total: None)
    report("reading the packed model", 0, 1)
    with open_packed(packed_dir) as opened:
        tokenizer, named = opened.tokenizer(), opened.metadata.get("step")
        rounding = _rounding(opened.metadata, packed_dir)
    packed = load(packed_dir, device=device, backend=backend)
    if not isinstance(packed, Llama):
        raise FormatError(f"{packed_dir} holds no Llama, and a run trains one: it is not of this run")
    if step is None and isinstance(named, int):
        step = _packed_step(run_dir, packed_dir, named)
    report("reading the checkpoint", 0, 1)
    run = load_run(run_dir, step)
    rounded = [] if rounding is None else _round_like(run.model, rounding, run_dir, packed_dir)
    trained = run.model.to(device)
    source = Path(data) if data is not None else Path(run.config.data.path)
    if data is None and not source.exists():
        raise CheckpointError(f"{source}, the data of {run_dir}, is gone; name held-out text with --data")
    stream = open_stream(source, run.tokenizer, tokens).tokens.to(device)
    checks = [
        check_description(trained, packed, run.tokenizer, tokenizer, rounded),
        check_weights(trained, packed),
        check_tensors(trained, packed),
    ]
    if not is_comparable(trained, packed):
        checks += [Check.not_run(name) for name in _DYNAMIC]
        return VerifyReport(str(run_dir), str(packed_dir), run.step, tuple(checks), rounding)
    with _plain_float32(torch.device(device)), weights_quantized_once(trained):
        lockstep = Lockstep(trained, packed)
        nats = _run(lockstep, stream, report)
        prompts = prompts_from(stream, texts, trained.config.max_position_embeddings)
        greedy = check_greedy(trained, packed, prompts, new_tokens, report)
        perplexity = _check_perplexity(lockstep, stream.numel() - 1, nats)
    checks += [_check_layers(lockstep), _check_codes(lockstep), greedy, perplexity]
    return VerifyReport(str(run_dir), str(packed_dir), run.step, tuple(checks), rounding)


def _packed_step(run_dir: Path, packed_dir: Path, named: int) -> int:
    """The step that the packed model names. Raises CheckpointError if the run has it no longer, or never had."""
    steps = list_steps(run_dir)
    if steps and named not in steps:
        raise CheckpointError(
            f"{packed_dir} was packed from step {named}, and {run_dir} has checkpoints of {', '.join(map(str, steps))} "
            "only: pack one of them again with bitquest export, or name the run that it came from"
        )
    return named


def _rounding(metadata: dict[str, Any], packed_dir: Path) -> TableRounding | None:
    """How the tables were rounded after training, None if they were not. Raises FormatError for what makes no sense."""
    if metadata.get("tables") is None:
        return None
    try:
        return TableRounding.from_json(metadata["tables"])
    except ConfigError as error:
        raise FormatError(f"{packed_dir}: its metadata: {error}. Export the run again") from None


def _round_like(model: Llama, rounding: TableRounding, run_dir: Path, packed_dir: Path) -> list[str]:
    """Round a trained model's tables as the packed one's were; their names. FormatError if they cannot have been."""
    try:
        return list(round_tables_(model, rounding))
    except ConfigError as error:
        raise FormatError(
            f"{packed_dir} says that its tables were rounded after training to {rounding.bits} bits, "
            f"which the model of {run_dir} cannot be: {error}. Name the run that it came from"
        ) from None


@contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32 inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _run(lockstep: Lockstep, stream: Tensor, report: Progress) -> Tensor:
    """Run the stream (1 + n,) through both models; float64 nats (3, windows) of the trained, forced and free passes."""
    context = lockstep.trained.config.max_position_embeddings
    total, done, nats = stream.numel() - 1, 0, list[Tensor]()
    for window_BT1 in windows(stream, context, max(1, _TOKENS_AT_ONCE // context)):
        target_BT = window_BT1[:, 1:]
        losses = [
            F.cross_entropy(logits_BTV.double().flatten(0, 1), target_BT.flatten(), reduction="none")
            for logits_BTV in lockstep.run(window_BT1[:, :-1])
        ]
        nats.append(torch.stack(losses).reshape(3, *target_BT.shape).sum(-1).cpu())
        done += target_BT.numel()
        report("running both models", done, total)
    return torch.cat(nats, 1)


def _check_layers(lockstep: Lockstep) -> Check:
    """Each packed layer on recorded input, and what it gets from the layers before it."""
    failures = [
        f"{name}: {what} off by {gap.relative:.2e} relative, {limit:g} is allowed"
        for name, figures in lockstep.layers.items()
        for what, gap, limit in (
            ("what arrives here from the layers before is", figures.input, INPUT_TOLERANCE),
            ("its output for the trained layer's input is", figures.output, OUTPUT_TOLERANCE),
        )
        if not gap.relative <= limit
    ]
    if not lockstep.logits.relative <= OUTPUT_TOLERANCE:
        failures.append(f"logits: off by {lockstep.logits.relative:.2e} relative, {OUTPUT_TOLERANCE:g} is allowed")
    worst = max((figures.output.relative for figures in lockstep.layers.values()), default=0.0)
    found = {
        "largest_error": worst,
        "logits_error": lockstep.logits.relative,
        "by_layer": {name: figures.output.relative for name, figures in lockstep.layers.items()},
    }
    summary = f"{len(lockstep.layers)} layers, largest error {worst:.1e}; logits {lockstep.logits.relative:.1e}"
    return Check.of("layers", summary, failures, found)


def _check_codes(lockstep: Lockstep) -> Check:
    """Activation codes of recorded inputs, and how many rounding would flip."""
    failures: list[str] = []
    same, rounding = Flips(), Flips()
    for name, figures in lockstep.layers.items():
        if not figures.compared:
            failures.append(f"{name}: the two layers quantize or rotate their input differently")
        if figures.flips.farthest > CODE_TOLERANCE:
            failures.append(
                f"{name}: a code differs {figures.flips.farthest:.2e}·Δ from its threshold, "
                f"{CODE_TOLERANCE:g} is allowed ({figures.flips.flipped} of {figures.flips.codes} differ)"
            )
        if not figures.step.relative <= OUTPUT_TOLERANCE:
            failures.append(f"{name}: activation steps are off by {figures.step.relative:.2e} relative")
        for total, one in ((same, figures.flips), (rounding, figures.rounding)):
            total.codes, total.flipped = total.codes + one.codes, total.flipped + one.flipped
            total.farthest = max(total.farthest, one.farthest)
    summary = f"{same.flipped} of {same.codes} differ; rounding in the layers before would flip {rounding.flipped}"
    if rounding.flipped:
        summary += f", at most {rounding.farthest:.0e}·Δ from a threshold"
    found = {
        "codes": same.codes,
        "flipped": same.flipped,
        "farthest": same.farthest,
        "rounding_flipped": rounding.flipped,
        "rounding_farthest": rounding.farthest,
    }
    return Check.of("activation codes", summary, failures, found)


def _flipped_tolerance(changes: Tensor, tokens: int) -> float:
    """How far perplexities may part, relatively, where codes flip; changes: each window's nats, free − trained."""
    limit = max(FLIPPED_PERPLEXITY_TOLERANCE, _FLIPPED_NATS / tokens)
    if changes.numel() >= _FEWEST_WINDOWS:
        error = float(changes.square().sum().sqrt()) / tokens
        limit = max(limit, min(_STANDARD_ERRORS * error, _LARGEST_TOLERANCE))
    return limit


def _check_perplexity(lockstep: Lockstep, tokens: int, nats: Tensor) -> Check:
    """Perplexities side by side, from what `_run` returned; without flips they agree to rounding."""
    trained, forced, free = (nats.sum(1) / tokens).tolist()
    flipped = sum(figures.free for figures in lockstep.layers.values())
    limit = _flipped_tolerance(nats[2] - nats[0], tokens) if flipped else PERPLEXITY_TOLERANCE
    failures: list[str] = []
    for what, loss, allowed in (
        ("with the trained codes forced", forced, PERPLEXITY_TOLERANCE),
        ("as it runs", free, limit),
    ):
        if not abs(_relative(loss, trained)) <= allowed:
            failures.append(
                f"perplexity of the packed model {what} is {_exp(loss):.6f}, of the trained one {_exp(trained):.6f}: "
                f"off by {abs(_relative(loss, trained)):.2e} relative, {allowed:.2g} is allowed"
            )
    summary = (
        f"trained {_exp(trained):.6f}, packed {_exp(free):.6f}, relative difference {_relative(free, trained):+.1e}"
    )
    if flipped:
        summary += f" ({flipped} codes flipped on the way; without flips {_relative(forced, trained):+.0e})"
    figures = {
        "trained": _exp(trained),
        "packed": _exp(free),
        "forced": _exp(forced),
        "relative_difference": _relative(free, trained),
        "free_flipped": flipped,
    }
    return Check.of("perplexity", summary, failures, figures)


def _exp(loss: float) -> float:
    return math.inf if loss > 709 else math.exp(loss)


def _relative(loss: float, trained: float) -> float:
    """Relative difference of two perplexities, from their losses."""
    return math.inf if loss - trained > 709 else math.expm1(loss - trained)
