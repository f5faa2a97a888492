"""Each part of a recipe by its formula on a small model, and the model a run with parts publishes."""

import copy
import dataclasses

import pytest
import torch

from bitquest.errors import CheckpointError, ConfigError
from bitquest.models import Llama, LlamaConfig
from bitquest.nn import QuantizedLinear, Scheme, pack_, quantize_
from bitquest.numerics import Clip, PerTensor, Quantizer
from bitquest.numerics.fake_quant import fake_quantize
from bitquest.training import TrainConfig, load_run, open_tokens, train
from bitquest.training.evaluate import held_out_loss
from bitquest.training.loggers import read_metrics
from bitquest.training.recipe import Recipe
from bitquest.training.recipe_cage import cage_strength, quantization_error
from bitquest.training.recipe_config import RecipeSection
from bitquest.training.recipe_distill import Distillation
from bitquest.training.recipe_freeze import Freeze
from bitquest.training.recipe_gain import RowGain
from bitquest.training.recipe_widths import ratio_at, width_at

SHAPE = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16,
)  # fmt: skip
O_PROJ = "model.layers.0.self_attn.o_proj"


def model_of(scheme, seed=0):
    return quantize_(Llama(SHAPE).init_weights(seed), scheme).train()


def recipe_of(model, scheme="w1a1", steps=10, **keys):
    tables = {"scheme": scheme, "optimizer": {"lr": 1e-2}, "recipe": keys, "train": {"steps": steps}}
    return Recipe(model, TrainConfig.from_dict(tables))


def tokens(seed=0):
    return torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(seed))


def take_step(recipe, step, lr=1e-2):
    recipe.before_step(step)
    recipe.model(tokens(step)).square().mean().backward()
    for group in recipe.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    recipe.before_update(step, lr)
    recipe.optimizer.step()
    recipe.optimizer.zero_grad()
    recipe.after_step(step)


# --- CAGE -----------------------------------------------------------------------------------------------------------


def test_cage_rises_linearly_from_its_share_on():
    section = RecipeSection(cage=10.0, cage_from=0.8)
    assert [cage_strength(section, step, 100) for step in (1, 80, 90, 100)] == pytest.approx([0, 0, 5, 10])


