"""Answers are right and report their sources, whatever tier blocks come from and whatever fails."""

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import blockft.inference.runner as runner_module
from blockft.errors import UserError
from blockft.inference.answer import Answer
from blockft.inference.cache_folder import CacheFolder
from blockft.inference.engine import Engine
from blockft.inference.rotate_queries import QueryRotationRunner
from blockft.inference.runner import CacheOptions, Rotate
from tests.inference.engines import ROTATE, Prompt, greedy, keep_only_disk, load_engine, make_engine, options
from tests.inference.test_rotate_keys import keys_of
from tests.run import save_model

NUM_NEW = 5


def random_prompt(seed: int, *lengths: int) -> Prompt:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for length in lengths]


PROMPT = random_prompt(1, 9, 14, 3, 20, 6)
LARGER = [*random_prompt(2, 30, 25), *PROMPT]
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4


def ask(engine: Engine, prompt: Prompt = PROMPT) -> Answer:
    return engine.generate_ids([prompt], max_new_tokens=NUM_NEW)[0]


def damage_entries(folder: Path) -> int:
    """Flip the last bit of every entry, which is found when the last layer is read. Return their number."""
    paths = [entry.path for entry in CacheFolder(folder).entries()]
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    return len(paths)


@pytest.fixture(scope="module")
def expected_by_prompt(toy_model: Path) -> dict[str, tuple[int, ...]]:
    model = load_engine(toy_model).model
    return {"prompt": greedy(model, PROMPT, NUM_NEW), "larger": greedy(model, LARGER, NUM_NEW)}


