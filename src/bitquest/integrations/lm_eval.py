"""EleutherAI's lm-evaluation-harness on every model that `bitquest eval` takes, packed ones above all.

    from lm_eval import simple_evaluate
    from bitquest.integrations.lm_eval import BitQuestLM
    simple_evaluate(model=BitQuestLM("packed/w1a1"), tasks=["hellaswag"])

or, with lm-eval's own command line:

    python -m bitquest.integrations.lm_eval run --model bitquest --model_args path=packed/w1a1 --tasks hellaswag

Texts become tokens as in lm-eval's class for Hugging Face models, so the scores of a plain Llama are equal.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitquest.errors import MissingExtraError
from bitquest.evaluation.likelihood import Request, context_of, encode_requests, log_likelihoods
from bitquest.evaluation.sources import open_model
from bitquest.inference import SamplingOptions, generate

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise MissingExtraError("lm-eval", "lm-eval", "Running lm-eval's tasks") from None

_NEW_TOKENS = 256  # what lm-eval's Hugging Face class generates at most where a task does not say


@register_model("bitquest")
class BitQuestLM(LM):  # type: ignore[misc]
    """A packed model, a run or a Hugging Face Llama folder as lm-eval sees models; float32, one process.

    batch_size: contexts computed at once; None or "auto": as many as fill 2048 places. Raises CheckpointError and
    FormatError as `bitquest eval` does.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | None = None,
        backend: str = "auto",
        batch_size: int | str | None = None,
        step: int | None = None,
        context: int | None = None,
        max_batch_size: int | None = None,  # lm-eval's command line always passes it
    ) -> None:
        super().__init__()
        opened = open_model(Path(path), step, backend, device or "cpu")
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.context = context_of(self.model, context)
        self.batch_size = None if batch_size in (None, "auto") else int(str(batch_size))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(ln p, is greedy) of each request's (context, continuation)."""
        pairs = [request.args for request in requests]
        answers = self._score(encode_requests(self.tokenizer, pairs), disable_tqdm)
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each request's whole text, in windows of the context that do not overlap."""
        windows, counts = list[Request](), list[int]()
        for request in requests:
            ids = self.tokenizer.backend.encode(request.args[0], add_special_tokens=True).ids
            made = map(make_disjoint_window, get_rolling_token_windows(ids, self._start, self.context, 1))
            fresh = [Request(tuple(context), tuple(continuation)) for context, continuation in made]
            windows += fresh
            counts.append(len(fresh))
        scores = iter(self._score(windows, disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text after each request's context up to a stop string, the document's end, or `max_gen_toks`."""
        return [self._write(*request.args) for request in tqdm(requests, disable=disable_tqdm)]

    # --- parts -----------------------------------------------------------------------------------------------------

    @property
    def _start(self) -> int:
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def _score(self, requests: list[Request], quiet: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), disable=quiet, desc="log-likelihoods") as bar:
            found = log_likelihoods(
                self.model,
                requests,
                context=self.context,
                batch_size=self.batch_size,
                progress=lambda done, _: bar.update(done - bar.n),
            )
        return [(likelihood.nats, likelihood.greedy) for likelihood in found]

    def _write(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        most = min(int(options.get("max_gen_toks", _NEW_TOKENS)), self.context - 1)
        warm = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        sampling = SamplingOptions(temperature=warm, top_k=options.get("top_k", 0), top_p=options.get("top_p", 1.0))
        prompt = self.tokenizer.backend.encode(context, add_special_tokens=True).ids or [self._start]
        ids, text = list[int](), ""
        for token in generate(self.model, prompt[most - self.context :], most, sampling, self.tokenizer.eos_id):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if any(stop in text for stop in stops):
                break
        for stop in filter(None, stops):
            text = text.partition(stop)[0]
        return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
