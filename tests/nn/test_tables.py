"""Float tables rounded after training: the values, what stays, and what is refused."""

import copy
import json

import pytest
import torch
from torch import nn

from bitquest.errors import ConfigError
from bitquest.export import load, packed_sizes, save
from bitquest.models import Llama, LlamaConfig
from bitquest.nn import (
    PackedEmbedding,
    PackedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    TableRounding,
    pack_,
    quantize_,
    round_tables_,
)
from bitquest.numerics.fake_quant import fake_quantize
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import BlockHadamard, NoRotation
from bitquest.numerics.scaling import Learned, PerTensor
from bitquest.numerics.sparsity import NofM

VOCABULARY, WIDTH = 50, 48
IDS = torch.arange(VOCABULARY).reshape(2, -1)


def llama(scheme="w1a1", tied=False):
    config = LlamaConfig(VOCABULARY, WIDTH, 64, 1, 2, 2, 32, tie_word_embeddings=tied)
    return quantize_(Llama(config).init_weights(0), scheme, backend="torch").eval()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rotation", [BlockHadamard(), NoRotation()])
def test_the_tables_are_rounded_and_nothing_else(bits, rotation):
    model = llama()
    before = copy.deepcopy(model)
    rounding = TableRounding.to_bits(bits, rotation)
    floats = round_tables_(model, rounding)
    assert set(floats) == {"model.embed_tokens", "lm_head"}
    for name, table in floats.items():
        rounded = model.get_submodule(name)
        assert rounded.weight is table.weight
        assert torch.equal(table.weight, before.get_submodule(name).weight)
        expected = fake_quantize(table.weight.detach(), rounding.quantizer, rotation.resolve(WIDTH))
        torch.testing.assert_close(rounded.quantized_weight(), expected, rtol=0, atol=0)
        assert rounded.encode_weight().step.shape == (VOCABULARY, 1)
    assert type(model.model.embed_tokens) is QuantizedEmbedding
    assert type(model.lm_head) is QuantizedLinear
    assert model.lm_head.activation_quantizer.spec is None
    was, now = before.state_dict(), model.state_dict()
    assert list(was) == list(now)
    assert all(torch.equal(was[name], now[name]) for name in was)
    with torch.no_grad():
        off = (model(IDS) - before(IDS)).norm() / before(IDS).norm()
    assert 0 < off < 0.5


@pytest.mark.parametrize(("bits", "most"), [(8, 0.01), (4, 0.13)])
def test_rounding_errors_are_those_of_the_width(bits, most):
    model = llama("none")
    round_tables_(model, TableRounding.to_bits(bits))
    table = model.model.embed_tokens
    rotated = table.rotation.apply(table.weight.detach())
    error = float((table.quantized_weight() - rotated).norm() / rotated.norm())
    assert most / 4 < error < most


