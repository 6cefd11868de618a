"""Sources: the table of formats, and reading the records of a source as samples."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from blockft.data import chat_formats, column_formats, fields, qa_formats, squad
from blockft.data.column_path import similar_paths
from blockft.data.columns import Columns, absent_paths, describe_fields, is_header, unread_fields
from blockft.data.constructed import (
    CONSTRUCTED_SETS,
    ConstructedSize,
    parse_constructed,
    read_constructed,
)
from blockft.data.corpus import read_corpus
from blockft.data.document_pool import DocumentPool
from blockft.data.fields import MAX_UNKNOWN_FIELDS, OTHER_FIELDS, FieldTable
from blockft.data.files import RECORD_SUFFIXES, find_files, without_compression_suffix
from blockft.data.json_stream import decoding_problem
from blockft.data.layouts import mrqa_columns, suggest_columns
from blockft.data.qa_formats import Question
from blockft.data.rag_prompt import RagPrompt
from blockft.data.records import PlacedRecord, read_file, read_hub
from blockft.data.retrieval import Indexer, bm25_indexer, dense_indexer, retrieve
from blockft.data.sample import SKIP_REMEDY, RecordDropped, RecordError, Sample, parse_sample
from blockft.errors import UserError
from blockft.inputs import shorten

T = TypeVar("T")

CONSTRUCTED = "constructed"
"""The format whose `path` is not a file but the name of a constructed set."""

MAX_DROP_EXAMPLES = 3
"""Number of dropped records or samples that are listed for each reason."""

MAX_LISTED = 1_000
"""Number of bad records, and of samples that a template changes, that are listed for a source."""

MAX_EXAMPLE_LEN = 200
"""Number of characters that describe a dropped record or sample."""


@dataclass(kw_only=True)
class RecordCounts:
    """Counts of a source's records and samples.

    Each record either is dropped for a reason or gives one or more samples. Each sample either is kept or is
    dropped for a reason. If every record gives one sample, `read` equals `kept` plus the sum of `dropped`.

    `drop_examples` describes the first dropped records and samples of each reason.
    `unknown_fields` is the number of records that have a field which the format does not know, by field.
    """

    read: int = 0
    samples: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    drop_examples: dict[str, list[str]] = field(default_factory=dict)
    bad_records: list[str] = field(default_factory=list)
    unknown_fields: Counter[str] = field(default_factory=Counter)

    def count_unknown(self, names: Iterable[str]) -> None:
        """Count one record with these unknown fields. At most `MAX_UNKNOWN_FIELDS` are counted by name."""
        for name in sorted(names):
            is_new = name not in self.unknown_fields
            name = OTHER_FIELDS if is_new and len(self.unknown_fields) >= MAX_UNKNOWN_FIELDS else name
            self.unknown_fields[name] += 1

    def drop(self, reason: str, describe: Callable[[], str] = str) -> None:
        """Count one dropped record or sample; `describe` is called if it becomes an example of the reason."""
        self.dropped[reason] += 1
        if self.dropped[reason] <= MAX_DROP_EXAMPLES and (text := " ".join(describe().split())):
            self.drop_examples.setdefault(reason, []).append(shorten(text, MAX_EXAMPLE_LEN))

    def merge(self, other: "RecordCounts") -> None:
        """Add the counts of another pass over the same records. A bad record is listed once."""
        self.read += other.read
        self.samples += other.samples
        self.dropped += other.dropped
        for reason, examples in other.drop_examples.items():
            known = self.drop_examples.get(reason, [])
            self.drop_examples[reason] = [*dict.fromkeys(known + examples)][:MAX_DROP_EXAMPLES]
        self.unknown_fields += other.unknown_fields
        self.kept += other.kept
        self.bad_records = [*dict.fromkeys(self.bad_records + other.bad_records)][:MAX_LISTED]

    def list_bad(self, description: str) -> None:
        """List a bad record, if the list is not too long yet. Every bad record is counted as dropped."""
        if len(self.bad_records) < MAX_LISTED:
            self.bad_records.append(description)


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A published format: its description, its files, and the parser of its records.

    Attributes:
        description: one sentence that says what the format is.
        blocks: what becomes a block of the prompt.
        record_shapes: the shapes that a record may have, for documentation.
        fields: the fields of a record that are read, that have no effect, and that are refused.
        recognized_by: groups of fields; a record that has all fields of a group may be of this format.
        suffixes: the files of a folder that belong to a source.
        array_key: the key under which a JSON file may hold its records.
        file_fields: the fields of the object that holds `array_key`.
        expand: converts what the files hold into one record per question.
        parse_question: parses a record into a question, which a `RagPrompt` turns into a prompt.
        parse_samples: parses a record into samples; the second argument is the id of a sample without one.
            A format has either `parse_question` or `parse_samples`; `columns` has what its mapping says.
        unsupported: returns why the documents of a valid record of samples are known not to support its
            answer, or "". A question says so itself.
        distractors_from: where the distractors of a question come from: its own record, its article, or the
            whole source.
    """

    description: str
    blocks: str
    record_shapes: tuple[str, ...]
    fields: FieldTable
    recognized_by: tuple[str, ...]
    suffixes: tuple[str, ...] = (".json", ".jsonl", ".parquet")
    array_key: str | None = None
    file_fields: FieldTable | None = None
    expand: Callable[[Iterator[PlacedRecord]], Iterator[PlacedRecord]] = iter
    parse_question: Callable[[Any], Question] | None = None
    parse_samples: Callable[[Any, str], Iterable[Sample]] | None = None
    unsupported: Callable[[Any], str] | None = None
    distractors_from: Literal["record", "article", "source"] = "record"


