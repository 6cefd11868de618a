"""Learning rate schedules: check the recipe's schedule, and resume with a changed schedule."""

import math
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

from blockft.errors import UserError, list_allowed
from blockft.inputs import shorten
from blockft.training.library_internals import set_base_learning_rate

UNSUPPORTED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that depend on evaluation results and not only on the step."""


_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")
"""Schedules to which transformers passes no further arguments."""


def check_schedule(
    name: str, settings: dict[str, Any], *, learning_rate: float, warmup_steps: int, num_steps: int
) -> None:
    """Check a schedule by building it and following its rate, for an optimizer with a dummy parameter.

    Raises:
        UserError: the Trainer has no schedule of this name that depends only on the step, or the schedule
            does not accept the settings, or one of its rates is negative or above the peak.
    """
    allowed = [kind.value for kind in SchedulerType if kind.value not in UNSUPPORTED_SCHEDULES]
    if name not in allowed:
        raise UserError(f"train.lr_scheduler_type is {name!r} ({list_allowed(name, allowed)})")
    given = f"train.lr_scheduler_kwargs {shorten(str(settings))} do not fit train.lr_scheduler_type {name}"
    if settings and name in _WITHOUT_ARGUMENTS:
        raise UserError(f"{given}, which takes no arguments: leave them out")
    if negative := [
        key for key, value in settings.items() if str(key).startswith("num_") and not _is_count(value)
    ]:
        raise UserError(f"{given}: {negative[0]} should be a number of at least 0")
    # AdamW, because schedules read the rate that the optimizer was made with
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, warmup_steps, num_steps, settings)
        # the first, the last and some steps between them
        for step in {0, 1, warmup_steps, num_steps // 2, num_steps - 1, num_steps}:
            rate = [base * factor(step) for base, factor in _rates(schedule)]
            if not all(0 <= value <= learning_rate * (1 + 1e-6) for value in rate):
                raise ValueError(
                    f"the learning rate of step {step} would be {rate[0]}, it should be 0 to {learning_rate}"
                )
    # the arguments go to functions of transformers, which do not check them
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError, AssertionError) as error:
        raise UserError(f"{given}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _rates(schedule: Any) -> list[tuple[float, Any]]:
    """Return the base rate of every parameter group and the function of the step that it is multiplied by."""
    if not isinstance(schedule, LambdaLR):
        return []
    base_rates: list[Any] = schedule.base_lrs
    return list(zip(base_rates, schedule.lr_lambdas, strict=True))


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
