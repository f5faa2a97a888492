"""Configurations: what is read, what is refused, and whether the message tells key, reason, place and remedy."""

import dataclasses
import tomllib
from pathlib import Path

import pytest

from bitquest.errors import ConfigError
from bitquest.nn import Scheme
from bitquest.numerics import Learned, PerTensor, Quantizer
from bitquest.training.config import DataSection, TrainConfig, TrainSection, differing_keys, known_keys, load_config
from bitquest.training.toml import write_toml

EXAMPLES = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads_and_describes_a_model(path):
    config = load_config(path)
    if config.model.init_from is None:
        shape = config.model.llama_config(vocab_size=257, context=config.data.context)
        assert shape.vocab_size == 257
        assert shape.max_position_embeddings == config.data.context
    assert TrainConfig.from_dict(tomllib.loads(config.to_toml())) == config


def test_there_are_examples():
    assert {"tiny.toml", "10M.toml", "30M-paper.toml"} <= {path.name for path in EXAMPLES}


def test_the_paper_configuration_is_the_papers_recipe():
    config = load_config(next(path for path in EXAMPLES if path.name == "30M-paper.toml"))
    shape = config.model.llama_config(vocab_size=32000, context=512)
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (6, 640, 5)
    tokens = config.train.steps * config.train.batch_size * config.data.context
    assert tokens == pytest.approx(3e9, rel=1e-3)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (1.2e-3, (0.9, 0.95), 0.1)
    assert (config.schedule.kind, config.schedule.warmup, config.schedule.final) == ("cosine", 0.1, 0.1)


@pytest.mark.parametrize("path", ['a"b\\c\n\x7f\x01é😀', "plain", "", "tab\t"])
def test_toml_text_reads_back_equal(path):
    config = TrainConfig(data=DataSection(path=path), train=TrainSection(steps=7, compile=True))
    assert TrainConfig.from_dict(tomllib.loads(config.to_toml())) == config


def test_toml_writer_keeps_floats_exact():
    values = {"a": 1e-5, "b": 1e22, "c": 0.1, "d": -3.0, "t": {"x": [1.5, 2.0], "y": False}}
    assert tomllib.loads(write_toml(values)) == values


def test_overrides_beat_the_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('scheme = "w4a4"\n[data]\npath = "d"\n[train]\nsteps = 5\n')
    overrides = ["train.steps=100", "scheme=W2A8", "optimizer.betas=[0.8, 0.9]", "model.preset=1M", "data.path=2024"]
    config = load_config(path, [*overrides, "optimizer.lr=1", "train.compile=true", "model.qk_norm=true"])
    assert config.train.steps == 100
    assert config.scheme == "w2a8"
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.preset == "1M"
    assert config.data.path == "2024"
    assert isinstance(config.optimizer.lr, float)
    assert config.optimizer.lr == 1.0
    assert config.train.compile is True
    assert config.model.shape == (("qk_norm", True),)
    assert load_config(path, ["train.steps=1", "train.steps=2"]).train.steps == 2


