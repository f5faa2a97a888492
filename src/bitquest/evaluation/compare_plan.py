"""What a comparison trains: arms, seeds and learning rates, and which runs follow from the results so far.

An arm is what is compared: a scheme and, where wanted, other settings of the trainer. Without `rates` every arm is
trained once per seed. With `rates` every arm is trained at each of them with the first seed, then with the other seeds
at its own best rate, so that all arms have the same budget for tuning. As a map (`is_map`) every arm is trained at
every rate with every seed, and nothing is chosen.
"""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitquest.errors import ConfigError
from bitquest.evaluation.ordering import Expectation, parse_expectation
from bitquest.training.config import TrainConfig
from bitquest.training.toml import write_toml

PLAN = "compare.toml"


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    key: what expectations, results.json and run folders call it: the scheme's canonical name, or the arm's own.
    name: what reports call it. config: the base with the arm's scheme and `overrides` (`key=value`), before seed and
    rate. is_plain: a scheme alone, from `schemes`, and not a section of its own.
    """

    key: str
    name: str
    config: TrainConfig
    overrides: tuple[str, ...] = ()
    is_plain: bool = True

    @property
    def scheme(self) -> str:
        """The scheme's canonical name."""
        return self.config.scheme

    @property
    def stem(self) -> str:
        """The beginning of its run folders' names; one without a short name goes by a digest."""
        name = re.sub(r"[^a-z0-9.-]", "_", self.key) if self.is_plain else _words(self.key)
        if self.key.startswith("{") or len(name) > 80:
            return "scheme-" + hashlib.sha256(self.key.encode()).hexdigest()[:12]
        return name


