"""Builds the native CPU engine, csrc/, beside the package. Everything else is in pyproject.toml.

The engine is optional: without a C++17 compiler the package installs all the same and runs on torch alone. It is a
plain shared library behind a C interface, loaded with ctypes, so one build serves every version of Python.
BITQUEST_NATIVE=0 leaves it out, BITQUEST_NATIVE=require makes its failure the installation's. CXX names the compiler.
"""

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

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
# Folder of csrc/: the flags its files are compiled with, and the macro that tells dispatch.cpp that they are there.
INSTRUCTION_SETS = {
    "x86_64": {
        "avx2": (["-mavx2", "-mfma", "-mf16c", "-mbmi2"], "BQ_HAVE_AVX2"),
        "avxvnni": (["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavxvnni"], "BQ_HAVE_AVXVNNI"),
        "avx512": (
            [*(f"-mavx512{part}" for part in AVX512.split()), "-mgfni", "-mfma", "-mf16c", "-mbmi2"],
            "BQ_HAVE_AVX512",
        ),
    },
    "aarch64": {
        "neon": ([], "BQ_HAVE_NEON"),
        "neondot": (["-march=armv8.2-a+dotprod"], "BQ_HAVE_NEONDOT"),
        "neoni8mm": (["-march=armv8.2-a+dotprod+i8mm"], "BQ_HAVE_NEONI8MM"),
    },
}
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class BuildNative(build_ext):
    """Compiles each folder of csrc/ with its own flags and links one shared library."""

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
        sets = {
            folder: (flags, macro)
            for folder, (flags, macro) in INSTRUCTION_SETS.get(MACHINES.get(machine, machine), {}).items()
            if self._accepts(flags)
        }
        macros = [*extra, *(f"-D{macro}=1" for _, macro in sets.values())]
        jobs = [(source, macros) for source in [*SOURCES.glob("*.cpp"), *(SOURCES / "generic").glob("*.cpp"), *more]]
        for folder, (flags, _) in sets.items():
            jobs += [(source, [*flags, *macros]) for source in (SOURCES / folder).glob("*.cpp")]
        headers = [path for pattern in ("*.h", "*.inl") for path in SOURCES.rglob(pattern)]
        newest = max(path.stat().st_mtime for path in [*headers, ROOT / "setup.py"])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda job: self._compile(*job, newest), sorted(jobs)))
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f"{target.name}.linking")
        self._run([*self._compiler(), *linking, *extra, "-pthread", "-o", str(made), *objects])
        made.replace(target)  # a process that has the old one loaded keeps it

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

    def _compile(self, source: Path, flags: list[str], newest: float) -> str:
        target = Path(self.build_temp) / source.with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
            self._run([*self._compiler(), *COMMON, *WARNINGS, *flags, "-pthread", "-c", str(source), "-o", str(target)])
        return str(target)


class BuildReplay(BuildNative):
    """Builds csrc/tests/replay.cpp with the engine in it: with sanitizers, or for another kind of machine.

    CXX=aarch64-linux-gnu-g++ python setup.py build_replay --machine aarch64 --output replay
    """

    description = "build the program that replays golden vectors"
    user_options: ClassVar = [
        ("output=", None, "the program"),
        ("machine=", None, "x86_64 or aarch64; this one by default"),
        ("flags=", None, "further flags for the compiler"),
        ("build-temp=", None, "where the objects go"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.output, self.machine, self.flags = "replay", platform.machine(), ""

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
