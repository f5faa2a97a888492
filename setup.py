"""Builds the native CPU engine, csrc/, beside the package. Everything else is in pyproject.toml.

The engine is optional: without a C++17 compiler the package installs all the same and runs on torch alone. It is a
plain shared library behind a C interface, loaded with ctypes, so one build serves every version of Python.
BITQUEST_NATIVE=0 leaves it out, BITQUEST_NATIVE=require makes its failure the installation's. CXX names the compiler.
An instruction set whose files the compiler or assembler does not take is left out alone, with a warning; under
BITQUEST_NATIVE=require it too is a failure, so that an error in a kernel cannot hide.
"""

import os
import platform
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = Path("csrc")
# No contraction: a product and a sum round twice, as in the definition, unless a kernel asks for a fused one.
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# Vectors never cross the interface; the last two are wrong about GCC's own AVX-512 header.
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-unknown-warning-option",
]
AVX512 = "f bw vl dq vnni vpopcntdq vbmi vbmi2 bitalg"


class InstructionSet(NamedTuple):
    """A folder of csrc/: its flags, the macro that tells shared files that it is there, and the set it builds on."""

    flags: list[str]
    macro: str
    rests_on: str | None = None


AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
# By folder; what another rests on comes before it.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx2": InstructionSet(AVX2, "BQ_HAVE_AVX2"),
        "avxvnni": InstructionSet([*AVX2, "-mavxvnni"], "BQ_HAVE_AVXVNNI", "avx2"),
        "avx512": InstructionSet(
            [*(f"-mavx512{part}" for part in AVX512.split()), "-mgfni", "-mfma", "-mf16c", "-mbmi2"], "BQ_HAVE_AVX512"
        ),
    },
    "aarch64": {
        "neon": InstructionSet([], "BQ_HAVE_NEON"),
        "neondot": InstructionSet(["-march=armv8.2-a+dotprod"], "BQ_HAVE_NEONDOT", "neon"),
        "neoni8mm": InstructionSet(["-march=armv8.2-a+dotprod+i8mm"], "BQ_HAVE_NEONI8MM", "neon"),
    },
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
source_hash = runpy.run_path(str(ROOT / "src/bitquest/ops/native_sources.py"))["source_hash"]


