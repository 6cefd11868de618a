"""What `blockft serve` tells the processes of a server about its model and its cache, in one private file."""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from blockft.attention.rope import RotaryEmbedding
from blockft.errors import UserError
from blockft.inference.block_key import KVShape
from blockft.inference.cache_entry import CacheModel
from blockft.inference.disk_tier import DiskTier

FileVersion = tuple[str, int, int]
"""The name of a file, its size in bytes, and the time of its last change in nanoseconds."""


def list_files(folder: str) -> tuple[FileVersion, ...]:
    """Return the files of a model's folder. There are none if the model is on the Hub."""
    found = []
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else ():
        with suppress(FileNotFoundError):  # it was removed meanwhile, or is a link that leads nowhere
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that vLLM serves with the block cache of a folder.

    Attributes:
        path: the model's folder.
        files: its files when its fingerprint was computed; see `list_files`.
        name: the model's name in the cache folder.
        fingerprint: the fingerprint of blocks that blockft computed.
        shape: the shape of the keys and values of a token.
        frequencies: the different rotary embeddings: radians per position, (R / 2,) each.
        layer_frequencies: the index in `frequencies` for each layer.
        local_sees_first: whether local blocks see the first block of their prompt.
        vocab_size: the number of token ids for which the model has an embedding.
        folder: the cache folder.
        disk_bytes: largest size of the folder; None sets no limit.
        host_bytes: size of the host tier.
        device_bytes: size of the device tier, beside vLLM's pages; 0 for none.
        page_writer: what writes blocks into pages; auto, torch or triton.
        secret: known to the processes of the server only. It marks the requests of the front end.
        socket_folder: a private folder for sockets.
    """

    path: str
    files: tuple[FileVersion, ...]
    name: str
    fingerprint: str
    shape: KVShape
    frequencies: tuple[tuple[float, ...], ...]
    layer_frequencies: tuple[int, ...]
    local_sees_first: bool
    vocab_size: int
    folder: str
    disk_bytes: int | None
    host_bytes: int
    device_bytes: int
    page_writer: str
    secret: str
    socket_folder: str

    @property
    def computed_by_blockft(self) -> CacheModel:
        """The entries that `blockft cache build` and engines of blockft wrote."""
        return CacheModel(fingerprint=self.fingerprint, name=self.name, **asdict(self.shape))

    @property
    def computed_by_vllm(self) -> CacheModel:
        """The entries that vLLM computed: they differ in rounding and have a fingerprint of their own."""
        fingerprint = hashlib.sha256(f"vLLM {self.fingerprint}".encode()).hexdigest()
        return CacheModel(fingerprint=fingerprint, name=f"{self.name} (vLLM)", **asdict(self.shape))

    @cached_property
    def rotaries(self) -> tuple[RotaryEmbedding, ...]:
        """The rotary embedding of each layer."""
        kinds = [RotaryEmbedding(torch.tensor(f, dtype=torch.float64)) for f in self.frequencies]
        return tuple(kinds[index] for index in self.layer_frequencies)

    def check_files(self) -> None:
        """Check that the model's files are those of its fingerprint. Call it after they were read.

        Raises:
            UserError: a file has changed since.
        """
        if changed := sorted({name for name, *_ in {*self.files} ^ {*list_files(self.path)}}):
            raise UserError(
                f"{Path(self.path) / changed[0]} has changed while the server started: start it again, "
                "when the model is complete"
            )

    def open_disk_tiers(self) -> tuple[DiskTier, DiskTier]:
        """Return the entries that blockft computed, and those that vLLM computed.

        Raises:
            UserError: see `DiskTier`.
        """
        folder = Path(self.folder)
        return (
            DiskTier(folder, self.computed_by_blockft, self.disk_bytes),
            DiskTier(folder, self.computed_by_vllm, self.disk_bytes),
        )

    def save(self, path: Path) -> None:
        """Write a new file that only its owner may read, because it holds the secret."""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def load(cls, path: Path) -> "ServedModel":
        """Read the file that `save` wrote."""
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields["files"] = tuple(map(tuple, fields["files"]))
        fields["shape"] = KVShape(**fields["shape"])
        fields["frequencies"] = tuple(map(tuple, fields["frequencies"]))
        fields["layer_frequencies"] = tuple(fields["layer_frequencies"])
        return cls(**fields)
