"""Fits the scaling law to runs: robust least squares on log losses, many starts, bootstrap intervals.

Unknowns are ln X₀, ln α, ln Y₀, ln β, ln E and one g per format but the reference, in

    L = exp(ln X₀ − α·(ln N − mean ln N) − g) + exp(ln Y₀ − β·(ln D − mean ln D)) + E,      eff(P) = exp(g/α).

Centred logarithms make the unknowns nearly independent, so that most starts end in the same optimum. All starts, or all
bootstrap samples, are minimised at once, as one batch. B of a batch, R runs, U unknowns.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitquest.errors import ConfigError
from bitquest.evaluation.scaling_fitted import CONSTANTS, LEVEL, FittedLaw, FittedRange
from bitquest.evaluation.scaling_law import ScalingLaw
from bitquest.evaluation.scaling_runs import UNQUANTIZED, ScalingRun
from bitquest.evaluation.student import t_quantile

Array = NDArray[np.float64]
Progress = Callable[[int, int], None]

HUBER = 0.02  # log residuals beyond this count linearly
STARTS, SAMPLES = 32, 300
_TOGETHER = 100  # bootstrap samples of one batch
_NO_E, _LOG_NO_E = 1e-6, -60.0  # nats: an E below this is none; the logarithm of none
_SAME = 0.1  # tokens per parameter that differ by less than this share are one ratio


@dataclass(frozen=True)
class _Problem:
    """The runs as arrays (R,), the formats (the reference first), and the constants that are held."""

    log_n: Array
    log_d: Array
    log_loss: Array
    format_of: NDArray[np.int64]
    formats: tuple[str, ...]
    held: Mapping[str, float]

    @functools.cached_property
    def free(self) -> tuple[str, ...]:
        return tuple(name for name in CONSTANTS if name not in self.held)

    @property
    def unknowns(self) -> int:
        return len(self.free) + len(self.formats) - 1

    def holding(self, name: str, value: float) -> "_Problem":
        return dataclasses.replace(self, held={**self.held, name: value})

    def constants(self, u_BU: Array) -> dict[str, Array]:
        """ln X₀ (as A), α, ln Y₀ (as B), β and E, each (B,)."""
        value = {name: u_BU[:, place] for place, name in enumerate(self.free)}
        found = {
            name: np.full(len(u_BU), self.held[name]) if name in self.held else np.exp(np.minimum(value[name], 50.0))
            for name in ("alpha", "beta", "E")
        }
        for name, exponent, logs in (("A", "alpha", self.log_n), ("B", "beta", self.log_d)):
            if name in self.held:
                found[name] = math.log(self.held[name]) - found[exponent] * logs.mean()
            else:
                found[name] = value[name]
        return found

    def offsets(self, u_BU: Array) -> Array:
        """g of every format, (B, formats)."""
        return np.concatenate([np.zeros((len(u_BU), 1)), u_BU[:, len(self.free) :]], 1)

    def terms(self, u_BU: Array) -> tuple[Array, Array, Array]:
        """The law's three terms for every run: (B, R), (B, R), (B, 1)."""
        c = {name: value[:, None] for name, value in self.constants(u_BU).items()}
        g_BR = self.offsets(u_BU)[:, self.format_of]
        size_BR = np.exp(np.minimum(c["A"] - c["alpha"] * (self.log_n - self.log_n.mean()) - g_BR, 50.0))
        data_BR = np.exp(np.minimum(c["B"] - c["beta"] * (self.log_d - self.log_d.mean()), 50.0))
        return size_BR, data_BR, c["E"]

    def log_fit(self, u_BU: Array) -> Array:
        """Fitted log losses, (B, R)."""
        size_BR, data_BR, e_B1 = self.terms(u_BU)
        return np.asarray(np.log(size_BR + data_BR + e_B1))

    def jacobian(self, u_BU: Array) -> Array:
        """Derivatives of `log_fit`, (B, R, U)."""
        size_BR, data_BR, e_B1 = self.terms(u_BU)
        c = {name: value[:, None] for name, value in self.constants(u_BU).items()}
        held_a, held_b = (name in self.held for name in "AB")
        by_name = {  # where A is held, X₀ moves with α: α turns about ln N = 0 and not about the mean
            "A": size_BR,
            "alpha": -size_BR * c["alpha"] * (self.log_n - (0.0 if held_a else self.log_n.mean())),
            "B": data_BR,
            "beta": -data_BR * c["beta"] * (self.log_d - (0.0 if held_b else self.log_d.mean())),
            "E": np.broadcast_to(e_B1, size_BR.shape),
        }
        columns = [by_name[name] for name in self.free]
        columns += [np.where(self.format_of == number, -size_BR, 0.0) for number in range(1, len(self.formats))]
        return np.asarray(np.stack(columns, 2) / (size_BR + data_BR + e_B1)[:, :, None])

    def laws(self, u_BU: Array) -> list[tuple[ScalingLaw, list[float]]]:
        """The constants as METHOD writes them, and eff of every format, of each of a batch."""
        c = self.constants(u_BU)
        a = np.exp(c["A"] + c["alpha"] * self.log_n.mean())
        b = np.exp(c["B"] + c["beta"] * self.log_d.mean())
        e = np.where((c["E"] >= _NO_E) | ("E" in self.held), c["E"], 0.0)
        eff = np.exp(self.offsets(u_BU) / c["alpha"][:, None])
        rows = np.stack([a, c["alpha"], b, c["beta"], e], 1).tolist()
        return [(ScalingLaw(*row), list(own)) for row, own in zip(rows, eff.tolist(), strict=True)]


