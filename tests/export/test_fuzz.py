"""Random changes under checksums that fit: a model or a FormatError, never another error."""

import json
import random

import pytest
import torch

from bitquest.errors import FormatError
from bitquest.export import load, save
from bitquest.export.reader import is_packed, packed_sizes

TOKENS = torch.arange(6).reshape(1, 6)
ODD = [None, True, -1, 0, 1, 3, 2**31, 2**63, 1.5, 1e308, "", "x", [], {}, [1], {"kind": "none"}]


def outcome(folder):
    """Whether it was refused; a model that loads must also run."""
    assert is_packed(folder)
    try:
        packed_sizes(folder)
        model = load(folder)
    except FormatError:
        return "refused"
    with torch.no_grad():
        model(TOKENS[:, : model.config.max_position_embeddings])
    return "loaded"


def places(value, path=()):
    """Paths of everything inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate(value, rng):
    """Replace, remove or copy one entry somewhere inside a JSON value."""
    *path, key = rng.choice(list(places(value)))
    for step in path:
        value = value[step]
    match rng.randrange(4):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice(list(value))] = value[key]
        case _:
            value[key] = rng.choice(ODD)


@pytest.fixture
def small(make_llama, tmp_path):
    model = make_llama("w2a2-2:4-h8", hidden_size=8, intermediate_size=8, vocab_size=16)
    return save(model, tmp_path / "small")


def test_changed_descriptions(small, reseal_bytes):
    rng, seen = random.Random(1), []
    text = (small / "config.json").read_text()
    for _ in range(300):
        config = json.loads(text)
        mutate(config, rng)
        reseal_bytes("config.json", json.dumps(config).encode(), small)
        seen.append(outcome(small))
    assert seen.count("refused") > 200


def test_changed_headers(small, reseal_bytes):
    rng, seen = random.Random(2), []
    data = (small / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for _ in range(300):
        header = json.loads(data[8 : 8 + length])
        mutate(header, rng)
        text = json.dumps(header).encode()
        reseal_bytes("model.safetensors", len(text).to_bytes(8, "little") + text + data[8 + length :], small)
        seen.append(outcome(small))
    assert seen.count("refused") > 250


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_changed_bytes(small, reseal_bytes, name):
    rng, seen = random.Random(3), []
    data = (small / name).read_bytes()
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 4])):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        reseal_bytes(name, bytes(changed), small)
        seen.append(outcome(small))
    assert {"loaded", "refused"} == set(seen)
