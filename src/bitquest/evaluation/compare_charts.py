"""The charts of a comparison: losses with their intervals, loss against learning rate, training curves, sizes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bitquest.evaluation import figures
from bitquest.evaluation.charts import Chart, finished
from bitquest.evaluation.compare_claims import half_width
from bitquest.evaluation.compare_results import ArmResult, ComparisonResult
from bitquest.evaluation.report import SIZE_CAPTION, curves_caption
from bitquest.evaluation.runs import CurvePoint, RunSummary

Style = tuple[str, str]  # colour and marker


def styles_of(result: ComparisonResult) -> dict[str, Style]:
    """Colour and marker of every arm, the same in all charts."""
    groups = {arm.arm: [RunSummary(arm.name, arm.scheme)] for arm in result.arms}
    return dict(zip(groups, figures._styles(groups), strict=True))


def arms_chart(result: ComparisonResult) -> Chart | None:
    """Every arm's mean loss with its 95 % interval, and a dot per seed; None if no arm has a loss."""
    styles = styles_of(result)
    losses = {
        arm.arm: [run.val_loss for run in result.chosen(arm.arm) if run.val_loss is not None] for arm in result.arms
    }
    values = [loss for own in losses.values() for loss in own]
    if not values:
        return None
    halves = {key: half_width(own) for key, own in losses.items()}
    low, high = min(values), max(values)
    room = high - low or 0.1
    notes = [_note(arm, halves[arm.arm]) for arm in result.arms]
    left, right = (
        figures._text_width([figures._short(arm.name) for arm in result.arms]) + 0.25,
        0.085 * max(map(len, notes)) + 0.2,
    )
    with _wide(0.82 + 0.36 * len(result.arms), left, right) as (figure, axes):
        # an interval may be much wider than all losses (two seeds: t = 12.7); arrows then say that it goes on
        first, last = low - 0.35 * room, high + 0.35 * room
        axes.set_xlim(first, last)
        for row, arm in enumerate(result.arms):
            colour, marker = styles[arm.arm]
            axes.annotate(
                notes[row], (1, row), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
                va="center", color=colour, fontsize=9.5, annotation_clip=False,
            )  # fmt: skip
            if arm.val_loss is None:
                continue
            mean, half = arm.val_loss.mean, halves[arm.arm]
            if half is not None:
                axes.plot([mean - half, mean + half], [row, row], color=colour, lw=1.8, solid_capstyle="butt")
                cut = [("<", first)] * (mean - half < first) + [(">", last)] * (mean + half > last)
                for arrow, end in cut:
                    axes.plot([end], [row], arrow, color=colour, ms=7, clip_on=False, zorder=5)
            axes.plot(losses[arm.arm], [row] * len(losses[arm.arm]), "|", color=colour, ms=11, mew=1.1, alpha=0.75)
            axes.plot([mean], [row], marker, color=colour, ms=7.5, mec=figures._PAPER, mew=0.8)
        axes.set_yticks(range(len(result.arms)), [figures._short(arm.name) for arm in result.arms], color=figures._INK)
        axes.set_ylim(len(result.arms) - 0.45, -0.55)
        axes.set_xlabel("final validation loss, nats per token; line: 95 % interval of the mean")
        caption = (
            "Marks: means. Upright strokes: seeds. Lines: 95 % intervals of the means (Student's t), "
            "with an arrow where they go on."
        )
        columns = ("arm", "scheme", "rate", "seeds", "mean", "half_interval", "diverged", "unstable")
        rows = [
            (a.name, a.scheme, a.rate, len(losses[a.arm]), a.val_loss and a.val_loss.mean, halves[a.arm], a.diverged,
             a.unstable)
            for a in result.arms
        ]  # fmt: skip
        return finished(figure, "arms", "Final validation loss of every arm", caption, columns, rows)


