"""What a Llama looks like: sizes, options, and the presets of the paper."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from bitquest.errors import ConfigError


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a Llama, named as in Hugging Face's config.json.

    head_dim None is hidden_size / num_attention_heads. Options beyond Llama that low-bit recipes use: qk_norm (RMSNorm
    over each head of q and k), norm_before_o_proj and norm_before_down_proj (RMSNorm of these layers' inputs).
    Raises ConfigError, naming the field, for sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    qk_norm: bool = False
    norm_before_o_proj: bool = False
    norm_before_down_proj: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "float" or field.type is float:
                if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                    raise ConfigError(f"{field.name} must be a positive number, not {value!r}")
                object.__setattr__(self, field.name, float(value))
            elif field.type in ("bool", bool):
                if not isinstance(value, bool):
                    raise ConfigError(f"{field.name} must be true or false, not {value!r}")
            elif not (field.name == "head_dim" and value is None) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise ConfigError(f"{field.name} must be a positive whole number, not {value!r}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}; "
                "change one of them or give head_dim"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}: each key-value head serves as many query heads"
            )
        if self.head_size % 2:
            raise ConfigError(f"a head of {self.head_size} dimensions cannot be rotated in pairs (RoPE); make it even")

    @property
    def head_size(self) -> int:
        """Dimensions of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without the token table and the head: the N of the scaling law."""
        d, q, kv = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        attention = 2 * d * q * self.head_size + 2 * d * kv * self.head_size
        norms = 2 * d + 2 * self.head_size * self.qk_norm
        norms += q * self.head_size * self.norm_before_o_proj + self.intermediate_size * self.norm_before_down_proj
        return self.num_hidden_layers * (attention + 3 * d * self.intermediate_size + norms) + d

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "LlamaConfig":
        """The configuration that `to_json` described. Raises ConfigError for a key that is unknown or missing."""
        known = {field.name: field for field in dataclasses.fields(LlamaConfig)}
        for key in fields:
            if key not in known:
                raise ConfigError(f"unknown model setting {key!r}{nearest(key, known)}")
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and n not in fields]
        if missing:
            raise ConfigError(f"the model's settings lack {', '.join(missing)}")
        return LlamaConfig(**fields)

    @staticmethod
    def preset(name: str, *, vocab_size: int, max_position_embeddings: int, **overrides: Any) -> "LlamaConfig":
        """A preset by name ("1M" … "1.6B"), with any field replaced. Raises ConfigError naming the nearest preset."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
        layers, width, heads = PRESETS[name]
        fields: dict[str, Any] = {
            "vocab_size": vocab_size,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": max_position_embeddings,
            **overrides,
        }
        fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
        fields.setdefault("intermediate_size", swiglu_size(fields["hidden_size"]))
        return LlamaConfig.from_json(fields)


def swiglu_size(hidden_size: int) -> int:
    """The hidden width of SwiGLU in the paper: 8/3 of the model's, rounded up to a multiple of 256."""
    return -(-8 * hidden_size // (3 * 256)) * 256


def nearest(name: str, known: Any) -> str:
    """'; did you mean X?' where one of the known names is close."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


# METHOD, "Recipe of the paper" (and 1M to 10M for CPUs): layers, width, heads.
PRESETS: dict[str, tuple[int, int, int]] = {
    "1M": (4, 128, 4),
    "3M": (4, 256, 4),
    "10M": (6, 384, 6),
    "30M": (6, 640, 5),
    "50M": (7, 768, 6),
    "100M": (8, 1024, 8),
    "200M": (10, 1280, 10),
    "430M": (13, 1664, 13),
    "800M": (16, 2048, 16),
    "1.6B": (20, 2560, 20),
}
