"""`blockft prepare`: read the sources, build samples and examples, and write the prepared folder."""

import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from blockft.config.settings import DataSettings, Recipe, Source
from blockft.data.advice import drop_remedy, num_documents_setting
from blockft.data.encode_part import read_hashes, shards_with_examples
from blockft.data.part_cache import link_or_copy, remove_empty_parts, remove_other_parts, remove_part
from blockft.data.prepared import Examples, find_foreign_file, finish_folder, shard_files
from blockft.data.statistics import ExampleStatistics, SourceStatistics
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.digest import FileDigest, list_files
from blockft.errors import UserError, check_type, warn
from blockft.folder_lock import lock_folder
from blockft.inputs import check_folder
from blockft.model.load import load_tokenizer
from blockft.outputs import LockedFolder, atomic_folder, check_absent, write_errors
from blockft.stages.leak_check import LeakCheck
from blockft.stages.manifest import build_manifest
from blockft.stages.mixture_settings import describe_mixture, mixture_of
from blockft.stages.output_folder import check_output_place, lock_output, source_inputs
from blockft.stages.source_kind import holds_questions
from blockft.stages.source_parts import SourceParts
from blockft.stages.source_settings import (
    check_copies,
    check_wording,
    settings_without_effect,
    warn_of_unknown_fields,
)
from blockft.stages.teacher_answers import ask_teacher
from blockft.stages.teacher_settings import check_teacher


def prepare(recipe: Recipe, *, overwrite: bool = False) -> Path:
    """Read `data.sources`, tokenize them and write the prepared folder `data.output_dir`.

    The folder appears only when it is complete. What was read and encoded before an interruption, or by an
    earlier run, is taken from the part cache `data.cache_dir`. The time of the run is appended to the file
    FOLDER.log beside the folder. A source without a single kept sample gives a warning, and so does a source
    that has samples of `eval.sources`.

    overwrite: replace a prepared folder that exists.

    Returns:
        The path of the prepared folder; `load_prepared` reads it.

    Raises:
        UserError: the folder exists, or another process reads or writes it; a source or the tokenizer cannot
            be read; a record is bad and `data.on_bad_record` is error; no example is left.
    """
    check_type(recipe, Recipe, "recipe", "load_recipe reads one from a YAML file")
    run = {"train.output_dir": recipe.train.output_dir}
    output_dir = Path(recipe.data.output_dir)
    with lock_output(output_dir, "blockft prepare", _inputs(recipe), other_outputs=run) as out:
        return _prepare(recipe, out, overwrite)


def _prepare(recipe: Recipe, out: LockedFolder, overwrite: bool) -> Path:
    start, data = time.monotonic(), recipe.data
    _check_output(out.name, overwrite)
    check_wording(data.prompt)
    check_copies(data)
    check_teacher(data)
    for warning in settings_without_effect(data):
        warn(warning)
    # workers are forked, which the threads of the tokenizer would not survive
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    inputs = _inputs(recipe)
    tokenizer = load_tokenizer(recipe.model.path, recipe.model.revision, recipe.model.chat_template)
    with _open_cache(recipe, out, inputs) as cache:
        parts = SourceParts(data, cache, tokenizer)
        responses = ask_teacher(recipe, parts.read)
        parts.encode(responses)
        # errors of the training data come before remarks on the evaluation data
        leak_check = _check_leaks(recipe, parts)
        counts, statistics = _merge_statistics(parts)
        if not statistics.num_examples:
            raise UserError(f"no example to train on: {_nothing_kept_message(data, data.sources, counts)}")
        with atomic_folder(out) as folder:
            num_shards, files = _link_shards(folder, parts, len(data.sources))
            manifest = build_manifest(recipe, tokenizer_fingerprint(tokenizer), counts, statistics)
            manifest |= leak_check.to_record()
            examples = Examples(folder, num_shards)
            counts_by_source = describe_mixture(mixture_of(data), examples.columns)
            for index, entry in enumerate(manifest["sources"]):
                entry |= {"shards": num_shards[index], **counts_by_source[index], **responses.describe(index)}
            finish_folder(folder, manifest, files)
            _check_output(out.name, overwrite)  # files may have appeared in a folder that was empty
        for name in parts.unusable:
            remove_part(cache / name)
        if data.cache_dir is None:
            remove_other_parts(cache, parts.used)
    for source, count in zip(data.sources, counts, strict=True):
        warn_of_unknown_fields(source, count)
        if not count.kept:
            warn(_nothing_kept_message(data, [source], [count]))
    leak_check.warn()
    counts_of_run = {
        "num_workers": data.num_workers,
        "teacher_questions_asked": responses.num_asked,
        # what was not taken from the cache
        "shards_read": parts.num_shards_read,
        "shards_encoded": parts.num_shards_encoded,
    }
    _append_to_log(out.name, time.monotonic() - start, counts_of_run)
    return out.name


def _inputs(recipe: Recipe) -> dict[str, str]:
    """Return the paths that are read, by the setting that names them."""
    inputs = {"model.path": recipe.model.path, **source_inputs("data.sources", recipe.data.sources)}
    if (teacher := recipe.data.teacher) and teacher.base_url is None:
        inputs["data.teacher.model"] = teacher.model
    return inputs


