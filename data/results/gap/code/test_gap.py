"""Checks of the study's code on a CPU, seconds each: `python -m pytest test_gap.py`."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import blockft.model.load  # noqa: F401 - registers the backends
import numpy as np
import pytest
import torch
from blockft.attention.layout import Layout
from blockft.attention.mask import dense_batch_mask, tile_mask
from blockft.model.masked import masked_logits
from transformers import LlamaConfig, LlamaForCausalLM

from driver import TOY
from llama import Llama, Shape, Weights
from model_file import random_flat
from objectives import Objective, ranking_loss, row_loss
from prompts import (
    ANSWER,
    DOCUMENT,
    Builder,
    Prompt,
    PromptOptions,
    Sharing,
    build_prompt,
    collate,
    index_questions,
    recompute,
)
from scores import interval, prior_answers, question_type, resampled_mean, word_match
from sealed import add_sealed, open_sealed, write_file
from split import Record, split_records
from study import (
    Training,
    answer_batch,
    arrange_documents,
    as_full,
    document_attention,
    document_places,
    first_of_blocks,
    make_prompt,
    mode_of,
    most_changed,
    train,
    training_rows,
)

SMALL = replace(TOY, vocab_size=96)
PLAIN = PromptOptions()
CPU = torch.device("cpu")


def toy_data(num_questions: int = 12) -> dict[str, Any]:
    draw = np.random.default_rng(0)

    def ids(least: int, most: int) -> Any:
        return draw.integers(20, 90, draw.integers(least, most)).astype(np.uint16)

    questions = [
        {
            "part": "train",
            "source": "toy",
            "id": str(i),
            "question": "who",
            "answers": ("a",),
            "head": [ids(6, 7), ids(3, 4)],
            "documents": list(range(i, i + 12)),
            "supports": [j == 1 for j in range(12)],
            "final": ids(5, 9),
            "final_twice": ids(9, 14),
            "answer": np.append(ids(1, 4), 2).astype(np.uint16),
        }
        for i in range(num_questions)
    ]
    documents = [ids(5, 20) for _ in range(num_questions + 12)]
    return {"questions": questions, "documents": documents, "chats": [], "end_of_turn": 2}


def prompt_of(data: dict[str, Any], number: int, mode: str, prompt_options: PromptOptions = PLAIN) -> Prompt:
    return build_prompt(
        data, number, mode=mode, order="shuffled", rng=random.Random(number), prompt_options=prompt_options
    )


def hf_model(shape: Shape, weights: Weights) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
        attn_implementation="block_sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    heads, kv = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(weights.embedding)
        model.model.norm.weight.copy_(weights.final_norm)
        for layer, (norm, qkv, out, mlp_norm, gate_up, down) in zip(
            model.model.layers, weights.layers, strict=True
        ):
            layer.input_layernorm.weight.copy_(norm)
            q, k, v = qkv.split((heads, kv, kv))
            layer.self_attn.q_proj.weight.copy_(q)
            layer.self_attn.k_proj.weight.copy_(k)
            layer.self_attn.v_proj.weight.copy_(v)
            layer.self_attn.o_proj.weight.copy_(out)
            layer.post_attention_layernorm.weight.copy_(mlp_norm)
            layer.mlp.gate_proj.weight.copy_(gate_up.chunk(2)[0])
            layer.mlp.up_proj.weight.copy_(gate_up.chunk(2)[1])
            layer.mlp.down_proj.weight.copy_(down)
    return model


@pytest.mark.parametrize("mode", ["block", "full"])
def test_logits_equal_those_of_transformers_under_the_block_mask(mode: str) -> None:
    data, weights = toy_data(), Weights(SMALL, random_flat(SMALL) * 3)
    llama, prompts = Llama(SMALL, "sdpa"), [prompt_of(data, i, mode) for i in range(3)]
    row = collate(prompts, 640, 2)
    hidden, _ = llama.hidden(weights, row.model_inputs)
    layouts = [Layout(tuple(np.unique(p.blocks, return_counts=True)[1].tolist())) for p in prompts]
    ids = torch.from_numpy(np.concatenate([p.ids for p in prompts]))
    expected = masked_logits(hf_model(SMALL, weights), ids, layouts)
    torch.testing.assert_close(llama.logits(weights, hidden)[: len(ids)], expected, rtol=1e-5, atol=1e-5)


ALL_PROMPT_OPTIONS = [
    PromptOptions(),
    PromptOptions(private_prefix=-1),
    PromptOptions(private_prefix=3, sink_tokens=2),
    PromptOptions(link_tokens=2, end_tokens=1),
    PromptOptions(is_bidirectional=True),
    PromptOptions(hidden_first=2),
    PromptOptions(question_twice=True),
    PromptOptions(document_stride=3),
    PromptOptions(document_stride=0, private_prefix=-1),
]


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("prompt_options", ALL_PROMPT_OPTIONS)
def test_decoding_equals_masked_forward_passes(prompt_options: PromptOptions, mode: str) -> None:
    data, weights, llama = toy_data(), Weights(SMALL, random_flat(SMALL) * 3), Llama(SMALL, "sdpa")
    prompts = [prompt_of(data, i, mode, prompt_options) for i in range(5)]
    answers, losses, _ = answer_batch(llama, weights, prompts, 2, CPU, 640, 6)
    for prompt, answer, loss in zip(prompts, answers.tolist(), losses.tolist(), strict=True):
        row = collate([prompt], len(prompt), 2)
        hidden, _ = llama.hidden(weights, row.model_inputs)
        kept = row.shift_labels >= 0
        logits = llama.logits(weights, hidden[row.logits_to_keep])[kept]
        expected = torch.nn.functional.cross_entropy(logits, row.shift_labels[kept])
        assert loss == pytest.approx(float(expected), abs=1e-4)
        assert answer == greedy(llama, weights, prompt, 6)


def greedy(llama: Llama, weights: Weights, prompt: Prompt, num_tokens: int) -> list[int]:
    """By a whole forward pass per token."""
    names = (
        "ids",
        "positions",
        "blocks",
        "is_final",
        "is_link",
        "is_private",
        "is_bidirectional",
        "kinds",
        "support",
        "weights",
    )
    arrays = {name: getattr(prompt, name)[prompt.kinds != ANSWER] for name in names}
    found: list[int] = []
    for _ in range(num_tokens):
        row = collate([replace(prompt, **arrays)], len(arrays["ids"]), 2, is_predicted=lambda p: p.kinds > 99)
        hidden, _ = llama.hidden(weights, row.model_inputs)
        found.append(2 if 2 in found else int(llama.logits(weights, hidden[-1]).argmax()))
        arrays = {name: np.append(array, array[-1]) for name, array in arrays.items()}
        arrays["ids"][-1], arrays["positions"][-1] = found[-1], arrays["positions"][-2] + 1
    return found


def test_a_private_prefix_encodes_a_document_as_if_the_prompt_began_with_it() -> None:
    """A block may be cached: its values depend on the prompt's head and its own tokens, not on its place."""
    data, weights, llama = toy_data(), Weights(SMALL, random_flat(SMALL) * 3), Llama(SMALL, "sdpa")
    prompt = prompt_of(data, 0, "block", PromptOptions(private_prefix=-1))
    caught: dict[int, torch.Tensor] = {}

    def keep(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        caught[layer] = values

    llama.hidden(weights, collate([prompt], len(prompt), 2).model_inputs, on_kv=keep)
    in_place = dict(caught)
    last = int(prompt.blocks[prompt.kinds == DOCUMENT].max())
    alone = Builder("full")
    alone.add(prompt.ids[prompt.blocks == last], DOCUMENT)
    row = collate([alone.finish(0)], int((prompt.blocks == last).sum()), 2)
    llama.hidden(weights, row.model_inputs, on_kv=keep)
    for layer, values in caught.items():
        where = torch.from_numpy(np.flatnonzero(prompt.blocks == last))
        torch.testing.assert_close(in_place[layer][:, :, where], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt_options", ALL_PROMPT_OPTIONS)
def test_who_sees_whom(prompt_options: PromptOptions) -> None:
    data = toy_data()
    prompts = [prompt_of(data, i, "block", prompt_options) for i in range(2)]
    row = collate(prompts, 1024, 2)
    mask = dense_batch_mask(row.vectors)[0, 0].numpy()
    offset = len(prompts[0])
    assert not mask[offset : offset + len(prompts[1]), :offset].any()
    for start, prompt in zip((0, offset), prompts, strict=True):
        q, k = np.arange(len(prompt))[:, None], np.arange(len(prompt))
        reads = prompt.is_final | prompt.is_link
        context = ~prompt.is_final & ~prompt.is_private
        same = prompt.blocks[q] == prompt.blocks[k]
        expected = (q >= k) & (same | (reads[q] & context[k])) | (same & prompt.is_bidirectional[q])
        assert (mask[start : start + len(prompt), start : start + len(prompt)] == expected).all()


@pytest.mark.parametrize("prompt_options", [PromptOptions(), PromptOptions(private_prefix=-1)])
def test_recomputing_everything_is_full_mode_and_nothing_is_block_mode(prompt_options: PromptOptions) -> None:
    data, weights, llama = toy_data(), Weights(SMALL, random_flat(SMALL) * 3), Llama(SMALL, "sdpa")
    prompts = [prompt_of(data, i, "block", prompt_options) for i in range(3)]
    for share, expected in ((1.0, [as_full(p) for p in prompts]), (0.0, prompts)):
        again = [recompute(p, c) for p, c in zip(prompts, first_of_blocks(prompts, share), strict=True)]
        _, losses, _ = answer_batch(llama, weights, again, 2, CPU, 1280, 2, True)
        _, wanted, _ = answer_batch(llama, weights, expected, 2, CPU, 640, 2)
        torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-5)
    some = most_changed(llama, weights, prompts, 0.2, 2, CPU, 640)
    for prompt, chosen in zip(prompts, some, strict=True):
        is_context = ~prompt.is_final & ~prompt.is_private
        assert chosen.sum() == round(0.2 * is_context.sum()) and not chosen[~is_context].any()
        # the first block is the same in both modes
        assert not chosen[prompt.blocks == 0].any()


def test_the_first_tokens_of_blocks_are_those_that_others_see() -> None:
    prompt = prompt_of(toy_data(), 0, "block", PromptOptions(private_prefix=-1))
    chosen = first_of_blocks([prompt], 0.2)[0]
    for block in np.unique(prompt.blocks[~prompt.is_final]):
        own = chosen[(prompt.blocks == block) & ~prompt.is_private]
        assert own[: own.sum()].all() and own.sum() >= 1


@pytest.mark.parametrize("mode", ["block", "full"])
def test_a_first_reading_finds_the_attention_of_each_document(mode: str) -> None:
    data, weights, llama = toy_data(), Weights(SMALL, random_flat(SMALL) * 3), Llama(SMALL, "sdpa")
    options = PromptOptions(private_prefix=-1)
    prompts = [prompt_of(data, i, mode, options) for i in range(3)]
    places = [document_places(prompt_of(data, i, "block", options), mode == "block") for i in range(3)]
    found = document_attention(llama, weights, prompts, places, 2, CPU, 640)
    assert np.allclose(found.sum(-1), 1, atol=1e-5)
    for number, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        row = collate([prompt], len(prompt), 2)
        keys: list[torch.Tensor] = []
        _, inputs = llama.hidden(
            weights, row.model_inputs, kept_layers=range(3), on_kv=lambda _, k, __, keys=keys: keys.append(k)
        )
        at = int(np.flatnonzero(prompt.kinds == ANSWER)[0]) - 1
        for layer in range(3):
            q = llama.query(weights, layer, inputs[layer][:, [at]], row.position_ids[:, [at]])[0, :, 0]
            k = keys[layer][0].repeat_interleave(2, dim=0)
            shares = ((q[:, None] * k).sum(-1) * SMALL.head_size**-0.5)[:, place >= 0].softmax(-1)
            for document in range(10):
                own = shares[:, place[place >= 0] == document].sum(-1)
                np.testing.assert_allclose(own.numpy(), found[number, layer, :, document], atol=1e-5)


def test_a_second_reading_has_the_same_documents_with_the_most_read_one_last() -> None:
    data, llama = toy_data(), Llama(SMALL, "sdpa")
    flat = random_flat(SMALL) * 3
    options = PromptOptions(private_prefix=-1)
    arranged, reading = arrange_documents(
        llama,
        data,
        flat,
        range(4),
        mode="block",
        order="shuffled",
        prompt_options=options,
        device=CPU,
        row_len=640,
        num_chosen=6,
    )
    for number, places in arranged.items():
        prompt = build_prompt(
            data,
            number,
            mode="block",
            order="",
            rng=random.Random(0),
            prompt_options=options,
            places=places[-3:],
        )
        last = data["documents"][data["questions"][number]["documents"][places[-1]]]
        is_last = prompt.blocks == prompt.blocks.max() - 1
        assert prompt.ids[is_last & ~prompt.is_private].tolist() == last.tolist()
        assert sorted(places) == list(range(10)) and len(np.unique(prompt.blocks)) == 5
        supports = data["questions"][number]["supports"][places[-1]]
        assert reading["last_document_supports"][number] == str(int(supports))


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize("prompt_options", [PromptOptions(), PromptOptions(private_prefix=-1)])
def test_questions_that_share_a_prompt_are_answered_as_alone(
    prompt_options: PromptOptions, mode: str
) -> None:
    data, weights, llama = toy_data(), Weights(SMALL, random_flat(SMALL) * 3), Llama(SMALL, "sdpa")
    data["asked_about"] = index_questions(data, range(12))
    data["clozes"] = {n: [(np.arange(20 + n, 26 + n), np.array([30, 2]))] for n in range(24)}
    options = {"mode": mode, "order": "shuffled", "prompt_options": prompt_options}
    sharing = Sharing(num_questions=4, num_clozes=2)
    shared = build_prompt(data, 3, rng=random.Random(3), sharing=sharing, **options)
    numbers = sorted(set(shared.blocks[shared.kinds == ANSWER]))
    assert len(numbers) == 6
    total = 0.0
    for block in numbers:
        own = shared.blocks == block
        answer = shared.ids[own & (shared.kinds == ANSWER)]
        total += float(shared.weights[own][-1])
        # the same documents in the same order, with this question alone
        alone = build_prompt(data, 3, rng=random.Random(3), **options)
        single = Builder(mode)
        context = alone.kinds <= DOCUMENT
        kept = {
            name: getattr(alone, name)[context]
            for name in (
                "ids",
                "positions",
                "blocks",
                "is_link",
                "is_private",
                "is_bidirectional",
                "is_final",
            )
        }
        single.add(shared.ids[own], 2, is_final=True)
        last = single.finish(0)
        start = int(kept["positions"].max()) + 1
        whole = replace(
            last,
            ids=np.concatenate([kept["ids"], last.ids]),
            positions=np.concatenate([kept["positions"], last.positions + start]),
            blocks=np.concatenate(
                [kept["blocks"], last.blocks + (0 if mode == "full" else int(kept["blocks"].max()) + 1)]
            ),
            **{
                name: np.concatenate([kept[name], getattr(last, name)])
                for name in ("is_link", "is_private", "is_bidirectional", "is_final")
            },
            kinds=np.concatenate([np.zeros(int(context.sum()), np.int8), shared.kinds[own]]),
            support=np.full(int(context.sum() + own.sum()), -1, np.int8),
            weights=np.ones(int(context.sum() + own.sum()), np.float32),
        )
        logits = []
        for prompt, is_own in ((shared, own), (whole, whole.kinds > DOCUMENT)):
            row = collate([prompt], len(prompt), 2)
            hidden, _ = llama.hidden(weights, row.model_inputs)
            logits.append(llama.logits(weights, hidden[torch.from_numpy(np.flatnonzero(is_own))]))
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        assert len(answer) >= 2
    assert total == pytest.approx(1.5)


def test_shared_questions_in_ascending_order_have_the_same_support() -> None:
    data = toy_data()
    data["asked_about"] = index_questions(data, range(12))
    for number in range(12):
        prompt = build_prompt(
            data,
            number,
            mode="block",
            order="ascending",
            rng=random.Random(0),
            prompt_options=PLAIN,
            sharing=Sharing(),
        )
        # no other question of this data has the same supporting document
        assert len(set(prompt.blocks[prompt.kinds == ANSWER])) == 1


def test_a_dual_step_is_the_mean_of_both_modes() -> None:
    data, llama = toy_data(), Llama(SMALL, "sdpa")
    losses = {}
    for modes in ("dual", "block", "full"):
        training = Training(modes=modes, steps=1, data_share=1.0, warmup_steps=0, learning_rate=0.0)
        _, log = train(
            llama, data, training, random_flat(SMALL), device=CPU, dtype=torch.float32, row_len=640
        )
        losses[modes] = log["mean_losses_of_last_tenth"]
    assert losses["dual"]["answer"] == losses["block"]["answer"]
    assert losses["dual"]["answer_in_full_mode"] == losses["full"]["answer"]


def test_documents_overlap_in_position_and_the_last_one_ends_before_the_question() -> None:
    data = toy_data()
    prompt = prompt_of(data, 2, "block", PromptOptions(document_stride=3, private_prefix=-1))
    is_own = (prompt.kinds == DOCUMENT) & ~prompt.is_private
    ends = [
        int(prompt.positions[is_own & (prompt.blocks == b)].max()) for b in np.unique(prompt.blocks[is_own])
    ]
    question = int(prompt.positions[prompt.is_final].min())
    assert ends == [question - 1 - 3 * (9 - place) for place in range(10)]
    assert int(prompt.positions[is_own].min()) == int((prompt.kinds == 0).sum())
    assert (np.diff(prompt.positions[prompt.is_final]) == 1).all()
    in_full = prompt_of(data, 2, "full", PromptOptions(document_stride=3))
    assert (np.diff(in_full.positions) == 1).all()


def test_tiles_hold_what_the_mask_allows() -> None:
    data = toy_data()
    prompts = [
        prompt_of(data, i, "block", PromptOptions(is_bidirectional=True, link_tokens=2)) for i in range(9)
    ]
    row = collate(prompts, 3072, 2)
    some, every = tile_mask(row.vectors, None, 128, lowest=row.lowest)
    tiles = dense_batch_mask(row.vectors)[0, 0].reshape(24, 128, 24, 128)
    assert (some[0] == tiles.any(3).any(1)).all() and (every[0] == tiles.all(3).all(1)).all()


def test_experiments_that_differ_in_mode_see_the_same_rows() -> None:
    data = toy_data()
    rows = {}
    for modes in ("full", "both", "full-then-both"):
        training = Training(modes=modes, steps=6, data_share=1.0)
        rows[modes] = [
            [make_prompt(data, i, m, training, j).ids.tolist() for i, m, j in row]
            for row in training_rows(data, training, 640)
        ]
    assert rows["full"] == rows["both"] == rows["full-then-both"]


def test_each_question_is_drawn_alternately_in_both_modes() -> None:
    training = Training(modes="both")
    for index in range(20):
        assert {mode_of(("question", index, epoch), 0, training) for epoch in (4, 5)} == {"block", "full"}


def test_gradients_reach_all_weights_and_ranking_looks_at_supporting_documents() -> None:
    data, llama = toy_data(), Llama(SMALL, "sdpa")
    weights = Weights(SMALL, random_flat(SMALL), trainable=True)
    prompts = [prompt_of(data, i, "block") for i in range(3)]
    row = collate(prompts, 640, 2)
    loss, parts, _ = row_loss(llama, weights, row, Objective(ranking_weight=0.5, ranking_layers=(1,)))
    loss.backward()
    assert weights.flat_grad is not None and torch.isfinite(weights.flat_grad).all()
    assert all((layer[i].grad != 0).any() for layer in weights.layers for i in range(6))  # type: ignore[union-attr]
    # by hand, one prompt after the other
    _, inputs = llama.hidden(weights, row.model_inputs, kept_layers=(1,))
    found = float(ranking_loss(llama, weights, row, 1, inputs[1]).detach())
    k = llama.keys(weights, 1, inputs[1], row.position_ids)[0].repeat_interleave(2, dim=0)
    expected, start = [], 0
    for prompt in prompts:
        at = start + int(np.flatnonzero(prompt.kinds == ANSWER)[0]) - 1
        q = llama.query(weights, 1, inputs[1][:, [at]], row.position_ids[:, [at]])[0, :, 0]
        where = torch.from_numpy(start + np.flatnonzero(prompt.support >= 0))
        shares = ((q[:, None] * k[:, where]).sum(-1) * SMALL.head_size**-0.5).softmax(-1)
        supports = torch.from_numpy(prompt.support[prompt.support >= 0] == 1)
        mass = shares[:, supports].sum(-1)
        expected.append(-(mass.topk(3).values.mean().log()))
        start += len(prompt)
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert float(parts["ranking"]) == pytest.approx(found)


def test_groups_are_in_one_part_and_sealed_ones_in_none() -> None:
    def record(*groups: str) -> Record:
        return Record("fid", {}, groups)

    records = [record(f"title {i // 2}", f"question {i}") for i in range(40)] + [record("title 0", "title 1")]
    parts, left_out = split_records(records, [record("title 3", "question x")], {"fid": 10})
    titles = {
        part: {g for r in some for g in r.groups if g.startswith("title")} for part, some in parts.items()
    }
    assert (
        not titles["train"] & titles["validation"] and "title 3" not in titles["train"] | titles["validation"]
    )
    assert left_out == {"fid": 2} and 10 <= len(parts["validation"]) <= 14


def test_words_match_whole() -> None:
    assert word_match("It is north of it", ["No"]) == 0 and word_match("No, it is not", ["no"]) == 1
    assert word_match("the New York City", ["New York"]) == 1 and word_match("Newark", ["new"]) == 0


def test_the_prior_answers_by_type() -> None:
    assert question_type("Are both of them French?") == "yes or no"
    assert question_type("In which year did he die?") == "which"
    train = [
        {"source": "a", "question": "Is it?", "answer": "no"},
        {"source": "a", "question": "Was it?", "answer": "no"},
        {"source": "a", "question": "Was it so?", "answer": "yes"},
    ]
    assert prior_answers(train) == {("a", "yes or no"): "no"}


def test_a_paired_interval_is_that_of_differences() -> None:
    draw = np.random.default_rng(1)
    a = {"x": draw.random(200), "y": draw.random(50)}
    b = {name: values + 0.1 for name, values in a.items()}
    difference = resampled_mean(b) - resampled_mean(a)
    assert np.allclose(difference, 0.1)
    low, high = interval(resampled_mean(a))
    assert low < np.mean([*a["x"], *a["y"]]) < high


def test_sealed_questions_are_opened_once_and_for_named_models_alone(tmp_path: Path) -> None:
    data = toy_data()
    before = [question["documents"] for question in data["questions"]]
    own = toy_data(3)
    write_file(own["documents"], [q | {"type": "bridge"} for q in own["questions"]], tmp_path)
    file, record = tmp_path / "sealed.pt.xz", tmp_path / "opened.json"
    open_sealed(tmp_path, "a,b", record)
    with pytest.raises(SystemExit, match="opened already"):
        open_sealed(tmp_path, "c", record)
    with pytest.raises(SystemExit, match="does not name c"):
        add_sealed(data, file, record, ["a", "c"])
    opened = add_sealed(data, file, record, ["a"])
    assert opened["models"] == ["a", "b"]
    assert [question["documents"] for question in data["questions"][: len(before)]] == before
    added = data["questions"][len(before) :]
    assert len(added) == 3 and all(question["part"] == "sealed" for question in added)
    for question, other in zip(added, own["questions"], strict=True):
        found = [data["documents"][n] for n in question["documents"]]
        assert all((a == own["documents"][n]).all() for a, n in zip(found, other["documents"], strict=True))
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(SystemExit, match="another file"):
        add_sealed(data, file, record, ["a"])
