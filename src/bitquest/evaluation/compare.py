"""Train one configuration under several schemes and seeds, and report how their losses compare.

    DIR/compare.toml                 what is compared
        runs/w1a1-seed0/             a run directory each, as `bitquest train` writes it; diverged.json if it diverged
        results.json results.csv     the numbers, rewritten after every run
        report.html                  at the end

Runs with the same seed start from the same weights and see the same data in the same order, whatever their scheme.
"""

import hashlib
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from bitquest.errors import ConfigError, UserError
from bitquest.evaluation.compare_plan import PLAN, Comparison, check_same_plan, data_digest
from bitquest.evaluation.compare_results import ComparisonResult, RunResult, results_table, summarize, verdicts_table
from bitquest.evaluation.figures import require_matplotlib
from bitquest.evaluation.report import write_report
from bitquest.evaluation.runs import read_run
from bitquest.export import packed_sizes, save
from bitquest.files import write_text_atomic
from bitquest.models import Llama
from bitquest.nn import Scheme, quantize_
from bitquest.training import DivergenceError, load_run, open_tokens, train
from bitquest.training.runs import check_free, claimed
from bitquest.training.trainer import Display

REPORT, RESULTS, TABLE = "report.html", "results.json", "results.csv"
_DIVERGED = "diverged.json"


class CompareDisplay(Protocol):
    """Listens to a comparison: `run` gives the listener of the run that begins."""

    def on_start(self, plan: Comparison, out: Path) -> None: ...
    def run(self, number: int, scheme: str, seed: int) -> Display: ...
    def on_result(self, result: RunResult) -> None: ...
    def on_end(self) -> None: ...


def compare(
    plan: Comparison,
    out: str | Path,
    *,
    display: CompareDisplay | None = None,
    should_stop: Callable[[], bool] | None = None,
    commands: Sequence[str] = (),
) -> ComparisonResult:
    """Train what is left of a comparison in the directory `out`, and write its results and report.

    Finished runs are not repeated and an interrupted one goes on. A run that diverges is recorded as such and the
    next one begins. Once should_stop() is true the current run is saved and the result is not `finished`.
    commands: what the report says to do to get the same; the plain command unless given.

    Raises, before the first step, ConfigError (a directory of another comparison, a scheme that does not fit the
    model), DataError and MissingExtraError (matplotlib); later only what a run raises besides divergence.
    """
    out = Path(out)
    require_matplotlib()
    _check_fits(plan)
    digest = data_digest(plan.base)
    _check_directory(out, plan, digest)
    results: list[RunResult] = []
    with claimed(out):
        write_text_atomic(out / PLAN, plan.to_toml(digest))
        if display is not None:
            display.on_start(plan, out)
        try:
            for number, (scheme, seed) in enumerate(plan.runs()):
                listener = display.run(number, scheme, seed) if display is not None else None
                result = _run(plan, out, scheme, seed, listener, should_stop)
                if result is None:
                    break
                results.append(result)
                _write_results(out, summarize(plan, results))
                if display is not None:
                    display.on_result(result)
                if should_stop is not None and should_stop():
                    break
        finally:
            if display is not None:
                display.on_end()
        if len(results) < len(plan.runs()):
            return summarize(plan, results)
        result_so_far = summarize(plan, results, _packed(out, results))
        _write_results(out, result_so_far)
        _write_page(out, result_so_far, commands or (f"bitquest compare {shlex.quote(str(out / PLAN))} --out DIR",))
    return result_so_far


def run_folder(scheme: str, seed: int) -> str:
    """A run's place below the comparison's directory; a scheme without a short name goes by a digest."""
    name = re.sub(r"[^a-z0-9.-]", "_", scheme)
    if scheme.startswith("{"):
        name = "scheme-" + hashlib.sha256(scheme.encode()).hexdigest()[:12]
    return f"runs/{name}-seed{seed}"


