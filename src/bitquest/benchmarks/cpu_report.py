"""The CPU benchmark's result as tables that fit a terminal and a page alike.

`python -m bitquest.benchmarks.cpu_report result.json` prints them again from a file.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitquest.benchmarks.cpu_timing import PAST_CACHE, WARM
from bitquest.benchmarks.gpu_report import Cells, print_reports, table

_LAYERS: Cells = (
    "case",
    "threads",
    "torch f32",
    "torch bf16",
    "engine",
    "layer",
    "speed-up",
    "of minima",
    "past cache",
)
_GOALS: Cells = ("case", "what", "against", "reached", "target", "beyond", "met")
QUICK_NOTE = "A dry run on tiny data: the figures mean nothing."


def lines(result: Mapping[str, Any]) -> list[str]:
    """The whole report."""
    found = [QUICK_NOTE] if result.get("quick") else []
    found.append(f"Native engine: {result.get('native_engine')}.")
    cases = result.get("cases", {})
    layers = [cells for name, case in cases.items() if case["kind"] == "layer" for cells in _layer_cells(name, case)]
    if layers:
        found += ["", "Layers, weights warm; speed-up over the better one of torch's, by medians.", ""]
        found += table(_LAYERS, layers)
    found += _peer_lines(result.get("models", {}).get("peers", {}))
    found += [line for row in result.get("models", {}).get("rows", ()) for line in _model_lines(row, result["models"])]
    goals = [cells for name, case in cases.items() for cells in _goal_cells(name, case)]
    if goals:
        found += ["", "Targets: at the most threads, weights warm, ratios of medians.", "", *table(_GOALS, goals)]
    for ceiling in result.get("ceilings", ()):
        found += ["", *_ceiling_lines(ceiling)]
    return found


def _layer_cells(name: str, case: Mapping[str, Any]) -> Iterator[Cells]:
    for measured in case.get("rows", ()):
        warm, past = ({row["memory"]: row for row in measured["rows"]}[memory] for memory in (WARM, PAST_CACHE))
        best = "engine" if "engine" in warm["speedup"] else "layer"
        times = [
            _time(warm["seconds"][who]["median_seconds"]) if who in warm["seconds"] else ""
            for who in ("torch float32", "torch bf16", "engine", "layer")
        ]
        ratios = [warm["speedup"][best][by] for by in ("of_medians", "of_minima")]
        ratios.append(past["speedup"][best]["of_medians"])
        yield (name, str(measured["threads"]), *times, *map(_times, ratios))


def _model_lines(row: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    tokens = f" of {models['prompt']} tokens" if row["phase"] == "prefill" else ""
    sizes: dict[str, dict[str, Any]] = models["models"]
    cells = [
        (
            name,
            f"{row['tokens_per_second'][name]:.4g}",
            _time(seconds["median_seconds"]),
            _time(seconds["minimum_seconds"]),
            str(seconds["repetitions"]),
            _megabytes(sizes.get(name, {}).get("bytes")),
            _megabytes(sizes.get(name, {}).get("bytes_per_token")),
        )
        for name, seconds in sorted(row["seconds"].items(), key=lambda item: item[1]["median_seconds"])
    ]
    head = ("model", "tokens/s", "median", "minimum", "samples", "MB", "MB a token")
    title = f"{models['preset']} preset, {row['phase']}{tokens}, {row['threads']} threads."
    return ["", title, "", *table(head, cells)]


def _peer_lines(peers: Mapping[str, Any]) -> list[str]:
    """Which llama.cpp there is, or why none, and the types that it does not run."""
    if "reason" in peers:
        return ["", f"llama.cpp: {peers['reason']}"]
    if "version" not in peers:
        return []
    failed = [f"llama.cpp {name}: not measured: {reason}" for name, reason in peers["failed"].items()]
    return ["", f"llama.cpp of llama-cpp-python {peers['version']}: {peers['system']}", *failed]


def _goal_cells(name: str, case: Mapping[str, Any]) -> Iterator[Cells]:
    if case["status"] != "measured":
        yield (name, case["title"], f"{case['status']}: {case.get('reason', '')}", "", "", "", "")
        return
    show = _time if case["kind"] == "row" else _times
    for goal in case["goals"]:
        if goal["target"] is None and case["kind"] == "layer":
            continue
        reached = "not measured" if goal["reached"] is None else show(goal["reached"])
        yield (name, case["title"], goal["against"], reached, show(goal["target"]), show(goal["beyond"]), _met(goal))


def _met(goal: Mapping[str, Any]) -> str:
    if goal.get("target_met") is None:
        return ""
    if not goal["target_met"]:
        return "no"
    return "beyond" if goal["beyond_met"] else "yes"


def _ceiling_lines(ceiling: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, "not measured" if ceiling[name] is None else f"{ceiling[name] / 1e9:.4g}", unit)
        for name, unit in (
            ("float32", "10⁹ products/s"),
            ("bf16", "10⁹ products/s"),
            ("int8", "10⁹ products/s"),
            ("one_bit", "10⁹ products/s"),
            ("memory", "GB/s"),
            ("cache", "GB/s"),
        )
    ]
    title = f"The machine, {ceiling['threads']} threads ({ceiling['how']})."
    return [title, "", *table(("ceiling", "measured", "unit"), rows)]


def one_line(name: str, case: Mapping[str, Any]) -> str:
    """What came of a case, in one line."""
    if case["status"] != "measured":
        return f"{name}: {case['status']}: {case.get('reason', '')}"
    show = _time if case["kind"] == "row" else _times
    parts = []
    for goal in case["goals"]:
        reached = "not measured" if goal["reached"] is None else show(goal["reached"])
        parts.append(reached if case["kind"] == "row" else f"{reached} of {goal['against']}")
    return f"{name}: {', '.join(parts)}"


def equal_loss_lines(result: Mapping[str, Any]) -> list[str]:
    """The table of `--equal-loss`."""
    found = [QUICK_NOTE] if result.get("quick") else []
    found.append(
        f"Formats at a loss of {result['loss']:g} nats (C4, {result['tokens_per_parameter']:g} tokens a parameter), "
        f"random weights, {result['threads']} threads."
    )
    head = ("format", "size by the law", "shape", "MB", "MB a token", "decode tokens/s", "prefill tokens/s", "notes")
    rows = [
        (
            name,
            _count(row["parameters_by_law"]),
            f"{row['layers']} × {row['width']} / {row['hidden']}",
            _megabytes(row.get("bytes")),
            _megabytes(row.get("bytes_per_token")),
            "" if "decode" not in row else f"{row['decode']['tokens_per_second']:.4g}",
            "" if "prefill" not in row else f"{row['prefill']['tokens_per_second']:.4g}",
            "; ".join(row["notes"]),
        )
        for name, row in result["formats"].items()
    ]
    found += ["", *table(head, rows), ""]
    return found + [f"{what}: {name}" for what, name in result["winners"].items()] + list(result["notes"])


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.4g}"


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def main(words: Sequence[str]) -> int:
    """Print the report of each file named."""
    return print_reports(words, lambda result: equal_loss_lines(result) if "formats" in result else lines(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
