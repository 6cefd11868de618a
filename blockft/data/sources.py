"""Sources: published layouts, read lazily into samples."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from blockft.data import chat_formats, qa_formats, retrieval, squad
from blockft.data.document_pool import DocumentPool
from blockft.data.qa_formats import Question, RecordDropped
from blockft.data.rag_prompt import RagPrompt
from blockft.data.records import PlacedRecord, find_files, read_file, read_hub, without_gzip_suffix
from blockft.data.sample import RecordError, Sample, parse_sample
from blockft.errors import UserError

T = TypeVar("T")


@dataclass(kw_only=True)
class RecordCounts:
    """What became of a source's records.

    Every record is dropped for a reason or gives samples, mostly one; every sample is kept or dropped for a
    reason, so that `read` = `kept` + all `dropped` where each record gives one sample.
    """

    read: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad_records: list[str] = field(default_factory=list)

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1

    def merge(self, other: "RecordCounts") -> None:
        """Add what became of the same records when they were read again."""
        self.read += other.read
        self.samples += other.samples
        self.dropped += other.dropped
        self.bad_records = [*dict.fromkeys(self.bad_records + other.bad_records)]


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A format: its files, where its records are in them, and what becomes of a record.

    A record is a question to be worded, or gives samples as it stands. `regroup` turns what the files hold
    into records. `pool` says where distractors can be retrieved: in the whole source, or its article.
    """

    suffixes: tuple[str, ...] = (".json", ".jsonl", ".parquet")
    under: str | None = None
    regroup: Callable[[Iterator[PlacedRecord]], Iterator[PlacedRecord]] = iter
    question: Callable[[Any], Question] | None = None
    samples: Callable[[Any, str], Iterable[Sample]] | None = None
    pool: str = "record"


SOURCE_FORMATS = {
    "samples": SourceFormat(suffixes=(".jsonl",), samples=lambda record, at: [parse_sample(record)]),
    "hotpotqa": SourceFormat(question=qa_formats.parse_hotpotqa),
    "2wikimultihopqa": SourceFormat(question=qa_formats.parse_2wikimultihopqa),
    "musique": SourceFormat(question=qa_formats.parse_musique),
    "squad": SourceFormat(
        under="data", regroup=squad.read_article_questions, question=squad.parse_question, pool="article"
    ),
    "fid": SourceFormat(question=qa_formats.parse_fid, pool="source"),
    "messages": SourceFormat(samples=chat_formats.parse_messages_record),
    "alpaca": SourceFormat(samples=chat_formats.parse_alpaca),
    "blocks": SourceFormat(samples=chat_formats.parse_blocks),
}


