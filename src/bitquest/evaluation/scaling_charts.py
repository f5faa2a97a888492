"""What follows from a scaling law, drawn: loss against size, bytes at a loss, efficiency by bits, loss at equal bytes.

Formats are coloured alike in all charts; a line is dashed where the law was not fitted to such sizes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitquest.evaluation import figures
from bitquest.evaluation.charts import Chart, finished, legend, legend_inches, panels
from bitquest.evaluation.plan_models import TABLE_BITS, Shapes, packed_bytes, why_not_packed
from bitquest.evaluation.runs import CurvePoint
from bitquest.evaluation.scaling_fitted import FittedLaw, short_count
from bitquest.evaluation.scaling_runs import UNQUANTIZED, ScalingRun, pooled

Floats = NDArray[np.float64]

_DASHED = (0, (4, 2.5))
_NEAR = 0.15  # runs whose tokens per parameter differ by less than this share are drawn beside a line
_WIDE = 4096  # width of the layer whose bits per weight are counted
_BEYOND = 10.0  # sizes are drawn up to so many times beyond the fit


@dataclass(frozen=True)
class Drawn:
    """What is drawn: a law, the formats (at most figures.SERIES and the unquantized one), tokens per parameter."""

    law: FittedLaw
    formats: tuple[str, ...]
    tokens_per_parameter: float
    vocabulary: int = 32_000

    @property
    def styles(self) -> dict[str, tuple[str, str]]:
        """Colour and marker of every format."""
        styles, number = {}, 0
        for name in self.formats:
            if name == UNQUANTIZED:
                styles[name] = (figures._INK, figures._MARKERS[0])
            else:
                styles[name] = (f"#0102{number % figures.SERIES:02x}", figures._MARKERS[1 + number % 8])
                number += 1
        return styles

    @property
    def counted(self) -> tuple[str, ...]:
        """The drawn formats, then the law's rotated ones that are not: CSV files and the front have all of these."""
        return tuple(dict.fromkeys((*self.formats, *rotated(self.law))))

    @property
    def left_out(self) -> str:
        """A sentence that names what is counted and not drawn; empty where there is none."""
        names = self.counted[len(self.formats) :]
        return f"Not drawn, but in the CSV and the front (--formats draws them): {', '.join(names)}." if names else ""

    def losses(self, sizes: Floats, format_name: str) -> Floats:
        """Expected losses at these N."""
        law = self.law.law
        efficiency, _ = self.law.efficiency(format_name)
        tokens = sizes * self.tokens_per_parameter
        return np.asarray(law.a / (sizes * efficiency) ** law.alpha + law.b / tokens**law.beta + law.e)

    def inside(self, sizes: Floats) -> NDArray[np.bool_]:
        """Which N the law was fitted to, give or take a tenth."""
        low, high = self.law.range.parameters
        return np.asarray((sizes >= low / 1.1) & (sizes <= high * 1.1))


def rotated(law: FittedLaw) -> tuple[str, ...]:
    """The reference and the rotated formats of a law that can be packed, in its order."""
    return tuple(
        name
        for name in law.efficiencies
        if name == law.reference or ("norot" not in name and why_not_packed(name) is None)
    )


def scaling_charts(drawn: Drawn, runs: Sequence[ScalingRun] = ()) -> list[Chart]:
    """All four charts (three where no plain family of formats is there); `runs` are marked in the first one."""
    charts = loss_against_size(drawn, runs), size_at_loss(drawn), efficiency_by_bits(drawn.law), equal_memory(drawn)
    return [chart for chart in charts if chart is not None]


