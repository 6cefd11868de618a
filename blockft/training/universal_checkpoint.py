"""Going on with another number of processes: a checkpoint's shards, cut anew by DeepSpeed."""

import shutil
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

UNIVERSAL = ".universal"
"""The folder of a run that holds the checkpoint while it is being resumed from."""

LOAD_UNIVERSAL = {"checkpoint": {"load_universal": True}}
"""What DeepSpeed's settings have to say for such a checkpoint."""


def convert_to_universal(checkpoint: Path) -> Path:
    """A folder beside the checkpoint that stands for it: the same files, the shards in universal form.

    It needs as much disk as the checkpoint; `remove` it when the run has read it.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder = checkpoint.parent / UNIVERSAL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    for path in checkpoint.iterdir():
        if path.name not in (tag, "latest"):
            (folder / path.name).symlink_to(path.resolve())
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    with redirect_stdout(sys.stderr):
        ds_to_universal.main(
            Namespace(
                input_folder=str(checkpoint / tag),
                output_folder=str(folder / f"{tag}_universal"),
                # transformers saves nothing about how parameters are patterned; without it ZeRO 1 and 2 stop
                inject_missing_state=True,
                **options,
            )
        )
    return folder


class SeparateAdamStepsCallback(TrainerCallback):
    """Gives each of Adam's states a step counter of its own when a run begins.

    Reading a universal checkpoint under ZeRO-3, DeepSpeed lets parameter groups share one tensor, which then
    counts a step per group.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **passed: Any
    ) -> None:
        optimizer = passed["optimizer"]
        while hasattr(optimizer, "optimizer"):  # wrapped by accelerate and by DeepSpeed
            optimizer = optimizer.optimizer
        for adam in optimizer.state.values():
            if torch.is_tensor(adam.get("step")):
                adam["step"] = adam["step"].clone()


def remove(run: Path) -> None:
    """Delete what `convert` wrote, or what a run that was killed left of it."""
    shutil.rmtree(run / UNIVERSAL, ignore_errors=True)
