"""Cuts the training files into a training and a validation part by document group, and tokenizes both.

python split.py MODEL_FOLDER DATA_FOLDER OUT

Questions form one group if they share a supporting document, a SQuAD article or the question itself; a group
is in one part only. The dev files and the kept questions of 2WikiMultihopQA are read for one purpose: a
question that shares a group with them is left out of both parts. OUT receives `prepared.pt.xz` (token ids of
every document, prompt part and answer) and `split.json` (counts and digests, no text).
"""

import hashlib
import json
import lzma
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from blockft.config import CutSettings, PromptSettings
from blockft.data.cut import cut_sample
from blockft.data.encode import NO_LABEL, Encoder, Example
from blockft.data.fit import encode_to_fit
from blockft.data.rag import RagPrompt
from blockft.data.sample import Sample
from blockft.data.sources import Tally, read
from blockft.model.load import load_tokenizer

NUM_VALIDATION = {"squad": 500, "fid": 400, "hotpotqa": 60, "2wikimultihopqa": 100, "musique": 60}
"""Questions of each set that choose settings."""

NUM_IN_GROUPS = NUM_VALIDATION | {"squad": 1200}
"""Questions of the groups that are given to validation: SQuAD's are sampled from more articles."""

TRAIN_FILES = {
    "squad": "squadshifts_new_wiki_train.json",
    "fid": "nq_open_oracle_train.jsonl",
    "hotpotqa": "hotpotqa_distractor_train.json",
    "2wikimultihopqa": "2wikimultihopqa_train.json",
    "musique": "musique_train.jsonl",
}
SEALED_FILES = {
    "squad": "squadshifts_new_wiki_dev.json",
    "fid": "nq_open_oracle_dev.jsonl",
    "hotpotqa": "hotpotqa_distractor_dev.json",
}
NUM_TWO_WIKI = 250
"""The first questions of 2WikiMultihopQA are trained on and validated on; the rest is kept."""

CHATS, NUM_CHATS = "instructions_t0.jsonl", 2000
NUM_DOCUMENTS = 20
"""Ranked documents stored for a question, from which prompts take theirs."""

ROW_LEN = 32_768
READING_TASKS = "reading_tasks.jsonl"
"""Extractive questions of the instruction file, each with its paragraph, for `more_data.py`."""

SHARED_WORDS = 10
"""Documents that share so many words in a row belong together."""

TASKS = {
    "answer_the_following_q": r'following passage\s+"(?P<c>.*)",\s+answer the following question\..*?Question: (?P<q>.*)$',
    "question_context_answer": r'^Question: "(?P<q>.*?)"\s+Context: "(?P<c>.*)"\s+Answer:$',
    "based_on": r"\nQuestion: (?P<q>.*?)\nContext: (?P<c>.*)$",
    "tell_what_it_is": r'answer to the question "(?P<q>.*?)" is in "(?P<c>.*)"\. Can you tell me what it is',
}

QUESTION_TWICE = "\n\nQuestion: {question}\n\nQuestion: {question}\nAnswer in a few words."


@dataclass(frozen=True)
class Record:
    """A record of a source file with the names of the groups that it belongs to."""

    source: str
    content: Any
    groups: tuple[str, ...]


