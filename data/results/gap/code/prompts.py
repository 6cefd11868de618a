"""Prompts of the study as token arrays, and rows of them as tensors.

Shapes: T tokens of a row or prompt, N predicted tokens.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from blockft.attention.backends import BlockMasks
from blockft.attention.layout import PADDING, Vectors
from blockft.data.packing import plan_rows
from numpy.typing import NDArray

Ids = NDArray[np.int64]

HEAD, DOCUMENT, QUESTION, ANSWER, EXTRA = range(5)
"""Kinds of token: before the documents, in one, in the final block's prompt, of the response, added."""

RESERVED_IDS = tuple(range(3, 17))
"""Added tokens of SmolLM2 that occur in no text: they serve as sink and link tokens."""

# as in blockft.data, which imports transformers: half a minute on a machine with cold files
NO_LABEL, LABEL_STEP = -100, 256

NUM_DOCUMENTS = 10
STRIP = 1024


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What a prompt's tokens are and who may read them, in training and in evaluation alike.

    private_prefix    first tokens of the prompt that every document block repeats before its own tokens, seen
                      by that block alone, at the positions right before it: the block is encoded as if it
                      stood first in the prompt. -1 takes all tokens before the documents, as one block.
    sink_tokens       reserved tokens at the start of every document block, part of it
    link_tokens       reserved tokens after every document, a block that reads all context before it
    end_tokens       reserved tokens at the end of every document block, part of it
    is_bidirectional  whether a document's tokens see the whole block, not only what is before them
    hidden_first      first tokens of a document that only its own block sees
    question_twice    the final block asks the question two times
    reencoded         whether blocks stand at their place in the prompt; otherwise each starts at position 0
    document_stride   positions by which each document ends before the next one, in block mode: documents overlap
                      in position, and the last one ends right before the question. None places them one after
                      the other
    min_documents     training draws between so many and 10 documents, from the 20 that a search ranks first
    """

    private_prefix: int = 0
    sink_tokens: int = 0
    link_tokens: int = 0
    end_tokens: int = 0
    is_bidirectional: bool = False
    hidden_first: int = 0
    question_twice: bool = False
    reencoded: bool = True
    document_stride: int | None = None
    min_documents: int = NUM_DOCUMENTS


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A prompt with its answer, all (T,): ids, positions, block numbers, flags, kinds.

    support is 1 in documents that support the answer, 0 in others, -1 elsewhere. weights (T,) are those of
    the tokens' losses. `number` is the question's place in the data, -1 for a chat.
    """

    number: int
    ids: Ids
    positions: Ids
    blocks: Ids
    is_final: NDArray[np.bool_]
    is_link: NDArray[np.bool_]
    is_private: NDArray[np.bool_]
    is_bidirectional: NDArray[np.bool_]
    kinds: NDArray[np.int8]
    support: NDArray[np.int8]
    weights: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)


