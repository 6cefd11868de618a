"""Users that share a cache: a block never depends on who caused its computation, or beside what.

Some tests compare stored files byte by byte. Blocks of one forward pass share its matrix products, whose size
may change rounding: there, the other blocks keep their lengths and change every token.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from blockft.errors import UserError
from blockft.inference.block_key import BlockKey, block_key, key_digest, num_tokens
from blockft.inference.cache_entry import SUFFIX
from blockft.inference.rotate_keys import prefill_blocks
from blockft.inference.runner import CacheOptions, Rotate
from tests.inference.engines import MIB, ROTATE, keep_only_disk, load_engine, make_engine, options
from tests.tiny import CONFIGS, build_model

SHARED = [{"title": f"T{i}", "text": f"shared document {i} says {i * 7}."} for i in range(3)]


def private(user: str, num: int) -> list[dict[str, str]]:
    """Documents of one user; those of another user have the same lengths."""
    return [{"title": user, "text": f"{user * 5} secret {user}{i}"} for i in range(num)]


def stored(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every stored block by file name."""
    return {path.name: path.read_bytes() for path in folder.rglob(f"*{SUFFIX}")}


def keys_of(engine: Any, documents: Sequence[dict[str, str]]) -> list[BlockKey]:
    return list(engine.document_keys(documents))


@pytest.mark.parametrize("rotate", ROTATE)
def test_stored_bytes_do_not_depend_on_the_user_that_caused_them(
    toy_model: Path, tmp_path: Path, rotate: Rotate
) -> None:
    """Two users ask different questions beside other documents of the same lengths, in batches and alone."""
    files = []
    for user, other in (("a", "b"), ("x", "y")):
        folder = tmp_path / user
        with load_engine(toy_model, rotate, options(folder)) as engine:
            documents = [*private(user, 2), *SHARED]
            batch = [
                {"documents": documents, "question": f"What does {user} ask?"},
                {"documents": [*private(other, 1), SHARED[0]], "question": f"{other}?"},
            ]
            engine.generate_batch(batch, max_new_tokens=2 + len(files))
        files.append(stored(folder))
    first, second = files
    common = first.keys() & second.keys()
    assert len(first) == len(second) == len(common) + 3  # each user has three documents of their own
    assert len(common) > len(SHARED)
    assert all(first[name] == second[name] for name in common)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[tuple[int, ...]]]:
    """The lengths of the blocks that shared a forward pass with a block, by the block's digest."""
    lengths_by_digest: dict[str, set[tuple[int, ...]]] = {}

    def record(model: Any, keys: Iterable[BlockKey]) -> Iterator[tuple[BlockKey, torch.Tensor]]:
        group = list(keys)
        for key in group:
            lengths_by_digest.setdefault(key_digest(key), set()).add(tuple(map(num_tokens, group)))
        return prefill_blocks(model, group)

    monkeypatch.setattr("blockft.inference.runner.prefill_blocks", record)
    return lengths_by_digest


@pytest.mark.parametrize("rotate", ROTATE)
def test_a_block_does_not_depend_on_its_request(
    toy_model: Path, tmp_path: Path, rotate: Rotate, passes: dict[str, set[tuple[int, ...]]]
) -> None:
    """Its bytes are equal in any order, mode and tier, after evictions, in passes of equal lengths."""
    reference: dict[Any, tuple[int, bytes]] = {}
    rng, num_compared = random.Random(0), 0
    for trial in range(6):
        folder = tmp_path / str(trial)
        budgets: list[dict[str, int]] = [{}, {"host": 0}, {"disk": 40_000}]
        cache = options(folder, **budgets[trial % 3])
        passes.clear()
        with load_engine(toy_model, rotate, cache) as engine:
            engine.generate(documents=[], question="warm", max_new_tokens=1)  # stores the instruction
            for document in rng.sample(SHARED, len(SHARED)):
                others = private(chr(ord("a") + trial), rng.randrange(3))
                for other in others:
                    engine.generate(documents=[other], question="?", max_new_tokens=1)
                documents = rng.sample([*others, document], len(others) + 1)
                question = "long question " * rng.randrange(1, 9)
                mode = rng.choice(["block", "full"])
                engine.generate(documents=documents, question=question, mode=mode, max_new_tokens=3)
                engine.generate(documents=[document], question=question, max_new_tokens=1)
                if rng.random() < 0.5:
                    keep_only_disk(engine)
                engine.flush()
                for name, content in stored(folder).items():
                    # when a block is evicted depends on the moment, and with it what is computed together
                    if len(lengths := passes[name.removesuffix(SUFFIX)]) == 1:
                        known_trial, known = reference.setdefault((name, *lengths), (trial, content))
                        num_compared += known_trial != trial
                        assert known == content
    assert num_compared > 20


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5))
def test_the_tokens_of_other_blocks_do_not_change_a_bit(name: str, seed: int, lengths: list[int]) -> None:
    """Neither in the same pass nor by their order; the number of their tokens may change rounding alone."""
    rng, model = random.Random(seed), build_model(name, "block_cached")

    def block(length: int) -> BlockKey:
        return block_key([rng.randrange(1, 97) for _ in range(length)])

    shared, place = block(rng.randrange(1, 40)), rng.randrange(len(lengths) + 1)
    alone = dict(prefill_blocks(model, [shared]))[shared]
    results = []
    for _ in range(2):
        group = [block(length) for length in lengths]
        assume(shared not in group)  # equal blocks are computed once, which changes the number of tokens
        group.insert(place, shared)
        results.append(dict(prefill_blocks(model, group))[shared])
    assert torch.equal(results[0], results[1])
    assert_close(results[0], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_block_that_overflows_is_refused_and_changes_no_other_block(position: int) -> None:
    model = build_model("llama", "block_cached")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    good = [block_key([8, 9, 10]), block_key([11, 12])]
    expected = dict(prefill_blocks(model, good[:1])) | dict(prefill_blocks(model, good[1:]))
    group = list(good)
    group.insert(position, block_key([5, 6, 7]))
    found = {}
    with pytest.raises(UserError, match=r"not finite for 1 block of the prompts \(the first has 3 tokens\)"):
        for key, kv in prefill_blocks(model, group):
            found[key] = kv
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in good)


@pytest.mark.parametrize("rotate", ROTATE)
def test_a_block_that_overflows_is_stored_in_no_tier(tmp_path: Path, rotate: Rotate) -> None:
    model = build_model("llama", "block_cached")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    cache = CacheOptions(folder=tmp_path, host_bytes=MIB, device_bytes=MIB)
    with make_engine(model, rotate, cache) as engine:
        prompt = [[8, 9, 10], [5, 6], [11, 12], [13]]
        with pytest.raises(UserError, match="not finite"):
            engine.generate_ids([prompt], max_new_tokens=2)
        answer = engine.generate_ids([[prompt[0], prompt[2], prompt[3]]], max_new_tokens=2)[0]
        assert answer.ids
        engine.flush()
        assert len(stored(tmp_path)) == 2
