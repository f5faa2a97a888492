"""Checked settings: what a dataclass field of a configuration section may hold, and the errors when it does not."""

import difflib
import itertools
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from typing import Any

from bitquest.errors import ConfigError

# Values at shares of a run: ((share, value), …).
Points = tuple[tuple[float, float], ...]

_TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    tuple[float, float]: "two numbers, like [0.9, 0.95]",
    Points: "pairs of a share of the run and a value, like [[0.0, 8], [0.5, 1]]",
}

_LIMITS: tuple[tuple[str, str, Callable[[Any, float], bool]], ...] = (
    ("above", "above", operator.gt),
    ("at_least", "at least", operator.ge),
    ("below", "below", operator.lt),
    ("at_most", "at most", operator.le),
)


class SettingError(ConfigError):
    """A ConfigError about one key, so that the reader of a file can say where the key was set."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key} {message}")
        self.key = key


def setting(
    default: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with a default and the range or the names it may take."""
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most, "choices": choices}
    return field(default=default, metadata=limits)


def check_settings(section: str, instance: Any) -> None:
    """Check every field of a frozen dataclass; whole numbers given for a float become floats.

    Raises SettingError naming `section.key`, what was expected and what was found.
    """
    hints = typing.get_type_hints(type(instance))
    for spec in fields(instance):
        key = f"{section}.{spec.name}" if section else spec.name
        value = convert(key, getattr(instance, spec.name), hints[spec.name])
        object.__setattr__(instance, spec.name, value)
        for number in _numbers(value):
            if isinstance(number, (int, float, str)) and not isinstance(number, bool):
                _check_range(key, number, spec.metadata)


def _numbers(value: Any) -> Iterable[Any]:
    """What a setting's limits hold for: the value, both of a pair, or the values of points."""
    if not isinstance(value, tuple):
        return (value,)
    return tuple(item[1] if isinstance(item, tuple) else item for item in value)


def convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names (bool, int, float, str, pairs of floats, optional ones, or a class)."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint == tuple[float, float] and isinstance(value, (list, tuple)) and len(value) == 2:
        return (convert(key, value[0], float), convert(key, value[1], float))
    if hint == Points and _are_pairs(value):
        points = tuple((convert(key, share, float), convert(key, number, float)) for share, number in value)
        _check_shares(key, points)
        return points
    if isinstance(hint, type) and type(value) is hint:
        return value
    if isinstance(hint, type) and hint not in _TYPE_NAMES and isinstance(value, hint):
        return value
    wanted = _TYPE_NAMES.get(hint, getattr(hint, "__name__", str(hint)))
    raise SettingError(key, f"must be {wanted}, got {value!r} ({type(value).__name__})")


def _are_pairs(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple))
    return is_list and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value)


def _check_shares(key: str, points: Points) -> None:
    shares = [share for share, _ in points]
    rising = all(before < after for before, after in itertools.pairwise(shares))
    if points and (shares[0] != 0 or not rising or shares[-1] > 1):
        raise SettingError(key, f"must have shares of the run that begin at 0 and rise to 1 at most, got {shares}")


def _check_range(key: str, value: Any, limits: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(key, f"must be finite, got {value}")
    for name, words, holds in _LIMITS:
        limit = limits.get(name)
        if limit is not None and not holds(value, limit):
            raise SettingError(key, f"must be {words} {limit:g}, got {value}")
    choices = limits.get("choices")
    if choices is not None and value not in choices:
        raise SettingError(key, f"must be one of {', '.join(choices)}, got {value!r}{nearest(str(value), choices)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near. A key of another section counts as near."""
    known = list(known)
    same_ending = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2] and key != name]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        by_ending = {key.rpartition(".")[2]: key for key in known}
        close = [by_ending[k] for k in difflib.get_close_matches(name.rpartition(".")[2], by_ending, n=1, cutoff=0.6)]
    best = same_ending[:1] or close
    return f" (did you mean {best[0]!r}?)" if best else ""
