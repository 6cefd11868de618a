"""Servers of `blockft serve` with the CPU build of vLLM: answers equal those of the masked forward pass.

Slow: vLLM takes about a minute to start.
"""

import json
import os
import random
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from blockft.attention.layout import Layout
from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions
from blockft.model.masked_forward import masked_logits
from tests.run import save_tokenizer, write_block_attention
from tests.serving.real_server import (
    MODEL,
    NUM_NEW,
    NUM_QUESTIONS,
    TOLERANCE,
    Chat,
    Server,
    check,
    demo_chats,
    forget_memory,
    in_mode,
    needs_vllm,
    reference,
    reference_models,
    shuffled,
    start_server,
)
from tests.tiny import LLAMA3, SIZE, YARN

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """The device tier has a part of the blocks: some requests wait for their load, and some do not."""
    server = start_server(folder, folder / "cache", "--max-model-len", "512", "--device-bytes", "1MB")
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def chats(folder: Path) -> list[Chat]:
    return demo_chats(folder)


def test_answers_and_log_probabilities_equal_those_of_the_masked_forward(
    server: Server, chats: list[Chat]
) -> None:
    """Cold, warm, with documents in another order, and mixed with full mode."""
    differences = [abs(reference(c)[1][0] - reference(c, "full")[1][0]) for c in shuffled(chats)]
    assert sum(difference > 10 * TOLERANCE for difference in differences) > NUM_QUESTIONS / 3
    cold = check(server, in_mode("block", chats))
    assert cold["computed"] > 50
    warm = check(server, in_mode("block", chats))
    assert not warm["computed"] and warm["device"] and warm["host"]
    moved = check(server, in_mode("block", shuffled(chats)))
    assert not moved["computed"]
    mixed = [*in_mode("block", chats), *in_mode("full", chats), *in_mode("full", shuffled(chats))]
    random.Random(0).shuffle(mixed)
    check(server, mixed)


