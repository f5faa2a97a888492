"""Loss curves: who is compared with whom, and when there is a verdict."""

import pytest

from bitquest.benchmarks.loss_curves import CurveSettings, compare_curves, losses, verdict
from bitquest.errors import ConfigError
from bitquest.training import prepare
from bitquest.training.data import open_tokens

SMALL = CurveSettings("1M", steps=3, batch=2, context=8, seeds=2, repeats=2, last=2, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("one and two and three are six.\n" * 100)
    prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    return folder / "data"


def _curves(fused, references, *others):
    def named(path, ends):
        return {f"{path}{f', nudge {i}' if i else ''}": [9.0, end, end] for i, end in enumerate(ends)}

    others = {f"reference, seed {s}": [9.0, end, end] for s, end in enumerate(others, 1)}
    return named("fused", fused) | named("reference", references) | others


@pytest.mark.parametrize(
    ("fused", "agree"),
    [((1.0, 1.1, 1.2), True), ((1.1, 1.2, 1.3), True), ((0.5, 0.6, 0.7), False), ((2, 2, 2.1), False)],
)
def test_paths_disagree_where_chance_cannot_explain_it(fused, agree):
    found = verdict(_curves(fused, (1.0, 1.1, 1.2), 5.0), SMALL)
    assert found["agree"] is agree
    assert found["difference"] == pytest.approx(sum(fused) / 3 - 1.1)
    assert found["interval"][0] < found["difference"] < found["interval"][1]
    assert found["reference_range"] == [1.0, 5.0]  # another seed is shown and decides nothing


def test_without_two_runs_of_each_path_there_is_no_verdict(data):
    assert verdict(_curves((1.0,), (1.0, 2.0)), SMALL)["agree"] is None
    assert verdict(_curves((1.0, 2.0), (1.0,), 1.1, 1.2), SMALL)["agree"] is None
    result = compare_curves(data, SMALL, "torch", budget=1e-9)
    assert result["agree"] is None
    assert result["skipped"] == ["fused", "reference", "fused, nudge 1", "reference, nudge 1", "reference, seed 1"]


def test_a_nudge_changes_the_start_by_what_rounding_does(data):
    tokens = open_tokens(data)
    plain, nudged, again = (losses(tokens, SMALL, "torch", 0, nudge) for nudge in (0, 1, 1))
    assert nudged == again != plain
    assert nudged[0] == pytest.approx(plain[0], abs=0.01)  # a flipped code or two


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
    with pytest.raises(ConfigError, match="two or more repeats"):
        CurveSettings(repeats=1)
    with pytest.raises(ConfigError, match="takes a seed"):
        CurveSettings(seeds=0)