SOURCE_FORMATS = {
    "samples": SourceFormat(
        description="Samples in the format of blockft, with marked blocks.",
        blocks="as marked",
        record_shapes=(
            '{"id", "source", "messages": [{"role", "content": [block, ...]}, ...], "response", '
            '"answers"?, "meta"?}',
        ),
        fields=fields.SAMPLES,
        recognized_by=("messages response", "source blocks response"),
        suffixes=(".jsonl",),
        parse_samples=lambda record, default_id: [parse_sample(record)],
    ),
    "hotpotqa": SourceFormat(
        description="HotpotQA in the distractor setting: questions that need two of ten paragraphs.",
        blocks="documents",
        record_shapes=(
            '{"_id", "question", "answer", "supporting_facts": [[title, number], ...], '
            '"context": [[title, [sentence, ...]], ...]}',
        ),
        fields=fields.MULTI_HOP,
        recognized_by=("supporting_facts context",),
        parse_question=qa_formats.parse_hotpotqa,
    ),
    "2wikimultihopqa": SourceFormat(
        description="2WikiMultihopQA: questions over several Wikipedia articles, in the layout of HotpotQA.",
        blocks="documents",
        record_shapes=(
            '{"_id", "question", "answer", "supporting_facts": [[title, number], ...], '
            '"context": [[title, [sentence, ...]], ...]}',
        ),
        fields=fields.MULTI_HOP,
        recognized_by=("supporting_facts context evidences",),
        parse_question=qa_formats.parse_2wikimultihopqa,
    ),
    "musique": SourceFormat(
        description="MuSiQue: questions of two to four hops, with twenty paragraphs each.",
        blocks="documents",
        record_shapes=(
            '{"id", "question", "answer", "answer_aliases"?, "answerable"?, '
            '"paragraphs": [{"title", "paragraph_text", "is_supporting"}, ...]}',
        ),
        fields=fields.MUSIQUE,
        recognized_by=("paragraphs question answer",),
        parse_question=qa_formats.parse_musique,
    ),
    "squad": SourceFormat(
        description="SQuAD 1 and 2; the other paragraphs of an article are the distractors, "
        "except those that contain the answer.",
        blocks="documents",
        record_shapes=(
            '{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text"}, ...]}, '
            "...]}, ...]}",
            '{"id", "title", "context", "question", "answers": {"text": [...]}}',
        ),
        fields=fields.SQUAD_QUESTION,
        recognized_by=("paragraphs title", "context question answers", "data version"),
        array_key="data",
        file_fields=fields.SQUAD_FILE,
        expand=squad.read_article_questions,
        parse_question=squad.parse_question,
        distractors_from="article",
    ),
    "fid": SourceFormat(
        description="NQ, TriviaQA and other questions with retrieved passages, as FiD and DPR write them.",
        blocks="documents",
        record_shapes=(
            '{"id"?, "question", "answers": [...], "target"?, "ctxs": [{"title", "text", "score"?}, ...]}',
            '{"id"?, "question", "answers": [...], "target"?, "positive_ctxs": [{"title", "text"}, ...], '
            '"hard_negative_ctxs"?: [...], "negative_ctxs"?: [...]}',
        ),
        fields=fields.FID,
        recognized_by=("question ctxs", "question positive_ctxs"),
        parse_question=qa_formats.parse_fid,
        distractors_from="source",
    ),
    "messages": SourceFormat(
        description="Chats as Tulu 3, OpenAI and ShareGPT write them; each learned answer gives a sample.",
        blocks="turns and their paragraphs",
        record_shapes=(
            '{"messages": [{"role", "content", "weight"?}, ...], "system"?}',
            '{"conversations": [{"from", "value", "weight"?}, ...], "system"?}',
        ),
        fields=fields.CHAT,
        recognized_by=("messages", "conversations"),
        parse_samples=chat_formats.parse_messages_record,
    ),
    "alpaca": SourceFormat(
        description="Instructions as Alpaca writes them; each answer gives a sample.",
        blocks="turns and their paragraphs",
        record_shapes=(
            '{"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...]}',
        ),
        fields=fields.ALPACA,
        recognized_by=("instruction output",),
        suffixes=RECORD_SUFFIXES,
        parse_samples=chat_formats.parse_alpaca,
    ),
    "blocks": SourceFormat(
        description="Prompts that already contain the chat template, as the authors of Block-Attention "
        "write them.",
        blocks="as given",
        record_shapes=(
            '{"prompt", "blocks": [text, ...], "response"}',
            '{"prompt", "documents": [{"title", "text", "score"?}, ...], "generated", "answers"}',
        ),
        fields=fields.BLOCKS,
        recognized_by=("prompt blocks", "prompt chunks", "prompt documents generated"),
        parse_samples=chat_formats.parse_blocks,
        unsupported=chat_formats.unsupported_blocks,
    ),
    CONSTRUCTED: SourceFormat(
        description="Questions over invented documents, which blockft makes itself: "
        + "; ".join(f"`{name}` ({each.description})" for name, each in CONSTRUCTED_SETS.items())
        + ".",
        blocks="documents",
        record_shapes=(),
        fields=fields.CONSTRUCTED,
        recognized_by=(),
        suffixes=(),
        parse_question=parse_constructed,
    ),
    "columns": SourceFormat(
        description="Records with any fields, also tables; a mapping names the fields that are read.",
        blocks="documents, or turns and their paragraphs",
        record_shapes=("{...}",),
        fields=fields.FieldTable(read=frozenset()),
        recognized_by=(),
        suffixes=RECORD_SUFFIXES,
        distractors_from="source",
    ),
}


