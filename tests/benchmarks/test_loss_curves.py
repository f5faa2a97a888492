"""Loss curves: who is compared with whom, and when there is a verdict."""

import pytest

from bitquest.benchmarks.loss_curves import CurveSettings, compare_curves, losses, verdict
from bitquest.errors import ConfigError
from bitquest.training import prepare
from bitquest.training.data import open_tokens

SMALL = CurveSettings("1M", steps=3, batch=2, context=8, seeds=2, last=2, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("one and two and three are six.\n" * 100)
    prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    return folder / "data"


def _curves(fused, *references):
    return {"fused": [9.0, *fused]} | {f"reference, seed {s}": [9.0, *curve] for s, curve in enumerate(references)}


@pytest.mark.parametrize(
    ("fused", "within", "between"),
    [
        ((1.0, 2.0), True, True),
        ((2.0, 2.4), True, True),
        ((0.5, 1.5), True, False),
        ((2.0, 2.6), False, False),
        ((0.5, 0.9), False, False),
    ],
)
def test_the_mean_of_the_last_losses_lies_within_the_spread(fused, within, between):
    found = verdict(_curves(fused, (1.0, 2.0), (2.0, 2.5)), SMALL)
    assert (found["within_spread"], found["between_references"]) == (within, between)
    assert found["reference_spread"] == [1.5, 2.25]
    assert found["fused_minus_reference"] == pytest.approx(sum(fused) / 2 - 1.5)


def test_without_every_run_there_is_no_verdict(data):
    found = verdict(_curves((1.0, 2.0), (1.0, 2.0)), SMALL)
    assert found["within_spread"] is None
    result = compare_curves(data, SMALL, "torch", budget=1e-9)
    assert result["within_spread"] is None
    assert result["skipped"] == ["fused", "reference, seed 0", "reference, seed 1"]


def test_a_run_is_the_same_again_and_another_from_another_seed(data):
    tokens = open_tokens(data)
    first = losses(tokens, SMALL, "torch", 0)
    assert losses(tokens, SMALL, "torch", 0) == first
    assert losses(tokens, SMALL, "torch", 1) != first
    assert len(first) == 3
    assert 5 < first[0] < 6.5  # about ln 257


def test_settings_that_make_no_sense():
    with pytest.raises(ConfigError, match="needs as many steps"):
        CurveSettings(steps=10)
    with pytest.raises(ConfigError, match="two or more reference seeds"):
        CurveSettings(seeds=1)
