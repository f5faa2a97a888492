"""The configuration of one training run: frozen sections, checked on construction, read from TOML with overrides.

A configuration says everything that decides what is learned; where results go (the run directory) is not part of it.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitquest.errors import ConfigError
from bitquest.models import PRESETS, LlamaConfig
from bitquest.nn import Scheme
from bitquest.ops import Backend
from bitquest.training.recipe_config import RecipeSection, with_recipe
from bitquest.training.settings import SettingError, check_settings, convert, nearest, setting
from bitquest.training.toml import parse_value, read_toml, write_toml

# The shape of the model as [model] may give it: every field of LlamaConfig.
_MODEL_FIELDS = {spec.name: spec for spec in dataclasses.fields(LlamaConfig)}
_MODEL_HINTS = typing.get_type_hints(LlamaConfig)
_REQUIRED = [name for name, spec in _MODEL_FIELDS.items() if spec.default is dataclasses.MISSING]


@dataclass(frozen=True)
class ModelSection:
    """[model]: a preset, a Hugging Face folder to start from, or the fields of LlamaConfig (which override a preset).

    The vocabulary is the data's and max_position_embeddings is data.context unless given here.
    """

    preset: str | None = None
    init_from: str | None = None
    shape: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name in ("preset", "init_from"):
            convert(f"model.{name}", getattr(self, name), str | None)
        checked = tuple((name, convert(f"model.{name}", value, _MODEL_HINTS[name])) for name, value in self.shape)
        object.__setattr__(self, "shape", checked)
        if self.preset is not None and self.preset not in PRESETS:
            hint = nearest(self.preset, PRESETS)
            raise SettingError("model.preset", f"must be one of {', '.join(PRESETS)}, got {self.preset!r}{hint}")
        if self.init_from is not None and (self.preset is not None or self.shape):
            extra = ["preset"] if self.preset is not None else [name for name, _ in self.shape]
            raise SettingError(
                "model.init_from",
                f"takes the model's shape from {self.init_from}: remove {', '.join('model.' + name for name in extra)}",
            )

    def llama_config(self, vocab_size: int, context: int) -> LlamaConfig:
        """The model's shape for data of `vocab_size` tokens. Raises ConfigError naming the keys to change."""
        fields: dict[str, Any] = {"vocab_size": vocab_size, "max_position_embeddings": context} | dict(self.shape)
        if fields["vocab_size"] < vocab_size:
            raise SettingError(
                "model.vocab_size",
                f"is {fields['vocab_size']}, but the prepared data has {vocab_size} tokens: remove the key, "
                f"or set it to {vocab_size} or more",
            )
        if fields["max_position_embeddings"] < context:
            raise SettingError(
                "model.max_position_embeddings",
                f"is {fields['max_position_embeddings']}, less than data.context = {context}: raise it, "
                "or lower data.context",
            )
        missing = [] if self.preset is not None else [f"model.{name}" for name in _REQUIRED if name not in fields]
        if missing:
            raise ConfigError(f"the model's shape is incomplete: set model.preset, or also {', '.join(missing)}")
        try:
            return LlamaConfig(**fields) if self.preset is None else LlamaConfig.preset(self.preset, **fields)
        except ConfigError as error:
            raise ConfigError(f"[model] {error}") from None


@dataclass(frozen=True)
class DataSection:
    """[data]: the folder that `bitquest data prepare` wrote, and how many tokens of it a sequence has."""

    path: str = ""
    context: int = setting(256, at_least=1)

    def __post_init__(self) -> None:
        check_settings("data", self)


@dataclass(frozen=True)
class OptimizerSection:
    """[optimizer]: AdamW. Weight decay is on matrices only; clip = 0 leaves gradients as they are."""

    lr: float = setting(1e-3, above=0)
    betas: tuple[float, float] = setting((0.9, 0.95), at_least=0, below=1)
    eps: float = setting(1e-8, above=0)
    weight_decay: float = setting(0.1, at_least=0)
    clip: float = setting(1.0, at_least=0)

    def __post_init__(self) -> None:
        check_settings("optimizer", self)


