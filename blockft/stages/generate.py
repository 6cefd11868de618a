"""`blockft generate`: prompts from JSON lines, answers as text or JSON."""

import json
import sys
from pathlib import Path
from typing import Any

from blockft.config import PromptSettings, View
from blockft.data.rag import Document, RagPrompt
from blockft.data.sample import RecordError, Sample, check, messages_of, meta_of, take, text_of
from blockft.errors import UserError
from blockft.inference.engine import Engine


def generate(model: str, source: str, *, mode: str, max_new_tokens: int, as_json: bool) -> None:
    """Answer every line of `source`: {"documents": [{"title", "text"}], "question"} or {"messages"}.

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
        record = json.loads(line)
        check(isinstance(record, dict), "the line", record, "be a JSON object")
        id = str(record.get("id", at))
        if "messages" in record:
            messages = messages_of(record["messages"])
            meta = meta_of(take(record, "meta", {}), sum(len(message.content) for message in messages))
        else:
            question = text_of(take(record, "question"), "field 'question'")
            messages, meta = rag.build(question, _documents(record), id)
        return Sample(id=id, source="input", messages=messages, response="", meta=meta)
    except json.JSONDecodeError as error:
        raise UserError(f"{at} is not JSON: {error}") from error
    except RecordError as error:
        raise UserError(f"{at}: {error}") from error


def _documents(record: dict[str, Any]) -> list[Document]:
    documents = take(record, "documents")
    check(isinstance(documents, list), "field 'documents'", documents, "be a list")
    read = []
    for i, document in enumerate(documents):
        at = f"field 'documents[{i}]'"
        check(isinstance(document, dict), at, document, 'be {"title", "text"}')
        title = text_of(document.get("title", ""), f"{at}.title", may_be_blank=True)
        read.append(Document(title=title, text=text_of(take(document, "text"), f"{at}.text")))
    return read