@dataclass(frozen=True)
class Run:
    """One training run: an arm's key, a seed, and the learning rate where rates are swept."""

    arm: str
    seed: int
    rate: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A base configuration and what varies.

    rates: learning rates, swept alike for every arm. jobs: runs at once; None is one on a CPU and on a GPU as many as
    fit. is_map: every arm at every rate and seed. expect: chains as `parse_expectation` reads them.
    """

    base: TrainConfig
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...] = ()
    jobs: int | None = None
    is_map: bool = False
    expect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _refuse_repeated("arm", [arm.key for arm in self.arms], "schemes are compared under their canonical names")
        _refuse_repeated("name", [arm.name for arm in self.arms], "each arm needs a name of its own")
        _refuse_repeated("seed", self.seeds)
        _refuse_repeated("rate", [f"{rate:g}" for rate in self.rates])
        stems: dict[str, str] = {}
        for arm in self.arms:
            if (other := stems.setdefault(arm.stem, arm.key)) != arm.key:
                raise ConfigError(
                    f"arms {other!r} and {arm.key!r} would share the run folders {arm.stem}-…: rename one"
                )
        if not self.arms:
            raise ConfigError("nothing to compare: no schemes (--schemes none,w4a4,w1a1) and no [[compare.arm]]")
        if not self.seeds:
            raise ConfigError("nothing to compare: no seeds (--seeds 0,1,2)")
        for arm in self.arms if self.rates else ():
            if any(override.partition("=")[0].strip() == "optimizer.lr" for override in arm.overrides):
                raise ConfigError(
                    f"arm {arm.key!r}: optimizer.lr does not belong into `set` of an arm whose rates are swept: "
                    "remove it there, or remove compare.rates"
                )
        if self.is_map and not self.rates:
            raise ConfigError("compare.map = true maps arms over learning rates: give compare.rates = [1e-3, 4e-3, …]")
        if self.is_map and self.expect:
            raise ConfigError("compare.map = true chooses no rate, so nothing can be expected of it: remove expect")
        for expectation in self.expectations():
            if expectation.relation == "<" and len(self.seeds) < 2:
                raise ConfigError(
                    f"expectation {expectation}: `<` asks for a clear difference, more than two standard deviations "
                    "over seeds: give two seeds or more (--seeds 0,1,2), or write <="
                )

    def expectations(self) -> list[Expectation]:
        """All pairs that should hold, by the arms' keys."""
        names = {arm.name: arm.key for arm in self.arms}
        return [pair for chain in self.expect for pair in parse_expectation(chain, self.keys, names)]

    @property
    def keys(self) -> tuple[str, ...]:
        """The arms' keys, in order."""
        return tuple(arm.key for arm in self.arms)

    def arm(self, key: str) -> Arm:
        """The arm of a key."""
        return next(arm for arm in self.arms if arm.key == key)

    def name(self, key: str) -> str:
        """What reports call an arm."""
        return self.arm(key).name

    def label(self, run: Run) -> str:
        """What displays and messages call a run."""
        rate = "" if run.rate is None else f", rate {run.rate:g}"
        return f"{self.name(run.arm)}{rate}, seed {run.seed}"

    def first_runs(self) -> list[Run]:
        """Runs that are made whatever the others come to; all arms first, so that early results compare."""
        if not self.rates:
            return [Run(arm.key, seed) for seed in self.seeds for arm in self.arms]
        seeds = self.seeds if self.is_map else self.seeds[:1]
        return [Run(arm.key, seed, rate) for seed in seeds for rate in self.rates for arm in self.arms]

    def later_runs(self, best: Mapping[str, float]) -> list[Run]:
        """Runs that follow once the best rate of some arms is known."""
        if not self.rates or self.is_map:
            return []
        return [Run(arm.key, s, best[arm.key]) for s in self.seeds[1:] for arm in self.arms if arm.key in best]

    def total_runs(self) -> int:
        """How many runs there are in all."""
        return len(self.first_runs()) + len(self.later_runs(dict.fromkeys(self.keys, 0.0)))

    def config(self, run: Run) -> TrainConfig:
        """The configuration of one run. The seed decides initial weights and order of data, so arms share both."""
        config = dataclasses.replace(self.arm(run.arm).config, seed=run.seed)
        if run.rate is None:
            return config
        return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=run.rate))

    def folder(self, run: Run) -> str:
        """A run's place below the comparison's directory."""
        rate = "" if run.rate is None else f"-lr{run.rate:g}"
        return f"runs/{self.arm(run.arm).stem}{rate}-seed{run.seed}"

    def to_toml(self) -> str:
        """A file that `load_comparison` reads back, with the digests of the data it began with."""
        plain = [arm for arm in self.arms if arm.is_plain]
        section: dict[str, object] = {
            "schemes": [arm.scheme for arm in plain],
            "names": [arm.name for arm in plain],
            "seeds": self.seeds,
            "rates": self.rates,
            "map": self.is_map,
            "expect": self.expect,
            "data_sha256": data_digest(self.base),
        }
        section |= {"jobs": self.jobs} if self.jobs is not None else {}
        text = write_toml(self.base.to_dict() | {"compare": section})
        for arm in self.arms:
            if not arm.is_plain:
                digest = {} if arm.config.data == self.base.data else {"data_sha256": data_digest(arm.config)}
                fields = {"name": arm.name, "scheme": arm.scheme, "set": arm.overrides} | digest
                text += "\n[[compare.arm]]\n" + write_toml(fields)
        return text


def data_digest(config: TrainConfig) -> str:
    """SHA-256 of the data's manifest, which holds those of its files."""
    return hashlib.sha256((Path(config.data.path) / "manifest.json").read_bytes()).hexdigest()


def short_paths(paths: Iterable[str]) -> dict[str, str]:
    """By path, as many of its last parts as tell it from the others: data/text and old/text, but text and more."""
    parts = {path: Path(path).parts for path in paths}
    short = {}
    for path, own in parts.items():
        length = 1
        while length < len(own) and any(o[-length:] == own[-length:] for p, o in parts.items() if p != path):
            length += 1
        short[path] = str(Path(*own[-length:])) if own else path
    return short


def _words(name: str) -> str:
    """An arm's name as a part of a folder's: small letters, digits, points and dashes, anything between as _."""
    return re.sub(r"[^a-z0-9.-]+", "_", name.lower())


def _refuse_repeated(what: str, values: Sequence[object], why: str = "") -> None:
    repeated = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if repeated is not None:
        raise ConfigError(f"{what} {repeated} is given twice" + (f" ({why})" if why else ""))
