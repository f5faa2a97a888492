"""Earlier methods and other formats run as they were trained: train, pack, verify."""

from pathlib import Path

import pytest

from bitquest.errors import UserError
from bitquest.evaluation.verify import verify

RIVALS = [
    *("w1a1-norot-lsq", "w4a4-tensor-norot-lsq", "w4a4-norot-pact", "w2a2-norot-paretoq", "w2a8-norot-bitnet"),
    *("w3a3-lloyd", "w8a8-fp8", "w4a4-mxfp4", "w4a4-nvfp4", "w4a4-2:4-norot-lsq"),
]


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_runs_what_it_trained(name: str, tmp_path: Path, trained_run) -> None:
    trained_run(tmp_path, name)
    report = verify(tmp_path / "run", tmp_path / "packed", tokens=100, texts=1, new_tokens=4)
    assert report.passed, report


def test_lsq_plus_trains_and_is_not_packed(tmp_path: Path, trained_run) -> None:
    with pytest.raises(UserError, match=r"learned offset \(LSQ\+\) have no packed form"):
        trained_run(tmp_path, "w2a2-norot-lsq+")
    assert (tmp_path / "run" / "checkpoints").is_dir()
    assert not (tmp_path / "packed").exists()
