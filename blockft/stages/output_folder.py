"""Where a command may write its folder, and the lock that keeps other writers away."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from blockft.config.choices import Format
from blockft.config.settings import Source
from blockft.data.prepared import MANIFEST, shard_files
from blockft.errors import UserError
from blockft.inference.cache_folder import FORMAT, LOCK
from blockft.model.checkpoint import MARKER
from blockft.outputs import LockedFolder, lock_output_folder
from blockft.run_folder import METRICS, RECIPE

_KINDS = {
    "the checkpoint": (MARKER,),
    "the run": (RECIPE, METRICS),
    "the prepared folder": (MANIFEST, *shard_files(0)),
    "the block cache": (FORMAT, LOCK),
}
"""Folders that blockft writes, and the files by which they are known."""


def source_inputs(setting: str, sources: Sequence[Source]) -> dict[str, str]:
    """Return the paths that sources read, by the setting that names them.

    setting: the setting that lists the sources.
    """
    paths = {}
    for index, source in enumerate(sources):
        if source.format is not Format.constructed:
            paths[f"{setting}.{index}.path"] = source.path
        if source.corpus is not None:
            paths[f"{setting}.{index}.corpus"] = source.corpus
    return paths


@contextmanager
def lock_output(
    out: Path,
    action: str,
    inputs: Mapping[str, str | Path] | None = None,
    *,
    other_outputs: Mapping[str, str | Path] | None = None,
) -> Iterator[LockedFolder]:
    """Check the place of an output folder and hold its lock as the only writer.

    inputs: files, folders and globs that are read, by the setting that names them. The output must neither be
        nor contain one of them.
    other_outputs: folders that another command writes, which must not lie inside the output nor around it.

    Raises:
        UserError: the output is at a place that is not allowed, another process uses it, or it cannot be
            written.
    """
    check_output_place(out, inputs or {}, other_outputs or {})
    with lock_output_folder(out, action) as locked:
        yield locked


def check_output_place(
    out: Path, inputs: Mapping[str, str | Path], other_outputs: Mapping[str, str | Path]
) -> None:
    """Check that writing a folder harms no other one.

    Raises:
        UserError: the folder is or contains an input, touches another output, or lies inside a run, a
            checkpoint, a prepared folder or a block cache.
    """
    try:
        target = Path(os.path.realpath(out))
        for name, path in (*inputs.items(), *other_outputs.items()):
            # a glob is a path that does not exist
            matches = [str(path)] if os.path.exists(path) else [*glob.iglob(str(path), recursive=True)]
            for match in matches or [str(path)]:
                source = Path(os.path.realpath(match))
                if source == target or target in source.parents:
                    verb = "is" if source == target else "contains"
                    raise UserError(f"{out} {verb} {name} ({path}): choose another folder to write")
                if name in other_outputs and source in target.parents:
                    raise UserError(f"{out} lies inside {name} ({path}): choose another folder to write")
        for folder in target.parents:
            for kind, files in _KINDS.items():
                if all((folder / file).exists() for file in files):
                    raise UserError(f"{out} lies inside {kind} {folder}: choose a folder outside of it")
    except (OSError, ValueError) as error:
        raise UserError(f"{out} cannot be written: {error}") from error