@pytest.fixture
def expected_ids(expected_by_prompt: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    return expected_by_prompt["prompt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, logger="blockft.cache"):
        yield caplog


@pytest.fixture(params=ROTATE)
def rotate(request: pytest.FixtureRequest) -> Rotate:
    return request.param


def test_every_answer_reports_the_source_of_its_blocks(
    toy_model: Path, folder: Path, rotate: Rotate, expected_ids: tuple[int, ...]
) -> None:
    engine = load_engine(toy_model, rotate, options(folder))
    nearest = "device" if rotate == "queries" else "host"
    answers = [ask(engine), ask(engine)]
    if rotate == "queries":
        assert engine.runner.block_cache.device is not None
        engine.runner.block_cache.device.clear()
        answers.append(ask(engine))
    keep_only_disk(engine)
    answers += [ask(engine), ask(engine)]
    sources = ["computed", nearest, *(["host"] if rotate == "queries" else []), "disk", nearest]
    assert [answer.sources for answer in answers] == [{source: 4} for source in sources]
    for answer, source in zip(answers, sources, strict=True):
        reused = 0 if source == "computed" else 4
        assert answer.ids == expected_ids
        assert (answer.blocks_reused, answer.tokens_reused) == (reused, 46 if reused else 0)
        assert (answer.num_blocks, answer.prompt_tokens) == (5, 52)
        assert answer.ttft_ms > 0 and (answer.tokens_per_s or 0) > 0


def test_an_engine_finds_the_blocks_that_another_one_wrote(
    toy_model: Path, folder: Path, expected_ids: tuple[int, ...]
) -> None:
    for rotate in ROTATE:  # both attention paths read and write the same entries
        shutil.rmtree(folder, ignore_errors=True)
        writer = load_engine(toy_model, rotate, options(folder))
        ask(writer)
        writer.flush()
        for reader in ROTATE:
            answer = ask(load_engine(toy_model, reader, options(folder)))
            assert answer.sources == {"disk": 4} and answer.ids == expected_ids


def test_found_blocks_and_computed_blocks_are_combined(
    toy_model: Path, rotate: Rotate, expected_by_prompt: dict[str, tuple[int, ...]]
) -> None:
    engine = load_engine(toy_model, rotate)
    assert ask(engine).ids == expected_by_prompt["prompt"]
    answer = ask(engine, LARGER)
    assert answer.ids == expected_by_prompt["larger"]
    assert answer.sources == {"computed": 2, "device" if rotate == "queries" else "host": 4}
    assert ask(engine, [PROMPT[1], PROMPT[0], PROMPT[1], *PROMPT[-1:]]).blocks_reused == 3


def test_prompts_of_a_batch_share_their_blocks(
    toy_model: Path,
    rotate: Rotate,
    expected_by_prompt: dict[str, tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, computed = load_engine(toy_model, rotate), []

    def counting(model: Any, keys: Any) -> Any:
        keys = [*keys]
        computed.extend(keys)
        return prefill_blocks(model, keys)

    prefill_blocks = runner_module.prefill_blocks
    monkeypatch.setattr(runner_module, "prefill_blocks", counting)
    answers = engine.generate_ids([PROMPT, LARGER, PROMPT[-1:]], max_new_tokens=NUM_NEW)
    assert [answer.ids for answer in answers[:2]] == [
        expected_by_prompt["prompt"],
        expected_by_prompt["larger"],
    ]
    assert len(computed) == len(set(computed)) == 6
    assert answers[2].sources == {} and answers[2].num_blocks == 1


def test_blocks_can_be_computed_ahead_for_host_and_disk(
    toy_model: Path, folder: Path, expected_ids: tuple[int, ...]
) -> None:
    engine = load_engine(toy_model, "queries", options(folder))
    (keys,) = keys_of([PROMPT])
    assert engine.runner.prefill_blocks([*keys, *keys]) == 4
    assert engine.runner.prefill_blocks(keys) == 0
    answer = ask(engine)
    assert answer.sources == {"host": 4} and answer.ids == expected_ids
    keep_only_disk(engine)
    assert engine.runner.prefill_blocks(keys) == 0


# budgets


@pytest.mark.parametrize("host_tokens", [0, 1, 25, 40])
def test_a_small_host_tier_does_not_change_answers(
    toy_model: Path, rotate: Rotate, host_tokens: int, expected_by_prompt: dict[str, tuple[int, ...]]
) -> None:
    """Blocks that are computed for a prompt may evict blocks that were found for the same prompt."""
    engine = load_engine(toy_model, rotate, options(host=host_tokens * TOKEN_BYTES))
    for name, prompt in [("prompt", PROMPT), ("larger", LARGER), ("prompt", PROMPT)]:
        if engine.runner.block_cache.device is not None:
            engine.runner.block_cache.device.clear()
        assert ask(engine, prompt).ids == expected_by_prompt[name]
        assert engine.runner.block_cache.host.used_bytes <= host_tokens * TOKEN_BYTES


def test_without_a_host_tier_blocks_come_from_the_disk(
    toy_model: Path, folder: Path, rotate: Rotate, expected_ids: tuple[int, ...]
) -> None:
    engine = load_engine(toy_model, rotate, options(folder, host=0))
    ask(engine)
    keep_only_disk(engine)
    answer = ask(engine)
    assert answer.sources == {"disk": 4} and answer.ids == expected_ids


def test_a_small_disk_keeps_the_blocks_that_fit(
    toy_model: Path, folder: Path, rotate: Rotate, expected_ids: tuple[int, ...]
) -> None:
    entry_bytes = 4096 + 14 * (TOKEN_BYTES + 4)
    budget = 2 * entry_bytes
    engine = load_engine(toy_model, rotate, options(folder, disk=budget))
    for _ in range(3):
        answer = ask(engine)
        assert answer.ids == expected_ids
        keep_only_disk(engine)
        assert sum(entry.num_bytes for entry in CacheFolder(folder).entries()) <= budget
    disk = engine.runner.block_cache.disk
    assert disk is not None and disk.statistics.entries_evicted and 0 < answer.sources["disk"] < 4


def test_a_small_device_evicts_the_least_recently_used_blocks(
    toy_model: Path, expected_by_prompt: dict[str, tuple[int, ...]]
) -> None:
    engine = load_engine(toy_model, "queries", options(device=101 * TOKEN_BYTES))
    ask(engine, [*random_prompt(3, 50, 40), [1]])
    for name, prompt in [("larger", LARGER), ("prompt", PROMPT)]:
        assert ask(engine, prompt).ids == expected_by_prompt[name]
    assert ask(engine).sources == {"device": 4}
    device = engine.runner.block_cache.device
    assert device is not None and device.num_evicted == 2


def test_only_prompts_that_do_not_fit_on_the_device_are_refused(
    toy_model: Path, expected_ids: tuple[int, ...]
) -> None:
    engine = load_engine(toy_model, "queries", options(device=46 * TOKEN_BYTES))
    for prompts in ([LARGER], [PROMPT, [[1, 2, 3], [4]]]):
        with pytest.raises(UserError, match="raise the device budget, or answer fewer prompts at once"):
            engine.generate_ids(prompts, max_new_tokens=NUM_NEW)
    assert ask(engine).ids == expected_ids


# damage


def test_damaged_entries_are_reported_and_do_not_change_the_answer(
    toy_model: Path,
    folder: Path,
    rotate: Rotate,
    expected_ids: tuple[int, ...],
    warnings: pytest.LogCaptureFixture,
) -> None:
    writer = load_engine(toy_model, rotate, options(folder))
    ask(writer)
    writer.flush()
    assert damage_entries(folder) == 4
    engine = load_engine(toy_model, rotate, options(folder))
    answer = ask(engine)
    assert answer.ids == expected_ids and answer.sources == {"computed": 4} and answer.tokens_reused == 0
    assert engine.runner.block_cache.disk is not None
    assert engine.runner.block_cache.disk.statistics.entries_damaged == 4
    assert len(warnings.records) == 1 and "has changed since it was written" in warnings.text
    keep_only_disk(engine)
    assert ask(engine).sources == {"disk": 4}, "the blocks are written again"


def test_one_damaged_entry_costs_one_block(
    toy_model: Path, folder: Path, rotate: Rotate, expected_ids: tuple[int, ...]
) -> None:
    writer = load_engine(toy_model, rotate, options(folder))
    ask(writer, [PROMPT[1], [1]])
    keep_only_disk(writer)
    damage_entries(folder)
    ask(writer, [PROMPT[0], PROMPT[2], PROMPT[3], [1]])
    keep_only_disk(writer)
    answer = ask(writer)
    assert answer.ids == expected_ids and answer.sources == {"computed": 1, "disk": 3}


@pytest.mark.parametrize("host", [2**20, 0])
def test_damaged_entries_in_a_read_only_folder_do_not_change_answers(
    toy_model: Path,
    folder: Path,
    rotate: Rotate,
    host: int,
    expected_ids: tuple[int, ...],
    warnings: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every request finds the damaged entries again and is answered."""
    writer = load_engine(toy_model, rotate, options(folder))
    ask(writer)
    writer.flush()
    damage_entries(folder)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("remove_damaged", "temporary_file"):
        monkeypatch.setattr(CacheFolder, name, refuse)
    engine = load_engine(toy_model, rotate, options(folder, host=host))
    for _ in range(2):
        answer = ask(engine)
        assert answer.ids == expected_ids and answer.sources == {"computed": 4}
        keep_only_disk(engine)
    assert len(warnings.records) == 2, "one about damaged entries, one about the folder"


def test_a_folder_that_cannot_be_written_costs_one_warning(
    toy_model: Path,
    tmp_path: Path,
    rotate: Rotate,
    expected_ids: tuple[int, ...],
    warnings: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheFolder, "temporary_file", refuse)
    engine = load_engine(toy_model, rotate, options(tmp_path / "full"))
    assert ask(engine).ids == ask(engine).ids == expected_ids
    engine.flush()
    assert len(warnings.records) == 1 and "the disk is full" in warnings.text


def test_a_folder_with_other_files_and_a_tiny_budget_are_refused(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="give a cache or a new folder"):
        load_engine(toy_model, cache=options(tmp_path))
    with pytest.raises(UserError, match="cannot hold a block"):
        load_engine(toy_model, cache=options(tmp_path / "new", disk=100))


# exceptions


class Failure(Exception):
    pass


@pytest.mark.parametrize("num_computed", [0, 1, 3])
def test_an_exception_while_blocks_are_computed_leaves_no_wrong_block(
    toy_model: Path,
    folder: Path,
    rotate: Rotate,
    num_computed: int,
    expected_ids: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load_engine(toy_model, rotate, options(folder))
    prefill_blocks = runner_module.prefill_blocks

    def fail(*given: Any) -> Any:
        for number, block in enumerate(prefill_blocks(*given)):
            if number == num_computed:
                raise Failure
            yield block

    with monkeypatch.context() as patched:
        patched.setattr(runner_module, "prefill_blocks", fail)
        with pytest.raises(Failure):
            ask(engine)
    device = engine.runner.block_cache.device
    assert device is None or device.num_blocks == 0
    answer = ask(engine)
    assert answer.ids == expected_ids and answer.blocks_reused == num_computed
    keep_only_disk(engine)
    assert ask(engine).ids == expected_ids


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_exception_in_the_forward_pass_leaves_no_wrong_block(
    toy_model: Path,
    folder: Path,
    expected_ids: tuple[int, ...],
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load_engine(toy_model, "queries", options(folder))
    ask(engine, [PROMPT[2], [1]])

    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(QueryRotationRunner, "run", fail)
        with pytest.raises(error):
            ask(engine)
    assert engine.runner.block_cache.device is not None and engine.runner.block_cache.device.num_blocks == 1
    assert ask(engine).ids == expected_ids


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("num_moved", [0, 1])
def test_an_exception_while_blocks_move_leaves_no_wrong_block(
    toy_model: Path,
    error: type[BaseException],
    num_moved: int,
    expected_ids: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load_engine(toy_model, "queries", options(host=0, device=60 * TOKEN_BYTES))
    device = engine.runner.block_cache.device
    assert device is not None
    others = random_prompt(4, 14, 8, 14)
    # every second block is evicted: the first new block finds a free range, the last one does not
    ask(engine, [others[0], PROMPT[0], others[1], PROMPT[1], others[2], [1]])
    cache, clone, moved = device.cache_LS2KD, torch.Tensor.clone, []

    def fail(tensor: torch.Tensor, **given: Any) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr():
            if len(moved) == num_moved:
                raise error
            moved.append(tensor)
        return clone(tensor, **given)

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", fail)
        with pytest.raises(error):
            ask(engine)
    for part in ([PROMPT[2], PROMPT[0], [7]], [PROMPT[1], PROMPT[3], [7]]):
        assert ask(engine, part).ids == greedy(engine.model, part, NUM_NEW)
    assert ask(engine).ids == expected_ids


# models


def test_a_model_with_changed_weights_finds_no_blocks(tmp_path: Path, folder: Path, rotate: Rotate) -> None:
    path = save_model(tmp_path / "model", initializer_range=1.0)
    before = load_engine(path, rotate, options(folder))
    old = ask(before)
    before.flush()
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3, 5] += 0.5
    model.save_pretrained(path)
    after = load_engine(path, rotate, options(folder))
    answer = ask(after)
    after.flush()
    assert answer.sources == {"computed": 4} and answer.ids == greedy(after.model, PROMPT, NUM_NEW)
    assert len(CacheFolder(folder).models()) == 2
    keep_only_disk(before)
    again = ask(before)
    assert again.sources == {"disk": 4} and again.ids == old.ids


def test_a_copy_of_a_model_finds_all_blocks(toy_model: Path, tmp_path: Path, folder: Path) -> None:
    engine = load_engine(toy_model, cache=options(folder))
    ask(engine)
    engine.flush()
    shutil.copytree(toy_model, tmp_path / "elsewhere")
    assert ask(load_engine(tmp_path / "elsewhere", cache=options(folder))).sources == {"disk": 4}


def test_a_model_with_another_type_or_tokenizer_finds_no_blocks(
    toy_model: Path, tmp_path: Path, folder: Path
) -> None:
    engine = load_engine(toy_model, cache=options(folder))
    ask(engine)
    engine.flush()
    cache = options(folder)
    in_16_bits = Engine.load(str(toy_model), device="cpu", dtype=torch.bfloat16, cache=cache)
    assert ask(in_16_bits).sources == {"computed": 4}
    other = Path(shutil.copytree(toy_model, tmp_path / "other"))
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":'))
    assert ask(load_engine(other, cache=cache)).sources == {"computed": 4}


def test_an_unknown_attention_path_is_refused(toy_model: Path) -> None:
    with pytest.raises(UserError, match="allowed: auto, keys, queries"):
        load_engine(toy_model, "far", CacheOptions())


@pytest.mark.parametrize("rotate", ["auto", *ROTATE])
def test_compiling_without_cuda_graphs_is_refused(toy_model: Path, rotate: Rotate) -> None:
    with pytest.raises(UserError, match="compile is for rotated queries on a GPU and would slow cpu"):
        Engine.load(str(toy_model), device="cpu", cache=options(), rotate=rotate, compile=True)


@pytest.mark.parametrize("attention", ["sdpa", "block_sdpa"])
def test_a_model_with_another_attention_backend_is_refused(toy_model: Path, attention: str) -> None:
    model = load_engine(toy_model).model
    model.set_attn_implementation(attention)
    with pytest.raises(UserError, match=f"has the attention backend '{attention}', .* with Engine.load"):
        make_engine(model, "keys")


def test_the_default_host_budget_is_a_part_of_free_memory(toy_model: Path) -> None:
    engine = Engine.load(str(toy_model), device="cpu", rotate="keys")
    assert engine.runner.block_cache.host.max_bytes > 2**20 and engine.runner.block_cache.device is None
