"""`verify` passes for what was trained and packed, and each of its checks fails, by name, for what was not."""

import dataclasses
import json

import pytest
import torch

import bitquest as bq
from bitquest.errors import CheckpointError, ConfigError, FormatError
from bitquest.evaluation.verify import verify
from bitquest.evaluation.verify_lockstep import Lockstep
from bitquest.evaluation.verify_report import Check, VerifyReport
from bitquest.export import load, read_tokenizer, save
from bitquest.models import Tokenizer
from bitquest.nn import PackedLinear, packed_linear, quantize_
from bitquest.training import load_run
from bitquest.training.checkpoint import list_steps

UP = "model.layers.1.mlp.up_proj"
SMALL = {"tokens": 200, "texts": 2, "new_tokens": 8}
CHECKS = ["description", "weights", "tensors", "layers", "activation codes", "greedy tokens", "perplexity"]


@pytest.fixture
def tamper(w1a1, tmp_path):
    """tamper(change): a copy of the packed model, changed and sealed with checksums that fit; gives the report."""

    def run(change, tokenizer=None, metadata=None, **options):
        model = load(w1a1 / "packed")
        change(model)
        tokenizer = read_tokenizer(w1a1 / "packed") if tokenizer is None else tokenizer
        save(model, tmp_path / "tampered", tokenizer, metadata or {"step": 12})
        return verify(w1a1 / "run", tmp_path / "tampered", **{**SMALL, **options})

    return run


def failed(report):
    assert not report.passed
    return {check.name: " | ".join(check.failures) for check in report.failed}


# --- what was trained and packed passes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "model"),
    [
        ("w1a1", {"num_key_value_heads": 1}),  # grouped queries: exact zeros at the first token of a window
        ("w8a8", {}),
        ("w4a4-2:4-h8", {"tie_word_embeddings": True}),
        ("w2a8-g32", {"qk_norm": True, "norm_before_o_proj": True, "norm_before_down_proj": True}),
        ("w16a4-fp4", {}),
        ("none", {}),
    ],
)
def test_a_packed_run_passes(trained_run, tmp_path, scheme, model):
    trained_run(tmp_path, scheme, **model)
    progress = []
    report = verify(tmp_path / "run", tmp_path / "packed", **SMALL, progress=lambda *now: progress.append(now))
    assert report.passed, failed(report)
    assert [check.name for check in report.checks] == CHECKS
    assert report.step == 12
    assert ("running both models", 200, 200) in progress
    figures = json.loads(json.dumps(report.to_json()))
    assert figures["passed"]
    by_name = {check["name"]: check["figures"] for check in figures["checks"]}
    assert by_name["greedy tokens"]["tokens"] >= 2
    assert by_name["perplexity"]["forced"] == pytest.approx(by_name["perplexity"]["trained"], rel=1e-6)
    if scheme != "none":
        assert by_name["weights"]["steps"] > 0 or scheme == "w16a4-fp4"
        assert by_name["layers"]["largest_error"] < 1e-6
        layers = 14 + 2 * scheme.endswith("h8")
        assert len(by_name["layers"]["by_layer"]) == layers
    if "a16" not in scheme and scheme != "none":
        inputs = 2 * (3 + 1 + 2) * 32 + 2 * 64
        assert by_name["activation codes"]["codes"] == 200 * inputs
        assert by_name["activation codes"]["flipped"] == 0


def test_other_text_and_another_checkpoint(w1a1, tmp_path):
    (tmp_path / "other.txt").write_text("something else entirely, " * 30)
    assert verify(w1a1 / "run", w1a1 / "packed", tmp_path / "other.txt", **SMALL).passed
    loaded = load_run(w1a1 / "run", 6)
    save(loaded.model, tmp_path / "early", loaded.tokenizer, {"step": 6})
    report = verify(w1a1 / "run", tmp_path / "early", **SMALL)
    assert report.passed
    assert report.step == 6
    wrong = failed(verify(w1a1 / "run", tmp_path / "early", **SMALL, step=12))
    assert {"weights", "tensors", "layers", "perplexity"} <= set(wrong)


# --- each check fails by itself ------------------------------------------------------------------------------------


def layer(model):
    return model.get_submodule(UP)


def change_code(model):
    codes = layer(model).codes
    codes[3, 5] = -1 - codes[3, 5]
    layer(model).codes = codes


def change_step(model):
    layer(model).step[2, 0] *= 1.01


def nudge_step(model):
    layer(model).step[2, 0] = torch.nextafter(layer(model).step[2, 0], torch.tensor(9.0))


def nudge_norm(model):
    weight = model.model.layers[1].input_layernorm.weight
    weight.data[7] = torch.nextafter(weight.data[7], torch.tensor(9.0))