class BuildNative(build_ext):
    """Compiles each folder of csrc/ with its own flags and links one shared library."""

    strict = os.environ.get("BITQUEST_NATIVE") == "require"  # an instruction set that fails is a failure
    _newest = 0.0  # when a header or this file changed last

    def run(self) -> None:
        wanted = os.environ.get("BITQUEST_NATIVE", "")
        self._remove_earlier()  # a library of other sources must not be taken for this build's
        if wanted == "0":
            return
        try:
            super().run()
        except Exception as failure:  # whatever a compiler or the lack of one brings: the package works without
            if wanted == "require":
                raise
            print(f"warning: the native CPU engine was not built: {failure}", file=sys.stderr)

    def _remove_earlier(self) -> None:
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            (Path(self.build_lib) / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        # A name that Python does not take for a module of its own.
        return str(Path(*fullname.split(".")[:-1]) / "libbitquest.so.1")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        self._build(target, platform.machine(), ["-shared"], [])

    def _build(self, target: Path, machine: str, linking: list[str], extra: list[str], *more: Path) -> None:
        """Compile csrc/, and `more`, for a kind of machine with `extra` flags, and link `target`."""
        if sys.platform == "win32":
            raise RuntimeError("the native engine is built with GCC or Clang; there is no recipe for Windows yet")
        machine = machine.lower()
        headers = [path for pattern in ("*.h", "*.inl") for path in SOURCES.rglob(pattern)]
        self._newest = max(path.stat().st_mtime for path in [*headers, ROOT / "setup.py"])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects, macros = self._compile_sets(pool, INSTRUCTION_SETS.get(MACHINES.get(machine, machine), {}), extra)
            shared = [*SOURCES.glob("*.cpp"), *(SOURCES / "generic").glob("*.cpp"), *more]
            made_from = {SOURCES / "version.cpp": [f'-DBQ_SOURCE_HASH="{source_hash(ROOT)}"']}
            jobs = [
                pool.submit(self._compile, source, [*extra, *macros, *made_from.get(source, [])])
                for source in sorted(shared)
            ]
            objects += [job.result() for job in jobs]
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f"{target.name}.linking")
        self._run([*self._compiler(), *linking, *extra, "-pthread", "-o", str(made), *objects])
        made.replace(target)  # a process that has the old one loaded keeps it

    def _compile_sets(
        self, pool: ThreadPoolExecutor, sets: dict[str, InstructionSet], extra: list[str]
    ) -> tuple[list[str], list[str]]:
        """Objects of every instruction set that can be compiled here, and the macros that say so."""
        jobs = {
            name: [
                pool.submit(self._compile, source, [*one.flags, *extra, f"-D{one.macro}=1"])
                for source in sorted((SOURCES / name).glob("*.cpp"))
            ]
            for name, one in sets.items()
            if self._accepts(one.flags)
        }
        objects: dict[str, list[str]] = {}
        for name, parts in jobs.items():
            needed = sets[name].rests_on
            if needed is not None and needed not in objects:
                print(f"warning: native kernels for {name} are left out: they need those for {needed}", file=sys.stderr)
                continue
            try:
                objects[name] = [part.result() for part in parts]
            except RuntimeError as failure:
                if self.strict or "no C++ compiler" in str(failure):
                    raise
                print(f"warning: native kernels for {name} are left out: {failure}", file=sys.stderr)
        return [path for made in objects.values() for path in made], [f"-D{sets[name].macro}=1" for name in objects]

    def _compiler(self) -> list[str]:
        return os.environ.get("CXX", "c++").split()

    def _run(self, command: list[str]) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise RuntimeError(f"no C++ compiler: {command[0]!r} is not there (CXX names another)") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        if done.stderr:
            print(done.stderr, file=sys.stderr)

    def _accepts(self, flags: list[str]) -> bool:
        with TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cpp"
            source.write_text("int main() { return 0; }\n")
            try:
                self._run([*self._compiler(), *COMMON, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))])
            except RuntimeError as refusal:
                if "no C++ compiler" in str(refusal):
                    raise
                return False
        return True

    def _compile(self, source: Path, flags: list[str]) -> str:
        """The object of a source; made anew if it is older than the sources, or was made by another command."""
        target = Path(self.build_temp) / source.with_suffix(".o")
        command = [*self._compiler(), *COMMON, *WARNINGS, *flags, "-pthread", "-c", str(source), "-o", str(target)]
        made_by = target.with_suffix(".command")
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.exists() and target.stat().st_mtime >= max(self._newest, source.stat().st_mtime)
        if not (fresh and made_by.exists() and made_by.read_text() == "\n".join(command)):
            made_by.unlink(missing_ok=True)
            self._run(command)
            made_by.write_text("\n".join(command))
        return str(target)


class BuildReplay(BuildNative):
    """Builds csrc/tests/replay.cpp with the engine in it: with sanitizers, or for another kind of machine.

    CXX=aarch64-linux-gnu-g++ python setup.py build_replay --machine aarch64 --output replay
    """

    description = "build the program that replays golden vectors"
    strict = True
    user_options: ClassVar = [
        ("output=", None, "the program"),
        ("machine=", None, "x86_64 or aarch64; this one by default"),
        ("flags=", None, "further flags for the compiler"),
        ("build-temp=", None, "where the objects go"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.output, self.machine, self.flags = "replay", platform.machine(), ""

    def finalize_options(self) -> None:
        if self.build_temp is None:  # apart from the library's objects, which are made with other flags
            self.build_temp = str(Path("build") / f"replay-{self.machine}")
        super().finalize_options()

    def run(self) -> None:
        self._build(Path(self.output), self.machine, [], self.flags.split(), SOURCES / "tests" / "replay.cpp")


class AnyPython(bdist_wheel):
    """The library is of one machine, but of no Python in particular."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("bitquest.ops._native", sources=["csrc/dispatch.cpp"])],
    cmdclass={"build_ext": BuildNative, "build_replay": BuildReplay, "bdist_wheel": AnyPython},
)
