"""Finding the native engine, forcing an instruction set, threads, and staying inside the arrays."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bitquest.errors import ConfigError
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form, integer_linear, weight_only_linear
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import PerGroup, PerRow
from bitquest.ops import native, native_abi, native_linear
from bitquest.ops.rows import RMSNorm

ISAS = native.isas() if native.availability()[0] else ("portable",)  # "portable" skips, with the reason

WANT = frozenset({"factors", "packed", "mask", "sums"})


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=settings)


def test_without_a_library_it_says_what_is_missing_and_what_that_costs(monkeypatch, tmp_path):
    monkeypatch.setattr(native_abi, "LIBRARY", tmp_path / "libbitquest.so.1")
    monkeypatch.setattr(native_abi, "open_library", native_abi.open_library.__wrapped__)
    there, reason = native.availability()
    assert not there
    assert "C++17 compiler" in reason
    assert "torch instead" in reason
    with pytest.raises(ConfigError, match="cannot run"):
        native.quantize_rows(torch.randn(2, 4), Quantizer(), 1, WANT)
    (tmp_path / "libbitquest.so.1").write_bytes(b"not a library")
    assert "cannot be loaded" in native.availability()[1]


def test_a_forced_instruction_set_that_is_not_there_is_named(library_of):
    library_of("portable")
    code = "from bitquest.ops import native; print(*native.availability())"
    done = python(code, BITQUEST_ISA="sse9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False BITQUEST_ISA=sse9 asks for an instruction set that is not available here")
    assert "portable" in done.stdout
    assert python(code, BITQUEST_ISA="portable").stdout == "True compiled kernels, on portable\n"


def test_importing_the_package_loads_no_library():
    code = """
import ctypes
class Refused(ctypes.CDLL):
    def __init__(self, name, *rest, **more):
        assert "libbitquest" not in str(name), "loaded at import"
        super().__init__(name, *rest, **more)
ctypes.CDLL = Refused
import bitquest
for name in bitquest.__all__: getattr(bitquest, name)
import bitquest.ops.native, bitquest.ops.native_linear
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("isa_name", ISAS)
def test_nothing_is_read_or_written_outside_the_arrays(library_of, isa_name: str):
    library_of(isa_name)
    program = Path(__file__).with_name("guarded.py")
    settings = {**os.environ, "BITQUEST_ISA": isa_name, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, env=settings)
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, f"ended with {done.returncode} at: {last}\n{done.stderr}"
    assert last == f"done {isa_name}"


