"""Charts of looks (training/look.py, training/diagnose.py): of one model's layers, of one run and of several.

A look is a record of kind `diagnose`. Runs of one name are seeds of one thing: their mean is drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from bitquest.evaluation import figures
from bitquest.evaluation.charts import Chart, finished, legend, legend_inches, panels
from bitquest.evaluation.runs import CurvePoint, RunSummary, grouped

Look = Mapping[str, Any]

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_READERS = {"q_proj": "q, k, v", "gate_proj": "gate, up"}  # whose input the others of a block share
_FIGURES = ("alignment", "error", "excess", "masked", "expected_masked", "persistent", "kurtosis", "step", "drift",
            "spread", "flipped", "returned")  # fmt: skip

_WIDEST_LABELS = 2.4  # inches; longer names stand above the panels

# key of a look's summary, title of its panel, whether it is a share
_SERIES = (
    ("alignment_bottom", "alignment at the bottom block", False),
    ("alignment_weights", "alignment of weights, mean of blocks", False),
    ("excess_weights", "error of weights / Gaussian optimum", False),
    ("excess_inputs", "error of inputs / Gaussian optimum", False),
    ("masked_weights", "weights masked", True),
    ("masked_inputs", "inputs masked", True),
    ("persistent_weights", "masked weights that were masked before", True),
    ("persistent_inputs", "masked inputs that were masked before", True),
    ("drift_weights", "drift of weights' Δ, log2", False),
    ("drift_inputs", "drift of inputs' Δ, log2", False),
    ("flipped", "weight codes flipped since the last look", True),
    ("returned", "weight codes turned back", True),
)


def diagnostic_charts(runs: Sequence[RunSummary]) -> list[Chart]:
    """Charts of the runs that have looks, for a report: alignment block by block, and everything over steps."""
    groups = grouped([run for run in runs if run.looks])
    if not groups:
        return []
    styles = dict(zip(groups, figures._styles(groups), strict=True))
    looks = {name: [list(run.looks) for run in group] for name, group in groups.items()}
    charts = [alignment_chart({name: [seed[-1] for seed in seeds] for name, seeds in looks.items()}, styles)]
    return [chart for chart in (*charts, series_chart(looks, styles)) if chart is not None]


def style_of(scheme: str) -> tuple[str, str]:
    """Colour and marker of a run that is drawn alone."""
    return figures._styles({scheme: [RunSummary(scheme, scheme)]})[0]


def alignment_chart(looks: Mapping[str, Sequence[Look]], styles: Mapping[str, tuple[str, str]]) -> Chart | None:
    """Cosine with the unquantized gradient, from the top block to the bottom; a line per name, the mean of looks."""
    lines = {name: {part: _block_means(group, part) for part in ("output", "weights")} for name, group in looks.items()}
    points = [value for parts in lines.values() for line in parts.values() for value in line if value is not None]
    if not points:
        return None
    blocks = max(len(line["output"]) for line in lines.values())
    low = min(points)
    right = figures._text_width([f"{figures._short(name)}  0.000" for name in looks]) + 0.25
    beside_lines = right < _WIDEST_LABELS and len(looks) <= 8
    top, right = (0.42, right) if beside_lines else (legend_inches(list(looks)), 0.15)
    with panels(1, 2, height=2.9, top=top, right=right) as (figure, ((left, beside),)):
        if not beside_lines:
            legend(figure, {name: styles[name] for name in looks})
        for axes, part, title in (
            (left, "output", "cosine of ∂L/∂h, h a block's output"),
            (beside, "weights", "cosine of ∂L/∂W of a block"),
        ):
            _title(axes, title)
            axes.set_xlim(-0.15, max(blocks - 1, 1) + 0.15)
            axes.set_ylim(low - 0.06 * (1.02 - low) - 0.005, 1.0 + 0.04 * (1.02 - low))
            _ticks(axes, blocks, lambda depth: str(blocks - depth))
            axes.set_xlabel("block, from the top down")
            ends = []
            for name, parts in lines.items():
                colour, marker = styles[name]
                xy = [(depth, value) for depth, value in enumerate(reversed(parts[part])) if value is not None]
                axes.plot(
                    *zip(*xy, strict=True), color=colour, lw=1.7, marker=marker, ms=5, mec=figures._PAPER, mew=0.6
                )
                ends.append((CurvePoint(*xy[-1]), f"{figures._short(name)}  {xy[-1][1]:.3f}", colour))
            if axes is beside and beside_lines:
                figures._label_ends(axes, ends)
        rows = [
            (name, number + 1, parts["output"][number], parts["weights"][number])
            for name, parts in lines.items()
            for number in range(len(parts["output"]))
        ]
        return finished(
            figure,
            "alignment",
            "Alignment with the unquantized gradient, block by block",
            "Cosine between the gradient of the quantized model and that of the same weights with quantization off, on "
            f"the same held-out batch. Left: at the output of each block; right: of the block's weights{_last(looks)}. "
            "The backward pass begins at the top.",
            ("run", "block", "output", "weights"),
            rows,
        )


def series_chart(looks: Mapping[str, Sequence[Sequence[Look]]], styles: Mapping[str, tuple[str, str]]) -> Chart | None:
    """The summaries of looks over steps: a panel for each quantity, a line per name; None where nobody looked twice."""
    lines = {
        key: {name: line for name, seeds in looks.items() if len(line := _mean_series(seeds, key)) > 1}
        for key, _, _ in _SERIES
    }
    shown = [(key, title, share) for key, title, share in _SERIES if lines[key]]
    names = [name for name in looks if any(name in lines[key] for key, _, _ in shown)]
    if not shown:
        return None
    count = -(-len(shown) // 2)
    last = max(look["step"] for seeds in looks.values() for series in seeds for look in series)
    with panels(count, 2, height=1.35, top=legend_inches(names), right=0.15) as (figure, grid):
        legend(figure, {name: styles[name] for name in names})
        for number, (key, title, share) in enumerate(shown):
            axes = grid[number // 2][number % 2]
            _title(axes, title)
            for name, line in lines[key].items():
                colour, marker = styles[name]
                axes.plot(
                    *zip(*line, strict=True), color=colour, lw=1.5, marker=marker, ms=3.6, mec=figures._PAPER, mew=0.5
                )
            _numbers(axes, share, [value for line in lines[key].values() for _, value in line])
            axes.set_xlim(-0.02 * last, 1.02 * last)
            if number >= len(shown) - 2:
                axes.set_xlabel("step")
        if len(shown) % 2:
            figure.delaxes(grid[-1][-1])
        keys = [key for key, _, _ in shown]
        rows = [
            (name, seed, look["step"], *(look.get(key) for key in keys))
            for name, seeds in looks.items()
            for seed, series in enumerate(seeds)
            for look in series
        ]
        return finished(
            figure,
            "series",
            "Diagnostics over training steps",
            "Means over all elements of weights and of inputs, on the same held-out batch at every look. A flip is a "
            "code that differs from that at the last look; one that turns back moves against its last change.",
            ("run", "number", "step", *keys),
            rows,
        )


def layers_chart(look: Look) -> Chart | None:
    """Every layer of one look: error, masks and kurtosis of weights and inputs, block by block; None of no layer."""
    operands = [(part, name) for part in ("weights", "inputs") for name in look[part] if "error" in look[part][name]]
    kinds = [kind for kind in KINDS if any(name.endswith(f".{kind}") for _, name in operands)]
    if not kinds:
        return None
    styles = {kind: (f"#0102{KINDS.index(kind):02x}", figures._MARKERS[KINDS.index(kind)]) for kind in kinds}
    parts = [part for part in ("weights", "inputs") if any(p == part for p, _ in operands)]
    shown = [
        ("excess", "error / Gaussian optimum", False),
        ("masked", "masked", True),
        ("kurtosis", "excess kurtosis", False),
    ]
    names = {kind.removesuffix("_proj"): style for kind, style in styles.items()}
    blocks = len(look["blocks"])
    with panels(len(shown), len(parts), height=1.7, top=legend_inches(list(names)), right=0.15) as (figure, grid):
        legend(figure, names)
        for row, (key, title, share) in enumerate(shown):
            for column, part in enumerate(parts):
                axes, values = grid[row][column], []
                _title(axes, f"{part}: {title}")
                for kind, (colour, marker) in styles.items():
                    line = [(block, entry[key]) for block, entry in _entries(look[part], kind)]
                    values += [value for _, value in line]
                    if line:
                        axes.plot(
                            *zip(*line, strict=True),
                            color=colour,
                            lw=1.3,
                            marker=marker,
                            ms=4.6,
                            mec=figures._PAPER,
                            mew=0.6,
                        )
                _reference(axes, key, look[part], values)
                _numbers(axes, share, values)
                axes.set_xlim(0.85, max(blocks, 2) + 0.15)
                _ticks(axes, blocks, str, first=1)
                if row == len(shown) - 1:
                    axes.set_xlabel("block, from the bottom up")
        shared = "; ".join(f"{who}, shown as {kind.removesuffix('_proj')}" for kind, who in _READERS.items())
        columns = [key for key in _FIGURES if any(look[part][name].get(key) is not None for part, name in operands)]
        rows = [(part, name, *(look[part][name].get(key) for key in columns)) for part, name in operands]
        return finished(
            figure,
            "layers",
            "Quantization of every layer",
            "Squared error of each operand relative to its own square, over the least that its grid can do for "
            "Gaussian values (dashed: that); the share of elements whose gradient is masked (dashed: expected of "
            "Gaussian values); and how heavy the tails are (dashed: Gaussian). Layers that read one tensor share its "
            f"quantization: {shared}.",
            ("operand", "layer", *columns),
            rows,
        )


def _entries(layers: Mapping[str, Any], kind: str) -> list[tuple[int, Any]]:
    """(block from 1, figures) of every layer of a kind that is quantized."""
    found = [
        (name.split("."), entry) for name, entry in layers.items() if name.endswith(f".{kind}") and "error" in entry
    ]
    return [(int(words[2]) + 1, entry) for words, entry in found]


def _reference(axes: Any, key: str, layers: Mapping[str, Any], values: list[float]) -> None:
    """A dashed line at what a Gaussian would give, where it is known; `values` then has it too."""
    expected = {entry["expected_masked"] for entry in layers.values() if entry.get("expected_masked") is not None}
    level = {"excess": 1.0, "kurtosis": 0.0}.get(key, next(iter(expected)) if len(expected) == 1 else None)
    if level is not None and values:
        axes.axhline(level, color=figures._MUTED, lw=1, ls=(0, (4, 3)), zorder=1.5)
        values.append(level)


def _block_means(looks: Sequence[Look], part: str) -> list[float | None]:
    """The mean of each block's cosine, from the bottom up."""
    columns = zip(*([block[part] for block in look["blocks"]] for look in looks), strict=False)
    return [fmean(known) if (known := [v for v in column if v is not None]) else None for column in columns]


