"""Resume with another number of processes, through a temporary universal checkpoint."""

import shutil
from pathlib import Path

from blockft.training.library_internals import convert_shards_to_universal, read_tag

UNIVERSAL = ".universal"
"""Folder of a run that holds the universal checkpoint while the run is being resumed."""


def convert_to_universal(checkpoint: Path) -> Path:
    """Write a copy of the checkpoint with universal shards into the run's folder and return its path.

    Other files are links. The copy needs as much disk space as the checkpoint; `remove_universal` deletes it
    after the run has been loaded.
    """
    universal = checkpoint.parent / UNIVERSAL
    remove_universal(checkpoint.parent)
    universal.mkdir()
    tag = read_tag(checkpoint)
    for path in checkpoint.iterdir():
        if path.name not in (tag, "latest"):
            (universal / path.name).symlink_to(path.resolve())
    convert_shards_to_universal(checkpoint, universal)
    return universal


def remove_universal(run: Path) -> None:
    """Delete the universal checkpoint of a run, also one that an interrupted process left."""
    shutil.rmtree(run / UNIVERSAL, ignore_errors=True)
