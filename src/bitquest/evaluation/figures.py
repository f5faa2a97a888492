"""The charts of a report, as SVG text that sits inside an HTML page and takes its colours from the page's style.

Matplotlib draws with stand-in colours; each becomes a CSS variable (`var(--ink)`, `var(--series-3)`), so that one
drawing serves light and dark pages. Lines are labelled where they end; no legend has to be decoded.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from bitquest.errors import MissingExtraError
from bitquest.evaluation.report_page import printable
from bitquest.evaluation.runs import CurvePoint, RunSummary, grouped, mean

SERIES = 9
_INK, _MUTED, _GRID, _PAPER = "#010101", "#010102", "#010103", "#010104"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid", _PAPER: "--paper"} | {
    f"#0102{number:02x}": f"--series-{number}" for number in range(SERIES)
}
_MARKERS = "osD^v<>ph"
_WIDTH = 8.6  # inches, at 72 SVG units each


def require_matplotlib() -> None:
    """Raise MissingExtraError if charts cannot be drawn; for asking before hours of training."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "science", "the report's charts") from None


def loss_curves(runs: Sequence[RunSummary]) -> str:
    """Loss against steps as SVG; '' without points."""
    with loss_figure(runs) as figure:
        return "" if figure is None else _svg(figure, "loss", "Loss against training steps")


@contextmanager
def loss_figure(runs: Sequence[RunSummary]) -> Iterator[Any]:
    """Loss against steps: smoothed training loss as thin lines, validation loss as marked points; None without any."""
    groups = {name: group for name, group in grouped(list(runs)).items() if any(_points(run) for run in group)}
    if not groups:
        yield None
        return
    right = _text_width([f"{_short(name)}  00.000" for name in groups]) + 0.35
    with _axes(4.4, right=right) as (figure, axes):
        from matplotlib.ticker import MaxNLocator

        ends: list[tuple[CurvePoint, str, str]] = []
        last = max(point.step for group in groups.values() for run in group for point in _points(run))
        for (name, group), (colour, marker) in zip(groups.items(), _styles(groups), strict=True):
            for run in group:
                smooth = smoothed(run.train_curve)
                axes.plot(*_xy(smooth), color=colour, lw=0.9, alpha=0.45, solid_joinstyle="round")
            good = [run for run in group if not run.diverged]
            validation = _mean_curve([run.validation_curve for run in good])
            axes.plot(*_xy(validation), color=colour, lw=1.7, marker=marker, ms=4.2, mec=_PAPER, mew=0.6)
            end = _end(good or group)
            ends.append((end, f"{_short(name)}  {f'{end.loss:.3f}' if good else 'diverged'}", colour))
        everything = [run for group in groups.values() for run in group]
        axes.set_ylim(*_loss_range([run for run in everything if not run.diverged] or everything, last))
        axes.set_xlim(0, last * 1.015)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        _label_ends(axes, ends)
        yield figure


def size_against_loss(runs: Sequence[RunSummary], baselines: Mapping[str, float] | None = None) -> str:
    """Packed size against bits per byte as SVG; '' if there are not two to compare."""
    with size_figure(runs, baselines) as figure:
        return "" if figure is None else _svg(figure, "size", "Packed size against bits per byte")


