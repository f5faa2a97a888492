"""Native decoding against the model's own forward: every kind of layer, table and head, and what is left to Python."""

import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitquest.errors import ConfigError, DataError
from bitquest.inference import KVCache, SamplingOptions, generate
from bitquest.inference.engine import generate_by_layers
from bitquest.inference.native_decode import NativeDecoder
from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.nn import PackedLinear, Scheme, pack_, quantize_
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import Learned, PerTensor
from bitquest.ops import native_decoder

pytestmark = pytest.mark.skipif(native_decoder.unavailable() is not None, reason=str(native_decoder.unavailable()))

POSITIONS = 20
EVERY_NORM = {"qk_norm": True, "norm_before_o_proj": True, "norm_before_down_proj": True}
LEARNED = Quantizer(UniformGrid(4), PerTensor(), Learned())


def make(scheme: str | Scheme, backend: str = "native", pack: bool = True, **options: Any) -> Llama:
    options = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS, **options}
    model = quantize_(Llama(LlamaConfig.preset("1M", **options)).init_weights(1), scheme)
    made = pack_(model, backend) if pack else model
    assert isinstance(made, Llama)
    return made.eval()


def differences(model: Llama) -> Tensor:
    """Largest difference of the logits at each position, in units of the largest logit.

    Each step starts from what Python's cache holds, so that a difference at one position is not one at all later ones.
    """
    theirs, ours = KVCache(model.config), KVCache(model.config)
    decoder, found = NativeDecoder(model, ours), []
    with torch.no_grad():
        for position in range(POSITIONS):
            ours.keys.copy_(theirs.keys), ours.values.copy_(theirs.values)
            expected = model(torch.tensor([[position * 7 % 97]]), theirs)[0, -1]
            got = decoder.step(position * 7 % 97)
            found.append((got - expected).abs().max() / expected.abs().max())
            first = (ours.keys[0, :, :, position], theirs.keys[0, :, :, position])
            assert torch.allclose(*first, atol=1e-5 * float(first[1].abs().max()))
    assert ours.length == theirs.length == POSITIONS
    return torch.stack(found)


def assert_equal(model: Llama) -> None:
    """Equal to float rounding; at two positions at most a value lies so near a threshold that its code differs."""
    found = differences(model).sort().values
    assert found[-3] < 1e-5, found
    assert found[-1] < 0.5, found


