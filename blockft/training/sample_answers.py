"""Sample answers: answer a few held-out prompts while a model is trained, in each mode.

The prompts of all modes are packed into rows that have space for the answers. For each new token the model
computes a row as in training: the shapes, the masks and the compiled code are those of training, and every
rank takes part in every pass, as ZeRO-3 needs it.

Shapes: T tokens of a row, N positions with logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockft.attention.layout import Layout, build_metadata, token_indices
from blockft.data.collate import pad_num_labels
from blockft.data.encoder import Example
from blockft.training.model_inputs import build_model_inputs
from blockft.training.repetition import find_repetition


@dataclass(frozen=True, eq=False)
class SamplePrompt:
    """A held-out prompt. Of an example with several questions it is the first one.

    sample_id  the id of the sample
    source     index of its source
    local_ids  the token ids of the local blocks
    question_ids
               those of the final block, up to the answer
    expected_ids
               those of the expected answer
    local_lengths
               the lengths of the local blocks
    """

    sample_id: str
    source: int
    local_ids: list[int]
    question_ids: list[int]
    expected_ids: list[int]
    local_lengths: tuple[int, ...]

    @classmethod
    def of_example(cls, example: Example, source: int) -> "SamplePrompt":
        """Return the prompt of the first question of an example."""
        ids, (start, end) = example.input_ids.tolist(), example.label_spans[0]
        context_len = example.layout.context_len
        assert context_len < start < context_len + example.layout.final_lengths[0]
        return cls(
            sample_id=example.sample_ids[0] if example.sample_ids else "",
            source=source,
            local_ids=ids[:context_len],
            question_ids=ids[context_len:start],
            expected_ids=ids[start:end],
            local_lengths=example.layout.local_lengths,
        )

    @property
    def ids(self) -> list[int]:
        """The token ids of the prompt."""
        return self.local_ids + self.question_ids


@dataclass(frozen=True)
class SampleAnswer:
    """An answer of the model in training.

    prompt        number of the prompt
    mode          in which it was answered: block or full
    ids           its token ids, without the token that ended it
    ended         whether the model ended it
    """

    prompt: int
    mode: str
    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class _Item:
    """A prompt in a row: its number, its mode, where its answer starts, and the space for the answer."""

    prompt: int
    mode: str
    start: int
    space: int


@dataclass(frozen=True, eq=False)
class _Row:
    """A row of prompts with space for their answers, as `build_model_inputs` takes it."""

    items: list[_Item]
    tensors: dict[str, torch.Tensor]


class SampleAnswers:
    """Answers prompts with the model in training, greedily, every `steps` steps.

    An answer has at most `max_new_tokens` tokens, and fewer if its prompt leaves less space in a row. It ends
    at the first of `end_ids`. `reencoded` is an option of `build_metadata`, and `local_sees_first` one of
    `Layout`.
    """

    def __init__(
        self,
        prompts: Sequence[SamplePrompt],
        modes: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        *,
        steps: int,
        max_new_tokens: int,
        row_len: int,
        pad_id: int,
        reencoded: bool,
        local_sees_first: bool = False,
    ) -> None:
        self.steps, self._prompts, self._tokenizer = steps, prompts, tokenizer
        self._modes, self._end_ids = modes, end_ids
        self._row_len, self._pad_id, self._reencoded = row_len, pad_id, reencoded
        self._local_sees_first = local_sees_first
        # an answer has equal space in all modes
        longest = [max(self._layout(prompt, mode).num_row_tokens for mode in modes) for prompt in prompts]
        self._spaces = [min(max_new_tokens, row_len - num_tokens) for num_tokens in longest]

    @torch.no_grad()
    def answer(
        self,
        model: PreTrainedModel | PeftModel,
        device: torch.device,
        *,
        is_stopped: Callable[[], bool] = lambda: False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> list[SampleAnswer] | None:
        """Return the answers, the modes of each prompt together. All ranks call it; each computes its rows.

        The model is in the mode (training or evaluation) that it was in, and no random number is drawn. If
        `is_stopped` returns true on a rank, the result is None on all ranks.
        """
        rows = self._build_rows(num_ranks)[rank::num_ranks]
        decoders = [_RowDecoder(row, self._end_ids, device, model.config) for row in rows]
        was_training = model.training
        model.eval()
        try:
            while True:
                is_busy = any(not decoder.has_ended for decoder in decoders)
                flags = torch.tensor([is_busy, is_stopped()], dtype=torch.int32, device=device)
                if num_ranks > 1:
                    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
                is_busy, stop = flags.tolist()
                if stop:
                    return None
                if not is_busy:
                    break
                for decoder in decoders:
                    # several ranks compute the same number of passes
                    if num_ranks > 1 or not decoder.has_ended:
                        decoder.step(model)
        finally:
            model.train(was_training)
        answers = [answer for decoder in decoders for answer in decoder.answers()]
        gathered: list[Any] = [answers]
        if num_ranks > 1:
            gathered = [None] * num_ranks
            torch.distributed.all_gather_object(gathered, answers)
        of_all = [answer for answers in gathered for answer in answers]
        return sorted(of_all, key=lambda answer: (answer.prompt, self._modes.index(answer.mode)))

    def describe(self, answers: Sequence[SampleAnswer], step: int) -> list[dict[str, Any]]:
        """Return answers as records: texts without control tokens, and whether an answer repeats itself.

        An answer that did not end repeats itself if its end is a repetition and the expected answer is none.
        """
        records = []
        for answer in answers:
            prompt = self._prompts[answer.prompt]
            repeated = None
            if not answer.ended and not find_repetition(prompt.expected_ids, self._tokenizer):
                repeated = find_repetition(answer.ids, self._tokenizer)
            records.append(
                {
                    "step": step,
                    "prompt": answer.prompt,
                    "sample_id": prompt.sample_id,
                    "source": prompt.source,
                    "mode": answer.mode,
                    "question": self._decode(prompt.question_ids),
                    "expected": self._decode(prompt.expected_ids),
                    "answer": self._decode(answer.ids),
                    "num_tokens": len(answer.ids),
                    "ended": answer.ended,
                    "repeated": repeated,
                }
            )
        return records

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _layout(self, prompt: SamplePrompt, mode: str, space: int = 0) -> Layout:
        """Return the layout of a prompt with space for its answer."""
        lengths = (*prompt.local_lengths, len(prompt.question_ids) + space)
        layout = Layout(lengths, local_sees_first=self._local_sees_first)
        return layout.full() if mode == "full" else layout

    def _build_rows(self, num_ranks: int) -> list[_Row]:
        """Return the rows, a multiple of the number of ranks: each prompt in each mode, in the first row with
        enough space."""
        packed: list[list[tuple[int, str]]] = []
        free: list[int] = []
        for number, prompt in enumerate(self._prompts):
            for mode in self._modes:
                needed = self._layout(prompt, mode, self._spaces[number]).num_row_tokens
                index = next((i for i, tokens in enumerate(free) if tokens >= needed), len(free))
                if index == len(free):
                    packed.append([])
                    free.append(self._row_len)
                packed[index].append((number, mode))
                free[index] -= needed
        packed += [[] for _ in range(-len(packed) % num_ranks)]
        return [self._build_row(row) for row in packed]

    def _build_row(self, row: Sequence[tuple[int, str]]) -> _Row:
        ids_T = torch.full((1, self._row_len), self._pad_id)
        items, layouts, start = [], [], 0
        for number, mode in row:
            prompt, space = self._prompts[number], self._spaces[number]
            layout = self._layout(prompt, mode)
            end = start + layout.num_row_tokens
            ids_T[0, start:end] = torch.tensor(prompt.ids)[token_indices([layout])]
            layouts.append(self._layout(prompt, mode, space))
            items.append(_Item(number, mode, end, space))
            start = end + space
        metadata = build_metadata(layouts, self._row_len, reencoded=self._reencoded)
        return _Row(
            items,
            {
                "input_ids": ids_T,
                "position_ids": metadata.position_ids,
                "example_ids": metadata.example_ids,
                "block_ids": metadata.block_ids,
                "is_final": metadata.is_final,
                "is_copy": metadata.is_copy,
                # as many as a row of training may have, because compiled code has fixed shapes
                "logits_to_keep": torch.zeros(pad_num_labels(len(row)), dtype=torch.long),
            },
        )


class _RowDecoder:
    """Decodes the answers of a row. A row without prompts only takes part in the passes."""

    def __init__(self, row: _Row, end_ids: frozenset[int], device: torch.device, config: Any) -> None:
        self._items, self._end_ids = row.items, end_ids
        self._inputs = build_model_inputs(
            {name: tensor.to(device) for name, tensor in row.tensors.items()}, config
        )
        self._starts = torch.tensor([item.start for item in row.items], dtype=torch.int64, device=device)
        self._last = self._starts + torch.tensor(
            [item.space - 1 for item in row.items], dtype=torch.int64, device=device
        )
        self._new_ids: list[list[int]] = [[] for _ in row.items]
        self._num_steps = 0

    @property
    def has_ended(self) -> bool:
        return all(map(self._has_ended, range(len(self._items))))

    def _has_ended(self, index: int) -> bool:
        ids = self._new_ids[index]
        return len(ids) >= self._items[index].space or bool(ids) and ids[-1] in self._end_ids

    def step(self, model: PreTrainedModel | PeftModel) -> None:
        """Compute the row and append a token to each answer that has not ended."""
        # an answer without more space computes its last token again
        positions = torch.minimum(self._starts + self._num_steps, self._last)
        self._inputs["logits_to_keep"][: len(self._items)] = positions - 1
        next_ids = model(**self._inputs).logits[0, : len(self._items)].argmax(dim=-1)
        self._inputs["input_ids"][0, positions] = next_ids
        self._num_steps += 1
        for index, id in enumerate(next_ids.tolist()):
            if not self._has_ended(index):
                self._new_ids[index].append(id)

    def answers(self) -> list[SampleAnswer]:
        answers = []
        for item, ids in zip(self._items, self._new_ids, strict=True):
            ended = bool(ids) and ids[-1] in self._end_ids
            answers.append(SampleAnswer(item.prompt, item.mode, ids[:-1] if ended else ids, ended))
        return answers


def format_answers(records: Sequence[dict[str, Any]], max_len: int = 60) -> list[str]:
    """Return a line for each prompt, for example 'sample q7: expected "7", block "7", full "9 9 ..."'."""
    lines: dict[int, str] = {}
    for record in records:
        expected, answer = (_quote(record[name], max_len) for name in ("expected", "answer"))
        start = f"step {record['step']}, sample {record['sample_id']}: expected {expected}"
        line = lines.setdefault(record["prompt"], start)
        lines[record["prompt"]] = f"{line}, {record['mode']} {answer}"
    return list(lines.values())


def _quote(text: str, max_len: int) -> str:
    text = " ".join(text.split())
    return f'"{text if len(text) <= max_len else text[: max_len - 3] + "..."}"'


def describe_repetition(records: Sequence[dict[str, Any]]) -> str | None:
    """Return a warning if answers repeat themselves without an end, or None."""
    repeating = [record for record in records if record["repeated"] is not None]
    if not repeating:
        return None
    first = repeating[0]
    return (
        f"at step {first['step']}, {len(repeating)} of {len(records)} sample answers repeat themselves "
        f"without an end, such as that of sample {first['sample_id']} in {first['mode']} mode "
        f"({_quote(first['repeated'], 60)}): if later answers do so, too, train on more examples or lower "
        "train.learning_rate"
    )
