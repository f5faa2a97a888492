"""`bitquest export` as a user meets it."""

from bitquest.export import load
from bitquest.training.checkpoint import list_steps

FILES = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]


def test_a_run_is_packed(bitquest, run_dir, tmp_path):
    out = tmp_path / "my model"
    result, said = bitquest("export", run_dir, "--out", out, "--json")
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (result["command"], result["scheme"], result["step"], result["finished"]) == ("export", "w1a1", 8, True)
    assert result["file_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    weights = 4 * 32 * 32 + 3 * 32 * 64
    assert result["linear_bytes"] == weights / 8 + 4 * (4 * 32 + 64 + 64 + 32)
    assert f"Next: bitquest verify {run_dir} '{out}'" in said
    assert load(out).model.layers[0].mlp.up_proj.weight_spec.bits == 1


def test_twice_is_the_same_bytes(bitquest, run_dir, tmp_path):
    for name in ("one", "two"):
        result, said = bitquest("export", run_dir, "--out", tmp_path / name)
        assert result is None
        assert "bits per parameter" in said
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_an_unfinished_run_needs_its_step(bitquest, unfinished_run, tmp_path):
    out, (*_, step) = tmp_path / "out", list_steps(unfinished_run)
    _, said = bitquest("export", unfinished_run, "--out", out, code=1)
    assert f"step {step} of 50" in said
    assert f"--step {step}" in said
    assert not out.exists()
    result, _ = bitquest("export", unfinished_run, "--out", out, "--step", step, "--json")
    assert (result["step"], result["finished"]) == (step, False)
    _, said = bitquest("export", unfinished_run, "--out", tmp_path / "no", "--step", 49, code=1)
    assert "no checkpoint of step 49" in said or "49" in said


def test_what_stands_there_is_kept(bitquest, run_dir, unfinished_run, tmp_path):
    out = tmp_path / "out"
    bitquest("export", run_dir, "--out", out)
    before = (out / "model.safetensors").read_bytes()
    _, said = bitquest("export", unfinished_run, "--step", list_steps(unfinished_run)[-1], "--out", out, code=1)
    assert "--overwrite" in said
    assert (out / "model.safetensors").read_bytes() == before
    bitquest("export", run_dir, "--out", out, "--step", 4, "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    _, said = bitquest("export", run_dir, "--out", run_dir, "--overwrite", code=1)
    assert "not only a packed model" in said


def test_mistakes_give_one_message_and_leave_nothing(bitquest, run_dir, tmp_path):
    packed = tmp_path / "packed"
    bitquest("export", run_dir, "--out", packed)
    (tmp_path / "empty").mkdir()
    for run, part in [
        (tmp_path / "nowhere", "no such run directory"),
        (tmp_path / "empty", "not a run directory"),
        (packed, "packed model"),
        (run_dir / "checkpoints" / "step-8", "add --step 8"),
        (run_dir / "config.toml", "this is a file"),
    ]:
        _, said = bitquest("export", run, "--out", tmp_path / "out", code=1)
        assert part in said, run
        assert said.startswith("error: ")
        assert len(said) < 700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "packed"]
    _, said = bitquest("export", run_dir, code=2)
    assert "--out" in said
