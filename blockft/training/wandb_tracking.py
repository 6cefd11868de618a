"""Report a run to Weights & Biases, in addition to the metrics that transformers logs."""

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def set_default_project(name: str) -> None:
    """Make `name` the wandb project unless WANDB_PROJECT names another one."""
    os.environ.setdefault("WANDB_PROJECT", name)


class WandbConfigCallback(TrainerCallback):
    """Adds the resolved recipe and the manifest of the data to the config of the wandb run.

    It must come after transformers' WandbCallback, which starts the wandb run.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            import wandb

            wandb.config.update(self._config, allow_val_change=True)


def finish_wandb_run(loss_plot: Path, step: int) -> None:
    """Log the loss plot as an image and end the wandb run."""
    import wandb

    wandb.log({"loss plot": wandb.Image(str(loss_plot)), "train/global_step": step})
    wandb.finish()
