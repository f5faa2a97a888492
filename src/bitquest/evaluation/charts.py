"""Charts of several panels, each as SVG for a report's page, as a PNG file, and as the CSV of what it shows."""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquest.evaluation import figures
from bitquest.evaluation.report_page import PAGE_STYLE
from bitquest.files import write_text_atomic

_PROPERTIES = ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor")
_DOTS = 160  # of the PNG per inch: readable on a page, small enough for a mail


@dataclass(frozen=True)
class Chart:
    """A drawing and its numbers. name: of its files, without an ending. rows: of the CSV, under `columns`."""

    name: str
    svg: str
    png: bytes
    caption: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def csv(self) -> str:
        """The numbers as CSV; what is not there is an empty cell."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return file.getvalue()


def write_charts(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write NAME.png and NAME.csv of every chart into a folder, which is made. Raises OSError naming a path."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        (folder / f"{chart.name}.png").write_bytes(chart.png)
        write_text_atomic(folder / f"{chart.name}.csv", chart.csv())
        written += [folder / f"{chart.name}.png", folder / f"{chart.name}.csv"]
    return written


@contextmanager
def panels(rows: int, columns: int, *, height: float = 2.0, top: float = 0.5, right: float = 0.2) -> Iterator[Any]:
    """(figure, axes[row][column]) in the reports' style; inches: `height` of a panel, `top` above, `right` beside."""
    left, below, gap_x, gap_y = _LEFT, 0.55, 0.9, 0.78
    whole = top + rows * height + (rows - 1) * gap_y + below
    width = (figures._WIDTH - left - right - (columns - 1) * gap_x) / columns
    with figures.drawing(whole) as figure:
        grid = []
        for row in range(rows):
            bottom = whole - top - (row + 1) * height - row * gap_y
            line = []
            for column in range(columns):
                place = (left + column * (width + gap_x), bottom, width, height)
                sizes = (figures._WIDTH, whole, figures._WIDTH, whole)
                axes = figure.add_axes(tuple(part / size for part, size in zip(place, sizes, strict=True)))
                figures.style_axes(axes)
                line.append(axes)
            grid.append(line)
        yield figure, grid


_LEFT, _LINE, _GAP = 0.8, 0.3, 0.28  # inches: beside the panels, of a legend's line, between its entries


def legend(figure: Any, entries: Mapping[str, tuple[str, str]]) -> None:
    """Names with their (colour, marker) in a strip above all panels, in as many lines as they need."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    for name, (x, row) in _legend_places(list(entries)).items():
        colour, marker = entries[name]
        y = (height - 0.16 - 0.22 * row) / height
        figure.add_artist(
            Line2D(
                [x / width, (x + _LINE / 2) / width, (x + _LINE) / width], [y] * 3, color=colour, lw=1.6, marker=marker,
                ms=4.6, mec=figures._PAPER, mew=0.6, markevery=[1], transform=figure.transFigure,
            )
        )  # fmt: skip
        figure.text(
            (x + _LINE + 0.08) / width,
            y,
            figures._short(name),
            color=colour,
            fontweight="bold",
            va="center",
            fontsize=9.5,
        )


def legend_inches(names: Sequence[str]) -> float:
    """The height that `legend` takes above the first panel, with room for a panel's title."""
    return 0.24 + 0.22 * (1 + max(row for _, row in _legend_places(names).values())) + 0.24


def _legend_places(names: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Where each entry begins (inches from the left) and its line, from 0."""
    x, row, places = _LEFT, 0, {}
    for name in names:
        width = _LINE + 0.08 + figures._text_width([figures._short(name)]) * 0.88
        if x + width > figures._WIDTH and x > _LEFT:
            x, row = _LEFT, row + 1
        places[name] = (x, row)
        x += width + _GAP
    return places


def finished(figure: Any, name: str, label: str, caption: str, columns: Sequence[str], rows: Any) -> Chart:
    """The chart of a figure that is drawn; the figure's colours are those of white paper afterwards."""
    svg = figures._svg(figure, name, label)
    return Chart(name, svg, _png(figure), caption, tuple(columns), rows)


def _png(figure: Any) -> bytes:
    """The figure in the page's colours on white paper."""
    from matplotlib.colors import to_hex, to_rgba_array

    paper = _paper_colours()
    for artist in figure.findobj():
        for name in _PROPERTIES:
            get, put = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if get is None or put is None:
                continue
            value = get()
            if isinstance(value, str) and value in ("auto", "none"):
                continue
            rgba = to_rgba_array(value)
            if len(rgba) and to_hex(rgba[0]) in paper:
                put((*paper[to_hex(rgba[0])], rgba[0][3]))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DOTS, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _paper_colours() -> dict[str, tuple[float, float, float]]:
    """Red, green and blue on white paper of each stand-in colour, as the page's style says."""
    from matplotlib.colors import to_rgb

    light = PAGE_STYLE[: PAGE_STYLE.index("@media")]
    values = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", light))
    return {stand_in: to_rgb(values[variable]) for stand_in, variable in figures._VARIABLES.items()}
