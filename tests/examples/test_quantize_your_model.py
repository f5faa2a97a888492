"""The example is run as a reader runs it: what it prints is what it promises."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "quantize_your_model.py"


def run(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE)], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not list(folder.iterdir())
    return done.stdout


def test_it_learns_and_its_packed_model_is_the_trained_one(tmp_path):
    printed = run(tmp_path)
    losses = [float(loss) for loss in re.findall(r"^step .*: ([\d.]+) nats", printed, re.M)]
    assert len(losses) == 5
    assert losses[0] > 4.5
    assert losses[-1] < 2.1  # a guess from byte frequencies alone costs 3.1
    loaded = float(re.search(r"^loaded: ([\d.]+)", printed, re.M)[1])
    assert abs(loaded - losses[-1]) < 0.02
    equal, count = map(int, re.search(r"^(\d+) of (\d+) outputs", printed, re.M).groups())
    assert count - 10 <= equal <= count == 2048  # codes flip at about 4e-7 of 4-bit values
    in_float, packed = (
        int(n.replace(",", "")) for n in re.search(r"([\d,]+) bytes .*, ([\d,]+) packed", printed).groups()
    )
    assert in_float / packed > 10


def test_it_is_as_short_as_it_says():
    """From the model on, twenty statements' worth of lines; comments, blank lines and prints aside."""
    text = EXAMPLE.read_text(encoding="utf-8")
    lines = text[text.index("torch.manual_seed(0)") :].splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(("#", "print("))]
    assert len(code) <= 20