def loss_against_size(drawn: Drawn, runs: Sequence[ScalingRun] = ()) -> Chart:
    """Loss against N at so many tokens per parameter; marks are runs with about as many."""
    low, high = drawn.law.range.parameters
    sizes = np.geomspace(low / 1.5, high * _BEYOND, 80)
    ratio = drawn.tokens_per_parameter
    shown = [run for run in pooled(runs) if abs(run.tokens / run.parameters / ratio - 1) <= _NEAR]
    rows: list[tuple[Any, ...]] = []
    right = figures._text_width([figures._short(name) for name in drawn.styles]) + 0.3
    with panels(1, 1, height=4.3, top=0.15, right=right) as (figure, [[axes]]):
        axes.set_xscale("log")
        ends = []
        for name in drawn.counted:
            losses, inside = drawn.losses(sizes, name), drawn.inside(sizes)
            rows += [
                ("law", name, float(n), float(n) * ratio, float(loss)) for n, loss in zip(sizes, losses, strict=True)
            ]
            marks = [run for run in shown if run.format == name]
            rows += [("run", name, run.parameters, run.tokens, run.loss) for run in marks]
            if name not in drawn.styles:
                continue
            colour, marker = drawn.styles[name]
            _line(axes, sizes, losses, inside, colour)
            x, y = [run.parameters for run in marks], [run.loss for run in marks]
            axes.plot(x, y, marker, color=colour, ms=5.5, mec=figures._PAPER, mew=0.6)
            ends.append((CurvePoint(sizes[-1], float(losses[-1])), figures._short(name), colour))
        axes.set_xlim(sizes[0], sizes[-1])
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom - 0.08 * (top - bottom), top)  # room for the lowest labels
        _counts(axes)
        axes.set_xlabel("parameters without token table and head")
        axes.set_ylabel("loss, nats per token", labelpad=3)
        figures._label_ends(axes, ends)
        caption = f"Expected loss at {ratio:g} tokens per parameter; dashed beyond the sizes of the fit." + (
            f" Marks: runs with about as many ({sum(run.format in drawn.styles for run in shown)})." if shown else ""
        )
        caption = f"{caption} {drawn.left_out}".rstrip()
        return finished(
            figure, "loss-against-size", "Loss against size", caption, ("kind", "format", "N", "tokens", "loss"), rows
        )


def size_at_loss(drawn: Drawn) -> Chart:
    """Packed bytes against loss, a panel for each width of the tables; the front is what no other format undercuts."""
    shapes = Shapes.proportional(drawn.vocabulary)
    n = shapes.parameters.astype(float)
    low, high = drawn.law.range.parameters
    shown = np.flatnonzero((n >= low / 3) & (n <= high * _BEYOND))
    rows: list[tuple[Any, ...]] = []
    names = list(drawn.styles)
    with panels(1, len(TABLE_BITS), height=3.6, top=legend_inches(names) + 0.1) as (figure, [line]):
        legend(figure, drawn.styles)
        everything = []
        for axes, bits in zip(line, TABLE_BITS, strict=True):
            axes.set_xscale("log")
            lines = _sizes_and_losses(drawn, shapes, bits)
            winners = _winners(lines)
            for name, (size, loss) in lines.items():
                x, y = size[shown] / 1e6, loss[shown]
                if name in drawn.styles:
                    _line(axes, x, y, drawn.inside(n[shown]), drawn.styles[name][0])
                    everything += list(zip(x, y, strict=True))
                rows += [
                    (bits, name, int(size[i]), int(n[i]), float(loss[i]), "yes" if winners[name][i] else "no")
                    for i in shown
                ]
            axes.set_title(f"tables in {bits} bits", loc="left", fontsize=10, color=figures._MUTED)
            _megabytes(axes)
        sizes, losses = zip(*everything, strict=True)
        for axes in line:
            axes.set_xlim(min(sizes), max(sizes))
            axes.set_ylim(min(losses) - 0.03 * (max(losses) - min(losses)), max(losses))
        line[0].set_ylabel("loss, nats per token", labelpad=3)
        line[1].set_xlabel("packed size, token table and head included")
        caption = (
            "Lower and further left is better: the lowest line at a size is the format to take. "
            f"Token table and head of {drawn.vocabulary:,} words; {drawn.tokens_per_parameter:g} tokens per parameter; "
            f"dashed beyond the fit. {drawn.left_out}".rstrip()
        )
        return finished(
            figure, "size-at-loss", "Packed size against loss", caption,
            ("table_bits", "format", "bytes", "N", "loss", "on_front"), rows,
        )  # fmt: skip


def on_some_front(drawn: Drawn) -> set[str]:
    """The counted formats that no other undercuts at some size, with tables of some width."""
    shapes = Shapes.proportional(drawn.vocabulary)
    n = shapes.parameters.astype(float)
    low, high = drawn.law.range.parameters
    near = (n >= low / 3) & (n <= high * _BEYOND)
    found: set[str] = set()
    for bits in TABLE_BITS:
        lines = _sizes_and_losses(drawn, shapes, bits)
        found |= {name for name, best in _winners(lines).items() if (np.array(best) & near).any()}
    return found


