"""Which characters of a prompt the chat template wrote, and to which block they belong."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NoReturn

import jinja2
from transformers import PreTrainedTokenizerBase

from blockft.data.sample import Message
from blockft.errors import UserError

FIXED_DATE = """
{%- macro strftime_now(format) -%}
{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | replace('%m', '07')
          | replace('%Y', '2024') }}
{%- endmacro -%}
"""
"""Goes before a template that prints today's date and gives it the one that Llama 3's falls back to, so that
prompts do not change overnight (law 12)."""


@dataclass(frozen=True)
class Part:
    """A piece of a block, written by the template (markup) or by the data."""

    text: str
    is_markup: bool


class UnfitText(UserError):
    """A text that cannot be cut, because the template changes it."""


Block = tuple[Part, ...]
Content = tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """A rendered prompt cut into its blocks, the response, and what the template writes after that."""

    blocks: tuple[Block, ...]
    response: str
    ending: str


class Template:
    """The chat template of a tokenizer.

    Raises:
        UserError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path} has no chat template: use that of an instruct model"
            )
        self._tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        self._template = FIXED_DATE + template if "strftime_now" in template else template
        self._markup: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {}

    def cut(
        self, messages: Sequence[Message], documents: Collection[int], response: str | None = None
    ) -> Cut:
        """The prompt as the template renders it, with the generation prompt, cut into blocks (laws 5 and 6).

        Markup goes to the end of the block before it, else to a block of its own, else to the final block;
        never into one of `documents` (numbers of blocks)::

            <|im_start|>user\\n | Answer. | doc 0 | doc 1 | Question?<|im_end|>\\n<|im_start|>assistant\\n

        Raises:
            UserError: the template refuses the roles, or changes a text otherwise than by trimming it.
        """
        roles = tuple(message.role for message in messages)
        contents = [message.content for message in messages]
        markup = self._markup_of(roles, True)
        contents = self._match(self._render(roles, contents, True), markup, contents)
        blocks = _own(markup, contents, documents)
        if response is None:
            return Cut(blocks, "", "")
        roles, contents = (*roles, "assistant"), [*contents, (response,)]
        with_response = self._markup_of(roles, False)
        if with_response[:-1] != markup:
            self._fail("writes a response otherwise than its generation prompt leads to")
        *_, (response,) = self._match(self._render(roles, contents, False), with_response, contents)
        return Cut(blocks, response, with_response[-1])

    def _markup_of(self, roles: tuple[str, ...], for_generation: bool) -> tuple[str, ...]:
        """What the template writes before each message's text and after the last, found with stand-ins."""
        key = (roles, for_generation)
        if key not in self._markup:
            texts = [f"stand-in[{i}]" for i in range(len(roles))]
            rest, pieces = self._render(roles, [(text,) for text in texts], for_generation), []
            for text in texts:
                piece, found, rest = rest.partition(text)
                if not found or text in rest:
                    self._fail(
                        f"does not write each text of messages of the roles {', '.join(roles)} once, in order"
                    )
                pieces.append(piece)
            self._markup[key] = (*pieces, rest)
        return self._markup[key]

    def _render(self, roles: Sequence[str], contents: Sequence[Content], for_generation: bool) -> str:
        chat = [{"role": r, "content": "".join(c)} for r, c in zip(roles, contents, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=for_generation,
                    # responses do not think aloud, so the prompt is the one that goes straight to the answer
                    enable_thinking=False,
                )
            )
        except jinja2.TemplateError as error:
            self._fail(f"refuses messages of the roles {', '.join(roles)}: {error}")

    def _match(self, rendered: str, markup: Sequence[str], contents: Sequence[Content]) -> list[Content]:
        """The texts as they stand in a rendered chat: as given, or trimmed."""
        matched, at = [], len(markup[0])
        for content, after in zip(contents, markup[1:], strict=True):
            as_given = rendered.startswith("".join(content) + after, at)
            matched.append(content if as_given else _trimmed(content))
            at += len("".join(matched[-1])) + len(after)
        texts = ["".join(content) for content in matched]
        if rendered != "".join(chain.from_iterable(zip(markup, [*texts, ""], strict=True))):
            self._fail("changes the text of a message otherwise than by trimming it")
        return matched

    def _fail(self, what: str) -> NoReturn:
        raise UserError(
            f"the chat template of {self._tokenizer.name_or_path} {what}: blockft cannot cut its prompts"
        )


def _own(markup: Sequence[str], contents: Sequence[Content], documents: Collection[int]) -> tuple[Block, ...]:
    """The blocks of a prompt, with its markup in the blocks that own it."""
    blocks: list[list[Part]] = []
    takes_markup = False
    number = 0
    for before, content in zip(markup[:-1], contents, strict=True):
        if before:
            if not takes_markup:
                blocks.append([])
            blocks[-1].append(Part(before, is_markup=True))
            takes_markup = True
        for text in content:
            if text:
                blocks.append([Part(text, is_markup=False)])
                takes_markup = number not in documents
            number += 1
    blocks[-1].append(Part(markup[-1], is_markup=True))
    if sum(map(bool, chain.from_iterable(contents))) == 1:
        return (tuple(chain.from_iterable(blocks)),)
    return tuple(map(tuple, blocks))


def _trimmed(content: Content) -> Content:
    """A message's blocks after its text has been trimmed; those of white space at its ends become empty."""
    texts = list(content)
    for i, text in enumerate(texts):
        texts[i] = text.lstrip()
        if texts[i]:
            break
    for i in reversed(range(len(texts))):
        texts[i] = texts[i].rstrip()
        if texts[i]:
            break
    return tuple(texts)