@pytest.mark.parametrize("scheme", ["w1a1", "w2a16", "w4a4-norot", "w4a4-2:4"])
def test_the_quantization_error_is_of_the_weights_own_space(scheme):
    layer = model_of(scheme).get_submodule(O_PROJ)
    w, block = layer.weight.detach(), layer.rotation.block
    h = torch.ones(1, 1)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    h = torch.block_diag(*[h / block**0.5] * (32 // block))
    rounded = fake_quantize(w, layer.weight_quantizer.spec, layer.rotation)
    torch.testing.assert_close(quantization_error(layer), w - rounded @ h.t())


def test_cage_pulls_by_rate_scale_and_strength():
    model = model_of("w1a1")
    recipe = recipe_of(model, cage=10.0, cage_from=0.0, matrix_lr=2.0)
    layer = model.get_submodule(O_PROJ)
    expected = layer.weight.detach() - 0.01 * 2.0 * 5.0 * quantization_error(layer)
    before = model.lm_head.weight.clone()
    recipe.before_update(5, 0.01)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert torch.equal(model.lm_head.weight, before)


# --- averaging ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_published_weights_are_the_average_of_the_last_steps(decay):
    model = model_of("w1a1")
    recipe = recipe_of(model, average_from=0.6, average_decay=decay)
    seen = []
    for step in range(1, 11):
        take_step(recipe, step)
        if step > 6:
            seen.append(model.get_submodule(O_PROJ).weight.detach().clone())
    raw = copy.deepcopy(model.state_dict())
    weights = torch.tensor([1.0, 1, 1, 1] if not decay else [decay**3, decay**2, decay, 1.0])
    expected = sum(w * x for w, x in zip(weights / weights.sum(), seen, strict=True))
    with recipe.published() as published:
        torch.testing.assert_close(published[f"{O_PROJ}.weight"], expected)
        assert not torch.equal(published["lm_head.weight"], raw["lm_head.weight"])
    assert all(torch.equal(tensor, raw[name]) for name, tensor in model.state_dict().items())


def test_before_its_share_the_published_model_is_the_one_in_training():
    recipe = recipe_of(model_of("w1a1"), average_from=0.6)
    take_step(recipe, 1)
    with recipe.published() as published:
        assert all(torch.equal(published[name], p) for name, p in recipe.model.named_parameters())


# --- widths and clip ratios -----------------------------------------------------------------------------------------


def test_widths_are_steps_and_ratios_lines():
    bits = ((0.0, 8.0), (0.3, 4.0), (0.6, 1.0))
    assert [width_at(bits, share) for share in (0, 0.29, 0.3, 0.6, 1)] == [8, 8, 4, 1, 1]
    assert width_at((), 0.5) is None
    ratios = ((0.0, 2.0), (0.5, 1.0))
    assert [ratio_at(ratios, share) for share in (0, 0.25, 0.5, 1)] == [2.0, 1.5, 1.0, 1.0]
    assert ratio_at((), 0.5) is None


@pytest.mark.parametrize(("step", "scheme"), [(1, "w1a16"), (4, "w1a4"), (6, "w1a1"), (10, "w1a1")])
def test_layers_compute_what_the_width_of_the_step_computes(step, scheme):
    model = model_of("w1a1")
    recipe = recipe_of(model, activation_bits=[[0, 16], [0.2, 4], [0.5, 1]])
    recipe.before_step(step)
    other = model_of(scheme)
    torch.testing.assert_close(model(tokens()), other(tokens()))
    layer = model.get_submodule(O_PROJ)
    assert layer.activation_quantizer.spec == other.get_submodule(O_PROJ).activation_quantizer.spec
    assert layer.weight_quantizer.spec == other.get_submodule(O_PROJ).weight_quantizer.spec


def test_widths_are_never_less_than_the_schemes():
    model = model_of("w2a2")
    recipe_of(model, "w2a2", activation_bits=[[0, 4], [0.5, 1]]).before_step(10)
    assert model.get_submodule(O_PROJ).activation_quantizer.spec == Scheme.parse("w2a2").activation


def test_clip_ratios_change_gradients_and_not_values():
    model = model_of("w1a1")
    before = model(tokens())
    recipe = recipe_of(model, weight_clip=[[0, 3.0], [1.0, 1.0]], activation_clip=[[0, 2.0]])
    recipe.before_step(6)
    layer = model.get_submodule(O_PROJ)
    assert layer.weight_quantizer.spec.estimator == Clip(2.0)
    assert layer.activation_quantizer.spec.estimator == Clip(2.0)
    assert torch.equal(model(tokens()), before)


# --- gains, rows, residual layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["none", "w1a1", "w2a2-norot", "w4a4-2:4", "w2a8-g32"])
def test_gains_fold_into_a_plain_model(scheme):
    model = model_of(scheme)
    recipe = recipe_of(model, scheme, row_gain=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("row_gain"):
            parameter.data.uniform_(-2, 2, generator=generator)
    expected = model(tokens()).detach()
    with recipe.published() as published:
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-5)
        plain = model_of(scheme, seed=1)
        plain.load_state_dict(published)
    torch.testing.assert_close(plain(tokens()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(tokens()), expected)


def test_gains_get_the_gradient_of_the_scale_and_a_place_in_the_optimizer():
    layer = torch.nn.Linear(32, 4, bias=True)
    RowGain(torch.nn.Sequential(layer))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(layer.row_gain.grad, y.detach().sum(0))
    recipe = recipe_of(model_of("w1a1"), row_gain=True)
    group = next(g for g in recipe.optimizer.param_groups if g["weight_decay"] == 0)
    gain = recipe.model.get_submodule(O_PROJ).row_gain
    assert any(p is gain for p in group["params"])


def test_gains_refuse_scales_that_are_not_a_rows_own():
    scheme = Scheme(weight=Quantizer(granularity=PerTensor()))
    with pytest.raises(ConfigError, match=r"recipe\.row_gain needs weight steps that are computed row by row"):
        RowGain(quantize_(torch.nn.Sequential(torch.nn.Linear(32, 4)), scheme))


def test_rows_keep_their_norms_and_the_head_does_not():
    model = model_of("w1a1")
    before = {
        name: layer.weight.detach().norm(dim=1) for name, layer in model.named_modules() if hasattr(layer, "bias")
    }
    recipe = recipe_of(model, row_norm=True)
    for step in range(1, 4):
        take_step(recipe, step)
    for name, norms in before.items():
        now = model.get_submodule(name).weight.detach().norm(dim=1)
        assert torch.allclose(now, norms, rtol=1e-5) == (name != "lm_head"), name


def test_residual_layers_begin_smaller():
    plain, model = model_of("w1a1"), model_of("w1a1")
    recipe_of(model, residual_init=0.5)
    for name, parameter in plain.named_parameters():
        factor = 0.5 if name.split(".")[-2] in ("o_proj", "down_proj") else 1.0
        assert torch.equal(model.get_parameter(name), parameter * factor), name


def test_norms_before_residual_layers_begin_at_their_weight():
    shape = dataclasses.replace(SHAPE, norm_before_o_proj=True, norm_before_down_proj=True)
    model = quantize_(Llama(shape).init_weights(0), "w1a1")
    recipe_of(model, residual_norm_init=0.25)
    norms = {name: set(p.tolist()) for name, p in model.named_parameters() if p.ndim == 1}
    assert norms == {name: {0.25} if ".o_norm." in name or ".down_norm." in name else {1.0} for name in norms}
    assert {0.25} in norms.values()


# --- freezing -------------------------------------------------------------------------------------------------------


def test_a_weight_that_flips_to_and_fro_is_frozen_where_it_mostly_was():
    torch.manual_seed(0)
    model = quantize_(torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False)), "w1a1-norot")
    layer = model[0]
    section = RecipeSection(freeze=0.1, freeze_from=0.0, freeze_momentum=0.1)
    freeze = Freeze(model, section, 100)
    signs = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1]])
    for step in range(1, 12):
        weight = 0.1 * signs
        weight[0, 0] *= -1 if step % 3 == 0 else 1  # two steps in three positive
        with torch.no_grad():
            frozen = freeze.tracked["0"].state["frozen"] if step > 1 else torch.zeros(2, 4, dtype=torch.bool)
            layer.weight.copy_(torch.where(frozen, layer.weight, weight))
        freeze.after_step(step)
    assert freeze.tracked["0"].state["frozen"].tolist() == [[True, False, False, False], [False] * 4]
    with torch.no_grad():
        layer.weight.copy_(-0.1 * signs)
    freeze.after_step(12)
    step = 0.1 * 0.7978845587
    assert layer.weight[0, 0].item() == pytest.approx(step, rel=1e-3)
    assert layer.weight[0, 1].item() == pytest.approx(-0.1)