def efficiency_by_bits(law: FittedLaw) -> Chart:
    """eff(P) per stored bit of a weight, with intervals; lines join formats that differ in width alone."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for name in law.efficiencies:
        if why_not_packed(name) is not None:
            continue
        bits = stored_bits(name)
        groups.setdefault(_family(name), []).append((bits, name))
    groups = dict(sorted(groups.items(), key=lambda pair: pair[0] != "unquantized"))
    rows: list[tuple[Any, ...]] = []
    with panels(1, 1, height=4.0, top=legend_inches(list(groups)), right=0.3) as (figure, [[axes]]):
        axes.set_xscale("log", base=2)
        styles = {}
        for number, (family, members) in enumerate(groups.items()):
            colour, marker = f"#0102{(number - 1) % figures.SERIES:02x}", figures._MARKERS[number % 9]
            colour = figures._INK if members[0][1] == UNQUANTIZED else colour
            styles[family] = (colour, marker)
            members.sort()
            x = [bits * 2 ** (0.012 * (number - 1)) for bits, _ in members]  # side by side where widths are the same
            y = [law.efficiencies[name] / bits for bits, name in members]
            axes.plot(x, y, color=colour, lw=1.5, marker=marker, ms=6, mec=figures._PAPER, mew=0.6)
            for place, (bits, name) in zip(x, members, strict=True):
                interval = law.efficiency_interval(name)
                if interval is not None:
                    axes.plot([place, place], [end / bits for end in interval], color=colour, lw=1.1, alpha=0.75)
                eff = law.efficiencies[name]
                rows.append((name, bits, eff, *(interval or (None, None)), eff / bits))
        legend(figure, styles)
        axes.set_ylim(0, None)
        ticks = (1, 2, 3, 4, 8, 16)
        axes.set_xticks(ticks, [str(bits) for bits in ticks])
        axes.minorticks_off()
        axes.set_xlabel("stored bits of a weight")
        axes.set_ylabel("eff(P) / bits of a weight", labelpad=3)
        caption = (
            "How much one stored bit is worth. WbAb: weights and activations of equal width; WbA16: weights alone. "
            "Bars: 95 % intervals. A sparse weight's mask is counted."
        )
        return finished(
            figure, "efficiency", "Efficiency per bit", caption,
            ("format", "bits_per_weight", "eff", "low", "high", "eff_per_bit"), rows,
        )  # fmt: skip


def equal_memory(drawn: Drawn, table_bits: int = 8) -> Chart | None:
    """Least loss of each width at fixed packed bytes, a panel for each family of formats; None without any."""
    shapes = Shapes.candidates(drawn.vocabulary)
    n = shapes.parameters.astype(float)
    families = {_family(name) for name in drawn.law.efficiencies}
    titles = {family: title for family, title in _PANELS.items() if family in families}
    names = [name for name in drawn.law.efficiencies if _family(name) in (*titles, "unquantized")]
    low, high = drawn.law.range.parameters
    budgets = _budgets(drawn.vocabulary, low, high)
    rows: list[tuple[Any, ...]] = []
    found: dict[tuple[str, float], tuple[float, float]] = {}
    for name in names:
        bits = 16 if name == UNQUANTIZED else table_bits
        total, losses = packed_bytes(shapes, name, bits).total, drawn.losses(n, name)
        for budget in budgets:
            fits = np.flatnonzero(total <= budget)
            if fits.size:
                best = fits[np.argmin(losses[fits])]
                found[name, budget] = float(losses[best]), float(n[best])
                rows.append((name, stored_bits(name), int(budget), int(n[best]), float(losses[best])))
    if not titles or not found:
        return None
    budgets = [budget for budget in budgets if any((name, budget) in found for name in names)]
    styles = {
        _size(budget): (f"#0102{number % figures.SERIES:02x}", figures._MARKERS[number % 9])
        for number, budget in enumerate(budgets)
    }
    everything = [loss for loss, _ in found.values()]
    with panels(1, len(titles), height=3.7, top=legend_inches(list(styles)), right=0.3) as (figure, [line]):
        legend(figure, styles)
        for axes, (family, title) in zip(line, titles.items(), strict=True):
            members = sorted(
                (round(stored_bits(name)), name) for name in names if name == UNQUANTIZED or _family(name) == family
            )
            for budget in budgets:
                colour, marker = styles[_size(budget)]
                points = [(bits, *found[name, budget]) for bits, name in members if (name, budget) in found]
                if not points:
                    continue
                x, y, size = (np.array(column) for column in zip(*points, strict=True))
                axes.plot(x, y, color=colour, lw=1.4)
                for inside in (True, False):
                    marked = drawn.inside(size) == inside
                    face = colour if inside else figures._PAPER
                    axes.plot(x[marked], y[marked], marker, ms=6, color=colour, mfc=face, mec=colour, mew=1.1)
            axes.set_xscale("log", base=2)
            axes.set_title(title, loc="left", fontsize=10, color=figures._MUTED)
            ticks = sorted({bits for bits, _ in members})
            axes.set_xticks(ticks, [str(bits) for bits in ticks])
            axes.minorticks_off()
            axes.set_xlabel("bits of a weight")
            margin = 0.05 * (max(everything) - min(everything))
            axes.set_ylim(min(everything) - margin, max(everything) + margin)
        line[0].set_ylabel("loss, nats per token", labelpad=3)
        caption = (
            f"Loss of the best model that fits, by width, at equal packed size (tables in {table_bits} bits, "
            f"{drawn.vocabulary:,} words). Hollow marks: sizes beyond the fit."
        )
        return finished(
            figure, "equal-memory", "Loss at equal memory", caption, ("format", "bits", "bytes", "N", "loss"), rows
        )


def stored_bits(format_name: str) -> float:
    """Bits that a weight takes packed, mask included, scales of rows left out."""
    one = Shapes(np.array([_WIDE]), np.array([_WIDE]), np.array([1]), 2)
    weights = packed_bytes(one, format_name, 16).blocks[0] - 12 * _WIDE
    per_weight = 8 * float(weights) / (7 * _WIDE * _WIDE)
    return round(per_weight, 1)


_PANELS = {"WbAb": "weights and activations", "WbA16": "weights alone", "WbA8": "weights, 8-bit activations"}


def _family(format_name: str) -> str:
    """What a format is called once its width is left out."""
    head, *rest = format_name.partition("@")[0].split("-")
    if head == UNQUANTIZED:
        return "unquantized"
    weight, _, activation = head[1:].partition("a")
    kind = "WbAb" if weight == activation else f"WbA{activation}"
    recipe = format_name.partition("@")[2]
    extra = ["no rotation" if part == "norot" else part.upper() for part in rest] + ([recipe] if recipe else [])
    return ", ".join([kind, *extra])


def _line(axes: Any, x: Floats, y: Floats, inside: NDArray[np.bool_], colour: str) -> None:
    """Solid where the law was fitted, dashed elsewhere, joined."""
    for start, stop in _stretches(inside):
        style = "-" if inside[start] else _DASHED
        axes.plot(x[start : stop + 1], y[start : stop + 1], color=colour, lw=1.5 if inside[start] else 1.1, ls=style)


def _stretches(inside: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    start = 0
    for place in range(1, inside.size + 1):
        if place == inside.size or inside[place] != inside[start]:
            yield start, place
            start = place


def _sizes_and_losses(drawn: Drawn, shapes: Shapes, table_bits: int) -> dict[str, tuple[Floats, Floats]]:
    """Packed bytes and expected losses of the shapes, both (C,), in every counted format."""
    n = shapes.parameters.astype(float)
    return {
        name: (packed_bytes(shapes, name, table_bits).total.astype(float), drawn.losses(n, name))
        for name in drawn.counted
    }


def _winners(lines: Mapping[str, tuple[Floats, Floats]]) -> dict[str, list[bool]]:
    """Which points of each format's line (size, loss) no other line undercuts at the same size; interpolated."""
    found = {}
    for name, (size, loss) in lines.items():
        others = [
            np.interp(np.log(size), np.log(s), v, left=np.inf) for other, (s, v) in lines.items() if other != name
        ]
        found[name] = [bool(best) for best in np.all([loss <= other for other in [loss, *others]], 0)]
    return found


def _budgets(vocabulary: int, low: float, high: float) -> list[float]:
    """Five round sizes between small few-bit models and large ones with more bits."""
    table = vocabulary * 1024.0
    ends = max(low / 3, table / 4), high * 3
    exponents = np.linspace(np.log10(ends[0]), np.log10(ends[1]), 5)
    return [float(f"{10**exponent:.1g}") for exponent in exponents]


def _size(value: float) -> str:
    return f"{value / 1e9:g} GB" if value >= 1e9 else f"{value / 1e6:g} MB"


def _counts(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _megabytes(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value * 1e6)))
    axes.xaxis.set_minor_formatter(NullFormatter())
