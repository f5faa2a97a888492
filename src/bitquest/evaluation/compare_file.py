"""Reads a comparison from TOML and the command line, and tells whether a directory holds the same one."""

import dataclasses
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitquest.errors import ConfigError
from bitquest.evaluation.compare_plan import PLAN, Arm, Comparison, data_digest, short_paths
from bitquest.evaluation.ordering import is_about
from bitquest.nn import Scheme
from bitquest.training.config import TrainConfig, differing_keys, load_config
from bitquest.training.settings import SettingError, nearest
from bitquest.training.toml import read_toml

_DEFAULTS: dict[str, Any] = {
    "schemes": [], "names": [], "seeds": [0], "rates": [], "jobs": None, "map": False, "expect": [], "arm": [],
    "sizes": [], "corpora": [],
}  # fmt: skip
_KEYS = (*_DEFAULTS, "data_sha256")
_ARM_KEYS = ("name", "scheme", "set", "data_sha256")
# Keys of the trainer that hold paths; a comparison's directory must mean the same from every folder.
_PATHS = ("data.path", "model.init_from")


def load_comparison(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    schemes: str | None = None,
    seeds: str | None = None,
    rates: str | None = None,
    jobs: int | None = None,
    expect: Sequence[str] = (),
) -> Comparison:
    """The comparison of a TOML file: the trainer's keys and a section [compare].

    overrides: `key=value` for the trainer's keys, under those of an arm. schemes ("none,w1a1"; arms by their names),
    seeds ("0,1,2" or "0-19"), rates ("1e-3,4e-3"), jobs and expect, if given, replace the file's; the file's
    expectations about arms that are then not compared are dropped.
    Raises ConfigError saying what is wrong and where.
    """
    path = Path(path)
    tables = read_toml(path)
    section = tables.pop("compare", {})
    try:
        settings = _settings(section)
        base = _overridden(TrainConfig.from_dict(tables), path, overrides)
        arms = _arms(base, settings, path)
    except SettingError as error:
        raise ConfigError(f"{path}: {error}") from None
    chains = tuple(expect) or tuple(settings["expect"])
    if schemes is not None:
        arms = _chosen(arms, schemes, base)
        if not expect:  # a part of the arms keeps the file's expectations about that part
            keys, names = [arm.key for arm in arms], {arm.name: arm.key for arm in arms}
            chains = tuple(chain for chain in chains if is_about(chain, keys, names))
    return Comparison(
        base=base,
        arms=tuple(arms),
        seeds=tuple(parse_seeds(seeds) if seeds is not None else settings["seeds"]),
        rates=tuple(_parse_rates(rates) if rates is not None else settings["rates"]),
        jobs=jobs if jobs is not None else settings["jobs"],
        is_map=settings["map"],
        expect=chains,
    )


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


def check_same_plan(folder: Path, plan: Comparison) -> None:
    """Raise ConfigError if `folder` holds a comparison of another base configuration or of other data.

    Arms, seeds, rates, jobs and expectations may change: finished runs stay what they are, new ones are added. So may
    what decides nothing that is learned: [log], [checkpoint], the rate where rates are swept, and where the same data
    lies. Each run's own directory is checked when the run goes on.
    """
    before = load_comparison(folder / PLAN)
    base, old = plan.base, before.base
    same = dataclasses.replace(
        base,
        scheme=old.scheme,
        seed=old.seed,
        data=dataclasses.replace(base.data, path=old.data.path),
        optimizer=dataclasses.replace(base.optimizer, lr=old.optimizer.lr) if plan.rates else base.optimizer,
        log=old.log,
        checkpoint=old.checkpoint,
    )
    if different := differing_keys(old, same):
        raise ConfigError(
            f"{folder} holds a comparison of another configuration (there, asked for now): {'; '.join(different)}. "
            "Choose another directory with --out, or the same configuration to go on"
        )
    section = read_toml(folder / PLAN)["compare"]
    digests = {entry["name"]: entry.get("data_sha256") for entry in section.get("arm", [])}
    pairs = [(base, section.get("data_sha256"))]
    pairs += [(arm.config, digests[arm.name]) for arm in plan.arms if digests.get(arm.name) is not None]
    for config, digest in pairs:
        if data_digest(config) != digest:
            raise ConfigError(
                f"{folder} holds a comparison on other data than {config.data.path} has now: its losses would not "
                "compare. Choose another directory with --out"
            )