def _run(
    plan: Comparison, out: Path, scheme: str, seed: int, display: Display | None, should_stop: Callable[[], bool] | None
) -> RunResult | None:
    """Make one run, or read what it came to; None if it was interrupted."""
    folder = run_folder(scheme, seed)
    note = out / folder / _DIVERGED
    if note.is_file():
        return _diverged(out, scheme, seed, json.loads(note.read_text(encoding="utf-8"))["message"])
    try:
        trained = train(plan.config(scheme, seed), out / folder, display=display, should_stop=should_stop)
    except DivergenceError as error:
        write_text_atomic(note, json.dumps({"message": str(error)}) + "\n")
        return _diverged(out, scheme, seed, str(error))
    if not trained.finished:
        return None
    return RunResult(
        scheme, seed, False, trained.step, trained.val_loss, trained.bits_per_byte, trained.seconds, folder
    )  # fmt: skip


def _diverged(out: Path, scheme: str, seed: int, message: str) -> RunResult:
    folder = run_folder(scheme, seed)
    so_far = read_run(out / folder)
    return RunResult(scheme, seed, True, so_far.steps, None, None, so_far.seconds or 0.0, folder, message)


def _check_fits(plan: Comparison) -> None:
    """Raise now, not hours later: DataError for the data, ConfigError for a scheme the model's widths do not allow."""
    tokens = open_tokens(Path(plan.base.data.path), "train")
    open_tokens(Path(plan.base.data.path), "val")
    if plan.base.model.init_from is not None:
        return  # the shape is the checkpoint's, and every scheme meets it when its run begins
    shape = plan.base.model.llama_config(tokens.vocab_size, plan.base.data.context)
    for scheme in plan.schemes:
        with torch.device("meta"):
            model = Llama(shape)
            try:
                quantize_(model, Scheme.parse(scheme))
            except ConfigError as error:
                raise ConfigError(f"scheme {scheme} does not fit the model: {error}") from None


def _check_directory(out: Path, plan: Comparison, digest: str) -> None:
    if (out / PLAN).is_file():
        check_same_plan(out, plan, digest)
    else:
        check_free(out, PLAN, "not a comparison", early="")


def _write_results(out: Path, result: ComparisonResult) -> None:
    write_text_atomic(out / RESULTS, json.dumps(result.to_json(), indent=1) + "\n")
    write_text_atomic(out / TABLE, result.to_csv())


def _packed(out: Path, runs: Sequence[RunResult]) -> dict[str, dict[str, int]]:
    """Packed sizes by scheme, measured on its first good run; a scheme that cannot be packed is left out."""
    sizes: dict[str, dict[str, int]] = {}
    for run in runs:
        if run.scheme not in sizes and not run.diverged:
            with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as folder:
                try:
                    sizes[run.scheme] = packed_sizes(save(load_run(out / run.run).model, Path(folder) / "packed"))
                except UserError:
                    continue
    return sizes


def _write_page(out: Path, result: ComparisonResult, commands: Sequence[str]) -> None:
    plan = result.plan
    packed = {scheme.scheme: scheme.packed_bytes for scheme in result.schemes}
    runs = [
        read_run(out / run.run, name=plan.name(run.scheme), packed_bytes=packed[run.scheme], diverged=run.diverged)
        for scheme in plan.schemes
        for run in result.runs
        if run.scheme == scheme
    ]
    schemes, seeds, steps = len(plan.schemes), len(plan.seeds), plan.base.train.steps
    what = f"{schemes} schemes" if schemes > 1 else f"The scheme {plan.name(plan.schemes[0])}"
    write_report(
        out / REPORT,
        f"Comparison: {out.absolute().name}",
        runs,
        summary=f"{what}, {seeds} seed{'s' * (seeds > 1)}, {steps} steps of {plan.base.train.batch_size} × "
        f"{plan.base.data.context} tokens each. Runs of one seed share initial weights and the order of the data.",
        results=results_table(result),
        tables=[verdicts_table(result)] if result.verdicts else [],
        commands=commands,
    )
