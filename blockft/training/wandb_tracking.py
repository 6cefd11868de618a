"""Report a run to Weights & Biases, in addition to the metrics that transformers logs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def start_wandb_run(run: Path, *, project: str, name: str) -> None:
    """Start the wandb run, which transformers' callback then uses; its files go into the run's folder.

    WANDB_PROJECT and WANDB_DIR name another project and another folder. A run that the user has started is
    used as it is.
    """
    import wandb

    if wandb.run is None:
        # wandb ignores variables that are set after its settings were read
        project, folder = os.environ.get("WANDB_PROJECT", project), os.environ.get("WANDB_DIR", str(run))
        wandb.init(project=project, name=name, dir=folder)


ANSWER_COLUMNS = (
    "step",
    "sample_id",
    "source",
    "mode",
    "question",
    "expected",
    "answer",
    "ended",
    "repeated",
)
"""The columns of the table of sample answers."""


class WandbConfigCallback(TrainerCallback):
    """Adds the resolved recipe and the manifest of the data to the config of the wandb run.

    It must come after transformers' WandbCallback, which writes its own config.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            import wandb

            wandb.config.update(self._config, allow_val_change=True)


def log_sample_answers(records: Sequence[Mapping[str, Any]], step: int) -> None:
    """Log all sample answers of the run until now as a table, see `SampleAnswers.describe`."""
    import wandb

    table = wandb.Table(
        columns=list(ANSWER_COLUMNS),
        data=[[record[name] for name in ANSWER_COLUMNS] for record in records],
    )
    wandb.log({"sample answers": table, "train/global_step": step})


def finish_wandb_run(loss_plot: Path, step: int) -> None:
    """Log the loss plot as an image and end the wandb run."""
    import wandb

    wandb.log({"loss plot": wandb.Image(str(loss_plot)), "train/global_step": step})
    wandb.finish()
