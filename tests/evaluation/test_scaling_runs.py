"""Reading the runs of a law: CSV, run directories, comparisons; what is left out, what is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bitquest.errors import DataError
from bitquest.evaluation.scaling_runs import ScalingRun, _best_rates, format_name, pooled, read_runs
from bitquest.training import TrainConfig, prepare, train

HEAD = "parameters,tokens,scheme,loss\n"


def _csv(folder, text):
    path = folder / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_papers_csv(shared_data):
    found = read_runs([shared_data / "quest_paper_runs.csv"])
    assert len(found.runs) == 104
    assert len(found.formats) == 17
    first = found.runs[0]
    assert (first.parameters, first.tokens, first.format, first.loss) == (30482560, 749993984, "w2a2", 3.718683)
    counts = {name: sum(run.format == name for run in found.runs) for name in found.formats}
    assert (counts["bf16"], counts["w4a4"], counts["w4a4-fp4"], counts["w4a4-4:8"], counts["w1a1-norot"]) == (
        6, 14, 4, 6, 5,
    )  # fmt: skip


def test_a_csv_of_ones_own(tmp_path):
    path = _csv(tmp_path, HEAD + "1e6,2e7,none,3.5\n1000000,20000000,W4A4,3.6\n")
    runs = read_runs([path]).runs
    assert [(run.parameters, run.format, run.loss) for run in runs] == [(10**6, "bf16", 3.5), (10**6, "w4a4", 3.6)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "runs.csv: the column non_embedding_parameters or parameters is missing; there are a, b"),
        ("parameters,tokens,loss\n1,2,3\n", "no column says the format"),
        (HEAD + "1e6,2e7,none,nan\n", "runs.csv, line 2: loss is 'nan', not a positive number"),
        (HEAD + "1e6,2e7,none,3\n1e6,-2,none,3\n", "line 3: tokens is '-2'"),
        ("", "runs.csv: the file is empty"),
        (HEAD + "1e6,2e7,none\n", "line 2: the line ends before loss"),
        (HEAD + "1e6,2e7,none,3\n1e6\n", "line 3: the line ends before tokens"),
        ("loss,parameters,tokens,scheme\n3,1e6,2e7\n", "line 2: the line ends before scheme"),
        ('{\n "format": "bitquest-scaling-law",\n', "runs.csv: this is a scaling law, not a CSV of runs"),
        (HEAD + "1e6,2e7,w9a9,3\n", "line 2: scheme 'w9a9'"),
        (
            "parameters,tokens,loss,weight_bits,activation_bits,rotation\n1e6,2e7,3,4,4,givens\n",
            "rotation is 'givens'; it is one of hadamard128, none",
        ),
    ],
)
def test_what_a_csv_may_not_be(tmp_path, text, message):
    with pytest.raises(DataError) as caught:
        read_runs([_csv(tmp_path, text)])
    assert message in str(caught.value)


def test_what_is_neither(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(DataError, match="neither a run directory nor a comparison"):
        read_runs([tmp_path])
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DataError, match="not a text file"):
        read_runs([tmp_path / "x.bin"])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """runs/a (none), runs/b (w1a1, two blocks), runs/c (stopped early), and a data folder."""
    folder = tmp_path_factory.mktemp("scaling")
    (folder / "text.txt").write_text("the state of the union is strong and the people are one.\n" * 200)
    prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    for name, scheme, layers, steps in (("a", "none", 1, 4), ("b", "w1a1", 2, 4), ("c", "w4a4", 1, 50)):
        stop = iter(range(10**6))
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
        fields = {
            "scheme": scheme,
            "model": {**shape, "num_attention_heads": 2, "num_key_value_heads": 2},
            "data": {"path": str(folder / "data"), "context": 32},
            "train": {"steps": steps, "batch_size": 2},
            "evaluate": {"every": 0, "batches": 1},
        }
        train(TrainConfig.from_dict(fields), folder / "runs" / name, should_stop=lambda stop=stop: next(stop) >= 5)
    return folder


def test_a_comparison_and_its_runs(comparison):
    found = read_runs([comparison])
    a, b = found.runs
    # attention 4·32², SwiGLU 3·32·64, two norms; the last norm
    assert (a.parameters, a.tokens, a.format) == (4 * 32**2 + 3 * 32 * 64 + 2 * 32 + 32, 4 * 2 * 32, "bf16")
    assert (b.parameters, b.format) == (2 * (4 * 32**2 + 3 * 32 * 64 + 2 * 32) + 32, "w1a1")
    last = json.loads((comparison / "runs/b/metrics.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], b.loss) == ("evaluate", last["loss"])
    assert found.notes == (f"left out: {comparison}/runs/c: step 1 of 50, or no validation loss at its end",)
    assert read_runs([comparison / "runs/b"]).runs == (b,)
    assert read_runs([comparison / "runs"]).runs == (a, b)


def test_runs_that_do_not_count(comparison, tmp_path):
    import shutil

    for name in "ab":
        shutil.copytree(comparison / "runs" / name, tmp_path / name)
    (tmp_path / "a/diverged.json").write_text("{}")
    assert read_runs([tmp_path]).notes == (f"left out: {tmp_path}/a: diverged",)
    (tmp_path / "a/diverged.json").unlink()
    (tmp_path / "a/tokenizer.json").write_text("another")
    with pytest.raises(DataError, match="different tokenizers"):
        read_runs([tmp_path])


def test_the_rate_that_a_cell_keeps():
    def run(rate, loss, seed=0, name="w1a1"):
        return ScalingRun(10, 100, name, loss, "", rate, seed)

    swept = [run(1e-3, 3.0), run(2e-3, 2.9), run(4e-3, 2.8), run(2e-3, 3.1, 1), run(1e-3, 1.0, 0, "bf16")]
    kept, dropped = _best_rates(swept)  # 2e-3 went on to a second seed, whatever the others did on the first
    assert ([r.rate for r in kept], dropped) == ([2e-3, 2e-3, 1e-3], 2)
    alike = [run(1e-3, 3.0), run(2e-3, 2.9), run(4e-3, 3.8)]
    assert [r.rate for r in _best_rates(alike)[0]] == [2e-3]
    rows = [ScalingRun(10, 100, "w1a1", loss, "", rate) for loss, rate in ((3.0, 1e-3), (2.9, 2e-3))]
    assert _best_rates(rows) == (rows, 0)  # rows of a CSV are one run each
    assert [r.loss for r in pooled(kept)] == [pytest.approx(3.0), 1.0]


def test_a_run_with_another_recipe_is_a_format_of_its_own(comparison, tmp_path):
    shutil.copytree(comparison / "runs/b", tmp_path / "b")
    config = tmp_path / "b/config.toml"
    config.write_text(re.sub(r"\n\[recipe\]\n(?:[^\[]*)", "\n", config.read_text()) + "\n[recipe]\nmatrix_lr = 0.5\n")
    (run,) = read_runs([tmp_path / "b"]).runs
    assert run.format == "w1a1@matrix_lr=0.5"


def test_format_names():
    assert [format_name(name) for name in ("none", "BF16", "W4A4-4:8", "w1a1-norot")] == [
        "bf16", "bf16", "w4a4-4:8", "w1a1-norot",
    ]  # fmt: skip


def test_a_file_beside_runs(comparison):
    path = Path(_csv(comparison, HEAD + "1e6,2e7,none,3.5\n"))
    assert len(read_runs([path, comparison / "runs/a"]).runs) == 2


def test_runs_that_are_given_twice_count_once(comparison, tmp_path):
    path = _csv(tmp_path, HEAD + "1e6,2e7,none,3.5\n1e6,2e7,none,3.5\n1e6,2e7,w4a4,3.6\n")
    copy = tmp_path / "copy.csv"
    copy.write_text(path.read_text() + "1e6,2e7,w2a2,3.7\n")
    once = read_runs([path])
    assert (len(once.runs), once.notes) == (3, ())  # equal rows of one file are two seeds
    found = read_runs([path, path])
    assert (found.runs, found.notes) == (once.runs, ("3 runs are given more than once; each counts once",))
    assert [run.format for run in read_runs([path, copy]).runs] == ["bf16", "bf16", "w4a4", "w2a2"]
    alone = read_runs([comparison])
    indirect = comparison / "runs/../runs/b"
    for paths in ([comparison, comparison / "runs/a"], [comparison, indirect]):
        found = read_runs(paths)
        assert found.runs == alone.runs
        assert found.notes == (*alone.notes, "1 run is given more than once; each counts once")


def test_an_unstable_run_does_not_count(comparison, tmp_path):
    import shutil

    shutil.copytree(comparison / "runs/a", tmp_path / "a")
    losses = [5.0 - 0.1 * step for step in range(20)] + [5.5] * 10
    first, last = ((tmp_path / "a/metrics.jsonl").read_text().splitlines()[i] for i in (0, -1))
    records = [{**json.loads(first), "step": number, "loss": loss} for number, loss in enumerate(losses, 1)]
    lines = [*map(json.dumps, records), json.dumps({**json.loads(last), "step": 30})]
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = (tmp_path / "a/config.toml").read_text().replace("steps = 4", "steps = 30")
    (tmp_path / "a/config.toml").write_text(config)
    [note] = read_runs([tmp_path / "a"]).notes
    assert "unstable: the training loss ended 2.3" in note
