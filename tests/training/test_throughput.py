"""The speed of a run counts the tokens of its examples and not the padding."""

import time

import pytest

from blockft.training.throughput import Throughput
from tests.training.test_objectives import build_rows, make_examples


def test_the_tokens_of_batches_are_those_of_their_examples() -> None:
    examples = make_examples(12)
    rows = build_rows(examples, row_len=64, batch_rows=4, epochs=2)
    batch_tokens = rows.list_batch_tokens()
    assert len(batch_tokens) == len(rows) // 4 and sum(batch_tokens) == 2 * rows.num_tokens
    in_first_batch = sum(int((rows[index]["example_ids"] >= 0).sum()) for index in range(4))
    assert batch_tokens[0] == in_first_batch


def test_the_speed_is_that_of_the_steps_since_the_last_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    throughput = Throughput([100, 200, 300, 400])
    now = 2.0
    assert throughput.measure(2) == 150
    now = 100.0
    throughput.restart(2)  # an evaluation does not count
    now = 101.0
    assert throughput.measure(3) == 300