def _check_output(out: Path, overwrite: bool) -> None:
    """Check that a prepared folder may be written to `out`, which loses no file that others wrote.

    Raises:
        UserError: `out` holds a file that `prepare` does not write, or any file if not `overwrite`.
    """
    if not os.path.lexists(out):
        return
    foreign = find_foreign_file(out) if out.is_dir() else None
    if foreign or not out.is_dir():
        found = f" (it holds {foreign})" if foreign else ""
        raise UserError(
            f"{out} exists and is not a prepared folder{found}: set data.output_dir to another folder"
        )
    if list_files(out) and not overwrite:
        check_absent(out, "set data.output_dir to another folder, or add --overwrite")


def _check_leaks(recipe: Recipe, parts: SourceParts) -> LeakCheck:
    """Compare all samples that were read with those of the evaluation."""
    leak_check = LeakCheck(recipe)
    for index, number in parts.copies:
        part = parts.encode_part((index, number))
        for shard in range(len(part.shards)):
            ids, hashes = read_hashes(part, shard)
            leak_check.add(index, hashes, ids.__getitem__, is_copy=number > 0)
    return leak_check


def _link_shards(
    folder: Path, parts: SourceParts, num_sources: int
) -> tuple[list[int], dict[str, FileDigest]]:
    """Link the shards of all parts into a prepared folder.

    Returns:
        The number of shards of each source, and the digests of all files.
    """
    num_shards = [0] * num_sources
    files: dict[str, FileDigest] = {}
    for index, number in parts.copies:
        part = parts.encode_part((index, number))
        for shard in shards_with_examples(part):
            names = zip(shard_files(shard), shard_files(sum(num_shards)), strict=True)
            for source, target in names:
                (folder / target).parent.mkdir(exist_ok=True)
                link_or_copy(part.folder / source, folder / target)
                files[target] = part.shards[shard].files[source]
            num_shards[index] += 1
    return num_shards, files


@contextmanager
def _open_cache(recipe: Recipe, out: LockedFolder, inputs: Mapping[str, str]) -> Iterator[Path]:
    """Lock the part cache; at the end remove what is of no use any more.

    Raises:
        UserError: the cache is at a place that is not allowed, another process uses it, or it cannot be
            written.
    """
    name = recipe.data.cache_dir
    path = Path(name) if name else out.path.with_name(f"{out.path.name}.cache")
    check_folder(path, "data.cache_dir")
    outputs: dict[str, str | Path] = {
        "data.output_dir": out.path,
        "train.output_dir": recipe.train.output_dir,
    }
    check_output_place(path, inputs, outputs)
    with lock_folder(path, "blockft prepare") as lock:
        remedy = "free some space, then run the same command again, which continues"
        try:
            with write_errors(lock.folder, name=path, remedy=lambda: remedy):
                yield lock.folder
        except BaseException:
            remove_empty_parts(lock.folder)
            if not name:
                with suppress(OSError):  # it holds parts
                    lock.folder.rmdir()
            raise


def _merge_statistics(parts: SourceParts) -> tuple[list[SourceStatistics], ExampleStatistics]:
    """Return the counts of each source, and what the examples of all of them look like."""
    counts: dict[int, SourceStatistics] = defaultdict(SourceStatistics)
    statistics = ExampleStatistics()
    for copy in parts.copies:
        of_copy, examples = parts.statistics(copy)
        counts[copy[0]].merge(of_copy)
        statistics.merge(examples)
    return [counts[index] for index in sorted(counts)], statistics


def _nothing_kept_message(
    data: DataSettings, sources: Sequence[Source], counts: Sequence[SourceStatistics]
) -> str:
    """Return why none of the sources has a kept sample, with the remedy if all of them are too long."""
    paths = " and ".join(source.path for source in sources)
    dropped = sum((count.dropped for count in counts), Counter[str]())
    if not dropped:
        return f"{paths} holds no samples" if len(sources) == 1 else f"{paths} hold no samples"
    reasons = ", ".join(f"{reason}: {number:,}" for reason, number in dropped.items())
    lengths = [count.shortest_dropped for count in counts if count.shortest_dropped]
    if not lengths:
        remedy = drop_remedy(max(dropped, key=dropped.__getitem__))
        return f"every sample of {paths} was dropped ({reasons}): {remedy}"
    settings = dict.fromkeys(
        num_documents_setting(data.sources.index(source), source.format.value)
        for source in sources
        if holds_questions(source)
    )
    fewer_documents = f", or lower {' and '.join(settings)}" if settings else ""
    return (
        f"every sample of {paths} was dropped ({reasons}; the shortest has {min(lengths):,} tokens): raise "
        f"data.row_len, which is {data.row_len:,}{fewer_documents}"
    )


def _append_to_log(out: Path, seconds: float, counts: Mapping[str, int]) -> None:
    """Append values that differ between equal runs to a log outside the folder, whose bytes are compared."""
    entry = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "folder": str(out.absolute()),
        "seconds": round(seconds, 1),
        **counts,
    }
    file = out.with_name(f"{out.name}.log")
    try:
        with file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
    except OSError as error:
        warn(f"the prepared folder is complete, but {file} cannot be written: {error.strerror}")
