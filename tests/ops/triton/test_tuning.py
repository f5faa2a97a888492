"""The choice of a configuration: measured once, kept, never where it may not be, and never a reason to fail."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from bitquest.ops.triton import tuning
from bitquest.ops.triton.tuning import Config, best_config, bucket

SLOW, FAST, LARGE = Config(16, 16, 32), Config(32, 32, 32), Config(512, 512, 512)
CANDIDATES = (SLOW, FAST, LARGE)
KEY = (64, 128, "bf16", True)


class Runs:
    """A kernel whose launches are counted; LARGE does not fit."""

    def __init__(self) -> None:
        self.launched: list[Config] = []

    def __call__(self, config: Config) -> None:
        self.launched.append(config)
        if config == LARGE:
            raise RuntimeError("out of resources: shared memory")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BITQUEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITQUEST_TUNE", raising=False)
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU on which FAST is fastest."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_gpu_name", lambda device: "NVIDIA Test 9000/X")
    monkeypatch.setattr(tuning, "_median_ms", _as_if_timed)


def _as_if_timed(launch: Callable[[], object]) -> float:
    launch()
    run: Runs = launch.__defaults__[0]  # type: ignore[attr-defined]
    return 1.0 if run == FAST else 2.0


def _tune_two_kernels() -> None:
    assert best_config("k", KEY, CANDIDATES, Runs()) == FAST
    assert best_config("j", KEY, CANDIDATES, Runs()) == FAST


def _file(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache").glob("tuning-*.json")
    return file


@pytest.mark.parametrize(("tokens", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (8000, 8192)])
def test_tokens_fall_into_powers_of_two(tokens: int, expected: int) -> None:
    assert bucket(tokens) == expected


@pytest.mark.usefixtures("gpu")
def test_the_fastest_is_measured_once_and_kept_in_memory() -> None:
    run = Runs()
    assert best_config("k", KEY, CANDIDATES, run) == FAST
    assert run.launched == [SLOW, FAST, LARGE]
    assert best_config("k", KEY, CANDIDATES, run) == FAST
    assert len(run.launched) == 3
    best_config("k", (65, 128, "bf16", True), CANDIDATES, run)
    best_config("another", KEY, CANDIDATES, run)
    assert len(run.launched) == 9


@pytest.mark.usefixtures("gpu")
def test_the_file_serves_the_next_process(tmp_path: Path) -> None:
    best_config("k", KEY, CANDIDATES, Runs())
    assert _file(tmp_path).name == f"tuning-nvidia-test-9000-x-{tuning.triton.__version__}.json"
    tuning.forget()
    run = Runs()
    assert best_config("k", KEY, CANDIDATES, run) == FAST
    _file(tmp_path).unlink()  # it is read once
    assert best_config("k", KEY, CANDIDATES, run) == FAST
    assert run.launched == []


@pytest.mark.usefixtures("gpu")
def test_a_stored_choice_that_is_no_candidate_any_more_is_measured_anew() -> None:
    best_config("k", KEY, CANDIDATES, Runs())
    run = Runs()
    assert best_config("k", KEY, (SLOW, Config(64, 64, 32)), run) == SLOW
    assert len(run.launched) == 2


@pytest.mark.usefixtures("gpu")
def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    best_config("k", KEY, CANDIDATES, Runs())
    tuning.forget()
    tuning._read.add(tuning._cache_file("NVIDIA Test 9000/X"))  # as if it had been read before the first wrote
    best_config("other", KEY, CANDIDATES, Runs())
    assert set(json.loads(_file(tmp_path).read_text())["kernels"]) == {"k", "other"}
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": "bitquest-tuning-1"}',
        b'{"format": "bitquest-tuning-1", "gpu": "Other", "triton": "3.6.0", "kernels": {}}',
        b'{"format": "bitquest-tuning-1", "gpu": "NVIDIA Test 9000/X", "triton": "0", "kernels": {}}',
        b'{"format": "bitquest-tuning-1", "gpu": "NVIDIA Test 9000/X", "triton": "3.6.0", "kernels": {"k": 3}}',
        b'{"format": "bitquest-tuning-1", "gpu": "NVIDIA Test 9000/X", "triton": "3.6.0", "kernels": {"k": {"a": {}}}}',
        b'{"format": "bitquest-tuning-1", "gpu": "NVIDIA Test 9000/X", "triton": "3.6.0", "kernels": {"k": {"a":'
        b' {"block_t": "16", "block_n": 1, "block_k": 1, "warps": 1, "stages": 1, "group": 1, "split": 1,'
        b' "descriptors": false, "explicit": false}}}}',
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    path = tuning._cache_file("NVIDIA Test 9000/X")
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"tuning file .* cannot be used") as caught:
        _tune_two_kernels()
    assert len(caught) == 1
    assert set(json.loads(path.read_text())["kernels"]) == {"k", "j"}


@pytest.mark.usefixtures("gpu")
def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITQUEST_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(RuntimeWarning, match=r"cannot be written .* Set BITQUEST_CACHE") as caught:
        _tune_two_kernels()
    assert len(caught) == 1
    run = Runs()
    assert best_config("k", KEY, CANDIDATES, run) == FAST
    assert run.launched == []


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("step", ["write_text_atomic", "_locked"])
def test_a_read_only_folder_costs_one_warning(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(tuning, step, refuse)
    with pytest.warns(RuntimeWarning, match="cannot be written") as caught:
        _tune_two_kernels()
    assert len(caught) == 1


@pytest.mark.usefixtures("gpu")
def test_nothing_is_measured_where_it_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITQUEST_TUNE", "0")
    run = Runs()
    assert best_config("k", KEY, CANDIDATES, run) == SLOW
    assert run.launched == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("gpu")
def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run = Runs()
    assert best_config("k", KEY, CANDIDATES, run) == SLOW
    assert run.launched == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert best_config("k", KEY, CANDIDATES, run) == FAST
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert best_config("k", KEY, CANDIDATES, run) == FAST


@pytest.mark.usefixtures("gpu")
def test_nothing_is_measured_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run = Runs()
    assert best_config("k", KEY, CANDIDATES, run) == SLOW
    assert run.launched == []


def test_nothing_is_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert best_config("k", KEY, CANDIDATES, Runs()) == SLOW


@pytest.mark.usefixtures("gpu")
def test_only_one_candidate_needs_no_measurement() -> None:
    run = Runs()
    assert best_config("k", KEY, (FAST,), run) == FAST
    assert run.launched == []


@pytest.mark.usefixtures("gpu")
def test_candidates_that_all_fail_leave_the_default_and_no_file(tmp_path: Path) -> None:
    run = Runs()
    assert best_config("k", KEY, (LARGE, LARGE), run) == LARGE
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("gpu")
def test_measuring_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_SECONDS_PER_SHAPE", -1.0)
    run = Runs()
    assert best_config("k", KEY, CANDIDATES, run) == SLOW
    assert run.launched == [SLOW]


@pytest.mark.gpu
def test_a_real_kernel_is_tuned(tmp_path: Path) -> None:
    from bitquest.ops.triton.int8_linear import int8_product

    x_a, w_a = (torch.ones(rows, 512, dtype=torch.int8, device="cuda") for rows in (256, 384))
    assert int8_product(x_a, w_a).eq(512).all()
    assert list(json.loads(_file(tmp_path).read_text())["kernels"]) == ["int8_linear"]
