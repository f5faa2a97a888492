"""The optimizers of a run: who updates which parameters, what decays, and their state as named tensors.

AdamW updates everything in the paper's recipe. With Muon or SOAP ([recipe]) the matrices of the blocks go to these,
and the rest, embedding, head, norms, biases, gains and learned steps, stays with AdamW.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitquest.errors import CheckpointError
from bitquest.nn.quantizer import regularized_clips
from bitquest.training.config import OptimizerSection
from bitquest.training.recipe_config import RecipeSection
from bitquest.training.soap import SOAP

# What each optimizer keeps for a parameter; those of the parameter's shape first.
_STATE: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.Muon: ("momentum_buffer",),
    SOAP: ("exp_avg", "exp_avg_sq", "step", "left", "right", "left_basis", "right_basis"),
}
_OF_PARAMETERS_SHAPE = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_TABLES = ("embed_tokens", "lm_head")


class Optimizers:
    """Several optimizers, each over parameters of its own, that step as one."""

    def __init__(self, members: list[torch.optim.Optimizer]) -> None:
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members. `lr_scale` of a group multiplies the run's learning rate."""
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)


AnyOptimizer = torch.optim.Optimizer | Optimizers


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, gains or the learned steps of quantizers.

    PACT's clips decay beside these (`regularized_clips`).
    """
    return parameter.ndim >= 2 and not name.endswith("_quantizer.step")


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix of the blocks: what quantization acts on, and what Muon and SOAP update."""
    parts = name.split(".")
    return decays(name, parameter) and parameter.ndim == 2 and not any(table in parts for table in _TABLES)


def make_optimizer(
    model: nn.Module, section: OptimizerSection, recipe: RecipeSection | None = None
) -> torch.optim.AdamW | Optimizers:
    """AdamW over the model's parameters, with weight decay and without; fused where PyTorch has it.

    A recipe may give the blocks' matrices a learning rate or an optimizer of their own.
    """
    recipe = RecipeSection() if recipe is None else recipe
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = [p for name, p in parameters if is_hidden_matrix(name, p)]
    if recipe.optimizer == "adamw" and recipe.matrix_lr == 1.0:
        own = []
    taken = {id(p) for p in own}
    rest = [(name, p) for name, p in parameters if id(p) not in taken]
    clips = regularized_clips(model)
    decaying = [decays(name, p) or name in clips for name, p in rest]
    groups = [
        {"params": [p for (_, p), d in zip(rest, decaying, strict=True) if d], "weight_decay": section.weight_decay},
        {"params": [p for (_, p), d in zip(rest, decaying, strict=True) if not d], "weight_decay": 0.0},
    ]
    matrices = {"params": own, "weight_decay": section.weight_decay, "lr_scale": recipe.matrix_lr}
    if recipe.optimizer == "adamw":
        groups.append(matrices)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for _, p in parameters)
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=fused,
    )
    if recipe.optimizer == "muon" and own:
        # match_rms_adamw: updates as large as AdamW's, so that rates carry over (Liu et al., arXiv 2502.16982)
        muon = torch.optim.Muon([matrices], lr=section.lr, momentum=recipe.momentum, adjust_lr_fn="match_rms_adamw")
        return Optimizers([adamw, muon])
    if recipe.optimizer == "soap" and own:
        soap = SOAP([matrices], lr=section.lr, betas=section.betas, eps=section.eps, every=recipe.every_eigenbasis)
        return Optimizers([adamw, soap])
    return adamw


def _members(optimizer: AnyOptimizer) -> list[torch.optim.Optimizer]:
    return optimizer.members if isinstance(optimizer, Optimizers) else [optimizer]


def optimizer_tensors(optimizer: AnyOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizers' state as `<parameter>.<moment>`."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for member in _members(optimizer):
            if parameter in member.state:
                for moment in _STATE[type(member)]:
                    tensors[f"{name}.{moment}"] = member.state[parameter][moment]
    return tensors


def load_optimizer(optimizer: AnyOptimizer, model: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError naming a moment that does not fit."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for member in _members(optimizer):
        order = [parameter for group in member.param_groups for parameter in group["params"]]
        state = {}
        for index, parameter in enumerate(order):
            name = names[id(parameter)]
            try:
                # copies: the optimizer would otherwise write into the saved tensors, which may be a mapped file
                state[index] = {moment: saved[f"{name}.{moment}"].clone() for moment in _STATE[type(member)]}
            except KeyError as error:
                raise CheckpointError(f"{where}: {error.args[0]} is missing") from None
            if any(state[index][m].shape != parameter.shape for m in _OF_PARAMETERS_SHAPE if m in state[index]):
                raise CheckpointError(f"{where}: the moments of {name} have another shape than the parameter")
        member.load_state_dict({"state": state, "param_groups": member.state_dict()["param_groups"]})
