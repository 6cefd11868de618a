"""Which schedules there are, and going on under one that is not the checkpoint's."""

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

UNSUPPORTED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that go by what an evaluation finds, and not by the step."""


def check_schedule(name: str, settings: dict[str, Any], *, warmup_steps: int, num_steps: int) -> None:
    """Build the schedule once, for an optimizer of nothing.

    Raises:
        UserError: the Trainer knows none of that name that goes by the step, or it takes other settings.
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
    """A run that goes on has the learning rate that its recipe gives the step, from the first step on.

    A checkpoint brings back the rate and the schedule with which it was written: a lower rate in the recipe
    would do nothing, and a run that is made longer would begin at the end of the shorter one's curve.
    A schedule of DeepSpeed's own, from a file that `train.deepspeed` names, stays the checkpoint's.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        schedule = passed["lr_scheduler"]
        if not state.global_step or not isinstance(schedule, LambdaLR):
            return
        schedule.base_lrs = [args.learning_rate for _ in schedule.base_lrs]
        # the last rate is also what is logged
        schedule._last_lr = [args.learning_rate * share(schedule.last_epoch) for share in schedule.lr_lambdas]
        for group, rate in zip(passed["optimizer"].param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
