"""Requests of clients that blockft words and tokenizes, and the request to vLLM that they become."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blockft.data.rag_prompt import RagPrompt
from blockft.data.request import parse_request
from blockft.data.sample import RecordError, Sample, check_field, is_list
from blockft.inputs import shorten

Mode = Literal["block", "full"]

PROMPT_FIELDS = ("documents", "question", "messages", "blocks")
"""The fields that hold a prompt, as in requests of `blockft generate`."""

SAMPLING_FIELDS = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words"),
    *("allowed_token_ids", "min_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    *("spaces_between_special_tokens", "response_format", "structured_outputs", "stream", "stream_options"),
    *("logprobs", "return_token_ids", "return_tokens_as_token_ids", "priority", "user", "cache_salt"),
)
"""Fields of vLLM's completion requests that block mode supports. All others are refused: some of them would
give full attention without a word, such as prompt_logprobs, echo and use_beam_search."""

NO_WORDING = (
    "the model was trained without a wording for documents (data.prompt): ask with 'messages', whose content "
    "is a list of blocks"
)

MAX_NUMBER = 1 << 63
"""The first number that does not fit into 64 bits with a sign."""

MAX_DEPTH = 100
"""How deeply lists and mappings of a field may be nested. Writing JSON fails at 255."""

CHAT_FIELDS = ("max_completion_tokens", "top_logprobs")
"""Further fields of chat requests."""


@dataclass(frozen=True, kw_only=True)
class PromptRequest:
    """A request of a client.

    sample    the prompt
    mode      block or full attention
    is_chat   the client expects the answer as a chat completion
    sampling  fields of vLLM's completion requests, without the prompt
    """

    sample: Sample
    mode: Mode
    is_chat: bool
    sampling: Mapping[str, Any]


def prompt_field(body: Mapping[str, Any]) -> str | None:
    """Return the field for which blockft words and tokenizes the prompt of a request, or None without one.

    These are documents, a question, blocks, the mode, and messages with a list of block texts. vLLM itself
    answers all other requests.
    """
    if given := [name for name in ("documents", "question", "blocks", "mode") if name in body]:
        return f"'{given[0]}'"
    messages = body.get("messages")
    if messages is None or not is_list(messages):
        return None
    contents: list[Any] = [m.get("content") for m in messages if isinstance(m, Mapping)]
    has_blocks = any(is_list(c) and any(isinstance(part, str) for part in c) for c in contents)
    return "the block texts of 'messages'" if has_blocks else None


def parse_prompt_request(
    body: Mapping[str, Any], prompt: RagPrompt | None, *, is_chat: bool
) -> PromptRequest:
    """Parse the body of a request.

    The client of OpenAI always sends `messages` or `prompt`. Beside documents, a single message of the user,
    or the prompt, is the question. Beside blocks both are left empty.

    Raises:
        RecordError: a field is unknown, or has a wrong type or value; see `data.request.parse_request`.
    """
    body = {name: value for name, value in body.items() if value is not None}
    mode = body.pop("mode", "block")
    check_field(mode in ("block", "full"), "field 'mode'", mode, "be block or full")
    record = {name: body.pop(name) for name in PROMPT_FIELDS if name in body}
    _take_question(record, body, is_chat=is_chat)
    allowed = SAMPLING_FIELDS + (CHAT_FIELDS if is_chat else ())
    if unknown := sorted(body.keys() - set(allowed)):
        raise RecordError(
            f"field {shorten(repr(unknown[0]), 60)} is not supported in a request with blocks (allowed: "
            f"{', '.join((*PROMPT_FIELDS, 'mode', *allowed))})"
        )
    if "documents" in record and prompt is None:
        raise RecordError(NO_WORDING)
    sample = parse_request(record, prompt, "request")
    return PromptRequest(sample=sample, mode=mode, is_chat=is_chat, sampling=_sampling(body, is_chat=is_chat))


def _take_question(record: dict[str, Any], body: dict[str, Any], *, is_chat: bool) -> None:
    """Move the question from where the client of OpenAI has to put it to the field `question`."""
    if is_chat:
        if record.get("messages") == [] and len(record) > 1:
            del record["messages"]
        messages: Any = record.get("messages")
        is_question = is_list(messages) and len(messages) == 1 and isinstance(messages[0], Mapping)
        if "documents" in record and "question" not in record and is_question:
            (message,) = record.pop("messages")
            check_field(
                message.keys() == {"role", "content"} and message["role"] == "user",
                "field 'messages[0]'",
                message,
                "be a message of the user with the question, because there are documents",
            )
            record["question"] = message["content"]
    elif question := body.pop("prompt", ""):
        check_field(
            "documents" in record and "question" not in record,
            "field 'prompt'",
            question,
            "be empty, unless it is the question over documents",
        )
        record["question"] = question


def _sampling(body: dict[str, Any], *, is_chat: bool) -> dict[str, Any]:
    """Return the fields of vLLM's completion request."""
    check_field(isinstance(body.get("model", ""), str), "field 'model'", body.get("model"), "be a text")
    check_field(
        isinstance(body.get("stream", False), bool), "field 'stream'", body.get("stream"), "be a bool"
    )
    salt = body.get("cache_salt", "")
    check_field(isinstance(salt, str), "field 'cache_salt'", salt, "be a text")
    stop_ids = body.get("stop_token_ids", [])
    check_field(_are_ids(stop_ids), "field 'stop_token_ids'", stop_ids, "be a list of token ids")
    if is_chat:
        if "max_completion_tokens" in body:  # replaces the older name
            body["max_tokens"] = body.pop("max_completion_tokens")
        has_logprobs, num_top = body.pop("logprobs", False), body.pop("top_logprobs", 0)
        check_field(isinstance(has_logprobs, bool), "field 'logprobs'", has_logprobs, "be a bool")
        check_field(type(num_top) is int and num_top >= 0, "field 'top_logprobs'", num_top, "be a number")
        if has_logprobs:
            body["logprobs"] = num_top
    for name, value in body.items():
        _check_sendable(name, value)
    num_tokens = body.get("max_tokens")
    is_count = num_tokens is None or (type(num_tokens) is int and num_tokens > 0)
    check_field(is_count, "field 'max_tokens'", num_tokens, "be a whole number of at least 1")
    return body


def _check_sendable(name: str, value: Any) -> None:
    """Check that vLLM can send a value to its engine. It would answer with an error of the server.

    Raises:
        RecordError: a text is no Unicode, a number is too large or not finite, or the value is nested deeply.
    """
    waiting = [(value, 0)]
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, Mapping) or is_list(part):
            check_field(depth < MAX_DEPTH, f"field {name!r}", value, f"be nested at most {MAX_DEPTH} times")
            inner = [*part.keys(), *part.values()] if isinstance(part, Mapping) else part
            waiting += [(element, depth + 1) for element in inner]
        elif isinstance(part, str):
            is_text = not any("\ud800" <= char <= "\udfff" for char in part)
            check_field(is_text, f"field {name!r}", part, "be Unicode without lone surrogates")
        elif isinstance(part, int):
            check_field(abs(part) < MAX_NUMBER, f"field {name!r}", part, "be a number of at most 64 bits")
        elif isinstance(part, float):
            check_field(math.isfinite(part), f"field {name!r}", part, "be a finite number")


def _are_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and all(type(id) is int for id in value)
