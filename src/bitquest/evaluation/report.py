"""One self-contained HTML page about a set of runs: results, charts, texts, and how to do it again."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bitquest.evaluation import report_page as html
from bitquest.evaluation.charts import Chart, write_charts
from bitquest.evaluation.diagnose_charts import diagnostic_charts
from bitquest.evaluation.figures import loss_curves, seed_spread, size_against_loss
from bitquest.evaluation.report_page import Table
from bitquest.evaluation.runs import RunSummary, grouped
from bitquest.files import write_text_atomic

SIZE_CAPTION = "Lower and further left is better. Sizes are of all tensors of the packed model; 1 MB is 10⁶ bytes."


def write_report(
    path: str | Path,
    title: str,
    runs: Sequence[RunSummary],
    *,
    summary: str = "",
    results: Table | None = None,
    tables: Sequence[Table] = (),
    baselines: Mapping[str, float] | None = None,
    facts: Mapping[str, str] | None = None,
    commands: Sequence[str] = (),
    charts: Mapping[str, Sequence[Chart]] | None = None,
) -> Path:
    """Write a report of `runs` to `path` (parents are made) and return it; an existing page is replaced in one go.

    summary: a sentence or two under the title. results: the main table, made from the runs unless given; `tables`
    follow it. baselines: bits per byte of what is no run, such as {"byte 3-gram": 2.61}; a line in the size chart and
    a note under the table. facts: more about the machine or the data, beside Python, PyTorch and processor.
    commands: shell lines that reproduce the runs. Runs that looked at themselves while they trained (`diagnose.every`)
    get charts of that, and the folder `diagnostics` beside the page their PNG and CSV files. charts: below the table of
    "Results", and in the place of what "Training" and "Size against loss" show of themselves. What a run does not know
    (size, speed, sample) is left out.

    The page is plain HTML with its style and SVG inside: it loads nothing, runs nothing, and all text is escaped.
    Raises MissingExtraError without matplotlib.
    """
    path = Path(path)
    runs = list(runs)
    looks = diagnostic_charts(runs)
    note = "; ".join(f"{name}: {bits:.4f} bits per byte" for name, bits in (baselines or {}).items())
    sections = [
        html.section(
            "Results",
            html.table(results or results_table(runs, note)) if results or runs else "",
            *_figures((charts or {}).get("Results", ())),
            *(html.table(table) for table in tables),
        ),
        html.section(
            "Training", *(_curves_and_seeds(runs) if charts is None else _figures(charts.get("Training", ())))
        ),
        html.section("Diagnostics", *_figures(looks)),
        html.section(
            "Size against loss",
            *(
                [html.figure(size_against_loss(runs, baselines), SIZE_CAPTION)]
                if charts is None
                else _figures(charts.get("Size against loss", ()))
            ),
        ),
        html.section(
            "Text the models wrote",
            *(html.sample(run.name, _about(run), run.prompt, run.sample) for run in runs if run.sample is not None),
        ),
        html.section("Configuration", *_configuration(runs)),
        html.section(
            "Do it again", html.commands(commands), html.facts("Environment", environment() | dict(facts or {}))
        ),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if looks:
        write_charts(looks, path.parent / "diagnostics")
    write_text_atomic(path, html.page(title, summary, sections))
    return path


def _curves_and_seeds(runs: Sequence[RunSummary]) -> list[str]:
    return [
        html.figure(loss_curves(runs), curves_caption(runs)),
        html.figure(seed_spread(runs), "Every seed's loss at the end of training."),
    ]


def _figures(charts: Sequence[Chart]) -> list[str]:
    return [html.figure(chart.svg, chart.caption) for chart in charts]


def results_table(runs: Sequence[RunSummary], note: str = "") -> Table:
    """A row per run: scheme, losses, size, speed, verification; a column that no run can fill is left out."""
    columns: dict[str, list[str]] = {
        "run": [run.name for run in runs],
        "scheme": [run.scheme for run in runs] if any(run.scheme != run.name for run in runs) else [],
        "seed": [str(run.seed) for run in runs] if len({run.seed for run in runs}) > 1 else [],
        "steps": [_steps(run) for run in runs] if not all(run.finished for run in runs) else [],
        "validation loss": [_number(run.val_loss, ".4f") for run in runs],
        "bits per byte": [_number(run.bits_per_byte, ".4f") for run in runs],
        "MB packed": [_number(run.packed_mb, ".2f") for run in runs],
        "embedding + head, MB": [_number(_tables_mb(run), ".2f") for run in runs],
        "tokens/s": [_number(run.tokens_per_s, ",.0f") for run in runs],
        "tokens/s in training": [_number(run.train_tokens_per_s, ",.0f") for run in runs],
        "verified": ["–" if run.verified is None else "yes" if run.verified else "no" for run in runs],
    }
    kept = {name: cells for name, cells in columns.items() if any(cell != "–" for cell in cells)}
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)), note=note)


def environment() -> dict[str, str]:
    """Versions, processor and date, for people: what a number on the page may depend on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "bitquest": _version("bitquest"),
        "PyTorch": _version("torch"),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "processor cores": str(os.cpu_count()),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _configuration(runs: Sequence[RunSummary]) -> list[str]:
    """Settings that all runs share, a block per section, and the values of those that differ."""
    flat = [dict(_flat(run.config)) for run in runs if run.config]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    common: dict[str, dict[str, str]] = {}
    differing: dict[str, str] = {}
    for key in keys:
        values = list(dict.fromkeys(_value(config.get(key, "not set")) for config in flat))
        if len(values) > 1:
            differing[key] = ", ".join(values)
        else:
            head, dot, name = key.rpartition(".")
            common.setdefault(head or "general", {})[name if dot else key] = values[0]
    blocks = [html.facts(name, values) for name, values in common.items()]
    return [html.facts("What differs between the runs", differing), *blocks]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
    return pairs


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def curves_caption(runs: Sequence[RunSummary]) -> str:
    """What a chart of loss curves shows."""
    seeds = max((len(group) for group in grouped(list(runs)).values()), default=0)
    several = f", the mean over up to {seeds} seeds" if seeds > 1 else ""
    return f"Marks: validation loss{several}. Thin lines: training loss, smoothed. The first steps may lie outside."


def _about(run: RunSummary) -> str:
    parts = [] if run.scheme == run.name else [run.scheme]
    parts += [f"{run.bits_per_byte:.3f} bits per byte"] if run.bits_per_byte is not None else []
    parts += [f"{run.packed_mb:.2f} MB"] if run.packed_mb is not None else []
    return " · ".join(parts)


def _steps(run: RunSummary) -> str:
    return f"{run.steps} of {run.total_steps}" if not run.diverged else "diverged"


def _tables_mb(run: RunSummary) -> float | None:
    sizes = run.packed_bytes or {}
    if "embedding_bytes" not in sizes and "head_bytes" not in sizes:
        return None
    return (sizes.get("embedding_bytes", 0) + sizes.get("head_bytes", 0)) / 1e6


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