def test_a_client_of_openai_gets_chats_and_streams(server: Server, chats: list[Chat]) -> None:
    (chat,) = shuffled(chats[-1:])
    engine, _ = reference_models(MODEL)
    text = engine.tokenizer.decode(reference(chat)[0], skip_special_tokens=True)
    options: dict[str, Any] = {"model": "", "messages": chat, "max_tokens": NUM_NEW, "temperature": 0}
    create = server.client.chat.completions.create
    whole = create(**options, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == text
    assert whole.choices[0].logprobs.content[0].logprob == pytest.approx(reference(chat)[1][0], abs=TOLERANCE)
    chunks = list(create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == text
    usage = chunks[-1].usage.block_attention
    assert sum(usage["sources"].values()) == usage["num_blocks"] - 1 == usage["blocks_reused"]
    assert server.metric('blockft_requests_total{mode="block"}') >= 2
    assert server.metric('blockft_block_tokens_total{source="device"}') > 0


@pytest.fixture(scope="module")
def later_server(folder: Path, server: Server, chats: list[Chat]) -> Iterator[Server]:
    """A server on the folder of the first one: it computes in chunks, and has few pages and little memory."""
    check(server, in_mode("block", chats))
    later = start_server(
        folder,
        folder / "cache",
        *("--host-bytes", "0B", "--max-model-len", "256", "--num-gpu-blocks-override", "12"),
        *("--max-num-batched-tokens", "32", "--max-num-seqs", "8", "--no-enable-prefix-caching"),
        *("--device-bytes", "600KB"),
    )
    yield later
    if later.process.poll() is None:
        later.stop()


def test_a_later_server_reads_the_blocks_from_disk(later_server: Server, chats: list[Chat]) -> None:
    asked = [*in_mode("block", shuffled(chats)), *in_mode("full", chats)]
    sources = check(later_server, asked, num_clients=16)
    assert sources.keys() == {"disk", "device"}


def test_preempted_requests_are_loaded_again(later_server: Server, chats: list[Chat]) -> None:
    """The answers need more pages than there are."""
    asked = [*in_mode("block", chats[:24]), *in_mode("full", chats[:8])]
    check(later_server, asked, num_clients=16, min_new=24, num_new=24)
    assert later_server.metric("vllm:num_preemptions_total") > 0


def test_a_block_longer_than_a_chunk_is_computed_in_several_steps(
    later_server: Server, chats: list[Chat]
) -> None:
    documents = ["".join(chat[0]["content"][1:-1]) for chat in chats[:16:2]]
    long = [
        [{"role": "user", "content": [*documents[start : start + 2], chats[start][0]["content"][-1]]}]
        for start in range(len(documents) - 1)
    ]
    assert check(later_server, in_mode("block", long))["computed"]


def test_damaged_and_removed_blocks_are_computed_again(
    later_server: Server, folder: Path, chats: list[Chat]
) -> None:
    files = sorted((folder / "cache").rglob("*.safetensors"))
    for file in files[::2]:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert check(later_server, in_mode("block", chats[:20]))["computed"]
    for file in files:
        file.unlink()
    forget_memory()
    assert check(later_server, in_mode("block", chats[:20]))["computed"]


def test_bad_requests_fail_alone(later_server: Server, chats: list[Chat]) -> None:
    bad: list[dict[str, Any]] = [
        {"prompt_logprobs": 1},
        {"mode": "local"},
        {"kv_transfer_params": {"secret": "guess"}},
        {"messages": [{"role": "user", "content": ["a " * 600, "b"]}]},
        {"messages": [{"role": "king", "content": ["a", "b"]}]},
    ]
    for number in range(200):
        with pytest.raises(openai.BadRequestError):
            later_server.ask(chats[number % len(chats)], **bad[number % len(bad)])
    others: list[dict[str, Any]] = [
        {"vllm_xargs": {"kv_transfer_params": "text"}},
        {"vllm_xargs": {"kv_transfer_params": ["list"]}},
        {"kv_transfer_params": {"secret": "guess", "lengths": [3]}},
        {"kv_transfer_params": {"lengths": "text"}},
    ]
    create = later_server.client.completions.create
    for extra in others:  # vLLM itself answers parameters that are no object with status 500
        with suppress(openai.InternalServerError):
            assert create(model="", prompt="The", max_tokens=1, extra_body=extra).choices
    check(later_server, in_mode("block", chats[:20]))


def test_a_client_that_leaves_and_sigterm_leave_nothing_behind(
    later_server: Server, chats: list[Chat]
) -> None:
    for chat in chats[:10]:
        with pytest.raises(openai.APITimeoutError):
            later_server.client.with_options(timeout=0.001).completions.create(
                model="", prompt="", extra_body={"messages": chat}, max_tokens=100
            )
    check(later_server, in_mode("block", chats[:20]))
    assert later_server.stop() == 130
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{later_server.port}/health", timeout=5)


def test_two_workers_share_the_heads(folder: Path, chats: list[Chat]) -> None:
    """They read blocks that a single process computed, and compute others together."""
    cache = folder / "shared-heads-cache"
    with Engine.load(MODEL, device="cpu", cache=CacheOptions(folder=cache)) as engine:
        engine.generate_batch([{"messages": chat} for chat in chats[:20]], max_new_tokens=1)
    options = ("--tensor-parallel-size", "2", "--device-bytes", "1MB", "--max-model-len", "512")
    both = start_server(folder, cache, *options)
    try:
        assert check(both, in_mode("block", chats[:30]))["disk"]
        assert not check(both, in_mode("block", shuffled(chats[:30])))["computed"]
        assert check(both, in_mode("block", chats[30:]))["computed"]
    finally:
        both.stop()
    one = start_server(folder, cache, "--no-enable-prefix-caching", "--max-model-len", "512")
    try:
        assert check(one, in_mode("block", chats)).keys() == {"disk", "host"}
    finally:
        one.stop()


def test_blocks_that_see_the_first_block_answer_as_the_engine(folder: Path, chats: list[Chat]) -> None:
    """Cold, warm, with documents in another order, behind another instruction, and after a restart.

    The later server computes in chunks, has few pages and no memory for blocks.
    """
    model, chats = folder / "sees-first", chats[:30]
    write_block_attention(shutil.copytree(MODEL, model), local_sees_first=True)
    reference_here = partial(reference, path=model)
    differences = [abs(reference_here(chat)[1][0] - reference(chat)[1][0]) for chat in chats]
    assert sum(difference > 10 * TOLERANCE for difference in differences) > len(chats) / 3
    engine, _ = reference_models(model)
    prompts = [{"messages": chat} for chat in chats]
    answers = engine.generate_batch(prompts, max_new_tokens=NUM_NEW)
    ends = engine.eos_token_ids
    assert [answer.ids for answer in answers] == [
        tuple(id for id in reference_here(chat)[0] if id not in ends) for chat in chats
    ]
    check_here, cache = partial(check, path=model), folder / "sees-first-cache"
    server = start_server(folder, cache, "--max-model-len", "512", model=model)
    try:
        num_blocks = sum(answer.num_blocks - 1 for answer in answers)
        cold = check_here(server, in_mode("block", chats))
        assert cold["computed"] > 30 and cold.total() == num_blocks
        warm = check_here(server, in_mode("block", chats))
        assert not warm["computed"] and warm["device"] and warm["host"]
        assert not check_here(server, in_mode("block", shuffled(chats)))["computed"]
        others = [[message | {"content": ["Read.\n", *message["content"][1:]]}] for (message,) in chats[:10]]
        assert check_here(server, in_mode("block", others))["computed"] > 20
        mixed = [*in_mode("block", shuffled(chats)), *in_mode("full", chats), *in_mode("block", others)]
        random.Random(0).shuffle(mixed)
        check_here(server, mixed)
    finally:
        server.stop()
    options = ["--host-bytes", "0B", "--max-model-len", "256", "--num-gpu-blocks-override", "12"]
    options += ["--max-num-batched-tokens", "32", "--max-num-seqs", "8", "--no-enable-prefix-caching"]
    later = start_server(folder, cache, *options, model=model)
    try:
        assert check_here(later, in_mode("block", shuffled(chats))).keys() == {"disk"}
        new = [[message | {"content": ["Look.\n", *message["content"][1:]]}] for (message,) in chats[:10]]
        assert check_here(later, in_mode("block", new))["computed"] > 20
    finally:
        later.stop()


def test_two_workers_compute_blocks_that_see_the_first_block(folder: Path, chats: list[Chat]) -> None:
    model = folder / "two-workers"
    write_block_attention(shutil.copytree(MODEL, model), local_sees_first=True)
    options = ("--tensor-parallel-size", "2", "--max-model-len", "512")
    server = start_server(folder, folder / "two-workers-cache", *options, model=model)
    try:
        for asked in (chats[:10], chats[:10], shuffled(chats[:10])):
            check(server, in_mode("block", asked), path=model)
    finally:
        server.stop()


@pytest.mark.real_data
def test_a_pretrained_model_answers_as_the_engine(tmp_path: Path) -> None:
    """SmolLM2 on 20 questions of HotpotQA: computed in chunks, preempted, and after a restart."""
    model = Path(os.environ.get("BLOCKFT_SMOLLM2", "../shared/smollm2"))
    if not model.exists():
        pytest.skip(f"SmolLM2-135M-Instruct is not in {model} (set BLOCKFT_SMOLLM2)")
    questions = Path(os.environ.get("BLOCKFT_REAL_DATA", "../shared/data")) / "hotpotqa_distractor_dev.json"
    if not questions.exists():
        pytest.skip(f"{questions} is not there (set BLOCKFT_REAL_DATA)")
    chats = hotpotqa_chats(questions, 20)
    engine, masked = reference_models(model)
    num_new = 40
    expected = [
        list(answer.ids)
        for answer in engine.generate_batch([{"messages": chat} for chat in chats], max_new_tokens=num_new)
    ]
    few_pages = ("--num-gpu-blocks-override", "48", "--max-num-batched-tokens", "64", "--host-bytes", "0B")
    for options in (few_pages, ()):
        server = start_server(tmp_path, tmp_path / "cache", "--max-model-len", "1024", *options, model=model)
        try:
            for asked in (chats, shuffled(chats)[:4], chats):
                with ThreadPoolExecutor(8) as clients:
                    answers = list(clients.map(partial(server.ask, num_new=num_new), asked))
                if asked is chats:
                    for chat, ids, answer in zip(chats, expected, answers, strict=True):
                        check_answer(engine, masked, chat, ids, answer)
            assert (server.metric("vllm:num_preemptions_total") > 0) == bool(options)
        finally:
            server.stop()


def hotpotqa_chats(file: Path, count: int) -> list[Chat]:
    """Return questions over four documents each."""
    records = json.loads(file.read_text())[:count]
    return [
        [
            {
                "role": "user",
                "content": [
                    "Answer from the documents.\n\n",
                    *(f"{title}\n{''.join(sentences)}\n\n" for title, sentences in record["context"][:4]),
                    record["question"],
                ],
            }
        ]
        for record in records
    ]


@torch.inference_mode()
def check_answer(engine: Engine, model: Any, chat: Chat, expected: list[int], answer: Any) -> None:
    """Compare an answer with that of the engine, and its log probabilities with the masked forward pass."""
    (choice,) = answer.choices
    ids = choice.token_ids
    assert [id for id in ids if id not in engine.eos_token_ids] == expected
    blocks = [[*block] for block in engine.encode(engine.parse_request({"messages": chat}), len(ids))]
    blocks[-1] += ids
    layout = Layout(tuple(map(len, blocks)))
    logits = masked_logits(model, [*chain.from_iterable(blocks)], [layout], len(ids) + 1)[:-1]
    logprobs = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
    assert choice.logprobs.token_logprobs == pytest.approx(logprobs.tolist(), abs=TOLERANCE)


FAMILIES: dict[str, Any] = {
    "gemma3": lambda size: Gemma3TextConfig(
        **size,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    ),
    "llama-llama3": lambda size: LlamaConfig(**size, rope_parameters=LLAMA3),
    "phi3-partial": lambda size: Phi3Config(
        **{name: value for name, value in size.items() if name != "head_dim"},
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "qwen3-yarn": lambda size: Qwen3Config(**size, rope_parameters=YARN),
}
"""Random models by family and RoPE type, with heads of a size that vLLM's CPU backend supports."""


@pytest.mark.parametrize(
    ("family", "sees_first"),
    [*((family, False) for family in FAMILIES), ("gemma3", True), ("phi3-partial", True)],
)
def test_other_families_and_rope_types_answer_as_the_masked_forward(
    family: str, sees_first: bool, tmp_path: Path
) -> None:
    """Prompts of 100 to 200 tokens, some of whose blocks are longer than the sliding window."""
    tokenizer = save_tokenizer(tmp_path / "model")
    size: dict[str, Any] = {
        "hidden_size": 128,
        "head_dim": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    size |= {"vocab_size": 272, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.1}
    config = FAMILIES[family](SIZE | size)
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, None
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    if sees_first:
        write_block_attention(tmp_path / "model", local_sees_first=True)
    rng = random.Random(family)
    documents = ["".join(rng.choices("abcdefgh ", k=rng.randint(20, 70))) for _ in range(6)]
    chats = [
        [{"role": "user", "content": [*rng.sample(documents, 3), f"question {number}"]}]
        for number in range(12)
    ]
    server = start_server(tmp_path, tmp_path / "cache", "--max-model-len", "512", model=tmp_path / "model")
    try:
        for mode in ("block", "block", "full"):
            check(server, in_mode(mode, chats), path=tmp_path / "model")
    finally:
        server.stop()
