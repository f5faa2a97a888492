"""`bitquest plan`: what to train for a memory, a latency, a loss or a budget, and what it will cost."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquest.cli.console import err, print_json_object, print_table
from bitquest.errors import ConfigError

if TYPE_CHECKING:
    from bitquest.evaluation.plan_hardware import Hardware
    from bitquest.evaluation.plan_units import Budget
    from bitquest.evaluation.scaling_fitted import FittedLaw


class Preference(StrEnum):
    LOSS, BYTES, COST = "loss", "bytes", "cost"


def command(
    memory: Annotated[str | None, typer.Option(help="What the packed model and its cache may take: 2GB.")] = None,
    latency: Annotated[str | None, typer.Option(help="What a token may take: 20ms.")] = None,
    loss: Annotated[float | None, typer.Option(help="The loss to reach, nats per token.")] = None,
    training_budget: Annotated[str | None, typer.Option(help="100 H100-hours, $5000 or 1e21 FLOP.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens: 100B.")] = None,
    tokens_per_parameter: Annotated[
        float | None, typer.Option(min=0.01, help="Instead of --tokens.", show_default="100, or what a budget pays for")
    ] = None,
    formats: Annotated[str | None, typer.Option(help="Only these: w1a1,w4a4.", show_default="all rotated")] = None,
    prefer: Annotated[
        Preference | None,
        typer.Option(help="What decides among what is possible.", show_default="loss; bytes with --loss"),
    ] = None,
    law: Annotated[
        Path | None, typer.Option(help="A law of `bitquest scaling fit`.", show_default="the QuEST paper's runs")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="What is trained on.", show_default="h100")] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many of them at once.")] = 1,
    run_on: Annotated[str, typer.Option(help="What the model runs on.")] = "desktop",
    hardware_file: Annotated[Path | None, typer.Option(help="TOML with machines or prices of your own.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per device and hour.")] = None,
    utilization: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak in training.")] = 0.35,
    overhead: Annotated[float, typer.Option(min=0.01, help="Time of a quantized training step over a bf16 one.")] = 1.0,
    vocabulary: Annotated[int, typer.Option(min=2, max=10_000_000, help="Words of the tokenizer.")] = 32_000,
    tables: Annotated[int, typer.Option(help="Bits of token table and head: 16, 8 or 4.")] = 8,
    context: Annotated[int, typer.Option(min=1, max=2**24, help="Positions of the key-value cache.")] = 2048,
    cache_bits: Annotated[int, typer.Option(min=1, max=32, help="Bits of a cached key or value.")] = 16,
    tokens_at_once: Annotated[int, typer.Option(min=1, help="Tokens of one forward pass on a device.")] = 16_384,
    bench: Annotated[
        Path | None, typer.Option(help="Result of `bitquest bench cpu --equal-loss … --out`: measured, not a floor.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object on stdout.")] = False,
) -> None:
    """Say which size and width to train, what loss to expect, and what it costs in hours, memory and money."""
    import dataclasses

    from bitquest.evaluation.plan import Request, make_plan
    from bitquest.evaluation.plan_hardware import find_hardware
    from bitquest.evaluation.plan_measured import read_measured
    from bitquest.evaluation.plan_units import Budget, parse_budget, parse_bytes, parse_count, parse_seconds
    from bitquest.evaluation.plan_words import advice, assumptions, plan_table
    from bitquest.evaluation.scaling_fitted import load_law

    budget = Budget() if training_budget is None else parse_budget("--training-budget", training_budget)
    if budget.machine and hardware and hardware.lower() != budget.machine:
        raise ConfigError(f"--training-budget is in {budget.machine}-hours and --hardware is {hardware}: leave one out")
    machine = find_hardware(budget.machine or hardware or "h100", hardware_file)
    if price is not None:
        machine = dataclasses.replace(machine, price_per_hour=price, price_source="--price")
    known = load_law(law)
    plan = make_plan(
        Request(
            law=known,
            formats=_formats(formats, known),
            train_on=machine,
            run_on=find_hardware(run_on, hardware_file),
            memory=None if memory is None else parse_bytes("--memory", memory),
            latency=None if latency is None else parse_seconds("--latency", latency),
            loss=loss,
            flops=_flops(budget, machine, utilization),
            tokens=None if tokens is None else parse_count("--tokens", tokens),
            tokens_per_parameter=tokens_per_parameter,
            prefer=str(prefer or ("loss" if loss is None else "bytes")),
            vocabulary=vocabulary,
            context=context,
            table_bits=tables,
            cache_bits=cache_bits,
            tokens_at_once=tokens_at_once,
            devices=devices,
            utilization=utilization,
            overhead=overhead,
            measured=None if bench is None else read_measured(bench),
        )
    )
    words, assumed = advice(plan), assumptions(plan)
    if json:
        print_json_object("plan", {**plan.to_json(), "advice": words, "assumptions": assumed})
    print_table(plan_table(plan, wide=err.width >= 120))
    for line in (*words, "Assumed:", *(f"- {line}" for line in assumed)):
        loud = line.startswith("EXTRAPOLATED")
        err.print(line, soft_wrap=True, highlight=False, markup=False, style="bold red" if loud else None)


def _formats(text: str | None, law: "FittedLaw") -> tuple[str, ...]:
    """The formats to try: those named, or the law's rotated ones and few-bit weights with 8-bit activations."""
    from bitquest.evaluation.scaling_runs import format_name

    if text is None:
        own = [name for name in law.efficiencies if "norot" not in name]
        mixed = [f"w{bits}a8" for bits in (1, 2, 4) if f"w{bits}a16" in own and f"w{bits}a8" not in own]
        return (*own, *mixed)
    names = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        scheme, at, recipe = word.partition("@")
        names.append(format_name(scheme) + at + recipe)
        law.efficiency(names[-1])
    if not names:
        raise ConfigError("--formats names no format; write for example --formats w1a1,w4a4")
    return tuple(dict.fromkeys(names))


def _flops(budget: "Budget", machine: "Hardware", utilization: float) -> float | None:
    """A training budget in floating-point operations."""
    if budget.flops is not None:
        return budget.flops
    hours = budget.hours
    if budget.dollars is not None:
        if not machine.price_per_hour:
            raise ConfigError(f"no price is known for {machine.name}: give --price, or a budget in hours")
        hours = budget.dollars / machine.price_per_hour
    if hours is None:
        return None
    return hours * 3600 * (machine.peak_tflops or 0.0) * 1e12 * utilization
