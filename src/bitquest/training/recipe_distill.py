"""Distillation: learn from what a trained, usually unquantized model expects, as well as from the text.

    L = (1 − a)·CE(text) + a·KL(p_teacher ‖ p_student),        both per predicted token, in nats, at temperature 1.

Hinton et al., arXiv 1503.02531. The teacher is the newest checkpoint of a run on the same tokens. Its training and its
forward pass in every step are part of what such a run costs; the run says so when it starts.

B sequences, T tokens of context, V words.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.training.data import Tokens
from bitquest.training.recipe_config import RecipeSection
from bitquest.training.runs import load_run


class Distillation:
    """The loss of a run with a teacher. Raises ConfigError if the teacher reads other tokens, CheckpointError if none.

    cost: what the teacher adds to the run, in words.
    """

    def __init__(self, section: RecipeSection, tokens: Tokens, device: torch.device) -> None:
        run = load_run(Path(section.teacher))
        if run.tokenizer.sha256 != tokens.tokenizer().sha256:
            raise ConfigError(
                f"recipe.teacher = {section.teacher} was trained with another tokenizer than the data: train a "
                "teacher on this data"
            )
        self.share = section.distill
        self.teacher = run.model.to(device).requires_grad_(False)
        train = run.config.train
        self.cost = (
            f"distilled from {section.teacher}: its {run.step} steps of {train.batch_size} × "
            f"{run.config.data.context} tokens and a forward pass of it in every step are costs of this run too"
        )

    def loss(self, model: nn.Module, window_BT1: Tensor) -> Tensor:
        """The mixed loss of int64 windows (B, T+1)."""
        inputs_BT = window_BT1[:, :-1]
        student_NV = model(inputs_BT).float().flatten(0, 1)
        with torch.no_grad():
            teacher_NV = self.teacher(inputs_BT).float().flatten(0, 1).log_softmax(-1)
        text = F.cross_entropy(student_NV, window_BT1[:, 1:].flatten())
        expected = F.kl_div(student_NV.log_softmax(-1), teacher_NV, reduction="batchmean", log_target=True)
        return (1 - self.share) * text + self.share * expected
