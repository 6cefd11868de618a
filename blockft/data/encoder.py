"""Encoder: tokenize samples into examples, which have token ids, labels and a layout of blocks.

Shapes: T tokens of an example.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from blockft.attention.layout import Layout
from blockft.data.chat_template import Block, ChatTemplate, RenderedPrompt, TemplateMismatch, TextPart
from blockft.data.sample import Sample
from blockft.data.token_cache import TokenCache
from blockft.data.tokenizer import PlainTokenizer, TemplatedTokenizer, control_token_ids, encode_markup
from blockft.errors import UserError

IGNORE_INDEX = -100
"""The label of a token that is not predicted."""

TokenIds = list[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """The encoding of one sample, or of several samples that share their local blocks.

    Attributes:
        input_ids: token ids (T,).
        label_spans: (start, end) of each run of tokens that are predicted; `end` is exclusive.
        block_lengths: the number of tokens of each block, in order; local blocks come first.
        num_final: the number of final blocks: one per sample.
        sample_ids: the ids of the samples.
    """

    input_ids: NDArray[np.int32]
    label_spans: tuple[tuple[int, int], ...]
    block_lengths: tuple[int, ...]
    num_final: int = 1
    sample_ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> NDArray[np.int32]:
        """(T,); the label of a token is its own id, or `IGNORE_INDEX` if the token is not predicted."""
        labels = np.full_like(self.input_ids, IGNORE_INDEX)
        for start, end in self.label_spans:
            labels[start:end] = self.input_ids[start:end]
        return labels

    @property
    def num_labels(self) -> int:
        """The number of label tokens."""
        return sum(end - start for start, end in self.label_spans)

    @cached_property
    def layout(self) -> Layout:
        """The layout in block mode."""
        return Layout(self.block_lengths, self.num_final)

    @property
    def has_local_blocks(self) -> bool:
        """Whether block mode differs from full mode."""
        return self.layout != self.layout.full()

    @property
    def copy_len(self) -> int:
        """The tokens that copies of the first block add in block mode, if local blocks see it."""
        return replace(self.layout, local_sees_first=True).num_row_tokens - len(self)

    @property
    def blocks(self) -> list[NDArray[np.int32]]:
        """The token ids of each block."""
        return np.split(self.input_ids, np.cumsum(self.block_lengths)[:-1])

    def layout_in_mode(self, mode: str, *, local_sees_first: bool = False) -> Layout:
        """Return the layout in mode `block` or `full`. `local_sees_first` is an option of `Layout`."""
        if mode == "full":
            return self.layout.full()
        assert mode == "block"
        return replace(self.layout, local_sees_first=True) if local_sees_first else self.layout


class Encoder:
    """Encodes samples with one tokenizer.

    The ids of a block depend only on its text and on which of its characters are markup of the chat template.
    Text from data never becomes an added token. Exception: samples that are already templated contain their
    control tokens, and need no chat template.

    With `local_sees_first`, the first block of a prompt holds the instruction: the markup at the start of the
    prompt is joined with the block after it (see `ChatTemplate.render`). No token id changes.

    `cache_bytes` is the memory for the ids of texts that are encoded again and again.

    Raises:
        UserError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, local_sees_first: bool = False, cache_bytes: int = 0
    ) -> None:
        self._name, self._local_sees_first = tokenizer.name_or_path, local_sees_first
        self._tokenizer = tokenizer
        self._plain = PlainTokenizer(tokenizer)
        self._templated = TemplatedTokenizer(tokenizer)
        self._encode_plain = self._plain.encode_arrays
        self._encode_templated_texts = self._templated.encode_arrays
        self._plain_cache = self._templated_cache = None
        if cache_bytes:
            self._plain_cache = TokenCache(self._plain.encode_arrays, cache_bytes // 2)
            self._templated_cache = TokenCache(self._templated.encode_arrays, cache_bytes // 2)
            self._encode_plain = self._plain_cache.encode
            self._encode_templated_texts = self._templated_cache.encode
        self._markup_ids: dict[str, TokenIds] = {}
        self._ending_ids: dict[str, TokenIds] = {}

    def encode(self, samples: Sequence[Sample]) -> list[Example]:
        """Encode samples to train on, one example per sample. Labels are the response and the end of turn.

        The end of turn is what the template writes after a response, up to the last of the successive added
        tokens that end a turn. White space after them belongs to the next turn. If the response of a
        templated sample has no end of turn, it gets that of the template, or the eos token if there is no
        template.

        Raises:
            TemplateMismatch: the template or the tokenizer changes a text; the message names the sample.
            UserError: the template or the tokenizer cannot be used.
        """
        chats = iter(self._encode_chats([sample for sample in samples if not sample.templated]))
        return [self._encode_templated(sample) if sample.templated else next(chats) for sample in samples]

    def encode_prompt(self, sample: Sample) -> list[TokenIds]:
        """Return the token ids of each block of a sample's prompt, up to where the response starts.

        Raises:
            TemplateMismatch: the template or the tokenizer changes a text.
            UserError: the template or the tokenizer cannot be used.
        """
        return [ids.tolist() for ids in self.encode_prompt_arrays(sample)]

    def encode_prompt_arrays(self, sample: Sample) -> list[NDArray[np.int32]]:
        """Return the token ids of each block of a sample's prompt as arrays; see `encode_prompt`."""
        if sample.templated:
            return self._templated_arrays(sample.templated)
        prompt = self._render(sample, None)
        ids_of = self._ids_of_parts([prompt])
        return [self._block_ids(block, ids_of) for block in prompt.blocks]

    def num_new_chars(self, sample: Sample) -> int:
        """Return the number of characters of a prompt that the tokenizer would read: the cache lacks them."""
        cache = (self._templated_cache if sample.templated else self._plain_cache) or ()
        return sum(len(text) for text in sample.blocks if text not in cache)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, encoded as text from data."""
        return [len(ids) for ids in self._plain.encode_arrays(texts)]

    @property
    def eos_token_id(self) -> int:
        """The first token that ends a response."""
        return self._end_token_ids[0]

    @property
    def end_token_ids(self) -> frozenset[int]:
        """All tokens that end a response. Decoding stops at the first of them."""
        return frozenset(self._end_token_ids)

    @cached_property
    def _end_token_ids(self) -> TokenIds:
        control = control_token_ids(self._tokenizer)
        return [id for id in self._ending if id in control] or self._ending

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    @cached_property
    def _ending(self) -> TokenIds:
        """The end of turn for a response whose prompt the template did not render."""
        if self._tokenizer.chat_template:
            return self._end_of_turn(self._template.ending)
        if self._tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {self._name} has neither a chat template nor an eos token: "
                "a model could not learn where a response ends"
            )
        return [self._tokenizer.eos_token_id]

    @cached_property
    def _end_ids(self) -> frozenset[int]:
        """The tokens that end a templated response."""
        added = self._tokenizer.added_tokens_decoder
        return frozenset({id for id, token in added.items() if token.special} | self.end_token_ids)

    @cached_property
    def _start_ids(self) -> frozenset[int]:
        """The added tokens that start a prompt or a turn, and end none."""
        control = control_token_ids(self._tokenizer) - {self._tokenizer.eos_token_id}
        return control.intersection(self._encode_markup(self._template.start))

    def _encode_chats(self, samples: Sequence[Sample]) -> list[Example]:
        prompts = [self._render(sample, sample.response) for sample in samples]
        ids_of = self._ids_of_parts(prompts)
        examples = []
        for sample, prompt in zip(samples, prompts, strict=True):
            blocks = [self._block_ids(block, ids_of) for block in prompt.blocks]
            answer = np.append(ids_of[prompt.answer], _token_array(self._end_of_turn(prompt.ending)))
            examples.append(_build_example(sample, blocks, answer))
        return examples

    def _encode_templated(self, sample: Sample) -> Example:
        (answer,) = self._templated.encode([sample.response])
        if not answer or answer[-1] not in self._end_ids:
            answer += self._ending
        blocks = self._templated_arrays(sample.templated)
        return _build_example(sample, blocks, _token_array(answer))

    def _render(self, sample: Sample, response: str | None) -> RenderedPrompt:
        try:
            return self._template.render(
                sample.messages, frozenset(sample.documents), response, join_start=self._local_sees_first
            )
        except TemplateMismatch as error:
            raise TemplateMismatch(f"sample {sample.id} of {sample.source}: {error}", error.reason) from error

    def _ids_of_parts(self, prompts: Sequence[RenderedPrompt]) -> dict[TextPart, NDArray[np.int32]]:
        """Return the ids of every distinct part of the prompts and their answers.

        Text from data is encoded without added tokens, markup with them.
        """
        parts = {part for prompt in prompts for block in prompt.blocks for part in block}
        parts |= {prompt.answer for prompt in prompts}
        texts = [part.text for part in parts if not part.is_markup]
        plain = dict(zip(texts, self._encode_plain(texts), strict=True))
        return {
            part: _token_array(self._encode_markup(part.text)) if part.is_markup else plain[part.text]
            for part in parts
        }

    def _encode_markup(self, text: str) -> TokenIds:
        if text not in self._markup_ids:
            self._markup_ids[text] = encode_markup(text, self._tokenizer, self._plain)
        return self._markup_ids[text]

    def _end_of_turn(self, ending: str) -> TokenIds:
        """Return the ids of the text after a response, up to the last token that ends the turn.

        Tokens that end the turn are the first added token and the added tokens that follow it, with only
        white space between them. A token that starts a turn is none of them. ::

            "<|end|> <|endoftext|> "       ->  "<|end|> <|endoftext|>"
            "<|im_end|> <|im_start|>user"  ->  "<|im_end|>"
        """
        if ending not in self._ending_ids:
            ids = self._encode_markup(ending)
            control = control_token_ids(self._tokenizer)
            end = next((i for i, id in enumerate(ids, start=1) if id in control), None)
            if end is None:
                raise UserError(
                    f"the chat template of {self._name} writes {ending!r} after a response, "
                    "which contains no added token: a model could not learn where a response ends"
                )
            for i, id in enumerate(ids[end:], start=end):
                if id in self._start_ids or id not in control and str(self._tokenizer.decode([id])).strip():
                    break
                end = i + 1 if id in control else end
            self._ending_ids[ending] = ids[:end]
        return self._ending_ids[ending]

    def _block_ids(self, block: Block, ids_of: dict[TextPart, NDArray[np.int32]]) -> NDArray[np.int32]:
        ids = ids_of[block[0]] if len(block) == 1 else np.concatenate([ids_of[part] for part in block])
        if not len(ids):
            self._fail_without_tokens("".join(part.text for part in block))
        return ids

    def _templated_arrays(self, blocks: Sequence[str]) -> list[NDArray[np.int32]]:
        arrays = self._encode_templated_texts(blocks)
        for ids, text in zip(arrays, blocks, strict=True):
            if not len(ids):
                self._fail_without_tokens(text)
        return arrays

    def _fail_without_tokens(self, text: str) -> NoReturn:
        raise TemplateMismatch(
            f"tokenizer {self._name} makes no token of the block {text!r}", "block without tokens"
        )


def _token_array(ids: TokenIds) -> NDArray[np.int32]:
    return np.array(ids, np.int32)


def _build_example(sample: Sample, blocks: Sequence[NDArray[np.int32]], answer: NDArray[np.int32]) -> Example:
    """Return the example of a prompt and its answer. The answer belongs to the final block."""
    prompt_len = sum(map(len, blocks))
    lengths = [*map(len, blocks)]
    lengths[-1] += len(answer)
    return Example(
        input_ids=np.concatenate([*blocks, answer]),
        label_spans=((prompt_len, prompt_len + len(answer)),),
        block_lengths=tuple(lengths),
        sample_ids=(sample.id,),
    )