def _arms(base: TrainConfig, settings: Mapping[str, Any], path: Path) -> list[Arm]:
    """The arms of a file: its schemes, crossed with sizes and corpora where those are given, and its own sections."""
    schemes = _canonical(settings["schemes"], str(path))
    names = settings["names"] or schemes
    plain = [Arm(scheme, name, _with_scheme(base, scheme)) for scheme, name in zip(schemes, names, strict=True)]
    arms = _crossed(plain, settings["sizes"], settings["corpora"], base) if _crosses(settings) else plain
    for entry in settings["arm"]:
        (scheme,) = _canonical([entry.get("scheme", base.scheme)], f"{path}: arm {entry['name']!r}")
        arms.append(_arm(base, entry["name"], scheme, entry.get("set", [])))
    return arms


def _crosses(settings: Mapping[str, Any]) -> bool:
    return bool(settings["sizes"] or settings["corpora"])


def _crossed(plain: Sequence[Arm], sizes: Sequence[str], corpora: Sequence[str], base: TrainConfig) -> list[Arm]:
    corpora = [str(Path(corpus).expanduser().absolute()) for corpus in corpora]
    labels = short_paths(corpora)
    arms = []
    for corpus in corpora or [""]:
        for size in sizes or [""]:
            for arm in plain:
                name = " ".join(filter(None, (arm.name, size, labels.get(corpus))))
                settings = [f"model.preset={size}"] * bool(size) + [f"data.path={corpus}"] * bool(corpus)
                arms.append(_arm(base, name, arm.scheme, settings))
    return arms


def _arm(base: TrainConfig, name: str, scheme: str, overrides: Sequence[str]) -> Arm:
    settings = []
    for override in overrides:
        key, equals, value = (part.strip() for part in override.partition("="))
        if key in ("scheme", "seed"):
            raise SettingError(f"compare.arm {name!r}:", f"{key} does not belong into `set`: it has a key of its own")
        if key in _PATHS and equals:
            value = str(Path(value).expanduser().absolute())
        settings.append(f"{key}={value}" if equals else override)
    try:
        config = load_config_of(_with_scheme(base, scheme), settings)
    except ConfigError as error:
        message = str(error).removeprefix("--set ")
        raise SettingError(f"compare.arm {name!r}:", message) from None
    return Arm(name, name, config, tuple(settings), is_plain=False)


def _chosen(arms: Sequence[Arm], wanted: str, base: TrainConfig) -> list[Arm]:
    """The arms that `--schemes` names, by name or scheme; a scheme that the file does not compare is a new arm."""
    known = {arm.key: arm for arm in arms} | {arm.name: arm for arm in arms}
    chosen = []
    for text in _split(wanted):
        if text in known:
            chosen.append(known[text])
            continue
        (scheme,) = _canonical([text], "--schemes")
        chosen.append(known.get(scheme) or Arm(scheme, scheme, _with_scheme(base, scheme)))
    return chosen


def _with_scheme(base: TrainConfig, scheme: str) -> TrainConfig:
    return dataclasses.replace(base, scheme=scheme)


