"""Collator: turn the examples of a row into the tensors of a micro-batch.

Shapes: T tokens of the row, N labels of the row after padding.
"""

from collections.abc import Sequence

import numpy as np
import torch

from blockft.attention.layout import build_metadata
from blockft.data.encoder import IGNORE_INDEX, Example

LABEL_MULTIPLE = 256
"""N is a multiple of this, so that compiled code does not see a new shape at each step."""


def pad_num_labels(num_labels: int) -> int:
    """Return N of a row with this number of labels: a multiple of `LABEL_MULTIPLE`, and at least one."""
    return -(-max(1, num_labels) // LABEL_MULTIPLE) * LABEL_MULTIPLE


def collate_row(
    examples: Sequence[tuple[Example, str]],
    row_len: int,
    pad_id: int,
    *,
    reencoded: bool = True,
    with_full: bool = False,
    groups: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Build a micro-batch of one row from (example, mode) pairs, one after the other.

    ::

        input_ids         (1, T)  token ids, `pad_id` after the last example
        position_ids, example_ids, block_ids, is_final
                          (1, T)  see `AttentionMetadata`
        labels            (1, T)  `IGNORE_INDEX` where no token is predicted; for counting
        logits_to_keep    (N,)    the positions whose next token is a label, padded with 0
        shift_labels      (N,)    the label of each of these positions, padded with `IGNORE_INDEX`

    `with_full` adds the metadata of the same row with all examples in full mode::

        full_position_ids, full_block_ids, full_is_final
                          (1, T)
        is_block_mode     (N,)    whether the example of a label is in block mode and has local blocks

    `groups` gives each example a number, and adds::

        label_groups      (N,)    the number of the example of a label, padded with 0

    A row without examples consists of padding. `reencoded` is an option of `build_metadata`.

    Raises:
        ValueError: the examples are longer than a row.
    """
    metadata = build_metadata(
        [example.layout_in_mode(mode) for example, mode in examples], row_len, reencoded=reencoded
    )
    input_ids_T = np.full(row_len, pad_id, np.int64)
    labels_T = np.full(row_len, IGNORE_INDEX, np.int64)
    num_tokens = sum(len(example) for example, _ in examples)
    if examples:
        input_ids_T[:num_tokens] = np.concatenate([example.input_ids for example, _ in examples])
        labels_T[:num_tokens] = np.concatenate([example.labels for example, _ in examples])
    labelled = np.flatnonzero(labels_T != IGNORE_INDEX)
    block_ids_T = metadata.block_ids[0].numpy()
    assert (labelled > 0).all() and (block_ids_T[labelled - 1] == block_ids_T[labelled]).all(), (
        "the first token of a block is a label"
    )
    padding = pad_num_labels(len(labelled)) - len(labelled)
    row = {
        "input_ids": torch.from_numpy(input_ids_T)[None],
        "position_ids": metadata.position_ids,
        "example_ids": metadata.example_ids,
        "block_ids": metadata.block_ids,
        "is_final": metadata.is_final,
        "labels": torch.from_numpy(labels_T)[None],
        "logits_to_keep": torch.from_numpy(np.pad(labelled - 1, (0, padding))),
        "shift_labels": torch.from_numpy(
            np.pad(labels_T[labelled], (0, padding), constant_values=IGNORE_INDEX)
        ),
    }
    example_of_label = metadata.example_ids[0].numpy()[labelled]
    if groups is not None:
        label_groups = np.array(groups, np.int64)[example_of_label]
        row["label_groups"] = torch.from_numpy(np.pad(label_groups, (0, padding)))
    if with_full:
        full = build_metadata([example.layout.full() for example, _ in examples], row_len)
        example_is_block_mode = [mode != "full" and example.has_local_blocks for example, mode in examples]
        is_block_mode = np.array(example_is_block_mode, bool)[example_of_label]
        row |= {
            "full_position_ids": full.position_ids,
            "full_block_ids": full.block_ids,
            "full_is_final": full.is_final,
            "is_block_mode": torch.from_numpy(np.pad(is_block_mode, (0, padding))),
        }
    return row
