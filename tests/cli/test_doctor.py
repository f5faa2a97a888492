"""`bitquest doctor` as a user meets it."""

import importlib.util

import pytest

from bitquest.cli import doctor
from bitquest.nn import PackedLinear


def test_what_it_finds(bitquest):
    result, said = bitquest("doctor", "--json")
    assert said == ""
    assert (result["bitquest"], result["command"]) == (1, "doctor")
    assert result["version"].startswith("0.")
    assert result["self_test"]["passed"]
    assert result["self_test"]["largest_relative_difference"] <= 1e-5
    assert {"cpu", "cores", "threads", "torch", "python"} <= set(result["hardware"])
    available = [backend["name"] for backend in result["backends"] if backend["available"]]
    assert available in (["native", "torch"], ["torch"])
    _, said = bitquest("doctor")
    assert "passed" in said
    assert result["hardware"]["torch"] in said


def test_extras_that_are_missing_say_how_to_install_them(bitquest, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    result, _ = bitquest("doctor", "--json")
    (wandb,) = (extra for extra in result["extras"] if extra["package"] == "wandb")
    assert wandb == {
        "package": "wandb",
        "installed": False,
        "for": "logging to Weights & Biases",
        "install": "pip install 'bitquest[wandb]'",
    }
    _, said = bitquest("doctor")
    assert "pip install 'bitquest[wandb]'" in said


def test_every_extra_it_names_is_one(request):
    import tomllib

    declared = tomllib.loads((request.config.rootpath / "pyproject.toml").read_text())["project"]
    for package, extra, _ in doctor.EXTRAS:
        assert any(entry.startswith(package) for entry in declared["optional-dependencies"][extra]), package


def test_wrong_numbers_are_a_failure(bitquest, monkeypatch):
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * 1.001)
    result, _ = bitquest("doctor", "--json", code=1)
    assert not result["self_test"]["passed"]
    assert result["self_test"]["failed"]
    _, said = bitquest("doctor", code=1)
    assert "FAILED" in said
    assert "this installation computes wrong numbers" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_fail_too(monkeypatch, value):
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x) * value)
    assert not doctor._self_test()["passed"]
