"""Codes that rounding flips: found, measured, told from their effects, and excused only for what they caused."""

import pytest
import torch

import bitquest as bq
from bitquest.evaluation import verify_greedy
from bitquest.evaluation.verify import _flipped_tolerance, verify
from bitquest.evaluation.verify_greedy import Divergence
from bitquest.evaluation.verify_lockstep import Lockstep, Root, threshold_distances, weights_quantized_once
from bitquest.evaluation.verify_static import trained_layers
from bitquest.export import load
from bitquest.nn import PackedLinear
from bitquest.numerics.packing import pack, unpack
from bitquest.ops.rows import QuantizedRows
from bitquest.training import load_run

SMALL = {"tokens": 200, "texts": 2, "new_tokens": 8}


def failed(report):
    assert not report.passed
    return {check.name: " | ".join(check.failures) for check in report.failed}


@pytest.fixture
def rounding_backend(monkeypatch):
    """rounding_backend(reach): 1-bit codes of values nearer than reach·Δ to zero come out the other way."""
    right = PackedLinear._quantized

    def install(reach):
        def quantized(self, x, *how):
            made = right(self, x, *how)
            near = (self.rotation.apply(x) / made.step).abs() < reach
            return flipped(made, near)

        monkeypatch.setattr(PackedLinear, "_quantized", quantized)

    return install


def flipped(rows, where):
    """1-bit rows whose codes are the other ones where asked."""
    codes = unpack(rows.packed, 1, where.shape[-1]) if rows.packed is not None else rows.factors // 2
    codes = torch.where(where, -1 - codes, codes)
    return QuantizedRows(codes * 2 + 1, pack(codes, 1), rows.step, None, None)


def test_flips_at_the_threshold_are_counted_and_pass(w1a1, rounding_backend):
    rounding_backend(9e-6)
    report = verify(w1a1 / "run", w1a1 / "packed", **{**SMALL, "tokens": 1500})
    assert report.passed, failed(report)
    figures = report.check("activation codes").figures
    assert figures["flipped"] > 0
    assert 0 < figures["farthest"] <= 1e-5
    assert report.check("perplexity").figures["free_flipped"] > 0


def test_flips_away_from_the_threshold_fail(w1a1, rounding_backend):
    rounding_backend(1e-3)
    report = verify(w1a1 / "run", w1a1 / "packed", **SMALL)
    wrong = failed(report)
    assert "·Δ from its threshold, 1e-05 is allowed" in wrong["activation codes"]
    assert "layers" not in wrong  # the sums are right for the codes they are given
    assert report.check("activation codes").figures["farthest"] == pytest.approx(1e-3, rel=0.3)


def test_greedy_texts_that_part_at_a_flip_are_explained(w1a1, rounding_backend):
    rounding_backend(0.2)
    run, packed = load_run(w1a1 / "run"), load(w1a1 / "packed")
    check = verify_greedy.check_greedy(run.model, packed, [[256, 104, 101], [97, 98]], 20)
    assert check.passed
    assert check.figures["explained"]
    assert "caused by the flip in model.layers.0.self_attn.q_proj at position 0" in check.summary


def test_greedy_texts_that_part_without_a_flip_fail(w1a1):
    run, packed = load_run(w1a1 / "run"), load(w1a1 / "packed")
    packed.lm_head.weight.data = packed.lm_head.weight.data.roll(1, 0)
    check = verify_greedy.check_greedy(run.model, packed, [[256, 104, 101]], 5)
    assert not check.passed
    assert "no activation code flipped before it" in check.failures[0]


def test_a_flip_does_not_excuse_what_it_did_not_cause(w1a1, rounding_backend):
    rounding_backend(0.2)
    run, packed = load_run(w1a1 / "run"), load(w1a1 / "packed")
    packed.lm_head.weight.data = packed.lm_head.weight.data.roll(1, 0)
    check = verify_greedy.check_greedy(run.model, packed, [[256, 104, 101]], 5)
    assert not check.passed
    assert "with the trained codes forced it is still" in check.failures[0]