def fit_law(
    runs: Sequence[ScalingRun],
    *,
    reference: str = UNQUANTIZED,
    held: Mapping[str, float] | None = None,
    huber: float = HUBER,
    starts: int = STARTS,
    samples: int = SAMPLES,
    seed: int = 0,
    about: str = "",
    progress: Progress | None = None,
) -> FittedLaw:
    """The law that fits the runs best.

    reference: the format with eff = 1. held: constants (A, alpha, B, beta, E) that stay at given values. huber: log
    residuals beyond it count linearly. samples: refits to residuals drawn again (inflated by leverage), for intervals.
    Raises ConfigError where the runs cannot determine the law, saying what is missing.
    """
    held = dict(held or {})
    _check(runs, reference, held)
    formats = (reference, *(name for name in dict.fromkeys(run.format for run in runs) if name != reference))
    problem = _Problem(
        log_n=np.log([float(run.parameters) for run in runs]),
        log_d=np.log([float(run.tokens) for run in runs]),
        log_loss=np.log([run.loss for run in runs]),
        format_of=np.array([formats.index(run.format) for run in runs]),
        formats=formats,
        held=held,
    )
    if len(runs) <= problem.unknowns:
        raise ConfigError(
            f"{len(runs)} runs are too few for {problem.unknowns} unknowns ({len(problem.free)} constants"
            f" and eff of {len(formats) - 1} formats): add runs, take fewer formats (--formats), "
            "or hold constants (--hold beta=0.241)"
        )
    rng = np.random.default_rng(seed)
    best, agreeing = _best(problem, rng, starts, huber)
    residuals = (problem.log_loss - problem.log_fit(best))[0]
    freedom = len(runs) - problem.unknowns
    drawn = problem.laws(_bootstrap(problem, best, rng, samples, huber, progress))
    [(law, efficiencies)] = problem.laws(best)
    squares = float(np.sum(residuals**2))
    return FittedLaw(
        law=law,
        efficiencies=dict(zip(formats, efficiencies, strict=True)),
        reference=reference,
        runs={name: sum(run.format == name for run in runs) for name in formats},
        range=FittedRange.of(runs),
        residual_std=math.sqrt(squares / freedom),
        sum_of_squares=squares,
        samples=tuple((one.a, one.alpha, one.b, one.beta, one.e, *eff) for one, eff in drawn),
        e_range=(law.e, law.e) if "E" in held else _range_of_e(problem, best, squares, freedom, huber),
        held=tuple(held),
        about={
            "source": about,
            "huber": huber,
            "largest_residual": float(np.abs(residuals).max()),
            "starts": starts,
            "starts_that_agree": agreeing,
            "bootstrap_samples": len(drawn),
            "degrees_of_freedom": freedom,
        },
    )


