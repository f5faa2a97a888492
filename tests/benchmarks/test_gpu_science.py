"""benchmarks/gpu_science.sh: what it refuses, and its parts from end to end on a CPU, stopped and gone on with."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_science.sh"

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="the script needs coreutils' timeout")


def _run(*words, tmp_path, **environment):
    places = {name: str(tmp_path / name.lower()) for name in ("OUT", "STATE", "WORK", "TEXT")}
    made = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | places | environment
    return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, env=made, check=False)


@pytest.mark.parametrize("words", [(), ("everything",), ("--dry-run",)])
def test_a_part_must_be_named(words, tmp_path):
    found = _run(*words, tmp_path=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("error: name a part: orderings, scaling or tournament")


def test_without_text_nothing_begins(tmp_path):
    found = _run("scaling", tmp_path=tmp_path)
    assert found.returncode == 1
    assert f"error: there is no text in {tmp_path / 'text'}" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", ["orderings", "scaling", "tournament"])
def test_a_dry_run_goes_on_on_another_machine(part, tmp_path):
    short = _run("--dry-run", part, tmp_path=tmp_path, LIMIT="39")
    assert short.returncode == 75, short.stdout + short.stderr
    assert f"{part}: goes on" in short.stdout
    shutil.rmtree(tmp_path / "work")
    found = _run("--dry-run", part, tmp_path=tmp_path, STATE=str(tmp_path / "out"), LIMIT="900")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "goes on from" in found.stdout
    with tarfile.open(tmp_path / "out" / f"{part}.tar.gz") as archive:
        names = archive.getnames()
        results = [json.load(archive.extractfile(name)) for name in names if name.endswith("/results.json")]
    assert results
    assert all(result["finished"] for result in results)
    assert not [name for name in names if name.endswith(".safetensors")]
