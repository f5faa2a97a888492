"""Run the kernels of this folder's tests under Triton's interpreter on the CPU, or with `-m gpu` on a real GPU.

`@triton.jit` decides when it decorates whether a kernel is interpreted, so one pytest process does one or the other:
TRITON_INTERPRET is set before the tests of this folder are collected, and holds inside them only. Tests take the
`device` fixture and put their tensors there. Ahead-of-time compilation runs in a process of its own (`compiler`).
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

_FLAG = "TRITON_INTERPRET"
_on_gpu = False
_before: str | None = None


def pytest_configure(config: pytest.Config) -> None:
    global _on_gpu, _before
    marks = config.getoption("markexpr", "") or ""
    _on_gpu = "gpu" in marks and "not gpu" not in marks
    _before = os.environ.get(_FLAG)
    os.environ[_FLAG] = "0" if _on_gpu else "1"
    if not _on_gpu and importlib.util.find_spec("triton"):
        early = [name for name in sys.modules if name.startswith("bitquest.ops.triton.")]
        assert not early, f"imported before their tests, as kernels that only a GPU can run: {early}"
        _interpret_the_standard_library()
        _take_numpys_scalars()


def _interpret_the_standard_library() -> None:
    """tl.sum and its like are jitted when triton is imported, which other tests may have done before."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


def _take_numpys_scalars() -> None:
    """The interpreter of Triton 3.6 turns arrays of one element into loop bounds by int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def pytest_collection_finish(session: pytest.Session) -> None:
    if _before is None:
        os.environ.pop(_FLAG, None)
    else:
        os.environ[_FLAG] = _before


@pytest.fixture(autouse=True)
def _triton_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: no GPU kernels here")
    monkeypatch.setenv(_FLAG, "0" if _on_gpu else "1")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel runs: interpreted on the CPU, or (`-m gpu`) compiled on the GPU."""
    if request.param == "interpreter":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert _on_gpu, "kernels are interpreted in this process: select GPU tests with -m gpu alone"
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives garbage that no kernel writes by chance, so that what was left out shows."""
    plain, plain_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta" or not tensor.numel():
            return tensor
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 93)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(plain(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(plain_like(*args, **kwargs)))


def _compile_module() -> ModuleType:
    name = "bitquest_tests_compile"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("compile.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiler() -> Iterator[Any]:
    """compile.py's `Compiler`: kernels ahead of time for a compute capability, without a GPU."""
    made = _compile_module().Compiler()
    yield made
    made.close()
