"""`bitquest bench cpu`: layers, rows, whole models and training on this processor, against torch and llama.cpp."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bitquest.cli.console import err, print_json_object
from bitquest.errors import ConfigError


def cpu(
    cases: Annotated[
        str,
        typer.Option(help="Cases or groups (targets, layers, rows, model, training), comma-separated; all without."),
    ] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, comma-separated.")] = "1,2",
    repetitions: Annotated[int, typer.Option(min=1, help="Samples of each figure.")] = 20,
    equal_loss: Annotated[
        float | None, typer.Option(min=0, help="Instead: each format at the size the scaling law gives this loss.")
    ] = None,
    law: Annotated[
        Path | None, typer.Option(help="With --equal-loss: a law of `bitquest scaling fit`, not the published one.")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="With --equal-loss: measure every block, not a few.")] = False,
    peers: Annotated[str, typer.Option(help="The Python that has llama-cpp-python; this one without.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw the layers under the machine's ceilings (PNG).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny data: the figures mean nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the result, with date and hardware, here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Low-bit layers, models and training on this CPU, checked before they are timed."""
    from bitquest.benchmarks.cpu import Bench, Plan
    from bitquest.benchmarks.cpu_report import equal_loss_lines, lines, one_line
    from bitquest.benchmarks.results import check_place, write_result

    counts = _threads(threads)
    for path in (out, plot):
        if path is not None:
            check_place(path)
    if plot is not None:
        from bitquest.evaluation.figures import require_matplotlib

        require_matplotlib()
    command = f"bitquest bench cpu --threads {threads} --repetitions {repetitions}"
    command += " --quick" if quick else ""

    if equal_loss is not None:
        if cases or plot is not None or peers:
            raise ConfigError("--equal-loss measures formats side by side; it takes no --cases, --plot or --peers")
        from bitquest.benchmarks.cpu_equal_loss import measure_equal_loss
        from bitquest.evaluation.scaling_fitted import load_law

        fitted = None if law is None else load_law(law)
        result = measure_equal_loss(equal_loss, counts, repetitions, quick, whole, _say, fitted)
        command += f" --equal-loss {equal_loss:g}" + (" --whole" if whole else "")
        command += "" if law is None else f" --law {law}"
        _deliver(out, command, result, json, equal_loss_lines)
        return
    if whole or law is not None:
        raise ConfigError(f"{'--whole' if whole else '--law'} goes with --equal-loss")
    names = tuple(name.strip() for name in cases.split(",") if name.strip())
    plan = Plan(names, counts, repetitions, quick, peers, ceilings=plot is not None)
    if not any(case.kind == "layer" for case in plan.cases()) and plot is not None:
        raise ConfigError("--plot draws layers; take --cases layers, or leave --cases out")
    if peers:  # a mistake is told now, not after an hour
        from bitquest.benchmarks.cpu_peers import has_llama_cpp

        if not has_llama_cpp(peers):
            raise ConfigError(f"--peers {peers}: this Python has no llama-cpp-python; install it, or leave --peers out")
    command += f" --cases {','.join(names)}" if names else ""
    command += (f" --peers {peers}" if peers else "") + (f" --plot {plot}" if plot is not None else "")

    def on_case(name: str, case: dict[str, Any]) -> None:
        _say(one_line(name, case))
        if out is not None:  # each time: what was measured stays, whatever comes
            write_result(out, command, bench.to_json())

    bench = Bench(plan, _say, on_case)
    bench.run()
    result = bench.to_json()
    if plot is not None:
        from bitquest.benchmarks.cpu_roofline import draw_roofline

        draw_roofline(result, plot)
    _deliver(out, command, result, json, lines)
    if any(case["status"] == "wrong" for case in result["cases"].values()):
        raise typer.Exit(1)


def _deliver(
    out: Path | None, command: str, result: dict[str, Any], json: bool, report: Callable[[dict[str, Any]], list[str]]
) -> None:
    from bitquest.benchmarks.hardware import describe
    from bitquest.benchmarks.results import write_result

    if out is not None:
        write_result(out, command, result)
    if json:
        print_json_object("bench cpu", {"hardware": describe(), **result})
        return
    for line in report(result):
        _say(line)


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)


def _threads(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(word) for word in text.split(","))
    except ValueError:
        counts = (0,)
    if not all(0 < count <= 1024 for count in counts):
        raise ConfigError(f"--threads takes numbers from 1, comma-separated, not {text!r}")
    return counts
