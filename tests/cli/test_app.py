"""The command as a whole: what is said when something goes wrong, and where; what a shell sees."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

import bitquest.cli.app as app
from bitquest.cli.app import COMMANDS
from bitquest.errors import DataError


@pytest.fixture
def failing(monkeypatch):
    """Make `bitquest doctor` fail with an error."""

    def fail_with(error):
        def examine():
            raise error

        monkeypatch.setattr("bitquest.cli.doctor.examine", examine)

    return fail_with


def run(*words, **options):
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "bitquest.cli.app", *map(str, words)], **options)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("a.txt: is empty; leave it out"), "error: a.txt: is empty; leave it out\n"),
        (ValueError("[model] has no width"), "error: [model] has no width\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            "error: runs/x: No space left on device; make room",
        ),
        (OSError(errno.EROFS, "Read-only file system", "x"), "error: x: Read-only file system; choose a place"),
        (OSError(errno.EIO, "Input/output error"), "error: Input/output error\n"),
        (OSError("no more"), "error: no more\n"),
        (MemoryError(), "error: out of memory: take a smaller model"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "(2.00 GiB were asked for at once)",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(bitquest, failing, error, said):
    failing(error)
    _, shown = bitquest("doctor", code=1)
    assert said in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_a_real_failure_to_allocate_is_told(bitquest, monkeypatch):
    monkeypatch.setattr("bitquest.cli.doctor.examine", lambda: torch.empty(2**62, dtype=torch.uint8))
    _, shown = bitquest("doctor", code=1)
    assert "error: out of memory (4611686018427387904 bytes were asked for at once)" in shown


def test_a_bug_keeps_its_traceback(bitquest, failing):
    failing(RuntimeError("shapes (2, 3) and (4, 5) do not fit"))
    with pytest.raises(RuntimeError, match="do not fit"):
        bitquest("doctor")


def test_the_traceback_of_a_mistake_for_reporting_a_bug(bitquest, failing, monkeypatch):
    failing(DataError("a.txt: is empty"))
    monkeypatch.setenv("BITQUEST_TRACEBACK", "1")
    with pytest.raises(DataError, match="is empty"):
        bitquest("doctor")


def test_ctrl_c(bitquest, failing):
    failing(KeyboardInterrupt())
    _, shown = bitquest("doctor", code=130)
    assert shown == "interrupted\n"


def test_ctrl_c_in_a_command_of_a_group(bitquest, monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitquest.training.data.open_tokens", interrupted)
    _, shown = bitquest("data", "show", tmp_path, code=130)
    assert shown == "interrupted\n"


def test_every_command_is_there_and_in_order(bitquest, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bitquest", "--help"])
    with pytest.raises(SystemExit) as caught:
        app.main()
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    places = [shown.index(f" {name} ", shown.index("Commands")) for name in COMMANDS]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "name", [*COMMANDS, "data prepare", "data show", "bench train-step", "scaling fit", "scaling plot"]
)
def test_every_command_explains_itself_without_torch(name):
    code = f"import sys; from bitquest.cli.app import app; app({name.split()!r} + ['--help'], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert "--json" in done.stdout or name in ("data", "bench", "scaling")


def test_unknown_words_are_answered_with_the_nearest(bitquest):
    _, shown = bitquest("trian", code=2)
    assert "No such command 'trian'. Did you mean 'train'?" in shown


def test_the_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bitquest", "--version"])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("bitquest 0.")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    from bitquest.training import prepare

    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_text("one and two and three are six.\n" * 50)
    return prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)


def test_a_reader_that_leaves(prepared):
    """`bitquest data show … --json | head -0`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    done = run("data", "show", prepared, "--json", stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_standard_output_that_takes_no_more(prepared):
    with open("/dev/full", "w") as full:
        done = run("data", "show", prepared, "--json", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: standard output: No space left on device; make room, or choose another place\n"


def test_streams_that_are_closed(prepared):
    for closed in (">&-", "2>&- <&-"):
        words = f'"{sys.executable}" -m bitquest.cli.app data show "{prepared}" --json {closed}'
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        if done.stdout:
            assert json.loads(done.stdout)["command"] == "data show"


def test_folders_and_files_in_each_others_place(bitquest, prepared, tmp_path):
    (tmp_path / "file").write_text("text")
    config = tmp_path / "t.toml"
    config.write_text(f'[data]\npath = "{prepared}"\ncontext = 8\n[model]\npreset = "1M"\nnum_hidden_layers = 1\n')
    _, shown = bitquest("train", config, "--out", tmp_path / "file" / "run", code=1)
    assert f"error: {tmp_path / 'file'}" in shown
