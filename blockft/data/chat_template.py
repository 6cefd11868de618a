"""Chat templates: render a prompt, tell its markup from its text, and assign the markup to blocks."""

import re
import traceback
from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import NoReturn

import jinja2
from transformers import PreTrainedTokenizerBase

from blockft.data.sample import ROLES, Message
from blockft.errors import UserError

FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | replace('%m', '07')"
    " | replace('%Y', '2024') }}"
    "{%- endmacro %}\n"
)
"""A macro put in a line before a template that prints today's date.

It prints the default date of Llama 3's template, so that prepared data do not change from day to day.
"""

EMPTY_THOUGHT = re.compile(r"(?:<(?P<tag>[\w:|-]+)>\s*</(?P=tag)>|\[(?P<word>\w+)\]\s*\[/(?P=word)\])\s*\Z")
"""An empty thought at the end of a text, such as <think></think>, with the white space after it."""

OPEN_THOUGHT = re.compile(r"(?:<\w[\w:-]*>|\[\w+\])\s*\Z")
"""The opening tag of a thought at the end of a text, with the white space after it."""

EDGE_MARKER = "\n\u2003"
"""White space put before a placeholder, and mirrored after it, to show what a template strips there."""

STRIPPED = {EDGE_MARKER: "", EDGE_MARKER[1:]: "\n", "": None}
"""What is left of an edge marker, and the characters that the template strips (None is all white space)."""

_READ_REMEDY = "correct it in a copy, and set model.chat_template to that file"


class TemplateMismatch(UserError):
    """The chat template or the tokenizer changes the text of a prompt; other prompts may be encoded.

    `reason` is a short text without details, so that equal reasons can be counted.
    """

    def __init__(self, message: str, reason: str = "unfit for the chat template") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class TextPart:
    """A part of a block, written by the template (markup) or taken from the data."""

    text: str
    is_markup: bool


Block = tuple[TextPart, ...]
Content = tuple[str, ...]
Roles = tuple[str, ...]
Strip = tuple[str | None, str | None]
"""The characters that a template strips before and after a text; None is all white space."""


@dataclass(frozen=True)
class RenderedPrompt:
    """The blocks of a rendered prompt, the response, and the texts around the response.

    `opening` is white space between the prompt and the response, `ending` the markup after the response.
    """

    blocks: tuple[Block, ...]
    response: str
    ending: str
    opening: str = ""

    @property
    def text(self) -> str:
        """The text of the prompt: its blocks joined."""
        return "".join(part.text for block in self.blocks for part in block)

    @property
    def answer(self) -> TextPart:
        """What the model writes before the ending: the response, tokenized with the white space before it."""
        return TextPart(self.opening + self.response, is_markup=False)


@dataclass(frozen=True)
class _TemplateMarkup:
    """How a template writes a sequence of roles.

    `markup` holds the text before each message and after the last one, `strips` what is stripped of each
    message.
    """

    markup: tuple[str, ...]
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class _ResponseMarkup:
    """How a template writes a response to a sequence of roles.

    `prompt_end` is markup that the template writes before a response and not in its generation prompt, such
    as an empty thought. `opening` is white space before the response, `ending` the markup after it, and
    `strip` is what is stripped of it. `chat` is the markup of the last `num_turns` messages with their
    response: the whole chat, or its last turn.
    """

    prompt_end: str
    opening: str
    ending: str
    strip: Strip
    chat: tuple[str, ...]
    num_turns: int


class ChatTemplate:
    """The chat template of a tokenizer.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        templates = tokenizer.chat_template
        if not templates or isinstance(templates, dict) and "default" not in templates:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path} has no chat template"
                f"{' named default' if templates else ''}: use the tokenizer of an instruct model"
            )
        self._tokenizer = tokenizer
        self._name = tokenizer.name_or_path or "the tokenizer"
        template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise UserError(f"the chat template of {self._name} is {template!r:.60}, it should be a text")
        self._lines_before = int("strftime_now" in template)
        self._template = FIXED_DATE * self._lines_before + template
        self._prompt_markup_cache: dict[tuple[Roles, bool], _TemplateMarkup] = {}
        self._response_markup_cache: dict[Roles, _ResponseMarkup | UserError] = {}

    @property
    def start(self) -> str:
        """The markup before the first text of a prompt."""
        return self._markup_of_roles(("user",), for_generation=True).markup[0]

    @property
    def ending(self) -> str:
        """The markup after a response to a single message."""
        return self._markup_of_roles(("user", "assistant"), for_generation=False).markup[-1]

    def render(
        self,
        messages: Sequence[Message],
        documents: Collection[int],
        response: str | None = None,
        *,
        join_start: bool = False,
    ) -> RenderedPrompt:
        """Render a prompt with its generation prompt, split into blocks.

        The blocks joined are the rendered prompt, and after it the markup that some templates write only
        before a response, such as an empty thought. The prompt is the same with and without a response.
        `documents` are the indices of blocks that are documents. Markup goes to the end of the block before
        it. At the start of the prompt and after a document, markup is a block of its own. A prompt that
        consists of a single text is one block. Example::

            <|im_start|>user\\n | Answer. | doc 0 | doc 1 | Question?<|im_end|>\\n<|im_start|>assistant\\n

        With `join_start`, the markup at the start and the block after it are one block, unless that block is
        a document or the last one.

        Raises:
            TemplateMismatch: the template refuses the roles or fails, changes their order, changes a text
                other than by stripping it, strips a document, or writes a response that does not follow the
                generation prompt.
            UserError: the template has a syntax error, or its generation prompt opens a thought that it does
                not write before a response.
        """
        roles = tuple(message.role for message in messages)
        template = self._markup_of_roles(roles, for_generation=True)
        contents = self._strip_messages(messages, template.strips, documents)
        texts = ["".join(content) for content in contents]
        self._check_texts(messages, template.markup, [*texts, ""], for_generation=True)
        around_response = self._find_response_markup(roles)
        if response is not None and isinstance(around_response, UserError):
            raise copy(around_response)  # an error that is raised again would collect tracebacks
        # a template that cannot be trained is asked with its own generation prompt
        prompt_end = "" if isinstance(around_response, UserError) else around_response.prompt_end
        markup = (*template.markup[:-1], template.markup[-1] + prompt_end)
        blocks = _assign_markup(markup, contents, documents, join_start)
        if response is None or isinstance(around_response, UserError):
            return RenderedPrompt(blocks, "", "")
        (stripped,) = _strip_blocks((response,), *around_response.strip)
        turns = around_response.num_turns
        chat = [*messages[-turns:], Message(role="assistant", content=(response,))]
        self._check_texts(chat, around_response.chat, [*texts[-turns:], stripped, ""], for_generation=False)
        return RenderedPrompt(blocks, stripped, around_response.ending, around_response.opening)

    def _markup_of_roles(self, roles: Roles, *, for_generation: bool) -> _TemplateMarkup:
        """Return how the template writes messages of these roles, found by rendering placeholders."""
        key = (roles, for_generation)
        if key not in self._prompt_markup_cache:
            markup = self._render_placeholders(roles, for_generation)
            strips: dict[int, Strip] = {}
            # mark the edges of every other text only, so that no two edges are adjacent
            for parity in range(min(2, len(roles))):
                marked = self._render_placeholders(roles, for_generation, marked_parity=parity)
                for i in range(parity, len(roles), 2):
                    before = marked[i].removeprefix(markup[i])
                    after = marked[i + 1].removesuffix(markup[i + 1])[::-1]
                    if before not in STRIPPED or after not in STRIPPED:
                        self._fail(f"changes texts of the role {roles[i]}", "text changed")
                    strips[i] = (STRIPPED[before], STRIPPED[after])
            template = _TemplateMarkup(markup, tuple(strips[i] for i in range(len(roles))))
            self._prompt_markup_cache[key] = template
        return self._prompt_markup_cache[key]

    def _render_placeholders(
        self, roles: Roles, for_generation: bool, marked_parity: int | None = None
    ) -> tuple[str, ...]:
        """Render a placeholder for each text and return the markup before each text and after the last.

        Placeholders with an even or odd index (`marked_parity`) have edge markers.
        """
        placeholders = [f"standin{i}standin" for i in range(len(roles))]
        texts = [
            EDGE_MARKER + placeholder + EDGE_MARKER[::-1] if i % 2 == marked_parity else placeholder
            for i, placeholder in enumerate(placeholders)
        ]
        rest, markup = self._apply(roles, texts, for_generation), []
        for placeholder in placeholders:
            before, separator, rest = rest.partition(placeholder)
            if not separator or placeholder in rest:
                self._fail(
                    f"does not write each text of the roles {_list(roles)} once, in order", "roles refused"
                )
            markup.append(before)
        return (*markup, rest)

    def _check_texts(
        self, messages: Sequence[Message], markup: Sequence[str], texts: Sequence[str], for_generation: bool
    ) -> None:
        """Check that the rendered messages are the markup and the texts in turn.

        Raises:
            TemplateMismatch: the template changes a text.
        """
        roles = tuple(message.role for message in messages)
        rendered = self._apply(roles, [message.text for message in messages], for_generation)
        if rendered != "".join(chain.from_iterable(zip(markup, texts, strict=True))):
            changed = _first_changed_text(rendered, markup, texts)
            self._fail(f"changes the text {changed} otherwise than by trimming it", "text changed")

    def _find_response_markup(self, roles: Roles) -> _ResponseMarkup | UserError:
        """Return how the template writes a response to these roles, or why no response can be learned."""
        if roles not in self._response_markup_cache:
            try:
                self._response_markup_cache[roles] = self._markup_of_response(roles)
            except UserError as error:
                self._response_markup_cache[roles] = error.with_traceback(None)
        return self._response_markup_cache[roles]

    def _markup_of_response(self, roles: Roles) -> _ResponseMarkup:
        """Return how the template writes a response to messages of these roles.

        The markup before a response starts with the generation prompt. If the generation prompt ends with an
        empty thought, the template may leave this thought out of the chat.
        """
        difference = None
        # some templates drop the system message once there is a response; with them, the markup of a
        # response to the last turn alone is the right one
        for turns in dict.fromkeys((roles, roles[-1:])):
            try:
                *prompt_before, asked = self._markup_of_roles(turns, for_generation=True).markup
                chat = self._markup_of_roles((*turns, "assistant"), for_generation=False)
            except TemplateMismatch:
                continue
            *before, written, ending = chat.markup
            if before != prompt_before:
                continue
            prompt_end, opening = "", ""
            if written.startswith(asked):
                opening = written.removeprefix(asked)
                if opening.strip():
                    prompt_end, opening = opening, ""
            elif not EMPTY_THOUGHT.search(asked) or _without_thought(asked) != _without_thought(written):
                difference = difference or (asked, written)
                continue
            return _ResponseMarkup(prompt_end, opening, ending, chat.strips[-1], chat.markup, len(turns))
        self._fail_response(*(difference or ("", "")))

    def _fail_response(self, asked: str, written: str) -> NoReturn:
        """Raise the error for a response that does not follow the generation prompt.

        `asked` and `written` are the markup before a response: in the generation prompt, and in the chat.
        """
        if not asked:
            self._fail(
                "writes a response differently in a chat than after its generation prompt", "response changed"
            )
        texts = (
            f"the chat template of {self._name} ends its generation prompt with {asked[-60:]!r}, "
            f"but writes {written[-60:]!r} before a response"
        )
        added = asked.removeprefix(written)
        if asked.startswith(written) and (opened := OPEN_THOUGHT.search(added)):
            tag = opened[0].strip()
            closed = f"{added.rstrip()}\n\n{tag[0]}/{tag[1:]}\n\n"
            raise UserError(
                f"{texts}: a response without a thought cannot be learned after an open {tag}. Copy the "
                f"template to a file, let its generation prompt end with the empty thought {closed!r} in "
                f"place of {added!r}, and set model.chat_template to that file"
            )
        raise TemplateMismatch(
            f"{texts}: a response must follow the generation prompt. Correct this in a copy of the template, "
            "and set model.chat_template to that file",
            "response changed by the chat template",
        )

    def _apply(self, roles: Roles, texts: Sequence[str], for_generation: bool) -> str:
        """Run the template. Every error of the template becomes a UserError here."""
        # a template pastes the role into the prompt, so that any other role could spell control tokens
        assert set(roles) <= set(ROLES), roles
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    chat,
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=for_generation,
                    # responses contain no reasoning, so the prompt must ask for none
                    enable_thinking=False,
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template of {self._name}, line {error.lineno - self._lines_before} cannot be "
                f"read: {_first_line(error.message or '')}; {_READ_REMEDY}"
            ) from error
        except SyntaxError as error:
            raise UserError(
                f"the chat template of {self._name} cannot be read: {error.msg}; {_READ_REMEDY}"
            ) from error
        # the template is a program that came with the model, and may raise anything
        except Exception as error:
            self._fail(
                f"refuses messages of the roles {_list(roles)} ({self._describe(error)})", "roles refused"
            )

    def _describe(self, error: Exception) -> str:
        """Return the first line of an error that the template raised, with the template's line."""
        frames = traceback.extract_tb(error.__traceback__)
        numbers = [frame.lineno or 0 for frame in frames if frame.filename == "<template>"]
        name = "" if isinstance(error, jinja2.TemplateError) else type(error).__name__
        line = f"line {numbers[-1] - self._lines_before}" if numbers else ""
        message = ": ".join(filter(None, (name, _first_line(str(error)))))
        return ", ".join(filter(None, (message, line)))

    def _strip_messages(
        self, messages: Sequence[Message], strips: Sequence[Strip], documents: Collection[int]
    ) -> list[Content]:
        """Return the blocks of each message as the template writes them, with white space stripped."""
        contents, first_index = [], 0
        for message, strip in zip(messages, strips, strict=True):
            content = _strip_blocks(message.content, *strip)
            for index, (text, stripped) in enumerate(zip(message.content, content, strict=True), first_index):
                if text != stripped and index in documents:
                    self._fail(
                        f"trims the {message.role} message and with it the document {_abbreviate(text)}, "
                        "which would be another block in another prompt",
                        "document trimmed",
                        "put separators before the documents, or into a block that is no document",
                    )
            contents.append(content)
            first_index += len(content)
        return contents

    def _fail(
        self,
        problem: str,
        reason: str,
        remedy: str = "leave such prompts out, or set model.chat_template to another template",
    ) -> NoReturn:
        subject = f"the chat template of {self._name}"
        raise TemplateMismatch(f"{subject} {problem}: {remedy}", f"{reason} by the chat template")


