"""The layers under the machine's ceilings: how close each is to what memory and arithmetic allow.

Across: products a layer does for each byte that it must read and write at least once (packed weights, float input and
output). Up: products a second. A slanted line is a bandwidth, a level one an instruction's rate.
"""

from collections.abc import Iterator, Mapping
from math import atan2, degrees
from pathlib import Path
from typing import Any

from bitquest.benchmarks.cpu_timing import PAST_CACHE, WARM
from bitquest.errors import ConfigError
from bitquest.evaluation.figures import require_matplotlib

_INK, _MUTED, _GRID = "#1f2328", "#656d76", "#d8dee4"
# Colours that stay apart for colour-blind readers (Okabe and Ito); shapes differ as well.
_KINDS = {
    "1 bit × 1 or 2": ("#d55e00", "o"),
    "2 to 8 bits, both": ("#0072b2", "s"),
    "8-bit activations": ("#009e73", "D"),
    "weight-only": ("#cc79a7", "^"),
    "torch, float32 and bf16": (_MUTED, "X"),
}
_CEILINGS = {"one_bit": "1 bit, XOR and count", "int8": "int8", "bf16": "bf16", "float32": "float32"}
_LABELLED = ("w1a1", "w4a4", "w1a8", "w8a8", "w1a16")


def kind_of(scheme: str) -> str:
    """The family of a scheme, as the picture groups them."""
    if scheme.endswith("a16"):
        return "weight-only"
    if scheme in ("w1a1", "w1a2"):
        return "1 bit × 1 or 2"
    return "8-bit activations" if scheme in ("w1a8", "w2a8", "w4a8") else "2 to 8 bits, both"


def points(result: Mapping[str, Any], threads: int) -> Iterator[tuple[str, str, str, float, float]]:
    """(kind, scheme, memory, products a byte, products a second) of every measured layer; torch's have no scheme."""
    for name, case in result["cases"].items():
        if case["kind"] != "layer" or case["status"] != "measured":
            continue
        scheme = name.rsplit("-", 1)[0]
        for measured in (row for row in case["rows"] if row["threads"] == threads):
            k, n, tokens = measured["in_features"], measured["out_features"], measured["tokens"]
            products, around = tokens * k * n, 4 * tokens * (k + n)
            for row in measured["rows"]:
                seconds = {who: taken["median_seconds"] for who, taken in row["seconds"].items()}
                ours = seconds.get("engine", seconds["layer"])
                yield (
                    kind_of(scheme),
                    scheme,
                    row["memory"],
                    products / (measured["weight_bytes"] + around),
                    products / ours,
                )
                if scheme == "w1a1":  # torch's do not depend on the case
                    for who, size in (("torch float32", 4), ("torch bf16", 2)):
                        moved = size * (k * n + tokens * (k + n))
                        yield "torch, float32 and bf16", "", row["memory"], products / moved, products / seconds[who]


def draw_roofline(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture, at the most threads that were measured.

    Raises ConfigError where no layer was measured, MissingExtraError without matplotlib.
    """
    require_matplotlib()
    ceiling = max(result["ceilings"], key=lambda made: made["threads"], default=None)
    if ceiling is None:
        raise ConfigError("the picture needs the machine's ceilings, which were not measured")
    found = list(points(result, ceiling["threads"]))
    if not found:
        raise ConfigError("--plot draws layers, and none was measured; take --cases layers, or leave --cases out")
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "axes.edgecolor": _GRID, "grid.color": _GRID,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 6.4), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = min(p[3] for p in found) / 2, max(p[3] for p in found) * 2.5
        _draw_points(axes, found)
        bottom = min(p[4] for p in found) / 2.5
        axes.set_xlim(low, high)
        axes.set_ylim(bottom, max([p[4] for p in found] + [ceiling[name] or 0 for name in _CEILINGS]) * 2)
        axes.set_xlabel("products per byte of weights, input and output")
        axes.set_ylabel("products per second")
        axes.grid(which="major", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(
            f"Linear layers on {ceiling['threads']} threads, under the machine's measured ceilings"
            + (" (dry run)" if result["quick"] else ""), loc="left", fontsize=11,
        )  # fmt: skip
        figure.draw_without_rendering()  # the labels of slanted lines need the final axes
        _draw_ceilings(axes, ceiling, low, high)
        figure.savefig(path, format="png", metadata={"Software": None})


def _draw_ceilings(axes: Any, ceiling: Mapping[str, Any], low: float, high: float) -> None:
    rates = {name: ceiling[name] for name in _CEILINGS if ceiling[name]}
    top = max(rates.values(), default=0.0)
    for name, rate in rates.items():
        axes.axhline(rate, color=_INK, lw=1, ls=(0, (5, 2)), zorder=1)
        axes.annotate(
            f"{_CEILINGS[name]}: {rate / 1e9:.0f}·10⁹/s", (low, rate), xytext=(5, 3), textcoords="offset points",
            va="bottom", fontsize=9, color=_INK,
        )  # fmt: skip
    for name, label in (("memory", "memory"), ("cache", "last-level cache")):
        bandwidth = ceiling[name]
        ends = [low, max(top / bandwidth, low * 2)]
        axes.plot(ends, [bandwidth * x for x in ends], color=_INK, lw=1, zorder=1)
        (x0, y0), (x1, y1) = (axes.transData.transform((x, bandwidth * x)) for x in ends)
        start = low * (1.15 if name == "memory" else 1.6)  # one after the other, where the lines are close
        axes.annotate(
            f"{label}: {bandwidth / 1e9:.0f} GB/s", (start, bandwidth * start), xytext=(-3, 4),
            textcoords="offset points", rotation=degrees(atan2(y1 - y0, x1 - x0)), rotation_mode="anchor",
            fontsize=9, color=_INK,
        )  # fmt: skip


def _draw_points(axes: Any, found: list[tuple[str, str, str, float, float]]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    labels = []
    for kind, (colour, marker) in _KINDS.items():
        if any(point[0] == kind for point in found):
            labels.append(Line2D([], [], ls="", marker=marker, color=colour, label=kind))
    for memory, fill in ((WARM, _MUTED), (PAST_CACHE, "none")):
        labels.append(Line2D([], [], ls="", marker="o", mfc=fill, mec=_MUTED, label=f"weights {memory}"))
    for kind, scheme, memory, x, y in found:
        colour, marker = _KINDS[kind]
        filled = memory == WARM
        axes.plot(x, y, marker=marker, ms=7, mfc=colour if filled else "none", mec=colour, mew=1.2, ls="", zorder=3)
        if filled and scheme in _LABELLED:
            axes.annotate(
                scheme.upper(), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=colour, zorder=4,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
    axes.legend(handles=labels, loc="lower right", frameon=False, fontsize=9)