def load_config_of(base: TrainConfig, overrides: Sequence[str], path: str = "") -> TrainConfig:
    """`base` with `key=value` overrides, by the trainer's own reader; `path` is what errors call it."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "base.toml"
        plain.write_text(base.to_toml(), encoding="utf-8")
        try:
            return load_config(plain, overrides)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{plain}: ", f"{path}: " if path else "")) from None


def _overridden(base: TrainConfig, path: Path, overrides: Sequence[str]) -> TrainConfig:
    config = load_config_of(base, overrides, str(path))
    data = dataclasses.replace(config.data, path=str(Path(config.data.path).expanduser().absolute()))
    return dataclasses.replace(config, data=data)


def _settings(section: Any) -> dict[str, Any]:
    """[compare] with every key there and of its type."""
    if not isinstance(section, Mapping):
        raise SettingError("compare", f"is a section: write [compare] with keys below it, got {section!r}")
    for key in section:
        if key not in _KEYS:
            raise SettingError(f"compare.{key}", f"is not a key of [compare]{nearest(key, _KEYS)}")
    settings = _DEFAULTS | dict(section)
    for key in ("schemes", "names", "expect", "sizes", "corpora"):
        _check_strings(f"compare.{key}", settings[key])
    if isinstance(settings["seeds"], str):
        settings["seeds"] = parse_seeds(settings["seeds"])
    seeds = settings["seeds"]
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise SettingError("compare.seeds", f'must be a list of whole numbers or a range such as "0-19", got {seeds!r}')
    rates = settings["rates"]
    if not isinstance(rates, list) or not all(_is_rate(rate) for rate in rates):
        raise SettingError("compare.rates", f"must be a list of learning rates above 0, such as [1e-3], got {rates!r}")
    settings["rates"] = [float(rate) for rate in rates]
    if settings["jobs"] is not None and (type(settings["jobs"]) is not int or settings["jobs"] < 1):
        raise SettingError("compare.jobs", f"must be a whole number, at least 1, got {settings['jobs']!r}")
    if not isinstance(settings["map"], bool):
        raise SettingError("compare.map", f"must be true or false, got {settings['map']!r}")
    if settings["names"] and len(settings["names"]) != len(settings["schemes"]):
        raise SettingError(
            "compare.names",
            f"must give every scheme a name: there are {len(settings['names'])} for {len(settings['schemes'])} schemes",
        )
    _check_arms(settings["arm"])
    return settings


def _check_arms(arms: Any) -> None:
    if not isinstance(arms, list) or not all(isinstance(arm, Mapping) for arm in arms):
        raise SettingError("compare.arm", f"is a list of sections: write [[compare.arm]] for each, got {arms!r}")
    for number, arm in enumerate(arms, 1):
        name = arm.get("name")
        if not isinstance(name, str) or not name.strip():
            raise SettingError(f"compare.arm number {number}", 'needs a name, such as name = "LSQ W1A1"')
        if any(sign in name for sign in "<≤\n"):
            raise SettingError(
                f"compare.arm {name!r}", "has a name with < in it, which expectations could not tell apart"
            )
        for key in arm:
            if key not in _ARM_KEYS:
                raise SettingError(f"compare.arm {name!r}: {key}", f"is not a key of an arm{nearest(key, _ARM_KEYS)}")
        if not isinstance(arm.get("scheme", ""), str):
            raise SettingError(f"compare.arm {name!r}: scheme", f"must be a string, got {arm['scheme']!r}")
        _check_strings(f"compare.arm {name!r}: set", arm.get("set", []))


def _check_strings(key: str, values: Any) -> None:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise SettingError(key, f"must be a list of strings, got {values!r}")


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _parse_rates(text: str) -> list[float]:
    rates = []
    for part in _split(text):
        try:
            rates.append(float(part))
        except ValueError:
            rates.append(math.nan)
        if not _is_rate(rates[-1]):
            raise ConfigError(f"--rates {text}: {part!r} is no learning rate; write numbers such as 1e-3,4e-3")
    return rates


def _canonical(schemes: Sequence[str], where: str) -> list[str]:
    try:
        return [str(Scheme.parse(scheme)) for scheme in schemes]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
