"""The stability map of a comparison: a grid of arms by learning rates for every size of model and every corpus."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquest.evaluation import figures
from bitquest.evaluation.charts import Chart, finished
from bitquest.evaluation.compare_plan import Arm, short_paths
from bitquest.evaluation.compare_results import ComparisonResult
from bitquest.evaluation.report_page import Table

# Shares of the colour between the lowest and the highest loss; more would hide the numbers.
_FAINT, _STRONG = 0.04, 0.5
_SHADE = "#010201"  # the stand-in for the page's second series
_ROW, _GAP, _HEAD = 0.3, 0.35, 0.35  # inches: of a row, between panels, above one


@dataclass(frozen=True)
class Cell:
    """All seeds of an arm at a rate: mean loss of those that have one, and how many diverged or were unstable."""

    loss: float | None
    runs: int
    diverged: int
    unstable: int

    @property
    def text(self) -> str:
        """As the map shows it: the loss, ~ before that of an unstable run, and × where one diverged."""
        if self.loss is None:
            return "×" if self.diverged else ""
        partly = f" {self.diverged}×" if self.diverged else ""
        return ("~" if self.unstable else "") + f"{self.loss:.2f}{partly}"


def size_of(arm: Arm) -> str:
    """What the map calls the size of an arm's model."""
    model = arm.config.model
    if model.preset is None:
        return "own shape" if model.init_from is None else Path(model.init_from).name
    return model.preset


@dataclass(frozen=True)
class _Place:
    """Where an arm stands on the map: its panel's size and corpus, and its row: the name without these two."""

    size: str
    corpus: str
    row: str


def _places(arms: Sequence[Arm]) -> dict[str, _Place]:
    corpora = short_paths(arm.config.data.path for arm in arms)
    places = {}
    for arm in arms:
        size, corpus = size_of(arm), corpora[arm.config.data.path]
        places[arm.key] = _Place(size, corpus, arm.name.removesuffix(f" {corpus}").removesuffix(f" {size}"))
    return places


def cells_of(result: ComparisonResult) -> dict[tuple[str, float], Cell]:
    """The cells of the map by arm and rate; one whose runs are still to be made is empty."""
    cells = {}
    for arm in result.plan.arms:
        for rate in result.plan.rates:
            runs = [run for run in result.runs if run.arm == arm.key and run.rate == rate]
            losses = [run.val_loss for run in runs if run.val_loss is not None]
            unstable = sum(run.status == "unstable" for run in runs)
            mean = statistics.fmean(losses) if losses else None
            cells[arm.key, rate] = Cell(mean, len(runs), len(runs) - len(losses), unstable)
    return cells


def map_table(result: ComparisonResult) -> Table:
    """A row per arm, a column per rate."""
    cells, rates = cells_of(result), sorted(result.plan.rates)
    rows = [(arm.name, *(cells[arm.key, rate].text or "–" for rate in rates)) for arm in result.plan.arms]
    seeds = f", mean of {len(result.plan.seeds)} seeds" if len(result.plan.seeds) > 1 else ""
    note = (
        f"Validation loss in nats per token by learning rate{seeds}. × diverged; ~ unstable: the training loss ended "
        "far above its own best."
    )
    return Table(("arm", *(f"{rate:g}" for rate in rates)), rows, note=note)


def map_chart(result: ComparisonResult) -> Chart:
    """A heat map per size and corpus: the darker a cell, the higher its loss, and black where training diverged."""
    plan, cells = result.plan, cells_of(result)
    rates = sorted(plan.rates)
    places = _places(plan.arms)
    sizes = list(dict.fromkeys(place.size for place in places.values()))
    corpora = list(dict.fromkeys(place.corpus for place in places.values()))
    rows = list(dict.fromkeys(place.row for place in places.values()))
    left = figures._text_width([figures._short(row) for row in rows]) + 0.2
    height = _ROW * len(rows)
    whole = len(corpora) * (height + _HEAD) + (len(corpora) - 1) * _GAP + 0.55
    width = (figures._WIDTH - left - 0.1 - _GAP * (len(sizes) - 1)) / len(sizes)
    with figures.drawing(whole) as figure:
        for down, corpus in enumerate(corpora):
            arms = [arm for arm in plan.arms if places[arm.key].corpus == corpus]
            found = [cells[arm.key, rate] for arm in arms for rate in rates]
            losses = [cell.loss for cell in found if cell.loss is not None and not cell.unstable]
            limits = (min(losses), max(losses)) if losses else (0.0, 1.0)  # those of unstable runs may be anything
            for across, size in enumerate(sizes):
                bottom = whole - _HEAD - height - down * (height + _HEAD + _GAP)
                x = left + across * (width + _GAP)
                axes = figure.add_axes((x / figures._WIDTH, bottom / whole, width / figures._WIDTH, height / whole))
                title = " · ".join(part for part, many in ((size, sizes), (corpus, corpora)) if len(many) > 1)
                panel = {places[arm.key].row: arm for arm in arms if places[arm.key].size == size}
                _draw(axes, [[_cell(cells, panel.get(row), rate) for rate in rates] for row in rows], limits)
                axes.set_title(title, fontsize=10.5, color=figures._INK, loc="left", pad=7)
                axes.set_yticks(range(len(rows)), [figures._short(row) for row in rows] if across == 0 else [])
                axes.tick_params(axis="y", labelcolor=figures._INK)
                is_last = down == len(corpora) - 1
                axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates] if is_last else [])
                if is_last:
                    axes.set_xlabel("learning rate")
        caption = (
            "Validation loss in nats per token; the stronger the colour, the higher, per corpus. × on black: diverged. "
            "~ in a frame: unstable, the training loss ended far above its own best."
        )
        if len(plan.seeds) > 1:
            caption += f" Means of {len(plan.seeds)} seeds; 1× after a number: one of them diverged."
        columns = ("arm", "scheme", "size", "corpus", "rate", "loss", "runs", "diverged", "unstable")
        table = [
            (at.row, arm.scheme, at.size, at.corpus, rate, c.loss, c.runs, c.diverged, c.unstable)
            for arm in plan.arms
            for rate in rates
            for at, c in ((places[arm.key], cells[arm.key, rate]),)
        ]
        return finished(figure, "map", "Where training is stable", caption, columns, table)


def _cell(cells: dict[tuple[str, float], Cell], arm: Arm | None, rate: float) -> Cell:
    return cells[arm.key, rate] if arm is not None else Cell(None, 0, 0, 0)


def _draw(axes: Any, grid: Sequence[Sequence[Cell]], limits: tuple[float, float]) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    low, high = limits
    axes.set_xlim(-0.5, len(grid[0]) - 0.5)
    axes.set_ylim(len(grid) - 0.5, -0.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=6)
    for row, line in enumerate(grid):
        for column, cell in enumerate(line):
            if cell.loss is None:
                fill = to_rgba(figures._INK) if cell.diverged else to_rgba(figures._GRID, 0.3)
            else:
                share = min(max((cell.loss - low) / (high - low), 0.0), 1.0) if high > low else 0.0
                fill = to_rgba(_SHADE, _FAINT + (_STRONG - _FAINT) * share)
            box = (column - 0.47, row - 0.44)
            axes.add_patch(Rectangle(box, 0.94, 0.88, facecolor=fill, edgecolor="none"))
            if cell.unstable:
                axes.add_patch(Rectangle(box, 0.94, 0.88, fill=False, edgecolor=figures._INK, lw=1.2))
            colour = figures._PAPER if cell.loss is None else figures._INK
            axes.text(column, row, cell.text, ha="center", va="center_baseline", fontsize=9.5, color=colour)
