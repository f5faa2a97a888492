"""Which parameters decay, and an optimizer's state that survives a trip through named tensors."""

import pytest
import torch

from bitquest.errors import CheckpointError
from bitquest.nn import Scheme, quantize_
from bitquest.numerics import Learned, PerRow, PerTensor, Quantizer
from bitquest.training.config import OptimizerSection
from bitquest.training.optim import decays, load_optimizer, make_optimizer, optimizer_tensors
from bitquest.training.recipe_config import RecipeSection
from bitquest.training.soap import SOAP

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


class Blocks(torch.nn.Module):
    """A table, one matrix, a norm and a head, under the names of a Llama."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = torch.nn.Embedding(8, 16)
        self.proj, self.norm = torch.nn.Linear(16, 24, bias=False), torch.nn.RMSNorm(24)
        self.lm_head = torch.nn.Linear(24, 8, bias=False)


def with_gradients(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("kind", "alone"), [("muon", torch.optim.Muon), ("soap", SOAP)])
def test_the_blocks_matrices_go_to_the_recipes_optimizer_and_the_rest_to_adamw(kind, alone):
    model, other = Blocks(), Blocks()
    section = OptimizerSection(lr=0.01)
    optimizer = make_optimizer(model, section, RecipeSection(optimizer=kind, matrix_lr=2.0))
    extra = {"adjust_lr_fn": "match_rms_adamw"} if kind == "muon" else {"betas": section.betas}
    matrices = alone([other.proj.weight], lr=0.02, weight_decay=0.1, **extra)
    rest = make_optimizer(torch.nn.ModuleList([other.embed_tokens, other.norm, other.lm_head]), section)
    for _ in range(3):
        with_gradients(model)
        with_gradients(other)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * group.get("lr_scale", 1.0)
        optimizer.step()
        matrices.step()
        rest.step()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_rate_of_their_own_is_all_that_changes_under_adamw():
    model = Blocks()
    optimizer = make_optimizer(model, OptimizerSection(), RecipeSection(matrix_lr=0.5))
    assert isinstance(optimizer, torch.optim.AdamW)
    scales = {id(p): g.get("lr_scale", 1.0) for g in optimizer.param_groups for p in g["params"]}
    assert {name: scales[id(p)] for name, p in model.named_parameters()} == {
        "embed_tokens.weight": 1.0, "proj.weight": 0.5, "norm.weight": 1.0, "lm_head.weight": 1.0
    }  # fmt: skip


def test_soap_is_adam_in_the_eigenbasis():
    """Three steps against the algorithm written out in float64 with exact eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=generator)
    parameter = torch.nn.Parameter(w.clone())
    soap = SOAP([parameter], lr=0.1, betas=(0.9, 0.8), eps=1e-8, weight_decay=0.5, every=100)
    gradients = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    for gradient in gradients:
        parameter.grad = gradient
        soap.step()
    first = gradients[0].double()
    left = torch.linalg.eigh(first @ first.t()).eigenvectors
    right = torch.linalg.eigh(first.t() @ first).eigenvectors
    mean, square, expected = torch.zeros(3, 4).double(), torch.zeros(3, 4).double(), w.double()
    for step, gradient in enumerate(gradients[1:], 1):
        g = gradient.double()
        mean, square = 0.9 * mean + 0.1 * g, 0.8 * square + 0.2 * (left.t() @ g @ right) ** 2
        turned = left.t() @ mean @ right / (1 - 0.9**step) / ((square / (1 - 0.8**step)).sqrt() + 1e-8)
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * left @ turned @ right.t()
    # R of the first gradient, 4x4 of rank 3, has one direction of eigenvalue 0, unique up to sign
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-3, atol=1e-3)


def test_soap_renews_an_orthonormal_basis_that_diagonalises():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    soap = SOAP([parameter], lr=0.1, every=1)
    mix = torch.randn(4, 4, generator=generator)
    for _ in range(200):
        parameter.grad = mix @ torch.randn(4, 4, generator=generator)
        soap.step()
    state = soap.state[parameter]
    basis = state["left_basis"]
    torch.testing.assert_close(basis.t() @ basis, torch.eye(4), rtol=1e-5, atol=1e-5)
    rotated = basis.t() @ state["left"] @ basis
    assert (rotated - rotated.diag().diag()).abs().max() < 0.2 * rotated.diag().max()