@dataclass(frozen=True)
class ScheduleSection:
    """[schedule]: linear warm-up, then cosine, or a plateau and a linear decay (wsd).

    warmup and decay are shares of train.steps (decay is wsd's); final is the last learning rate over the highest.
    """

    kind: str = setting("cosine", choices=("cosine", "wsd"))
    warmup: float = setting(0.1, at_least=0, below=1)
    decay: float = setting(0.2, at_least=0, at_most=1)
    final: float = setting(0.1, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_settings("schedule", self)
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise SettingError(
                "schedule.decay", f"and schedule.warmup add up to {self.warmup + self.decay:g} of the run: at most 1"
            )


@dataclass(frozen=True)
class TrainSection:
    """[train]: steps of batch_size sequences each, computed in `accumulation` equal parts to save memory.

    precision auto is bf16 autocast on a GPU that has it, float32 elsewhere; threads 0 leaves PyTorch's choice. backend
    auto trains on integers where a fast engine is there (bitquest doctor); torch multiplies fake-quantized floats.
    """

    steps: int = setting(1000, at_least=1)
    batch_size: int = setting(16, at_least=1)
    accumulation: int = setting(1, at_least=1)
    precision: str = setting("auto", choices=("auto", "float32", "bf16"))
    device: str = setting("auto", choices=("auto", "cpu", "cuda"))
    compile: bool = False
    activation_checkpointing: bool = False
    backend: str = setting("auto", choices=tuple(backend.value for backend in Backend))
    threads: int = setting(0, at_least=0, at_most=1024)

    def __post_init__(self) -> None:
        check_settings("train", self)
        if self.batch_size % self.accumulation:
            raise SettingError(
                "train.accumulation",
                f"= {self.accumulation} must divide train.batch_size = {self.batch_size} "
                "(batch_size is the sequences of a whole step)",
            )


@dataclass(frozen=True)
class EvaluateSection:
    """[evaluate]: validation loss every so many steps (0: only at the end) on so many batches (0: the whole split)."""

    every: int = setting(100, at_least=0)
    batches: int = setting(20, at_least=0)

    def __post_init__(self) -> None:
        check_settings("evaluate", self)


@dataclass(frozen=True)
class CheckpointSection:
    """[checkpoint]: a checkpoint every so many steps (0: only at the end), the last `keep` kept."""

    every: int = setting(200, at_least=0)
    keep: int = setting(2, at_least=1)

    def __post_init__(self) -> None:
        check_settings("checkpoint", self)


@dataclass(frozen=True)
class LogSection:
    """[log]: metrics.jsonl every so many steps; TensorBoard and Weights & Biases as well, if asked for."""

    every: int = setting(10, at_least=1)
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "bitquest"

    def __post_init__(self) -> None:
        check_settings("log", self)


@dataclass(frozen=True)
class DiagnoseSection:
    """[diagnose]: a look at gradients, masks, errors, steps and codes every so many steps (0: never; see diagnose.py).

    sequences: of the held-out text, each of data.context tokens; the same ones at every look.
    """

    every: int = setting(0, at_least=0)
    sequences: int = setting(4, at_least=1)

    def __post_init__(self) -> None:
        check_settings("diagnose", self)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Build it from parts, `from_dict`, or `load_config`."""

    scheme: str = "w1a1"
    seed: int = setting(0, at_least=0, below=2**63)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    recipe: RecipeSection = field(default_factory=RecipeSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    log: LogSection = field(default_factory=LogSection)
    diagnose: DiagnoseSection = field(default_factory=DiagnoseSection)

    def __post_init__(self) -> None:
        check_settings("", self)
        try:
            scheme = Scheme.parse(self.scheme)
        except ConfigError as error:
            raise SettingError("scheme", f"= {self.scheme!r}: {error}") from None
        object.__setattr__(self, "scheme", str(scheme))
        if self.train.compile and scheme.activation is not None and scheme.activation.is_learned:
            # it starts from the first input, a decision on data that a compiled graph cannot contain
            raise SettingError("train.compile", "= true does not go with a learned activation step: set it to false")
        self.recipe.check(scheme, self.train.compile)

    @staticmethod
    def from_dict(tables: Mapping[str, Any]) -> "TrainConfig":
        """The configuration of nested plain values, as TOML gives them. Raises ConfigError naming key and reason."""
        parts: dict[str, Any] = {}
        for name, value in with_recipe(tables).items():
            if name not in _SECTIONS:
                if name == "compare":
                    raise SettingError(
                        name, "is a section that `bitquest compare` reads: give it this file, or remove it"
                    )
                if name not in ("scheme", "seed"):
                    raise SettingError(name, f"is not a configuration key{nearest(name, _names())}")
                parts[name] = value
            elif not isinstance(value, Mapping):
                raise SettingError(name, f"is a section: write [{name}] with keys below it, got {value!r}")
            else:
                parts[name] = _section(name, value)
        return TrainConfig(**parts)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, everything spelled out, that `from_dict` turns back into an equal configuration."""
        tables: dict[str, Any] = {"scheme": self.scheme, "seed": self.seed}
        for name in _SECTIONS:
            section = getattr(self, name)
            values = {spec.name: getattr(section, spec.name) for spec in dataclasses.fields(section)}
            if isinstance(section, ModelSection):
                values = {"preset": section.preset, "init_from": section.init_from} | dict(section.shape)
            if isinstance(section, RecipeSection):
                values = section.given()
            tables[name] = {key: _plain(value) for key, value in values.items() if value is not None}
        return tables

    def to_toml(self) -> str:
        """The text of a configuration file that `load_config` reads back as an equal configuration."""
        return write_toml(self.to_dict())


def _plain(value: Any) -> Any:
    """A setting as TOML and JSON have it: lists for tuples."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


_SECTIONS: dict[str, Any] = {
    "model": ModelSection,
    "data": DataSection,
    "optimizer": OptimizerSection,
    "recipe": RecipeSection,
    "schedule": ScheduleSection,
    "train": TrainSection,
    "evaluate": EvaluateSection,
    "checkpoint": CheckpointSection,
    "log": LogSection,
    "diagnose": DiagnoseSection,
}


def _section_keys(name: str) -> tuple[str, ...]:
    if name == "model":
        return ("preset", "init_from", *_MODEL_FIELDS)
    return tuple(spec.name for spec in dataclasses.fields(_SECTIONS[name]))


def known_keys() -> tuple[str, ...]:
    """Every key of a configuration, dotted: `scheme`, `seed`, `model.preset`, …"""
    return ("scheme", "seed", *(f"{name}.{key}" for name in _SECTIONS for key in _section_keys(name)))


def _names() -> tuple[str, ...]:
    return (*_SECTIONS, *known_keys())


def _section(name: str, values: Mapping[str, Any]) -> Any:
    for key in values:
        if key not in _section_keys(name):
            raise SettingError(f"{name}.{key}", f"is not a configuration key{nearest(f'{name}.{key}', known_keys())}")
    if name == "model":
        shape = tuple((key, value) for key, value in values.items() if key in _MODEL_FIELDS)
        return ModelSection(values.get("preset"), values.get("init_from"), shape)
    return _SECTIONS[name](**values)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a TOML file (or of the defaults, for None) with `key=value` overrides.

    Raises ConfigError: what is wrong, at which key, and whether the file or an override said it.
    """
    tables = {} if path is None else read_toml(Path(path))
    overridden = {}
    for override in overrides:
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            raise ConfigError(f"--set {override}: write key=value, for example --set train.steps=100")
        if key not in known_keys():
            inside = f" (it is a section: set {key}.{_section_keys(key)[0]})" if key in _SECTIONS else ""
            raise ConfigError(
                f"--set {override}: {key} is not a configuration key{inside or nearest(key, known_keys())}"
            )
        section, dot, name = key.rpartition(".")
        table = tables.setdefault(section, {}) if dot else tables
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section} is a section: write [{section}] with keys below it, got {table!r}")
        value = parse_value(text)
        table[name] = text if _wants_text(key) and not isinstance(value, str) else value
        overridden[key] = override
    try:
        config = TrainConfig.from_dict(tables)
    except SettingError as error:
        where = f"--set {overridden[error.key]}" if error.key in overridden else path
        raise ConfigError(f"{where}: {error}" if where is not None else str(error)) from None
    if not config.data.path:
        where = f"{path}: " if path is not None else ""
        raise ConfigError(
            f"{where}data.path is missing: the folder that `bitquest data prepare` wrote (--set data.path=…)"
        )
    return config


def _wants_text(key: str) -> bool:
    """Whether a key holds a string, so that `--set data.path=2024` means the folder of that name."""
    section, _, name = key.rpartition(".")
    if section == "model":
        return name in ("preset", "init_from")
    owner = _SECTIONS[section] if section else TrainConfig
    return typing.get_type_hints(owner)[name] is str


def differing_keys(one: TrainConfig, other: TrainConfig) -> list[str]:
    """Dotted keys whose values differ, each as `key: value of one, value of other`."""
    a, b = _flat(one), _flat(other)
    keys = [key for key in (*a, *(key for key in b if key not in a)) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key, 'not set')!r}, {b.get(key, 'not set')!r}" for key in keys]


def _flat(config: TrainConfig) -> dict[str, Any]:
    flat = {}
    for name, value in config.to_dict().items():
        flat.update(
            {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat
