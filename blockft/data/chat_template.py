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
{%- endmacro %}
"""
"""Goes before a template that prints today's date and gives it the one that Llama 3's falls back to, so that
prompts do not change overnight (law 12)."""

EDGE_MARKER = "\n\u2003"
"""Stands around a stand-in (mirrored at its end) to show what of the white space there a template strips."""

STRIPPED = {EDGE_MARKER: "", EDGE_MARKER[1:]: "\n", "": None}
"""What is left of an edge, and the characters that are stripped (None: all white space)."""


class TemplateMismatch(UserError):
    """A prompt that the chat template or the tokenizer does not keep as it is; others may be fit.

    `reason` says why in a few words that are the same for many prompts.
    """

    def __init__(self, message: str, reason: str = "unfit for the chat template") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class TextPart:
    """A piece of a block, written by the template (markup) or by the data."""

    text: str
    is_markup: bool


Block = tuple[TextPart, ...]
Content = tuple[str, ...]
Roles = tuple[str, ...]
Strip = tuple[str | None, str | None]
"""The characters stripped before and after a text."""


@dataclass(frozen=True)
class RenderedPrompt:
    """A rendered prompt cut into its blocks, the response, and what the template writes around that.

    The opening stands between the generation prompt and the response: the model has to write it, too.
    """

    blocks: tuple[Block, ...]
    response: str
    ending: str
    opening: str = ""

    @property
    def answer(self) -> Block:
        """What the model writes up to the ending; white space that opens it is one with its first word."""
        if self.opening.strip():
            return TextPart(self.opening, is_markup=True), TextPart(self.response, is_markup=False)
        return (TextPart(self.opening + self.response, is_markup=False),)


@dataclass(frozen=True)
class _TemplateMarkup:
    """How the template writes texts: the markup before each and after the last, what it strips of each."""

    markup: tuple[str, ...]
    strips: tuple[Strip, ...]


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        UserError: the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        named = tokenizer.chat_template
        if not named or isinstance(named, dict) and "default" not in named:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path} has no chat template"
                f"{' named default' if named else ''}: use that of an instruct model"
            )
        self._tokenizer = tokenizer
        template = tokenizer.get_chat_template()
        self._template = FIXED_DATE + template if "strftime_now" in template else template
        self._forms: dict[tuple[Roles, bool], _TemplateMarkup] = {}
        self._answers: dict[Roles, _TemplateMarkup] = {}

    def render(
        self, messages: Sequence[Message], documents: Collection[int], response: str | None = None
    ) -> RenderedPrompt:
        """The prompt as the template renders it, with the generation prompt, cut into blocks (laws 5 and 6).

        Markup goes to the end of the block before it, else to a block of its own, else to the final block;
        never into one of `documents` (numbers of blocks)::

            <|im_start|>user\\n | Answer. | doc 0 | doc 1 | Question?<|im_end|>\\n<|im_start|>assistant\\n

        Raises:
            UnfitText: the template refuses the roles, changes their order or a text otherwise than by
                trimming it, trims a document, or leads to another response than it writes.
            UserError: the template cannot be read.
        """
        roles = tuple(message.role for message in messages)
        form = self._form(roles, for_generation=True)
        contents = self._stripped(messages, form.strips, documents)
        texts = ["".join(content) for content in contents]
        rendered = self._apply(roles, [message.text for message in messages], for_generation=True)
        if rendered != "".join(chain.from_iterable(zip(form.markup, [*texts, ""], strict=True))):
            changed = _first_changed_text(rendered, form.markup, texts)
            self._fail(f"changes the text {changed} otherwise than by trimming it", "text changed")
        blocks = _assign_markup(form.markup, contents, documents)
        if response is None:
            return RenderedPrompt(blocks, "", "")
        answer = self._answer(roles)
        (response,) = _strip_blocks((response,), *answer.strips[0])
        opening, ending = answer.markup
        return RenderedPrompt(blocks, response, ending, opening)

    def _form(self, roles: Roles, *, for_generation: bool) -> _TemplateMarkup:
        key = (roles, for_generation)
        if key not in self._forms:
            markup = self._around(roles, for_generation)
            strips: dict[int, Strip] = {}
            # every other text has edges, so that none borders on another's
            for parity in range(min(2, len(roles))):
                around = self._around(roles, for_generation, parity)
                for i in range(parity, len(roles), 2):
                    before = around[i].removeprefix(markup[i])
                    after = around[i + 1].removesuffix(markup[i + 1])[::-1]
                    if before not in STRIPPED or after not in STRIPPED:
                        self._fail(f"changes texts of the role {roles[i]}", "text changed")
                    strips[i] = (STRIPPED[before], STRIPPED[after])
            self._forms[key] = _TemplateMarkup(markup, tuple(strips[i] for i in range(len(roles))))
        return self._forms[key]

    def _around(self, roles: Roles, for_generation: bool, edged: int | None = None) -> tuple[str, ...]:
        """The markup before each text and after the last, found with stand-ins, even or odd ones edged."""
        stand_ins = [f"standin{i}standin" for i in range(len(roles))]
        texts = [
            EDGE_MARKER + s + EDGE_MARKER[::-1] if i % 2 == edged else s for i, s in enumerate(stand_ins)
        ]
        rest, pieces = self._apply(roles, texts, for_generation), []
        for stand_in in stand_ins:
            piece, found, rest = rest.partition(stand_in)
            if not found or stand_in in rest:
                self._fail(
                    f"does not write each text of the roles {_list(roles)} once, in order", "roles refused"
                )
            pieces.append(piece)
        return (*pieces, rest)

    def _answer(self, roles: Roles) -> _TemplateMarkup:
        """How a response to messages of these roles is written, found with a stand-in."""
        if roles not in self._answers:
            # some templates write the system's text while the prompt waits for a response, and drop it then:
            # there the last turn alone shows how a response follows
            for turns in dict.fromkeys((roles, roles[-1:])):
                try:
                    prompt = self._form(turns, for_generation=True).markup
                    chat = self._form((*turns, "assistant"), for_generation=False)
                except TemplateMismatch:
                    continue
                *before, opening, ending = chat.markup
                if (*before,) == prompt[:-1] and opening.startswith(prompt[-1]):
                    markup = (opening.removeprefix(prompt[-1]), ending)
                    self._answers[roles] = _TemplateMarkup(markup, chat.strips[-1:])
                    break
            else:
                self._fail(
                    "writes a response otherwise than its generation prompt leads to", "response changed"
                )
        return self._answers[roles]

    def _apply(self, roles: Roles, texts: Sequence[str], for_generation: bool) -> str:
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
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
        except jinja2.TemplateSyntaxError as error:
            at = f"{self._tokenizer.name_or_path}, line {error.lineno}"
            raise UserError(f"the chat template of {at} cannot be read: {error}") from error
        except (jinja2.TemplateError, TypeError) as error:
            self._fail(f"refuses messages of the roles {_list(roles)} ({error})", "roles refused")

    def _stripped(
        self, messages: Sequence[Message], strips: Sequence[Strip], documents: Collection[int]
    ) -> list[Content]:
        """The blocks of each message as the template writes them."""
        contents, first = [], 0
        for message, strip in zip(messages, strips, strict=True):
            content = _strip_blocks(message.content, *strip)
            for number, (text, left) in enumerate(zip(message.content, content, strict=True), first):
                if text != left and number in documents:
                    self._fail(
                        f"trims the {message.role} message and with it the document {_shorten(text)}, "
                        "which would be another block elsewhere",
                        "document trimmed",
                        "put separators before the documents, or into a block that is no document",
                    )
            contents.append(content)
            first += len(content)
        return contents

    def _fail(
        self, what: str, why: str, remedy: str = "leave such prompts out, or use another template"
    ) -> NoReturn:
        whose = f"the chat template of {self._tokenizer.name_or_path}"
        raise TemplateMismatch(f"{whose} {what}: {remedy}", f"{why} by the chat template")


def _assign_markup(
    markup: Sequence[str], contents: Sequence[Content], documents: Collection[int]
) -> tuple[Block, ...]:
    """The blocks of a prompt, with its markup in the blocks that own it."""
    blocks: list[list[TextPart]] = []
    takes_markup = False
    number = 0
    for before, content in zip(markup[:-1], contents, strict=True):
        if before:
            if not takes_markup:
                blocks.append([])
            blocks[-1].append(TextPart(before, is_markup=True))
            takes_markup = True
        for text in content:
            if text:
                blocks.append([TextPart(text, is_markup=False)])
                takes_markup = number not in documents
            number += 1
    if not takes_markup:
        blocks.append([])
    blocks[-1].append(TextPart(markup[-1], is_markup=True))
    if not documents and sum(map(bool, chain.from_iterable(contents))) == 1:
        return (tuple(chain.from_iterable(blocks)),)
    return tuple(map(tuple, blocks))


def _strip_blocks(content: Content, before: str | None, after: str | None) -> Content:
    """A message's blocks after its text has been stripped; those at its ends may become empty."""
    texts = list(content)
    for i, text in enumerate(texts):
        texts[i] = text.lstrip(before)
        if texts[i]:
            break
    for i in reversed(range(len(texts))):
        texts[i] = texts[i].rstrip(after)
        if texts[i]:
            break
    return tuple(texts)


def _first_changed_text(rendered: str, markup: Sequence[str], texts: Sequence[str]) -> str:
    """The first text that is not found where it should be."""
    start = 0
    for before, text in zip(markup, texts, strict=False):
        if not rendered.startswith(before + text, start):
            break
        start += len(before + text)
    return _shorten(text)


def _list(roles: Roles) -> str:
    return ", ".join(roles if len(roles) <= 5 else (*roles[:5], "..."))


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:25]}...{text[-12:]}")
