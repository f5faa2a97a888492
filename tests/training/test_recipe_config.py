"""[recipe]: what it takes and refuses, and how a named recipe and the keys of a file combine."""

import tomllib

import pytest

from bitquest.errors import ConfigError
from bitquest.training import TrainConfig, load_config
from bitquest.training.recipe_config import RECIPES, RecipeSection


def test_the_default_is_the_papers_recipe_and_writes_its_name_alone():
    config = TrainConfig()
    assert config.recipe == RecipeSection(name="quest")
    assert config.to_dict()["recipe"] == {"name": "quest"}
    assert RECIPES["quest"] == {}


def test_points_read_back_equal():
    config = TrainConfig.from_dict({"recipe": {"activation_bits": [[0, 8], [0.5, 1]], "weight_clip": [[0.0, 1.5]]}})
    assert config.recipe.activation_bits == ((0.0, 8.0), (0.5, 1.0))
    assert TrainConfig.from_dict(tomllib.loads(config.to_toml())) == config
    overridden = load_config(None, ["data.path=d", "recipe.activation_bits=[[0, 4], [0.25, 1]]"])
    assert overridden.recipe.activation_bits == ((0.0, 4.0), (0.25, 1.0))


def test_keys_beat_the_name_and_the_name_beats_the_defaults(monkeypatch):
    monkeypatch.setitem(RECIPES, "trial", {"recipe.cage": 10.0, "recipe.row_gain": True, "schedule.final": 0.0})
    tables = {"recipe": {"name": "trial", "cage": 0.0}}
    config = TrainConfig.from_dict(tables)
    assert (config.recipe.cage, config.recipe.row_gain, config.schedule.final) == (0.0, True, 0.0)
    assert config.to_dict()["recipe"] == {"name": "trial", "cage": 0.0}
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(tables | {"schedule": {"final": 0.5}}).schedule.final == 0.5
    assert load_config(None, ["data.path=d", "recipe.name=trial"]).recipe.cage == 10.0


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"recipe": {"name": "quests"}}, r"recipe\.name must be one of quest, got 'quests' \(did you mean 'quest'\?\)"),
        ({"recipe": {"optimizer": "moun"}}, r"recipe\.optimizer must be one of adamw, muon, soap.*'muon'"),
        ({"recipe": {"cages": 1}}, r"recipe\.cages is not a configuration key \(did you mean 'recipe\.cage'\?\)"),
        ({"recipe": {"activation_bits": [8, 1]}}, r"recipe\.activation_bits must be pairs of a share of the run"),
        ({"recipe": {"activation_bits": [[0.1, 8], [0.5, 1]]}}, r"shares of the run that begin at 0"),
        ({"recipe": {"activation_bits": [[0, 8], [0.5, 4], [0.5, 1]]}}, r"shares of the run that begin at 0 and rise"),
        ({"recipe": {"activation_bits": [[0, 9], [0.5, 1]]}}, r"widths of 1 to 8 bits, or 16 for none, not 9"),
        ({"recipe": {"activation_bits": [[0, 8], [0.5, 2]]}}, r"ends at 2 bits, but scheme = 'w1a1' has 1"),
        ({"recipe": {"weight_clip": [[0, 1]]}, "scheme": "w1a1-norot-lsq"}, r"does not go with the learned step"),
        ({"recipe": {"weight_bits": [[0, 8], [1, 4]]}, "scheme": "w4a4-fp4"}, r"is of uniform grids"),
        ({"recipe": {"activation_clip": [[0, 0]]}}, r"recipe\.activation_clip must be above 0"),
        ({"recipe": {"weight_clip": [[0, 1]]}, "train": {"compile": True}}, r"train\.compile = true does not go with"),
        ({"recipe": {"row_gain": True}, "train": {"compile": True}}, r"train\.compile = true does not go with"),
        ({"recipe": {"freeze": 0.1}, "scheme": "w4a4-2:4"}, r"recipe\.freeze is of dense weights"),
        ({"recipe": {"freeze": 0.1, "weight_bits": [[0, 8], [0.5, 1]]}}, r"recipe\.freeze does not go with"),
    ],
)
def test_what_is_wrong_is_refused_by_key(tables, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(tables)


@pytest.mark.parametrize("scheme", ["none", "w4a16", "w16a4", "w2a2"])
def test_one_recipe_serves_all_schemes(scheme):
    points = [[0, 8], [0.5, 1]]
    TrainConfig.from_dict({"scheme": scheme, "recipe": {"activation_bits": points, "cage": 10.0, "freeze": 0.1}})
    TrainConfig.from_dict({"scheme": scheme, "recipe": {"weight_bits": points, "weight_clip": [[0, 2]]}})
