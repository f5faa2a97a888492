"""What to train for a memory, a latency, a loss or a budget: size and width, and what each costs.

Every format is tried at every candidate shape; what the constraints leave is ranked. The scaling law says the loss,
arithmetic the rest; `assumptions` in plan_words.py says what was assumed. C candidate shapes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitquest.errors import ConfigError
from bitquest.evaluation.plan_hardware import Hardware
from bitquest.evaluation.plan_models import (
    TABLE_BITS,
    Shapes,
    cache_bytes,
    packed_bytes,
    training_bytes,
    training_flops,
    why_not_packed,
)
from bitquest.evaluation.scaling_fitted import FittedLaw, Interval, short_count
from bitquest.evaluation.scaling_runs import UNQUANTIZED

Floats = NDArray[np.float64]

PREFERENCES = ("loss", "bytes", "cost")
TOKENS_PER_PARAMETER = 100.0
UTILIZATION = 0.35


@dataclass(frozen=True)
class Measured:
    """Bytes per second that a format reached in decoding, and where that was measured."""

    bytes_per_second: Mapping[str, float]
    where: str


@dataclass(frozen=True)
class Request:
    """What is asked, and what is assumed. None: no such constraint.

    memory: bytes of the packed model with its key-value cache. latency: seconds of a token at full context.
    loss: nats per token, to be reached. flops: of training, everything counted. tokens: of training; else
    tokens_per_parameter of them, else, under a budget, as many as it pays for. prefer: see PREFERENCES.
    utilization: share of the peak that training reaches. overhead: time of a quantized training step over a bf16 one.
    """

    law: FittedLaw
    formats: tuple[str, ...]
    train_on: Hardware
    run_on: Hardware
    memory: float | None = None
    latency: float | None = None
    loss: float | None = None
    flops: float | None = None
    tokens: float | None = None
    tokens_per_parameter: float | None = None
    prefer: str = "loss"
    vocabulary: int = 32_000
    context: int = 2048
    table_bits: int = 8
    cache_bits: int = 16
    tokens_at_once: int = 16_384
    devices: int = 1
    utilization: float = UTILIZATION
    overhead: float = 1.0
    measured: Measured | None = None

    def __post_init__(self) -> None:
        if self.memory is None and self.latency is None and self.loss is None and self.flops is None:
            raise ConfigError(
                "nothing is asked: give --memory 2GB, --latency 20ms, --loss 2.8 or --training-budget '100 H100-hours'"
            )
        if self.tokens is not None and self.tokens_per_parameter is not None:
            raise ConfigError("--tokens and --tokens-per-parameter are one question answered twice: leave one out")
        if self.loss is not None and not (math.isfinite(self.loss) and self.loss > 0):
            raise ConfigError(f"--loss {self.loss:g}: a loss is a positive number of nats per token")
        if self.table_bits not in TABLE_BITS:
            raise ConfigError(f"--tables {self.table_bits}: token table and head have {TABLE_BITS} bits")
        if self.prefer not in PREFERENCES:
            raise ConfigError(f"--prefer {self.prefer}: one of {', '.join(PREFERENCES)}")
        if not self.train_on.trains:
            raise ConfigError(
                f"--hardware {self.train_on.name}: no peak speed is known for it, so it cannot be planned to train on; "
                "name another, or give peak_tflops in a --hardware-file"
            )

    @property
    def rule_for_tokens(self) -> str:
        """In words, how many tokens a model is trained on."""
        if self.tokens is not None:
            return f"{short_count(self.tokens)} tokens"
        if self.tokens_per_parameter is None and self.flops is not None:
            least, most = self.law.range.tokens_per_parameter
            return (
                f"as many tokens as the budget pays for, {least:.3g} to {most:.3g} per parameter as in the law's runs"
            )
        return f"{self.tokens_per_parameter or TOKENS_PER_PARAMETER:g} tokens per parameter"


@dataclass(frozen=True)
class Choice:
    """The best shape of one format. Bytes of the packed model; loss in nats per token with its 95 % interval.

    decode_seconds: of one token at full context; a floor (bytes over bandwidth) unless `decode_measured`.
    """

    format: str
    taken_as: str
    efficiency: float
    parameters: int
    layers: int
    width: int
    hidden: int
    heads: int
    tokens: float
    loss: float
    loss_interval: Interval | None
    blocks_bytes: int
    embedding_bytes: int
    head_bytes: int
    cache_bytes: int
    decode_seconds: float
    decode_measured: bool
    training_flops: float
    device_hours: float
    wall_hours: float
    dollars: float | None
    training_state_bytes: int
    training_activation_bytes: int
    fits_training_device: bool
    beyond: tuple[str, ...]

    @property
    def packed_bytes(self) -> int:
        """Embedding and head included, without the cache."""
        return self.blocks_bytes + self.embedding_bytes + self.head_bytes


@dataclass(frozen=True)
class Plan:
    """The best choice of every format that can meet the request, best first; and why others cannot.

    loss_is_idle: every size of every format reaches the loss that is asked.
    """

    request: Request
    choices: tuple[Choice, ...]
    impossible: Mapping[str, str] = field(default_factory=dict)
    loss_is_idle: bool = False

    @property
    def best(self) -> Choice:
        """The first one."""
        return self.choices[0]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the law without its samples."""
        request = {
            key: value
            for key, value in vars(self.request).items()
            if key not in ("law", "train_on", "run_on", "measured")
        }
        return {
            "request": request,
            "train_on": asdict(self.request.train_on),
            "run_on": asdict(self.request.run_on),
            "law": self.request.law.to_json(samples=False),
            "choices": [{**asdict(choice), "packed_bytes": choice.packed_bytes} for choice in self.choices],
            "impossible": dict(self.impossible),
        }


