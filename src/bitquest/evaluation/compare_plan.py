"""What a comparison trains: one base configuration, once per scheme and seed; read from TOML and the command line."""

import dataclasses
import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquest.errors import ConfigError
from bitquest.evaluation.ordering import Expectation, parse_expectation, schemes_of
from bitquest.nn import Scheme
from bitquest.training.config import TrainConfig, differing_keys, load_config
from bitquest.training.settings import SettingError, nearest
from bitquest.training.toml import read_toml, write_toml

PLAN = "compare.toml"
_KEYS = ("schemes", "seeds", "names", "expect", "data_sha256")


@dataclass(frozen=True)
class Comparison:
    """A base configuration and what varies: schemes (canonical names) and seeds, every pair one run.

    names: what reports call a scheme, where that differs. expect: chains as `parse_expectation` reads them.
    """

    base: TrainConfig
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]
    names: Mapping[str, str]
    expect: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _refuse_repeated("scheme", self.schemes)
        _refuse_repeated("seed", self.seeds)
        if not self.schemes:
            raise ConfigError("nothing to compare: no schemes (--schemes none,w4a4,w1a1)")
        if not self.seeds:
            raise ConfigError("nothing to compare: no seeds (--seeds 0,1,2)")
        for expectation in self.expectations():
            if expectation.relation == "<" and len(self.seeds) < 2:
                raise ConfigError(
                    f"expectation {expectation}: `<` asks for a clear difference, more than two standard deviations "
                    "over seeds: give two seeds or more (--seeds 0,1,2), or write <="
                )

    def expectations(self) -> list[Expectation]:
        """All pairs that should hold."""
        return [pair for chain in self.expect for pair in parse_expectation(chain, self.schemes)]

    def runs(self) -> list[tuple[str, int]]:
        """Scheme and seed of every run: all schemes of one seed before the next seed, so that early results compare."""
        return [(scheme, seed) for seed in self.seeds for scheme in self.schemes]

    def config(self, scheme: str, seed: int) -> TrainConfig:
        """The configuration of one run. The seed decides initialisation and order of data, so schemes share both."""
        return dataclasses.replace(self.base, scheme=scheme, seed=seed)

    def name(self, scheme: str) -> str:
        """What reports call a scheme."""
        return self.names.get(scheme, scheme)

    def to_toml(self, data_sha256: str) -> str:
        """A file that `load_comparison` reads back, and the digest of the data it began with."""
        section = {
            "schemes": self.schemes,
            "seeds": self.seeds,
            "names": [self.name(scheme) for scheme in self.schemes],
            "expect": self.expect,
            "data_sha256": data_sha256,
        }
        return write_toml(self.base.to_dict() | {"compare": section})


def load_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    schemes: str | None = None,
    seeds: str | None = None,
    expect: Sequence[str] = (),
) -> Comparison:
    """The comparison of a TOML file: the trainer's keys and a section [compare].

    overrides: `key=value` for the trainer's keys. schemes ("none,w1a1"), seeds ("0,1,2" or "0-19") and expect, if
    given, replace the file's; the file's expectations about schemes that are then not compared are dropped.
    Raises ConfigError saying what is wrong and where.
    """
    path = Path(path)
    tables = read_toml(path)
    section = tables.pop("compare", {})
    try:
        base = TrainConfig.from_dict(tables)
        settings = _settings(section)
    except SettingError as error:
        raise ConfigError(f"{path}: {error}") from None
    wanted = _split(schemes) if schemes is not None else settings["schemes"]
    names = dict(zip(_canonical(settings["schemes"], str(path)), settings["names"], strict=False))
    chains = tuple(expect) or tuple(settings["expect"])
    compared = tuple(_canonical(wanted, str(path) if schemes is None else "--schemes"))
    if schemes is not None and not expect:  # a part of the schemes keeps the file's expectations about that part
        chains = tuple(chain for chain in chains if set(schemes_of(chain)) <= set(compared))
    numbers = parse_seeds(seeds) if seeds is not None else settings["seeds"]
    return Comparison(_overridden(base, path, overrides), compared, tuple(numbers), names, chains)


def parse_seeds(text: str) -> list[int]:
    """Seeds written as numbers and ranges: "0,1,2", "0-19", "0-4,10". Raises ConfigError."""
    seeds: list[int] = []
    for part in _split(text):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--seeds {text}: {part!r} is no seed; write numbers or ranges, such as 0,1,2 or 0-19")
        if int(match[2] or match[1]) - int(match[1]) >= 10_000:
            raise ConfigError(f"--seeds {text}: {part} are more than 10,000 seeds")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return seeds


def data_digest(base: TrainConfig) -> str:
    """SHA-256 of the data's manifest, which holds those of its files."""
    return hashlib.sha256((Path(base.data.path) / "manifest.json").read_bytes()).hexdigest()


def check_same_plan(folder: Path, plan: Comparison, digest: str) -> None:
    """Raise ConfigError if `folder` holds a comparison of another base configuration or of other data.

    Schemes, seeds, names and expectations may change: finished runs stay what they are, new ones are added. So may what
    decides nothing that is learned: [log], [checkpoint], and where the same data lies.
    """
    before = load_comparison(folder / PLAN).base
    data = dataclasses.replace(plan.base.data, path=before.data.path)
    same = dataclasses.replace(
        plan.base, scheme=before.scheme, seed=before.seed, data=data, log=before.log, checkpoint=before.checkpoint
    )
    if different := differing_keys(before, same):
        raise ConfigError(
            f"{folder} holds a comparison of another configuration (there, asked for now): {'; '.join(different)}. "
            "Choose another directory with --out, or the same configuration to go on"
        )
    if read_toml(folder / PLAN)["compare"].get("data_sha256") != digest:
        raise ConfigError(
            f"{folder} holds a comparison on other data than {plan.base.data.path} has now: its losses would not "
            "compare. Choose another directory with --out"
        )


def _overridden(base: TrainConfig, path: Path, overrides: Sequence[str]) -> TrainConfig:
    """The base with overrides, by the trainer's own reader, which takes a file without a section [compare]."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "base.toml"
        plain.write_text(base.to_toml(), encoding="utf-8")
        try:
            config = load_config(plain, overrides)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(plain), str(path))) from None
    data = dataclasses.replace(config.data, path=str(Path(config.data.path).expanduser().absolute()))
    return dataclasses.replace(config, data=data)


def _settings(section: Any) -> dict[str, Any]:
    """[compare] with every key there and of its type."""
    if not isinstance(section, Mapping):
        raise SettingError("compare", f"is a section: write [compare] with keys below it, got {section!r}")
    for key in section:
        if key not in _KEYS:
            raise SettingError(f"compare.{key}", f"is not a key of [compare]{nearest(key, _KEYS)}")
    settings = {"schemes": [], "seeds": [0], "names": [], "expect": []} | dict(section)
    for key in ("schemes", "names", "expect"):
        values = settings[key]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise SettingError(f"compare.{key}", f"must be a list of strings, got {values!r}")
    if isinstance(settings["seeds"], str):
        settings["seeds"] = parse_seeds(settings["seeds"])
    seeds = settings["seeds"]
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise SettingError("compare.seeds", f'must be a list of whole numbers or a range such as "0-19", got {seeds!r}')
    if settings["names"] and len(settings["names"]) != len(settings["schemes"]):
        raise SettingError(
            "compare.names",
            f"must give every scheme a name: there are {len(settings['names'])} for {len(settings['schemes'])} schemes",
        )
    return settings


def _canonical(schemes: Sequence[str], where: str) -> list[str]:
    try:
        return [str(Scheme.parse(scheme)) for scheme in schemes]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _refuse_repeated(what: str, values: Sequence[object]) -> None:
    repeated = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if repeated is not None:
        raise ConfigError(f"{what} {repeated} is given twice (schemes are compared under their canonical names)")
