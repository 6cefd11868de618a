"""The time that it takes to plan a run over many prepared examples, for `blockft bench prepare`."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from blockft.data.advice import RowFill
from blockft.data.encoder import Example
from blockft.data.prepared import (
    SHARD_SAMPLES,
    build_shard_batch,
    finish_folder,
    open_verified,
    verify_prepared,
    write_shard,
)
from blockft.training.plan import hold_out_examples
from blockft.training.row_dataset import RowDataset

ROW_LEN = 4096
MEAN_LEN, LEN_DEVIATION = 800, 250
"""Number of tokens of an example: mean and standard deviation."""

NUM_HELD_OUT = 200
BATCH_ROWS = 64


def measure_planning(num_examples: int = 100_000, *, num_epochs: int = 3) -> dict[str, Any]:
    """Measure how long a run over synthetic prepared examples in both modes takes to plan.

    Returns:
        `digest_seconds` for checking the files of the folder; `seconds` for opening it, holding out examples
        and planning all rows; and what was planned.
    """
    with tempfile.TemporaryDirectory(prefix="blockft-planning-") as temporary:
        folder = Path(temporary)
        _write_examples(folder, num_examples)
        start = time.perf_counter()
        manifest = verify_prepared(folder)
        verified = time.perf_counter()
        examples = open_verified(folder, manifest).examples
        training, held_out = hold_out_examples(examples.columns, min(NUM_HELD_OUT, num_examples // 2), seed=0)
        rows = RowDataset(
            examples,
            examples.columns,
            training,
            ["block", "full"],
            row_len=ROW_LEN,
            batch_rows=BATCH_ROWS,
            epochs=num_epochs,
            seed=0,
            pad_id=0,
        )
        batch_tokens = rows.list_batch_tokens()
        planned = time.perf_counter()
    epoch = rows.epochs[0]
    return {
        "examples": num_examples,
        "held_out": len(held_out),
        "epochs": num_epochs,
        "rows": len(rows),
        "tokens": sum(batch_tokens),
        "fill": RowFill.of_rows(epoch.rows, epoch.lengths, ROW_LEN).fill,
        "digest_seconds": verified - start,
        "seconds": planned - verified,
    }


def _write_examples(folder: Path, num_examples: int) -> None:
    """Write a prepared folder of examples that consist of a local and a final block, without samples."""
    rng = np.random.default_rng(0)
    lengths = rng.normal(MEAN_LEN, LEN_DEVIATION, num_examples).clip(64, ROW_LEN).astype(int).tolist()
    ids = np.arange(ROW_LEN, dtype=np.int32)
    starts = range(0, num_examples, SHARD_SAMPLES)
    for number, start in enumerate(starts):
        examples = [
            Example(
                input_ids=ids[:length],
                label_spans=((length - 8, length),),
                block_lengths=(length - 32, 32),
                sample_ids=(f"example-{index}",),
            )
            for index, length in enumerate(lengths[start : start + SHARD_SAMPLES], start)
        ]
        write_shard(folder, number, [build_shard_batch([], examples)])
    finish_folder(folder, {"sources": [{"shards": len(starts)}]})
