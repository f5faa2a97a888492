"""The GPU benchmark's result as tables that fit a terminal and a page alike.

`python -m bitquest.benchmarks.gpu_report result.json` prints them again from a file.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Cells = tuple[str, ...]

_COUNTS = "past the L2"  # the condition that targets are about

_CASES: Cells = (
    "case",
    "shape",
    "baseline",
    "ours",
    "speed-up",
    "of minima",
    "L2-warm",
    "of floor",
    "target",
    "beyond",
    "met",
)


def lines(result: dict[str, Any]) -> list[str]:
    """The whole report."""
    device = result.get("device") or {}
    found = [
        f"GPU {device.get('gpu')}, driver {device.get('driver')}, torch {device.get('torch')}, "
        f"Triton {device.get('triton')}; {result.get('seconds')} s of {result.get('budget_seconds')} s"
    ]
    if result.get("dry_run"):
        found.append("A dry run on tiny data: the figures mean nothing.")
    floors = [
        (name, _number(floor.get("value")), floor["unit"], floor.get("reason", ""))
        for name, floor in result.get("floors", {}).items()
    ]
    if floors:
        found += ["", *table(("hardware", "measured", "unit", "why not"), floors)]
    rows = [cells for name, case in result.get("cases", {}).items() for cells in case_cells(name, case)]
    if rows:
        found += ["", *table(_CASES, rows)]
    return found


def case_cells(name: str, case: dict[str, Any]) -> list[Cells]:
    """One line for each shape that counts, or one that says why there is none."""
    target, beyond = _times(case.get("target")), _times(case.get("beyond"))
    measured = [row for row in case.get("rows", ()) if row["memory"] == _COUNTS]
    if not measured:
        why = f"{case['status']}: {case.get('reason', '')}"
        return [(name, why, *[""] * 6, target, beyond, "")]
    warm = {row["shape"]: row for row in case["rows"] if row["memory"] == "L2-warm"}
    cells: list[Cells] = []
    for row in measured:
        baseline = next(key for key in ("bf16", "paper") if key in row)
        ours, other = row["ours"], warm.get(row["shape"])
        cells.append(
            (
                name,
                row["shape"],
                _time(row[baseline]["median_seconds"]),
                _time(ours["median_seconds"]),
                _times(ours["speedup_of_medians"]),
                _times(ours["speedup_of_minima"]),
                "" if other is None else _times(other["ours"]["speedup_of_medians"]),
                f"{row['share_of_floor']:.0%}" if "share_of_floor" in row else "",
                target,
                beyond,
                _met(case, ours["speedup_of_medians"]),
            )
        )
    return cells


def one_line(name: str, case: dict[str, Any]) -> str:
    """What came of a case, in one line."""
    ratios = [f"{row['ours']['speedup_of_medians']:.2f}×" for row in case.get("rows", ()) if row["memory"] == _COUNTS]
    if not ratios:
        return f"{name}: {case['status']}: {case.get('reason', '')}"
    return f"{name}: {', '.join(ratios)} the speed of {case['against']}"


def _met(case: dict[str, Any], ratio: float) -> str:
    if "target_met" not in case or case["target"] is None:
        return ""
    if ratio < case["target"]:
        return "no"
    return "beyond" if case["beyond"] is not None and ratio >= case["beyond"] else "yes"


def table(head: Cells, rows: Sequence[Cells]) -> list[str]:
    """Rows as aligned Markdown."""
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    widths = [max(width, 3) for width in widths]

    def line(cells: Cells) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def curve_lines(result: dict[str, Any]) -> list[str]:
    """What the loss curves showed (loss_curves.py)."""
    settings = result["settings"]
    rows = [(name, f"{mean:.4f}") for name, mean in result["means_of_last"].items()]
    found = table((f"loss, {settings['preset']}, {settings['scheme']}", f"mean of the last {settings['last']}"), rows)
    if result["agree"] is None:
        return [*found, f"no verdict: not run: {', '.join(result['skipped'])}"]
    low, high = result["interval"]
    ranges = [f"{ends[0]:.4f} to {ends[1]:.4f}" for ends in (result["fused_range"], result["reference_range"])]
    return [
        *found,
        f"fused {ranges[0]}, references {ranges[1]}; difference of the means {result['difference']:+.4f}, "
        f"{result['confidence']:.0%} interval {low:+.4f} to {high:+.4f}: "
        f"{'the paths agree' if result['agree'] else 'the paths DISAGREE'}",
    ]


def print_reports(words: Sequence[str], report: Callable[[dict[str, Any]], list[str]]) -> int:
    """Print what `report` makes of each result file named; an exit code."""
    for name in words:
        try:
            result = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print("\n".join(report(result)))
    return 0


def main(words: Sequence[str]) -> int:
    """Print the report of each file named."""
    return print_reports(words, lambda result: curve_lines(result) if "means_of_last" in result else lines(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
