"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, for matrices. Vyas et al., arXiv 2409.11321, Algorithm 3.

With G the gradient (N, K) of a matrix, L ← β₂L + (1 − β₂)GGᵀ and R ← β₂R + (1 − β₂)GᵀG; Q_L and Q_R are their
eigenvectors, renewed every few steps by one step of power iteration and a QR decomposition (their Algorithm 4). Adam
runs on G' = Q_LᵀGQ_R with the momentum kept in the weights' own space, and its update N' goes back as Q_L N' Q_Rᵀ.
The first step only fills L and R, as in the authors' description, and moves nothing.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SOAP(torch.optim.Optimizer):
    """Over 2-D parameters only. every: steps between two renewals of the eigenbasis. Weight decay is decoupled.

    State of a parameter (N, K), float32: exp_avg (N, K) in its own space, exp_avg_sq (N, K) in the eigenbasis, left
    (N, N), right (K, K), left_basis, right_basis, step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        every: int = 10,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "every": every})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)

    def _update(self, w: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[w], group["betas"]
        if not state:
            state |= _first(g)
            return
        state["step"] += 1
        step = int(state["step"])
        left, right = state["left_basis"], state["right_basis"]
        state["exp_avg"].lerp_(g, 1 - beta1)
        rotated = left.t() @ g @ right
        state["exp_avg_sq"].mul_(beta2).addcmul_(rotated, rotated, value=1 - beta2)
        mean = (left.t() @ state["exp_avg"] @ right) / (1 - beta1**step)
        square = state["exp_avg_sq"] / (1 - beta2**step)
        update = left @ (mean / (square.sqrt() + group["eps"])) @ right.t()
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.add_(update.to(w.dtype), alpha=-group["lr"])
        state["left"].lerp_(g @ g.t(), 1 - beta2)
        state["right"].lerp_(g.t() @ g, 1 - beta2)
        if step % group["every"] == 0:
            _renew(state)


def _first(g: Tensor) -> dict[str, Tensor]:
    left, right = g @ g.t(), g.t() @ g
    return {
        "exp_avg": torch.zeros_like(g),
        "exp_avg_sq": torch.zeros_like(g),
        "step": torch.zeros(()),
        "left": left,
        "right": right,
        "left_basis": torch.linalg.eigh(left).eigenvectors.flip(-1),
        "right_basis": torch.linalg.eigh(right).eigenvectors.flip(-1),
    }


def _renew(state: dict[str, Tensor]) -> None:
    """One step of orthogonal iteration from the present basis; exp_avg_sq follows the order of the eigenvalues."""
    for axis, name in enumerate(("left", "right")):
        matrix, basis = state[name], state[f"{name}_basis"]
        product = matrix @ basis
        order = (basis * product).sum(0).argsort(descending=True)
        state[f"{name}_basis"] = torch.linalg.qr(product[:, order]).Q
        state["exp_avg_sq"] = state["exp_avg_sq"].index_select(axis, order)
