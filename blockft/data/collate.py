"""A row's examples to the tensors of a micro-batch. Shapes: T tokens of the row, N predicted tokens."""

from collections.abc import Sequence

import numpy as np
import torch

from blockft.attention.layout import build_metadata
from blockft.data.encoder import IGNORE_INDEX, Example

LABEL_MULTIPLE = 256
"""N is a multiple of this, or compiled code would meet a new shape at each step."""


def collate_row(
    examples: Sequence[tuple[Example, str]],
    row_len: int,
    pad_id: int,
    *,
    reencoded: bool = True,
    with_full: bool = False,
) -> dict[str, torch.Tensor]:
    """A micro-batch of one row: the examples, each in its view, one after the other; see `build_metadata`.

    input_ids         (1, T)  and `position_ids`, `example_ids`, `block_ids`, `is_final`, all (1, T)
    labels            (1, T)  `IGNORE_INDEX` where nothing is predicted; for counting
    logits_to_keep    (N,)    the positions whose next token is a label
    shift_labels      (N,)    those labels

    Padded entries of the last two are position 0 and `IGNORE_INDEX`. A row without examples is all padding.

    `with_full` puts beside that where the tokens stand if all examples are in their full view:

    full_position_ids (1, T)  and `full_block_ids`, `full_is_final`
    is_block_mode     (N,)    whether a label's example is here in another view than that

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
        "a response starts a block"
    )
    padding = -len(labelled) % LABEL_MULTIPLE if len(labelled) else LABEL_MULTIPLE
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
    if with_full:
        full = build_metadata([example.layout.full() for example, _ in examples], row_len)
        is_other = [mode != "full" and example.has_local_blocks for example, mode in examples]
        of_labels = np.array(is_other, bool)[metadata.example_ids[0].numpy()[labelled]]
        row |= {
            "full_position_ids": full.position_ids,
            "full_block_ids": full.block_ids,
            "full_is_final": full.is_final,
            "is_block_mode": torch.from_numpy(np.pad(of_labels, (0, padding))),
        }
    return row