def make_plan(request: Request) -> Plan:
    """The plan of a request. Raises ConfigError if no format can meet it, saying which constraint is why."""
    shapes = Shapes.candidates(request.vocabulary)
    refused = {name: reason for name in request.formats if (reason := why_not_packed(name)) is not None}
    tried = [_Candidates.of(request, name, shapes) for name in request.formats if name not in refused]
    if not tried:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    found, impossible = [], dict(refused)
    for candidates in tried:
        if candidates.allowed.any():
            found.append((candidates.rank(), candidates))
        else:
            impossible[candidates.format] = candidates.refusal()
    if not found:
        raise ConfigError(_why_none(tried))
    choices = [candidates.choice(place) for (_, place), candidates in sorted(found, key=lambda pair: pair[0][0])]
    idle = request.loss is not None and all(float(one.loss.max()) <= request.loss for one in tried)
    return Plan(request, tuple(choices), impossible, idle)


@dataclass(frozen=True)
class _Candidates:
    """One format at every shape. `limits`: what is asked, each with the values (C,) and the most that is allowed."""

    request: Request
    format: str
    shapes: Shapes
    tokens: Floats
    loss: Floats
    flops: Floats
    seconds: Floats
    stored: Floats
    limits: Mapping[str, tuple[Floats, float]]

    @staticmethod
    def of(request: Request, format_name: str, shapes: Shapes) -> "_Candidates":
        efficiency, _ = request.law.efficiency(format_name)
        weights = packed_bytes(shapes, format_name, _table_bits(request, format_name))
        cache = cache_bytes(shapes, request.context, request.cache_bits)
        per_token = training_flops(shapes) * _overhead(request, format_name)
        n = shapes.parameters.astype(float)
        if request.tokens is not None:
            tokens = np.full(n.shape, request.tokens)
        elif request.tokens_per_parameter is None and request.flops is not None:
            tokens = np.minimum(request.flops / per_token, request.law.range.tokens_per_parameter[1] * n)
        else:
            tokens = n * (request.tokens_per_parameter or TOKENS_PER_PARAMETER)
        law = request.law.law
        loss = law.a / (n * efficiency) ** law.alpha + law.b / tokens**law.beta + law.e
        flops, stored = per_token * tokens, (weights.total + cache).astype(float)
        seconds = (weights.read_per_token + cache) / _bandwidth(request, format_name)
        asked = {
            "memory": (stored, request.memory),
            "latency": (seconds, request.latency),
            "training budget": (flops, None if request.flops is None else request.flops * (1 + 1e-9)),
            "loss": (loss, request.loss),
        }
        if request.tokens is None and request.tokens_per_parameter is None and request.flops is not None:
            # a law may well promise most for huge models of few tokens, where no run has been
            asked["tokens per parameter"] = (n / tokens, 1 / request.law.range.tokens_per_parameter[0])
        limits = {name: (values, most) for name, (values, most) in asked.items() if most is not None}
        return _Candidates(request, format_name, shapes, tokens, loss, flops, seconds, stored, limits)

    @property
    def allowed(self) -> NDArray[np.bool_]:
        return self.within(*self.limits)

    def within(self, *names: str) -> NDArray[np.bool_]:
        """Shapes (C,) that keep these limits."""
        kept = np.ones(self.loss.shape, bool)
        for name in names:
            values, most = self.limits[name]
            kept &= values <= most
        return kept

    def rank(self) -> tuple[tuple[float, ...], int]:
        """What the best allowed shape is sorted by, and its place."""
        columns = {"loss": self.loss, "bytes": self.stored, "cost": self.flops}
        first = columns.pop(self.request.prefer)
        places = np.flatnonzero(self.allowed)
        keys = [first, *columns.values()]
        best = int(places[np.lexsort([key[places] for key in reversed(keys)])[0]])
        return tuple(float(key[best]) for key in keys), best

    def refusal(self) -> str:
        """Why no shape is allowed: a limit that none keeps, or the one that the others leave no room for."""
        for name, (values, _) in self.limits.items():
            if not self.within(name).any():
                return _least(name, float(values.min()))
        last = "loss" if "loss" in self.limits else next(iter(self.limits))
        others = [name for name in self.limits if name != last]
        rest = self.within(*others)
        if not rest.any():
            return f"{' and '.join(others)} exclude each other"
        return _least(last, float(self.limits[last][0][rest].min())) + f" within the limits of {' and '.join(others)}"

    def choice(self, place: int) -> Choice:
        """Everything about one shape."""
        request, shapes = self.request, self.shapes
        efficiency, source = request.law.efficiency(self.format)
        one = shapes.only(place)
        weights = packed_bytes(one, self.format, _table_bits(request, self.format))
        state, kept = (int(part[0]) for part in training_bytes(one, request.tokens_at_once))
        config = shapes.config(place, request.context)
        n, tokens, flops = int(one.parameters[0]), float(self.tokens[place]), float(self.flops[place])
        machine = request.train_on
        hours = flops / ((machine.peak_tflops or math.nan) * 1e12 * request.utilization) / 3600
        price = machine.price_per_hour
        return Choice(
            format=self.format,
            taken_as=source,
            efficiency=efficiency,
            parameters=n,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            hidden=config.intermediate_size,
            heads=config.num_attention_heads,
            tokens=tokens,
            loss=float(self.loss[place]),
            loss_interval=request.law.loss_interval(n, tokens, self.format),
            blocks_bytes=int(weights.blocks[0]),
            embedding_bytes=int(weights.embedding[0]),
            head_bytes=int(weights.head[0]),
            cache_bytes=int(cache_bytes(one, request.context, request.cache_bits)[0]),
            decode_seconds=float(self.seconds[place]),
            decode_measured=request.measured is not None and self.format in request.measured.bytes_per_second,
            training_flops=flops,
            device_hours=hours,
            wall_hours=hours / request.devices,
            dollars=None if price is None else hours * price,
            training_state_bytes=state,
            training_activation_bytes=kept,
            fits_training_device=state + kept <= machine.memory_gb * 1e9,
            beyond=tuple(request.law.range.beyond(n, tokens)),
        )


