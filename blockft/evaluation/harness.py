"""A model for lm-evaluation-harness that answers in full mode, or with few-shot examples as blocks.

    pip install 'blockft[lm-eval]'
    python -m blockft.evaluation.harness run --model blockft --model_args pretrained=OUT,mode=block ...

The description, each few-shot example and the question are blocks, as in Ma et al. 2025. The prompt is split
at blank lines, the `fewshot_delimiter` of most tasks (`delimiter=...` sets another one). A delimiter stays
with the text that follows it. Under a chat template, the prompt is also split at turns. A question with blank
lines is split into several blocks. Both modes read the same token ids.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from blockft.data.chat_template import ChatTemplate, markup_joins_first_text
from blockft.data.sample import Message, RecordError, parse_role, parse_text
from blockft.data.tokenizer import PlainTokenizer, TemplatedTokenizer, control_token_ids
from blockft.errors import UserError, list_allowed
from blockft.evaluation.loglikelihood import Ids, LoglikelihoodRequest, compute_loglikelihoods
from blockft.inference.engine import AttentionMode, Engine
from blockft.model.load import parse_dtype
from blockft.model.supported import local_sees_first
from blockft.printable import print_text

BLOCK_START = "\x1e"
"""Marks the start of each block in a prompt that a chat template rendered; removed before encoding."""

TOKEN_BREAK = "\x1f"
"""Divides a control token that a message spells, so that it is encoded as text; removed before encoding."""

DEFAULT_DEVICE = "cuda:0"
"""The device that the harness passes if the user names none: the first GPU, or the CPU."""


@register_model("blockft")
class BlockLM(LM):
    """The harness's interface to an engine.

    pretrained: an export, any model folder, or a Hub id.
    mode: block or full.
    delimiter: the text at which prompts are split into blocks.
    max_gen_toks: the longest answer, in tokens, unless the task sets another limit.

    Raises:
        UserError: the mode or the dtype is unknown, or a batch size is not a positive number; see
            `Engine.load`.
    """

    def __init__(
        self,
        pretrained: str,
        mode: AttentionMode = "block",
        delimiter: str = "\n\n",
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | str | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if mode not in ("block", "full"):
            raise UserError(f"mode is {mode!r} ({list_allowed(mode, ('block', 'full'))})")
        sizes = {
            "batch_size": batch_size,
            "max_batch_size": batch_size if max_batch_size is None else max_batch_size,
        }
        for name, size in sizes.items():
            if not str(size).isdecimal() or int(size) < 1:
                raise UserError(f"{name} is {size!r}, write a number of at least 1")
        self._engine = Engine.load(
            pretrained,
            revision=revision,
            device=None if device == DEFAULT_DEVICE else device,
            dtype=parse_dtype(dtype or "auto", None),
        )
        self._mode, self._delimiter = mode, delimiter
        self._batch_size, self._max_new_tokens = min(map(int, sizes.values())), max_gen_toks
        self._joins_start = local_sees_first(self._engine.model.config)
        self._tokenizer = self._engine.tokenizer
        self._plain, self._templated = PlainTokenizer(self._tokenizer), TemplatedTokenizer(self._tokenizer)
        control = control_token_ids(self._tokenizer)
        self._control_tokens = [str(self._tokenizer.added_tokens_decoder[id]) for id in sorted(control)]
        # the ids that the tokenizer puts before every text: the bos token, or none
        text_ids = self._tokenizer("x", add_special_tokens=False)["input_ids"]
        self._prompt_start_ids = tuple(self._tokenizer("x")["input_ids"][: -len(text_ids)])

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._tokenizer.chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat as `generate` does, and mark the blocks.

        User turns start a block, and are split at delimiters. Without a generation prompt, the last message
        is the start of the answer. If the model was trained so that local blocks see the first block, the
        markup at the start belongs to the block after it, as in training (see `markup_joins_first_text`).

        Raises:
            UserError: a message has an unknown role, or the template changes a message, so that the prompt
                cannot be split.
        """
        messages = [_parse_message(message, i) for i, message in enumerate(chat_history)]
        # the template is rendered once more with placeholders, which show where each message stands
        placeholders = [replace(m, content=(f"\ue000{i}\ue001",)) for i, m in enumerate(messages)]
        # some templates strip messages
        stripped = [replace(m, content=(m.text.strip(),)) for m in messages]
        rendered, outline = (self._render(chat, add_generation_prompt) for chat in (messages, placeholders))
        for chat in (messages, stripped):
            blocks, rest = [""], outline
            for message, placeholder in zip(chat, placeholders, strict=True):
                markup, _, rest = rest.partition(placeholder.text)
                blocks[-1] += markup
                text = self._break_control_tokens(message.text)
                if message.role == "user":
                    blocks += self._split(text)
                else:
                    blocks[-1] += text
            blocks[-1] += rest
            # the text of another role is a part of the first block already
            starts_with_markup = messages[0].role == "user"
            if self._joins_start and markup_joins_first_text(len(blocks), starts_with_markup):
                blocks[:2] = [blocks[0] + blocks[1]]
            if "".join(blocks).replace(TOKEN_BREAK, "") == rendered:
                return BLOCK_START + BLOCK_START.join(blocks)
        raise UserError(
            f"the chat template of {self.tokenizer_name} changes messages, so the prompt "
            "cannot be split into blocks"
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log probability of each continuation, and whether it is the greedy one.

        Raises:
            UserError: a prompt is longer than the model's positions.
        """
        return self._score([self._encode_pair(*request.args) for request in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each text, in windows of the model's positions.

        Raises:
            UserError: the mode is block, but these texts have no blocks.
        """
        if self._mode == "block":
            raise UserError("loglikelihood_rolling scores texts without blocks: use mode=full")
        num_positions, log_probs = self._engine.model.config.max_position_embeddings, []
        for request in tqdm(requests, disable=disable_tqdm):
            (ids,) = self._plain.encode([request.args[0]])
            windows = get_rolling_token_windows(ids, self._prefix_id, num_positions, context_len=1)
            pairs = (make_disjoint_window(window) for window in windows)
            window_requests = [
                LoglikelihoodRequest((), tuple(context), tuple(predicted)) for context, predicted in pairs
            ]
            scores = self._score(window_requests, disable_tqdm=True)
            log_probs.append(sum(log_prob for log_prob, _ in scores))
        return log_probs

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer greedily; each answer ends before the first stop string of its task.

        Raises:
            UserError: the task samples its answers; a prompt with its answer exceeds the model's positions.
        """
        answers = [""] * len(requests)
        by_options: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError(
                    "the task samples its answers, but this model answers greedily: set do_sample to false"
                )
            max_new_tokens = int(settings.get("max_gen_toks", self._max_new_tokens))
            by_options[max_new_tokens, _stop_strings(settings.get("until"))].append(index)
        batches = [
            (max_new_tokens, stop, indices[i : i + self._batch_size])
            for (max_new_tokens, stop), indices in by_options.items()
            for i in range(0, len(indices), self._batch_size)
        ]
        for max_new_tokens, stop, batch in tqdm(batches, disable=disable_tqdm):
            prompts = [self._encode(requests[i].args[0]) for i in batch]
            for i, ids in zip(batch, self._generate(prompts, max_new_tokens, stop), strict=True):
                text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
                answers[i] = _truncate_at_stop(text, stop)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self._template.render(messages, ()).text
        *before, start = messages
        if start.role != "assistant" or not before:
            raise UserError("without a generation prompt, a chat must end with the start of an answer")
        rendered = self._template.render(before, (), start.text)
        return rendered.text + rendered.answer.text

    def _break_control_tokens(self, text: str) -> str:
        """Mark the places where control tokens that a message spells are divided, so that they stay text."""
        for token in self._control_tokens:
            text = text.replace(token, token[0] + TOKEN_BREAK + token[1:])
        return text

    def _generate(
        self, prompts: Sequence[Sequence[Ids]], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Ids]:
        answers = self._engine.generate_ids(
            prompts, mode=self._mode, max_new_tokens=max_new_tokens, stop=stop
        )
        return [answer.ids for answer in answers]

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer)

    @property
    def _prefix_id(self) -> int:
        """The token before a text without context: bos, or eos for a tokenizer without bos."""
        bos = self._tokenizer.bos_token_id
        return int(self._tokenizer.eos_token_id if bos is None else bos)

    def _split(self, text: str) -> list[str]:
        """Split a text before each delimiter; no block is blank or empty."""
        first, *others = text.split(self._delimiter)
        blocks = [first]
        for part in others:
            if part.strip() and blocks[-1].strip():
                blocks.append(self._delimiter + part)
            else:
                blocks[-1] += self._delimiter + part
        return [block for block in blocks if block]

    def _encode(self, context: str, continuation: str = "") -> list[Ids]:
        """Return the token ids of each block; the continuation is the end of the last block."""
        tokenizer: PlainTokenizer | TemplatedTokenizer
        if context.startswith(BLOCK_START):
            texts = [text for text in context.split(BLOCK_START) if text]
            tokenizer, start_ids = self._templated, ()
        else:
            texts = self._split(context) or [""]
            tokenizer, start_ids = self._plain, self._prompt_start_ids
        texts[-1] += continuation
        is_templated = tokenizer is self._templated
        pieces = [text.split(TOKEN_BREAK) if is_templated else [text] for text in texts]
        first, *others = (tuple(chain.from_iterable(tokenizer.encode(block))) for block in pieces)
        return [ids for ids in (start_ids + first, *others) if ids] or [(self._prefix_id,)]

    def _score(
        self, requests: Sequence[LoglikelihoodRequest], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        return compute_loglikelihoods(
            self._engine.model, requests, mode=self._mode, shows_progress=not disable_tqdm
        )

    def _encode_pair(self, context: str, continuation: str) -> LoglikelihoodRequest:
        """Encode a context and its continuation; white space between them belongs to the continuation.

        Tokenizers encode a word together with the space before it.
        """
        stripped = context.rstrip()
        if not stripped.strip(BLOCK_START):
            (ids,) = self._plain.encode([context.strip(BLOCK_START) + continuation])
            return LoglikelihoodRequest((), (self._prefix_id,), tuple(ids))
        blocks = self._encode(stripped)
        blocks_with_continuation = self._encode(stripped, context[len(stripped) :] + continuation)
        final_prefix = blocks[-1]
        return LoglikelihoodRequest(
            tuple(blocks[:-1]), final_prefix, blocks_with_continuation[-1][len(final_prefix) :]
        )


def _parse_message(message: Any, index: int) -> Message:
    """Return a message of a chat. Other fields than role and content are not passed to the template.

    Raises:
        UserError: the role is unknown, or the content is not a text.
    """
    name = f"messages[{index}]"
    try:
        role = parse_role(message.get("role"), f"{name}.role")
        text = parse_text(message.get("content"), f"{name}.content", may_be_blank=True)
    except RecordError as error:
        raise UserError(f"a chat of the task cannot be asked: {error}") from error
    if BLOCK_START in text or TOKEN_BREAK in text:
        raise UserError(f"a chat of the task cannot be asked: {name}.content holds U+001E or U+001F")
    return Message(role=role, content=(text,))


def _stop_strings(until: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the stop strings of a task, which gives one, several or none."""
    texts = [until] if isinstance(until, str) else until or ()
    return tuple(text for text in texts if text)


def _truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before its first stop string; the engine's ids include the token that completed it."""
    return text[: min((text.find(string) for string in stop if string in text), default=len(text))]


if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        print_text(f"blockft: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