def test_effects_of_a_flip_are_no_roots(w1a1, monkeypatch):
    first = "model.layers.0.self_attn.o_proj"
    run, packed = load_run(w1a1 / "run"), load(w1a1 / "packed")
    layer = packed.get_submodule(first)
    right = layer._quantized

    def quantized(x, *how):
        where = torch.zeros(x.shape, dtype=torch.bool)
        where[7, 3:] = True
        return flipped(right(x, *how), where)

    layer._quantized = quantized
    lockstep = Lockstep(run.model, packed)
    lockstep.run(torch.arange(60, 90).reshape(1, 30))
    assert [(root.layer, root.token, root.channel) for root in lockstep.roots] == [(first, 7, 3)]
    assert lockstep.layers[first].flips.flipped == lockstep.layers[first].free == 29
    assert lockstep.layers["model.layers.1.self_attn.q_proj"].free > 0
    assert all(figures.output.relative < 1e-6 for figures in lockstep.layers.values())


def test_without_a_flip_nothing_is_explained():
    root = Root("layer", 3, 1, 1e-7)
    assert Divergence(0, 5, trained=1, packed=2, forced=1, root=root).is_explained
    assert not Divergence(0, 5, trained=1, packed=2, forced=1, root=None).is_explained
    assert not Divergence(0, 5, trained=1, packed=2, forced=2, root=root).is_explained


def test_weights_are_quantized_once_and_only_inside(w1a1):
    model = load_run(w1a1 / "run").model
    ids = torch.arange(60, 80).reshape(1, 20)
    before = [layer.weight_quantizer for layer in trained_layers(model).values()]
    with torch.no_grad():
        expected = model(ids)
        with weights_quantized_once(model):
            assert torch.equal(model(ids), expected)
            model.model.layers[0].mlp.up_proj.weight.mul_(-1)
            assert torch.equal(model(ids), expected)
        assert [layer.weight_quantizer for layer in trained_layers(model).values()] == before
        assert not torch.equal(model(ids), expected)


def test_distances_to_thresholds():
    def distances(values, one, other, grid):
        tensors = (torch.tensor(v) for v in (values, one, other))
        return threshold_distances(*tensors, grid).tolist()

    assert distances([0.01, -2.3], [0, -3], [-1, -2], bq.UniformGrid(3)) == pytest.approx([0.01, 0.3], abs=1e-6)
    assert distances([0.3], [0], [2], bq.UniformGrid(3)) == pytest.approx(
        [1.7]
    )  # two thresholds lie between: the farther
    levels = bq.CodebookGrid("odd", (-1.0, 0.0, 3.0))
    assert distances([1.4, 1.4], [0, -1], [-1, 0], levels) == pytest.approx([0.1, 0.1])


def test_many_flips_may_add_up_to_their_standard_error_and_no_more():
    """Grouped-query models flip in every window's first position; 1 % of 2000 tokens is soon reached by chance."""
    either_way = torch.tensor([4.0, -4.0] * 50, dtype=torch.float64)
    assert _flipped_tolerance(either_way, 2000) == pytest.approx(4 * 40 / 2000)
    assert _flipped_tolerance(either_way / 10, 2000) == 1e-2
    assert _flipped_tolerance(either_way[:31], 2000) == 1e-2  # too few to tell
    assert _flipped_tolerance(either_way * 10, 2000) == 0.1
    assert _flipped_tolerance(either_way[:3], 100) == 0.1
    one_way = torch.full((100,), 1.0, dtype=torch.float64)
    assert float(one_way.sum()) / 2000 > _flipped_tolerance(one_way, 2000)


@pytest.mark.parametrize(("name", "factor"), [("w1a1", 1.5), ("w2a16", 1.001)])
def test_perplexities_that_differ(w1a1, w2a16, monkeypatch, name, factor):
    """Without flips to blame, far less is allowed."""
    right = Lockstep.run

    def run(self, tokens, caches=None):
        trained, forced, free = right(self, tokens, caches)
        return trained, forced, free * factor

    monkeypatch.setattr(Lockstep, "run", run)
    folder = {"w1a1": w1a1, "w2a16": w2a16}[name]
    wrong = failed(verify(folder / "run", folder / "packed", **{**SMALL, "tokens": 1500}))
    assert list(wrong) == ["perplexity"]
    assert "as it runs" in wrong["perplexity"]
    assert "forced" not in wrong["perplexity"]
