"""More to read: reading tasks of the instruction file, and sentences of the training documents with a gap.

python more_data.py MODEL_FOLDER DATA        (after split.py; writes DATA/more.pt.xz and DATA/more.json)

Reading tasks: the extractive questions of adversarial_qa among the 4,000 instructions of T0, each with its
paragraph; the other nine documents are found by BM25 among all such paragraphs. `split.py` leaves paragraphs
out that share ten words in a row with a document of validation or of a sealed question.

Clozes: a window of a sentence in which a name, a number or a quotation is replaced by a gap; some other words
are left out, so that the sentence cannot be found by exact comparison alone. Documents that support validation
are in no training prompt, so no cloze comes from them.
"""

import json
import lzma
import random
import re
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blockft.data.encode import Encoder
from blockft.model.load import load_tokenizer

from prompts import support_of
from split import READING_TASKS, Store, encode_questions
from study import MORE_DATA
from table import load_data

SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'])")
SPANS = re.compile(
    r"(?P<name>(?:[A-Z][\w'’-]+)(?:\s+(?:of|the|de|and|van|von)\s+[A-Z][\w'’-]+|\s+[A-Z][\w'’-]+){0,4})"
    r"|(?P<number>(?:January|February|March|April|May|June|July|August|September|October|November|December)"
    r"\s+\d{1,2}(?:,\s*\d{4})?|\$?\d[\d,.]*\d(?:\s(?:million|billion|percent|%))?|\b\d+\b)"
    r"|\"(?P<quotation>[^\"]{4,40})\""
)
GAP = "____"
PER_DOCUMENT = 12


def main(model: Path, out: Path) -> None:
    tokenizer = load_tokenizer(str(model))
    encoder = Encoder(tokenizer)
    prepared = load_data(out)
    store = Store()
    store.add("train", MORE_DATA, encode_questions(encoder, "fid", out / READING_TASKS))
    used = {n for q in prepared["questions"] if q["part"] == "train" for n in q["documents"]}
    validation = [q for q in prepared["questions"] if q["part"] == "validation"]
    assert not used & set().union(*map(support_of, validation))
    gaps = Gaps(tokenizer, prepared)
    clozes = {n: gaps.of(n, prepared["documents"][n]) for n in sorted(used)}
    # documents of the reading tasks have negative numbers until they are added to the others
    clozes |= {-n - 1: gaps.of(-n - 1, document) for n, document in enumerate(store.documents)}
    clozes = {n: some for n, some in clozes.items() if some}
    summary = {
        "reading tasks": len(store.questions),
        "paragraphs": len(store.documents),
        "clozes": sum(map(len, clozes.values())),
        "documents with clozes": len(clozes),
    }
    content = BytesIO()
    torch.save({"documents": store.documents, "questions": store.questions, "clozes": clozes}, content)
    (out / "more.pt.xz").write_bytes(lzma.compress(content.getvalue()))
    (out / "more.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


class Gaps:
    """Makes clozes of documents' token ids."""

    def __init__(self, tokenizer: Any, prepared: dict[str, Any]) -> None:
        self._tokenizer, self._end = tokenizer, prepared["end_of_turn"]
        example = prepared["questions"][0]
        text = self._tokenizer.decode(example["final"].tolist())
        assert self._encode(text) == example["final"].tolist()
        assert [*self._encode(example["answers"][0]), self._end] == example["answer"].tolist()
        self._before, self._after = text.split(example["question"])

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def of(self, number: int, document: np.ndarray[Any, Any]) -> list[tuple[Any, Any]]:
        rng = random.Random(f"cloze:{number}")
        _, _, text = self._tokenizer.decode(document.tolist()).strip().rpartition("\n")
        found = [c for sentence in SENTENCES.split(text) for c in clozes_of(sentence, rng)]
        chosen = rng.sample(found, min(len(found), PER_DOCUMENT))
        return [
            (
                np.array(self._encode(self._before + question + self._after), np.uint16),
                np.array([*self._encode(answer), self._end], np.uint16),
            )
            for question, answer in chosen
        ]


def clozes_of(sentence: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Windows of a sentence with a gap, each with what fills the gap."""
    for match in SPANS.finditer(sentence):
        answer = next(filter(None, match.groups())).strip(" .,")
        left, right = sentence[: match.start()].split(), sentence[match.end() :].split()
        # a capital at the start of a sentence is no sign of a name
        if (match["name"] and not left) or not any(c.isalnum() for c in answer):
            continue
        left, right = left[-rng.randint(5, 12) :], right[: rng.randint(3, 8)]
        kept = [[w for w in words if rng.random() > 0.15] for words in (left, right)]
        rest = " ".join([*kept[0], *kept[1]])
        if len(kept[0]) + len(kept[1]) >= 5 and answer.lower() not in rest.lower():
            yield " ".join([*kept[0], GAP, *kept[1]]), answer


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
