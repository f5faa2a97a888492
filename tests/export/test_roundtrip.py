"""What is saved comes back: the same codes, the same numbers, the same outputs, the same bytes."""

import copy
import json

import pytest
import torch
from torch import nn

import bitquest as bq
from bitquest.errors import ConfigError, FormatError, UserError
from bitquest.export import load, packed_sizes, read_tokenizer, save
from bitquest.export.reader import open_packed
from bitquest.export.tensorfile import read_header
from bitquest.models import Tokenizer
from bitquest.nn import PackedEmbedding, PackedLinear, pack_, quantize_

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 257
SCHEMES = ["none", *(f"w{b}a{b}" for b in range(1, 9))]
SCHEMES += ["w1a8", "w16a4", "w4a16", "w16a16", "w4a4-fp4", "w2a2-ternary", "w4a4-2:4", "w3a8-4:8", "w1a1-norot"]
SCHEMES += ["w4a4-g32", "w2a8-2:4-g32", "w1a1-h8", "w4a4-h4", "w4a4-ste", "w1a1-clip"]


def equal_states(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loaded_model_is_the_packed_model(make_llama, tmp_path, scheme):
    model = make_llama(scheme)
    before = copy.deepcopy(model.state_dict())
    save(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded, packed = load(tmp_path / "out"), pack_(model)
    equal_states(loaded, packed)
    for (name, ours), (_, theirs) in zip(loaded.named_modules(), packed.named_modules(), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, PackedLinear):
            assert ours.weight_spec == theirs.weight_spec, name
            assert (ours.activation_spec, ours.rotation) == (theirs.activation_spec, theirs.rotation), name
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), packed(TOKENS))
    with open_packed(tmp_path / "out") as opened:
        assert opened.scheme == bq.Scheme.parse(scheme) or scheme in ("none", "w16a16")


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True, "norm_before_o_proj": True, "norm_before_down_proj": True},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": 8, "rope_theta": 5e5, "rms_norm_eps": 1e-6},
    ],
)
@pytest.mark.parametrize("scheme", ["none", "w2a2", "w4a8-h8"])
def test_model_options_come_back(make_llama, tmp_path, options, scheme):
    model = make_llama(scheme, **options)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS), pack_(model)(TOKENS))


@pytest.mark.parametrize("scheme", ["w1a1", "w1a1-h8"])
def test_tied_weights_are_stored_and_held_once(make_llama, tmp_path, scheme):
    save(make_llama(scheme, tie_word_embeddings=True), tmp_path / "tied")
    save(make_llama(scheme), tmp_path / "untied")
    tied, untied = packed_sizes(tmp_path / "tied"), packed_sizes(tmp_path / "untied")
    assert tied["head_bytes"] == 0
    assert tied["total_bytes"] == untied["total_bytes"] - untied["head_bytes"]
    assert tied["parameters"] == untied["parameters"] - 257 * 32
    loaded = load(tmp_path / "tied")
    table, head = loaded.model.embed_tokens, loaded.lm_head
    if scheme == "w1a1":
        assert table.weight is head.weight
    else:
        assert isinstance(table, PackedEmbedding)
        assert table.packed is head.packed
        assert table.step is head.step


def test_the_trained_dtype_is_kept(make_llama, tmp_path):
    model = make_llama("w4a4").to(torch.bfloat16)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.model.norm.weight.dtype == loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    step = loaded.model.layers[0].mlp.up_proj.step
    assert step.dtype == torch.float32
    assert torch.equal(step, model.model.layers[0].mlp.up_proj.encode_weight().step)


def test_saving_twice_gives_the_same_bytes(make_llama, tmp_path):
    model = make_llama("w3a3-2:4-h8", tie_word_embeddings=True)
    for name in ("one", "two"):
        save(model, tmp_path / name, Tokenizer.byte_level(), {"b": 1, "a": [1.5, None]})
    save(load(tmp_path / "one"), tmp_path / "three", read_tokenizer(tmp_path / "one"), {"a": [1.5, None], "b": 1})
    for file in ("model.safetensors", "config.json", "tokenizer.json", "manifest.json"):
        first = (tmp_path / "one" / file).read_bytes()
        assert first == (tmp_path / "two" / file).read_bytes() == (tmp_path / "three" / file).read_bytes(), file


