import ctypes
import re

import pytest

from bitquest.ops.cuda import nvrtc
from bitquest.ops.cuda.nvrtc import CompileError, CompilerMissingError, Nvrtc

SOURCE = 'extern "C" __global__ void fill(int* out) { out[threadIdx.x] = VALUE; }'
ELF_MACHINE_CUDA = 190


@pytest.fixture(scope="module")
def compiler() -> Nvrtc:
    try:
        return nvrtc.load_nvrtc()
    except CompilerMissingError as error:
        pytest.skip(str(error))


def test_the_compiler_says_what_it_is(compiler):
    assert compiler.version >= nvrtc.OLDEST
    assert 80 in compiler.architectures()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_89", "sm_90a"])
def test_compiles_to_machine_code(compiler, architecture):
    image = compiler.compile(SOURCE, name="fill.cu", architecture=architecture, options=("-DVALUE=3",))
    assert image[:4] == b"\x7fELF"
    assert int.from_bytes(image[18:20], "little") == ELF_MACHINE_CUDA


def test_finds_headers_by_name_alone(compiler):
    text = "#include <value.cuh>\n" + SOURCE
    assert compiler.compile(text, name="f.cu", architecture="sm_80", headers={"value.cuh": "#define VALUE 1"})


def test_an_error_shows_file_line_and_log(compiler):
    with pytest.raises(CompileError, match=re.compile(r"fill\.cu for sm_80.*fill\.cu\(1\).*VALUE", re.DOTALL)):
        compiler.compile(SOURCE, name="fill.cu", architecture="sm_80")


def test_an_unknown_architecture_is_named(compiler):
    with pytest.raises(CompileError, match="sm_12345"):
        compiler.compile(SOURCE, name="fill.cu", architecture="sm_12345", options=("-DVALUE=1",))


def test_a_file_that_is_no_library_is_refused(tmp_path):
    path = tmp_path / "libnvrtc.so.13"
    path.write_bytes(b"not a library")
    with pytest.raises(CompilerMissingError, match=re.escape(str(path))):
        Nvrtc(str(path))


def test_a_library_without_the_functions_is_refused():
    assert ctypes.CDLL("libm.so.6")
    with pytest.raises(CompilerMissingError, match=r"libm\.so\.6"):
        Nvrtc("libm.so.6")


def test_nothing_found_says_how_to_install():
    with pytest.raises(CompilerMissingError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc._first_that_loads(iter(()))


def test_a_library_that_is_there_but_does_not_load_is_reported_first(tmp_path):
    broken = tmp_path / "libnvrtc.so.13"
    broken.write_bytes(b"")
    with pytest.raises(CompilerMissingError, match=re.escape(str(broken))):
        nvrtc._first_that_loads(iter(("libnvrtc-that-is-nowhere.so", str(broken))))


def test_a_toolkit_named_by_cuda_home_is_a_candidate(tmp_path, monkeypatch):
    (tmp_path / "lib64").mkdir()
    for name in ("libnvrtc.so", "libnvrtc.so.12", "libnvrtc-builtins.so.12.4"):
        (tmp_path / "lib64" / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = list(nvrtc.candidates())
    assert str(tmp_path / "lib64" / "libnvrtc.so.12") in found
    assert not any("builtins" in path for path in found)
    assert found[-1] == "libnvrtc.so"
