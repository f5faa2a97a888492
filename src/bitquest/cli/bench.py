"""`bitquest bench`: measurements that take turns in one run and report ratios."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from bitquest.cli.bench_cpu import cpu
from bitquest.cli.console import err, print_json_object
from bitquest.errors import ConfigError

app = typer.Typer(help="Measure, alternating in one run; ratios of medians and minima.", no_args_is_help=True)
app.command("cpu")(cpu)


@app.command("train-step")
def train_step(
    schemes: Annotated[str, typer.Option(help="Comma-separated; the first is the baseline.")] = "none,w4a4,w1a1",
    width: Annotated[int, typer.Option(min=64, help="Model width, a multiple of 64.")] = 256,
    layers: Annotated[int, typer.Option(min=1)] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 16,
    context: Annotated[int, typer.Option(min=1, help="Bytes a sequence.")] = 256,
    repetitions: Annotated[int, typer.Option(min=1)] = 10,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="0: as many as torch takes.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the result, with date and hardware, here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """A whole float32 training step, optimizer included, at several schemes."""
    import torch

    from bitquest.benchmarks.hardware import describe
    from bitquest.benchmarks.results import check_place, write_result
    from bitquest.benchmarks.train_step import StepShape, compare_train_step

    names = [name.strip() for name in schemes.split(",")]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--schemes: {twice} is given twice; name each scheme once")
    if out is not None:
        check_place(out)
    if threads:
        torch.set_num_threads(threads)
    shape = StepShape(width, layers, batch, context)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(names) * (repetitions + 2))
        result = compare_train_step(names, shape, repetitions, lambda: progress.advance(task)).to_json()
    command = (
        f"bitquest bench train-step --schemes {','.join(names)} --width {width} --layers {layers} --batch {batch} "
        f"--context {context} --repetitions {repetitions}"
    )
    if out is not None:
        write_result(out, command, result)
    if json:
        print_json_object("bench train-step", {"hardware": describe(), **result})
        return
    table = Table(title=f"training step, width {width}, {layers} blocks, {batch}×{context} bytes, float32")
    for heading in ("scheme", "median s", "minimum s", "ratio of medians", "of minima", "target"):
        table.add_column(heading, justify="left" if heading == "scheme" else "right")
    for name, row in result["schemes"].items():
        target = f"≤ {row['target']}" if row["target"] else ""
        cells = (f"{row['median_seconds']:.3f}", f"{row['minimum_seconds']:.3f}")
        table.add_row(name, *cells, f"{row['ratio_of_medians']:.2f}", f"{row['ratio_of_minima']:.2f}", target)
    err.print(table)


@app.command("gpu")
def gpu(
    backend: Annotated[str, typer.Option(help="Which code runs the layers; see bitquest doctor.")] = "auto",
    only: Annotated[str, typer.Option(help="Cases, comma-separated; all without. floors: the hardware alone.")] = "",
    budget: Annotated[float, typer.Option(min=1, help="Seconds; what they do not reach is not measured.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 20,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny data on the CPU: the figures mean nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the result, with date and hardware, here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Low-bit layers and training steps against bf16 on a GPU, checked before they are timed."""
    import torch

    from bitquest.benchmarks.gpu import Bench, Plan
    from bitquest.benchmarks.gpu_report import lines, one_line
    from bitquest.benchmarks.hardware import describe
    from bitquest.benchmarks.results import check_place, write_result
    from bitquest.ops.backend import resolve_backend

    if not dry_run and not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA device here; --dry-run runs the benchmark on the CPU, on tiny data")
    resolve_backend(backend)
    if out is not None:
        check_place(out)
    names = tuple(name.strip() for name in only.split(",") if name.strip())
    plan = Plan("cpu" if dry_run else "cuda", backend, rounds, budget, dry_run, names)
    plan.jobs()
    command = f"bitquest bench gpu --backend {backend} --budget {budget:g} --rounds {rounds}"
    command += (f" --only {','.join(names)}" if names else "") + (" --dry-run" if dry_run else "")

    def on_row(name: str, result: dict[str, Any]) -> None:
        if name != "floors":
            err.print(one_line(name, result), soft_wrap=True, highlight=False, markup=False)
        if out is not None:  # each time: what was measured stays, whatever comes
            write_result(out, command, bench.to_json())

    hardware = describe()  # before anything is measured: it wakes the device for this process
    bench = Bench(plan, on_row)
    bench.run()
    result = bench.to_json()
    if out is not None:
        write_result(out, command, result)
    if json:
        print_json_object("bench gpu", {"hardware": hardware, **result})
    else:
        for line in lines(result):
            err.print(line, soft_wrap=True, highlight=False, markup=False)
    if any(case["status"] in ("wrong", "failed") for case in result["cases"].values()):
        raise typer.Exit(1)


@app.command("loss-curves")
def loss_curves(
    data: Annotated[Path, typer.Option(help="Folder of prepared tokens (bitquest data prepare).")],
    preset: Annotated[str, typer.Option(help="The model's size.")] = "10M",
    scheme: Annotated[str, typer.Option(help="How the model is quantized.")] = "w4a4",
    backend: Annotated[str, typer.Option(help="What the fused run trains with.")] = "auto",
    steps: Annotated[int, typer.Option(min=2)] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 32,
    context: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="References of different seeds.")] = 3,
    repeats: Annotated[
        int, typer.Option(min=2, help="Runs of each path from the first seed, nudged by rounding errors.")
    ] = 4,
    last: Annotated[int, typer.Option(min=1, help="Losses at the end whose means are compared.")] = 50,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which no run is begun; 0: no limit.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the result, with date and hardware, here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Loss curves of the fused training path and of the reference: do they learn the same?"""
    from bitquest.benchmarks.gpu_report import curve_lines
    from bitquest.benchmarks.hardware import describe
    from bitquest.benchmarks.loss_curves import CurveSettings, compare_curves
    from bitquest.benchmarks.results import check_place, write_result
    from bitquest.ops.backend import resolve_backend

    resolve_backend(backend)
    if out is not None:
        check_place(out)
    settings = CurveSettings(preset, scheme, steps, batch, context, seeds=seeds, repeats=repeats, last=last)

    def on_run(name: str, mean: float) -> None:
        err.print(f"{name}: {mean:.4f} nats, mean of the last {last} steps", highlight=False)

    result = compare_curves(data, settings, backend, budget, on_run)
    command = (
        f"bitquest bench loss-curves --data {data} --preset {preset} --scheme {scheme} --backend {backend} "
        f"--steps {steps} --batch {batch} --context {context} --seeds {seeds} --repeats {repeats} --last {last}"
    )
    if out is not None:
        write_result(out, command, result)
    if json:
        print_json_object("bench loss-curves", {"hardware": describe(), **result})
    else:
        for line in curve_lines(result):
            err.print(line, soft_wrap=True, highlight=False, markup=False)
    if result["agree"] is False:
        raise typer.Exit(1)