class Builder:
    """Collects the blocks of a prompt; a position is counted on only by tokens that are not private.

    Where several questions share a prompt (`is_shared`), each is a block that reads the documents and that no
    other block sees, and all begin at the same position (`add_question`).
    """

    def __init__(self, mode: str, reencoded: bool = True, is_shared: bool = False) -> None:
        assert mode in ("block", "full"), mode
        self._mode, self._reencoded, self._is_shared = mode, reencoded, is_shared
        self._parts: list[tuple[Ids, Ids, int, bool, bool, NDArray[np.bool_], bool, int, int, float]] = []
        self._block, self._next = -1, 0

    def add(
        self,
        ids: Any,
        kind: int,
        *,
        starts_block: bool = True,
        is_final: bool = False,
        is_link: bool = False,
        support: int = -1,
        is_bidirectional: bool = False,
        private_prefix: Any = (),
        num_hidden: int = 0,
        at: int | None = None,
    ) -> None:
        """Append tokens, as a block of their own unless they go on with the last one; `at` is where they stand."""
        full = self._mode == "full"
        prefix = np.asarray([] if full else private_prefix, np.int64)
        ids = np.concatenate([prefix, np.asarray(ids, np.int64)])
        if starts_block:
            self._block += 1
        start = self._next if full or self._reencoded or is_final or not starts_block else 0
        start = start if at is None else at
        positions = np.arange(start - len(prefix), start - len(prefix) + len(ids))
        if start < len(prefix):
            positions += len(prefix) - start
        is_private = np.arange(len(ids)) < (0 if full else len(prefix) + num_hidden)
        block = 0 if full else self._block
        final, link = is_final or (full and not self._is_shared), is_link and not full
        ahead = is_bidirectional and not full
        self._parts.append((ids, positions, block, final, link, is_private, ahead, kind, support, 1.0))
        self._next += len(ids) - len(prefix)

    @property
    def next_position(self) -> int:
        return self._next

    def move_to(self, position: int) -> None:
        """What follows stands there."""
        self._next = position

    def add_question(self, question: Any, answer: Any, weight: float) -> None:
        """Append one of several questions that share the documents; its answer's loss has this weight."""
        assert self._is_shared
        self._block += 1
        start = self._next
        for ids, kind in ((question, QUESTION), (answer, ANSWER)):
            ids = np.asarray(ids, np.int64)
            positions = np.arange(start, start + len(ids))
            hidden = np.ones(len(ids), np.bool_)
            self._parts.append((ids, positions, self._block, False, True, hidden, False, kind, -1, weight))
            start += len(ids)

    def finish(self, number: int) -> Prompt:
        ids, positions, blocks, final, link, private, ahead, kinds, support, weights = zip(
            *self._parts, strict=True
        )
        lengths = [len(part) for part in ids]
        spread = {
            name: np.repeat(np.array(values, dtype), lengths)
            for name, values, dtype in (
                ("blocks", blocks, np.int64),
                ("is_final", final, np.bool_),
                ("is_link", link, np.bool_),
                ("is_bidirectional", ahead, np.bool_),
                ("kinds", kinds, np.int8),
                ("support", support, np.int8),
                ("weights", weights, np.float32),
            )
        }
        return Prompt(
            number=number,
            ids=np.concatenate(ids),
            positions=np.concatenate(positions),
            is_private=np.concatenate(private),
            **spread,
        )


def choose_documents(
    question: dict[str, Any], order: str, rng: random.Random, least: int, by_lot: float = 0.0
) -> tuple[list[int], str]:
    """Places of a question's documents in the order of its prompt, and the order.

    The supporting documents stay, and the best ranked others fill up to ten. If `least` is less than ten, so
    many or more are drawn, and the others by lot. With the probability `by_lot` ten are drawn by lot. `order`
    is `ascending`, `shuffled` or `mixed`, which draws one of the two.
    """
    places = range(len(question["documents"]))
    supporting = [i for i in places if question["supports"][i]]
    others = [i for i in places if not question["supports"][i]]
    num_documents = NUM_DOCUMENTS
    if least < NUM_DOCUMENTS:
        num_documents = rng.randint(least, NUM_DOCUMENTS)
        others = rng.sample(others, len(others))
    if by_lot and rng.random() < by_lot:
        others = rng.sample(others, len(others))
    chosen = sorted(supporting + others[: max(0, num_documents - len(supporting))], reverse=True)
    if order == "mixed":
        order = rng.choice(["ascending", "shuffled"])
    if order == "shuffled":
        rng.shuffle(chosen)
    return chosen, order


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How many questions about a prompt's documents are asked in one prompt, in training.

    num_questions  the question itself and others of the training part whose supporting documents are all among
                   the prompt's: in ascending order those with the same supporting documents, so that these stay
                   as near to the question as the ranking puts them; in shuffled order any. Together they weigh
                   as much as one question.
    num_clozes     sentences of the documents with a gap (`more_data.py`), which together weigh `cloze_weight`
    by_lot         probability that the other documents are drawn by lot from the 20 that a search ranks first
    """

    num_questions: int = 8
    num_clozes: int = 0
    cloze_weight: float = 0.5
    by_lot: float = 0.0

    def questions(
        self, data: dict[str, Any], number: int, places: list[int], order: str, rng: random.Random
    ) -> list[tuple[Any, Any, float]]:
        """The final block, the answer and the weight of each question that a prompt asks."""
        own = data["questions"][number]
        documents = {own["documents"][place] for place in places}
        wanted = support_of(own) if order == "ascending" else documents
        others = sorted(
            {
                other
                for document in wanted
                for other in data["asked_about"].get(document, ())
                if support_of(data["questions"][other]) <= documents
                and (order == "shuffled" or support_of(data["questions"][other]) == wanted)
            }
            - {number}
        )
        chosen = [number, *rng.sample(others, min(len(others), self.num_questions - 1))]
        asked = [
            (data["questions"][n]["final"], data["questions"][n]["answer"], 1 / len(chosen)) for n in chosen
        ]
        if self.num_clozes:
            gaps = [cloze for document in sorted(documents) for cloze in data["clozes"].get(document, ())]
            some = rng.sample(gaps, min(len(gaps), self.num_clozes))
            asked += [(final, answer, self.cloze_weight / len(some)) for final, answer in some]
        rng.shuffle(asked)
        return asked


def support_of(question: dict[str, Any]) -> set[int]:
    """The numbers of a question's supporting documents."""
    return {
        number
        for number, is_support in zip(question["documents"], question["supports"], strict=True)
        if is_support
    }


