"""AdamW: which parameters decay, and its state as named tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitquest.errors import CheckpointError
from bitquest.training.config import OptimizerSection

# What PyTorch's AdamW keeps for each parameter.
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases or the learned steps of quantizers."""
    return parameter.ndim >= 2 and not name.endswith("_quantizer.step")


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over the model's parameters in two groups, with weight decay and without; fused where PyTorch has it."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in parameters if decays(name, p)], "weight_decay": section.weight_decay},
        {"params": [p for name, p in parameters if not decays(name, p)], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for _, p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=fused,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>.<moment>`."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in _MOMENTS
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Put back what `optimizer_tensors` gave. Raises CheckpointError naming a moment that does not fit."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    for index, parameter in enumerate(order):
        name = names[id(parameter)]
        try:
            # copies: the optimizer would otherwise write into the saved tensors, which may be a mapped file
            state[index] = {moment: saved[f"{name}.{moment}"].clone() for moment in _MOMENTS}
        except KeyError as error:
            raise CheckpointError(f"{where}: {error.args[0]} is missing") from None
        if state[index]["exp_avg"].shape != parameter.shape or state[index]["exp_avg_sq"].shape != parameter.shape:
            raise CheckpointError(f"{where}: the moments of {name} have another shape than the parameter")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
