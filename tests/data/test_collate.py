import numpy as np
import pytest
import torch

from blockft.attention.layout import build_metadata
from blockft.data.collate import LABEL_MULTIPLE, MODEL_INPUTS, collate_row
from blockft.data.encoder import IGNORE_INDEX, Encoder, Example
from blockft.data.shared_context import merge_shared_contexts
from tests.data.toys import rag_sample


def test_a_row_holds_each_example_in_its_mode(encoder: Encoder) -> None:
    a, b = encoder.encode([rag_sample(), rag_sample("Which?", ("Other.",))])
    row = collate_row([(a, "block"), (b, "full")], 256, pad_id=7)
    expected = build_metadata([a.layout, b.layout.full()], 256)
    for name in ("position_ids", "example_ids", "block_ids", "is_final"):
        assert torch.equal(row[name], getattr(expected, name))
    both = [*a.input_ids.tolist(), *b.input_ids.tolist()]
    assert row["input_ids"][0].tolist() == both + [7] * (256 - len(both))
    assert all(row[name].shape == (1, 256) for name in ("input_ids", "labels"))


def test_positions_of_local_blocks_may_start_at_0(encoder: Encoder) -> None:
    a, b = encoder.encode([rag_sample(), rag_sample("Which?", ("Other.",))])
    row = collate_row([(a, "block"), (b, "full")], 256, pad_id=7, reencoded=False)
    expected = build_metadata([a.layout, b.layout.full()], 256, reencoded=False)
    assert torch.equal(row["position_ids"], expected.position_ids)
    assert not torch.equal(row["position_ids"], build_metadata([a.layout, b.layout.full()], 256).position_ids)


@pytest.mark.parametrize("reencoded", [True, False])
def test_metadata_of_full_mode_can_be_added(encoder: Encoder, reencoded: bool) -> None:
    a, b, *more = merge_shared_contexts(
        iter(encoder.encode([rag_sample(), rag_sample("Hm?"), rag_sample("Hm?", ())])), 256
    )
    assert a.num_final == 2 and not more
    chosen = [(a, "full"), (b, "full"), (a, "block")]
    row = collate_row(chosen, 256, pad_id=0, reencoded=reencoded, with_full=True)
    alone = collate_row([(example, "full") for example, _ in chosen], 256, pad_id=0)
    for name in MODEL_INPUTS:
        assert torch.equal(row[f"full_{name}"], alone[name])
    assert torch.equal(row["example_ids"], alone["example_ids"])
    assert torch.equal(row["shift_labels"], alone["shift_labels"])
    real = row["shift_labels"] != IGNORE_INDEX
    of_examples = row["example_ids"][0, row["logits_to_keep"][real]]
    assert torch.equal(row["is_block_mode"][real], of_examples == 2)
    assert of_examples.eq(2).any() and of_examples.lt(2).any()
    assert not row["is_block_mode"][~real].any()


def test_a_row_holds_copies_of_the_first_block_without_labels(encoder: Encoder) -> None:
    a, b = encoder.encode([rag_sample(), rag_sample("Which?", ("Other.",))])
    row = collate_row([(a, "block"), (b, "full"), (b, "block")], 256, pad_id=7, local_sees_first=True)
    ids: list[int] = []
    is_copy: list[bool] = []
    labels: list[int] = []
    for example, mode in ((a, "block"), (b, "full"), (b, "block")):
        own = np.split(example.labels, np.cumsum(example.block_lengths)[:-1])
        for number, (block, block_labels) in enumerate(zip(example.blocks, own, strict=True)):
            if mode == "block" and 0 < number < len(own) - 1:
                ids += example.blocks[0].tolist()
                is_copy += [True] * len(example.blocks[0])
                labels += [IGNORE_INDEX] * len(example.blocks[0])
            ids += block.tolist()
            is_copy += [False] * len(block)
            labels += block_labels.tolist()
    padding = 256 - len(ids)
    assert row["input_ids"][0].tolist() == ids + [7] * padding
    assert row["is_copy"][0].tolist() == is_copy + [False] * padding and any(is_copy)
    assert row["labels"][0].tolist() == labels + [IGNORE_INDEX] * padding
    plain = collate_row([(a, "block"), (b, "full"), (b, "block")], 256, pad_id=7)
    assert torch.equal(row["shift_labels"], plain["shift_labels"])
    real = ~row["is_copy"][0] & (row["example_ids"][0] >= 0)
    for name in ("input_ids", "position_ids", "example_ids", "is_final", "labels"):
        assert torch.equal(row[name][0, real], plain[name][0, : int(real.sum())])


