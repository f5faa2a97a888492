"""Log-likelihoods against one forward pass per continuation, and batches that change nothing."""

import pytest
import torch
from tokenizers import processors

from bitquest.errors import DataError
from bitquest.evaluation.likelihood import Likelihood, Request, cut_to_context, encode_requests, log_likelihoods
from bitquest.models import Llama, LlamaConfig, Tokenizer
from bitquest.nn import pack_, quantize_

BYTES = Tokenizer.byte_level()


def model_of(scheme="none", context=96):
    config = LlamaConfig(300, 64, 96, 2, 4, 2, context)
    return quantize_(Llama(config).init_weights(3), scheme).eval()


def random_requests(count, longest=40, seed=0):
    """Contexts with three continuations each, of every length."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        sizes = torch.randint(1, longest, (4,), generator=g).tolist()
        context, *continuations = (tuple(torch.randint(0, 300, (n,), generator=g).tolist()) for n in sizes)
        made += [Request(context, continuation) for continuation in continuations]
    return made


@torch.no_grad()
def reference(model, request, context):
    """As lm-eval computes it: the whole text, cut on the left, through the model by itself."""
    ids = (request.context + request.continuation)[-(context + 1) :]
    log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), -1)[-len(request.continuation) :]
    target = torch.tensor(request.continuation)
    return float(log_p.gather(1, target.unsqueeze(1)).sum()), bool((log_p.argmax(-1) == target).all())


@pytest.mark.parametrize("context", [96, 50])  # 50: contexts are cut, and continuations of one part
def test_equals_one_pass_for_each_continuation(context):
    model, requests = model_of(), random_requests(6)
    found = log_likelihoods(model, requests, context=context)
    for request, likelihood in zip(requests, found, strict=True):
        nats, greedy = reference(model, request, context)
        assert likelihood.nats == pytest.approx(nats, rel=1e-5)
        assert likelihood.greedy == greedy


def test_greedy_continuations_are_known_as_such():
    model, ids = model_of(), [5, 6]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    right, wrong = tuple(ids[2:]), (*ids[2:-1], (ids[-1] + 1) % 300)
    found = log_likelihoods(model, [Request((5, 6), right), Request((5, 6), wrong), Request((5, 6), right[:1])])
    assert [likelihood.greedy for likelihood in found] == [True, False, True]


@pytest.mark.parametrize("scheme", ["none", "w1a1"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_changes_nothing(scheme, packed):
    model = model_of(scheme)
    if packed:
        model = pack_(model)
    requests, lengths = random_requests(5), [set()]
    model.register_forward_pre_hook(lambda _, arguments: lengths[0].add(arguments[0].shape[1]))
    alone = log_likelihoods(model, requests, batch_size=1)
    for batch_size in (2, 16):
        lengths.insert(0, set())
        together = log_likelihoods(model, requests, batch_size=batch_size)
        for a, b in zip(alone, together, strict=True):
            assert b.nats == pytest.approx(a.nats, rel=1e-6)
            assert a.greedy == b.greedy
    assert lengths[0] == lengths[1] == lengths[2] == {64, 96}  # a row's own, whatever the batch
    for a, b in zip(requests[::4], alone[::4], strict=True):
        [single] = log_likelihoods(model, [a])  # without its sisters in the row: attention adds up other lengths
        assert single.nats == pytest.approx(b.nats, rel=1e-5 if scheme == "none" else 0.05)


def test_equal_requests_are_computed_once_and_are_exactly_equal():
    requests = random_requests(1)
    rows = []
    model = model_of()
    model.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[0]))
    first, *rest = log_likelihoods(model, [*requests, *requests, *requests])
    assert sum(rows) == 1
    assert first == rest[2] == rest[5]
    assert isinstance(first, Likelihood)


def test_progress_the_mode_and_nothing_at_all():
    model, requests, seen = model_of().train(), random_requests(5), []
    log_likelihoods(model, requests + requests, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert model.training
    assert log_likelihoods(model, []) == []


def test_what_does_not_fit_is_refused():
    model = model_of(context=16)
    assert cut_to_context(Request((1, 2, 3), (4, 5)), 3) == Request((2, 3), (4, 5))
    assert cut_to_context(Request((1, 2, 3), (4, 5)), 2) == Request((3,), (4, 5))
    for request, context, match in [
        (Request((1,), (2,) * 17), None, "17 tokens are more than the 16 positions"),
        (Request((1,), (2,) * 9), 8, "9 tokens are more than the 8 positions"),
        (Request((1,), ()), None, "no token to predict"),
        (Request((1,), (300,)), None, "token 300, the model a vocabulary of 300"),
        (Request((1,), (2,)), 17, "a context of 17 tokens: this model sees from 1 to 16"),
        (Request((1,), (2,)), 0, "a context of 0 tokens"),
    ]:
        with pytest.raises(DataError, match=match):
            log_likelihoods(model, [request], context=context)
    with pytest.raises(DataError, match="a batch of 0"):
        log_likelihoods(model, [Request((1,), (2,))], batch_size=0)


# --- from text -----------------------------------------------------------------------------------------------------


def test_white_space_goes_to_the_continuation_and_nothing_stands_in_front():
    assert encode_requests(BYTES, [("ab", " c"), ("ab \n", "c")]) == [
        Request((97, 98), (32, 99)),
        Request((97, 98), (32, 10, 99)),
    ]


def test_an_empty_context_is_the_start_of_a_document():
    assert encode_requests(BYTES, [("", "c"), ("  ", "c")]) == [Request((256,), (99,)), Request((256,), (32, 32, 99))]
    with_bos = Tokenizer(Tokenizer.byte_level().backend, 256, bos_id=1)
    assert encode_requests(with_bos, [("", "c")]) == [Request((1,), (99,))]


def test_what_the_tokenizer_puts_in_front_is_there_once():
    backend = Tokenizer.byte_level().backend
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 256)])
    assert encode_requests(Tokenizer(backend, 256), [("ab", " c")]) == [Request((256, 97, 98), (32, 99))]


def test_context_and_continuation_are_encoded_together():
    merged = Tokenizer.train_bpe(["abab" * 50], 258)  # its one merge is "ab"
    joined, apart = encode_requests(merged, [("xa", "b"), ("xa", "c")])
    ab, a = merged.encode("ab")[0], merged.encode("a")[0]
    assert joined == Request((merged.encode("x")[0], a), ())  # "ab" took the context's token over: nothing is left
    assert apart.continuation == tuple(merged.encode("c"))
    assert merged.encode("xab")[1] == ab
