"""The native engine in builds that Python cannot load, replaying what numerics computed: under AddressSanitizer and
UndefinedBehaviorSanitizer, and cross-compiled for 64-bit Arm, emulated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SANITIZED = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden vectors of golden.py."""
    path = tmp_path_factory.mktemp("golden") / "golden.bin"
    subprocess.run([sys.executable, Path(__file__).with_name("golden.py"), path], check=True)
    return path


def build(folder: Path, compiler: str, machine: str, flags: str, objects: str) -> Path:
    """The replaying program, built by setup.py. Objects are kept from run to run: compiling takes a while."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the sources of the engine are not there: the tests run apart from the repository")
    program = folder / "replay"
    made = subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_replay", f"--flags={flags}", f"--machine={machine}"),
            *(f"--output={program}", f"--build-temp={ROOT / 'build' / objects}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CXX": compiler},
    )
    assert made.returncode == 0, made.stderr
    return program


def replay(command: list[str], golden: Path) -> set[str]:
    """Replays on every instruction set of the program and machine, and returns their names."""
    listed = subprocess.run([*command, "--isas"], capture_output=True, text=True, check=True)
    isas = listed.stdout.split()
    for isa in isas:
        settings = {**os.environ, "BITQUEST_ISA": isa, "UBSAN_OPTIONS": "print_stacktrace=1"}
        done = subprocess.run([*command, str(golden)], capture_output=True, text=True, check=False, env=settings)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"{isa}: ")
    return set(isas)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler}) to build the engine with sanitizers")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [*compiler.split(), *SANITIZED.split(), str(probe), "-o", str(folder / "probe")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no sanitizers (Debian: apt-get install g++ brings them)")
    return build(folder, compiler, os.uname().machine, SANITIZED, "sanitized")


def test_golden_vectors_under_sanitizers(sanitized: Path, golden: Path):
    assert "portable" in replay([str(sanitized)], golden)


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = "aarch64-linux-gnu-g++"
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip("no cross compiler or emulator for Arm (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    return [emulator, str(build(tmp_path_factory.mktemp("arm"), compiler, "aarch64", "-static", "arm"))]


@pytest.mark.parametrize(
    ("processor", "isas"),
    [
        ("max", {"neoni8mm", "neondot", "neon", "portable"}),
        ("neoverse-n1", {"neondot", "neon", "portable"}),  # dot products of two signed or two unsigned operands only
        ("cortex-a72", {"neon", "portable"}),
    ],
)
def test_golden_vectors_on_emulated_arm(arm: list[str], golden: Path, processor: str, isas: set[str]):
    """On processors with and without the instructions of each set, which take those they have and refuse the others."""
    emulated = [arm[0], "-cpu", processor, arm[1]]
    assert replay(emulated, golden) == isas
    for missing in {"neoni8mm", "neondot"} - isas:
        forced = {**os.environ, "BITQUEST_ISA": missing}
        done = subprocess.run([*emulated, str(golden)], capture_output=True, text=True, check=False, env=forced)
        assert done.returncode == 2
        assert "not available here" in done.stderr
