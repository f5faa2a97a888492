import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitquest.cli.app import app, main


def test_prepare_and_show(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A text for the model to read.\n" * 200)
    arguments = ["data", "prepare", str(tmp_path / "a.txt"), "--tokenizer", "bpe:270", "--out", str(tmp_path / "d")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    fields = json.loads(result.stdout)
    assert fields["vocab_size"] <= 270
    assert fields["splits"]["train"]["utf8_bytes"] + fields["splits"]["val"]["utf8_bytes"] == 6000
    shown = CliRunner().invoke(app, ["data", "show", str(tmp_path / "d")])
    assert shown.exit_code == 0
    assert "bytes of text" in shown.stderr


def test_one_message_and_exit_code_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["bitquest", "data", "prepare", str(tmp_path / "no.txt"), "--out", str(tmp_path / "d")]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "no such file" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "d").exists()
