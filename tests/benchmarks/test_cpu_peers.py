"""llama.cpp beside us: its files, its process, and what is said where it is missing."""

import struct
import sys
import textwrap

import numpy as np
import pytest

from bitquest.benchmarks.cpu_gguf import PEER_TYPES, TYPES, write_gguf
from bitquest.benchmarks.cpu_peers import Peers
from bitquest.errors import ConfigError
from bitquest.models import LlamaConfig

CONFIG = LlamaConfig.preset("3M", vocab_size=64, max_position_embeddings=32, num_hidden_layers=1)

# Just enough of llama_cpp for the worker: a model whose logits point at the token after the last one.
STAND_IN = """
import ctypes
__version__ = "stand-in"
llama_token = ctypes.c_int32
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
class Params: pass
def llama_log_set(callback, data): pass
def llama_backend_init(): pass
def llama_print_system_info(): return b"AVX512 = 1 "
def llama_model_default_params(): return Params()
def llama_context_default_params(): return Params()
def llama_model_load_from_file(path, params):
    data = open(path, "rb").read(4)
    return None if b"TQ1_0" in path or data != b"GGUF" else path
def llama_init_from_model(model, params): return [0]
def llama_model_get_vocab(model): return model
def llama_vocab_n_tokens(vocab): return 64
def llama_set_n_threads(context, n, batch): assert n == batch == 3
def llama_get_memory(context): return context
def llama_memory_clear(memory, data): memory[0] = 0
def llama_batch_get_one(array, n): return list(array)[:n]
def llama_decode(context, batch):
    context[0] += len(batch)
    return int(context[0] > 20)
logits = (ctypes.c_float * 64)()
def llama_get_logits_ith(context, index): return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
"""


def _read(path):
    """Keys and tensors {name: (type number, shape, bytes of data)} of a GGUF file; the sizes must add up."""
    data, at = path.read_bytes(), 24
    magic, version, tensors, keys = struct.unpack_from("<4sIQQ", data)
    assert (magic, version) == (b"GGUF", 3)

    def string():
        nonlocal at
        (length,) = struct.unpack_from("<Q", data, at)
        at += 8 + length
        return data[at - length : at].decode()

    found, kinds = {}, {4: "<I", 6: "<f"}
    for _ in range(keys):
        name, (kind,) = string(), struct.unpack_from("<I", data, at)
        at += 4
        if kind == 8:
            found[name] = string()
        else:
            (found[name],) = struct.unpack_from(kinds[kind], data, at)
            at += 4
    infos = {}
    for _ in range(tensors):
        name, (count,) = string(), struct.unpack_from("<I", data, at)
        shape = struct.unpack_from(f"<{count}Q", data, at + 4)
        number, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * count)
        at += 16 + 8 * count
        infos[name] = (number, shape[::-1], offset)
    start = at + -at % 32
    blocks = {block.number: block for block in TYPES.values()}
    parts, end = {}, start
    for name, (number, shape, offset) in infos.items():
        assert start + offset == end, name
        size = blocks[number].size_of(int(np.prod(shape)))
        parts[name] = (number, shape, data[end : end + size])
        end += size + -size % 32
    assert end == len(data)
    return found, parts


@pytest.mark.parametrize("kind", PEER_TYPES)
def test_files(tmp_path, kind):
    path = tmp_path / "model.gguf"
    write_gguf(path, CONFIG, kind, "F16" if kind == "F16" else "Q8_0")
    keys, tensors = _read(path)
    assert (keys["general.architecture"], keys["tokenizer.ggml.model"]) == ("llama", "no_vocab")
    assert (keys["llama.block_count"], keys["llama.embedding_length"], keys["llama.vocab_size"]) == (1, 256, 64)
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(tensors) == 3 + 9
    block = TYPES[kind]
    number, shape, data = tensors["blk.0.ffn_down.weight"]
    assert (number, shape) == (block.number, (256, CONFIG.intermediate_size))
    raw = np.frombuffer(data, np.uint8).reshape(-1, block.size)
    for at in block.scales_at or (0,):
        scales = raw[:, at : at + 2].copy().view(np.float16).astype(float)
        assert np.isfinite(scales).all()
        assert np.abs(scales).max() < 1
    assert np.frombuffer(tensors["output_norm.weight"][2], np.float32).tolist() == [1.0] * 256


def test_without_llama_cpp():
    with Peers(CONFIG) as peers:
        if not peers.reason:
            pytest.skip("llama-cpp-python is installed here")
        assert peers.reason.startswith(f"not measured: {sys.executable} has no llama-cpp-python")
        assert peers.runners == {}
    with pytest.raises(ConfigError, match="--peers nowhere/python: No such file"), Peers(CONFIG, "nowhere/python"):
        pass


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(textwrap.dedent(STAND_IN))
    (tmp_path / "files").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "files"))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_the_worker(stand_in):
    with Peers(CONFIG, types=("F16", "TQ1_0", "Q1_0")) as peers:
        assert (peers.reason, peers.info["version"], peers.info["loaded"]) == ("", "stand-in", ["F16", "Q1_0"])
        assert "does not load it" in peers.info["failed"]["TQ1_0"]
        assert peers.info["bytes"]["F16"] > 3 * peers.info["bytes"]["Q1_0"]
        assert list((stand_in / "files").iterdir()) == []  # removed as soon as they are loaded
        peers.set_threads(3)
        runner = peers.runners["llama.cpp Q1_0"]
        assert 0 < runner.decode(4) < 1
        assert 0 < runner.prefill(20) < 1
        with pytest.raises(RuntimeError, match="llama_decode failed"):
            runner.prefill(21)
        assert runner.decode(2) > 0  # and goes on
        peers._process.kill()
        peers._process.wait()
        with pytest.raises(RuntimeError, match="has ended"):
            runner.decode(2)


def test_a_broken_package(stand_in):
    (stand_in / "llama_cpp.py").write_text("import no_such_library")
    with Peers(CONFIG, types=("F16",)) as peers:
        assert "no_such_library" in peers.reason
    assert list((stand_in / "files").iterdir()) == []
