import numpy as np
import pytest
import torch

from blockft.attention.layout import build_metadata
from blockft.data.collate import LABEL_MULTIPLE, collate_row
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
    for name in ("position_ids", "block_ids", "is_final"):
        assert torch.equal(row[f"full_{name}"], alone[name])
    assert torch.equal(row["example_ids"], alone["example_ids"])
    real = row["shift_labels"] != IGNORE_INDEX
    of_examples = row["example_ids"][0, row["logits_to_keep"][real]]
    assert torch.equal(row["is_block_mode"][real], of_examples == 2)
    assert of_examples.eq(2).any() and of_examples.lt(2).any()
    assert not row["is_block_mode"][~real].any()


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