def test_the_safetensors_library_reads_the_same_tensors(packed_dir):
    from safetensors.torch import load_file

    theirs = load_file(packed_dir / "model.safetensors")
    with open_packed(packed_dir) as ours:
        assert set(ours.header.entries) == set(theirs)
        assert all(torch.equal(ours.read(name), theirs[name]) for name in theirs)


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 33, 64, 127, 128, 129, 257])
def test_a_linear_layer_takes_at_most_b_plus_40_over_k_bits_per_weight(tmp_path, bits, width):
    rows = 11
    layer = quantize_(nn.Sequential(nn.Linear(width, rows, bias=False)), f"w{bits}a8")
    save(layer, tmp_path / "out")
    taken = packed_sizes(tmp_path / "out")["linear_bytes"] * 8 / (rows * width)
    assert taken <= bits + 40 / width
    loaded = load(tmp_path / "out", nn.Sequential(nn.Linear(width, rows, bias=False)))
    assert torch.equal(loaded[0].codes, layer[0].encode_weight().codes)


def test_sparse_codes_take_only_what_is_kept(tmp_path):
    sizes = {}
    for scheme in ("w4a4", "w4a4-2:4", "w4a4-4:8"):
        layer = quantize_(nn.Sequential(nn.Linear(128, 16, bias=False)), scheme)
        sizes[scheme] = packed_sizes(save(layer, tmp_path / scheme))["linear_bytes"]
    assert sizes["w4a4"] == 16 * (64 + 4)
    assert sizes["w4a4-2:4"] == 16 * (32 + 16 + 4)  # half the codes, a bit for each element
    assert sizes["w4a4-4:8"] == 16 * (32 + 8 + 4)  # a bit for each pair


