"""Samples to examples: token ids, labels and layout."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from blockft.attention.layout import Layout
from blockft.data.rag import trim
from blockft.data.sample import Message, Sample
from blockft.data.template import Block, Cut, Part, Template, UnfitText
from blockft.data.tokenizer import PlainTokenizer, encode_markup
from blockft.errors import UserError

NO_LABEL = -100
"""The label of a token that is not predicted."""

Ids = list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """The token ids (T,), labels (T,) and blocks of one sample, or of several that share their local blocks.

    Both arrays are int32. A label is the id of its own token, `NO_LABEL` where nothing is predicted.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    block_lengths: tuple[int, ...]
    num_final: int = 1
    sample_ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.block_lengths, self.num_final)

    @property
    def splits(self) -> bool:
        """Whether the block view differs from the full view."""
        return self.layout != self.layout.full()

    @property
    def blocks(self) -> list[NDArray[np.int32]]:
        """The ids of each block."""
        return np.split(self.input_ids, np.cumsum(self.block_lengths)[:-1])

    def layout_of(self, view: str) -> Layout:
        """The layout in the view `block` or `full`."""
        return {"block": self.layout, "full": self.layout.full()}[view]


class Encoder:
    """Encodes with one tokenizer. The ids of a block depend on its text and on what of it is markup (law 5).

    Raises:
        UserError: the tokenizer has no chat template or no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name = tokenizer.name_or_path
        self._tokenizer = tokenizer
        self._template = Template(tokenizer)
        self._plain = PlainTokenizer(tokenizer)
        self._markup_ids: dict[str, Ids] = {}
        self._ending_ids: dict[str, Ids] = {}

    def encode(self, samples: Sequence[Sample]) -> list[Example]:
        """Examples to train on, one per sample; the labels are the response and the template's end of turn.

        Raises:
            UserError: the template or the tokenizer does not suit the texts.
        """
        cuts = [self._template.cut(s.messages, s.documents, s.response) for s in samples]
        ids_of = self._ids_of_parts(cuts)
        return [self._example(s, cut, ids_of) for s, cut in zip(samples, cuts, strict=True)]

    def encode_prompt(self, messages: Sequence[Message], documents: Collection[int] = ()) -> list[Ids]:
        """The ids of each block of a prompt that waits for its response; `documents` are numbers of blocks.

        Raises:
            UserError: the template or the tokenizer does not suit the texts.
        """
        cut = self._template.cut(messages, documents)
        ids_of = self._ids_of_parts([cut])
        return [self._block_ids(block, ids_of) for block in cut.blocks]

    @cached_property
    def end_of_turn_id(self) -> int:
        """The token with which the template ends a response: decoding stops there."""
        cut = self._template.cut((Message(role="user", content=("?",)),), (), "!")
        return self._end_of_turn(cut.ending)[-1]

    def _example(self, sample: Sample, cut: Cut, ids_of: dict[Part, Ids]) -> Example:
        blocks = [self._block_ids(block, ids_of) for block in cut.blocks]
        answer = [id for part in cut.answer for id in ids_of[part]] + self._end_of_turn(cut.ending)
        prompt_len = sum(map(len, blocks))
        blocks[-1] += answer
        return Example(
            input_ids=np.fromiter(chain.from_iterable(blocks), np.int32),
            labels=np.array([NO_LABEL] * prompt_len + answer, np.int32),
            block_lengths=tuple(map(len, blocks)),
            sample_ids=(sample.id,),
        )

    def _ids_of_parts(self, cuts: Sequence[Cut]) -> dict[Part, Ids]:
        """The ids of every distinct part: texts by the plain tokenizer, markup with the added tokens."""
        parts = {part for cut in cuts for block in cut.blocks for part in block}
        parts |= {part for cut in cuts for part in cut.answer}
        texts = [part.text for part in parts if not part.is_markup]
        plain = dict(zip(texts, self._plain.encode(texts), strict=True))
        return {p: self._encode_markup(p.text) if p.is_markup else plain[p.text] for p in parts}

    def _encode_markup(self, text: str) -> Ids:
        if text not in self._markup_ids:
            self._markup_ids[text] = encode_markup(text, self._tokenizer, self._plain)
        return self._markup_ids[text]

    def _end_of_turn(self, ending: str) -> Ids:
        """The ids of what follows a response, up to the first end token: there generation stops."""
        if ending not in self._ending_ids:
            added = self._tokenizer.added_tokens_decoder
            ids = self._encode_markup(ending)
            end = next((i for i, id in enumerate(ids, start=1) if id in added), None)
            if end is None:
                raise UserError(
                    f"the chat template of {self._name} writes {ending!r} after a response, "
                    "which holds no added token: a model could not learn where a response ends"
                )
            self._ending_ids[ending] = ids[:end]
        return self._ending_ids[ending]

    def _block_ids(self, block: Block, ids_of: dict[Part, Ids]) -> Ids:
        ids = [id for part in block for id in ids_of[part]]
        if not ids:
            raise UnfitText(
                f"tokenizer {self._name} makes no token of the block {''.join(p.text for p in block)!r}",
                "block without tokens",
            )
        return ids


@dataclass(frozen=True)
class Outcome:
    """What became of a sample: the example as tried last, and why it was dropped, if it was."""

    sample: Sample
    example: Example | None
    dropped: str = ""


def encode_to_fit(samples: Sequence[Sample], encoder: Encoder, row_len: int, trims: bool) -> list[Outcome]:
    """Encode samples that have to fit in a row; if `trims`, long ones lose their least relevant documents."""
    trainable = [sample for sample in samples if sample.response]
    examples = iter(encoder.encode(trainable))
    return [
        _fit(sample, next(examples), encoder, row_len, trims)
        if sample.response
        else Outcome(sample, None, "no response")
        for sample in samples
    ]


def _fit(sample: Sample, example: Example, encoder: Encoder, row_len: int, trims: bool) -> Outcome:
    while len(example) > row_len:
        trimmed = trim(sample) if trims else None
        if trimmed is None:
            return Outcome(sample, example, "too long")
        sample, example = trimmed, encoder.encode([trimmed])[0]
    return Outcome(sample, example)


def share_context(examples: Iterator[Example], row_len: int) -> Iterator[Example]:
    """Consecutive examples with the same local blocks become one, as long as it fits in a row.

    The local blocks once, then a final block per question (`Layout.num_final`)::

        A B Q1  A B Q2  A C Q3   ->   A B Q1 Q2  A C Q3
    """
    group: list[Example] = []
    group_len = 0
    for example in examples:
        own_len = example.layout.final_lengths[0]
        if group and _shares(group[0], example) and group_len + own_len <= row_len:
            group.append(example)
            group_len += own_len
            continue
        if group:
            yield _merge(group)
        group, group_len = [example], len(example)
    if group:
        yield _merge(group)


def _shares(a: Example, b: Example) -> bool:
    context_len = a.layout.context_len
    return (
        context_len > 0
        and a.layout.local_lengths == b.layout.local_lengths
        and np.array_equal(a.input_ids[:context_len], b.input_ids[:context_len])
    )


def _merge(group: Sequence[Example]) -> Example:
    if len(group) == 1:
        return group[0]
    context_len = group[0].layout.context_len
    later = group[1:]
    return Example(
        input_ids=np.concatenate([group[0].input_ids, *(e.input_ids[context_len:] for e in later)]),
        labels=np.concatenate([group[0].labels, *(e.labels[context_len:] for e in later)]),
        block_lengths=group[0].block_lengths + tuple(e.block_lengths[-1] for e in later),
        num_final=len(group),
        sample_ids=tuple(id for e in group for id in e.sample_ids),
    )