def _mean_series(seeds: Sequence[Sequence[Look]], key: str) -> list[tuple[int, float]]:
    """(step, mean) at every step for which all seeds have a number."""
    tables = [{look["step"]: look[key] for look in seed if look.get(key) is not None} for seed in seeds]
    shared = [step for step in tables[0] if all(step in table for table in tables)] if tables else []
    return [(step, fmean(table[step] for table in tables)) for step in shared]


def _last(looks: Mapping[str, Sequence[Look]]) -> str:
    steps = {look["step"] for group in looks.values() for look in group}
    return f", after step {next(iter(steps))}" if len(steps) == 1 else ""


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=figures._INK, pad=7)


def _ticks(axes: Any, blocks: int, label: Callable[[int], str], first: int = 0) -> None:
    """A tick at every block, or at as many as there is room for."""
    places = [first + place for place in range(0, blocks, -(-blocks // 8))]
    axes.set_xticks(places, [label(place) for place in places])


def _numbers(axes: Any, share: bool, values: Sequence[float]) -> None:
    """Limits that leave room around all values, per cent for shares, and a logarithmic scale over wide ranges."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    low, high = min(values, default=0.0), max(values, default=1.0)
    if not share and low > 0 and high > 20 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.6, high * 1.6)
        return
    room = 0.12 * (high - low) or 0.05 * abs(high) or 0.01
    axes.set_ylim(max(low - room, -0.002 if share and low >= 0 else low - room), high + room)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