def test_sizes_add_up(make_llama, tmp_path):
    save(make_llama("w1a1"), tmp_path / "out", Tokenizer.byte_level())
    sizes = packed_sizes(tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        header = read_header(file, "it")
    assert sizes["total_bytes"] == sum(entry.bytes for entry in header.entries.values())
    norms = 3 * 32 * 4
    assert sizes["total_bytes"] == sizes["linear_bytes"] + sizes["embedding_bytes"] + sizes["head_bytes"] + norms
    assert sizes["embedding_bytes"] == sizes["head_bytes"] == 257 * 32 * 4
    assert sizes["parameters"] == 2 * 257 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert sizes["file_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


# --- modules of one's own ------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """Biases, an integer buffer, a table, a layer used twice, and a width no rotation fits."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 12)
        self.inner = nn.ModuleDict({"a": nn.Linear(12, 9), "b": nn.Linear(9, 12, bias=False)})
        self.again = self.inner["a"]
        self.norm = nn.LayerNorm(12)
        self.register_buffer("counts", torch.arange(3))

    def forward(self, ids):
        x = self.norm(self.table(ids))
        return self.inner["b"](self.inner["a"](x) + self.again(x))


def quantizer(**fields):
    return bq.Quantizer(**fields)


FOREIGN = {
    "per tensor": bq.Scheme(quantizer(granularity=bq.PerTensor()), quantizer(grid=bq.UniformGrid(8))),
    "codebook": bq.Scheme(quantizer(grid=bq.CodebookGrid("odd", (-1.0, -0.25, 0.5, 2.0, 3.0))), None),
    "learned": bq.Scheme(
        quantizer(grid=bq.UniformGrid(3), scale=bq.Learned()),
        quantizer(grid=bq.UniformGrid(5), granularity=bq.PerTensor(), scale=bq.Learned()),
    ),
    "table": bq.Scheme(quantizer(scale=bq.AbsMax()), None, bq.BlockHadamard(), quantizer(grid=bq.UniformGrid(8))),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_modules_are_filled(tmp_path, name):
    model = quantize_(Foreign(), FOREIGN[name])
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        model(ids)  # learned activation steps start here
        save(model, tmp_path / "out")
        fresh = Foreign()
        loaded = load(tmp_path / "out", fresh)
        assert loaded is fresh
        assert isinstance(loaded.inner["a"], PackedLinear)
        if name != "learned":  # there each use of a layer has a step of its own
            assert loaded.inner["a"].packed is loaded.again.packed
        assert torch.equal(loaded(ids), pack_(model).eval()(ids))


def test_a_module_that_is_itself_a_layer(tmp_path):
    layer = quantize_(nn.Linear(8, 4), "w2a8")
    save(layer, tmp_path / "out")
    loaded = load(tmp_path / "out", nn.Linear(8, 4))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), layer(x))


def test_foreign_names_and_shapes_are_compared(tmp_path):
    save(quantize_(Foreign(), "w4a4"), tmp_path / "out")
    with pytest.raises(FormatError, match="pass it: load"):
        load(tmp_path / "out")
    larger = Foreign()
    larger.extra = nn.Linear(2, 2)
    untouched = copy.deepcopy(larger.state_dict())
    with pytest.raises(FormatError, match=r"missing: extra\.bias, extra\.weight"):
        load(tmp_path / "out", larger)
    assert all(torch.equal(t, untouched[n]) for n, t in larger.state_dict().items())
    assert type(larger.inner["a"]) is nn.Linear
    smaller = Foreign()
    del smaller.norm
    with pytest.raises(FormatError, match=r"not the model's: norm\.bias, norm\.weight"):
        load(tmp_path / "out", smaller)
    other = Foreign()
    other.inner["b"] = nn.Linear(9, 13, bias=False)
    with pytest.raises(FormatError, match=r"inner\.b.* is \(12, 9\).*\(13, 9\)"):
        load(tmp_path / "out", other)
    wrong = Foreign()
    wrong.inner["b"] = nn.Identity()
    with pytest.raises(FormatError, match=r"inner\.b.*Identity"):
        load(tmp_path / "out", wrong)
    shorter = Foreign()
    shorter.counts = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(FormatError, match=r"counts.*\(3,\).*\(4,\)"):
        load(tmp_path / "out", shorter)


# --- refusals and the disk -----------------------------------------------------------------------------------------


def test_what_cannot_be_stored_is_refused_by_name(make_llama, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"q_proj.*sparse 8-bit"):
        save(make_llama("w8a8-2:4"), out)
    model = make_llama("w4a4")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(FormatError, match=r"up_proj\.step"):
        save(model, out)
    with pytest.raises(FormatError, match="never set"):
        save(quantize_(Foreign(), FOREIGN["learned"]), out)
    with pytest.raises(ConfigError, match="metadata must be JSON"):
        save(make_llama("w4a4"), out, None, {"a": float("nan")})
    with pytest.raises(ConfigError, match="do not belong together"):
        save(make_llama("w4a4", vocab_size=100), out, Tokenizer.byte_level())
    complex_buffer = quantize_(Foreign(), "w4a4")
    complex_buffer.register_buffer("odd", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(FormatError, match=r"odd.*complex64"):
        save(complex_buffer, out)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_unasked(make_llama, tmp_path, packed_dir):
    model = make_llama("w1a1")
    with pytest.raises(ConfigError, match="--overwrite"):
        save(model, packed_dir)
    before = {path.name: path.read_bytes() for path in packed_dir.iterdir()}
    (packed_dir / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not only a packed model"):
        save(model, packed_dir, overwrite=True)
    (packed_dir / "notes.txt").unlink()
    assert {path.name: path.read_bytes() for path in packed_dir.iterdir()} == before
    save(model, packed_dir, overwrite=True)
    assert not (packed_dir / "tokenizer.json").exists()
    assert load(packed_dir).model.layers[0].mlp.up_proj.weight_spec.bits == 1
    assert [path.name for path in packed_dir.parent.iterdir()] == ["packed"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="there is a file"):
        save(model, tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")


def test_an_interrupted_save_leaves_the_old_model(make_llama, packed_dir, monkeypatch):
    before = {path.name: path.read_bytes() for path in packed_dir.iterdir()}

    def full(*_):
        raise OSError("No space left on device")

    for broken in ("bitquest.export.writer.manifest_bytes", "bitquest.export.writer._rename"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            with pytest.raises(UserError, match=r"packed: could not be written: No space .*nothing was kept"):
                save(make_llama("w1a1"), packed_dir, overwrite=True)
        assert {path.name: path.read_bytes() for path in packed_dir.iterdir()} == before
        assert [path.name for path in packed_dir.parent.iterdir()] == ["packed"]


def test_a_place_that_cannot_be_written(make_llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/packed: could not be written: .*nothing was kept"):
        save(make_llama("w1a1"), tmp_path / "file" / "packed")


def test_a_device_that_is_none(packed_dir):
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used here"):
        load(packed_dir, device="gpu")


def test_the_configuration_names_what_was_trained(packed_dir):
    config = json.loads((packed_dir / "config.json").read_bytes())
    assert config["metadata"] == {"step": 7}
    assert bq.Scheme.from_json(config["scheme"]) == bq.Scheme.parse("w3a3")
    assert len(config["quantizers"]) == 1
    assert read_tokenizer(packed_dir).sha256 == Tokenizer.byte_level().sha256