def _assign_markup(
    markup: Sequence[str], contents: Sequence[Content], documents: Collection[int], join_start: bool
) -> tuple[Block, ...]:
    """Return the blocks of a prompt with its markup; see `ChatTemplate.render`."""
    blocks: list[list[TextPart]] = []
    takes_markup = False
    index = 0
    for before, content in zip(markup[:-1], contents, strict=True):
        if before:
            if not takes_markup:
                blocks.append([])
            blocks[-1].append(TextPart(before, is_markup=True))
            takes_markup = True
        for text in content:
            if text:
                blocks.append([TextPart(text, is_markup=False)])
                takes_markup = index not in documents
            index += 1
    if not takes_markup:
        blocks.append([])
    blocks[-1].append(TextPart(markup[-1], is_markup=True))
    if not documents and sum(map(bool, chain.from_iterable(contents))) == 1:
        return (tuple(chain.from_iterable(blocks)),)
    first_text = next((i for i, text in enumerate(chain.from_iterable(contents)) if text), None)
    starts_with_markup, first_is_document = blocks[0][0].is_markup, first_text in documents
    if join_start and markup_joins_first_text(len(blocks), starts_with_markup, first_is_document):
        blocks[:2] = [blocks[0] + blocks[1]]
    return tuple(map(tuple, blocks))


def markup_joins_first_text(
    num_blocks: int, starts_with_markup: bool, first_is_document: bool = False
) -> bool:
    """Return whether the block of markup at the start of a prompt is joined with the block after it.

    It is, for a model whose local blocks see the first block, unless the block after it is a document or the
    last one. The first block then holds the instruction.
    """
    return starts_with_markup and num_blocks > 2 and not first_is_document


def _strip_blocks(content: Content, before: str | None, after: str | None) -> Content:
    """Return the blocks of a message after its text is stripped. Blocks at its ends may become empty."""
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
    """Return the first text that the template changed."""
    start = 0
    for before, text in zip(markup, texts, strict=False):
        if not rendered.startswith(before + text, start):
            break
        start += len(before + text)
    return _abbreviate(text)


def _without_thought(markup: str) -> str:
    """Return the markup without an empty thought at its end."""
    return EMPTY_THOUGHT.sub("", markup)


def _first_line(message: str) -> str:
    line = (message.splitlines() or [""])[0]
    return line if len(line) <= 200 else f"{line[:197]}..."


def _list(roles: Roles) -> str:
    return ", ".join(roles if len(roles) <= 5 else (*roles[:5], "..."))


def _abbreviate(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:25]}...{text[-12:]}")