def change_norm(model):
    model.model.layers[1].input_layernorm.weight.data[7] *= 1.5


def nudge_embedding(model):
    weight = model.model.embed_tokens.weight
    weight.data[100, 1] = torch.nextafter(weight.data[100, 1], torch.tensor(9.0))


def swap(model, **changes):
    old = layer(model)
    fields = {
        "weight": old.weight_spec,
        "activation": old.activation_spec,
        "rotation": old.rotation,
        "codes": old.codes,
        "step": old.step,
        **changes,
    }
    model.model.layers[1].mlp.up_proj = PackedLinear(old.in_features, old.out_features, **fields)


def test_one_changed_code(tamper):
    wrong = failed(tamper(change_code))
    assert f"{UP}: weight codes: 1 of 2048 differ, the first at [3, 5]" in wrong["weights"]
    assert f"{UP}: its output" in wrong["layers"]
    assert set(wrong) <= {"weights", "layers", "greedy tokens", "perplexity"}


def test_one_changed_step(tamper):
    wrong = failed(tamper(change_step))
    assert f"{UP}: steps: 1 of 64 differ, the first at [2, 0]" in wrong["weights"]
    assert f"{UP}: its output" in wrong["layers"]


def test_the_last_bit_of_one_step(tamper):
    assert list(failed(tamper(nudge_step))) == ["weights"]


def test_one_changed_norm_weight(tamper):
    wrong = failed(tamper(change_norm))
    assert "model.layers.1.input_layernorm.weight: 1 of 32 differ, the first at [7]" in wrong["tensors"]
    for name in ("q_proj", "k_proj", "v_proj"):
        assert f"model.layers.1.self_attn.{name}: what arrives here" in wrong["layers"]
    assert "its output" not in wrong["layers"]  # the layers themselves are sound
    assert "weights" not in wrong


@pytest.mark.parametrize(
    ("change", "name"), [(nudge_norm, "layers.1.input_layernorm.weight"), (nudge_embedding, "embed_tokens.weight")]
)
def test_the_last_bit_of_another_tensor(tamper, change, name):
    wrong = failed(tamper(change))
    assert list(wrong) == ["tensors"]
    assert name in wrong["tensors"]


@pytest.mark.parametrize("rotation", [bq.NoRotation(), bq.BlockHadamard(16)])
def test_a_wrong_rotation(tamper, rotation):
    wrong = failed(tamper(lambda model: swap(model, rotation=rotation)))
    assert f"{UP}: rotation: trained BlockHadamard(block_size=32), packed {rotation}" in wrong["description"]
    assert f"{UP}: its output" in wrong["layers"]
    assert UP in wrong["activation codes"]
    assert "weights" not in wrong


def test_wrong_activation_bits(tamper):
    wrong = failed(tamper(lambda model: swap(model, activation=bq.Quantizer(bq.UniformGrid(2)))))
    assert f"{UP}: activation: trained" in wrong["description"]
    assert f"{UP}: its output" in wrong["layers"]
    assert UP in wrong["activation codes"]


