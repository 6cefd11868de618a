"""What decides the content of the parts of `prepare`: options of sources, from which the keys are made."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from transformers import PreTrainedTokenizerBase

from blockft.config.choices import BadRecordPolicy, Format, Retriever, TooLongPolicy, UnsplitPolicy
from blockft.config.settings import DataSettings, Source
from blockft.data.constructed import VERSION as CONSTRUCTED_VERSION
from blockft.data.corpus import find_corpus_files
from blockft.data.encode_part import EncodeOptions
from blockft.data.sources import find_source_files
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.digest import DamagedFile, digest_files, list_files
from blockft.errors import UserError
from blockft.hub_access import http_library
from blockft.stages.source_kind import holds_questions, is_split
from blockft.stages.source_settings import sees_first_block
from blockft.version import __version__

READ_VERSION = 1
"""Version of the code that reads sources: a change of what it reads needs another number."""

ENCODE_VERSION = 2
"""Version of the code that encodes samples: a change of its results needs another number."""

_NOT_READING = (
    "output_dir cache_dir sources row_len modes positions local_sees_first num_copies too_long num_workers "
    "splitting teacher mixture dense_model"
)
"""Settings of `data` that do not decide which samples are read. All others do, also those to come."""

_OF_QUESTIONS = "prompt num_documents order max_questions_per_context"
"""Settings of `data` that only formats of questions read."""

_NOT_OF_SAMPLES = "weight response"
"""Settings of a source that do not decide which samples are read."""


class SourceContent:
    """What a source holds: the digests of its files, or the revision of its dataset on the Hub.

    The files of its corpus belong to it.

    `revision` is the commit of the dataset. If it is unknown, `nonce` takes its place, which is another one
    every time, so that no earlier part is used.

    Raises:
        UserError: the source does not exist or cannot be read.
    """

    def __init__(self, source: Source) -> None:
        self._name = source.path
        self.nonce = secrets.token_hex(16)
        self._files = find_source_files(source.format, source.path)
        self._corpus = find_corpus_files(source.corpus) if source.corpus is not None else []
        self._states = self._file_states()
        self.revision: str | None = None
        self.record: Any
        if source.format is Format.constructed:
            self.record, self.is_known = f"constructed, version {CONSTRUCTED_VERSION}", True
            return
        if self._files:
            self.record = _digest_paths(self._files, f"source {source.path}")
            self.is_known = True
        else:
            self.revision = _find_revision("dataset", source.path)
            self.is_known = self.revision is not None
            self.record = self.revision or self.nonce
        if self._corpus:
            self.record = [self.record, _digest_paths(self._corpus, f"corpus {source.corpus}")]

    @property
    def num_bytes(self) -> int:
        """The size of the files."""
        return sum(size for size, *_ in self._states[: len(self._files)])

    def num_bytes_read(self) -> int:
        """Return how much of the files this process has read, by the positions of its open files.

        Linux alone tells the positions; elsewhere the result is 0. Parquet files are not read from start to
        end, and count when they are closed.
        """
        if sys.platform != "linux":
            return 0
        positions = {file.path: file.position for file in psutil.Process().open_files()}
        paths = [os.path.realpath(file) for file in self._files]
        opened = next((i for i, path in enumerate(paths) if path in positions), None)
        if opened is None:
            return 0
        return sum(size for size, *_ in self._states[:opened]) + min(
            positions[paths[opened]], self._states[opened][0]
        )

    def check_unchanged(self) -> None:
        """Check that the files are those whose digests were computed.

        Raises:
            UserError: a file changed.
        """
        if self._file_states() != self._states:
            raise UserError(f"source {self._name} changed while it was read: run the command again")

    def _file_states(self) -> list[tuple[int, int, int]]:
        try:
            statuses = [file.stat() for file in (*self._files, *self._corpus)]
        except OSError as error:
            raise UserError(f"source {self._name} cannot be read: {error.strerror}") from error
        return [(status.st_size, status.st_mtime_ns, status.st_ino) for status in statuses]


def read_options(
    source: Source, data: DataSettings, content: SourceContent, dense_model: Any, number: int
) -> dict[str, Any]:
    """Return everything that decides which samples a copy of a source gives.

    dense_model: see `identify_model`.
    number: the number of the copy.
    """
    excluded = {*_NOT_READING.split()} | (set() if holds_questions(source) else {*_OF_QUESTIONS.split()})
    options = data.model_dump(mode="json", exclude=excluded) | {"seed": data.seed + number}
    if source.retriever is Retriever.dense:
        options["dense_model"] = dense_model
    return {
        "version": READ_VERSION,
        "versions": _versions("pyarrow", "bm25s"),
        "source": source.model_dump(mode="json", exclude={*_NOT_OF_SAMPLES.split()}),
        "content": content.record,
        "options": options,
    }


def encode_options(source: Source, data: DataSettings) -> EncodeOptions:
    """Return how the samples of a source are encoded."""
    splitting, splits = data.splitting, is_split(source)
    return EncodeOptions(
        row_len=data.row_len,
        local_sees_first=sees_first_block(data),
        trim=data.too_long is TooLongPolicy.trim,
        skip_bad=data.on_bad_record is BadRecordPolicy.skip,
        splitting=(splitting.max_blocks, splitting.min_block_tokens) if splits else None,
        drop_unsplit=splits and splitting.unsplit is UnsplitPolicy.drop,
        shared_context=data.shared_context,
        max_questions=data.max_questions_per_context,
        question_template=data.prompt.question,
    )


def encode_part_options(
    read_part: str, options: EncodeOptions, tokenizer: Mapping[str, Any], answers: str
) -> dict[str, Any]:
    """Return everything that decides the content of an encode part.

    read_part: the name of the read part.
    tokenizer: see `identify_tokenizer`.
    answers: the digest of the teacher's answers.
    """
    return {
        "version": ENCODE_VERSION,
        "versions": _versions("pyarrow", "tokenizers", "transformers", "jinja2"),
        "read": read_part,
        "options": vars(options),
        "tokenizer": tokenizer,
        "answers": answers,
    }


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return everything of a tokenizer that decides how samples are encoded."""
    return {
        "fingerprint": tokenizer_fingerprint(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "added_tokens": {str(id): repr(token) for id, token in tokenizer.added_tokens_decoder.items()},
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }


def identify_model(name: str) -> Any:
    """Return what identifies the content of a model of the Hub or a folder; None if it is unknown."""
    folder = Path(name)
    if folder.is_dir():
        return _digest_paths([folder / file for file in list_files(folder)], f"data.dense_model {name}")
    return _find_revision("model", name)


def _digest_paths(paths: Sequence[Path], name: str) -> list[list[str]]:
    """Return the paths of files with the digests of their contents.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        files = digest_files(Path(), [os.path.abspath(path) for path in paths])
    except DamagedFile as error:
        raise UserError(f"{name} cannot be read ({error})") from error
    return [[str(path), file.digest] for path, file in zip(paths, files.values(), strict=True)]


def _find_revision(kind: str, name: str) -> str | None:
    """Return the commit of a dataset or model on the Hub, or None if the Hub does not say."""
    from huggingface_hub import HfApi

    http = http_library()
    try:
        found = HfApi().repo_info(name, repo_type=kind, timeout=10)
    # ValueError, InvalidURL, ImportError: a name, an address or a proxy that the library cannot use
    except (http.HTTPError, http.InvalidURL, OSError, ValueError, ImportError):
        return None  # reading the source reports what is wrong
    return found.sha


def _versions(*packages: str) -> dict[str, str]:
    return {"blockft": __version__} | {name: version(name) for name in packages}
