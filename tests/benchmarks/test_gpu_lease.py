"""benchmarks/gpu_lease.sh runs from end to end without a GPU, on tiny data, and says what it skipped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_lease.sh"

pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="the script needs coreutils' timeout")


def _run(*words, **environment):
    made = {**os.environ, "PYTHON": sys.executable, "BACKEND": "torch"} | environment
    return subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True, env=made, check=False)


def test_unknown_words():
    found = _run("--fast")
    assert (found.returncode, found.stderr) == (2, "error: unknown argument --fast; there is only --dry-run\n")


def test_without_time_every_step_is_skipped_and_said(tmp_path):
    found = _run("--dry-run", OUT=str(tmp_path / "out"), LIMIT="20")
    assert found.returncode == 1
    for step in ("GPU tests", "benchmark", "text to tokens"):
        assert f"{step}: skipped" in found.stdout
    assert "not everything went well" in found.stdout


@pytest.mark.slow
def test_a_dry_run(tmp_path):
    found = _run("--dry-run", OUT=str(tmp_path / "out"))
    assert found.returncode == 0, found.stdout + found.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.json",
        "gpu.json",
        "log.txt",
        "table.txt",
        "tests.txt",
    ]
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {case["status"] for case in result["cases"].values()} == {"measured"}
    assert json.loads((tmp_path / "out" / "curves.json").read_text())["agree"] is True
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "prefill-w4a4" in table
    assert "difference of the means" in table
    assert table in found.stdout
    assert "collected" in (tmp_path / "out" / "tests.txt").read_text()
