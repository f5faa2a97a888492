"""A fitted law in words and tables, for a terminal and a report."""

from bitquest.evaluation.report_page import Table
from bitquest.evaluation.scaling_fitted import CONSTANTS, FittedLaw, Interval, short_count

_SYMBOLS = {"A": "A", "alpha": "α", "B": "B", "beta": "β", "E": "E"}
_FEW, _VAGUE = 3, 3.0


def constants_table(law: FittedLaw) -> Table:
    """A row per constant of the law."""
    values = dict(zip(CONSTANTS, (law.law.a, law.law.alpha, law.law.b, law.law.beta, law.law.e), strict=True))
    rows = []
    for name in CONSTANTS:
        if name in law.held:
            interval = "held"
        elif name == "E":
            interval = "not identifiable" if not law.e_is_identifiable else interval_text(law.e_range)
        else:
            interval = interval_text(law.constant_interval(name))
        rows.append((_SYMBOLS[name], f"{values[name]:.5g}", interval))
    note = "L(N, D, P) = A/(N·eff(P))^α + B/D^β + E, in nats per token; N without token table and head."
    return Table(("constant", "value", "95 % interval"), rows, title="Scaling law", note=note)


def formats_table(law: FittedLaw) -> Table:
    """A row per format: eff and its interval, by falling eff."""
    rows = [
        (
            name,
            f"{eff:.3g}",
            "1 by definition" if name == law.reference else interval_text(law.efficiency_interval(name)),
            str(law.runs[name]),
        )
        for name, eff in sorted(law.efficiencies.items(), key=lambda pair: -pair[1])
    ]
    note = f"A model of N parameters in a format learns like one of N·eff parameters in {law.reference}."
    return Table(("format", "eff", "95 % interval", "runs"), rows, title="Parameter efficiency", note=note)


def remarks(law: FittedLaw) -> list[str]:
    """What has to be said beside the numbers, a sentence or two each."""
    about, total = law.about, sum(law.runs.values())
    found = [
        f"{total} runs, sum of squared log residuals {law.sum_of_squares:.7f}; a run lies "
        f"{100 * law.residual_std:.2g} % from the law (standard deviation); "
        f"{about.get('starts_that_agree')} of {about.get('starts')} starts found this optimum.",
        range_text(law),
    ]
    if not law.e_is_identifiable:
        found.append(
            f"E is not identifiable: the runs are fitted as well with any E from 0 to {law.e_range[1]:.2g}. "
            "What the law says of losses far below those of the runs depends on it."
        )
    outliers = float(about.get("largest_residual", 0)) > float(about.get("huber", 1))
    if outliers:
        found.append(
            f"The largest log residual is {about['largest_residual']:.3f}; those beyond {about['huber']:g} count less."
        )
    if 2 * float(about.get("starts_that_agree", 0)) < float(about.get("starts", 0)):
        found.append("Most starts ended elsewhere: the runs hardly determine the law. Hold constants, or add runs.")
    vague = [name for name in law.efficiencies if _factor(law.efficiency_interval(name)) > _VAGUE]
    vague += [name for name in ("alpha", "beta") if _factor(law.constant_interval(name)) > _VAGUE]
    if vague:
        found.append(f"Hardly determined (the interval spans more than {_VAGUE:g} times): {', '.join(vague)}.")
    few = [name for name, runs in law.runs.items() if runs < _FEW and name != law.reference]
    if few:
        found.append(f"Fewer than {_FEW} runs: {', '.join(few)}. Their eff rests on the law being right elsewhere.")
    return found


def _factor(interval: Interval | None) -> float:
    return 1.0 if interval is None else interval[1] / max(interval[0], 1e-300)


def range_text(law: FittedLaw) -> str:
    """What the law was fitted to, in one sentence."""
    low, high = law.range.parameters
    ratios, losses = law.range.tokens_per_parameter, law.range.losses
    return (
        f"Fitted to {short_count(low)} to {short_count(high)} parameters, {ratios[0]:.3g} to {ratios[1]:.3g} tokens "
        f"per parameter, losses {losses[0]:.3f} to {losses[1]:.3f}; beyond that it extrapolates."
    )


def interval_text(interval: Interval | None, missing: str = "–") -> str:
    """`0.64 to 0.75`, with the digits that both ends have in common and two more."""
    if interval is None:
        return missing
    return f"{interval[0]:.3g} to {interval[1]:.3g}"
