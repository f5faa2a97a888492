"""Learning rate over a run, as a share of the highest."""

import math

from bitquest.training.config import ScheduleSection


def learning_rate_share(schedule: ScheduleSection, step: int, steps: int) -> float:
    """Share of the highest learning rate in step 1 … steps: warm-up to 1, then cosine, or a plateau and a linear decay.

    The last step has `schedule.final`, the last warm-up step 1.
    """
    warmup = round(schedule.warmup * steps)
    if step <= warmup:
        return step / warmup
    if schedule.kind == "cosine":
        progress = (step - warmup) / (steps - warmup)
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2
    decay = round(schedule.decay * steps)
    left = steps - step
    return 1.0 if left >= decay else schedule.final + (1 - schedule.final) * left / decay
