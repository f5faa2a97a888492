"""One look at a trained model on held-out text of its own: a table per block, and a page with charts.

What is measured is defined in training/look.py; runs that looked while they trained (`diagnose.every`) also show how
it went.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bitquest.errors import CheckpointError, ConfigError, DataError
from bitquest.evaluation import report_page as html
from bitquest.evaluation.charts import Chart, write_charts
from bitquest.evaluation.diagnose_charts import alignment_chart, layers_chart, series_chart, style_of
from bitquest.evaluation.figures import require_matplotlib
from bitquest.evaluation.report import environment
from bitquest.evaluation.report_page import Table
from bitquest.evaluation.runs import read_run
from bitquest.export.loader import usable_device
from bitquest.files import write_text_atomic
from bitquest.models import Llama
from bitquest.nn import Scheme, quantize_
from bitquest.training.data import Tokens, open_tokens
from bitquest.training.diagnose import look_fields, plain, summary
from bitquest.training.look import look_at
from bitquest.training.runs import LoadedRun, is_run, load_run
from bitquest.training.step import autocast, choose_precision

PAGE = "report.html"


@dataclass(frozen=True)
class Diagnosed:
    """A look at the model of a run. look: the record, as metrics.jsonl has it. series: those of the run itself."""

    run: Path
    scheme: str
    step: int
    sequences: int
    context: int
    look: Mapping[str, Any]
    series: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        fields = {name: getattr(self, name) for name in ("scheme", "step", "sequences", "context")}
        return {"run": str(self.run), **fields, "look": dict(self.look), "series": [dict(look) for look in self.series]}


def diagnose(
    path: str | Path,
    *,
    step: int | None = None,
    scheme: str | None = None,
    data: str | Path | None = None,
    sequences: int = 16,
    backend: str = "torch",
    device: str = "cpu",
) -> Diagnosed:
    """Look at the newest checkpoint of a run, or `step`'s, on the first `sequences` windows of its validation split.

    path: a run directory, or one of its checkpoints. scheme: quantize the trained weights so instead, as if training
    began there; a learned step starts from its fit. data: prepared data instead of the run's own, same tokenizer.

    Raises CheckpointError, ConfigError (a scheme or backend that does not fit) and DataError.
    """
    if sequences < 1:
        raise ConfigError(f"{sequences} sequences are none to look at; give at least 1")
    path, step = _run_and_step(Path(path), step)
    target = usable_device(device)
    run = load_run(path, step)
    tokens = _tokens(run, Path(data) if data is not None else None)
    wanted = str(Scheme.parse(scheme)) if scheme is not None else run.config.scheme
    model = _requantized(run, wanted, backend).to(target)
    windows = next(iter(tokens.windows(run.config.data.context, sequences))).to(target)
    precision = choose_precision(run.config.train.precision, target)
    look = look_at(model, windows, lambda: autocast(target, precision))
    record = {"kind": "diagnose", "step": run.step, **look_fields(look)}
    series = read_run(path).looks if wanted == run.config.scheme else ()
    made = plain({**record, **summary(record)})
    return Diagnosed(path, wanted, run.step, windows.shape[0], windows.shape[1] - 1, made, tuple(series))


def _run_and_step(path: Path, step: int | None) -> tuple[Path, int | None]:
    """A run directory, also where one of its checkpoints was named."""
    number = path.name.removeprefix("step-")
    if number != path.name and number.isdecimal() and is_run(path.parent.parent):
        if step not in (None, int(number)):
            raise CheckpointError(
                f"{path} is the checkpoint of step {number}; leave out --step {step}, or name the run"
            )
        return path.parent.parent, int(number)
    return path, step


def _tokens(run: LoadedRun, data: Path | None) -> Tokens:
    folder = data if data is not None else Path(run.config.data.path)
    try:
        tokens = open_tokens(folder, "val")
    except DataError as error:
        hint = "" if data is not None else " (the run's own data; where it moved, name it with --data)"
        raise DataError(f"{error}{hint}") from None
    if tokens.tokenizer().sha256 != run.tokenizer.sha256:
        raise DataError(f"{folder} was prepared with another tokenizer than the run's; name its own data with --data")
    if tokens.count < 2:
        raise DataError(f"{folder}: its validation split is empty: there is nothing to look at")
    return tokens


def _requantized(run: LoadedRun, scheme: str, backend: str) -> Llama:
    """The run's model, or its float parameters under another scheme or on another backend."""
    if scheme == run.config.scheme and backend == "torch":
        return run.model
    model = Llama(run.model.config)
    mine, trained = model.state_dict(), run.model.state_dict()
    for name, tensor in mine.items():
        tensor.copy_(trained[name])
    quantize_(model, Scheme.parse(scheme), backend=backend)
    if scheme == run.config.scheme:  # learned steps too
        model.load_state_dict(trained)
    return model.eval()