def main(model: Path, data: Path, out: Path) -> None:
    records = [record for source, name in TRAIN_FILES.items() for record in read_records(source, data / name)]
    sealed = [record for source, name in SEALED_FILES.items() for record in read_records(source, data / name)]
    two_wiki = [record for record in records if record.source == "2wikimultihopqa"]
    sealed += two_wiki[NUM_TWO_WIKI:]
    kept = {id(record) for record in two_wiki[NUM_TWO_WIKI:]}
    records = [record for record in records if id(record) not in kept]
    parts, num_left_out = split_records(records, sealed, NUM_IN_GROUPS)
    tasks = list(reading_tasks(data / CHATS))
    closed = {
        run for r in (*sealed, *parts["validation"]) for text in texts(r.content) for run in word_runs(text)
    }
    apart = [task for task in tasks if not word_runs(task["ctxs"][0]["text"]) & closed]
    out.mkdir(parents=True, exist_ok=True)
    (out / READING_TASKS).write_text("".join(json.dumps(task) + "\n" for task in apart), encoding="utf-8")
    print(
        f"reading tasks: {len(apart)} of {len(tasks)} share no document with validation or a sealed question"
    )
    encoder = Encoder(load_tokenizer(str(model)))
    store = Store()
    summary: dict[str, Any] = {"left out, in a group with a sealed question": num_left_out}
    with tempfile.TemporaryDirectory() as folder:
        for part, chosen in parts.items():
            files = {source: Path(folder) / part / name for source, name in TRAIN_FILES.items()}
            for source, file in files.items():
                write_records(source, [r for r in chosen if r.source == source], file)
            for source, file in files.items():
                samples = encode_questions(encoder, source, file)
                store.add(part, source, samples)
    settings = CutSettings()
    cut = partial(
        cut_sample,
        count_tokens=encoder.count_tokens,
        max_blocks=settings.max_blocks,
        min_block_tokens=settings.min_block_tokens,
    )
    prompt = rag_prompt()
    chats = list(read("messages", str(data / CHATS), Tally(), prompt=prompt, max_samples=NUM_CHATS))
    for outcome in encode_to_fit(chats, encoder, ROW_LEN, False, True, cut):
        if outcome.example:
            store.add_chat(outcome.example)
    removed = store.finish()
    summary["training questions left out, a supporting paragraph of validation among their documents"] = (
        removed
    )
    summary["questions"] = store.count()
    summary["chats"] = len(store.chats)
    summary["documents"] = len(store.documents)
    summary["digest of question ids"] = {part: store.digest(part) for part in parts}
    content = BytesIO()
    torch.save(store.content(encoder.end_of_turn_id), content)
    (out / "prepared.pt.xz").write_bytes(lzma.compress(content.getvalue()))
    (out / "split.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))


def read_records(source: str, path: Path) -> Iterator[Record]:
    """The records of a file, one per question, or per article for SQuAD, with their groups."""
    if source == "squad":
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            questions = (qa["question"] for p in article["paragraphs"] for qa in p["qas"])
            groups = (title_group(article["title"]), *map(question_group, questions))
            yield Record(source, article, groups)
    elif source in ("fid", "musique"):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if source == "fid":
                titles = [record["ctxs"][0]["title"]]
            else:
                titles = [p["title"] for p in record["paragraphs"] if p["is_supporting"]]
            yield Record(source, record, (*map(title_group, titles), question_group(record["question"])))
    else:
        for record in json.loads(path.read_text(encoding="utf-8")):
            titles = [title for title, _ in record["supporting_facts"]]
            yield Record(source, record, (*map(title_group, titles), question_group(record["question"])))


def reading_tasks(path: Path) -> Iterator[dict[str, Any]]:
    """Extractive questions as records of FiD's layout, once each."""
    seen = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        kind = next(
            (k for k in TASKS if "adversarial_qa" in record["source"] and k in record["source"]), None
        )
        if kind is None:
            continue
        prompt, answer = (message["content"].strip() for message in record["messages"])
        found = re.search(TASKS[kind], prompt, re.DOTALL)
        if not found:
            continue
        question, context = found["q"].strip(), " ".join(found["c"].split()).strip('"')
        if answer.lower() not in context.lower() or question in seen:
            continue
        seen.add(question)
        ctxs = [{"title": "", "text": context, "hasanswer": True}]
        yield {"question": question, "answers": [answer], "ctxs": ctxs}


def word_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def texts(content: Any) -> Iterator[str]:
    """The documents of a record."""
    if "paragraphs" in content:
        yield from (p["context"] if "context" in p else p["paragraph_text"] for p in content["paragraphs"])
    elif "ctxs" in content:
        yield from (c["text"] for c in content["ctxs"])
    else:
        yield from (" ".join(sentences) for _, sentences in content["context"])


def title_group(title: str) -> str:
    return "title " + " ".join(title.replace("_", " ").casefold().split())


def question_group(question: str) -> str:
    return "question " + " ".join(question.casefold().split())


def split_records(
    records: list[Record], sealed: list[Record], num_validation: dict[str, int]
) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """Whole groups to `validation` until each set has enough questions, the others to `train`.

    Groups come in the order of a hash of their names. Records in a group with a sealed one are left out.
    """
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for record in chain(records, sealed):
        first, *others = record.groups
        for other in others:
            parent[find(other)] = find(first)
    closed = {find(record.groups[0]) for record in sealed}
    groups: dict[str, list[Record]] = defaultdict(list)
    left_out = Counter[str]()
    for record in records:
        root = find(record.groups[0])
        if root in closed:
            left_out[record.source] += num_questions(record)
        else:
            groups[root].append(record)
    # the name of a group must not depend on the order in which it was joined
    named = sorted(groups.values(), key=lambda group: _hash(min(chain(*(r.groups for r in group)))))
    parts: dict[str, list[Record]] = {"train": [], "validation": []}
    counts = Counter[str]()
    for group in named:
        wanted = any(counts[record.source] < num_validation[record.source] for record in group)
        if wanted:
            for record in group:
                counts[record.source] += num_questions(record)
        parts["validation" if wanted else "train"] += group
    return parts, dict(left_out)


def num_questions(record: Record) -> int:
    if record.source == "squad":
        return sum(len(paragraph["qas"]) for paragraph in record.content["paragraphs"])
    return 1


def write_records(source: str, records: list[Record], path: Path) -> None:
    """The records as a file in the layout of their source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [record.content for record in records]
    if source in ("fid", "musique"):
        path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")
    else:
        path.write_text(json.dumps({"data": content} if source == "squad" else content), encoding="utf-8")


def rag_prompt(question: str | None = None) -> RagPrompt:
    """The wording of the project's recipes, best documents first."""
    wording = PromptSettings()
    return RagPrompt(
        instruction=wording.instruction,
        document=wording.document,
        question=question or wording.question,
        order="descending",
        num_documents=NUM_DOCUMENTS,
    )


@dataclass(frozen=True)
class Encoded:
    """A question: its sample, its example, and the ids of its final block if the question is asked twice."""

    sample: Sample
    example: Example
    final_twice: np.ndarray[Any, Any]


def encode_questions(encoder: Encoder, source: str, path: Path) -> list[Encoded]:
    samples, twice = (
        list(read(source, str(path), Tally(), prompt=rag_prompt(wording), retriever="bm25"))
        for wording in (None, QUESTION_TWICE)
    )
    encoded = []
    for start in range(0, len(samples), 64):
        some, others = samples[start : start + 64], twice[start : start + 64]
        for sample, example, other in zip(some, encoder.encode(some), encoder.encode(others), strict=True):
            encoded.append(Encoded(sample, example, other.blocks[-1]))
    return encoded


class Store:
    """Token ids of documents, once each, and of questions."""

    def __init__(self) -> None:
        self.documents: list[np.ndarray[Any, Any]] = []
        self.questions: list[dict[str, Any]] = []
        self.chats: list[dict[str, Any]] = []
        self._number_of: dict[bytes, int] = {}

    def add(self, part: str, source: str, encoded: list[Encoded]) -> None:
        for one in encoded:
            blocks, sample = one.example.blocks, one.sample
            # the template writes the system prompt as a block of its own before the instruction
            first = len(blocks) - len(sample.documents) - 1
            answer_len = int((one.example.labels != NO_LABEL).sum())
            supporting = set(sample.meta.get("supporting", ()))
            self.questions.append(
                {
                    "part": part,
                    "source": source,
                    "id": sample.id,
                    "type": sample.meta.get("type", ""),
                    "question": sample.messages[-1].content[-1].split("\n")[2].removeprefix("Question: "),
                    "answers": sample.answers,
                    "head": [block.astype(np.uint16) for block in blocks[:first]],
                    "documents": [self._number(block) for block in blocks[first:-1]],
                    "supports": [number in supporting for number in sample.documents],
                    "final": blocks[-1][:-answer_len].astype(np.uint16),
                    "final_twice": one.final_twice[:-answer_len].astype(np.uint16),
                    "answer": blocks[-1][-answer_len:].astype(np.uint16),
                }
            )

    def add_chat(self, example: Example) -> None:
        self.chats.append(
            {
                "ids": example.input_ids.astype(np.uint16),
                "labels": (example.labels != NO_LABEL),
                "block_lengths": example.block_lengths,
            }
        )

    def finish(self) -> int:
        """Drop training questions that have a supporting paragraph of validation among their documents."""
        supporting = {
            number
            for question in self.questions
            if question["part"] == "validation"
            for number, supports in zip(question["documents"], question["supports"], strict=True)
            if supports
        }
        kept = [q for q in self.questions if q["part"] != "train" or not supporting & set(q["documents"])]
        removed = len(self.questions) - len(kept)
        self.questions = sample_validation(kept)
        return removed

    def count(self) -> dict[str, dict[str, int]]:
        counts = Counter((question["part"], question["source"]) for question in self.questions)
        return {part: {s: counts[part, s] for s in TRAIN_FILES} for part in ("train", "validation")}

    def digest(self, part: str) -> str:
        ids = sorted(f"{q['source']} {q['id']}" for q in self.questions if q["part"] == part)
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]

    def content(self, end_of_turn: int) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "questions": self.questions,
            "chats": self.chats,
            "end_of_turn": end_of_turn,
        }

    def _number(self, block: np.ndarray[Any, Any]) -> int:
        key = block.tobytes()
        if key not in self._number_of:
            self._number_of[key] = len(self.documents)
            self.documents.append(block.astype(np.uint16))
        return self._number_of[key]


def sample_validation(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most so many validation questions of a set, in the order of a hash of their ids."""
    counts = Counter[str]()
    kept = set()
    for question in sorted(questions, key=lambda q: _hash(f"{q['source']} {q['id']}")):
        if (
            question["part"] == "validation"
            and counts[question["source"]] < NUM_VALIDATION[question["source"]]
        ):
            counts[question["source"]] += 1
            kept.add(id(question))
    return [q for q in questions if q["part"] == "train" or id(q) in kept]


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