def read_samples(
    format: str,
    path: str,
    tally: RecordCounts,
    *,
    prompt: RagPrompt,
    split: str | None = None,
    name: str | None = None,
    skip_samples: int = 0,
    max_samples: int | None = None,
    max_questions_per_context: int | None = None,
    skip_bad: bool = False,
    retriever: str = "none",
    dense_model: str = "",
) -> Iterator[Sample]:
    """The samples of a source, lazily, in its order. Counts into `tally` what is read, dropped and bad.

    `prompt` words the prompts of questions; `skip_samples` records are passed over, and no more than
    `max_samples` read. At most `max_questions_per_context` see a set of documents that `squad` shares. With a
    `retriever` (`bm25` or `dense`) all documents of a `fid` source are read before its questions and stay in
    memory, the documents alone; `squad` keeps an article at a time, every other format a record.

    Raises:
        UserError: nothing at `path`, or options that do not go together; later, unless `skip_bad`, a bad
            record: with its file, line and field.
    """
    layout = SOURCE_FORMATS[format]
    files = find_source_files(format, path)
    shares = prompt.shared_context and layout.pool == "article"
    if retriever != "none":
        _check_retrieval(format, path, prompt.num_documents)
    index = {
        "none": None,
        "bm25": retrieval.build_bm25_index,
        "dense": partial(retrieval.build_dense_index, dense_model),
    }[retriever]

    def name_of(tally: RecordCounts) -> str:
        """The name of the record at hand, if it has none; the same wherever the file lies."""
        return f"{without_gzip_suffix(Path(path)).stem}-{skip_samples + tally.read}"

    def records() -> Iterator[PlacedRecord]:
        found = (read_file(file, layout.under) for file in files) if files else [read_hub(path, split, name)]
        return layout.regroup(chain.from_iterable(found))

    def wanted() -> Iterator[PlacedRecord]:
        return islice(records(), skip_samples, None if max_samples is None else skip_samples + max_samples)

    def asked(placed: Iterator[PlacedRecord], tally: RecordCounts) -> Iterator[Question]:
        assert (ask := layout.question)
        for question in _parse_records(placed, lambda record, at: ask(record), tally, skip_bad, format):
            yield question if question.id else replace(question, id=name_of(tally))

    def with_documents() -> Iterator[Question]:
        found = asked(wanted(), tally)
        if shares:
            return squad.group_by_context(
                found, prompt, tally.drop, index and index(), max_questions_per_context
            )
        if index:
            if layout.pool == "source":
                pool = DocumentPool(
                    document
                    for question in asked(records(), RecordCounts())
                    for document in question.documents
                )
                found = (replace(question, pool=pool) for question in found)
            return retrieval.retrieve(found, index(), prompt.num_documents or 0)
        return map(squad.add_distractors, found) if layout.pool == "article" else found

    def samples() -> Iterator[Sample]:
        if give := layout.samples:
            made = _parse_records(
                wanted(), lambda r, at: tuple(give(r, name_of(tally))), tally, skip_bad, format
            )
        else:
            made = ((_build_prompt(question, prompt),) for question in with_documents())
        for some in made:
            tally.samples += len(some)
            yield from some

    return samples()


def find_source_files(format: str, path: str) -> list[Path]:
    """The files of a source; none if it is a data set on the Hub.

    Raises:
        UserError: nothing is there.
    """
    return find_files(path, SOURCE_FORMATS[format].suffixes)


def _check_retrieval(format: str, path: str, num_documents: int | None) -> None:
    """Raises:
    UserError: documents cannot be retrieved so.
    """
    layout = SOURCE_FORMATS[format]
    if not layout.question:
        asked = ", ".join(name for name, layout in SOURCE_FORMATS.items() if layout.question)
        raise UserError(
            f"source {path} has a retriever, but the format {format} holds no documents (allowed: {asked})"
        )
    if layout.pool != "record" and num_documents is None:
        raise UserError(f"source {path} has a retriever, which has to know how many: set data.num_documents")


def _parse_records(
    placed: Iterable[PlacedRecord],
    parse: Callable[[Any, str], T],
    tally: RecordCounts,
    skip_bad: bool,
    format: str,
) -> Iterator[T]:
    """What is made of each record, those left out that are dropped or bad.

    Raises:
        UserError: a record is bad and not to be skipped; if it is the first, `format` may be wrong.
    """
    for at, record in placed:
        tally.read += 1
        try:
            if isinstance(record, RecordError):
                raise record
            result = parse(record, at)
        except RecordDropped as reason:
            tally.drop(str(reason))
        except RecordError as error:
            if not skip_bad:
                hint = " (data.on_bad_record=skip passes over it)"
                if tally.read == 1:
                    hint = f"; is it in the format {format} (--format, sources[].format)?"
                raise UserError(f"{at}: {error}{hint}") from error
            tally.drop("bad record")
            tally.bad_records.append(f"{at}: {error}")
        else:
            yield result


def _build_prompt(question: Question, prompt: RagPrompt) -> Sample:
    messages, meta = prompt.build(question.question, question.documents, question.id)
    return Sample(
        id=question.id,
        source=question.source,
        messages=messages,
        response=question.answers[0],
        answers=question.answers,
        meta=meta | question.meta,
    )
