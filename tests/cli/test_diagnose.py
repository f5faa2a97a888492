"""`bitquest diagnose`: what it prints, where it writes, and what one gets wrong."""


def test_the_table_the_object_and_the_files(bitquest, run_dir, tmp_path):
    made, said = bitquest("diagnose", run_dir, "--sequences", 2, "--out", tmp_path / "look", "--json")
    assert (made["command"], made["bitquest"], made["scheme"], made["step"]) == ("diagnose", 1, "w1a1", 8)
    assert made["look"]["kind"] == "diagnose"
    assert len(made["look"]["blocks"]) == 1
    assert made["out"] == str(tmp_path / "look")
    assert {path.name for path in (tmp_path / "look").iterdir()} == {
        "report.html",
        "alignment.png",
        "alignment.csv",
        "layers.png",
        "layers.csv",
    }
    assert "∂L/∂h" in said
    assert "held-out tokens" in said
    page = (tmp_path / "look" / "report.html").read_text()
    assert f"bitquest diagnose {run_dir} --sequences 2 --out {tmp_path / 'look'}" in page


def test_the_folder_is_in_the_run_and_named_by_a_scheme(bitquest, run_dir):
    _, said = bitquest("diagnose", run_dir / "checkpoints" / "step-4", "--sequences", 1)
    assert (run_dir / "diagnose" / "report.html").is_file()
    assert "step 4" in said
    bitquest("diagnose", run_dir, "--scheme", "W2A2-2:4", "--sequences", 1)
    assert (run_dir / "diagnose-w2a2-2_4" / "report.html").is_file()
    # the run is as good as before
    bitquest("diagnose", run_dir, "--sequences", 1)


def test_mistakes(bitquest, run_dir, unfinished_run, tmp_path):
    for words, says in [
        ([tmp_path / "nowhere"], "nowhere: no such run directory"),
        ([tmp_path], "not a run directory: it has no config.toml"),
        ([run_dir, "--step", 5], "no checkpoint of step 5"),
        ([run_dir, "--sequences", 0], "0 sequences are none to look at; give at least 1"),
        ([run_dir, "--scheme", "w9a9"], "w9 is no width"),
        ([run_dir, "--backend", "tirton"], "tirton"),
        ([run_dir, "--data", tmp_path], "manifest.json"),
    ]:
        _, said = bitquest("diagnose", *words, "--out", tmp_path / "out", code=1)
        assert says in said, said
        assert said.startswith("error: ")
        assert not (tmp_path / "out").exists()
    _, said = bitquest("diagnose", unfinished_run, "--sequences", 1, "--out", tmp_path / "out")
    assert "report.html" in said
