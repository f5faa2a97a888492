"""What the demo finds out about a packed model: its size, its loss on held-out text, its speed, and how it writes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitquest.demo.corpus import words
from bitquest.evaluation.perplexity import evaluate_tokens
from bitquest.evaluation.sources import open_model, open_stream
from bitquest.export import packed_sizes
from bitquest.inference import SamplingOptions, Speed, TextEngine

Progress = Callable[[str, int, int], None]

_WORDS = 200  # at least so many are written, and counted
_TOKENS = 160  # of one text, before it is cut
_OPTIONS = SamplingOptions(temperature=0.7, top_p=0.95)


@dataclass(frozen=True)
class Measured:
    """Figures of one packed model. val_loss in nats per token; tokens_per_s of writing; known_words is the share of
    the `words` it wrote that occur in the corpus; sample follows prompt.
    """

    packed_bytes: Mapping[str, int]
    val_loss: float
    bits_per_byte: float
    tokens_per_s: float
    verified: bool
    words: int
    known_words: float
    prompt: str
    sample: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> "Measured":
        return Measured(**{name: fields[name] for name in Measured.__dataclass_fields__})

    def for_report(self) -> dict[str, Any]:
        """The fields that a report's RunSummary has."""
        return {name: value for name, value in asdict(self).items() if name not in ("words", "known_words")}


def measure(
    packed: Path, data: Path, prompts: Sequence[str], known: frozenset[str], verified: bool, progress: Progress
) -> Measured:
    """Evaluate a packed model on the held-out split of `data` and let it write at least 200 words."""
    opened = open_model(packed)
    stream = open_stream(data, opened.tokenizer)
    loss = evaluate_tokens(
        opened.model,
        stream.tokens,
        utf8_bytes=stream.utf8_bytes,
        progress=lambda done, total: progress("evaluating", done, total),
    )
    speed, sample = Speed(), ""
    written: list[str] = []
    engine = TextEngine(opened.model, opened.tokenizer)
    for prompt, text in _texts(engine, prompts, speed):
        sample = sample or text
        written += words(prompt + text)[len(words(prompt)) :]
        progress("writing", min(len(written), _WORDS), _WORDS)
        if len(written) >= _WORDS:
            break
    return Measured(
        packed_bytes=packed_sizes(packed),
        val_loss=loss.loss,
        bits_per_byte=loss.bits_per_byte,
        tokens_per_s=speed.tokens_per_second,
        verified=verified,
        words=len(written),
        known_words=sum(word in known for word in written) / max(1, len(written)),
        prompt=prompts[0],
        sample=sample,
    )


def _texts(engine: TextEngine, prompts: Sequence[str], speed: Speed) -> Iterator[tuple[str, str]]:
    """The prompts in turn and how the model continues them, each time with another seed, up to the last whole word."""
    for seed in range(50):
        options = SamplingOptions(_OPTIONS.temperature, _OPTIONS.top_k, _OPTIONS.top_p, seed)
        prompt = prompts[seed % len(prompts)]
        text = "".join(engine.write(prompt, _TOKENS, options, speed))
        yield prompt, (text.rpartition(" ")[0] or text)
