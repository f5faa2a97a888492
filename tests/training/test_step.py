"""One optimizer step: accumulation, clipping, precision, the share of masked gradients."""

import copy
import math

import pytest
import torch

from bitquest.errors import ConfigError
from bitquest.models import Llama, LlamaConfig
from bitquest.nn import Scheme, quantize_
from bitquest.training.config import OptimizerSection, TrainSection
from bitquest.training.optim import make_optimizer
from bitquest.training.step import Stepper, choose_device, choose_precision, next_token_loss

CPU = torch.device("cpu")
SHAPE = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16,
)  # fmt: skip


def model_of(scheme, seed=0):
    model = Llama(SHAPE)
    model.init_weights(seed)
    return quantize_(model, Scheme.parse(scheme)).train()


def stepper(model, clip=1.0, lr=1e-2, **fields):
    optimizer = make_optimizer(model, OptimizerSection(lr=lr))
    return Stepper(model, optimizer, TrainSection(batch_size=16, **fields), clip, CPU)


def windows(count=16, seed=0):
    return torch.randint(0, 50, (count, 17), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scheme", ["none", "w4a4", "w1a1"])
@pytest.mark.parametrize("accumulation", [4, 16])
def test_one_batch_of_16_is_4_of_4_within_rounding(scheme, accumulation):
    whole, parts = model_of(scheme), model_of(scheme)
    # unclipped, so that a wrong scale shows
    one = stepper(whole, clip=0.0)
    two = stepper(parts, clip=0.0, accumulation=accumulation)
    gradients = {}
    for name, taker in (("whole", one), ("parts", two)):
        loss = taker._gradients(windows())
        gradients[name] = {n: p.grad.clone() for n, p in taker.model.named_parameters()}
        assert loss.item() == pytest.approx(next_token_loss(model_of(scheme), windows()).item(), abs=1e-5)
    for name, gradient in gradients["whole"].items():
        torch.testing.assert_close(gradients["parts"][name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_steps_lower_the_loss_and_report_it():
    taker = stepper(model_of("w1a1"))
    losses = [taker.step(windows(), 1e-2).loss.item() for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(50), abs=0.2)
    assert losses[-1] < losses[0] - 0.5


def test_the_learning_rate_of_the_step_is_used():
    still, moving = stepper(model_of("none"), lr=1.0), stepper(model_of("none"), lr=1.0)
    before = copy.deepcopy(still.model.state_dict())
    still.step(windows(), 0.0)
    moving.step(windows(), 1e-3)
    assert all(torch.equal(before[name], value) for name, value in still.model.state_dict().items())
    change = (moving.model.lm_head.weight - before["lm_head.weight"]).abs().max().item()
    assert 0.9e-3 < change < 1.2e-3  # Adam's first step has the size of the learning rate


def test_clipping_limits_the_gradient_and_reports_the_norm_before():
    model = model_of("none")
    taker = stepper(model, clip=0.01)
    seen = []
    taker.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    )
    norm = taker.step(windows(), 1e-3).grad_norm.item()
    assert norm > 0.1
    assert seen[0].item() == pytest.approx(0.01, rel=1e-3)
    unclipped = stepper(model_of("none"), clip=0.0)
    assert unclipped.step(windows(), 1e-3).grad_norm.item() == pytest.approx(norm, rel=1e-5)


def test_masked_share_is_recorded_on_request_only():
    taker = stepper(model_of("w1a1"))
    assert taker.step(windows(), 1e-3).masked_share is None
    share = taker.step(windows(), 1e-3, record=True).masked_share
    # Clip(1.30) at 1 bit masks |x| > 1.30·0.798σ: 30 % of a Gaussian
    assert share == pytest.approx(0.30, abs=0.05)
    assert stepper(model_of("none")).step(windows(), 1e-3, record=True).masked_share == 0.0


def test_recording_does_not_change_the_step():
    plain, recorded = stepper(model_of("w1a1"), accumulation=2), stepper(model_of("w1a1"), accumulation=2)
    for _ in range(3):
        one, two = plain.step(windows(), 1e-2), recorded.step(windows(), 1e-2, record=True)
        assert torch.equal(one.loss, two.loss)
    for one, two in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("scheme", ["none", "w1a1"])
def test_activation_checkpointing_gives_the_same_step(scheme):
    plain, saving = model_of(scheme), model_of(scheme)
    saving.activation_checkpointing = True
    one, two = stepper(plain), stepper(saving)
    for _ in range(2):
        assert torch.equal(one.step(windows(), 1e-2).loss, two.step(windows(), 1e-2).loss)


def test_bf16_autocast_runs_on_a_cpu_and_stays_close():
    exact, rounded = stepper(model_of("none")), stepper(model_of("none"), precision="bf16")
    assert (exact.precision, rounded.precision) == ("float32", "bf16")
    one, two = exact.step(windows(), 1e-3), rounded.step(windows(), 1e-3)
    assert two.loss.item() == pytest.approx(one.loss.item(), rel=1e-2)
    assert two.loss.item() != one.loss.item()
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


def test_not_finite_is_noticed():
    model = model_of("none")
    taker = stepper(model)
    assert taker.step(windows(), 1e-3).is_finite()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    assert not taker.step(windows(), 1e-3).is_finite()


def test_automatic_choices_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    assert choose_precision("auto", CPU) == "float32"
    with pytest.raises(ConfigError, match=r"train\.device is cuda, but PyTorch sees no CUDA device"):
        choose_device("cuda")


def test_a_gpu_without_bf16_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    cuda = torch.device("cuda")
    assert choose_precision("auto", cuda) == "float32"
    with pytest.raises(ConfigError, match=r"train\.precision is bf16, which Old GPU lacks"):
        choose_precision("bf16", cuda)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by its own compiler
@pytest.mark.parametrize("scheme", ["none", "w1a1"])
def test_compiled_steps_follow_the_uncompiled_ones(scheme):
    plain, compiled = stepper(model_of(scheme), accumulation=2), stepper(model_of(scheme), accumulation=2, compile=True)
    for seed in range(3):
        one = plain.step(windows(seed=seed), 1e-2, record=True)
        two = compiled.step(windows(seed=seed), 1e-2, record=True)
        assert two.loss.item() == pytest.approx(one.loss.item(), abs=2e-3)
        assert two.masked_share == pytest.approx(one.masked_share, abs=0.05)
