"""Greedy texts of a trained and a packed model: equal, or parted by a code that rounding carried across a threshold.

The packed model writes each text twice where `generate` has another way than the layers one by one (native decoding, a
CUDA graph): once by layers, and once as `generate` does it. Native decoding shows what its layers read, so that its
own flips are found; those of a graph are looked for in the layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bitquest.evaluation.verify_lockstep import Lockstep, Root
from bitquest.evaluation.verify_report import Check
from bitquest.inference import KVCache, SamplingOptions, generate
from bitquest.inference.engine import decoding_of, generate_by_layers
from bitquest.inference.native_decode import NativeDecoder
from bitquest.models import Llama

_GREEDY = SamplingOptions(temperature=0)
_PROMPT = 16
_WAYS = {"layers": "layer by layer", "native": "native decoding", "graph": "decoding by a CUDA graph"}


@dataclass(frozen=True)
class Divergence:
    """Where two greedy texts part, and why.

    token: number of the first new token that differs. forced: the token the packed model takes there with the trained
    layers' codes forced. root: the first flip before that token, None if there is none. way: how the packed model wrote
    the text (`decoding_of`).
    """

    prompt: int
    token: int
    trained: int
    packed: int
    forced: int
    root: Root | None
    way: str = "layers"

    @property
    def is_explained(self) -> bool:
        """Whether a flip came before, and without flips the packed model takes the trained one's token."""
        return self.root is not None and self.forced == self.trained

    def __str__(self) -> str:
        by = "" if self.way == "layers" else f" ({_WAYS[self.way]})"
        parted = f"prompt {self.prompt}: new token {self.token} is {self.trained} trained, {self.packed} packed{by}"
        if self.root is None:
            return f"{parted}, and no activation code flipped before it"
        flip = (
            f"{self.root.layer} at position {self.root.token}, channel {self.root.channel}, "
            f"{self.root.distance:.1e}·Δ from its threshold"
        )
        if not self.is_explained:
            return f"{parted}; codes flipped ({flip}), but with the trained codes forced it is still {self.forced}"
        return f"{parted}: caused by the flip in {flip}; with the trained codes forced it is {self.forced}"


def prompts_from(tokens: Tensor, count: int, context: int) -> list[list[int]]:
    """`count` prompts from evenly spaced places of a text (n,), short enough to leave half of the context."""
    length = max(1, min(_PROMPT, context // 2, tokens.numel()))
    last = tokens.numel() - length
    starts = sorted({round(i * last / max(1, count - 1)) for i in range(count)})
    return [tokens[start : start + length].tolist() for start in starts]


def check_greedy(
    trained: Llama,
    packed: Llama,
    prompts: list[list[int]],
    new_tokens: int,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Check:
    """Greedy tokens of both models for each prompt, through the key-value cache; the packed one's in both its ways."""
    failures: list[str] = []
    explained: list[str] = []
    compared = 0
    ways = tuple(dict.fromkeys(("layers", decoding_of(packed))))
    for number, prompt in enumerate(prompts):
        report("writing greedy texts", number, len(prompts))
        ours = list(generate_by_layers(trained, prompt, new_tokens, _GREEDY))
        for way in ways:
            write = generate_by_layers if way == "layers" else generate
            theirs = list(write(packed, prompt, new_tokens, _GREEDY))
            parted = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
            compared += len(ours) if parted is None else parted + 1
            if parted is not None:
                found = explain(trained, packed, prompt, ours[:parted], (ours[parted], theirs[parted]), number, way)
                (explained if found.is_explained else failures).append(str(found))
    texts = f"{compared} tokens of {len(prompts)} texts"
    if len(ways) > 1:
        texts += f", written {' and by '.join(_WAYS[way] for way in ways)},"
    summary = f"{texts} equal"
    if explained:
        summary = f"{texts.rstrip(',')}; {len(explained)} texts part at a flip: {explained[0]}"
    figures = {"texts": len(prompts), "tokens": compared, "explained": explained, "decoding": list(ways)}
    return Check.of("greedy tokens", summary, failures, figures)


def explain(
    trained: Llama,
    packed: Llama,
    prompt: list[int],
    common: list[int],
    parted: tuple[int, int],
    number: int,
    way: str = "layers",
) -> Divergence:
    """Go over a prompt and the tokens both models agreed on, in the very calls that generation makes."""
    lockstep = Lockstep(trained, packed)
    device = next(trained.buffers()).device
    positions = len(prompt) + len(common)
    natively = (False, False, way == "native")  # as generate attends to the prompt
    caches = tuple(KVCache(trained.config, positions=positions, device=device, native=free) for free in natively)
    decoder = NativeDecoder(packed, caches[2]) if way == "native" else None
    forced = torch.empty(0)
    for chunk in (prompt, *([token] for token in common)):
        freely = None
        if decoder is not None and caches[2].length >= len(prompt):
            freely = partial(decoder.watched_step, chunk[0])
        _, forced, _ = lockstep.run(torch.tensor([chunk], device=device), (caches[0], caches[1], caches[2]), freely)
    root = lockstep.roots[0] if lockstep.roots else None
    return Divergence(number, len(common), parted[0], parted[1], int(forced[0, -1].argmax()), root, way)