def source_format(format: str, columns: Columns | None = None) -> SourceFormat:
    """Return the description of a format, with the parser of the records of `columns`.

    Without a mapping, `columns` has no parser.
    """
    found = SOURCE_FORMATS[format]
    if columns is None:
        return found
    if columns.is_question:
        return replace(
            found,
            expand=partial(column_formats.expand_questions, columns),
            parse_question=partial(column_formats.parse_question, columns),
        )
    return replace(found, parse_samples=partial(column_formats.parse_chat, columns))


def read_samples(
    format: str,
    path: str,
    counts: RecordCounts,
    *,
    prompt: RagPrompt,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    skip_samples: int = 0,
    max_samples: int | None = None,
    max_questions_per_context: int | None = None,
    skip_bad: bool = False,
    needs_evidence: bool = True,
    retriever: str = "none",
    dense_model: str = "",
    constructed: ConstructedSize | None = None,
    columns: Columns | None = None,
    corpus: str | None = None,
) -> Iterator[Sample]:
    """Read the samples of a source lazily, in the order of the source.

    Memory: with a retriever, the documents of a `fid` or `columns` source and of its corpus stay in memory,
    because all of them are read before the first question. `squad` keeps one article in memory, every other
    format one record.

    Args:
        format: a key of `SOURCE_FORMATS`.
        path: a file, a folder, a glob or a dataset id on the Hub; the name of a constructed set.
        counts: updated with the records that are read, dropped and bad.
        prompt: turns questions into prompts. Formats of chats and samples do not use it.
        split, name, revision: the split, the configuration and the commit of a dataset on the Hub.
        skip_samples: the number of records to skip at the start of the source.
        max_samples: the number of records to read; None reads all.
        max_questions_per_context: the number of `squad` questions that may share one set of documents.
        skip_bad: count and list bad records instead of raising.
        needs_evidence: drop questions whose documents are known not to support the answer. A model that
            learned them would learn to invent answers; an evaluation may ask them.
        retriever: `bm25` or `dense` searches distractors and ranks documents; `none` does not.
        dense_model: the sentence-transformers model of the `dense` retriever.
        constructed: the size of the questions of a constructed set.
        columns: the fields that the format `columns` reads.
        corpus: a file, a folder or a glob of documents, among which the retriever searches for the questions
            of `columns`. A question without documents of its own gets the best `num_documents` of them.
            Those that contain an answer count as its support.

    Raises:
        UserError: nothing exists at `path`, or the arguments contradict each other. While reading, unless
            `skip_bad`: a record is bad; the message names file, line and field.
    """
    if format == "columns" and columns is None:
        raise UserError(_columns_missing_message(path, split, name, corpus))
    reader = _SourceReader(
        format=format,
        source_format=source_format(format, columns),
        columns=columns,
        corpus=corpus,
        path=path,
        files=find_source_files(format, path),
        split=split,
        name=name,
        revision=revision,
        skip_samples=skip_samples,
        max_samples=max_samples,
        skip_bad=skip_bad,
        needs_evidence=needs_evidence,
        constructed=constructed or ConstructedSize(),
    )
    if format == CONSTRUCTED:
        reader.selected_records(counts)  # checks the name and the sizes
    if retriever != "none":
        _check_retrieval(reader, prompt.num_documents)
    if reader.source_format.parse_samples:
        return reader.samples(counts)
    if columns and not columns.documents and not corpus and prompt.num_documents != 0:
        raise UserError(
            f"source {path} has questions and no documents: add documents to its columns, or set corpus to a "
            "file of documents and retriever to bm25, or ask without documents (data.num_documents=0)"
        )
    questions = _add_documents(reader, prompt, counts, retriever, dense_model, max_questions_per_context)
    return _build_samples(questions, prompt, counts)


