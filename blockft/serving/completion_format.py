"""Completions of vLLM as chat completions: whole answers and the chunks of streams."""

from typing import Any


class ChatFormat:
    """Turns the answers to one request into chat completions."""

    def __init__(self) -> None:
        self._begun: set[int] = set()

    def answer(self, completion: dict[str, Any]) -> dict[str, Any]:
        """Return a completion as a chat completion."""
        choices = []
        for choice in completion["choices"]:
            text = choice.pop("text")
            choice["message"] = {"role": "assistant", "content": text}
            choice["logprobs"] = _chat_logprobs(choice.get("logprobs"))
            choices.append(choice)
        return completion | {
            "id": _chat_id(completion["id"]),
            "object": "chat.completion",
            "choices": choices,
        }

    def chunks(self, chunk: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks of a chat for a chunk of a completion. The first one of a choice has its role."""
        base = chunk | {"id": _chat_id(chunk["id"]), "object": "chat.completion.chunk"}
        chunks = []
        for choice in chunk["choices"]:
            if choice["index"] not in self._begun:
                self._begun.add(choice["index"])
                role = {"role": "assistant", "content": ""}
                first = {"index": choice["index"], "delta": role, "logprobs": None, "finish_reason": None}
                chunks.append({name: base[name] for name in base if name != "usage"} | {"choices": [first]})
            choice["delta"] = {"content": choice.pop("text")}
            choice["logprobs"] = _chat_logprobs(choice.get("logprobs"))
        return [*chunks, base]


def _chat_id(id: str) -> str:
    return f"chat{id}"


def _chat_logprobs(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        _token_logprob(token, logprob)
        | {"top_logprobs": [_token_logprob(*alternative) for alternative in (top or {}).items()]}
        for token, logprob, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        )
    ]
    return {"content": content}


def _token_logprob(token: str, logprob: float | None) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
