"""Small models of many kinds, and an attacker who mends the checksums."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitquest.export import save
from bitquest.models import Llama, LlamaConfig, Tokenizer
from bitquest.nn import quantize_


@pytest.fixture
def make_llama() -> Callable[..., Llama]:
    """make_llama(scheme, **settings): a tiny quantized Llama whose norms are not all ones."""

    def make(scheme: str = "w4a4", **settings: Any) -> Llama:
        fields = {
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            **settings,
        }
        model = Llama(LlamaConfig.from_json(fields)).init_weights(1)
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.dim() < 2:
                nn.init.uniform_(parameter, 0.5, 1.5)
        quantize_(model, scheme)
        return model.eval()

    return make


@pytest.fixture
def packed_dir(make_llama: Callable[..., Llama], tmp_path: Path) -> Path:
    """A saved W3A3 model with its tokenizer."""
    return save(make_llama("w3a3"), tmp_path / "packed", Tokenizer.byte_level(), {"step": 7})


def read_parts(folder: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """config.json, the header of model.safetensors, and the bytes behind it."""
    config = json.loads((folder / "config.json").read_bytes())
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return config, json.loads(data[8 : 8 + length]), data[8 + length :]


def model_bytes(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def seal(folder: Path, **changes: Any) -> None:
    """Write a manifest that fits the files as they are now; `changes` replace entries of it."""
    names = [p.name for p in folder.iterdir() if p.name != "manifest.json"]
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in sorted(names)
    }
    fields = {"files": files, "format": "bitquest-packed", "version": 1, **changes}
    head = json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()[:-1] + b',"digest":"'
    (folder / "manifest.json").write_bytes(head + hashlib.sha256(head).hexdigest().encode() + b'"}\n')


@pytest.fixture
def reseal_data() -> Callable[..., Path]:
    """reseal_data(folder, change): change(bytes of the tensors, header), then mend every checksum."""

    def change(folder: Path, change_data: Callable[[bytearray, dict[str, Any]], None]) -> Path:
        _, header, body = read_parts(folder)
        buffer = bytearray(body)
        change_data(buffer, header)
        (folder / "model.safetensors").write_bytes(model_bytes(header, bytes(buffer)))
        seal(folder)
        return folder

    return change


@pytest.fixture
def reseal(packed_dir: Path) -> Callable[..., Path]:
    """reseal(change): change(header, bytes of the tensors) -> bytes of the tensors, then mend every checksum."""

    def change(change_both: Callable[[dict[str, Any], bytes], bytes]) -> Path:
        _, header, body = read_parts(packed_dir)
        body = change_both(header, body)
        (packed_dir / "model.safetensors").write_bytes(model_bytes(header, body))
        seal(packed_dir)
        return packed_dir

    return change


@pytest.fixture
def reseal_bytes(packed_dir: Path) -> Callable[..., Path]:
    """reseal_bytes(name, bytes): replace a file, then mend every checksum."""

    def change(name: str, data: bytes, folder: Path = packed_dir) -> Path:
        (folder / name).write_bytes(data)
        seal(folder)
        return folder

    return change


@pytest.fixture
def reseal_manifest(packed_dir: Path) -> Callable[..., Path]:
    """reseal_manifest(key=…): write a manifest with other entries and a digest that fits."""

    def change(**fields: Any) -> Path:
        seal(packed_dir, **fields)
        return packed_dir

    return change


@pytest.fixture
def attack(packed_dir: Path, reseal_data: Callable[..., Path]) -> Callable[..., Path]:
    """attack(config=…, header=…, data=…): change parts by functions, mend every checksum, return the folder."""

    def change(
        config: Callable[[Any], Any] | None = None,
        header: Callable[[Any], Any] | None = None,
        data: Callable[[bytearray, Any], Any] | None = None,
    ) -> Path:
        fields, entries, body = read_parts(packed_dir)
        for function, part in ((config, fields), (header, entries)):
            if function is not None:
                function(part)
        (packed_dir / "config.json").write_text(json.dumps(fields))
        (packed_dir / "model.safetensors").write_bytes(model_bytes(entries, body))
        return reseal_data(packed_dir, data or (lambda buffer, entries: None))

    return change