def test_unquantized_activations(tamper):
    wrong = failed(tamper(lambda model: swap(model, activation=None)))
    assert {"description", "layers", "activation codes"} <= set(wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_numbers_beyond_all_bounds(tamper, value):
    def change(model):
        model.lm_head.weight.data[3, 1] = value

    report = tamper(change)
    wrong = failed(report)
    assert "lm_head.weight: 1 of" in wrong["tensors"]
    assert "logits: off by" in wrong["layers"]
    assert "as it runs" in wrong["perplexity"]
    json.loads(json.dumps(report.to_json(), allow_nan=False))


def test_a_changed_mask(trained_run, tmp_path):
    trained_run(tmp_path, "w4a4-2:4")
    model = load(tmp_path / "packed")
    twin = model.get_submodule(UP)
    kept = twin.kept[0, :4].clone()
    codes = twin.codes
    twin.kept[0, :4], codes[0, :4] = ~kept, torch.where(kept, 0, 3).to(torch.int8)
    twin.codes = codes
    save(model, tmp_path / "changed", read_tokenizer(tmp_path / "packed"), {"step": 12})
    wrong = failed(verify(tmp_path / "run", tmp_path / "changed", **SMALL))
    assert f"{UP}: kept mask: 4 of 2048 differ, the first at [0, 0]" in wrong["weights"]
    assert f"{UP}: weight codes" in wrong["weights"]


def test_another_tokenizer(tamper, w1a1, tmp_path):
    other = Tokenizer.train_bpe(["abc"], 257)
    assert list(failed(tamper(lambda model: None, tokenizer=other))) == ["description"]
    save(load(w1a1 / "packed"), tmp_path / "mute", None, {"step": 12})
    assert "no tokenizer" in failed(verify(w1a1 / "run", tmp_path / "mute", **SMALL))["description"]


def test_another_configuration_is_not_run(tamper):
    def change(model):
        model.config = dataclasses.replace(model.config, rms_norm_eps=1e-3)

    report = tamper(change)
    assert "rms_norm_eps: trained 1e-05, packed 0.001" in failed(report)["description"]
    assert [check.passed for check in report.checks] == [False, True, True, None, None, None, None]
    assert not report.passed


def test_another_model(w1a1, w2a16, tmp_path):
    wrong = failed(verify(w1a1 / "run", w2a16 / "packed", **SMALL))
    assert "q_proj: weight: trained" in wrong["description"]
    assert {"weights", "tensors", "layers", "activation codes", "perplexity"} <= set(wrong)
    model = load(w1a1 / "packed")
    model.model.layers = model.model.layers[:1]
    model.config = dataclasses.replace(model.config, num_hidden_layers=1)
    save(model, tmp_path / "short", read_tokenizer(w1a1 / "packed"))
    report = verify(w1a1 / "run", tmp_path / "short", **SMALL)
    assert "model.layers.1.self_attn.q_proj: quantized in training, not packed" in failed(report)["description"]
    assert report.check("layers").passed is None


def test_a_layer_that_computes_something_else(w1a1, monkeypatch):
    right = packed_linear.packed_linear

    def off_by(relative):
        return lambda *operands: right(*operands) * (1 + relative)

    monkeypatch.setattr(packed_linear, "packed_linear", off_by(1e-6))
    assert verify(w1a1 / "run", w1a1 / "packed", **SMALL).passed
    monkeypatch.setattr(packed_linear, "packed_linear", off_by(3e-5))
    report = verify(w1a1 / "run", w1a1 / "packed", **SMALL)
    assert "its output for the trained layer's input is off by 3.00e-05" in failed(report)["layers"]
    assert report.check("weights").passed
    assert report.check("activation codes").passed


def test_something_else_between_the_layers(w1a1):
    run, packed = load_run(w1a1 / "run"), load(w1a1 / "packed")
    packed.model.layers[1].post_attention_layernorm.eps = 0.1
    lockstep = Lockstep(run.model, packed)
    lockstep.run(torch.arange(30).reshape(1, 30))
    off = {name for name, figures in lockstep.layers.items() if figures.input.relative > 1e-5}
    assert off == {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"}
    assert all(figures.output.relative < 1e-6 for figures in lockstep.layers.values())


# --- mistakes and the report ---------------------------------------------------------------------------------------


def test_mistakes(w1a1, tmp_path):
    run, packed = w1a1 / "run", w1a1 / "packed"
    with pytest.raises(FormatError, match="no such directory"):
        verify(run, tmp_path / "nothing")
    with pytest.raises(FormatError, match="is a run directory"):
        verify(run, run)
    with pytest.raises(CheckpointError, match="packed model"):
        verify(packed, packed)
    with pytest.raises(ConfigError, match="at least one"):
        verify(run, packed, tokens=0)
    with pytest.raises(CheckpointError, match="99"):
        verify(run, packed, step=99)
    for device in ("cuda:99", "gpu"):
        with pytest.raises(ConfigError, match=f"'{device}' cannot be used here: .*Take cpu"):
            verify(run, packed, device=device)
    save(quantize_(torch.nn.Sequential(torch.nn.Linear(4, 4)), "w4a4"), tmp_path / "layers")
    with pytest.raises(FormatError, match="pass it"):
        verify(run, tmp_path / "layers")


def test_a_checkpoint_that_was_not_kept(trained_run, tmp_path):
    trained_run(tmp_path, "w4a4")
    (step,) = list_steps(tmp_path / "run")[-1:]
    for other in list_steps(tmp_path / "run"):
        (tmp_path / f"run/checkpoints/step-{other}").rename(tmp_path / f"run/checkpoints/step-{other + 100}")
    with pytest.raises(
        CheckpointError, match=f"packed from step {step}, and .* has checkpoints of .*{step + 100} only"
    ):
        verify(tmp_path / "run", tmp_path / "packed")


def test_data_that_moved(trained_run, tmp_path):
    trained_run(tmp_path, "w4a4")
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="--data"):
        verify(tmp_path / "run", tmp_path / "packed", **SMALL)
    assert verify(tmp_path / "run", tmp_path / "packed", tmp_path / "moved", **SMALL).passed


def test_long_lists_of_failures_are_cut():
    check = Check.of("x", "", [f"layer {i}" for i in range(40)])
    assert len(check.failures) == 6
    assert check.failures[-1] == "and 35 more"
    assert not VerifyReport("run", "packed", 1, (Check.of("y", "", []), Check.not_run("x"))).passed