def index_questions(data: dict[str, Any], questions: Sequence[int]) -> dict[int, list[int]]:
    """For each document the questions that it supports, for `Sharing`."""
    asked_about: dict[int, list[int]] = {}
    for number in questions:
        for document in sorted(support_of(data["questions"][number])):
            asked_about.setdefault(document, []).append(number)
    return asked_about


def build_prompt(
    data: dict[str, Any],
    number: int,
    *,
    mode: str,
    order: str,
    rng: random.Random,
    prompt_options: PromptOptions,
    join_probability: float = 0.0,
    sharing: Sharing | None = None,
    places: Sequence[int] | None = None,
) -> Prompt:
    """The tokens of a question's prompt with its answer; neighbouring documents are joined at random.

    With `sharing` other questions about the same documents follow, see `Sharing`. `places` gives the documents
    and their order instead of `order`.
    """
    question = data["questions"][number]
    head = np.concatenate(question["head"])
    prefix = head if prompt_options.private_prefix < 0 else head[: prompt_options.private_prefix]
    builder = Builder(mode, prompt_options.reencoded, is_shared=sharing is not None)
    if prompt_options.private_prefix < 0:
        builder.add(head, HEAD)
    else:
        for block in question["head"]:
            builder.add(block, HEAD)
    least = min(prompt_options.min_documents, NUM_DOCUMENTS)
    sinks, gists = RESERVED_IDS[: prompt_options.sink_tokens], RESERVED_IDS[4 : 4 + prompt_options.end_tokens]
    links = RESERVED_IDS[8 : 8 + prompt_options.link_tokens]
    by_lot = sharing.by_lot if sharing else 0.0
    if places is None:
        places, order = choose_documents(question, order, rng, least, by_lot)
    starts, end = [], 0
    if prompt_options.document_stride is not None and mode == "block":
        assert not join_probability and not links and not sinks and not gists
        lengths = [len(data["documents"][question["documents"][index]]) for index in places]
        before = [prompt_options.document_stride * (len(places) - 1 - place) for place in range(len(places))]
        end = builder.next_position + max(map(sum, zip(lengths, before, strict=True)))
        starts = [end - some - length for some, length in zip(before, lengths, strict=True)]
    for place, index in enumerate(places):
        support = int(question["supports"][index])
        joined = place > 0 and rng.random() < join_probability
        builder.add(
            np.concatenate([sinks, data["documents"][question["documents"][index]], gists]),
            DOCUMENT,
            starts_block=not joined,
            support=support,
            is_bidirectional=prompt_options.is_bidirectional,
            private_prefix=() if joined else prefix,
            num_hidden=prompt_options.hidden_first,
            at=starts[place] if starts else None,
        )
        if links:
            builder.add(links, EXTRA, is_link=True)
    if starts:
        builder.move_to(end)
    if sharing is not None:
        for final, answer, weight in sharing.questions(data, number, list(places), order, rng):
            builder.add_question(final, answer, weight)
        return builder.finish(number)
    final = question["final_twice" if prompt_options.question_twice else "final"]
    builder.add(final, QUESTION, is_final=True)
    builder.add(question["answer"], ANSWER, starts_block=False, is_final=True)
    return builder.finish(number)