# --- what a run leaves ----------------------------------------------------------------------------------------------


def test_what_is_evaluated_is_what_is_saved_and_packs(make_config, tmp_path):
    config = make_config(recipe={"row_gain": True, "average_from": 0.5}, train={"backend": "torch"})
    result = train(config, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    windows = open_tokens(config.data.path, "val").windows(16, 4, limit=2)
    assert held_out_loss(loaded.model, windows, torch.device("cpu")).loss == result.val_loss
    assert not any("row_gain" in name for name, _ in loaded.model.named_parameters())
    x = tokens() % 50
    expected = loaded.model(x)
    torch.testing.assert_close(pack_(loaded.model)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_without_a_parts_state_is_refused():
    recipe = recipe_of(model_of("w1a1"), row_norm=True)
    with pytest.raises(CheckpointError, match=r"here: recipe\.row_norm\..*weight is missing|here: recipe\.row_norm"):
        recipe.load({}, "here")


def test_weight_decay_stops_at_its_share():
    recipe = recipe_of(model_of("w1a1"), decay_until=0.5)
    for step, expected in ((5, {0.1, 0.0}), (6, {0.0})):
        recipe.before_step(step)
        assert {group["weight_decay"] for group in recipe.optimizer.param_groups} == expected


def test_the_papers_recipe_has_no_parts():
    recipe = recipe_of(model_of("w1a1"))
    assert recipe.parts == []
    assert recipe.tensors() == {}
    assert isinstance(recipe.model.get_submodule(O_PROJ), QuantizedLinear)


# --- distillation ---------------------------------------------------------------------------------------------------


def test_distillation_mixes_the_texts_loss_and_the_divergence_from_the_teacher(make_config, tmp_path):
    config = make_config(scheme="none", train={"steps": 2})
    train(config, tmp_path / "teacher")
    section = RecipeSection(teacher=str(tmp_path / "teacher"), distill=0.25)
    made = Distillation(section, open_tokens(config.data.path), torch.device("cpu"))
    teacher, student = load_run(tmp_path / "teacher").model, load_run(tmp_path / "teacher").model
    with torch.no_grad():
        student.lm_head.weight.mul_(2)
    windows = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    p, q = (model(windows[:, :-1]).softmax(-1) for model in (teacher, student))
    text = -q.log().gather(-1, windows[:, 1:, None]).mean()
    expected = 0.75 * text + 0.25 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(made.loss(student, windows), expected)
    assert "its 2 steps of 4 × 16 tokens" in made.cost


def test_a_run_with_a_teacher_says_what_it_costs_and_learns_from_it(make_config, tmp_path):
    train(make_config(scheme="none"), tmp_path / "teacher")
    told = []

    class Listener:
        def on_start(self, start):
            told.extend(start.notices)

        def on_step(self, record): ...

        def on_evaluate(self, record): ...

        def on_end(self, result): ...

    config = make_config(recipe={"teacher": str(tmp_path / "teacher"), "distill": 1.0})
    train(config, tmp_path / "student", display=Listener())
    assert len(told) == 1
    assert told[0].startswith(f"distilled from {tmp_path / 'teacher'}: its 12 steps")
    first, *_, last = [r["loss"] for r in read_metrics(tmp_path / "student" / "metrics.jsonl") if r["kind"] == "train"]
    assert last < first < 3  # a divergence, and not the text's 5.5 nats
    missing = make_config(recipe={"teacher": str(tmp_path / "nowhere")})
    with pytest.raises(CheckpointError, match="no such run directory"):
        train(missing, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("scheme", ["w4a4-mxfp4", "w4a4-nvfp4"])
def test_gains_are_refused_where_steps_are_rounded(scheme):
    model = quantize_(Llama(LlamaConfig.preset("1M", vocab_size=97, max_position_embeddings=32)), scheme)
    with pytest.raises(ConfigError, match="rounded themselves"):
        RowGain(model)


def test_a_model_is_published_with_the_schemes_widths():
    fields = {
        "scheme": "w1a1", "model": {"preset": "1M"}, "train": {"steps": 10},
        "recipe": {"activation_bits": [[0.0, 8], [0.5, 1]]},
    }  # fmt: skip
    model = quantize_(Llama(LlamaConfig.preset("1M", vocab_size=97, max_position_embeddings=32)), "w1a1")
    recipe = Recipe(model, TrainConfig.from_dict(fields))
    layer = model.model.layers[0].self_attn.q_proj
    recipe.before_step(1)
    assert layer.activation_quantizer.spec.bits == 8
    with recipe.published():
        assert layer.activation_quantizer.spec == Scheme.parse("w1a1").activation
    assert layer.activation_quantizer.spec.bits == 8
