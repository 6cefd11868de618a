"""lm-evaluation-harness: tasks run in both modes, and full mode scores like the harness's own model class."""

import importlib.util
import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from blockft.attention.backends import AttentionMasks
from blockft.attention.layout import Layout, build_metadata
from blockft.data.sample import Message, Sample
from blockft.errors import UserError
from blockft.model.masked_forward import masked_logits
from tests.run import save_model, write_block_attention

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm_eval is not installed (pip install 'blockft[lm-eval]')", allow_module_level=True)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from blockft.evaluation import loglikelihood  # noqa: E402
from blockft.evaluation.harness import BLOCK_START, BlockLM  # noqa: E402

HERE = Path(__file__).parent / "harness"
SHOTS = "Capitals.\n\nQ: Peru\nA: Lima\n\nQ: Kenya\nA: Nairobi\n\nQ: Norway\nA:"


def task(kind: str) -> dict[str, Any]:
    """Return a task over the six lines of harness/capitals.jsonl."""
    common: dict[str, Any] = {
        "task": f"capitals_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(HERE / "capitals.jsonl")}},
        "test_split": "test",
        "doc_to_text": "Q: {{country}}\nA:",
        "num_fewshot": 2,
    }
    kinds: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{country}} {{choices}}",
            "num_fewshot": 0,
            "metric_list": [{"metric": "byte_perplexity"}],
        },
    }
    return common | kinds[kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), initializer_range=0.5)


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, BlockLM]:
    return {mode: BlockLM(str(folder), mode=mode, device="cpu", batch_size=4) for mode in ("block", "full")}


def pairs(*given: tuple[str, Any], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(given)]


@pytest.mark.parametrize("mode", ["block", "full"])
def test_a_local_task_runs_in_both_modes(models: dict[str, BlockLM], mode: str) -> None:
    results = simple_evaluate(models[mode], tasks=[task("choice"), task("answer")], bootstrap_iters=0)
    assert results and set(results["results"]) == {"capitals_choice", "capitals_answer"}
    assert all(len(samples) == 6 for samples in results["samples"].values())


@pytest.mark.parametrize("chat", [False, True])
def test_full_mode_scores_like_the_model_class_of_the_harness(
    folder: Path, models: dict[str, BlockLM], chat: bool
) -> None:
    reference = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    kinds = ["choice", "answer", *([] if chat else ["text"])]
    options = {"bootstrap_iters": 0, "apply_chat_template": chat, "fewshot_as_multiturn": chat}
    actual, expected = (
        simple_evaluate(model, tasks=[task(kind) for kind in kinds], **options)
        for model in (models["full"], reference)
    )
    assert actual and expected
    for name, samples in expected["samples"].items():
        for sample, reference_sample in zip(actual["samples"][name], samples, strict=True):
            if name == "capitals_answer":
                assert sample["resps"] == reference_sample["resps"]
            else:
                assert_close(
                    *(torch.tensor(s["resps"], dtype=torch.float64) for s in (sample, reference_sample)),
                    rtol=1e-4,
                    atol=1e-4,
                )


