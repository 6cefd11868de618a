"""Collator: turn the examples of a row into the tensors of a micro-batch.

Shapes: T tokens of the row, N labels of the row after padding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from blockft.attention.layout import Layout, build_metadata, token_indices
from blockft.data.encoder import IGNORE_INDEX, Example

LABEL_MULTIPLE = 256
"""N is a multiple of this, so that compiled code does not see a new shape at each step."""


MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "example_ids",
    "block_ids",
    "is_final",
    "is_copy",
    "logits_to_keep",
)
"""The tensors of a row that its forward pass takes."""


def pad_num_labels(num_labels: int) -> int:
    """Return N of a row with this number of labels: a multiple of `LABEL_MULTIPLE`, and at least one."""
    return -(-max(1, num_labels) // LABEL_MULTIPLE) * LABEL_MULTIPLE


def collate_row(
    examples: Sequence[tuple[Example, str]],
    row_len: int,
    pad_id: int,
    *,
    reencoded: bool = True,
    local_sees_first: bool = False,
    with_full: bool = False,
    groups: Sequence[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Build a micro-batch of one row from (example, mode) pairs, one after the other.

    ::

        input_ids         (1, T)  token ids, `pad_id` after the last example
        position_ids, example_ids, block_ids, is_final, is_copy
                          (1, T)  see `AttentionMetadata`
        labels            (1, T)  `IGNORE_INDEX` where no token is predicted; for counting
        logits_to_keep    (N,)    the positions whose next token is a label, padded with 0
        shift_labels      (N,)    the label of each of these positions, padded with `IGNORE_INDEX`

    `with_full` adds the row of the same examples in full mode, whose labels have the same order::

        full_input_ids, full_position_ids, full_example_ids, full_block_ids, full_is_final, full_is_copy
                          (1, T)
        full_logits_to_keep
                          (N,)
        is_block_mode     (N,)    whether the example of a label is in block mode and has local blocks

    `groups` gives each example a number, and adds::

        label_groups      (N,)    the number of the example of a label, padded with 0

    A row without examples consists of padding. `reencoded` is an option of `build_metadata`, and
    `local_sees_first` one of `Layout`. Copies of the first block have no labels.

    Raises:
        ValueError: the examples are longer than a row.
    """
    layouts = [example.layout_in_mode(mode, local_sees_first=local_sees_first) for example, mode in examples]
    metadata = build_metadata(layouts, row_len, reencoded=reencoded)
    input_ids_T, labels_T = _place_tokens([example for example, _ in examples], layouts, row_len, pad_id)
    labels_T[metadata.is_copy[0].numpy()] = IGNORE_INDEX
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
        "is_copy": metadata.is_copy,
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
        full = collate_row([(example, "full") for example, _ in examples], row_len, pad_id)
        assert torch.equal(full["shift_labels"], row["shift_labels"])
        example_is_block_mode = [mode != "full" and example.has_local_blocks for example, mode in examples]
        is_block_mode = np.array(example_is_block_mode, bool)[example_of_label]
        row |= {f"full_{name}": full[name] for name in MODEL_INPUTS}
        row["is_block_mode"] = torch.from_numpy(np.pad(is_block_mode, (0, padding)))
    return row


def _place_tokens(
    examples: Sequence[Example], layouts: Sequence[Layout], row_len: int, pad_id: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the token ids and the labels of a row; copies have the labels of the tokens that they copy."""
    input_ids_T = np.full(row_len, pad_id, np.int64)
    labels_T = np.full(row_len, IGNORE_INDEX, np.int64)
    if examples:
        indices = token_indices(layouts).numpy()
        input_ids_T[: len(indices)] = np.concatenate([example.input_ids for example in examples])[indices]
        labels_T[: len(indices)] = np.concatenate([example.labels for example in examples])[indices]
    return input_ids_T, labels_T
