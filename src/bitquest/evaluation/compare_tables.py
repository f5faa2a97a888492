"""The tables of a comparison, for the terminal and the report."""

from collections.abc import Sequence

from bitquest.evaluation.compare_claims import NOT_SEPARABLE, Claim
from bitquest.evaluation.compare_plan import Comparison
from bitquest.evaluation.compare_results import ComparisonResult, Spread
from bitquest.evaluation.ordering import Expectation
from bitquest.evaluation.report_page import Table

_MOST_CLAIMS = 36  # of a table that is still read


def results_table(result: ComparisonResult, *, narrow: bool = False) -> Table:
    """A row per arm: what of divergences, losses, size and time there is to say.

    narrow: for a terminal, without what only the spread of a single arm is looked at for; of a sweep, whose table is
    wide, only what decides.
    """
    arms, several = result.arms, len(result.plan.seeds) > 1
    compact = narrow and bool(result.plan.rates)
    columns: dict[str, list[str]] = {"arm": [arm.name for arm in arms]}
    notes = ["losses in nats per token" + (", mean ± standard deviation over seeds" if several else "")]
    if result.plan.rates and not result.plan.is_map:
        columns["rate"] = ["–" if arm.rate is None else f"{arm.rate:g}{'*' * arm.at_edge}" for arm in arms]
        notes += ["* at the edge of the rates tried: a better one may lie outside"] * any(arm.at_edge for arm in arms)
    if not compact or any(arm.diverged for arm in arms):
        columns["diverged"] = [f"{arm.diverged} of {arm.runs}" for arm in arms]
    else:
        notes.append("none diverged")
    if any(arm.unstable for arm in arms):
        columns["unstable"] = [f"{arm.unstable} of {arm.runs}" for arm in arms]
        notes.append("unstable: the training loss ended far above its own best")
    columns["validation loss"] = [_spread(arm.val_loss) for arm in arms]
    if several and (len(arms) == 1 or not narrow):
        columns["least"] = [_number(arm.val_loss.min if arm.val_loss else None) for arm in arms]
        columns["greatest"] = [_number(arm.val_loss.max if arm.val_loss else None) for arm in arms]
    if any(arm.difference is not None and arm.scheme != "none" for arm in arms):
        columns["difference"] = [_difference(arm.difference, arm.interval, narrow) for arm in arms]
        notes.append("differences to the unquantized model with the same seeds")
        if any(arm.interval for arm in arms):
            notes[-1] += ", ± half the 95 % interval" + _legend(columns["difference"])
    if not compact:
        columns["bits per byte"] = [_number(arm.bits_per_byte.mean if arm.bits_per_byte else None) for arm in arms]
    if any(arm.packed_bytes for arm in arms):
        columns["MB packed"] = [
            _number(arm.packed_bytes["total_bytes"] / 1e6 if arm.packed_bytes else None, ".2f") for arm in arms
        ]
    if not compact:
        columns["seconds"] = [_number(arm.seconds.mean if arm.seconds else None, ",.1f") for arm in arms]
    note = "; ".join(notes)
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), note=note[0].upper() + note[1:] + ".")


def verdicts_table(result: ComparisonResult, *, narrow: bool = False) -> Table:
    """A row per expectation. narrow: for a terminal."""
    rows = [
        (
            words_of(result.plan, v.expectation),
            "passed" if v.passed else "failed",
            _difference(v.difference, v.claim.bounds if v.claim is not None else None, narrow),
            v.reason,
        )
        for v in result.verdicts
    ]
    note = (
        "Inversions below two standard deviations, pooled over the seeds of the pair, pass a <=. A < asks for more "
        "than two and for an interval without zero. ± is half the 95 % interval"
    )
    note += _legend([row[2] for row in rows]) + "."
    columns = ("expectation", "verdict", "difference", "why")
    return Table(columns, rows, title="Expectations", note=note)


def words_of(plan: Comparison, expectation: Expectation) -> str:
    """An expectation with the names that reports call its arms."""
    second = None if expectation.second is None else plan.name(expectation.second)
    return str(Expectation(plan.name(expectation.first), expectation.relation, second))


def claims_table(result: ComparisonResult) -> Table:
    """A row per pair of arms, in the order of their mean losses: the difference and whether it is separable.

    Of many arms only neighbours in that order are shown.
    """
    means = {arm.arm: arm.val_loss.mean for arm in result.arms if arm.val_loss is not None}
    order = {key: place for place, key in enumerate(sorted(means, key=lambda key: means[key]))}
    is_long = len(result.claims) > _MOST_CLAIMS
    rows = []
    for claim in result.claims:
        if claim.difference is not None:
            turned = claim if order[claim.first] < order[claim.second] else _turned(claim)
            places = (order[turned.first], order[turned.second])
            if not is_long or places[1] - places[0] == 1:
                rows.append((places, turned))
    name = result.plan.name
    cells = [
        (name(c.first), name(c.second), _number(c.difference, "+.4f"), c.interval, str(c.seeds))
        for _, c in sorted(rows, key=lambda row: row[0])
    ]
    note = (
        "Mean loss of the second less that of the first, in nats per token, with the 95 % interval of Student's t, "
        "paired by seed where both have it. Each interval stands alone: of twenty differences that are nothing but "
        "noise, one on average looks separable."
    )
    if is_long:
        note += " results.json has the pairs that are no neighbours."
    title = "Neighbours by mean loss" if is_long else "Every pair"
    return Table(("lower", "higher", "difference", "95 % interval", "seeds"), cells, title=title, note=note)


def _turned(claim: Claim) -> Claim:
    low, high = (None, None) if claim.low is None or claim.high is None else (-claim.high, -claim.low)
    difference = -claim.difference if claim.difference is not None else None
    return Claim(claim.second, claim.first, difference, low, high, claim.seeds, claim.is_paired)


def _difference(difference: float | None, interval: tuple[float, float] | None, narrow: bool) -> str:
    """A difference ± half its interval, and in words if that holds zero (in letters, where there is little room)."""
    if difference is None:
        return "–"
    if interval is None or (difference == 0 and interval == (0.0, 0.0)):  # the reference itself
        return f"{difference:+.4f}"
    words = f"{difference:+.4f} ± {(interval[1] - interval[0]) / 2:.4f}"
    if interval[0] > 0 or interval[1] < 0:
        return words
    return f"{words} n.s." if narrow else f"{words}, {NOT_SEPARABLE}"


def _legend(cells: Sequence[str]) -> str:
    return f"; n.s.: {NOT_SEPARABLE}, the interval holds zero" if any(cell.endswith("n.s.") for cell in cells) else ""


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.4f}" if spread.std is None else f"{spread.mean:.4f} ± {spread.std:.4f}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)
