"""Our class for lm-eval: in full where lm-eval is installed, and what is said where it is not."""

import importlib.util
import sys

import pytest

from bitquest.errors import MissingExtraError
from bitquest.evaluation.perplexity import evaluate_tokens
from bitquest.export import save
from bitquest.models import Llama, LlamaConfig, Tokenizer
from bitquest.nn import quantize_

BYTES = Tokenizer.byte_level()
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "bitquest.integrations.lm_eval", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'bitquest\[lm-eval\]'"):
        importlib.import_module("bitquest.integrations.lm_eval")


@pytest.fixture
def lm(tmp_path):
    from bitquest.integrations.lm_eval import BitQuestLM

    model = quantize_(Llama(LlamaConfig(257, 32, 64, 1, 2, 2, 32)).init_weights(2), "w1a1").eval()
    return BitQuestLM(save(model, tmp_path / "packed", BYTES), batch_size="auto")


class Ask:
    """What lm-eval hands over of a request."""

    def __init__(self, *args):
        self.args = args


@needs_lm_eval
def test_log_likelihoods_of_pairs_and_of_whole_texts(lm):
    pairs = lm.loglikelihood([Ask("one", " two"), Ask("one", " six")], disable_tqdm=True)
    assert all(nats < 0 for nats, _ in pairs)
    text = "the state of the union is strong and the people are one"
    [whole] = lm.loglikelihood_rolling([Ask(text)], disable_tqdm=True)
    ours = evaluate_tokens(lm.model, [256, *BYTES.encode(text)], utf8_bytes=len(text))
    assert whole == pytest.approx(-ours.nats, rel=0.01)  # its last window looks further back


@needs_lm_eval
def test_texts_end_at_stop_strings_and_limits(lm):
    options = {"until": ["\x00"], "max_gen_toks": 5, "do_sample": False}
    [text] = lm.generate_until([Ask("one and " * 9, options)], disable_tqdm=True)
    assert 1 <= len(text) <= 5
    [cut] = lm.generate_until([Ask("one and " * 9, options | {"until": text[1:2]})], disable_tqdm=True)
    assert cut == text[: text.index(text[1:2])]