def test_threads_come_and_go_with_forks_and_with_other_threads(library_of):
    """Workers do not survive a fork: the child makes its own. Two callers at once do not wait for each other's job."""
    library_of("portable")
    code = """
import os, threading, torch
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.ops import native
torch.set_num_threads(3)
x, quantizer = torch.randn(64, 256), Quantizer(UniformGrid(3))
def made(): return native.quantize_rows(x, quantizer, 128, frozenset({"packed"})).packed
first = made()
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(made(), first) for _ in range(20)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
wrong = []
def many():
    for _ in range(200):
        if not torch.equal(made(), first): wrong.append(1)
callers = [threading.Thread(target=many) for _ in range(4)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert not wrong
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("w_bits", "x_bits"), [(1, 1), (1, 2), (2, 2), (3, 3), (4, 4), (1, 8), (4, 8), (8, 8), (2, 16)]
)
def test_the_portable_products_are_the_reference(library_of, monkeypatch, w_bits: int, x_bits: int):
    library = library_of("portable")
    monkeypatch.setattr(native_abi, "open_library", lambda: (library, ""))
    form = integer_form(UniformGrid(w_bits))
    x_form = None if x_bits == 16 else integer_form(UniformGrid(x_bits))
    for tokens, channels, width, size in ((1, 1, 1, 0), (3, 17, 96, 32), (2, 40, 200, 0), (5, 3, 128, 64)):
        granularity = PerGroup(size) if size else PerRow()
        w = native.quantize_rows(
            torch.randn(channels, width), Quantizer(UniformGrid(w_bits), granularity=granularity), 1, WANT
        )
        floats, bias = torch.randn(tokens, width), torch.randn(channels)
        prepared = native_linear.prepare(w.step, form, x_form, width, packed=w.packed)
        of_factors = native_linear.prepare(w.step, form, x_form, width, factors=w.factors)
        if x_form is None:
            wanted = weight_only_linear(floats, w.factors, w.step, form) + bias
            made = native_linear.linear(prepared, floats, channels, width, bias=bias)
            torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(native_linear.linear(of_factors, floats, channels, width, bias=bias), made)
            continue
        x = native.quantize_rows(floats, Quantizer(UniformGrid(x_bits), granularity=granularity), 1, WANT)
        wanted = integer_linear(x.factors, x.step, w.factors, w.step, x_form, form) + bias
        made = native_linear.linear(prepared, x, channels, width, x_form, bias)
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(native_linear.linear(of_factors, x, channels, width, x_form, bias), made)
        groups = x.step.shape[1]
        parts = (x.factors.int().unflatten(-1, (groups, -1)), w.factors.int().unflatten(-1, (groups, -1)))
        exact = torch.einsum("tgk,ngk->tgn", *parts).to(torch.int32)
        assert torch.equal(native_linear.product(prepared, x, channels, width, x_form, groups), exact)


def test_a_prepared_weight_of_another_shape_or_a_damaged_one_is_refused(isa: str):
    form = integer_form(UniformGrid(4))
    w = native.quantize_rows(torch.randn(8, 64), Quantizer(UniformGrid(4)), 1, WANT)
    x = native.quantize_rows(torch.randn(2, 64), Quantizer(UniformGrid(4)), 1, WANT)
    prepared = native_linear.prepare(w.step, form, form, 64, packed=w.packed)
    native_linear.linear(prepared, x, 8, 64, form)
    damaged = prepared.clone()
    damaged[:4] = 0
    for weight, channels in ((prepared, 7), (prepared[:-64], 8), (damaged, 8), (torch.zeros(16, dtype=torch.uint8), 8)):
        with pytest.raises(ConfigError, match="do not fit together"):
            native_linear.linear(weight, x, channels, 64, form)
    with pytest.raises(ConfigError, match="one of the two"):
        native_linear.prepare(w.step, form, form, 64)


def test_many_threads_of_python_share_one_library(isa: str):
    x, quantizer = torch.randn(3, 256), Quantizer(UniformGrid(4))
    first = native.quantize_rows(x, quantizer, 128, WANT)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(50):
            made = native.quantize_rows(x, quantizer, 128, WANT)
            if not all(torch.equal(a, b) for a, b in zip(made, first, strict=True)):
                wrong.append(1)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_rows_to_outputs_in_one_call_is_the_two_calls(isa: str):
    x = torch.randn(3, 192)
    for x_bits, w_bits, size in ((1, 1, 0), (8, 1, 0), (8, 8, 0), (4, 4, 64)):
        granularity = PerGroup(size) if size else PerRow()
        quantizer, form = Quantizer(UniformGrid(x_bits), granularity=granularity), integer_form(UniformGrid(w_bits))
        x_form = integer_form(UniformGrid(x_bits))
        weights, wanted, biases = [], [], [torch.randn(20), None, torch.randn(5)]
        for channels, bias in zip((20, 33, 5), biases, strict=True):
            w = native.quantize_rows(
                torch.randn(channels, 192), Quantizer(UniformGrid(w_bits), granularity=granularity), 64, WANT
            )
            weights.append(native_linear.prepare(w.step, form, x_form, 192, packed=w.packed))
            for_dots = native.quantize_rows(x, quantizer, 64, WANT, prologue=RMSNorm(torch.ones(192), 1e-5))
            wanted.append(native_linear.linear(weights[-1], for_dots, channels, 192, x_form, bias, torch.bfloat16))
        made = native_linear.quantized_linear(
            x, quantizer, 64, weights, (20, 33, 5), biases, torch.bfloat16, prologue=RMSNorm(torch.ones(192), 1e-5)
        )
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    floats = native_linear.prepare(w.step, form, None, 192, packed=w.packed)
    (made,) = native_linear.quantized_linear(x, None, 64, [floats], [5])
    assert torch.equal(made, native_linear.linear(floats, native.rotate(x, 64), 5, 192))
    assert native_linear.quantized_linear(x[:0], None, 64, [floats], [5])[0].shape == (0, 5)
    assert native_linear.quantized_linear(torch.randn(30000, 192), None, 64, [floats], [5]) is None
    with pytest.raises(ConfigError, match="do not fit together"):
        native_linear.quantized_linear(x, Quantizer(UniformGrid(3)), 64, weights, (20, 33, 5))
