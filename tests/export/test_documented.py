"""docs/format.md is right: its example is what `save` writes, and its reader reads what `save` writes."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import bitquest as bq
from bitquest.export import load, save
from bitquest.export.codes import codes_to_bytes
from bitquest.export.format import LayerSpec
from bitquest.nn import PackedEmbedding, PackedLinear
from bitquest.numerics.fake_quant import dequantize

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"


def blocks(kind):
    found = re.findall(rf"^```{kind}\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, kind
    return found


@pytest.fixture(scope="module")
def reader():
    (source,) = blocks("python")
    names = {}
    exec(compile(source, str(DOCUMENT), "exec"), names)
    return names


@pytest.fixture
def example(tmp_path):
    """The worked example as the page gives it: every byte from the page, none from the writer."""
    lines = blocks("hexdump")[0].splitlines()
    data = bytes.fromhex("".join(line[10:57] for line in lines))
    assert [int(line[:8], 16) for line in lines] == list(range(0, len(data), 16))
    config, manifest = blocks("json")
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "manifest.json").write_text(manifest)
    return tmp_path


CODES = torch.tensor([[-4, -1, 0, 1, 3], [2, -2, 0, -3, 1]], dtype=torch.int8)
X = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])


def test_the_worked_example_is_read(example, reader):
    loaded = load(example, nn.ModuleDict({"proj": nn.Linear(5, 2)}))["proj"]
    assert torch.equal(loaded.codes, CODES)
    assert loaded.step.tolist() == [[0.5], [2.0]]
    assert loaded(X).tolist() == [[11.25, -4.0]]
    assert reader["weight"](*reader["read"](example), "proj") == [[-1.75, -0.25, 0.25, 0.75, 1.75], [5, -3, 1, -5, 3]]


def test_the_worked_example_is_written(example, tmp_path):
    layer = PackedLinear(
        5,
        2,
        weight=bq.Quantizer(bq.UniformGrid(3)),
        activation=None,
        rotation=bq.NoRotation(),
        codes=CODES,
        step=torch.tensor([[0.5], [2.0]]),
        bias=torch.tensor([1.0, -1.0]),
    )
    out = save(nn.ModuleDict({"proj": layer}), tmp_path / "written")
    for path in out.iterdir():
        assert path.read_bytes() == (example / path.name).read_bytes(), path.name


def test_the_sparse_example():
    layer = PackedLinear(
        8,
        1,
        weight=bq.Quantizer(bq.UniformGrid(2), sparsity=bq.NofM(2, 4)),
        activation=None,
        rotation=bq.NoRotation(),
        codes=torch.tensor([[0, -2, 0, 1, 0, 0, -1, 1]], dtype=torch.int8),
        kept=torch.tensor([[0, 1, 0, 1, 0, 0, 1, 1]], dtype=torch.bool),
        step=torch.ones(1, 1),
    )
    made = codes_to_bytes(layer.codes, layer.kept, LayerSpec.of(layer))
    assert {name: tensor.numpy().tobytes().hex() for name, tensor in made.items()} == {"codes": "dc", "kept": "ca"}
    assert "`ca`" in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "scheme", ["w1a1", "w3a3-2:4-h8", "w5a8-4:8-g32", "w4a4-fp4", "w2a2-ternary-h4", "w7a16-norot", "w8a8"]
)
def test_the_documented_reader_agrees(make_llama, reader, tmp_path, scheme):
    folder = save(make_llama(scheme, tie_word_embeddings=True, num_key_value_heads=1), tmp_path / "out")
    config, tensors = reader["read"](folder)
    layers = {n: m for n, m in load(folder).named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    assert set(layers) == set(config["layers"])
    for name, layer in layers.items():
        expected = dequantize(*layer.encode_weight()[:2], layer.weight_spec.grid, layer.kept)
        found = torch.tensor(reader["weight"](config, tensors, name), dtype=torch.float64)
        torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)


def test_the_documented_reader_notices_damage(packed_dir, reader):
    data = (packed_dir / "model.safetensors").read_bytes()
    (packed_dir / "model.safetensors").write_bytes(data[:-1] + b"\x00")
    with pytest.raises(ValueError, match="changed"):
        reader["read"](packed_dir)


def test_documented_constants_are_those_in_use():
    text = DOCUMENT.read_text(encoding="utf-8")
    listed = re.search(r"on uniform grids of 1 to 8 bits: ([0-9., ]+); ternary ([0-9.]+); FP4 6 · ([0-9.]+)\.", text)
    uniform = [float(number) for number in listed[1].split(", ")]
    assert uniform == pytest.approx([bq.UniformGrid(b).clip_multiplier for b in range(1, 9)], abs=1e-10)
    assert float(listed[2]) == pytest.approx(bq.TERNARY.clip_multiplier)
    assert 6 * float(listed[3]) == pytest.approx(bq.FP4.clip_multiplier)