def find_source_files(format: str, path: str) -> list[Path]:
    """Return the files of a source; the list is empty for a dataset on the Hub and for a constructed set.

    Raises:
        UserError: nothing exists at `path`.
    """
    if format == CONSTRUCTED:
        return []
    return find_files(path, SOURCE_FORMATS[format].suffixes)


@dataclass(frozen=True, kw_only=True)
class _SourceReader:
    """Reads the records of one source and parses them; see `read_samples` for the fields."""

    format: str
    source_format: SourceFormat
    columns: Columns | None
    corpus: str | None
    path: str
    files: list[Path]
    split: str | None
    name: str | None
    revision: str | None
    skip_samples: int
    max_samples: int | None
    skip_bad: bool
    needs_evidence: bool
    constructed: ConstructedSize

    def all_records(self, counts: RecordCounts) -> Iterator[PlacedRecord]:
        """Yield every record of the source; count the unknown fields of its files."""
        source_format = self.source_format
        records: Iterable[Iterator[PlacedRecord]]
        if self.files:
            records = (
                read_file(file, source_format.array_key, partial(self._check_file_field, file, counts))
                for file in self.files
            )
        else:
            records = [read_hub(self.path, self.split, self.name, self.revision)]
        return source_format.expand(chain.from_iterable(records))

    def _check_file_field(self, file: Path, counts: RecordCounts, name: str, value: Any) -> None:
        """Count a field beside the records of a file if it is unknown.

        Raises:
            UserError: the field is refused.
        """
        table = self.source_format.file_fields
        assert table
        try:
            counts.count_unknown(table.unknown_fields({name: value}))
        except RecordError as error:
            raise UserError(f"source {file}: {error}") from error

    def selected_records(self, counts: RecordCounts) -> Iterator[PlacedRecord]:
        """Yield the records from `skip_samples` on, at most `max_samples` of them."""
        if self.format == CONSTRUCTED:
            return islice(read_constructed(self.path, self.constructed, self.skip_samples), self.max_samples)
        stop = None if self.max_samples is None else self.skip_samples + self.max_samples
        return islice(self.all_records(counts), self.skip_samples, stop)

    def questions(self, records: Iterator[PlacedRecord], counts: RecordCounts) -> Iterator[Question]:
        """Parse records into questions. A question without an id gets the default id."""
        parse_question = self.source_format.parse_question
        assert parse_question

        def parse(record: Any) -> Question:
            question = parse_question(record)
            is_searched = self.corpus is not None and not question.documents
            if self.needs_evidence and question.missing_evidence and not is_searched:
                raise RecordDropped(question.missing_evidence)
            return question

        for question in self._parse_records(records, parse, counts):
            yield question if question.id else replace(question, id=self._default_id(counts))

    def samples(self, counts: RecordCounts) -> Iterator[Sample]:
        """Parse the selected records of a chat or sample format into samples."""
        source_format = self.source_format
        parse_samples, unsupported = source_format.parse_samples, source_format.unsupported
        assert parse_samples

        def parse(record: Any) -> tuple[Sample, ...]:
            samples = tuple(parse_samples(record, self._default_id(counts)))
            if unsupported and self.needs_evidence and (reason := unsupported(record)):
                raise RecordDropped(reason)
            return samples

        for samples in self._parse_records(self.selected_records(counts), parse, counts):
            counts.samples += len(samples)
            yield from samples

    def _default_id(self, counts: RecordCounts) -> str:
        """Return an id for the record that was read last; it does not depend on the folder of the file."""
        return f"{without_compression_suffix(Path(self.path)).stem}-{self.skip_samples + counts.read}"

    def _parse_records(
        self, records: Iterable[PlacedRecord], parse: Callable[[Any], T], counts: RecordCounts
    ) -> Iterator[T]:
        """Yield the parsed records; count unknown fields, and records that are dropped or bad.

        Raises:
            UserError: a record is bad and `skip_bad` is False. If the record looks like one of another
                format, or `columns` would read it, the message says so. No record has the field of a column.
        """
        absent: set[tuple[str, str]] | None = None
        last_record: Any = None
        for place, record in records:
            counts.read += 1
            try:
                if isinstance(record, RecordError):
                    raise record
                if self.columns and absent != set():
                    missing = self._absent_paths(record)
                    absent, last_record = missing if absent is None else absent & missing, record
                unknown = self._unknown_fields(record)
                result = _within_depth(parse, record)
            except RecordDropped as reason:
                counts.drop(str(reason), partial(_describe_record, place, record))
                counts.count_unknown(unknown)
            except RecordError as error:
                if not self.skip_bad:
                    hint = _format_hint(record, self.format, self.columns, is_first=counts.read == 1)
                    raise UserError(f"{place}: {error}{hint} {SKIP_REMEDY}") from error
                message = f"{place}: {error}"
                counts.list_bad(message)
                counts.drop("bad record", partial(str, message))
            else:
                counts.count_unknown(unknown)
                yield result
        if absent:
            raise UserError(_absent_column_message(self.path, counts.read, min(absent), last_record))

    def _absent_paths(self, record: Any) -> set[tuple[str, str]]:
        """Return the columns and paths of which a record has nothing. A corpus may have titles and texts."""
        assert self.columns
        in_corpus = ("title", "text") if self.corpus else ()
        return {absent for absent in absent_paths(self.columns, record) if absent[0] not in in_corpus}

    def _unknown_fields(self, record: Any) -> set[str]:
        """Return the fields of a record that its format does not know.

        Raises:
            RecordError: the record has a field that is refused.
        """
        if self.columns:
            return unread_fields(self.columns, record)
        table = self.source_format.fields
        if isinstance(record, squad.ArticleQuestion):
            return table.unknown_fields(record.record, path=record.path) | record.unknown_fields
        return table.unknown_fields(record)


