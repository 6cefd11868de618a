"""Sources: published layouts, read lazily into samples."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from blockft.data.rag import Document, RagPrompt
from blockft.data.records import Placed, find_files, read_array, read_hub, read_lines
from blockft.data.sample import RecordError, Sample, check, from_record, take, text_of
from blockft.errors import UserError


@dataclass(kw_only=True)
class Tally:
    """What became of a source's records."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad_records: list[str] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1


def read(
    format: str,
    path: str,
    tally: Tally,
    *,
    prompt: RagPrompt,
    split: str | None = None,
    max_samples: int | None = None,
    skip_bad: bool = False,
) -> Iterator[Sample]:
    """The samples of a source, lazily, in its order. Counts into `tally` what is read and what is bad.

    Formats: `samples` (JSON lines of our own) and `hotpotqa` (one JSON array). `prompt` words the RAG prompts
    of sources that hold questions and documents; no more than `max_samples` records are read.

    Raises:
        UserError: nothing at `path`, or, unless `skip_bad`, a bad record: with its file, line and field.
    """
    for at, record in islice(_records(format, path, split), max_samples):
        tally.read += 1
        try:
            if isinstance(record, RecordError):
                raise record
            yield from_record(record) if format == "samples" else _hotpotqa(record, prompt)
        except RecordError as error:
            if not skip_bad:
                raise UserError(f"{at}: {error} (data.on_bad_record=skip passes over it)") from error
            tally.drop("bad record")
            tally.bad_records.append(f"{at}: {error}")


def locate(format: str, path: str) -> list[Path]:
    """The files of a source; none if it is a data set on the Hub.

    Raises:
        UserError: nothing is there.
    """
    return find_files(path, ".jsonl" if format == "samples" else ".json")


def _records(format: str, path: str, split: str | None) -> Iterator[Placed]:
    files = locate(format, path)
    if not files:
        yield from read_hub(path, split)
    for file in files:
        try:
            yield from read_lines(file) if format == "samples" else read_array(file)
        except OSError as error:
            raise UserError(f"source {file} cannot be read: {error.strerror}") from error


def _hotpotqa(record: Any, prompt: RagPrompt) -> Sample:
    """HotpotQA, distractor setting (Yang et al. 2018): ten paragraphs, cut into sentences; two support.

    The authors' JSON has lists of pairs, the data set on the Hub mappings of two lists.
    """
    check(isinstance(record, Mapping), "the record", record, "be a JSON object")
    question = text_of(take(record, "question"), "field 'question'")
    answer = text_of(take(record, "answer"), "field 'answer'")
    id = text_of(take(record, "_id" if "_id" in record else "id"), "field '_id'")
    facts = _pairs(record, "supporting_facts", "title", "sent_id")
    supporting = {title for title, _ in facts}
    documents = []
    for i, (title, sentences) in enumerate(_pairs(record, "context", "title", "sentences")):
        at = f"field 'context[{i}]'"
        check(
            isinstance(sentences, list) and all(type(s) is str for s in sentences),
            at,
            sentences,
            "hold sentences",
        )
        text = text_of("".join(sentences), at, may_be_blank=True)
        title = text_of(title, at, may_be_blank=True)
        documents.append(Document(title=title, text=text, relevance=int(title in supporting)))
    messages, meta = prompt.build(question, documents, id)
    meta |= {name: record[name] for name in ("type", "level") if name in record}
    return Sample(id=id, source="hotpotqa", messages=messages, response=answer, answers=(answer,), meta=meta)


def _pairs(record: Mapping[str, Any], name: str, first: str, second: str) -> list[tuple[Any, Any]]:
    """A list of pairs, spelt as such or as a mapping of two lists."""
    found = take(record, name)
    if (
        isinstance(found, Mapping)
        and isinstance(found.get(first), list)
        and isinstance(found.get(second), list)
    ):
        found = list(zip(found[first], found[second], strict=False))
    rule = f"be a list of pairs ({first}, {second})"
    check(isinstance(found, list) and all(_is_pair(pair) for pair in found), f"field {name!r}", found, rule)
    return [(pair[0], pair[1]) for pair in found]


def _is_pair(found: Any) -> bool:
    return isinstance(found, list | tuple) and len(found) == 2 and isinstance(found[0], str)