def test_tied_tables_stay_one(tmp_path):
    model = llama(tied=True)
    round_tables_(model, TableRounding.to_bits(8))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save(model, tmp_path / "packed")
    sizes = packed_sizes(tmp_path / "packed")
    assert sizes["embedding_bytes"] == VOCABULARY * (WIDTH + 4)
    assert sizes["head_bytes"] == 0
    loaded = load(tmp_path / "packed")
    assert loaded.lm_head.packed is loaded.model.embed_tokens.packed
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scheme", ["w1a1", "none", "w2a8-norot", "w16a16"])
def test_packed_and_rounded_agree(tmp_path, bits, scheme):
    model = llama(scheme)
    round_tables_(model, TableRounding.to_bits(bits, NoRotation() if scheme in ("none", "w2a8-norot") else None))
    save(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert isinstance(loaded.model.embed_tokens, PackedEmbedding)
    assert isinstance(loaded.lm_head, PackedLinear)
    sizes = packed_sizes(tmp_path / "packed")
    assert sizes["embedding_bytes"] == sizes["head_bytes"] == VOCABULARY * (WIDTH * bits // 8 + 4)
    with torch.no_grad():
        expected = model(IDS)
        assert float((loaded(IDS) - expected).norm() / expected.norm()) < 1e-3  # a code may flip
        torch.testing.assert_close(pack_(model)(IDS), loaded(IDS), rtol=0, atol=0)


def test_a_module_of_ones_own_and_one_of_bfloat16():
    module = nn.ModuleDict({"words": nn.Embedding(9, 20), "body": nn.Linear(20, 20), "lm_head": nn.Linear(20, 9)})
    bias = module["lm_head"].bias
    assert set(round_tables_(module, TableRounding.to_bits(4))) == {"words", "lm_head"}
    assert type(module["body"]) is nn.Linear
    assert module["lm_head"].bias is bias
    small = nn.ModuleDict({"words": nn.Embedding(9, 20)}).bfloat16()
    round_tables_(small, TableRounding.to_bits(8))
    table = small["words"]
    assert table.weight.dtype == torch.bfloat16
    packed = pack_(small)["words"]
    expected = table.weight.detach().float()
    assert float((packed(torch.arange(9)) - expected).norm() / expected.norm()) < 0.01


def test_what_is_refused_is_left_as_it_is():
    rounding = TableRounding.to_bits(8)

    class Scaled(nn.Embedding):
        pass

    listed = nn.Embedding(4, 8, max_norm=1.0)
    for module, part in [
        (llama("w1a1-h8"), "model.embed_tokens has 8-bit codes already"),
        (pack_(llama("w1a1-h4")), "model.embed_tokens has 4-bit codes already"),
        (nn.ModuleDict({"a": nn.Embedding(4, 8), "b": Scaled(4, 8)}), "b: Scaled has a forward of its own"),
        (nn.ModuleDict({"a": nn.Embedding(4, 8), "b": listed}), "b: a quantized embedding has no max_norm"),
        (nn.ModuleDict({"a": nn.Linear(4, 8)}), "found no embedding"),
        (nn.Embedding(4, 8), "itself a table"),
    ]:
        before = {name: type(part) for name, part in module.named_modules()}
        with pytest.raises(ConfigError, match=part):
            round_tables_(module, rounding)
        assert {name: type(part) for name, part in module.named_modules()} == before
    module = nn.ModuleDict({"words": nn.Embedding(4, 24)})
    with pytest.raises(ConfigError, match=r"words: .*16"):
        round_tables_(module, TableRounding.to_bits(8, BlockHadamard(16)))
    for bits in (1, 7, 16, "8"):
        with pytest.raises(ConfigError, match="8 or 4 bits, not"):
            TableRounding.to_bits(bits)
    for quantizer in (
        Quantizer(UniformGrid(4), sparsity=NofM(2, 4)),
        Quantizer(UniformGrid(4), PerTensor(), Learned()),
    ):
        with pytest.raises(ConfigError, match="dense quantizer"):
            TableRounding(quantizer)


@pytest.mark.parametrize("bits", [8, 4])
def test_json_says_it_all(bits):
    for rotation in (BlockHadamard(), BlockHadamard(16), NoRotation()):
        rounding = TableRounding.to_bits(bits, rotation)
        assert TableRounding.from_json(json.loads(json.dumps(rounding.to_json()))) == rounding


def test_json_that_means_nothing_is_refused():
    good = TableRounding.to_bits(8).to_json()
    grid = {**good["quantizer"], "grid": {"kind": "uniform", "bits": 99, "exact": False}}
    for fields in [
        None,
        8,
        "8",
        [],
        {},
        {**good, "bits": 4},
        {**good, "bits": None},
        {**good, "more": 1},
        {**good, "rounded": "before"},
        {**good, "rotation": "none"},
        {**good, "quantizer": 3},
        {**good, "quantizer": grid},
        {**good, "quantizer": {**good["quantizer"], "scale": {"kind": "learned"}}},
    ]:
        with pytest.raises(ConfigError):
            TableRounding.from_json(fields)