def _within_depth(parse: Callable[[Any], T], record: Any) -> T:
    """Parse a record.

    Raises:
        RecordError: the parser raises it, or lists and objects of the record are too deep inside each other.
    """
    try:
        return parse(record)
    except RecursionError as error:
        raise RecordError(decoding_problem(error)) from error


def _describe_record(place: str, record: Any) -> str:
    """Return the place of a record and the start of its texts and numbers."""
    record = record.record if isinstance(record, squad.ArticleQuestion) else record
    values = record.items() if isinstance(record, Mapping) else ()
    fields = [f"{name}: {str(value)[:80]}" for name, value in values if isinstance(value, str | int | float)]
    return f"{place}: {', '.join(fields)}" if fields else place


def _columns_missing_message(path: str, split: str | None, name: str | None, corpus: str | None) -> str:
    """Return the message about a source of the format `columns` without a mapping; it suggests one."""
    files = find_source_files("columns", path)
    records = chain.from_iterable(map(read_file, files)) if files else read_hub(path, split, name)
    first = next((r for _, r in records if isinstance(r, Mapping) and not is_header(r)), {})
    suggestion = suggest_columns(first, has_corpus=corpus is not None)
    example = (
        "columns: {question: FIELD, documents: FIELD, answers: FIELD} or {prompt: FIELD, completion: FIELD}"
    )
    remedy = f"add columns: {suggestion}" if suggestion else f"name its fields in {example}"
    own = [name for name in SOURCE_FORMATS if _is_read_by(name, first)]
    others = f"set format to {own[0]}, which reads such records, or " if own else ""
    return f"source {path} has the format columns and no columns{describe_fields(first)}: {others}{remedy}"


