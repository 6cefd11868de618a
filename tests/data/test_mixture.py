"""How many examples of each source an epoch has, and which ones."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockft.data.mixture import Mixture

WEIGHTS = st.floats(0.01, 5) | st.sampled_from([0.3, 0.5, 1.0, 2.0, 2.5])


def draw(mixture: Mixture, sources: list[int], epoch: int, seed: int = 0) -> list[int]:
    return mixture.draw(np.arange(len(sources)), np.array(sources), seed, epoch).tolist()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(0, 5), st.integers(0, 3))
def test_without_weights_an_epoch_holds_each_example_once_in_order(
    sources: list[int], epoch: int, seed: int
) -> None:
    mixture = Mixture(weights=(1.0, 1.0, 1.0))
    assert mixture.is_default
    assert draw(mixture, sources, epoch, seed) == list(range(len(sources)))


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.tuples(WEIGHTS, WEIGHTS, WEIGHTS),
    st.sampled_from([1.0, 2.0, 5.0]),
    st.sampled_from([None, 1, 4, 100]),
    st.integers(0, 3),
)
def test_examples_of_a_source_take_turns(
    sources: list[int],
    weights: tuple[float, float, float],
    temperature: float,
    max_examples: int | None,
    seed: int,
) -> None:
    mixture = Mixture(weights=weights, temperature=temperature, max_examples=max_examples)
    num_examples = [sources.count(source) for source in range(3)]
    expected = mixture.count_examples(num_examples)
    assert all((drawn > 0) == (number > 0) for drawn, number in zip(expected, num_examples, strict=True))
    times: Counter[int] = Counter()
    for epoch in range(7):
        drawn = draw(mixture, sources, epoch, seed)
        assert drawn == sorted(drawn)
        counts = Counter(sources[example] for example in drawn)
        assert [counts[source] for source in range(3)] == expected
        times.update(drawn)
        for source in range(3):
            of_source = [times[example] for example, other in enumerate(sources) if other == source]
            assert max(of_source, default=0) - min(of_source, default=0) <= 1


def test_a_fraction_is_another_one_in_each_epoch() -> None:
    """A weight of 0.3 of 10 examples: 3 examples each, and all of them after 10 epochs three times."""
    mixture = Mixture(weights=(0.3,))
    epochs = [draw(mixture, [0] * 10, epoch) for epoch in range(10)]
    assert all(len(epoch) == 3 for epoch in epochs)
    assert len({*epochs[0], *epochs[1], *epochs[2]}) == 9
    assert Counter(example for epoch in epochs for example in epoch) == dict.fromkeys(range(10), 3)
    half = Mixture(weights=(2.5,))
    first, second = (Counter(draw(half, [0] * 10, epoch)) for epoch in range(2))
    assert sorted(first.values()) == [2] * 5 + [3] * 5
    assert first + second == dict.fromkeys(range(10), 5)


def test_the_seed_decides_which_examples_are_drawn() -> None:
    mixture = Mixture(weights=(0.5, 0.5))
    sources = [0] * 20 + [1] * 20
    drawn = draw(mixture, sources, 0, seed=1)
    assert drawn == draw(mixture, sources, 0, seed=1) != draw(mixture, sources, 0, seed=2)
    # sources of the same size have orders of their own
    assert [example - 20 for example in drawn[10:]] != drawn[:10]


def test_the_temperature_brings_sizes_closer_together_and_keeps_their_sum() -> None:
    sizes = [100, 10_000]
    for temperature, expected in ((1.0, sizes), (2.0, [918, 9182]), (1e9, [5050, 5050])):
        counts = Mixture(weights=(1.0, 1.0), temperature=temperature).count_examples(sizes)
        assert counts == expected and sum(counts) == sum(sizes)
    assert Mixture(weights=(1.0, 0.5), temperature=2.0).count_examples(sizes) == [918, 4591]


def test_a_limit_applies_before_temperature_and_weight() -> None:
    assert Mixture(weights=(1.0, 2.0), max_examples=300).count_examples([100, 10_000]) == [100, 600]
    limited = Mixture(weights=(1.0, 1.0), temperature=1e9, max_examples=300)
    assert limited.count_examples([100, 10_000]) == [200, 200]
    assert not limited.is_default


@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_a_source_without_examples_gives_none(weight: float) -> None:
    mixture = Mixture(weights=(weight, weight), temperature=3.0)
    assert mixture.count_examples([0, 10]) == [0, round(weight * 10)]
    assert set(draw(mixture, [1] * 4, 0)) <= set(range(4))
