"""Fine-tune a Llama of Hugging Face at low bits on a text of your own, and compare what each scheme reaches.

python examples/finetune_stories15m.py --model stories15M --data text.jsonl --schemes none,w4a4,w1a1 --out tuned

Every scheme starts from the same weights and sees the same text in the same order; "none" is the unquantized yardstick.
The losses before are those of the given weights, quantized but not trained; those after are of the packed model, loaded
from the disk. Stopped in between, the same command goes on.

OUT/data         the text in the model's own tokens, part of it held out
OUT/runs/SCHEME  a training run          OUT/packed/SCHEME  its packed model          OUT/results.json  the table
"""

import argparse
import json
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bitquest as bq
from bitquest.benchmarks.results import write_result
from bitquest.errors import ConfigError
from bitquest.evaluation.perplexity import Perplexity, evaluate_tokens
from bitquest.evaluation.sources import open_stream
from bitquest.export import packed_sizes
from bitquest.inference import SamplingOptions, TextEngine
from bitquest.models import Tokenizer, load_hf
from bitquest.training import TrainConfig, load_run, prepare, train
from bitquest.training.display import make_display
from bitquest.training.interrupt import StopRequest, stop_on_signals

console = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """One line of the table: losses in nats per held-out token, sizes in bytes."""

    scheme: str
    loss_before: float
    loss_after: float
    bits_per_byte: float
    packed_bytes: int
    blocks_bytes: int
    training_seconds: float
    sample: str


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="Llama folder of Hugging Face, tokenizer included")
    parser.add_argument(
        "--data", type=Path, required=True, help=".txt or .jsonl (also compressed), or a folder of them"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--schemes", default="none,w4a4,w1a1", help="with commas between (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each scheme (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, help="tokens of a sequence (default: the model's positions, at most 256)"
    )
    # 1e-4, 3e-4, 1e-3 and 3e-3 were tried for 60 steps: 3e-4 was best for each scheme (see README.md beside this file)
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bf16, in training (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=16384, help="tokens of each measurement (default: %(default)s)")
    parser.add_argument("--prompt", default="The city of", help="each model goes on from here (default: %(default)s)")
    return parser.parse_args(argv)


def scheme_names(text: str) -> list[str]:
    """The schemes of the command line in the form the library gives them, each once, checked before any work."""
    names = [str(bq.Scheme.parse(name.strip())) for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError("--schemes names no scheme; for example: --schemes none,w4a4,w1a1")
    return list(dict.fromkeys(names))


def check_prompt(tokenizer: Tokenizer, prompt: str, positions: int) -> None:
    """Before any work: a prompt that is too long would be refused only once a model is trained."""
    count = len(tokenizer.encode(prompt)) + 1  # and the token that begins a text
    if count > positions:
        raise ConfigError(f"--prompt has {count} tokens and the model {positions} positions: shorten it")


def prepared_data(args: argparse.Namespace) -> Path:
    """OUT/data, made if it is not there. Refuses a folder that was made from another text or model."""
    data, note = args.out / "data", args.out / "sources.json"
    sources = json.dumps({"model": str(args.model.absolute()), "data": str(args.data.absolute())}) + "\n"
    if note.is_file():
        if note.read_text(encoding="utf-8") != sources:
            raise ConfigError(
                f"{args.out} was begun with the --model and --data in {note}: give those, or another --out"
            )
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"{args.out} exists and was not made by this program; choose another --out")
    if (data / "manifest.json").is_file():
        return data
    args.out.mkdir(parents=True, exist_ok=True)
    note.write_text(sources, encoding="utf-8")
    try:
        return prepare([args.data], str(args.model), data, val_fraction=0.02)
    except BaseException:
        note.unlink()
        with suppress(OSError):  # as it was, so that the command can be corrected and given again
            args.out.rmdir()
        raise


def train_config(args: argparse.Namespace, scheme: str, context: int) -> TrainConfig:
    tables: dict[str, Any] = {
        "scheme": scheme,
        "model": {"init_from": str(args.model)},
        "data": {"path": str(args.out / "data"), "context": context},
        "optimizer": {"lr": args.lr, "weight_decay": 0.0},
        "train": {"steps": args.steps, "batch_size": args.batch_size, "precision": args.precision},
        "evaluate": {"every": 0, "batches": 1},  # a glance; the table's losses are of --held-out tokens
        "checkpoint": {"every": 50, "keep": 1},
    }
    return TrainConfig.from_dict(tables)


def continuation(engine: TextEngine, prompt: str) -> str:
    """What the model writes after the prompt if it always takes the likeliest token."""
    return prompt + "".join(engine.write(prompt, 24, SamplingOptions(temperature=0)))


def show(rows: list[Row], tokens: int) -> None:
    table = Table(title=f"nats per token of {tokens:,} held-out tokens")
    for heading in ("scheme", "loss before", "loss after", "bits/byte", "packed MB", "of it blocks", "training s"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for row in rows:
        sizes = (f"{row.packed_bytes / 1e6:.2f}", f"{row.blocks_bytes / 1e6:.2f}")
        losses = (f"{row.loss_before:.3f}", f"{row.loss_after:.3f}", f"{row.bits_per_byte:.3f}")
        table.add_row(row.scheme, *losses, *sizes, f"{row.training_seconds:.0f}")
    out = Console()
    out.print(table)
    for row in rows:
        out.print(f"[bold]{row.scheme}[/]: {escape(row.sample)}", highlight=False, soft_wrap=True)


def run(args: argparse.Namespace, stop: StopRequest) -> int:
    schemes = scheme_names(args.schemes)
    model, tokenizer = load_hf(args.model), Tokenizer.from_file(args.model)
    positions = model.config.max_position_embeddings
    context = min(256, positions) if args.context is None else args.context
    if context > positions:
        raise ConfigError(f"--context {context} is longer than the {positions} positions of {args.model}")
    check_prompt(tokenizer, args.prompt, positions)
    configs = {scheme: train_config(args, scheme, context) for scheme in schemes}
    held_out = open_stream(prepared_data(args), tokenizer, args.held_out)

    def measured(model: Any) -> Perplexity:
        return evaluate_tokens(model, held_out.tokens, utf8_bytes=held_out.utf8_bytes, context=context)

    # All of them first: a scheme that does not fit the model is refused before hours of training.
    before = {scheme: measured(bq.quantize_(load_hf(args.model), scheme)).loss for scheme in schemes}
    rows = []
    for scheme, config in configs.items():
        folder, packed = args.out / "runs" / scheme, args.out / "packed" / scheme
        result = train(config, folder, display=make_display(console), should_stop=stop)
        if result.interrupted:
            console.print(f"stopped at step {result.step} of {scheme}, saved; the same command goes on")
            return stop.exit_code
        trained = load_run(folder)
        bq.save(trained.model, packed, trained.tokenizer, trained.metadata, overwrite=True)
        engine = TextEngine.open(packed)
        after, sizes = measured(engine.model), packed_sizes(packed)
        rows.append(
            Row(
                scheme=scheme,
                loss_before=before[scheme],
                loss_after=after.loss,
                bits_per_byte=after.bits_per_byte,
                packed_bytes=sizes["total_bytes"],
                blocks_bytes=sizes["linear_bytes"],
                training_seconds=result.seconds,
                sample=continuation(engine, args.prompt),
            )
        )
    show(rows, after.tokens)
    settings = {"steps": args.steps, "batch_size": args.batch_size, "context": context, "lr": args.lr}
    fields = {**settings, "held_out_tokens": after.tokens, "rows": [asdict(row) for row in rows]}
    write_result(args.out / "results.json", args.command, fields)
    return 0


def main(argv: list[str]) -> int:
    args = arguments(argv)
    args.command = shlex.join(["python", sys.argv[0], *argv])
    try:
        with stop_on_signals() as stop:
            return run(args, stop)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the last checkpoint")
        return 130
    except (ValueError, OSError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