# --- what is shown ---------------------------------------------------------------------------------------------------


def blocks_table(made: Diagnosed) -> Table:
    """A row per block, the top one first: cosines, and means over its layers' weights W and inputs x."""
    look = made.look
    columns: dict[str, Callable[[int], float | None]] = {
        "cosine ∂L/∂h": lambda block: look["blocks"][block]["output"],
        "cosine ∂L/∂W": lambda block: look["blocks"][block]["weights"],
    }
    forms = {"cosine": ".4f", "masked": ".3%", "error": ".3f", "kurtosis": ".2f"}
    for title, figure in (("masked", "masked"), ("error", "excess"), ("kurtosis", "kurtosis")):
        for part, sign in (("weights", "W"), ("inputs", "x")):
            columns[f"{title} {sign}"] = partial(_of_block, look[part], figure)
    order = range(len(look["blocks"]) - 1, -1, -1)
    cells = {
        title: [_cell(value(block), forms[title.split()[0]]) for block in order] for title, value in columns.items()
    }
    kept = {title: column for title, column in cells.items() if any(cell != "–" for cell in column)}
    rows = tuple(zip([str(block + 1) for block in order], *kept.values(), strict=True))
    note = (
        f"{made.scheme}, step {made.step}, {made.sequences} × {made.context} held-out tokens. Cosines are with the "
        "gradient of the same weights unquantized: h a block's output, W its weights. Errors are over the Gaussian "
        f"optimum. Loss {look['loss']:.4f} nats per token, {look['unquantized_loss']:.4f} unquantized."
    )
    return Table(("block", *kept), rows, note=note)


def _of_block(layers: Mapping[str, Any], figure: str, block: int) -> float | None:
    mine = [entry for name, entry in layers.items() if name.startswith(f"model.layers.{block}.") and figure in entry]
    elements = sum(entry["elements"] for entry in mine)
    return sum(entry[figure] * entry["elements"] for entry in mine) / elements if elements else None


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def charts_of(made: Diagnosed) -> list[Chart]:
    """Alignment, layers and, where the run looked more than once, the series."""
    styles = {made.scheme: style_of(made.scheme)}
    charts = (
        alignment_chart({made.scheme: [made.look]}, styles),
        layers_chart(made.look),
        series_chart({made.scheme: [made.series]}, styles) if made.series else None,
    )
    return [chart for chart in charts if chart is not None]


def write_diagnosis(made: Diagnosed, folder: Path, command: str) -> list[Path]:
    """Write report.html, and a PNG and a CSV file of every chart, into a folder, which is made; the paths written.

    Raises MissingExtraError without matplotlib and OSError naming a path.
    """
    require_matplotlib()
    charts = charts_of(made)
    look = made.look
    top, bottom = look["alignment_top"], look["alignment_bottom"]
    ends = f"The gradient's cosine with the unquantized one is {_cell(top, '.3f')} at the top, {_cell(bottom, '.3f')} "
    sections = [
        html.section("Block by block", html.table(blocks_table(made))),
        *(html.section(_HEADINGS[chart.name], html.figure(chart.svg, chart.caption)) for chart in charts),
        html.section("Do it again", html.commands([command]), html.facts("Environment", environment())),
    ]
    summary_line = f"{made.scheme}, step {made.step}. {ends}at the bottom of {len(look['blocks'])} blocks."
    folder.mkdir(parents=True, exist_ok=True)
    written = write_charts(charts, folder)
    write_text_atomic(folder / PAGE, html.page(f"Diagnosis: {made.run.absolute().name}", summary_line, sections))
    return [folder / PAGE, *written]


_HEADINGS = {"alignment": "Gradient alignment", "layers": "Layer by layer", "series": "While it trained"}
