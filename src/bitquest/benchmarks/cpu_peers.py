"""llama.cpp beside us, in the same run: models of the same shape in its own types, timed in a process of its own.

It needs llama-cpp-python in some Python, this one or another (an environment of its own keeps compilers and packages
apart). Files of random weights are written into a temporary folder and removed once they are loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitquest.benchmarks import cpu_peer_worker
from bitquest.benchmarks.cpu_gguf import PEER_TYPES, write_gguf
from bitquest.errors import ConfigError
from bitquest.models import LlamaConfig

INSTALL = "pip install 'bitquest[bench]'; it compiles llama.cpp, which takes minutes"


def has_llama_cpp(python: str) -> bool:
    """Whether a Python ("": this one) has llama-cpp-python. Raises ConfigError for one that does not start."""
    looks = "import importlib.util as u, sys; sys.exit(u.find_spec('llama_cpp') is None)"
    try:
        return subprocess.run([python or sys.executable, "-c", looks], capture_output=True).returncode == 0
    except OSError as error:
        raise ConfigError(f"--peers {python}: {error.strerror}; name the Python of llama-cpp-python") from None


class PeerRunner:
    """A model of the worker, as cpu_decode.Runner."""

    def __init__(self, peers: "Peers", name: str) -> None:
        self.peers, self.name, self.threads = peers, name, 1

    def decode(self, tokens: int) -> float:
        return self.peers.measure(self.name, "decode", tokens, self.threads)

    def prefill(self, tokens: int) -> float:
        return self.peers.measure(self.name, "prefill", tokens, self.threads)


class Peers:
    """The worker and its models, from `with` to its end. `reason` says why there are none; `info` which llama.cpp.

    tables: the type of token table and head; F16 has its own. Raises ConfigError as `has_llama_cpp`.
    """

    def __init__(self, config: LlamaConfig, python: str = "", types: Sequence[str] = PEER_TYPES, tables: str = "Q8_0"):
        self.config, self.python, self.types, self.tables = config, python or sys.executable, types, tables
        self.reason, self.info, self.runners = "", dict[str, Any](), dict[str, PeerRunner]()
        self._process: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        if not has_llama_cpp(self.python):
            self.reason = f"not measured: {self.python} has no llama-cpp-python ({INSTALL})"
            return self
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bitquest-bench-")
        words = [self.python, str(Path(cpu_peer_worker.__file__))]
        for name in self.types:
            path = Path(self._folder.name) / f"{name}.gguf"
            write_gguf(path, self.config, name, name if name == "F16" else self.tables)
            words.append(f"{name}={path}")
        pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=quiet, text=True)
        self.info = self._read()
        if "missing" in self.info:
            self.reason = f"not measured: {self.info['missing']}"
            return
        for name in self.info["loaded"]:
            size = (Path(self._folder.name) / f"{name}.gguf").stat().st_size
            self.runners[f"llama.cpp {name}"] = PeerRunner(self, name)
            self.info.setdefault("bytes", {})[name] = size
        if os.name == "posix":  # the files stay readable where they are mapped, and go away whatever ends us
            self._folder.cleanup()

    def set_threads(self, number: int) -> None:
        """Threads of every model from now on."""
        for runner in self.runners.values():
            runner.threads = number

    def measure(self, model: str, what: str, tokens: int, threads: int) -> float:
        """One sample of the worker's. Raises RuntimeError where it fails or ends."""
        assert self._process is not None and self._process.stdin is not None
        asked = {"model": model, "what": what, "tokens": tokens, "threads": threads}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError("the process that runs llama.cpp has ended") from None
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(f"llama.cpp, {model}: {answer['error']}")
        return float(answer["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs llama.cpp has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _end(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # what it was asked before it ended
                        stream.close()
            self._process.kill()
            self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()
