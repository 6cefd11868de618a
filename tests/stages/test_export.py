"""What an export adds to the model of its run. `test_run.py` and `test_zero.py` test whole exports."""

import pytest
from transformers import GenerationConfig

from blockft.stages.export import add_end_tokens


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(None, [3, 5]), (3, [3, 5]), ([7, 3], [7, 3, 5]), ([5, 3], [5, 3])],
)
def test_plain_transformers_stops_at_all_tokens_that_end_an_answer(
    configured: int | list[int] | None, expected: list[int]
) -> None:
    config = GenerationConfig(eos_token_id=configured)
    add_end_tokens(config, {3, 5})
    assert config.eos_token_id == expected


def test_the_end_token_of_the_configuration_stays_as_it_is() -> None:
    config = GenerationConfig(eos_token_id=3)
    add_end_tokens(config, {3})
    assert config.eos_token_id == 3