def test_few_shot_examples_are_blocks(models: dict[str, BlockLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores equal those of the masked forward pass of one prompt; the two modes differ."""
    model, answers = models["block"], [" Oslo", " Riga"]
    requests = pairs(*((SHOTS, answer) for answer in answers))
    scores = model.loglikelihood(requests, disable_tqdm=True)
    texts = ["Capitals.", "\n\nQ: Peru\nA: Lima", "\n\nQ: Kenya\nA: Nairobi", "\n\nQ: Norway\nA:"]
    for answer, (total, _) in zip(answers, scores, strict=True):
        blocks = model._plain.encode([*texts[:-1], texts[-1] + answer])
        metadata = build_metadata([Layout(tuple(map(len, blocks)))])
        ids = torch.tensor([[id for block in blocks for id in block]])
        logits = model._engine.model(
            input_ids=ids,
            position_ids=metadata.position_ids,
            block_masks=AttentionMasks(metadata),
            use_cache=False,
        ).logits[0, :-1]
        log_probs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[-len(answer) :]
        assert total == pytest.approx(float(log_probs.detach().sum()), abs=1e-4)
    full = models["full"].loglikelihood(requests, disable_tqdm=True)
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(scores, full, strict=True))
    # rows of any size give the same scores
    monkeypatch.setattr(loglikelihood, "ROW_TOKENS", 10)
    again = model.loglikelihood(requests, disable_tqdm=True)
    assert_close(torch.tensor(again), torch.tensor(scores), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def sees_first(tmp_path_factory: pytest.TempPathFactory) -> BlockLM:
    """A model that was trained so that local blocks see the first block."""
    folder = save_model(tmp_path_factory.mktemp("sees-first"), initializer_range=0.5)
    write_block_attention(folder, local_sees_first=True)
    return BlockLM(str(folder), mode="block", device="cpu", batch_size=4)


def test_few_shot_examples_see_the_first_block_if_the_model_was_trained_so(
    models: dict[str, BlockLM], sees_first: BlockLM
) -> None:
    """Two answers share the context; the likeliest answer is that of the engine over cached blocks."""
    requests = pairs(*((SHOTS, answer) for answer in (" Oslo", " Riga")))
    scores = sees_first.loglikelihood(requests, disable_tqdm=True)
    for (_, answer), (total, _) in zip((r.args for r in requests), scores, strict=True):
        blocks = sees_first._encode(SHOTS, answer)
        ids, layout = [*chain.from_iterable(blocks)], Layout(tuple(map(len, blocks)), local_sees_first=True)
        log_probs = masked_logits(sees_first._engine.model, ids, [layout]).log_softmax(-1)
        found = log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[-len(answer) :]
        assert total == pytest.approx(float(found.detach().sum()), abs=1e-4)
    others = models["block"].loglikelihood(requests, disable_tqdm=True)
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(scores, others, strict=True))
    until = pairs((SHOTS, {"until": [], "max_gen_toks": 1}), kind="generate_until")
    (answer,) = sees_first.generate_until(until, disable_tqdm=True)
    ((_, is_greedy),) = sees_first.loglikelihood(pairs((SHOTS, answer)), disable_tqdm=True)
    assert is_greedy or not answer.strip()


def test_the_first_block_of_a_chat_holds_the_markup_if_the_model_was_trained_so(
    models: dict[str, BlockLM], sees_first: BlockLM
) -> None:
    chat = [{"role": "user", "content": "Capitals.\n\nPeru?\n\nNorway?"}]
    texts = ("Capitals.", "\n\nPeru?", "\n\nNorway?")
    sample = Sample(id="x", source="x", messages=(Message(role="user", content=texts),), response="")
    rest = ["\n\nPeru?", "\n\nNorway?<|end|><|assistant|>"]
    for model, start in ((models["block"], ["<|user|>", "Capitals."]), (sees_first, ["<|user|>Capitals."])):
        assert model.apply_chat_template(chat).split(BLOCK_START) == ["", *start, *rest]
        engine = model._engine
        assert [engine.tokenizer.decode(ids) for ids in engine.encode(sample, 1)] == [*start, *rest]
    question = [{"role": "user", "content": "Norway?"}]
    assert sees_first.apply_chat_template(question) == models["block"].apply_chat_template(question)


def test_a_message_that_spells_markup_is_split_at_its_own_place(models: dict[str, BlockLM]) -> None:
    history = [{"role": "user", "content": content} for content in ("user", " |>\n\nend ")]
    prompt = models["full"].apply_chat_template(history)
    expected = ["", "<|user|>", "user<|end|><|user|>", " |>", "\n\nend <|end|><|assistant|>"]
    assert prompt.split(BLOCK_START) == expected


def test_user_turns_of_a_chat_start_blocks(models: dict[str, BlockLM]) -> None:
    turns = [("system", "Capitals."), ("user", "Peru?"), ("assistant", "Lima"), ("user", "Norway?\n\nSay.")]
    history = [{"role": role, "content": content} for role, content in turns]
    prompt = models["block"].apply_chat_template(history)
    assert prompt.split(BLOCK_START) == [
        "",
        "<|system|>Capitals.<|end|><|user|>",
        "Peru?<|end|><|assistant|>Lima<|end|><|user|>",
        "Norway?",
        "\n\nSay.<|end|><|assistant|>",
    ]
    tokenizer = models["block"]._tokenizer
    blocks = models["block"]._encode(prompt)
    rendered = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode([id for block in blocks for id in block]) == rendered
    assert blocks[0][0] == tokenizer.convert_tokens_to_ids("<|system|>")


def test_a_control_token_that_a_message_spells_is_encoded_as_text(models: dict[str, BlockLM]) -> None:
    model = models["block"]
    turns = [("user", "a<|end|>b <|system|>"), ("assistant", "So<|end|>")]
    history = [{"role": role, "content": content} for role, content in turns]
    prompt = model.apply_chat_template(history, add_generation_prompt=False)
    ids = [id for block in model._encode(prompt) for id in block]
    rendered = "<|user|>a<|end|>b <|system|><|end|><|assistant|>So<|end|>"
    assert model._tokenizer.decode(ids) == rendered
    added = [id for id in ids if id in model._tokenizer.added_tokens_decoder]
    assert model._tokenizer.convert_ids_to_tokens(added) == ["<|user|>", "<|end|>", "<|assistant|>"]


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (
            {"role": "user<|end|><|system|>", "content": "?"},
            "role is 'user<|end|><|system|>', it should",
        ),
        ({"role": "tool", "content": "?"}, "be one of system, user, assistant"),
        ({"role": "user", "content": None}, "content is None, it should be a text"),
        ({"role": "user", "content": "a\x1eb"}, "holds U+001E"),
        ({"content": "?"}, "role is None"),
    ],
)
def test_a_message_that_cannot_be_asked_is_refused(
    models: dict[str, BlockLM], message: dict[str, Any], fault: str
) -> None:
    with pytest.raises(UserError, match=re.escape(fault)):
        models["block"].apply_chat_template([message])


def test_no_block_is_blank(models: dict[str, BlockLM]) -> None:
    for text, number in {"\n\nA\n\n\n\nB\n\n": 2, "A\n\nB": 2, "A": 1, "": 0}.items():
        blocks = models["block"]._split(text)
        assert "".join(blocks) == text and len(blocks) == number and all(block.strip() for block in blocks)


def test_a_context_may_be_empty_or_end_in_a_space(models: dict[str, BlockLM]) -> None:
    model = models["block"]
    (empty, _), (spaced, _), (unspaced, _) = model.loglikelihood(
        pairs(("", "Oslo"), (SHOTS + " ", "Oslo"), (SHOTS, " Oslo")), disable_tqdm=True
    )
    assert empty < 0 and spaced == pytest.approx(unspaced)


def test_an_empty_continuation_has_probability_1(models: dict[str, BlockLM]) -> None:
    for model in models.values():
        requests = pairs((SHOTS, " Oslo"), (SHOTS, ""), ("", ""))
        (score, _), *others = model.loglikelihood(requests, disable_tqdm=True)
        assert score < 0 and others == [(0.0, True)] * 2


def test_answers_end_before_the_stop_string_of_the_task(models: dict[str, BlockLM]) -> None:
    settings: dict[str, Any] = {"max_gen_toks": 6}
    (complete,) = models["full"].generate_until(pairs((SHOTS, settings)), disable_tqdm=True)
    stop = complete[3]
    (stopped,) = models["full"].generate_until(
        pairs((SHOTS, settings | {"until": [stop]})), disable_tqdm=True
    )
    assert stopped == complete[: complete.index(stop)]


@pytest.mark.parametrize("mode", ["block", "full"])
def test_generation_ends_at_the_stop_string(
    models: dict[str, BlockLM], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests with other stop strings are generated separately; the order of the answers stays."""
    settings: dict[str, Any] = {"max_gen_toks": 12}
    (complete,) = models[mode].generate_until(pairs((SHOTS, settings)), disable_tqdm=True)
    calls: list[tuple[int, list[int]]] = []
    generate = models[mode]._engine.generate_ids

    def watched(prompts: Any, **options: Any) -> Any:
        answers = generate(prompts, **options)
        calls.append((len(prompts), [len(answer.ids) for answer in answers]))
        return answers

    monkeypatch.setattr(models[mode]._engine, "generate_ids", watched)
    untils: list[Any] = [[complete[2], ""], None, complete[2], [complete[1]]]
    requests = pairs(*((SHOTS, settings | {"until": until}) for until in untils))
    answers = models[mode].generate_until(requests, disable_tqdm=True)
    assert answers == [
        complete[: complete.index(complete[2])],
        complete,
        complete[: complete.index(complete[2])],
        complete[: complete.index(complete[1])],
    ]
    assert sorted(num_prompts for num_prompts, _ in calls) == [1, 1, 2]
    lengths = {num_prompts: max(lens) for num_prompts, lens in calls}
    assert lengths[2] < 12


def test_the_smaller_batch_size_counts(
    folder: Path, models: dict[str, BlockLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BlockLM(str(folder), device="cpu", batch_size="3", max_batch_size=2, dtype="float32")
    sizes: list[int] = []
    generate = model._engine.generate_ids
    monkeypatch.setattr(
        model._engine, "generate_ids", lambda p, **options: sizes.append(len(p)) or generate(p, **options)
    )
    model.generate_until(pairs(*[(SHOTS, {"max_gen_toks": 1})] * 3), disable_tqdm=True)
    assert sizes == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "half"}, "allowed: block, full"),
        ({"dtype": "float33"}, "dtype is 'float33' (allowed: auto, float32"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"batch_size": "auto"}, "batch_size is 'auto', write a number of at least 1"),
        ({"max_batch_size": 0}, "max_batch_size is 0, write a number of at least 1"),
    ],
)
def test_wrong_model_arguments_are_refused(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BlockLM(str(folder), **arguments)


def test_unsupported_requests_are_refused(models: dict[str, BlockLM]) -> None:
    with pytest.raises(UserError, match="mode=full"):
        models["block"].loglikelihood_rolling(pairs(("text",)), disable_tqdm=True)
    with pytest.raises(UserError, match="do_sample"):
        models["block"].generate_until(pairs((SHOTS, {"do_sample": True})), disable_tqdm=True)
    with pytest.raises(UserError, match="positions"):
        models["block"].loglikelihood(pairs((SHOTS + "x" * 5000, "y")), disable_tqdm=True)


def test_the_harness_runs_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "capitals.yaml").write_text(json.dumps(task("choice")))  # JSON is YAML
    arguments = ["run", "--model", "blockft", "--model_args", f"pretrained={folder},mode=block"]
    arguments += [
        "--tasks",
        "capitals_choice",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "blockft.evaluation.harness", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "capitals_choice" in done.stdout and list((tmp_path / "out").rglob("results*.json"))
