"""The plan of a run: its rows and steps, how they are computed, and its run signature."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedModel

from blockft.data.mixture import Mixture
from blockft.data.prepared import ExampleColumns
from blockft.errors import UserError
from blockft.model.checkpoint import read_marker
from blockft.training.deepspeed_config import zero_stage
from blockft.training.row_dataset import RowDataset
from blockft.units import format_count

NUM_PROCESSES = "number of processes"
"""Entry of a run signature, the only one in which a resumed run may differ."""

ZERO_STAGE = "ZeRO stage"
"""Entry of a run signature."""

QUANTIZATION = "model.quantization"
"""Entry of a run signature."""

OPTIMIZER = "train.optimizer"
"""Entry of a run signature."""

WEIGHT_DTYPE = "dtype of the weights"
"""Entry of a run signature."""

SMALLEST_FLEX_HEAD = 16
"""FlexAttention's smallest attention head on a GPU, in dimensions."""

TEACHER_FINGERPRINT = "fingerprint of train.teacher"
"""Entry of a run signature that is known only after the teacher was loaded."""

BASE_WEIGHTS = "digest of the weights of model.path"
"""Entry of the run signature of an adapter, whose checkpoints do not hold the weights of its base model."""


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run.

    model          the model on the meta device, with its adapter
    num_parameters the parameters of the model without the adapter
    rows           the rows of all epochs
    eval_rows      the held-out rows by mode
    batch_flops    the model arithmetic of each batch
    num_steps      optimizer steps
    manifest       of the prepared data
    mixture        how often the examples of each source occur in an epoch
    on_gpu         whether the run is planned for GPUs
    backend        the attention backend: sdpa or flex
    compiles       whether layers are compiled
    dtype          of weights and activations
    deepspeed      the DeepSpeed config
    run_signature  values that a resumed run must match; the keys appear in error messages
    """

    model: PreTrainedModel | PeftModel
    num_parameters: int
    rows: RowDataset
    eval_rows: dict[str, RowDataset]
    batch_flops: NDArray[np.float64]
    num_steps: int
    manifest: dict[str, Any]
    mixture: Mixture
    on_gpu: bool
    backend: str
    compiles: bool
    dtype: torch.dtype
    deepspeed: dict[str, Any]
    run_signature: dict[str, Any]

    @property
    def zero_stage(self) -> int:
        return zero_stage(self.deepspeed)

    @property
    def num_processes(self) -> int:
        return int(self.run_signature[NUM_PROCESSES])

    @property
    def shares_products(self) -> bool:
        """Whether adapters share products, see `share_products`; under ZeRO-3 that is not tested."""
        return self.on_gpu and self.zero_stage < 3


def choose_backend(backend: str, *, on_gpu: bool, head_size: int) -> str:
    """Return the attention backend of training; `auto` is flex where it can be, and otherwise sdpa.

    Raises:
        UserError: flex on a CPU, or for small heads.
    """
    if backend == "flex" and not on_gpu:
        raise UserError("model.attention=flex needs a GPU: FlexAttention has no backward pass on a CPU")
    if backend == "flex" and head_size < SMALLEST_FLEX_HEAD:
        raise UserError(
            f"model.attention=flex needs heads of at least {SMALLEST_FLEX_HEAD} dimensions, and the model's "
            f"heads have {head_size}: take sdpa"
        )
    if backend == "auto":
        return "flex" if on_gpu and head_size >= SMALLEST_FLEX_HEAD else "sdpa"
    return backend


def default_dtype(*, on_gpu: bool) -> torch.dtype:
    """Return the dtype of `model.dtype=auto`: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if on_gpu else torch.float32


def hold_out_examples(
    columns: ExampleColumns, num_held_out: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the examples to train on and of the held-out ones, both in order.

    Only examples that split into blocks are held out, because the modes of others do not differ.

    Raises:
        UserError: fewer than `num_held_out` + 1 examples split into blocks.
    """
    is_held_out = np.zeros(len(columns.lengths), bool)
    candidates = np.flatnonzero(columns.has_local_blocks).tolist() if num_held_out else []
    if num_held_out and num_held_out >= len(candidates):
        raise UserError(
            f"train.num_eval_examples is {num_held_out}, but the data holds only "
            f"{format_count(len(candidates), 'example')} split into blocks: hold out fewer"
        )
    is_held_out[random.Random(f"{seed}:held out").sample(candidates, num_held_out)] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def describe_architecture(config: Any) -> dict[str, Any]:
    """Return the entries of a model's config that decide which weights fit it."""
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {name: getattr(config, name) for name in (*names, "num_attention_heads", "num_key_value_heads")}


def check_run_signature(
    checkpoint: Path, run_signature: Mapping[str, Any], ignore: Sequence[str] = (NUM_PROCESSES,)
) -> None:
    """Check that a checkpoint belongs to the run that is to be resumed.

    Raises:
        UserError: the signatures differ in an entry that is not in `ignore`.
    """
    found = read_marker(checkpoint)["run_signature"]
    for name in dict.fromkeys((*found, *run_signature)):
        if found.get(name) != run_signature.get(name) and name not in ignore:
            raise UserError(
                f"{checkpoint} was trained with {name} = {found.get(name)}, but this recipe gives "
                f"{run_signature.get(name)}: resume with the recipe that the run was started with, or "
                "start a new run"
            )
