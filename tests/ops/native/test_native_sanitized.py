"""The native engine under AddressSanitizer and UndefinedBehaviorSanitizer, replaying what numerics computed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The program, built with sanitizers, and the golden vectors."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}) to build the engine with sanitizers")
    if not (ROOT / "setup.py").exists():
        pytest.skip("the sources of the engine are not there: the tests run apart from the repository")
    folder = tmp_path_factory.mktemp("sanitized")
    objects = ROOT / "build" / "sanitized"  # kept from run to run: compiling takes a while
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    program = [compiler, *FLAGS.split(), str(probe), "-o", str(folder / "probe")]
    if subprocess.run(program, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no sanitizers (Debian: apt-get install g++ brings them)")
    made = subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_replay", f"--flags={FLAGS}"),
            *(f"--output={folder / 'replay'}", f"--build-temp={objects}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    golden = folder / "golden.bin"
    subprocess.run([sys.executable, Path(__file__).with_name("golden.py"), golden], check=True)
    return folder / "replay", golden


@pytest.mark.parametrize("isa_name", ["avx512", "avx2", "neon", "portable"])
def test_golden_vectors_under_sanitizers(replay: tuple[Path, Path], isa_name: str):
    settings = {**os.environ, "BITQUEST_ISA": isa_name, "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run([*map(str, replay)], capture_output=True, text=True, check=False, env=settings)
    if done.returncode == 2 and "BITQUEST_ISA" in done.stderr:
        pytest.skip(f"this machine or build has no {isa_name}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{isa_name}: ")
