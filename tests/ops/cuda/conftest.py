import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from bitquest.ops.cuda.cache import headers, source
from bitquest.ops.cuda.nvrtc import CompilerMissingError, load_nvrtc

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)


@pytest.fixture
def instructions(tmp_path: Path) -> Callable[[str, str, tuple[str, ...]], list[str]]:
    """Compiles a kernel by NVRTC (name, architecture, options) and gives the names of its machine instructions."""
    triton = find_spec("triton")
    tool = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" / "nvdisasm" if triton else Path()
    if not tool.is_file():
        pytest.skip("no nvdisasm: Triton is not installed")

    def read(name: str, architecture: str, options: tuple[str, ...]) -> list[str]:
        try:
            compiler = load_nvrtc()
        except CompilerMissingError as error:
            pytest.skip(str(error))
        image = compiler.compile(source(name), name=name, architecture=architecture, options=options, headers=headers())
        (tmp_path / "made.cubin").write_bytes(image)
        command = [str(tool), "-c", str(tmp_path / "made.cubin")]
        return _INSTRUCTION.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return read