def test_without_a_file():
    assert load_config(None, ["data.path=d"]).data.path == "d"
    with pytest.raises(ConfigError, match=r"data\.path is missing.*bitquest data prepare"):
        load_config(None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[train]\nstep = 5\n", ["train.step ", "did you mean 'train.steps'?"]),
        ("[tran]\nsteps = 5\n", ["tran ", "did you mean 'train'?"]),
        ("lr = 0.1\n", ["lr ", "did you mean 'optimizer.lr'?"]),
        ("[train]\nlr = 0.1\n", ["train.lr ", "did you mean 'optimizer.lr'?"]),
        ("[model]\nhiden_size = 5\n", ["model.hiden_size", "did you mean 'model.hidden_size'?"]),
        ("train = 5\n", ["train is a section", "[train]", "got 5"]),
        ("[scheme]\nx = 1\n", ["scheme must be a string", "{'x': 1} (dict)"]),
        ('[train]\nsteps = "many"\n', ["train.steps must be a whole number", "got 'many' (str)"]),
        ("[train]\nsteps = 5.0\n", ["train.steps must be a whole number", "got 5.0 (float)"]),
        ("[train]\nsteps = true\n", ["train.steps must be a whole number", "got True (bool)"]),
        ("[train]\ncompile = 1\n", ["train.compile must be true or false", "got 1 (int)"]),
        ("[optimizer]\nlr = true\n", ["optimizer.lr must be a number", "got True"]),
        ("[optimizer]\nbetas = [0.9]\n", ["optimizer.betas must be two numbers", "got [0.9]"]),
        ('[optimizer]\nbetas = [0.9, "x"]\n', ["optimizer.betas", "'x'"]),
        ("[optimizer]\nbetas = [0.9, 1.0]\n", ["optimizer.betas must be below 1, got 1.0"]),
        ("[optimizer]\nlr = 0\n", ["optimizer.lr must be above 0, got 0"]),
        ("[optimizer]\nlr = nan\n", ["optimizer.lr must be finite"]),
        ("[optimizer]\nlr = inf\n", ["optimizer.lr must be finite"]),
        ("[train]\nthreads = 100000\n", ["train.threads must be at most 1024"]),
        ("[compare]\nseeds = [0]\n", ["compare is a section that `bitquest compare` reads"]),
        ("seed = -1\n", ["seed must be at least 0, got -1"]),
        ("[train]\nsteps = 0\n", ["train.steps must be at least 1, got 0"]),
        ("[schedule]\nwarmup = 100\n", ["schedule.warmup must be below 1, got 100"]),
        ('[schedule]\nkind = "cosin"\n', ["schedule.kind must be one of cosine, wsd", "did you mean 'cosine'?"]),
        ('[schedule]\nkind = "wsd"\nwarmup = 0.5\ndecay = 0.6\n', ["schedule.decay", "1.1 of the run"]),
        ("[train]\nbatch_size = 16\naccumulation = 3\n", ["train.accumulation = 3", "train.batch_size = 16"]),
        ('scheme = "w9a9"\n', ["scheme = 'w9a9'", "1 to 8"]),
        ('[model]\npreset = "20M"\n', ["model.preset", "10M", "got '20M'"]),
        ("[model]\nhidden_size = 1.5\n", ["model.hidden_size must be a whole number"]),
        ('[model]\ninit_from = "x"\nhidden_size = 64\n', ["model.init_from", "remove model.hidden_size"]),
    ],
)
def test_a_wrong_file_is_refused_with_key_reason_and_place(tmp_path, text, parts):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["data.path=d"])
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps", ["--set train.steps: ", "key=value"]),
        ("=5", ["--set =5", "key=value"]),
        ("train.stepz=5", ["--set train.stepz=5", "did you mean 'train.steps'?"]),
        ("steps=5", ["did you mean 'train.steps'?"]),
        ("train=5", ["it is a section", "train.steps"]),
        ("a.b.c=5", ["a.b.c is not a configuration key"]),
        ("train.steps=ten", ["--set train.steps=ten: train.steps must be a whole number, got 'ten'"]),
        ("scheme=w1b1", ["--set scheme=w1b1: scheme = 'w1b1'"]),
        ("train.steps=5\nseed=3", ["train.steps must be a whole number"]),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override, parts):
    path = tmp_path / "run.toml"
    path.write_text('[data]\npath = "d"\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    for part in parts:
        assert part in str(caught.value)


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.toml: no such configuration file"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_config(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(ConfigError, match=r"Did you mean .*config\.toml"):
        load_config(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("[train]\nsteps = 5\nscheme = w1a1\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML: .*line 3"):
        load_config(bad)
    bad.write_bytes(b"a = \xff\n")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(bad)


def test_parts_built_in_python_are_checked_too():
    with pytest.raises(ConfigError, match=r"train\.steps must be at least 1"):
        TrainSection(steps=0)
    with pytest.raises(ConfigError, match=r"train must be TrainSection"):
        TrainConfig(train={"steps": 5})
    config = TrainConfig(data=DataSection(path="d"))
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        dataclasses.replace(config, seed="1")


def test_a_learned_activation_step_is_not_compiled():
    learned = Quantizer(granularity=PerTensor(), scale=Learned())
    scheme = str(Scheme(weight=Quantizer(), activation=learned))
    assert TrainConfig(scheme=scheme).scheme == scheme
    with pytest.raises(ConfigError, match=r"train\.compile = true does not go with a learned activation step"):
        TrainConfig(scheme=scheme, train=TrainSection(compile=True))


def test_the_shape_must_fit_the_data():
    def shape(**fields):
        return TrainConfig.from_dict({"model": fields}).model.llama_config(vocab_size=257, context=64)

    assert shape(preset="1M").num_hidden_layers == 4
    assert shape(preset="1M", num_hidden_layers=2, vocab_size=320).vocab_size == 320
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 256, but the prepared data has 257"):
        shape(preset="1M", vocab_size=256)
    with pytest.raises(ConfigError, match=r"model\.max_position_embeddings is 32, less than data\.context = 64"):
        shape(preset="1M", max_position_embeddings=32)
    with pytest.raises(ConfigError, match=r"set model\.preset, or also .*model\.num_hidden_layers"):
        shape(hidden_size=64)


def test_differing_keys_are_named_with_both_values():
    one = TrainConfig.from_dict({"train": {"steps": 5}, "model": {"preset": "1M"}})
    other = TrainConfig.from_dict({"train": {"steps": 6}, "model": {"qk_norm": True}})
    assert differing_keys(one, other) == [
        "model.preset: '1M', 'not set'",
        "train.steps: 5, 6",
        "model.qk_norm: 'not set', True",
    ]
    assert differing_keys(one, one) == []


def test_known_keys_cover_what_a_configuration_spells_out():
    config = TrainConfig.from_dict({"model": {"preset": "1M"}})
    flat = {f"{a}.{b}" for a, t in config.to_dict().items() if isinstance(t, dict) for b in t}
    assert flat <= set(known_keys())
