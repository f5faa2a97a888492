"""Which parameters decay, and an optimizer's state that survives a trip through named tensors."""

import pytest
import torch

from bitquest.errors import CheckpointError
from bitquest.nn import Scheme, quantize_
from bitquest.numerics import Learned, PerRow, PerTensor, Quantizer
from bitquest.training.config import OptimizerSection
from bitquest.training.optim import decays, load_optimizer, make_optimizer, optimizer_tensors

LEARNED = Scheme(
    weight=Quantizer(granularity=PerRow(), scale=Learned()),
    activation=Quantizer(granularity=PerTensor(), scale=Learned()),
)


def layers(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.RMSNorm(32), torch.nn.Linear(32, 32, bias=False))
    return quantize_(model, LEARNED)


def update(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(5, 32, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_matrices_decay():
    model = layers()
    decaying = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    assert decaying == {"0.weight", "2.weight"}
    optimizer = make_optimizer(model, OptimizerSection(weight_decay=0.25, betas=(0.8, 0.9), eps=1e-6))
    groups = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert groups == {0.25: 2, 0.0: 6}  # bias, norm, two weight steps, two activation steps
    assert all(
        group["fused"] and group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups
    )


def test_state_goes_on_bit_identically():
    section = OptimizerSection(lr=0.01)
    model, other = layers(), layers()
    optimizer, resumed = make_optimizer(model, section), make_optimizer(other, section)
    for seed in range(3):
        update(model, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, model).items()}
    other.load_state_dict(model.state_dict())
    load_optimizer(resumed, other, saved, "here")
    for seed in range(3, 6):
        update(model, optimizer, seed)
        update(other, resumed, seed)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
    for name, tensor in optimizer_tensors(resumed, other).items():
        assert torch.equal(tensor, optimizer_tensors(optimizer, model)[name]), name
    assert saved["0.weight.step"].item() == 3


def test_state_that_does_not_fit_is_refused():
    model = layers()
    optimizer = make_optimizer(model, OptimizerSection())
    update(model, optimizer, 0)
    saved = optimizer_tensors(optimizer, model)
    with pytest.raises(CheckpointError, match=r"here: 0\.weight\.exp_avg is missing"):
        load_optimizer(optimizer, model, {k: v for k, v in saved.items() if k != "0.weight.exp_avg"}, "here")
    with pytest.raises(CheckpointError, match=r"moments of 0\.weight have another shape"):
        load_optimizer(optimizer, model, saved | {"0.weight.exp_avg_sq": torch.zeros(3)}, "here")
