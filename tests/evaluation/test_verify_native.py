"""The proof holds on the native engine, for every kind of scheme it runs."""

import pytest

from bitquest.evaluation import verify_greedy
from bitquest.evaluation.verify import verify
from bitquest.export import load
from bitquest.inference.native_decode import NativeDecoder
from bitquest.nn import PackedLinear
from bitquest.ops.native import availability
from bitquest.training import load_run

pytestmark = pytest.mark.skipif(not availability()[0], reason=availability()[1])
SMALL = {"tokens": 200, "texts": 2, "new_tokens": 8}
SCHEMES = [
    *("w1a1", "w1a2", "w1a8", "w2a2", "w2a8", "w3a3", "w4a4", "w4a8", "w8a8"),
    *(f"w{bits}a16" for bits in range(1, 9)),
    *("w4a4-2:4", "w4a4-g128"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_passes_on_the_native_engine(trained_run, tmp_path, scheme):
    wide = {"hidden_size": 128, "intermediate_size": 128} if scheme.endswith("g128") else {}
    trained_run(tmp_path, scheme, **wide)
    report = verify(tmp_path / "run", tmp_path / "packed", backend="native", **SMALL)
    assert report.passed, [(check.name, check.failures) for check in report.failed]
    assert report.check("greedy tokens").figures["decoding"] == ["layers", "native"]


PROMPTS = [[256, 104, 101], [97, 98]]


def test_an_error_of_native_decoding_alone_is_found(w1a1, monkeypatch):
    run, packed = load_run(w1a1 / "run"), load(w1a1 / "packed", backend="native")
    step = NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, token: step(self, token).roll(1))
    check = verify_greedy.check_greedy(run.model, packed, PROMPTS, 8)
    assert not check.passed
    assert len(check.failures) == 2
    for failure in check.failures:
        assert "new token 1 is" in failure
        assert "packed (native decoding), and no activation code flipped before it" in failure


def test_a_flip_of_native_decoding_is_told_from_an_error(w1a1, monkeypatch):
    """One value of one step is quantized the other way: a root if its row agrees, and then it explains the token."""
    run, packed = load_run(w1a1 / "run"), load(w1a1 / "packed", backend="native")
    step, encode = NativeDecoder.step, PackedLinear.encode_input
    layer, steps = packed.get_submodule("model.layers.1.mlp.down_proj"), []

    def stepped(self, token):
        steps.append(token)
        return step(self, token).roll(1)

    def encoded(self, x):
        made = encode(self, x)
        if self is layer and steps:  # the inputs of a step, not of the prompt or the other passes
            steps.clear()
            made.codes[..., 5] = -1 - made.codes[..., 5]
        return made

    monkeypatch.setattr(NativeDecoder, "step", stepped)
    monkeypatch.setattr(PackedLinear, "encode_input", encoded)
    found = verify_greedy.explain(run.model, packed, PROMPTS[0], [101], (1, 2), 0, "native")
    assert (found.root.layer, found.root.token, found.root.channel) == ("model.layers.1.mlp.down_proj", 3, 5)
    assert "packed (native decoding)" in str(found)
