"""Expectations about a comparison, such as "none<=w4a4<=w1a1" or "w1a1<w1a1-ste", and whether they hold.

The losses of a scheme are one per seed; a run that diverged counts as an infinite one. With means m_a and m_b, sample
variances v_a and v_b (divided by n - 1) over n_a and n_b seeds, the pooled standard deviation of a pair is

    s = sqrt(((n_a - 1) · v_a + (n_b - 1) · v_b) / (n_a + n_b - 2))

    a <= b   holds if m_a <= m_b, or if the inversion is small: m_a - m_b < 2 s
    a < b    holds if a is clearly lower: m_b - m_a > 2 s, and the 95 % interval of the difference leaves out zero
             (compare_claims.py)

With one seed each there is no s: `a <= b` then takes m_a <= m_b alone, and `a < b` cannot be decided. A chain of one
arm, "w1a1", expects only that none of its runs diverged or was unstable.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from bitquest.errors import ConfigError
from bitquest.evaluation.compare_claims import NOT_SEPARABLE, Claim, claim
from bitquest.nn import Scheme

Relation = Literal["<=", "<", "converges"]


@dataclass(frozen=True)
class Expectation:
    """One pair of arms and how their losses should compare; `second` is None for "none of its runs diverged"."""

    first: str
    relation: Relation
    second: str | None

    def __str__(self) -> str:
        return f"{self.first} {self.relation} {self.second}" if self.second is not None else f"{self.first} converges"


@dataclass(frozen=True)
class Verdict:
    """Whether an expectation holds, with the numbers: second's mean less first's, pooled deviation, interval."""

    expectation: Expectation
    passed: bool
    difference: float | None
    deviation: float | None
    reason: str
    claim: Claim | None = None


def parse_expectation(
    text: str, arms: Sequence[str], names: Mapping[str, str] = MappingProxyType({})
) -> list[Expectation]:
    """The pairs of a chain of arms joined by `<=` and `<`, as the keys `arms` has them.

    An arm is written as its key, as the name that `names` maps to it, or as any name of its scheme.
    Raises ConfigError for what is no chain and for an arm that is not compared.
    """
    parts, relations = _chain(text)
    keys = [_key(text, part, arms, names) for part in parts]
    if len(keys) == 1:
        return [Expectation(keys[0], "converges", None)]
    return [Expectation(a, relation, b) for (a, b), relation in zip(pairwise(keys), relations, strict=True)]


def is_about(text: str, arms: Sequence[str], names: Mapping[str, str]) -> bool:
    """Whether a chain names compared arms only. Raises ConfigError for what is no chain."""
    return all(_find(part, arms, names) is not None for part in _chain(text)[0])


def _key(text: str, part: str, arms: Sequence[str], names: Mapping[str, str]) -> str:
    key = _find(part, arms, names)
    if key is None:
        what = _canonical(part) or part
        raise ConfigError(f"expectation {text!r}: {what} is not compared; the arms are {', '.join(arms)}")
    return key


def _find(part: str, arms: Sequence[str], names: Mapping[str, str]) -> str | None:
    if part in arms:
        return part
    if part in names:
        return names[part]
    scheme = _canonical(part)
    return scheme if scheme in arms else None


def _canonical(part: str) -> str | None:
    try:
        return str(Scheme.parse(part))
    except ConfigError:
        return None


def _chain(text: str) -> tuple[list[str], list[Relation]]:
    first, *rest = re.split(r"(<=|≤|<)", text)
    parts = [part.strip() for part in (first, *rest[1::2])]
    if not all(parts):
        raise ConfigError(f"expectation {text!r}: write arms joined by <= or <, such as none<=w4a4<=w1a1")
    return parts, ["<" if relation == "<" else "<=" for relation in rest[::2]]


def pooled_deviation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """s of the module's formula; None where there is one value each, infinite where a value is."""
    freedom = len(first) + len(second) - 2
    if freedom <= 0:
        return None
    if not all(map(math.isfinite, (*first, *second))):
        return math.inf
    squares = sum((x - sum(values) / len(values)) ** 2 for values in (first, second) for x in values)
    return math.sqrt(squares / freedom)


def judge(expectation: Expectation, losses: Mapping[str, Mapping[int, float]]) -> Verdict:
    """Whether an expectation holds for the losses of every arm by seed.

    math.inf stands for a run that diverged, and, where none should have, for an unstable one.
    """
    found = {arm: list(by_seed.values()) for arm, by_seed in losses.items()}
    if expectation.second is None:
        return _judged(expectation, found, None)
    finite = {arm: {s: loss for s, loss in by_seed.items() if math.isfinite(loss)} for arm, by_seed in losses.items()}
    return _judged(expectation, found, claim(expectation.first, expectation.second, finite))


def _judged(expectation: Expectation, losses: Mapping[str, Sequence[float]], found: Claim | None) -> Verdict:
    first = losses[expectation.first]
    diverged = sum(not math.isfinite(loss) for loss in first)
    how = "diverged" if expectation.second is not None else "diverged or were unstable"
    if diverged:
        reason = f"{diverged} of {len(first)} runs of {expectation.first} {how}"
        return Verdict(expectation, False, None, None, reason, found)
    if expectation.second is None:
        return Verdict(expectation, True, None, None, f"none of {len(first)} runs {how}")
    second = losses[expectation.second]
    if not all(map(math.isfinite, second)):
        return Verdict(expectation, True, None, None, f"a run of {expectation.second} diverged, which is worse", found)
    difference = sum(second) / len(second) - sum(first) / len(first)
    deviation = pooled_deviation(first, second)
    if expectation.relation == "<":
        passed = deviation is not None and difference > 2 * deviation and found is not None and bool(found.separable)
    else:
        passed = difference >= 0 or (deviation is not None and -difference < 2 * deviation)
    reason = _reason(expectation, difference, deviation)
    if expectation.relation == "<" and not passed and deviation is not None and difference > 2 * deviation:
        reason += f", but {NOT_SEPARABLE}: its 95 % interval holds zero"
    return Verdict(expectation, passed, difference, deviation, reason, found)


def _reason(expectation: Expectation, difference: float, deviation: float | None) -> str:
    order = "in order" if difference >= 0 else "inverted"
    if deviation is None:
        return f"{order}; with one seed each nothing tells how far seeds scatter"
    if expectation.relation == "<=" and difference >= 0:
        return order
    size, limit = abs(difference), 2 * deviation
    if expectation.relation == "<":
        compared = "more" if size > limit else "not more"
    else:
        compared = "less" if size < limit else "not less"
    return f"{order} by {size:.4f}, {compared} than two standard deviations, {limit:.4f}"