def _is_read_by(format: str, record: Mapping[str, Any]) -> bool:
    """Return whether a record has the fields of a format, and its parser reads it."""
    if not _count_recognized(record, format):
        return False
    found = SOURCE_FORMATS[format]
    for _, part in found.expand(iter([("", record)])):
        try:
            if isinstance(part, RecordError):
                return False
            if found.parse_question:
                found.parse_question(part)
            if found.parse_samples:
                list(found.parse_samples(part, "id"))
        except (RecordError, RecordDropped, RecursionError):
            return False
    return True


def _absent_column_message(path: str, num_read: int, absent: tuple[str, str], record: Any) -> str:
    """Return the message about a column whose field none of the records has."""
    column, name = absent
    close = " or ".join(similar_paths(name, record))
    return (
        f"source {path}: columns.{column} is {name!r}, a field that none of its {num_read:,} records has"
        f"{f' (did you mean {close}?)' if close else describe_fields(record)}: correct the name or remove it"
    )


def _format_hint(record: Any, format: str, columns: Columns | None, *, is_first: bool) -> str:
    """Return the part of an error message that says which format or columns a bad record may have."""
    where = "--format, sources[].format"
    if isinstance(record, squad.ArticleQuestion) and record.path:
        return ""  # a question inside an article of SQuAD
    record = record.record if isinstance(record, RecordError | squad.ArticleQuestion) else record
    if isinstance(record, Mapping) and columns:
        suggestion = suggest_columns(record) if is_first or absent_paths(columns, record) else ""
        loses_documents = columns.documents and "documents: " not in suggestion
        fits = f"; this would fit: columns: {suggestion}" if suggestion and not loses_documents else ""
        return f"{describe_fields(record)}{fits}"
    if isinstance(record, Mapping):
        if _count_recognized(record, format):
            return ""
        scores = {name: _count_recognized(record, name) for name in SOURCE_FORMATS}
        best = max(scores, key=scores.__getitem__)
        if scores[best]:
            return f"; it looks like the format {best} ({where})"
        if is_first and is_header(record):
            return f"; it is the header of a file of MRQA: format: columns, columns: {mrqa_columns()}"
        if suggestion := suggest_columns(record):
            fields_of_record = describe_fields(record)
            return f"{fields_of_record}; this would fit: format: columns, columns: {suggestion}"
    return f"; is it in the format {format} ({where})?" if is_first else ""


def _count_recognized(record: Mapping[str, Any], format: str) -> int:
    """Return the size of the largest group of `recognized_by` that the record has; 0 if it has none."""
    groups = map(str.split, SOURCE_FORMATS[format].recognized_by)
    return max((len(group) for group in groups if record.keys() >= {*group}), default=0)