def build_chat(chat: dict[str, Any], mode: str) -> Prompt:
    """The tokens of an instruction with its answer."""
    ids, is_answer = np.asarray(chat["ids"], np.int64), np.asarray(chat["labels"])
    builder, start = Builder(mode), 0
    for index, length in enumerate(chat["block_lengths"]):
        is_final = index == len(chat["block_lengths"]) - 1
        builder.add(ids[start : start + length], HEAD, is_final=is_final)
        start += length
    prompt = builder.finish(-1)
    prompt.kinds[is_answer] = ANSWER
    return prompt


def pack(lengths: Sequence[int], row_len: int, seed: int, epoch: int) -> list[list[int]]:
    return plan_rows(lengths, row_len, seed, epoch)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: what a forward pass takes, and what is predicted.

    logits_to_keep (N,) positions whose next token is predicted, padded with position 0
    shift_labels   (N,) those tokens, `NO_LABEL` where padded
    label_kinds    (N,) the kind of the predicted token, -1 where padded
    label_weights  (N,) the weight of its loss, 0 where padded
    label_examples (N,) its example, -1 where padded
    is_first       (N,) whether it is the first token of a question's answer
    support        (T,) see `Prompt`
    lowest         see `blockft.attention.mask.tile_mask`
    """

    input_ids: torch.Tensor
    vectors: Vectors
    logits_to_keep: torch.Tensor
    shift_labels: torch.Tensor
    label_kinds: torch.Tensor
    label_weights: torch.Tensor
    label_examples: torch.Tensor
    is_first: torch.Tensor
    support: torch.Tensor
    lowest: tuple[int, ...]

    @property
    def position_ids(self) -> torch.Tensor:
        return self.vectors.position_ids

    @property
    def example_ids(self) -> torch.Tensor:
        return self.vectors.example_ids[0]

    @cached_property
    def model_inputs(self) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids,
            "position_ids": self.vectors.position_ids,
            "block_masks": BlockMasks(self.vectors, self.lowest),
        }

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Row":
        """The row with every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, vectors=self.vectors.map(change))

    def to(self, device: torch.device) -> "Row":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Row":
        """In memory from which a GPU copies without waiting."""
        return self.map(torch.Tensor.pin_memory)


