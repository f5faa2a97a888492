"""The paper's training layer, for comparing speeds only: rotations by dense K×K matrices, masks made by eager tensor
operations, nothing shared between layers.

Written from docs/method.md. The project trains with nn/linear.py, whose numerics this shares (the multiplier, the grid,
the trust rule), so that both can be checked against each other; what differs is what is computed to get there: each
layer rotates its input and its weight by a matrix product with K×K elements, and so do their gradients on the way back.

T tokens, K in_features, N out_features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn import Scheme
from bitquest.numerics import UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import EPSILON, PerRow


def dense_rotation(width: int, block: int) -> Tensor:
    """The orthonormal block-diagonal Hadamard matrix, Sylvester order, all K×K elements of it, float32."""
    signs = torch.ones(1, 1)
    while signs.shape[0] < block:
        signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
    dense: Tensor = torch.block_diag(*[signs * block**-0.5] * (width // block))  # type: ignore[no-untyped-call]
    return dense


def fit_and_mask(v: Tensor, spec: Quantizer) -> Tensor:
    """Rotated rows quantized; the gradient passes where |v| is within the estimator's range."""
    grid, reach = spec.grid, spec.estimator.range(spec.grid)
    if reach is None:
        raise ConfigError(f"the paper's layer masks by a range of |x|, which {spec.estimator} is not")
    with torch.no_grad():  # the scale, the codes and the mask are constants to autograd
        scale = v.square().mean(-1, keepdim=True).sqrt() * grid.clip_multiplier + EPSILON
        step = 2 * scale / (2**grid.bits - 1)
        code = torch.round(torch.minimum(torch.maximum(v, -scale), scale) / step + 0.5) - 1
        level = step * (code + 0.5)
        trusted = (v.abs() <= step * reach[1]).to(v.dtype)
    passing = v * trusted
    result: Tensor = passing + (level - passing).detach()
    return result


class PaperLinear(nn.Linear):
    """y = Q(xH) Q(WH)ᵀ + b on a layer's own weight and bias."""

    rotation: Tensor

    def __init__(self, linear: nn.Linear, weight: Quantizer, activation: Quantizer, block: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        for spec in (weight, activation):
            if not isinstance(spec.grid, UniformGrid) or spec.granularity != PerRow() or spec.is_sparse:
                raise ConfigError(f"the paper's layer takes dense uniform grids with a scale a row, not {spec}")
        self.weight_spec, self.activation_spec = weight, activation
        dense = dense_rotation(self.in_features, block).to(self.weight.device)
        self.register_buffer("rotation", dense, persistent=False)

    def forward(self, x_TK: Tensor) -> Tensor:
        """x (…, K) to (…, N); under autocast the rotations run in autocast's dtype too."""
        x_h, w_h = torch.matmul(x_TK, self.rotation), torch.matmul(self.weight, self.rotation)
        return F.linear(fit_and_mask(x_h, self.activation_spec), fit_and_mask(w_h, self.weight_spec), self.bias)


def paper_(model: nn.Module, scheme: str) -> nn.Module:
    """Replace every linear layer but `lm_head` by a PaperLinear, in place. Returns the model."""
    made = Scheme.parse(scheme)
    if made.weight is None or made.activation is None:
        raise ConfigError(f"the paper's layer quantizes weights and activations, which {scheme} does not")
    for fqn, module in list(model.named_modules()):
        if type(module) is nn.Linear and fqn.rsplit(".", 1)[-1] != "lm_head":
            parent, _, name = fqn.rpartition(".")
            block = made.rotation.resolve(module.in_features).block
            setattr(model.get_submodule(parent), name, PaperLinear(module, made.weight, made.activation, block))
    return model
