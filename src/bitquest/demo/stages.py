"""The whole path: text, tokens, three runs, packed models, proof, measurements, one page.

    DIR/demo.json               which demo this is, written first
        text/  data/            the corpus as .jsonl; tokens
        runs/w1a1/              a run directory each
        packed/w1a1/            a packed model each
        measured/w1a1.json      what was found out about it, written last
        report.html

A stage that is done is not repeated, so a demo that was stopped goes on. Every stage is what a command of its own does;
`commands` lists them.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bitquest.demo.corpus import Corpus, symbols, vocabulary, write_documents
from bitquest.demo.measure import Measured, measure
from bitquest.demo.recipe import SCHEMES, TOKENIZER, Recipe
from bitquest.errors import ConfigError
from bitquest.evaluation.figures import require_matplotlib
from bitquest.evaluation.ngram import byte_trigram_bits_per_byte
from bitquest.evaluation.report import results_table, write_report
from bitquest.evaluation.report_page import Table
from bitquest.evaluation.runs import RunSummary, read_run
from bitquest.evaluation.verify import verify
from bitquest.export import save
from bitquest.files import write_text_atomic
from bitquest.training import load_run, prepare, train
from bitquest.training.runs import check_free, claimed
from bitquest.training.trainer import Display

REPORT = "report.html"
_STAMP, _VERSION = "demo.json", 1
BASELINE = "byte 3-gram"


class Listener(Protocol):
    """Told what happens: a new stage, its progress (done of total), and who listens to a run."""

    def on_stage(self, text: str) -> None: ...
    def on_progress(self, what: str, done: int, total: int) -> None: ...
    def run(self, name: str) -> Display: ...


@dataclass(frozen=True)
class DemoResult:
    """What the demo came to; nothing else is filled in if it was `interrupted`.

    runs: as the report shows them. known_words: by name, the share of the `words` that a model wrote which occur in
    the corpus. trigram_bits_per_byte: what the baseline needs for the same held-out text.
    """

    interrupted: bool = False
    runs: tuple[RunSummary, ...] = ()
    trigram_bits_per_byte: float = 0.0
    known_words: Mapping[str, float] = field(default_factory=dict)
    words: Mapping[str, int] = field(default_factory=dict)
    table: Table | None = None
    report: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures of the table and where the report is, for `--json`."""
        rows = [
            {
                "name": run.name,
                "scheme": run.scheme,
                "steps": run.steps,
                "val_loss": run.val_loss,
                "bits_per_byte": run.bits_per_byte,
                "packed_bytes": dict(run.packed_bytes or {}),
                "tokens_per_second": run.tokens_per_s,
                "verified": run.verified,
                "training_seconds": run.seconds,
                "words": self.words[run.name],
                "known_words": self.known_words[run.name],
                "prompt": run.prompt,
                "sample": run.sample,
            }
            for run in self.runs
        ]
        return {"trigram_bits_per_byte": self.trigram_bits_per_byte, "runs": rows, "report": str(self.report)}


