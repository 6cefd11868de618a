"""Samples to examples: token ids, labels and layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from blockft.attention.layout import Layout
from blockft.data.chat_template import Block, ChatTemplate, RenderedPrompt, TemplateMismatch, TextPart
from blockft.data.sample import Message, Sample
from blockft.data.tokenizer import PlainTokenizer, TemplatedTokenizer, encode_markup
from blockft.errors import UserError

IGNORE_INDEX = -100
"""The label of a token that is not predicted."""

Ids = list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """The token ids (T,), labels (T,) and blocks of one sample, or of several that share their local blocks.

    Both arrays are int32. A label is the id of its own token, `IGNORE_INDEX` where nothing is predicted.
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
    def has_local_blocks(self) -> bool:
        """Whether the block view differs from the full view."""
        return self.layout != self.layout.full()

    @property
    def blocks(self) -> list[NDArray[np.int32]]:
        """The ids of each block."""
        return np.split(self.input_ids, np.cumsum(self.block_lengths)[:-1])

    def layout_in_mode(self, mode: str) -> Layout:
        """The layout in the view `block` or `full`."""
        return {"block": self.layout, "full": self.layout.full()}[mode]


class Encoder:
    """Encodes with one tokenizer. The ids of a block depend on its text and on what of it is markup (law 5).

    Samples that arrive templated need no chat template: what spells an added token in them is one (law 7).

    Raises:
        UserError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._name = tokenizer.name_or_path
        self._tokenizer = tokenizer
        self._plain = PlainTokenizer(tokenizer)
        self._templated = TemplatedTokenizer(tokenizer)
        self._markup_ids: dict[str, Ids] = {}
        self._ending_ids: dict[str, Ids] = {}

    def encode(self, samples: Sequence[Sample]) -> list[Example]:
        """Examples to train on, one per sample; the labels are the response and the end of turn.

        The end of turn is what the template writes after a response, up to its first end token. A templated
        response may bring its own; else it gets the template's, or the eos token where there is no template.

        Raises:
            UnfitText: the template changes a text of a sample, which is named.
            UserError: the template or the tokenizer does not suit the texts.
        """
        chats = iter(self._encode_chats([sample for sample in samples if not sample.templated]))
        return [self._encode_templated(sample) if sample.templated else next(chats) for sample in samples]

    def encode_prompt(self, sample: Sample) -> list[Ids]:
        """The ids of each block of a sample's prompt, waiting for its response.

        Raises:
            UnfitText: the template changes a text.
            UserError: the template or the tokenizer does not suit the texts.
        """
        if sample.templated:
            return self._templated_ids(sample.templated)
        cut = self._render(sample, None)
        ids_of = self._ids_of_parts([cut])
        return [self._block_ids(block, ids_of) for block in cut.blocks]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, as one from data."""
        return [len(ids) for ids in self._plain.encode(list(texts))]

    @cached_property
    def eos_token_id(self) -> int:
        """The token with which a response ends: decoding stops there."""
        return self._ending[-1]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    @cached_property
    def _ending(self) -> Ids:
        """The end of turn where no template wrote one."""
        if self._tokenizer.chat_template:
            cut = self._template.render((Message(role="user", content=("?",)),), (), "!")
            return self._end_of_turn(cut.ending)
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {self._name} has neither a chat template nor an eos token: "
                "a model could not learn where a response ends"
            )
        return [self._tokenizer.eos_token_id]

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """The tokens after which a templated response has ended."""
        added = self._tokenizer.added_tokens_decoder
        return frozenset({id for id, token in added.items() if token.special} | {self.eos_token_id})

    def _encode_chats(self, samples: Sequence[Sample]) -> list[Example]:
        cuts = [self._render(sample, sample.response) for sample in samples]
        ids_of = self._ids_of_parts(cuts)
        examples = []
        for sample, cut in zip(samples, cuts, strict=True):
            blocks = [self._block_ids(block, ids_of) for block in cut.blocks]
            answer = [id for part in cut.answer for id in ids_of[part]] + self._end_of_turn(cut.ending)
            examples.append(_example(sample, blocks, answer))
        return examples

    def _encode_templated(self, sample: Sample) -> Example:
        (answer,) = self._templated.encode([sample.response])
        if not answer or answer[-1] not in self._end_ids:
            answer += self._ending
        return _example(sample, self._templated_ids(sample.templated), answer)

    def _render(self, sample: Sample, response: str | None) -> RenderedPrompt:
        try:
            return self._template.render(sample.messages, sample.documents, response)
        except TemplateMismatch as error:
            raise TemplateMismatch(f"sample {sample.id} of {sample.source}: {error}", error.reason) from error

    def _ids_of_parts(self, cuts: Sequence[RenderedPrompt]) -> dict[TextPart, Ids]:
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

    def _block_ids(self, block: Block, ids_of: dict[TextPart, Ids]) -> Ids:
        ids = [id for part in block for id in ids_of[part]]
        self._check_tokens(ids, "".join(part.text for part in block))
        return ids

    def _templated_ids(self, blocks: Sequence[str]) -> list[Ids]:
        all_ids = self._templated.encode(list(blocks))
        for ids, text in zip(all_ids, blocks, strict=True):
            self._check_tokens(ids, text)
        return all_ids

    def _check_tokens(self, ids: Ids, text: str) -> None:
        if not ids:
            raise TemplateMismatch(
                f"tokenizer {self._name} makes no token of the block {text!r}", "block without tokens"
            )


def _example(sample: Sample, blocks: list[Ids], answer: Ids) -> Example:
    """The blocks of a sample's prompt, and its answer as the end of the last one."""
    prompt_len = sum(map(len, blocks))
    lengths = [*map(len, blocks)]
    lengths[-1] += len(answer)
    return Example(
        input_ids=np.fromiter(chain(*blocks, answer), np.int32),
        labels=np.array([IGNORE_INDEX] * prompt_len + answer, np.int32),
        block_lengths=tuple(lengths),
        sample_ids=(sample.id,),
    )