def _check(runs: Sequence[ScalingRun], reference: str, held: Mapping[str, float]) -> None:
    for name, value in held.items():
        if name not in CONSTANTS:
            raise ConfigError(f"--hold {name}: the law's constants are {', '.join(CONSTANTS)}")
        if not (math.isfinite(value) and (value > 0 or (name == "E" and value == 0))):
            raise ConfigError(f"--hold {name}={value:g}: must be a positive number")
    for name, exponent in (("A", "alpha"), ("B", "beta")):
        if name in held and exponent not in held:
            raise ConfigError(f"--hold {name} alone means little: hold {exponent} as well")
    if not runs:
        raise ConfigError("there are no runs to fit")
    bad = next((run for run in runs if not (math.isfinite(run.loss) and run.loss > 0)), None)
    if bad is not None:
        raise ConfigError(f"{bad.source}: the loss is {bad.loss}, not a positive number")
    formats = {run.format for run in runs}
    if reference not in formats:
        raise ConfigError(
            f"no run of the reference format {reference!r}, to which eff(P) is relative: add unquantized runs, or name "
            f"another with --reference; there are {', '.join(sorted(formats))}"
        )
    sizes = {name: {run.parameters for run in runs if run.format == name} for name in formats}
    if "alpha" not in held and max(map(len, sizes.values())) < 2:
        many = "every format has one size only" if len(set.union(*sizes.values())) > 1 else "all runs have one size"
        raise ConfigError(
            f"{many} (N = {next(iter(next(iter(sizes.values())))):,}), and the law is about sizes: add runs of another "
            "size, or hold the exponent (--hold alpha=0.0627)"
        )
    if "beta" not in held:
        if len({run.tokens for run in runs}) < 2:
            raise ConfigError(
                f"all runs saw {runs[0].tokens:,} tokens, so the share of data cannot be told from E: add runs of "
                "other lengths, or hold it (--hold beta=0.241 --hold B=86.4)"
            )
        ratios = [run.tokens / run.parameters for run in runs]
        if max(ratios) < min(ratios) * (1 + _SAME) and "alpha" not in held:
            raise ConfigError(
                f"all runs have about {ratios[0]:.3g} tokens per parameter, so what comes from size cannot be told "
                "from what comes from data: add runs at another ratio, or hold one (--hold beta=0.241 --hold B=86.4)"
            )


def _cost(residual_BR: Array, huber: float) -> Array:
    """Huber's, (B,): half the squares, beyond `huber` the tangent."""
    size = np.abs(residual_BR)
    return np.asarray(np.where(size <= huber, size**2 / 2, huber * (size - huber / 2)).sum(1))


def _minimise(
    problem: _Problem, start_BU: Array, target_BR: Array, huber: float, iterations: int = 300
) -> tuple[Array, Array]:
    """Costs (B,) and places (B, U) of the optima that Levenberg and Marquardt's steps lead to from each start.

    Huber's loss is minimised by weights: a residual r beyond it counts as huber/|r| of one.
    """
    u, damping = start_BU.copy(), np.full(len(start_BU), 1e-3)
    cost = _cost(problem.log_fit(u) - target_BR, huber)
    running = np.arange(len(u))
    for _ in range(iterations):
        residual = problem.log_fit(u[running]) - target_BR[running]
        weight = np.minimum(1.0, huber / np.maximum(np.abs(residual), 1e-300))
        jacobian = problem.jacobian(u[running])
        weighted = jacobian * weight[:, :, None]
        hessian = np.swapaxes(jacobian, 1, 2) @ weighted
        slope = (np.swapaxes(weighted, 1, 2) @ residual[:, :, None])[:, :, 0]
        diagonal = np.einsum("buu->bu", hessian)
        diagonal += damping[running][:, None] * diagonal + 1e-15  # writes into the Hessian
        step = np.linalg.solve(hessian, slope[:, :, None])[:, :, 0]
        new = u[running] - np.clip(step, -3.0, 3.0)
        new_cost = _cost(problem.log_fit(new) - target_BR[running], huber)
        better = new_cost < cost[running]
        gain = np.where(better, cost[running] - new_cost, 0.0)
        u[running[better]], cost[running[better]] = new[better], new_cost[better]
        damping[running] *= np.where(better, 0.2, 8.0)
        settled = (better & (gain <= 1e-10 * new_cost)) | (damping[running] > 1e10)
        running = running[~settled]
        if not running.size:
            break
    return cost, u