def _add_documents(
    reader: _SourceReader,
    prompt: RagPrompt,
    counts: RecordCounts,
    retriever: str,
    dense_model: str,
    max_questions_per_context: int | None,
) -> Iterator[Question]:
    """Yield the questions of a source with their documents, distractors included."""
    distractors_from = reader.source_format.distractors_from
    questions = reader.questions(reader.selected_records(counts), counts)
    indexer = _build_indexer(retriever, dense_model)
    if prompt.shared_context and distractors_from == "article":
        yield from squad.group_by_context(questions, prompt, counts.drop, indexer, max_questions_per_context)
    elif indexer:
        if distractors_from == "source":
            pool = _read_pool(reader, counts)
            questions = (replace(question, pool=pool) for question in questions)
        has_corpus = reader.corpus is not None
        questions = retrieve(questions, indexer, prompt.num_documents or 0, has_corpus=has_corpus)
        yield from _with_evidence(questions, counts) if reader.needs_evidence else questions
    elif distractors_from == "article":
        yield from map(squad.add_distractors, questions)
    else:
        yield from questions


def _with_evidence(questions: Iterator[Question], counts: RecordCounts) -> Iterator[Question]:
    """Yield the questions whose retrieved documents may support the answer; count the others."""
    for question in questions:
        if question.missing_evidence:
            counts.drop(question.missing_evidence, partial(str, f"{question.id}: {question.question}"))
        else:
            yield question


def _read_pool(reader: _SourceReader, counts: RecordCounts) -> DocumentPool:
    """Return the documents of the corpus and of all questions of a source.

    The records of the questions are counted elsewhere. A bad record of the corpus is listed in `counts`.
    """
    again = RecordCounts()
    has_documents = reader.columns is None or reader.columns.documents
    questions = reader.questions(reader.all_records(again), again) if has_documents else iter(())
    documents = (document for question in questions for document in question.documents)
    if reader.corpus is None:
        return DocumentPool(documents)
    assert reader.columns
    on_bad = counts.list_bad if reader.skip_bad else None
    return DocumentPool(chain(read_corpus(reader.corpus, reader.columns, on_bad), documents))


def _build_indexer(retriever: str, dense_model: str) -> Indexer | None:
    match retriever:
        case "none":
            return None
        case "bm25":
            return bm25_indexer()
        case "dense":
            return dense_indexer(dense_model)
    raise AssertionError(retriever)


def _check_retrieval(reader: _SourceReader, num_documents: int | None) -> None:
    """Check that documents can be retrieved for a source.

    Raises:
        UserError: the format has no documents, or the number of documents is not set.
    """
    format, path = reader.format, reader.path
    if reader.columns and not reader.columns.is_question:
        raise UserError(f"source {path} has a retriever, but its columns have no question: remove it")
    if not reader.source_format.parse_question:
        allowed = ", ".join(name for name, other in SOURCE_FORMATS.items() if other.parse_question)
        raise UserError(
            f"source {path} has a retriever, but the format {format} holds no documents (allowed: {allowed})"
        )
    if reader.source_format.distractors_from != "record" and num_documents is None:
        raise UserError(
            f"source {path} has a retriever, which needs the number of documents: set data.num_documents"
        )


def _build_samples(
    questions: Iterator[Question], prompt: RagPrompt, counts: RecordCounts
) -> Iterator[Sample]:
    for question in questions:
        messages, meta = prompt.build(question.question, question.documents, question.id)
        meta |= question.meta
        if question.has_position:
            meta["level"] = _describe_position(meta)
        counts.samples += 1
        yield Sample(
            id=question.id,
            source=question.source,
            messages=messages,
            # a question without an answer gets one from a teacher
            response=question.response or next(iter(question.answers), ""),
            answers=question.answers,
            meta=meta,
        )


def _describe_position(meta: Mapping[str, Any]) -> str:
    """Return in which third of the documents the supporting ones stand, by the mean of their places."""
    places = [meta["documents"].index(block) for block in meta["supporting"]]
    third = int(3 * sum(places) / (len(places) * len(meta["documents"])))
    return f"evidence in the {('first', 'middle', 'last')[third]} third"
