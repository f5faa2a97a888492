"""Loading a trained model from a run directory, and every way a folder can be something else."""

import pytest
import torch

from bitquest.errors import CheckpointError, ConfigError
from bitquest.files import write_text_atomic
from bitquest.models import Llama, LlamaConfig, Tokenizer
from bitquest.nn import QuantizedLinear
from bitquest.training import load_run, train, trainer
from bitquest.training.checkpoint import list_steps, read_checkpoint


@pytest.fixture(scope="module")
def shape():
    return {"scheme": "w1a1", "train": {"steps": 6}, "checkpoint": {"every": 2, "keep": 9}, "evaluate": {"every": 0}}


def unfinished(config, run):
    calls = []
    train(config, run, should_stop=lambda: calls.append(0) or len(calls) >= 4)


def test_a_finished_run(make_config, shape, tmp_path):
    config = make_config(**shape)
    train(config, tmp_path / "run")
    run = load_run(str(tmp_path / "run"), require_finished=True)
    assert (run.step, run.finished, run.config) == (6, True, config)
    assert not run.model.training
    assert isinstance(run.model.model.layers[0].self_attn.q_proj, QuantizedLinear)
    assert run.tokenizer.vocab_size == 257
    saved = read_checkpoint(tmp_path / "run").model
    assert all(torch.equal(saved[name], tensor) for name, tensor in run.model.state_dict().items())
    earlier = load_run(tmp_path / "run", 4)
    assert (earlier.step, earlier.finished) == (4, False)
    assert load_run(tmp_path / "run", 2, require_finished=True).step == 2
    tokens = torch.randint(0, 257, (1, 9))
    with torch.no_grad():
        assert not torch.equal(earlier.model(tokens), run.model(tokens))


def test_an_unfinished_run(make_config, shape, tmp_path):
    unfinished(make_config(**shape), tmp_path / "run")
    assert load_run(tmp_path / "run").step == 4
    with pytest.raises(CheckpointError, match=r"at step 4 of 6.*bitquest train .*config\.toml --out .*--step 4"):
        load_run(tmp_path / "run", require_finished=True)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; there are 2, 4"):
        load_run(tmp_path / "run", 3)


def test_the_model_is_rebuilt_without_the_data(make_config, shape, tmp_path, data_dir):
    copy = tmp_path / "data"
    copy.mkdir()
    for path in data_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    train(make_config(**shape, data={"path": str(copy)}), tmp_path / "run")
    for path in copy.iterdir():
        path.unlink()
    assert load_run(tmp_path / "run").finished


def test_damage_names_the_file_and_the_intact_step(make_config, shape, tmp_path):
    train(make_config(**shape), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-6" / "state.json"
    path.write_text(path.read_text().replace("w1a1", "w4a4"))
    with pytest.raises(CheckpointError, match=r"step 6 cannot be used: .*state\.json.*--step 4"):
        load_run(tmp_path / "run")
    assert load_run(tmp_path / "run", 4).step == 4


def test_folders_that_are_no_runs(make_config, shape, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such run directory"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="this is a file; a run is the directory"):
        load_run(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"not a run directory: it has no config\.toml"):
        load_run(tmp_path)
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("config.json", "model.safetensors"):
        (packed / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"a packed model .*not a run directory.*bitquest generate"):
        load_run(packed)
    unfinished(make_config(**shape), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"this is one checkpoint\. Name the run, .*run, and add --step 4"):
        load_run(tmp_path / "run" / "checkpoints" / "step-4")


def test_before_the_first_checkpoint(make_config, shape, tmp_path):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    with pytest.raises(Killed):
        train(make_config(**shape), tmp_path / "run", should_stop=kill)
    with pytest.raises(CheckpointError, match=r"no checkpoint yet\. Train on with: bitquest train"):
        load_run(tmp_path / "run")


def test_a_tied_model_stays_tied(make_config, shape, tmp_path):
    train(make_config(**shape | {"scheme": "w2a2-h8"}, model={"tie_word_embeddings": True}), tmp_path / "run")
    model = load_run(tmp_path / "run").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(Llama(LlamaConfig.from_json(model.config.to_json())), Llama)


def test_two_processes_that_begin_one_run_at_once(make_config, shape, tmp_path, monkeypatch):
    """The second looks before the first has written anything, and claims the directory when it has."""
    config, run = make_config(**shape), tmp_path / "run"
    start = trainer._Session.__init__
    others = []

    def slowly(self, *args):
        start(self, *args)
        if not others:
            others.append(1)
            train(config, run, should_stop=lambda: True)

    monkeypatch.setattr(trainer._Session, "__init__", slowly)
    with pytest.raises(ConfigError, match="another process has begun a run here meanwhile"):
        train(config, run)
    assert list_steps(run) == [1]
    assert train(config, run).finished


def test_a_full_disk_is_told_with_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (lambda path: write_text_atomic(path, "x"), Tokenizer.byte_level().save):
        with pytest.raises(OSError, match=r"No space left on device: '.*one\.json'"):
            write(tmp_path / "one.json")
    assert not list(tmp_path.iterdir())
