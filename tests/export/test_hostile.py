"""Malice: the checksums fit, the contents are nonsense. FormatError each time, before memory is asked for."""

import json
import os
import struct
import tracemalloc

import pytest
import torch

import bitquest as bq
from bitquest.errors import FormatError
from bitquest.export import load, read_tokenizer, save
from bitquest.export.tensorfile import read_header, read_tensor
from bitquest.models import Llama, LlamaConfig, Tokenizer

UP = "model.layers.0.mlp.up_proj"
NORM = "model.norm.weight"


@pytest.fixture(autouse=True, scope="module")
def _imported(tmp_path_factory):
    """What loading imports the first time would count as memory that a hostile file asked for."""
    folder = tmp_path_factory.mktemp("warm") / "packed"
    shape = LlamaConfig.preset("1M", vocab_size=8, max_position_embeddings=8, num_hidden_layers=1)
    load(save(bq.quantize_(Llama(shape).init_weights(0), "w4a4"), folder))


def refuses(folder, match):
    """load raises FormatError and asks for little memory on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=match):
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_the_attack_itself_is_sound(attack):
    load(attack())


def layer(config, name=UP):
    return config["layers"][name]


CONFIGS = {
    "a huge vocabulary": (lambda c: c["model"].update(vocab_size=2**40), "beyond this reader"),
    "a huge width": (lambda c: c["model"].update(hidden_size=2**60), "beyond this reader"),
    "endless positions": (lambda c: c["model"].update(max_position_embeddings=2**27), "beyond this reader"),
    "a billion layers": (lambda c: c["model"].update(num_hidden_layers=10**9), "layers, but the file has"),
    "other sizes than stored": (lambda c: c["model"].update(vocab_size=2**28), "is torch.float32"),
    "a width of text": (lambda c: c["model"].update(hidden_size="32"), "hidden_size"),
    "a width of minus one": (lambda c: c["model"].update(hidden_size=-1), "hidden_size"),
    "a width of true": (lambda c: c["model"].update(hidden_size=True), "hidden_size"),
    "an infinite base": (lambda c: c["model"].update(rope_theta=10**400), "config.json"),
    "an unknown setting": (lambda c: c["model"].update(mixture_of_experts=8), "mixture_of_experts"),
    "an unknown architecture": (lambda c: c.update(architecture="mamba"), "beyond this reader"),
    "no architecture": (lambda c: c.update(architecture=None), "beyond this reader"),
    "a later version": (lambda c: c.update(version=2), "later version"),
    "a version of text": (lambda c: c.update(version="1"), "no format version"),
    "another format": (lambda c: c.update(format="gguf"), "gguf"),
    "an unknown key": (lambda c: c.update(surprise=1), "surprise"),
    "a missing key": (lambda c: c.pop("scheme"), "scheme"),
    "layers in a list": (lambda c: c.update(layers=[]), "layers must be"),
    "another scheme": (lambda c: c["scheme"].update(weight=None), "scheme is not the one"),
    "a tied head that is not": (lambda c: c["model"].update(tie_word_embeddings=True), "tie_word_embeddings"),
    "a layer fewer": (lambda c: c["layers"].pop(UP), "expected a float"),
    "a layer more": (lambda c: c["layers"].update(extra=layer(c)), "extra.*missing"),
    "a layer of text": (lambda c: c["layers"].update({UP: "linear"}), "expected a layer"),
    "a layer with a key more": (lambda c: layer(c).update(x=1), "expected a layer"),
    "an unknown kind": (lambda c: layer(c).update(kind="conv"), "expected a layer"),
    "a table instead of a layer": (lambda c: layer(c).update(kind="embedding"), "embedding"),
    "a wider layer": (lambda c: layer(c).update(in_features=40), "does not fit width 40"),
    "a layer of terabytes": (lambda c: layer(c).update(out_features=2**45), "no width"),
    "a taller layer": (lambda c: layer(c).update(out_features=2**28), "expected"),
    "a width of 1.5": (lambda c: layer(c).update(in_features=1.5), "no width"),
    "a bias that is not there": (lambda c: layer(c).update(bias=True), "bias.* missing"),
    "a bias of text": (lambda c: layer(c).update(bias="no"), "true or false"),
    "no weight quantizer": (lambda c: layer(c).update(weight=None), "float_weight.* missing"),
    "a quantizer out of range": (lambda c: layer(c).update(weight=1), "there are 1"),
    "a quantizer counted from behind": (lambda c: layer(c).update(weight=-1), "there are 1"),
    "a quantizer of true": (lambda c: layer(c).update(weight=False), "there are 1"),
    "a rotation without size": (
        lambda c: layer(c).update(rotation={"kind": "block_hadamard", "block_size": None}),
        "block size",
    ),
    "a rotation that does not divide": (
        lambda c: layer(c).update(rotation={"kind": "block_hadamard", "block_size": 64}),
        "does not fit width 32",
    ),
    "a rotation of 24": (lambda c: layer(c).update(rotation={"kind": "block_hadamard", "block_size": 24}), "power of"),
    "an unknown rotation": (lambda c: layer(c).update(rotation={"kind": "dense"}), "not a rotation"),
    "a rotation of text": (lambda c: layer(c).update(rotation="none"), "not a rotation"),
    "nine bits": (lambda c: c["quantizers"][0]["grid"].update(bits=9), "1 to 8 bits"),
    "bits of another file": (lambda c: c["quantizers"][0]["grid"].update(bits=4), "expected"),
    "a group of 32.0": (
        lambda c: c["quantizers"][0].update(granularity={"kind": "group", "size": 32.0}),
        "whole number",
    ),
    "a group of 48": (lambda c: c["quantizers"][0].update(granularity={"kind": "group", "size": 48}), "32, 64 or 128"),
    "groups that do not divide": (
        lambda c: c["quantizers"][0].update(granularity={"kind": "group", "size": 128}),
        "do not divide",
    ),
    "an unknown scale": (lambda c: c["quantizers"][0].update(scale={"kind": "magic"}), "not a scale rule"),
    "an unknown sparsity": (lambda c: c["quantizers"][0].update(sparsity={"kind": "half"}), "not a sparsity"),
    "sparse activations": (
        lambda c: c["quantizers"][0].update(sparsity={"kind": "n_of_m", "n": 2, "m": 4, "pair": False}),
        "activations stay dense",
    ),
    "a trust of nothing": (lambda c: c["quantizers"][0].update(estimator={"kind": "trust", "factor": 0}), "factor"),
    "a trust beyond floats": (
        lambda c: c["quantizers"][0].update(estimator={"kind": "trust", "factor": 10**400}),
        "config.json",
    ),
    "a quantizer of text": (lambda c: c.update(quantizers=["w3"]), "a quantizer has the keys"),
    "shared with nobody": (lambda c: c["shared"].update(x="y"), "do not bear out"),
    "shared with itself": (lambda c: c["shared"].update({NORM: NORM}), "do not bear out"),
    "shared with a number": (lambda c: c["shared"].update(x=1), "do not bear out"),
    "an extra shared tensor": (lambda c: c["shared"].update({"../../etc/passwd": NORM}), "not the model's"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_impossible_descriptions(attack, name):
    change, match = CONFIGS[name]
    refuses(attack(config=change), match)


def widen(name, dtype=None, shape=None, shift=(0, 0)):
    def change(header):
        entry = header[name]
        entry["dtype"] = dtype or entry["dtype"]
        entry["shape"] = entry["shape"] if shape is None else shape
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + shift[0], end + shift[1]]

    return change


HEADERS = {
    "a tensor of terabytes": (widen(NORM, shape=[2**40]), "offsets span"),
    "a tensor of all bytes there are": (widen(NORM, shape=[2**62, 2**62]), "offsets span"),
    "a dimension beyond 64 bits": (widen(NORM, shape=[2**64]), "no shape"),
    "a negative dimension": (widen(NORM, shape=[-32]), "no shape"),
    "two negative dimensions": (widen(NORM, shape=[-4, -8]), "no shape"),
    "no dimension to speak of": (widen(NORM, shape=[0]), "no shape"),
    "a dimension of true": (widen(NORM, shape=[True, 32]), "no shape"),
    "a dimension of 32.0": (widen(NORM, shape=[32.0]), "no shape"),
    "a hundred dimensions": (widen(NORM, shape=[1] * 99 + [32]), "no shape"),
    "another shape of the same size": (widen(NORM, shape=[4, 8]), "the model has"),
    "another shape of codes": (widen(f"{UP}.codes", shape=[32, 24]), "expected"),
    "codes of signed bytes": (widen(f"{UP}.codes", dtype="I8"), "expected torch.uint8"),
    "steps of integers": (widen(f"{UP}.step", dtype="I32"), "expected torch.float32"),
    "norms of integers": (widen(NORM, dtype="I32"), "expected a float"),
    "an unknown type": (widen(NORM, dtype="F4"), "unknown type"),
    "a type of numbers": (widen(NORM, dtype=32), "expected dtype|unknown type"),
    "offsets that overlap": (widen(NORM, shift=(-4, -4)), "overlaps|gap"),
    "offsets with a gap": (widen(NORM, shift=(4, 4)), "overlaps|gap"),
    "offsets beyond the file": (widen(NORM, shift=(2**40, 2**40)), "gap|overlaps"),
    "offsets below zero": (widen(NORM, shift=(-(2**40), -(2**40))), "no offsets"),
    "offsets backwards": (widen(NORM, shift=(2**30, 0)), "no offsets"),
    "a missing tensor": (lambda h: h.pop(NORM), "gap|missing|take"),
    "an entry of text": (lambda h: h.update({NORM: "F32"}), "expected dtype"),
    "an entry with a key more": (lambda h: h[NORM].update(compressed=True), "expected dtype"),
    "metadata of numbers": (lambda h: h.update(__metadata__={"a": 1}), "no object of strings"),
    "a tensor of no bytes": (
        lambda h: h.update(x={"dtype": "F32", "shape": [1], "data_offsets": [0, 0]}),
        "offsets span",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_impossible_headers(attack, name):
    change, match = HEADERS[name]
    refuses(attack(header=change), match)


def test_tensors_may_not_share_bytes(attack):
    def second(header):
        header["stowaway"] = dict(header[NORM])

    refuses(attack(header=second), "stowaway.*overlaps|overlaps")


def test_an_extra_tensor_is_refused(packed_dir, reseal):
    def change(header, data):
        header["extra"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
        return data + bytes(8)

    refuses(reseal(change), "not the model's: extra")


@pytest.mark.parametrize("change", [lambda data: data + b"\0", lambda data: data + bytes(4096), lambda data: data[:-1]])
def test_the_tensors_fill_the_file(reseal, change):
    refuses(reseal(lambda header, data: change(data)), "its tensors take")


@pytest.mark.parametrize("length", [0, 1, 2**20, 10**8 - 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_any_claimed_length(packed_dir, reseal_bytes, length):
    data = (packed_dir / "model.safetensors").read_bytes()
    refuses(reseal_bytes("model.safetensors", struct.pack("<Q", length) + data[8:]), "header|JSON")


_ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
HEADER_TEXTS = {
    "no JSON": b"\x80\x04\x95pickle",
    "a list": b"[]",
    "a number": b"1",
    "nested without end": b"[" * 100_000,
    "objects without end": b'{"a":' * 100_000,
    "a key twice": b'{"a":%b,"a":%b}' % (_ENTRY, _ENTRY),
    "a key twice inside": b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "NaN": b'{"a":NaN}',
    "minus infinity": b'{"a":-Infinity}',
    "an overflowing number": b'{"a":1e999}',
    "an endless number": b'{"a":' + b"9" * 10_000 + b"}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "half a character": b'{"\xc3":1}',
    "more behind it": b"{}{}",
}


@pytest.mark.parametrize("name", HEADER_TEXTS)
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_bad_json(reseal_bytes, name, file):
    text = HEADER_TEXTS[name]
    refuses(reseal_bytes(file, len(text).to_bytes(8, "little") + text if file.startswith("model") else text), file)


# --- values --------------------------------------------------------------------------------------------------------


def poke(name, new):
    def change(data, header):
        begin, end = header[name]["data_offsets"]
        data[begin : begin + len(new)] = new
        assert begin + len(new) <= end

    return change


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, -0.0])
def test_steps_are_positive_and_finite(attack, step):
    refuses(attack(data=poke(f"{UP}.step", struct.pack("<f", step))), "step that is not a positive")


@pytest.mark.parametrize("step", [float("nan"), 0.0, -1.0])
def test_learned_steps_are_checked_too(make_llama, tmp_path, reseal_data, step):
    activation = bq.Quantizer(grid=bq.UniformGrid(4), granularity=bq.PerTensor(), scale=bq.Learned())
    model = make_llama(bq.Scheme(bq.Quantizer(), activation))
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))
    folder = save(model, tmp_path / "learned")
    reseal_data(folder, poke(f"{UP}.activation_step", struct.pack("<f", step)))
    refuses(folder, "activation_step.*step that is not a positive")


def test_spare_bits_must_be_clear(make_llama, tmp_path, reseal_data):
    folder = save(make_llama("w3a3", hidden_size=12, intermediate_size=12), tmp_path / "odd")  # 12·3 bits: 4 to spare
    reseal_data(folder, poke(f"{UP}.codes", b"\x00\x00\x00\x00\x80"))
    refuses(folder, "spare bits")


def test_codes_beyond_a_codebook(make_llama, tmp_path, reseal_data):
    folder = save(make_llama("w4a4-fp4"), tmp_path / "fp4")  # 15 levels: 15 is no code
    reseal_data(folder, poke(f"{UP}.codes", b"\xff"))
    refuses(folder, "outside the 15 levels")


@pytest.mark.parametrize(("scheme", "mask"), [("w4a4-2:4", 0b0111), ("w4a4-2:4", 0b0001), ("w4a4-4:8", 0b1111)])
def test_masks_keep_n_of_every_m(make_llama, tmp_path, reseal_data, scheme, mask):
    folder = save(make_llama(scheme), tmp_path / "sparse")
    reseal_data(folder, poke(f"{UP}.kept", bytes([mask | 0b00110000])))
    refuses(folder, "does not keep 2 of every 4")


def test_truth_values_are_zero_or_one(tmp_path):
    header = json.dumps({"flag": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x01\x02")
    with path.open("rb") as file, pytest.raises(FormatError, match="truth values"):
        read_tensor(file, read_header(file, "x"), "flag", "x")


# --- the manifest and the directory --------------------------------------------------------------------------------


def test_a_later_version_says_so(packed_dir, reseal_manifest):
    refuses(reseal_manifest(version=2), "format version 2, this bitquest reads up to 1.*later version")


MANIFESTS = {
    "another format": ({"format": "zip"}, "zip"),
    "version zero": ({"version": 0}, "no format version"),
    "a true version": ({"version": True}, "no format version"),
    "an unknown key": ({"signature": "x"}, "digest"),
    "no files": ({"files": {}}, "lists"),
    "files of text": ({"files": "all"}, "lists"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_impossible_manifests(packed_dir, reseal_manifest, name):
    fields, match = MANIFESTS[name]
    refuses(reseal_manifest(**fields), match)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/model.safetensors", "model.safetensors\x00", ""])
def test_names_of_other_places(packed_dir, reseal_manifest, name):
    files = json.loads((packed_dir / "manifest.json").read_bytes())["files"]
    refuses(reseal_manifest(files=files | {name: files["config.json"]}), "lists")


@pytest.mark.parametrize("entry", [{"bytes": -1}, {"bytes": 1.5}, {"sha256": "00"}, {"sha256": None}, {"more": 1}])
def test_impossible_entries(packed_dir, reseal_manifest, entry):
    files = json.loads((packed_dir / "manifest.json").read_bytes())["files"]
    refuses(reseal_manifest(files=files | {"config.json": files["config.json"] | entry}), r"config\.json")


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "model.safetensors", "tokenizer.json"])
def test_links_and_pipes_are_not_followed(packed_dir, tmp_path, name):
    (packed_dir / name).rename(tmp_path / "elsewhere")
    (packed_dir / name).symlink_to(tmp_path / "elsewhere")
    refuses(packed_dir, "symbolic link")
    (packed_dir / name).unlink()
    os.mkfifo(packed_dir / name)
    refuses(packed_dir, "not a plain file")
    (packed_dir / name).unlink()
    (packed_dir / name).mkdir()
    refuses(packed_dir, "not a plain file|cannot be read")


def test_other_directories_are_told_apart(tmp_path):
    refuses(tmp_path / "nowhere", "no such directory")
    refuses(tmp_path, "it has no manifest.json")
    (tmp_path / "config.json").write_text("{}")
    refuses(tmp_path, "Hugging Face")
    (tmp_path / "config.toml").write_text("")
    refuses(tmp_path, "run directory.*bitquest export")


def test_a_tokenizer_larger_than_the_model(make_llama, tmp_path, reseal_bytes):
    folder = save(make_llama("w4a4", vocab_size=100), tmp_path / "small")
    reseal_bytes("tokenizer.json", Tokenizer.byte_level().to_json().encode(), folder)
    with pytest.raises(FormatError, match="do not belong together"):
        read_tokenizer(folder)


@pytest.mark.parametrize("text", ["{}", '{"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}', '{"model":1}'])
def test_nonsense_for_a_tokenizer(packed_dir, reseal_bytes, text):
    reseal_bytes("tokenizer.json", text.encode())
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        read_tokenizer(packed_dir)