@contextmanager
def size_figure(runs: Sequence[RunSummary], baselines: Mapping[str, float] | None = None) -> Iterator[Any]:
    """Packed megabytes (logarithmic) against bits per byte, a mark per name; None if there are not two to compare."""
    groups = {}
    for name, group in grouped(list(runs)).items():
        size = mean([run.packed_mb for run in group if run.packed_mb is not None])
        bits = mean([run.bits_per_byte for run in group if run.bits_per_byte is not None])
        if size and bits:
            groups[name] = (size, bits)
    if not groups or len(groups) + len(baselines or {}) < 2:
        yield None
        return
    colours = dict(zip(grouped(list(runs)), _styles(grouped(list(runs))), strict=True))
    right = _text_width([_short(max(groups, key=lambda name: groups[name][0]))]) + 0.2
    with _axes(4.2, right=right) as (figure, axes):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        sizes = [size for size, _ in groups.values()]
        values = [bits for _, bits in groups.values()] + list((baselines or {}).values())
        margin = 0.12 * (max(values) - min(values) or 0.2)
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.35, max(sizes) * 1.35)
        axes.set_ylim(min(values) - margin, max(values) + margin)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("packed size, MB (embedding and head included)")
        axes.set_ylabel("bits per byte, validation")
        for name, bits in (baselines or {}).items():
            axes.axhline(bits, color=_MUTED, lw=1, ls=(0, (4, 3)))
            axes.annotate(
                f"{_short(name)}  {bits:.3f}", (1, bits), xycoords=("axes fraction", "data"), xytext=(-2, 4),
                textcoords="offset points", ha="right", color=_MUTED, fontsize=9.5,
            )  # fmt: skip
        points = {name: axes.transData.transform(place) * 72 / figure.dpi for name, place in groups.items()}
        places = place_labels([(x, y, _short(name)) for name, (x, y) in points.items()])
        for (name, (size, bits)), (dx, dy, side) in zip(groups.items(), places, strict=True):
            colour, marker = colours[name]
            axes.plot([size], [bits], marker, color=colour, ms=8, mec=_PAPER, mew=0.8)
            axes.annotate(
                _short(name), (size, bits), xytext=(dx, dy), textcoords="offset points", ha=side, va="center",
                color=colour, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
        yield figure


def seed_spread(runs: Sequence[RunSummary]) -> str:
    """Final validation loss of every seed, a row per name with its mean as a bar; '' unless a name has two of them."""
    groups = {
        name: sorted(run.val_loss for run in group if run.val_loss is not None and not run.diverged)
        for name, group in grouped(list(runs)).items()
    }
    groups = {name: losses for name, losses in groups.items() if losses}
    if max((len(losses) for losses in groups.values()), default=0) < 2:
        return ""
    colours = dict(zip(grouped(list(runs)), _styles(grouped(list(runs))), strict=True))
    left = _text_width([_short(name) for name in groups]) + 0.25
    with _axes(1.0 + 0.36 * len(groups) + 0.5 * (len(groups) == 1), left=left, grid="both") as (figure, axes):
        for row, (name, losses) in enumerate(groups.items()):
            colour, marker = colours[name]
            # neighbours in value take turns above and below the row's line, so that equal ones stay visible
            offsets = [0.18 * (1, -1, 0.4, -0.4)[i % 4] if len(losses) > 3 else 0 for i in range(len(losses))]
            heights = [row + offset for offset in offsets]
            axes.plot(losses, heights, marker, color=colour, ms=6.5, alpha=0.75, mec=_PAPER, mew=0.6)
            average = sum(losses) / len(losses)
            axes.plot([average, average], [row - 0.34, row + 0.34], color=colour, lw=2)
        axes.set_yticks(range(len(groups)), [_short(name) for name in groups], color=_INK)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.margins(x=0.06)
        axes.set_xlabel("final validation loss, nats per token (a mark per seed; the bar is the mean)")
        return _svg(figure, "seeds", "Final validation loss of every seed")


def smoothed(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """A moving average over about a twenty-fifth of the points: centred, narrower where the steep curve begins."""
    half = len(points) // 50
    result = []
    for i, point in enumerate(points):
        window = points[i - min(half, i) : i + min(half, i) + 1]
        result.append(CurvePoint(point.step, sum(p.loss for p in window) / len(window)))
    return result


def _points(run: RunSummary) -> Sequence[CurvePoint]:
    return (*run.train_curve, *run.validation_curve)


def _xy(points: Sequence[CurvePoint]) -> tuple[list[int], list[float]]:
    return [p.step for p in points], [p.loss for p in points]


def _mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean at every step that all curves (those with points) share."""
    tables = [{p.step: p.loss for p in curve} for curve in curves if curve]
    shared = [step for step in (tables[0] if tables else {}) if all(step in table for table in tables)]
    return [CurvePoint(step, sum(table[step] for table in tables) / len(tables)) for step in shared]


def _loss_range(runs: Sequence[RunSummary], last: int) -> tuple[float, float]:
    """Limits that leave out the fall of the first steps, beside which every later difference would vanish."""
    curves = [points for run in runs for points in (smoothed(run.train_curve), run.validation_curve)]
    losses = [p.loss for points in curves for p in points]
    late = [p.loss for points in curves for p in points if p.step >= 0.15 * last] or losses
    low, high = min(losses), max(late)
    margin = 0.06 * (high - low or 1)
    return low - margin, high + margin


def _styles(groups: Mapping[str, Sequence[RunSummary]]) -> list[tuple[str, str]]:
    """Colour and marker of every group: ink for the unquantized one, the series for the others in turn."""
    styles, number = [], 0
    for group in groups.values():
        if group[0].scheme == "none":
            styles.append((_INK, _MARKERS[0]))
        else:
            styles.append((f"#0102{number % SERIES:02x}", _MARKERS[(number + 1) % len(_MARKERS)]))
            number += 1
    return styles


def _end(group: Sequence[RunSummary]) -> CurvePoint:
    """Where the lines of a group end: the mean of its runs' last validation losses, or last training losses."""
    finals = [run.validation_curve[-1] for run in group if run.validation_curve]
    finals = finals or [smoothed(run.train_curve)[-1] for run in group if run.train_curve]
    return CurvePoint(max(p.step for p in finals), sum(p.loss for p in finals) / len(finals))


def _label_ends(axes: Any, ends: Sequence[tuple[CurvePoint, str, str]]) -> None:
    """Write a label at the right of every line's end, apart from each other, with a leader to where the line ends."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end[0].loss)
    levels = [min(max(point.loss, low), high) for point, _, _ in ends]
    heights = _spread([_fraction(axes, level) for level in levels], 0.058)
    for (point, text, colour), level, height in zip(ends, levels, heights, strict=True):
        axes.annotate(
            text, (point.step, level), xytext=(1.03, height), textcoords="axes fraction", va="center", color=colour,
            fontweight="bold", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "lw": 0.8, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved as little as possible (least squares) so that neighbours are `gap` apart."""
    blocks: list[list[float]] = []  # pooled adjacent violators of h[i] - i·gap: [sum, count]
    for i, height in enumerate(heights):
        blocks.append([height - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    flat = [total / count for total, count in blocks for _ in range(int(count))]
    return [value + i * gap for i, value in enumerate(flat)]


def _fraction(axes: Any, value: float) -> float:
    bottom, top = axes.get_ylim()
    return float((value - bottom) / (top - bottom))


def place_labels(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Where to write the label of every mark (x, y, label), in points: (dx, dy, "left" or "right" alignment).

    One mark after the other, the first place that touches no mark and no label written before, or else the one that
    touches the fewest: at its right, at its left, then further up and down on both sides.
    """
    marks = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    written: list[tuple[float, float, float, float]] = []
    places: list[tuple[float, float, str]] = []
    for x, y, label in points:
        width = 72 * _text_width([label]) * 0.85
        options: list[tuple[int, int, tuple[float, float, str], tuple[float, float, float, float]]] = []
        for dy in (0, 9, -9, 16, -16, 25, -25):
            for dx, side, left in ((10, "left", x + 10), (-10, "right", x - 10 - width)):
                box = (left, y + dy - 6, left + width, y + dy + 6)
                touched = sum(_overlap(box, other) for other in (*marks, *written))
                options.append((touched, len(options), (dx, dy, side), box))
        _, _, place, box = min(options)
        places.append(place)
        written.append(box)
    return places


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _short(name: str) -> str:
    """A name that fits beside a chart."""
    name = printable(name)
    return name if len(name) <= 28 else name[:27] + "…"


def _text_width(lines: Sequence[str]) -> float:
    """Inches to leave for the longest line: what its letters take in a wide bold font, such as DejaVu Sans."""
    return 0.1 * max(map(len, lines))


@contextmanager
def drawing(height: float) -> Iterator[Any]:
    """An empty figure in the report's style. Text stays text, in the page's font; names are never read as formulas."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.5, "axes.labelsize": 10.5,
        "text.color": _INK, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "axes.edgecolor": _GRID, "grid.color": _GRID, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        yield Figure(figsize=(_WIDTH, height))


def style_axes(axes: Any, grid: Literal["y", "both"] = "y") -> None:
    """Axes as the reports have them: a line below, grid lines behind, no ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(which="both", length=0, pad=6)
    axes.grid(axis=grid, lw=0.8)
    axes.set_axisbelow(True)


@contextmanager
def _axes(
    height: float, *, left: float = 0.75, right: float = 0.15, grid: Literal["y", "both"] = "y"
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes in the report's style; `left` and `right` are inches outside the axes."""
    with drawing(height) as figure:
        bottom, top = 0.54, 0.12
        axes = figure.add_axes(
            (left / _WIDTH, bottom / height, 1 - (left + right) / _WIDTH, 1 - (bottom + top) / height)
        )
        style_axes(axes, grid)
        yield figure, axes


def _family(match: re.Match[str]) -> str:
    return "font-family: var(--sans)" if match[0].startswith("font-family") else "var(--sans)"


def _svg(figure: Any, prefix: str, label: str) -> str:
    """The figure as an <svg> element for an HTML page: no prolog, no metadata, own ids, colours and fonts by CSS."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page has fonts of its own
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font-family: [^;\"]*|(?<=px )'[^;\"]*(?=[;\"])", _family, svg)  # as a property, or inside `font:`
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