def _note(arm: ArmResult, half: float | None) -> str:
    """What stands beside an arm's row: its mean, and what went wrong."""
    parts = []
    if arm.val_loss is not None:
        parts.append(f"{arm.val_loss.mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""))
    parts += [f"{arm.diverged} of {arm.runs} diverged"] * bool(arm.diverged)
    parts += [f"{arm.unstable} of {arm.runs} unstable"] * bool(arm.unstable)
    return ", ".join(parts)


def rates_chart(result: ComparisonResult) -> Chart | None:
    """Loss of the first seed against learning rate, a line per arm, the best rate ringed; None without a sweep."""
    rates, seed = sorted(result.plan.rates), result.plan.seeds[0]
    sweep = {
        arm.arm: {run.rate: run for run in result.runs if run.arm == arm.arm and run.seed == seed}
        for arm in result.arms
    }
    losses = [run.val_loss for own in sweep.values() for run in own.values() if run.val_loss is not None]
    if len(rates) < 2 or not losses or result.plan.is_map:
        return None
    styles, middle = styles_of(result), sorted(losses)[len(losses) // 2]
    low = min(losses)
    # one loss far above all others would leave no room between them
    high = min(max(losses), low + 3 * (middle - low)) if middle > low else max(losses)
    high += 0.06 * (high - low or 1)
    top = high + 0.09 * (high - low)
    right = figures._text_width([f"{figures._short(arm.name)}  0.000" for arm in result.arms]) + 0.45
    with _wide(max(3.6, 0.24 * len(result.arms) + 1.2), 0.75, right) as (figure, axes):
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        axes.set_xscale("log")
        axes.set_xlim(rates[0] / 1.25, rates[-1] * 1.25)
        axes.set_ylim(low - 0.06 * (high - low), top + 0.05 * (high - low))
        ends = []
        for number, arm in enumerate(result.arms):
            colour, marker = styles[arm.arm]
            runs = [(rate, sweep[arm.arm][rate]) for rate in rates if rate in sweep[arm.arm]]
            shown = [(rate, run.val_loss) for rate, run in runs if run.val_loss is not None and run.val_loss <= high]
            gone = [rate for rate, run in runs if run.val_loss is None or run.val_loss > high]
            axes.plot(*_columns(shown), color=colour, lw=1.6, marker=marker, ms=5, mec=figures._PAPER, mew=0.6)
            best = [(rate, loss) for rate, loss in shown if rate == arm.rate]
            axes.plot(*_columns(best), "o", ms=11, mfc="none", mec=colour, mew=1.3)
            # diverged runs stand side by side above the frame's other marks
            shift = (rates[-1] / rates[0]) ** (0.045 * (number - (len(result.arms) - 1) / 2))
            axes.plot([rate * shift for rate in gone], [top] * len(gone), "x", color=colour, ms=6, mew=1.6)
            if shown:
                text = figures._short(arm.name) + (f"  {best[0][1]:.3f}" if best else "")
                ends.append((CurvePoint(*shown[-1]), text, colour))  # type: ignore[arg-type]  # a rate, not a step
        axes.xaxis.set_major_locator(FixedLocator(rates))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss, nats per token")
        figures._label_ends(axes, ends)
        caption = (
            f"Seed {seed}, which chooses each arm's rate (ringed; its loss stands beside the name). "
            "A cross at the top: diverged, or so far above that it would not fit."
        )
        columns = ("arm", "scheme", "rate", "status", "validation_loss", "chosen")
        rows = [
            (arm.name, arm.scheme, rate, run.status, run.val_loss, int(rate == arm.rate))
            for arm in result.arms
            for rate, run in sorted(sweep[arm.arm].items())
        ]
        return finished(figure, "rates", "Validation loss against learning rate", caption, columns, rows)


def curves_chart(runs: Sequence[RunSummary]) -> Chart | None:
    """Loss against steps, a colour per arm; None without points."""
    with figures.loss_figure(runs) as figure:
        if figure is None:
            return None
        rows = [
            (run.name, run.scheme, run.seed, kind, point.step, point.loss)
            for run in runs
            for kind, points in (("train", run.train_curve), ("validation", run.validation_curve))
            for point in points
        ]
        columns = ("arm", "scheme", "seed", "kind", "step", "loss")
        return finished(figure, "curves", "Loss against training steps", curves_caption(runs), columns, rows)


def sizes_chart(runs: Sequence[RunSummary]) -> Chart | None:
    """Packed size against bits per byte; None if there are not two arms to show."""
    with figures.size_figure(runs) as figure:
        if figure is None:
            return None
        rows = [(run.name, run.scheme, run.seed, run.packed_mb, run.bits_per_byte) for run in runs]
        columns = ("arm", "scheme", "seed", "packed_mb", "bits_per_byte")
        return finished(figure, "sizes", "Packed size against bits per byte", SIZE_CAPTION, columns, rows)


def _columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [x for x, _ in points], [y for _, y in points]


@contextmanager
def _wide(height: float, left: float, right: float) -> Iterator[tuple[Any, Any]]:
    with figures._axes(height, left=left, right=right, grid="both") as (figure, axes):
        yield figure, axes
