"""`blockft generate`: prompts from JSON lines, answers as text or JSON."""

import json
import sys
from pathlib import Path

from blockft.config import PromptSettings, View
from blockft.data.rag import RagPrompt
from blockft.data.request import request_of
from blockft.data.sample import RecordError, Sample
from blockft.errors import UserError
from blockft.inference.engine import Engine


def generate(model: str, source: str, *, mode: str, max_new_tokens: int, as_json: bool) -> None:
    """Answer every line of `source`, a request as `data.request` reads it.

    Raises:
        UserError: an unknown mode; a line that is no prompt, by its number; see `Engine`.
    """
    if mode not in View.__members__:
        raise UserError(f"--mode is {mode!r}, allowed are {', '.join(View.__members__)}")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}, it should be at least 1")
    lines = _lines(source)
    engine = Engine.load(model)
    rag = _rag_prompt(engine)
    prompts = [_prompt(line, rag, f"{source}, line {number}") for number, line in lines]
    for prompt in prompts:
        (answer,) = engine.generate([prompt], mode=mode, max_new_tokens=max_new_tokens)
        if as_json:
            facts = {
                "id": prompt.id,
                "answer": answer.text,
                "answer_ids": answer.ids,
                "blocks": answer.num_blocks,
            }
            print(
                json.dumps(
                    facts | {"prompt_tokens": answer.prompt_tokens, "ttft_ms": round(answer.ttft_ms, 1)}
                )
            )
        else:
            print(answer.text, flush=True)


def _lines(source: str) -> list[tuple[int, str]]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {source} cannot be read: {error}") from error
    lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise UserError(f"--input {source} holds no prompt")
    return lines


def _rag_prompt(engine: Engine) -> RagPrompt:
    """How the model's training worded prompts, or the defaults for a model that is no export."""
    known = engine.block_attention
    if known is None:
        default = PromptSettings()
        wording = {name: getattr(default, name) for name in ("instruction", "document", "question")}
        return RagPrompt(**wording, documents_in=default.documents_in.value, order="given")
    return RagPrompt(**known["prompt"], documents_in=known["documents_in"], order="given")


def _prompt(line: str, rag: RagPrompt, at: str) -> Sample:
    """The prompt of one line of input.

    Raises:
        UserError: it is none.
    """
    try:
        return request_of(json.loads(line), rag, at)
    except json.JSONDecodeError as error:
        raise UserError(f"{at} is not JSON: {error}") from error
    except RecordError as error:
        raise UserError(f"{at}: {error}") from error
