"""Compile Triton kernels ahead of time, without a GPU, and report what the compiler and the assembler made of them.

The tests of this folder run under the interpreter (conftest.py), where `@triton.jit` gives no JITFunction. So kernels
are compiled by a second process, which this file is both sides of: `Compiler` starts it on first use and asks it,
`python compile.py` answers, one line of JSON for each. Two ways to say what to compile:

    compiler.kernel("bitquest.ops.triton.quantize:_kernel", {"x_ptr": "*bf16", "K": "i32", "BLOCK": "constexpr"},
                    {"BLOCK": 128}, 90, num_warps=4)     -> Compiled        (all pointers and integers 16-aligned)
    compiler.launches("from bitquest... import f; f(torch.empty(64, 2048, dtype=torch.bfloat16))", 90)
                                                         -> list[Compiled]  every launch that the code would make

`launches` runs the code on CPU tensors with `JITFunction.run` replaced: it compiles what would have been launched, with
the specializations and options of the call, and launches nothing, so the outputs are whatever was allocated.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """One kernel for one compute capability.

    local_bytes: local memory a thread, which is what spills and dynamically indexed arrays use; shared_bytes: shared
    memory a block, static and dynamic together.
    """

    name: str
    capability: int
    num_warps: int
    ttgir: str
    ptx: str
    sass: str
    registers: int
    local_bytes: int
    shared_bytes: int

    @property
    def spills(self) -> int:
        """Loads and stores of local memory in the machine code."""
        return self.count(r"(LDL|STL)(\.\w+)*")

    def count(self, instruction: str) -> int:
        """How many instructions of the machine code match this pattern, e.g. r"HGMMA" or r"LDG\\.E\\.128"."""
        return len(re.findall(rf"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?{instruction}\b", self.sass, re.MULTILINE))

    def report(self) -> str:
        """One line for people."""
        return (
            f"{self.name} sm_{self.capability}: {self.registers} registers × {32 * self.num_warps} threads, "
            f"{self.local_bytes} B local, {self.shared_bytes} B shared, {self.spills} spill instructions"
        )


class Compiler:
    """The asking side: one process for as many questions as a test session has."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def kernel(
        self, where: str, signature: Mapping[str, str], constants: Mapping[str, Any], capability: int, **options: Any
    ) -> Compiled:
        """The kernel `module:name` compiled for sm_<capability>; options: num_warps, num_stages, …"""
        question = {"where": where, "signature": dict(signature), "constants": dict(constants), "options": options}
        return self._ask({**question, "capability": capability})[0]

    def launches(self, code: str, capability: int) -> list[Compiled]:
        """Every kernel that `code` (Python; torch is imported) would launch, compiled for sm_<capability>."""
        return self._ask({"code": code, "capability": capability})

    def _ask(self, question: dict[str, Any]) -> list[Compiled]:
        if self._process is None:
            environment = {**os.environ, "TRITON_INTERPRET": "0"}
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(
                command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "the compiling process died"}')
        if "error" in answer:
            raise AssertionError(answer["error"])
        return [Compiled(**fields) for fields in answer["compiled"]]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait(timeout=60)
            self._process = None


# --- the answering process -----------------------------------------------------------------------------------------


def _tool(name: str, *arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _compile(source: Any, capability: int, options: Mapping[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        sass = _tool("nvdisasm", "-c", str(cubin))
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
    of_kernel = usage[usage.index(f"Function {made.metadata.name}:") :].split("Function ")[1]
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", of_kernel)}
    return {
        "name": made.metadata.name,
        "capability": capability,
        "num_warps": made.metadata.num_warps,
        "ttgir": str(made.asm["ttgir"]),
        "ptx": made.asm["ptx"],
        "sass": sass,
        "registers": resources["REG"],
        "local_bytes": resources["STACK"] + resources["LOCAL"],
        "shared_bytes": made.metadata.shared,
    }


def _kernel(question: dict[str, Any]) -> list[dict[str, Any]]:
    import importlib

    from triton.compiler import ASTSource

    module, _, name = question["where"].partition(":")
    function = getattr(importlib.import_module(module), name)
    signature = question["signature"]
    constants = {
        name: tuple(value) if isinstance(value, list) else value for name, value in question["constants"].items()
    }
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (position,): aligned
        for position, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or signature[name] in ("i32", "i64")
    }
    return [
        _compile(ASTSource(function, signature, constants, attributes), question["capability"], question["options"])
    ]


@contextmanager
def _compiling_instead_of_launching(capability: int, compiled: list[dict[str, Any]]) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs.update(debug=False, instrumentation_mode="")
        bound, specialization, options = create_function_from_signature(self.signature, self.params, backend)(
            *args, **kwargs
        )
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = GluonASTSource if self.is_gluon() else ASTSource
        compiled.append(_compile(source(self, signature, constants, attributes), capability, options.__dict__))

    launching = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launching


def _launches(question: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    compiled: list[dict[str, Any]] = []
    with _compiling_instead_of_launching(question["capability"], compiled):
        exec(question["code"], {"torch": torch})
    return compiled


def _answer() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not mix with the answers
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"compiled": _kernel(question) if "where" in question else _launches(question)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _answer()