def _optima(problem: _Problem, start_BU: Array, target_BR: Array, huber: float) -> tuple[Array, Array]:
    """Costs and places of the optima near some starts, with E ≥ 0.

    E is an unknown by its logarithm, which has no slope where E is nearly 0: so E = 0 is fitted first, and E is freed
    where the cost falls with it there.
    """
    if "E" in problem.held:
        return _minimise(problem, start_BU, target_BR, huber)
    place, without = problem.free.index("E"), problem.holding("E", 0.0)
    cost, u = _minimise(without, np.delete(start_BU, place, 1), target_BR, huber)
    fitted = without.log_fit(u)
    falls = np.sum(np.clip(fitted - target_BR, -huber, huber) / np.exp(fitted), 1) < 0
    u = np.insert(u, place, _LOG_NO_E, 1)
    if falls.any():
        raised = u[falls]
        raised[:, place] = np.log(0.1 * np.exp(target_BR[falls]).min(1))
        freed_cost, freed = _minimise(problem, raised, target_BR[falls], huber)
        lower = freed_cost < cost[falls]
        where = np.flatnonzero(falls)[lower]
        cost[where], u[where] = freed_cost[lower], freed[lower]
    return cost, u


def _best(problem: _Problem, rng: np.random.Generator, starts: int, huber: float) -> tuple[Array, int]:
    """The best optimum of many starts (1, U), and how many of them found it. Half of the starts have an E of 0."""
    level = np.exp(problem.log_loss).mean()
    rest, share = rng.uniform(0.02, 0.6, starts), rng.uniform(0.15, 0.85, starts)
    values = {
        "A": np.log(share * (1 - rest) * level),
        "alpha": np.log(rng.uniform(0.03, 0.6, starts)),
        "B": np.log((1 - share) * (1 - rest) * level),
        "beta": np.log(rng.uniform(0.03, 0.6, starts)),
        "E": np.log(rest * level),
    }
    columns = [values[name] for name in problem.free] + [np.zeros(starts)] * (len(problem.formats) - 1)
    start, target = np.stack(columns, 1), np.broadcast_to(problem.log_loss, (starts, problem.log_loss.size))
    found = [_optima(problem, start[::2], target[::2], huber), _minimise(problem, start[1::2], target[1::2], huber)]
    cost, u = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not np.isfinite(cost).any():
        raise ConfigError("no start of the fit converged: look at the losses for outliers, or give more --starts")
    best = int(np.nanargmin(cost))
    return u[best : best + 1], int(np.sum(cost <= cost[best] * (1 + 1e-4) + 1e-12))


def _bootstrap(
    problem: _Problem, best_1U: Array, rng: np.random.Generator, samples: int, huber: float, progress: Progress | None
) -> Array:
    """Optima of the fitted losses with residuals drawn again, (samples, U).

    Residuals are first divided by √(1 − leverage), since a fit bends towards its runs; they are drawn from all runs,
    for some formats have only three.
    """
    fitted_1R = problem.log_fit(best_1U)
    q, _ = np.linalg.qr(problem.jacobian(best_1U)[0])
    pool = (problem.log_loss - fitted_1R[0]) / np.sqrt(1 - np.clip(np.sum(q**2, 1), 0, 0.95))
    pool -= pool.mean()
    drawn = [np.empty((0, problem.unknowns))]
    for done in range(0, samples, _TOGETHER):
        count = min(_TOGETHER, samples - done)
        target = fitted_1R + rng.choice(pool, (count, pool.size))
        drawn.append(_optima(problem, np.repeat(best_1U, count, 0), target, huber)[1])
        if progress is not None:
            progress(done + count, samples)
    return np.concatenate(drawn)


def _range_of_e(problem: _Problem, best_1U: Array, squares: float, freedom: int, huber: float) -> tuple[float, float]:
    """The E between which the sum of squares stays within what chance explains (profile, F test at LEVEL)."""
    limit = squares * (1 + t_quantile((1 + LEVEL) / 2, freedom) ** 2 / freedom)
    start, target = np.delete(best_1U, problem.free.index("E"), 1), problem.log_loss[None]

    def fits(e: float) -> bool:
        held = problem.holding("E", e)
        _, u = _minimise(held, start, target, huber)
        return float(np.sum((target - held.log_fit(u)) ** 2)) <= limit

    own = problem.laws(best_1U)[0][0].e
    return (0.0 if fits(0.0) else _edge(fits, own, 0.0)), _edge(fits, own, float(np.exp(problem.log_loss).min()))


def _edge(fits: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where `fits` ends between a value inside and one outside; bisection."""
    for _ in range(14):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside
