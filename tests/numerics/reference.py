"""The method once more, naively, in float64 and with loops over levels: what the definition is tested against."""

import math

import torch
from torch import Tensor

from bitquest.numerics import (
    BlockHadamard,
    Clip,
    Inside,
    Learned,
    NofM,
    NoRotation,
    PerGroup,
    PerRow,
    Quantizer,
    Rotation,
    StraightThrough,
    Trust,
    UniformGrid,
)


def dense_rotation(rotation: Rotation, width: int) -> Tensor:
    """The K×K matrix that nobody should build."""
    resolved = rotation.resolve(width)
    if isinstance(resolved, NoRotation):
        return torch.eye(width, dtype=torch.float64)
    assert isinstance(resolved, BlockHadamard)
    n = resolved.block
    h = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)], dtype=torch.float64)
    return torch.block_diag(*[h / n**0.5] * (width // n))


def kept_elements(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """(kept, doubtful): by counting, for each element, the ones that beat it; doubtful where magnitudes nearly tie."""
    pattern = quantizer.sparsity
    if not isinstance(pattern, NofM):
        return torch.ones_like(x, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool)
    unit = 2 if pattern.pair else 1
    sizes = x.reshape(x.shape[0], -1, pattern.m, unit).square().sum(-1)
    mine, other = sizes.unsqueeze(-1), sizes.unsqueeze(-2)
    earlier = torch.ones(pattern.m, pattern.m, dtype=torch.bool).tril(-1)
    beaten_by = ((other > mine) | ((other == mine) & earlier)).sum(-1)
    near = (mine - other).abs() < 1e-5 * torch.maximum(mine, other)
    near = (near & ~torch.eye(pattern.m, dtype=torch.bool)).any(-1).any(-1, keepdim=True).expand_as(beaten_by)
    return (t.unsqueeze(-1).expand(-1, -1, -1, unit).reshape(x.shape) for t in (beaten_by < pattern.n, near))  # type: ignore[return-value]


def nearest_e4m3(x: Tensor) -> Tensor:
    """Positive numbers rounded to sign-exponent-mantissa 1-4-3, at least the smallest subnormal."""
    exponent = x.clamp_min(2.0**-9).log2().floor().clamp_min(-6)
    unit = 2.0 ** (exponent - 3)
    return (torch.round(x / unit) * unit).clamp(2.0**-9, 448)


def steps(x_h: Tensor, quantizer: Quantizer, nudge: float = 0.0) -> Tensor:
    """Δ of every element, (rows, K). nudge: a relative change before a scale is itself rounded."""
    if isinstance(quantizer.granularity, PerRow):
        shared = x_h
    elif isinstance(quantizer.granularity, PerGroup):
        shared = x_h.reshape(-1, quantizer.granularity.size)
    else:
        shared = x_h.reshape(1, -1)
    scale = quantizer.scale.to_json()
    kind = scale["kind"]
    largest = quantizer.grid.max_level
    if kind == "power_of_two":
        peak = shared.abs().amax(1) * (1 + nudge)
        s = largest * 2.0 ** ((peak.log2().floor() - math.floor(math.log2(largest))).clamp(-126, 127))
    elif kind == "two_level":
        peak = shared.abs().amax(1).reshape(x_h.shape[0], -1)
        over = peak.amax(1, keepdim=True) if scale["shared"] == "row" else peak.amax()
        outer = (over + 1e-8) / (448 * largest)
        s = largest * (outer * nearest_e4m3(peak / largest / outer * (1 + nudge))).reshape(-1)
        return (s / largest).unsqueeze(1).expand_as(shared).reshape(x_h.shape)
    elif kind == "learned" and scale.get("start") == "lsq":
        s = largest * 2 * shared.abs().mean(1) / max(quantizer.grid.levels[-1], 1) ** 0.5
    elif kind in ("gaussian_mse", "learned"):
        s = quantizer.grid.clip_multiplier * shared.square().mean(1).sqrt()
    elif kind == "absmax":
        s = shared.abs().amax(1)
    else:
        s = shared.abs().mean(1)
    return ((s + 1e-8) / quantizer.grid.max_level).unsqueeze(1).expand_as(shared).reshape(x_h.shape)


def forward(x: Tensor, quantizer: Quantizer, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_q, mask, doubtful, Δ) in float64; doubtful: within 1e-5·Δ of a decision, where float32 may differ."""
    h = dense_rotation(rotation, x.shape[-1])
    x_h = x.double() @ h
    delta = steps(x_h, quantizer)
    t = x_h / delta
    levels = torch.tensor(quantizer.grid.levels, dtype=torch.float64)
    if isinstance(quantizer.grid, UniformGrid):
        half = 2 ** (quantizer.grid.bits - 1)
        clipped = t.clamp(-quantizer.grid.max_level, quantizer.grid.max_level)
        q = (torch.round(clipped + 0.5) - 1).clamp(-half, half - 1) + 0.5
    else:
        distance = (t.unsqueeze(-1) - levels).abs()
        q = levels[distance.argmin(-1)]
    middles = (levels[1:] + levels[:-1]) / 2
    doubtful = ((t.unsqueeze(-1) - middles).abs() < 1e-5 * quantizer.grid.max_level).any(-1)
    doubtful |= steps(x_h, quantizer, 1e-6) != steps(x_h, quantizer, -1e-6)  # a scale that lies on a threshold
    kept, near = kept_elements(x_h, quantizer)
    doubtful |= near
    q = q * kept
    estimator = quantizer.estimator
    if isinstance(estimator, StraightThrough):
        mask = torch.ones_like(t, dtype=torch.bool)
    elif isinstance(estimator, Clip):
        limit = estimator.ratio * quantizer.grid.max_level
        mask = t.abs() <= limit
        doubtful |= (t.abs() - limit).abs() < 1e-5 * limit
    elif isinstance(estimator, Inside):
        low, high = float(levels[0]), float(levels[-1])
        mask = (t >= low) & (t <= high)
        doubtful |= torch.minimum((t - low).abs(), (t - high).abs()) < 1e-5 * quantizer.grid.max_level
    else:
        assert isinstance(estimator, Trust)
        gaps = levels[1:] - levels[:-1]
        reach = estimator.factor * float(max(gaps[0], gaps[-1])) / 2
        # Interior values on a threshold are exactly half a gap away: a tolerance makes them trusted, as METHOD wants.
        mask = (q - t).abs() <= reach * (1 + 1e-9) + 1e-12
        doubtful |= ((q - t).abs() - reach).abs() < 1e-5 * quantizer.grid.max_level
    return q * delta, mask, doubtful, delta


def backward(gradient: Tensor, mask: Tensor, rotation: Rotation) -> Tensor:
    return (gradient.double() * mask) @ dense_rotation(rotation, gradient.shape[-1]).T


def is_legal(quantizer_parts: tuple) -> bool:
    """Whether these parts make a quantizer at all."""
    try:
        Quantizer(*quantizer_parts)
    except ValueError:
        return False
    return True


__all__ = ["Learned", "backward", "dense_rotation", "forward", "is_legal", "steps"]
