"""Ask a server of `blockft serve` with the client of OpenAI (pip install openai).

    python serve_client.py http://localhost:8000/v1 "Who wrote Faust?" documents.jsonl

A line of the file is a document: {"title": "Faust", "text": "..."}; `title` may be left out. The variable
OPENAI_API_KEY has the server's key, if it asks for one.
"""

import json
import os
import sys
from pathlib import Path

import openai


def main(url: str, question: str, file: str) -> int:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines if line.strip()]
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        answer(client, question, documents)
    except openai.APIStatusError as error:
        # the request was refused or has failed; the server goes on
        print(error.message, file=sys.stderr)
        return 1
    return 0


def answer(client: openai.OpenAI, question: str, documents: list[dict[str, str]]) -> None:
    """Print the answer to a question over documents as it comes, and what was reused."""
    (model, *_) = client.models.list().data
    stream = client.chat.completions.create(
        model=model.id,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # each document is a block: its keys and values are reused in every prompt
        extra_body={"documents": documents},
    )
    for chunk in stream:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
        if chunk.usage:
            reuse = chunk.usage.model_extra["block_attention"]
            num_reused, num_tokens = reuse["tokens_reused"], chunk.usage.prompt_tokens
            print(f"\n{num_reused} of {num_tokens} prompt tokens reused; blocks: {reuse['sources']}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
