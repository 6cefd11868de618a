"""Learning rate schedules: check the recipe's schedule, and resume with a changed schedule."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    SchedulerType,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)

from blockft.errors import UserError
from blockft.training.library_internals import set_base_learning_rate

UNSUPPORTED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that depend on evaluation results and not only on the step."""


def check_schedule(name: str, settings: dict[str, Any], *, warmup_steps: int, num_steps: int) -> None:
    """Check a schedule by building it once, for an optimizer with a dummy parameter.

    Raises:
        UserError: the Trainer has no schedule of this name that depends only on the step, or the schedule
            does not accept the settings.
    """
    allowed = [kind.value for kind in SchedulerType if kind.value not in UNSUPPORTED_SCHEDULES]
    if name not in allowed:
        raise UserError(f"train.lr_scheduler_type is {name!r} (allowed: {', '.join(allowed)})")
    try:
        get_scheduler(name, torch.optim.SGD([torch.zeros(1)]), warmup_steps, num_steps, settings)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"train.lr_scheduler_kwargs {settings} do not fit train.lr_scheduler_type {name}: {error}"
        ) from error


class RecipeScheduleCallback(TrainerCallback):
    """Makes a resumed run use the learning rate and schedule of its recipe from the first step on.

    A checkpoint restores the rate and the schedule with which it was written: a lower rate in the recipe
    would have no effect, and a prolonged run would start at the end of the shorter run's schedule. A schedule
    that DeepSpeed builds, from a file named by `train.deepspeed`, stays that of the checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        schedule = passed["lr_scheduler"]
        if state.global_step and isinstance(schedule, LambdaLR):
            set_base_learning_rate(schedule, passed["optimizer"], args.learning_rate)
