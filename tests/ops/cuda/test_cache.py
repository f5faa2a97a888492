import stat
from types import SimpleNamespace

import pytest

from bitquest.ops.cuda import cache


class CountingCompiler:
    """Stands for NVRTC: counts, and returns what it was asked for."""

    def __init__(self, version=(13, 0)):
        self.version, self.calls = version, 0

    def compile(self, source, *, name, architecture, options, headers):
        self.calls += 1
        return f"{architecture} {options} {self.calls}".encode()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BITQUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "source", lambda name: f"// {name}")
    monkeypatch.setattr(cache, "headers", dict)
    return tmp_path / "cache" / "cubin"


def test_the_second_process_does_not_compile(folder):
    compiler = CountingCompiler()
    first = cache.cubin("k.cu", "sm_80", ("-DA=1",), compiler)
    assert cache.cubin("k.cu", "sm_80", ("-DA=1",), compiler) == first
    assert compiler.calls == 1
    assert [path.suffix for path in folder.iterdir()] == [".cubin"]
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0


def test_everything_that_changes_the_code_changes_the_key(folder, monkeypatch):
    compiler = CountingCompiler()
    cache.cubin("k.cu", "sm_80", (), compiler)
    cache.cubin("k.cu", "sm_90", (), compiler)
    cache.cubin("k.cu", "sm_80", ("-DA=1",), compiler)
    cache.cubin("other.cu", "sm_80", (), compiler)
    assert compiler.calls == 4
    cache.cubin("k.cu", "sm_80", (), newer := CountingCompiler((13, 1)))
    assert newer.calls == 1
    monkeypatch.setattr(cache, "source", lambda name: "#include <h.cuh>")
    cache.cubin("k.cu", "sm_80", (), compiler)
    monkeypatch.setattr(cache, "headers", lambda: {"h.cuh": "// one"})
    cache.cubin("k.cu", "sm_80", (), compiler)
    monkeypatch.setattr(cache, "headers", lambda: {"h.cuh": "// two"})
    cache.cubin("k.cu", "sm_80", (), compiler)
    assert compiler.calls == 7


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign", "key"])
def test_a_harmed_entry_is_built_anew(folder, monkeypatch, harm):
    compiler = CountingCompiler()
    cache.cubin("k.cu", "sm_80", (), compiler)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    match harm:
        case "cut":
            path.write_bytes(content[:-1])
        case "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            monkeypatch.setattr(cache.os, "getuid", lambda: 12345)
        case "key":
            head, key, rest = content.split(b"\n", 2)
            path.write_bytes(b"\n".join((head, key[::-1], rest)))
    assert cache.cubin("k.cu", "sm_80", (), compiler).endswith(b"2")
    assert compiler.calls == 2
    if harm != "foreign":
        cache.cubin("k.cu", "sm_80", (), compiler)
        assert compiler.calls == 2


def test_without_a_place_to_write_it_compiles_every_time(folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    compiler = CountingCompiler()
    assert cache.cubin("k.cu", "sm_80", (), compiler) == b"sm_80 () 1"
    assert cache.cubin("k.cu", "sm_80", (), compiler) == b"sm_80 () 2"


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("BITQUEST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "bitquest"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(cache.Path, "home", lambda: tmp_path / "me")
    assert cache.cache_folder() == tmp_path / "me" / ".cache" / "bitquest"


def test_a_kernel_is_loaded_once(monkeypatch):
    loads = []
    driver = SimpleNamespace(
        load=lambda image, device: loads.append(device) or SimpleNamespace(function=lambda name, shared_bytes: name)
    )
    monkeypatch.setattr(cache, "load_driver", lambda: driver)
    monkeypatch.setattr(cache, "cubin", lambda *key: b"")
    for function in ("a", "b", "a"):
        assert cache.kernel("k.cu", function, "sm_80", (), 0, 7) == function
    assert loads == [7]
    cache.kernel.cache_clear()
    cache._module.cache_clear()