def _table_bits(request: Request, format_name: str) -> int:
    """Token table and head of an unquantized model stay bf16."""
    return 16 if format_name.partition("@")[0] == UNQUANTIZED else request.table_bits


def _overhead(request: Request, format_name: str) -> float:
    return 1.0 if format_name.partition("@")[0] == UNQUANTIZED else request.overhead


def _bandwidth(request: Request, format_name: str) -> float:
    """Bytes per second: measured for the format, or the machine's."""
    known = request.measured.bytes_per_second if request.measured is not None else {}
    return known.get(format_name, request.run_on.bandwidth_gbs * 1e9)


def _least(name: str, value: float) -> str:
    words: dict[str, Callable[[float], str]] = {
        "memory": lambda v: f"the smallest model takes {size_text(v)}",
        "latency": lambda v: f"the fastest model takes {v * 1e3:.3g} ms a token",
        "training budget": lambda v: f"the cheapest training takes {v:.3g} floating-point operations",
        "tokens per parameter": lambda v: f"the budget pays for {1 / v:.3g} tokens per parameter at most",
        "loss": lambda v: f"the lowest loss is {v:.3f} nats per token",
    }
    return words[name](value)


def _why_none(tried: list[_Candidates]) -> str:
    request = tried[0].request
    for name in tried[0].limits:
        if not any(candidates.within(name).any() for candidates in tried):
            least = min(float(candidates.limits[name][0].min()) for candidates in tried)
            hint = {
                "loss": f" (the law's floor with {request.rule_for_tokens})",
                "memory": f" with {request.vocabulary:,} words and a cache of {request.context:,} positions "
                "(--vocabulary, --context)",
                "latency": f" on {request.run_on.name} (--run-on)",
            }
            if name == "tokens per parameter":
                return f"the training budget is too small: {_least(name, least)}, fewer than any run of the law had"
            return f"no format meets the {name} that is asked: {_least(name, least)}{hint.get(name, '')}"
    reasons = "; ".join(f"{candidates.format}: {candidates.refusal()}" for candidates in tried)
    return f"no format meets {' and '.join(tried[0].limits)} together. {reasons}"


def size_text(size: float) -> str:
    """1.23 GB, 45.6 MB, 789 kB: three digits, 10^9, 10^6, 10^3 bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= 0.9995 * unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"