SCHEMES = ["w1a1", "w1a2", "w2a2", "w3a3", "w4a4", "w8a8", "w1a8", "w2a8", "w4a8", "w1a16", "w4a16", "w8a16"]
SCHEMES += ["w4a4-2:4", "w2a8-4:8", "w4a4-g32", "w4a16-g64", "w2a2-ternary", "w4a4-fp4", "w4a4-norot"]
SCHEMES += ["w1a1-h8", "w4a4-h4", "w4a8-g32-h8", "w1a16-norot-h4"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_the_models(scheme: str) -> None:
    assert_equal(fuse_(make(scheme)))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w1a1", "w4a8-h8", "w4a16"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        EVERY_NORM,
        {"norm_before_down_proj": True, "head_dim": 16, "intermediate_size": 160},
        {"hidden_size": 96, "num_attention_heads": 3, "head_dim": 34, "intermediate_size": 200, "qk_norm": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("fused", [True, False])
def test_logits_of_every_kind_of_block(scheme: str, options: dict[str, Any], fused: bool) -> None:
    model = make(scheme, **options)
    assert_equal(fuse_(model) if fused else model)  # type: ignore[arg-type]


def test_norms_weights_steps_and_biases_are_read() -> None:
    torch.manual_seed(0)
    config = LlamaConfig.preset(
        "1M", vocab_size=97, max_position_embeddings=POSITIONS, num_hidden_layers=2, **EVERY_NORM
    )
    plain = Llama(config).init_weights(1)
    for block in plain.model.layers:  # biases are not Llama's, but nothing forbids them
        block.mlp.up_proj.bias = nn.Parameter(torch.randn(config.intermediate_size))
    plain.lm_head.bias = nn.Parameter(torch.randn(97))
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    learned = Scheme(Quantizer(UniformGrid(4)), LEARNED)
    model = quantize_(plain, learned)
    with torch.no_grad():
        model(torch.randint(97, (2, 9)))  # the first batch sets the learned steps
    assert_equal(pack_(model, "native").eval())  # type: ignore[arg-type]


def test_layers_that_are_not_quantized_stay_floats() -> None:
    config = LlamaConfig.preset(
        "1M", vocab_size=97, max_position_embeddings=POSITIONS, num_hidden_layers=2, **EVERY_NORM
    )
    left = ("k_proj", "gate_proj", "0.mlp.down_proj", "1.self_attn.o_proj")
    model = quantize_(Llama(config).init_weights(1), "w4a4", lambda _, name: not name.endswith(left))
    assert_equal(pack_(model, "native").eval())  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["w1a1", "w4a8-h8", "w1a16"])
def test_any_number_of_threads_gives_the_same_bits(scheme: str) -> None:
    # Large enough that a step is shared among threads: keys and values alone are 7 MB.
    model = make(scheme, hidden_size=512, vocab_size=1031, max_position_embeddings=1000)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = KVCache(model.config)
            cache.keys.normal_(generator=torch.Generator().manual_seed(0))
            cache.values.normal_(generator=torch.Generator().manual_seed(1))
            cache.length = 900
            decoder = NativeDecoder(model, cache)
            made.append(torch.stack([decoder.step(token).clone() for token in range(5)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("scheme", ["w1a1", "w4a4-h8", "w2a8", "w4a16"])
def test_generating_decodes_natively_and_writes_the_same(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options, steps = make(scheme), SamplingOptions(temperature=0), []
    step = NativeDecoder.step
    monkeypatch.setattr(NativeDecoder, "step", lambda self, token: steps.append(token) or step(self, token))
    native = list(generate(model, [1, 2, 3], 15, options))
    assert steps == native[:-1]
    assert list(generate_by_layers(model, [1, 2, 3], 15, options)) == native
    assert len(steps) == 14  # not by the decoder


@pytest.mark.parametrize("scheme", ["w1a1-h8", "w4a8-h4", "w2a2-h8"])
@pytest.mark.parametrize("options", [{}, EVERY_NORM], ids=["plain", "norms"])
def test_a_watched_step_shows_the_very_values_that_were_rounded(scheme: str, options: dict[str, Any]) -> None:
    """Each layer, given what the step says that it read, gives the very bits that the step went on with."""
    model = make(scheme, **options)
    cache = KVCache(model.config)
    decoder, seen = NativeDecoder(model, cache), dict[str, Tensor]()
    for position in range(6):
        logits = decoder.watched_step(position * 7, seen.__setitem__)
        for i, block in enumerate(model.model.layers):
            name = f"model.layers.{i}.self_attn.v_proj"
            values = cache.values[i, 0, :, position].flatten()
            assert torch.equal(block.self_attn.v_proj(seen[name]).flatten(), values)  # type: ignore[operator, union-attr]
        assert torch.equal(model.lm_head(seen["lm_head"]).flatten(), logits)
    names = {name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    assert set(seen) == names
    assert torch.equal(decoder.step(3), NativeDecoder(model, cache)._decoder.step(3, 6))


def test_a_watched_step_shows_what_the_layers_read() -> None:
    model = make("w4a16", **EVERY_NORM)  # nothing to flip
    seen, read, cache = dict[str, Tensor](), dict[str, Tensor](), KVCache(model.config)
    decoder = NativeDecoder(model, KVCache(model.config))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | PackedLinear):
            layer.register_forward_pre_hook(lambda _, x, name=name: read.update({name: x[0]}))
    for position in range(4):
        decoder.watched_step(position * 7, seen.__setitem__)
        with torch.no_grad():
            model(torch.tensor([[position * 7]]), cache)
        assert set(seen) == set(read)
        for name, x in seen.items():
            assert torch.allclose(x, read[name], atol=1e-5 * float(x.abs().max())), name


def test_a_step_allocates_nothing() -> None:
    model = make("w4a8-h8", max_position_embeddings=200)
    decoder = NativeDecoder(model, KVCache(model.config))
    for token in range(20):
        logits = decoder.step(token)
    address = logits.data_ptr()
    with torch.autograd.profiler.profile(profile_memory=True, use_cpu=True) as profile:
        decoder.step(5)
    assert not profile.function_events, "a step calls no operator of torch"
    tracemalloc.start()
    try:
        decoder.step(6)
        before = tracemalloc.get_traced_memory()[0]
        for token in range(97):
            decoder.step(token)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 512  # the number that counts positions, and the call's own few
    assert decoder.step(7).data_ptr() == address


def test_what_does_not_fit_is_said_and_left_to_python() -> None:
    hooked = make("w4a4")
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    replaced = make("w4a4")
    replaced.model.layers[0].mlp.act = nn.SiLU()  # type: ignore[assignment]
    for model, reason in (
        (make("w4a4", "torch"), "runs on backend 'torch'"),
        (make("w16a4", "auto"), "runs on backend 'torch'"),
        (make("none"), "no layer of it is packed"),
        (make("w4a4", pack=False), "is a QuantizedLinear"),
        (make("w4a4").to(torch.bfloat16), "is torch.bfloat16"),
        (hooked, "model.layers.1.mlp has forward hooks"),
        (replaced, "model.layers.0.mlp.act is a SiLU"),
    ):
        assert reason in str(NativeDecoder.refuses(model))
        with pytest.raises(ConfigError, match="native decoding: "):
            NativeDecoder(model, KVCache(model.config))
    assert len(list(generate(make("w4a4", "torch"), [1, 2], 4))) == 4
    model = make("w4a4")
    assert NativeDecoder.refuses(model) is None
    for cache in (KVCache(model.config, batch=2), KVCache(model.config, dtype=torch.bfloat16)):
        assert "cache" in str(NativeDecoder.refuses(model, cache))


def test_the_caches_end_is_the_decoders() -> None:
    model = make("w4a4")
    decoder = NativeDecoder(model, KVCache(model.config, positions=2))
    decoder.step(1), decoder.step(2)
    with pytest.raises(DataError, match="holds 2 positions"):
        decoder.step(3)
    with pytest.raises(ConfigError, match="decoding token 97"):
        NativeDecoder(model, KVCache(model.config)).step(97)
