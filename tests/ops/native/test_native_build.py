"""How the engine is built, and how a library of other sources is told from this one's."""

import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bitquest.ops import native, native_abi
from bitquest.ops.native_sources import source_hash

ROOT = Path(__file__).parents[3]
FILES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "src/bitquest/ops/native_sources.py",
    "src/bitquest/__init__.py",
)
# Stands for a compiler: notes its commands, makes empty files, and fails on sources that BROKEN names.
COMPILER = """
import os, sys
source, target = sys.argv[sys.argv.index("-c") + 1] if "-c" in sys.argv else "", sys.argv[sys.argv.index("-o") + 1]
with open(os.environ["COMMANDS"], "a") as notes:
    notes.write(" ".join(sys.argv[1:]) + "\\n")
if os.environ["BROKEN"] and os.environ["BROKEN"] in source:
    sys.exit("Error: no such instruction: vpdpbusd")
open(target, "w").close()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the sources of the engine are not there: the tests run apart from the repository")
    folder = tmp_path / "checkout"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (tmp_path / "compiler.py").write_text(COMPILER)
    return folder


def build(checkout: Path, broken: str = "", command: str = "build_ext", **environment: str) -> tuple[str, list[str]]:
    """What the build said, and the commands it gave the compiler."""
    notes = checkout.parent / "commands"
    notes.write_text("")
    settings = {
        **{name: value for name, value in os.environ.items() if name != "BITQUEST_NATIVE"},
        **{"CXX": f"{sys.executable} {checkout.parent / 'compiler.py'}", "BROKEN": broken, "COMMANDS": str(notes)},
        **environment,
    }
    line = [sys.executable, "setup.py", "-q", *command.split()]
    done = subprocess.run(line, cwd=checkout, capture_output=True, text=True, check=False, env=settings)
    commands = [one for one in notes.read_text().splitlines() if "empty.cpp" not in one]
    return f"{done.returncode} {done.stderr}", commands


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names the instruction sets of x86_64")
def test_an_instruction_set_that_does_not_compile_is_left_out_alone(checkout: Path) -> None:
    said, commands = build(checkout, "avxvnni")
    assert said.startswith("0 ")
    assert "native kernels for avxvnni are left out" in said
    assert "no such instruction" in said
    (dispatch,) = (one for one in commands if "csrc/dispatch.cpp" in one)
    assert "-DBQ_HAVE_AVX2=1" in dispatch
    assert "-DBQ_HAVE_AVX512=1" in dispatch
    assert "AVXVNNI" not in dispatch
    assert "avxvnni" not in commands[-1]
    assert "avx512/table.o" in commands[-1]
    shutil.rmtree(checkout / "build")
    said, commands = build(checkout, "avx2/")
    assert "native kernels for avxvnni are left out: they need those for avx2" in said
    assert "avx512/table.o" in commands[-1]
    assert "avx2" not in commands[-1]


def test_where_the_engine_is_required_every_part_of_it_is(checkout: Path) -> None:
    said, commands = build(
        checkout, "csrc/avx" if platform.machine() == "x86_64" else "csrc/neon", BITQUEST_NATIVE="require"
    )
    assert said.startswith("1 ")
    assert "no such instruction" in said
    assert not any("-shared" in one for one in commands)


def test_objects_are_made_anew_by_other_commands_and_for_changed_sources(checkout: Path) -> None:
    _, first = build(checkout)
    assert len(first) > 10
    _, again = build(checkout)
    assert len(again) == 1  # to link
    _, other = build(checkout, CXXFLAGS="")
    assert len(other) == 1
    append(checkout / "csrc" / "layout.cpp", "// changed\n")
    _, changed = build(checkout)
    compiled = [one for one in changed if "-c" in one.split()]
    assert {Path(one.split(" -c ")[1].split()[0]).name for one in compiled} == {"layout.cpp", "version.cpp"}
    replay = "build_replay --output replay"
    _, plain = build(checkout, command=replay)
    assert len(plain) > 10  # its objects are its own
    _, flagged = build(checkout, command=f"{replay} --flags=-fsanitize=address")
    assert len(flagged) == len(plain)
    _, library = build(checkout)
    assert len(library) == 1


def test_the_hash_is_of_what_goes_into_the_library(checkout: Path) -> None:
    before = source_hash(checkout)
    assert before == source_hash(ROOT)
    append(checkout / "csrc" / "tests" / "replay.cpp", "// changed\n")
    (checkout / "csrc" / "notes.txt").write_text("not a source")
    assert source_hash(checkout) == before
    seen = {before}
    for name in ("csrc/decode.cpp", "csrc/lanes/plan.inl", "csrc/kernels.h", "setup.py"):
        append(checkout / name, "\n")
        seen.add(source_hash(checkout))
    (checkout / "csrc" / "decode.cpp").rename(checkout / "csrc" / "decoding.cpp")
    seen.add(source_hash(checkout))
    assert len(seen) == 6
    assert source_hash(checkout.parent) is None  # an installed package


@pytest.mark.skipif(not native.availability()[0], reason=native.availability()[1])
def test_a_library_of_other_sources_is_told(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_abi, "open_library", native_abi.open_library.__wrapped__)
    monkeypatch.setattr(native_abi, "stale_of", native_abi.stale_of.__wrapped__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native_abi.open_library()
        monkeypatch.setattr(native_abi, "CHECKOUT", checkout.parent)
        native_abi.open_library()
    monkeypatch.setattr(native_abi, "CHECKOUT", checkout)
    append(checkout / "csrc" / "decode.cpp", "\n")
    with pytest.warns(RuntimeWarning, match=r"not of the sources in .*checkout/csrc: run make native"):
        library, reason = native_abi.open_library()
    assert (library is not None, reason) == (True, "")
    with pytest.warns(RuntimeWarning):
        there, said = native.availability()
    assert there
    assert "run make native" in said