def test_a_row_in_full_mode_can_be_added_to_a_row_with_copies(encoder: Encoder) -> None:
    a, b = encoder.encode([rag_sample(), rag_sample("Which?", ("Other.",))])
    chosen = [(a, "block"), (b, "full")]
    row = collate_row(chosen, 256, pad_id=0, local_sees_first=True, with_full=True)
    alone = collate_row([(a, "full"), (b, "full")], 256, pad_id=0)
    assert row["is_copy"].any()
    for name in MODEL_INPUTS:
        assert torch.equal(row[f"full_{name}"], alone[name])
    real = row["shift_labels"] != IGNORE_INDEX
    label_ids = row["full_input_ids"][0, row["full_logits_to_keep"][real] + 1]
    assert torch.equal(label_ids, row["shift_labels"][real])


def test_logits_to_keep_are_the_positions_before_the_labels(encoder: Encoder) -> None:
    examples = encoder.encode([rag_sample(), rag_sample("Hm?"), rag_sample("Hm?", ())])
    a, b = merge_shared_contexts(iter(examples), 256)
    row = collate_row([(a, "block"), (b, "full")], 256, pad_id=0)
    real = row["shift_labels"] != IGNORE_INDEX
    assert int(real.sum()) == int((row["labels"] != IGNORE_INDEX).sum()) > 0
    kept = row["logits_to_keep"][real]
    assert torch.equal(row["labels"][0, kept + 1], row["shift_labels"][real])
    assert torch.equal(row["block_ids"][0, kept], row["block_ids"][0, kept + 1])
    assert row["is_final"][0, kept].all()
    assert row["logits_to_keep"][~real].eq(0).all()


def test_the_number_of_logits_to_keep_is_a_multiple() -> None:
    for num_labels in (1, LABEL_MULTIPLE, LABEL_MULTIPLE + 1):
        ids = np.arange(num_labels + 1, dtype=np.int32)
        example = Example(input_ids=ids, label_spans=((1, len(ids)),), block_lengths=(len(ids),))
        row = collate_row([(example, "full")], 1024, pad_id=0)
        assert (
            row["logits_to_keep"].shape
            == row["shift_labels"].shape
            == (-(-num_labels // LABEL_MULTIPLE) * LABEL_MULTIPLE,)
        )


def test_an_empty_row_is_padding_without_labels() -> None:
    row = collate_row([], 64, pad_id=3)
    assert row["input_ids"].eq(3).all() and row["example_ids"].eq(-1).all()
    assert row["labels"].eq(IGNORE_INDEX).all() and row["shift_labels"].eq(IGNORE_INDEX).all()
    assert row["shift_labels"].shape == row["logits_to_keep"].shape == (LABEL_MULTIPLE,)


def test_the_first_token_of_a_block_is_never_a_label() -> None:
    ids = np.array([1, 2, 3], np.int32)
    example = Example(input_ids=ids, label_spans=((1, 2),), block_lengths=(1, 2))
    with pytest.raises(AssertionError, match="the first token of a block is a label"):
        collate_row([(example, "block")], 8, pad_id=0)


def test_examples_longer_than_a_row_are_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        collate_row([(encoder.encode([rag_sample()])[0], "block")], 8, pad_id=0)