def collate(
    prompts: Sequence[Prompt],
    row_len: int,
    pad_id: int,
    *,
    is_predicted: Callable[[Prompt], NDArray[np.bool_]] | None = None,
    causal_by_position: bool = False,
) -> Row:
    """A row of prompts; `is_predicted` names the tokens that are predicted, the answers unless given.

    `causal_by_position` is for prompts with tokens that are computed once more, see `recompute`.
    """
    num_tokens = sum(map(len, prompts))
    assert num_tokens <= row_len, (num_tokens, row_len)

    def whole(arrays: Sequence[Any], fill: Any, dtype: Any) -> NDArray[Any]:
        row = np.full(row_len, fill, dtype)
        if arrays:
            row[:num_tokens] = np.concatenate(arrays)
        return row

    first_block = np.cumsum([0, *(int(p.blocks.max()) + 1 for p in prompts)])
    blocks = [p.blocks + start for p, start in zip(prompts, first_block, strict=False)]
    examples = [np.full(len(p), i) for i, p in enumerate(prompts)]
    predicted = [p.kinds == ANSWER if is_predicted is None else is_predicted(p) for p in prompts]
    ids_T = whole([p.ids for p in prompts], pad_id, np.int64)
    positions_T = whole([p.positions for p in prompts], 0, np.int64)
    positions_T[num_tokens:] = np.arange(row_len - num_tokens)
    example_ids_T = whole(examples, PADDING, np.int32)
    kinds_T = whole([p.kinds for p in prompts], -1, np.int8)
    weights_T = whole([p.weights for p in prompts], 0, np.float32)
    labelled = np.flatnonzero(whole(predicted, False, np.bool_))
    assert (labelled > 0).all() and (example_ids_T[labelled - 1] == example_ids_T[labelled]).all()
    padding = -len(labelled) % LABEL_STEP if len(labelled) else LABEL_STEP

    def at_labels(values_T: NDArray[Any], fill: int) -> NDArray[Any]:
        return np.pad(values_T[labelled].astype(np.int64), (0, padding), constant_values=fill)

    is_first_T = (kinds_T == ANSWER) & (np.roll(kinds_T, 1) == QUESTION)
    starts = np.cumsum([0, *map(len, prompts)])
    lowest = [
        int(starts[example_ids_T[s]]) if example_ids_T[s] >= 0 else num_tokens
        for s in range(0, row_len, STRIP)
    ]
    flags = {
        name: torch.from_numpy(whole([getattr(p, name) for p in prompts], False, np.bool_))[None]
        for name in ("is_final", "is_link", "is_private", "is_bidirectional")
    }
    if not flags["is_bidirectional"].any():
        # one rule less for compiled code
        flags.pop("is_bidirectional")
    vectors = Vectors(
        position_ids=torch.from_numpy(positions_T)[None],
        example_ids=torch.from_numpy(example_ids_T)[None],
        block_ids=torch.from_numpy(whole(blocks, PADDING, np.int32))[None],
        causal_by_position=causal_by_position,
        **flags,
    )
    return Row(
        input_ids=torch.from_numpy(ids_T)[None],
        vectors=vectors,
        logits_to_keep=torch.from_numpy(np.pad(labelled - 1, (0, padding))),
        shift_labels=torch.from_numpy(at_labels(ids_T, NO_LABEL)),
        label_kinds=torch.from_numpy(at_labels(kinds_T, -1)),
        label_weights=torch.from_numpy(np.pad(weights_T[labelled], (0, padding))),
        label_examples=torch.from_numpy(at_labels(example_ids_T, -1)),
        is_first=torch.from_numpy(at_labels(is_first_T, 0).astype(np.bool_)),
        support=torch.from_numpy(whole([p.support for p in prompts], -1, np.int8)),
        lowest=tuple(lowest),
    )


def recompute(prompt: Prompt, is_chosen: NDArray[np.bool_]) -> Prompt:
    """The prompt in block mode with the chosen context tokens computed once more, as full attention has them.

    The copies stand after their block, at the positions of the originals. They see all context up to their
    position, with copies in the place of originals. The originals are seen by their own blocks alone, which
    are cached. This is selective recomputation (CacheBlend) as a masked forward pass. Collate the prompt
    `causal_by_position`.
    """
    assert not prompt.is_link.any() and not (is_chosen & prompt.is_private).any()
    order = []
    for block in range(int(prompt.blocks.max()) + 1):
        own = np.flatnonzero(prompt.blocks == block)
        chosen = own[is_chosen[own] & ~prompt.is_final[own]]
        order.append((own, False))
        if len(chosen):
            order.append((chosen, True))
    places = np.concatenate([where for where, _ in order])
    is_copy = np.concatenate([np.full(len(where), copied) for where, copied in order])
    blocks = np.concatenate([np.full(len(where), number) for number, (where, _) in enumerate(order)])
    taken = {
        name: getattr(prompt, name)[places]
        for name in (
            "ids",
            "positions",
            "is_final",
            "is_link",
            "is_private",
            "is_bidirectional",
            "kinds",
            "support",
            "weights",
        )
    }
    taken["is_link"] = is_copy
    taken["is_private"] |= is_chosen[places] & ~is_copy & ~prompt.is_final[places]
    return Prompt(number=prompt.number, blocks=blocks, **taken)
