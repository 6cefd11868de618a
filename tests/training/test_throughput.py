"""The speed of a run counts the tokens of its examples and not the padding."""

import time

import pytest

from blockft.training.throughput import Speed, Throughput
from tests.training.test_objectives import build_rows, make_examples


class Clock:
    """The time that `time.monotonic` returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_tokens_of_batches_are_those_of_their_examples() -> None:
    examples = make_examples(12)
    rows = build_rows(examples, row_len=64, batch_rows=4, epochs=2)
    batch_tokens = rows.list_batch_tokens()
    assert len(batch_tokens) == len(rows) // 4 and sum(batch_tokens) == 2 * rows.num_tokens
    in_first_batch = sum(int((rows[index]["example_ids"] >= 0).sum()) for index in range(4))
    assert batch_tokens[0] == in_first_batch


def test_the_speed_is_that_of_the_steps_since_the_last_measurement(clock: Clock) -> None:
    throughput = Throughput([100, 200, 300, 400], [10.0, 20.0, 30.0, 40.0], peak_flops=60.0)
    clock.now = 2.0
    assert throughput.measure(2) == Speed(150, 0.25)
    clock.now = 100.0
    throughput.restart(2)  # an evaluation does not count
    clock.now = 101.0
    with throughput.paused():  # neither do sample answers
        clock.now = 200.0
    clock.now = 201.0
    assert throughput.measure(3) == Speed(150, 0.25)


def test_the_mean_speed_leaves_out_the_first_interval_if_there_are_others(clock: Clock) -> None:
    throughput = Throughput([100, 100, 300, 600], [1.0] * 4, peak_flops=None)
    assert throughput.mean() is None
    clock.now = 50.0  # layers are compiled
    throughput.measure(1)
    assert throughput.mean() == Speed(2, None)
    clock.now = 51.0
    throughput.measure(2)
    clock.now = 54.0
    throughput.measure(4)
    assert throughput.mean() == Speed(250, None)


def test_the_time_left_counts_the_steps_of_this_process(clock: Clock) -> None:
    throughput = Throughput([1] * 10, [1.0] * 10, peak_flops=None)
    clock.now = 7.0
    throughput.begin(4)
    clock.now = 13.0
    throughput.restart(6)  # the time of evaluation and saving is part of the time left
    assert throughput.seconds_left(6, 10) == 12