def demo(
    out: str | Path,
    corpus: Corpus,
    listener: Listener,
    *,
    recipe: Recipe | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> DemoResult:
    """Make the demo in the directory `out`, or go on where it stopped.

    Raises ConfigError (another directory, or another demo in it), MissingExtraError (matplotlib), DataError, and what
    training raises. A packed model that fails `verify` does not stop the demo: its row says so.
    """
    out, recipe = Path(out), recipe or Recipe()
    stop = should_stop or (lambda: False)
    require_matplotlib()
    if not (out / _STAMP).is_file():
        check_free(out, _STAMP, "no demo", early="")
    with claimed(out):
        _stamp(out, corpus, recipe)
        _prepare(out, corpus, listener)
        for name, folder, scheme in SCHEMES:
            if stop() or not _train(out, name, folder, scheme, recipe, listener, stop):
                return DemoResult(interrupted=True)
        for name, folder, _ in SCHEMES:
            if stop():
                return DemoResult(interrupted=True)
            _measure(out, name, folder, corpus, listener)
        listener.on_stage("writing the report")
        return _report(out, corpus, recipe)


def _stamp(out: Path, corpus: Corpus, recipe: Recipe) -> None:
    """Note what this demo is made of, or refuse to go on with one that is made of something else."""
    digest = hashlib.sha256()
    for file in corpus.files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    stamp = {
        "bitquest-demo": _VERSION,
        "text": corpus.name,
        "text_sha256": digest.hexdigest(),
        "tokenizer": TOKENIZER,
        "runs": {folder: recipe.config(scheme, Path("data")).to_dict() for _, folder, scheme in SCHEMES},
    }
    path, text = out / _STAMP, json.dumps(stamp, indent=1) + "\n"
    if not path.is_file():
        write_text_atomic(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ConfigError(
            f"{out} holds a demo with another text, other steps, or of another version of bitquest; "
            "remove it, or choose another directory with --out"
        )


def _prepare(out: Path, corpus: Corpus, listener: Listener) -> None:
    if (out / "data" / "manifest.json").is_file():
        return
    listener.on_stage(f"{corpus.name}: {len(corpus.train)} to train on, {len(corpus.held_out)} held out")
    (out / "text").mkdir(exist_ok=True)
    paths = [out / "text" / f"{part}.jsonl" for part in ("train", "val")]
    for files, path in zip((corpus.train, corpus.held_out), paths, strict=True):
        write_documents(files, path)
    prepare([paths[0]], TOKENIZER, out / "data", val_inputs=[paths[1]], progress=listener.on_progress)


def _train(
    out: Path, name: str, folder: str, scheme: str, recipe: Recipe, listener: Listener, stop: Callable[[], bool]
) -> bool:
    """Train one model, or see that it is trained; False if it was interrupted."""
    listener.on_stage(f"training {name}")
    config = recipe.config(scheme, out / "data")
    return train(config, out / "runs" / folder, display=listener.run(name), should_stop=stop).finished


def _measure(out: Path, name: str, folder: str, corpus: Corpus, listener: Listener) -> None:
    """Pack a run, prove that the packed model is the trained one, and measure it; once."""
    path = out / "measured" / f"{folder}.json"
    if path.is_file():
        return
    listener.on_stage(f"packing {name}, verifying, measuring, writing")
    run_dir, packed = out / "runs" / folder, out / "packed" / folder
    run = load_run(run_dir, require_finished=True)
    save(run.model, packed, run.tokenizer, run.metadata, overwrite=True)  # a demo may have been stopped after this
    report = verify(run_dir, packed, progress=listener.on_progress)
    known = vocabulary(corpus.files)
    measured = measure(packed, out / "data", corpus.prompts, known, report.passed, listener.on_progress)
    path.parent.mkdir(exist_ok=True)
    write_text_atomic(path, json.dumps(measured.to_json() | {"verify": report.to_json()}, indent=1) + "\n")


def _report(out: Path, corpus: Corpus, recipe: Recipe) -> DemoResult:
    trigram = byte_trigram_bits_per_byte(symbols(corpus.train), symbols(corpus.held_out))
    runs, known, written = [], {}, {}
    for name, folder, _ in SCHEMES:
        measured = Measured.from_json(json.loads((out / "measured" / f"{folder}.json").read_text(encoding="utf-8")))
        runs.append(read_run(out / "runs" / folder, name=name, **measured.for_report()))
        known[name], written[name] = measured.known_words, measured.words
    last = SCHEMES[-1][0]
    note = (
        f"Validation loss (nats per token) and bits per byte: the packed models on all of the held-out text. A "
        f"{BASELINE} model needs {trigram:.4f} bits per byte. tokens/s: writing, one text at a time. "
        f"Of {written[last]} words that the {last} model wrote, {known[last]:.0%} occur in the corpus."
    )
    table = results_table(runs, note).without("scheme", "tokens/s in training")
    path = write_report(
        out / REPORT,
        "One small Llama at 32, 4 and 1 bits",
        runs,
        summary=f"Trained from scratch on {corpus.name}: {recipe.steps} steps each, same start, same data in the same "
        "order. Then packed, verified against the trained model, and measured as packed.",
        results=table,
        baselines={BASELINE: trigram},
        facts={"text": corpus.credit},
        commands=commands(out, corpus.prompts[0]),
    )
    return DemoResult(False, tuple(runs), trigram, known, written, table, path)


def commands(out: Path, prompt: str) -> list[str]:
    """The commands that do what the demo did, one stage after the other, in a directory that has its text."""

    def line(command: str, *words: Any) -> str:
        return f"bitquest {command} {shlex.join(map(str, words))}"

    text, data = out / "text", out / "data"
    lines = [
        line("data prepare", text / "train.jsonl", "--val", text / "val.jsonl", "--tokenizer", TOKENIZER, "--out", data)
    ]
    for _, folder, _ in SCHEMES:
        run, packed = out / "runs" / folder, out / "packed" / folder
        lines += [
            line("train", run / "config.toml", "--out", run),
            line("export", run, "--out", packed),
            line("verify", run, packed),
            line("eval", packed, "--data", data),
        ]
    return [*lines, line("generate", out / "packed" / SCHEMES[-1][1], "--prompt", prompt)]
