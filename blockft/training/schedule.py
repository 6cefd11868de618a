"""Going on under a schedule that is not the checkpoint's."""

from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RecipeSchedule(TrainerCallback):
    """A run that goes on has the learning rate that its recipe gives the step, from the first step on.

    A checkpoint brings back the rate and the schedule with which it was written: a lower rate in the recipe
    would do nothing, and a run that is made longer would begin at the end of the shorter one's curve.
    Schedules that go by more than the step (`reduce_lr_on_plateau`) stay the checkpoint's.
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
