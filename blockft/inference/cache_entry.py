"""The file of a cached block: safetensors, in which a reader checks every byte.

::

    length       8 bytes
    header       JSON, padded with blanks to a length that depends only on the model
    token_ids    (n,) int32
    layers.0     (n, 2, K, D): for each token the keys, then the values, of the first layer
    layers.1     ...

n tokens, K key/value heads, D head size. The header has a checksum per layer. The entry of a block that sees
the first block of its prompt names the entry of the first block. Model, token ids and this name determine the
rest of the header, so a reader knows every byte that it must find. Files are not mapped into memory, because
a mapped file that shrinks kills the process with a signal.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from blockft.inference.block_key import (
    ID_BYTES,
    BlockKey,
    KVShape,
    first_digest,
    key_digest,
    num_tokens,
    tokens_digest,
)

VERSION = 1
"""Version of the format of entries and of their folder. Other versions are never read."""

SUFFIX = ".safetensors"

REMOVED = (errno.ENOENT, errno.ESTALE)
"""Numbers of the errors of reading an entry that another process, or (ESTALE) another host, has removed."""

_PAGE = 4096
_DIGEST = re.compile("[0-9a-f]{32}")
_FIRST_BLOCK = "first block"
"""The entry of the header that names the first block which the block sees."""
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of the allowed types in safetensors."""


class DamagedEntry(Exception):
    """An entry cannot be used, and its block must be computed again."""


@dataclass(frozen=True, kw_only=True)
class CacheModel(KVShape):
    """The model that keys and values belong to, and their shape.

    fingerprint  hexadecimal digest of weights, adapter, dtype and tokenizer, which determine keys and values
    name         a path or a Hub id, for people
    dtype        float32, bfloat16 or float16
    """

    fingerprint: str
    name: str

    def __post_init__(self) -> None:
        assert self.fingerprint and set(self.fingerprint) <= set("0123456789abcdef"), self.fingerprint
        assert self.dtype in _DTYPES, self.dtype

    def entry_bytes(self, num_tokens: int) -> int:
        """Return the size of a block's file."""
        return _token_ids_offset(self) + num_tokens * (ID_BYTES + self.token_bytes)

    def num_tokens(self, entry_bytes: int) -> int:
        """Return the number of tokens of a block whose file has this size, or 0 if there is no such block."""
        length, rest = divmod(entry_bytes - _token_ids_offset(self), ID_BYTES + self.token_bytes)
        return length if length > 0 and not rest else 0


def write_entry(file: BinaryIO, model: CacheModel, key: BlockKey, kv: torch.Tensor) -> None:
    """Write a block's keys and values, (L, n, 2, K, D) on the CPU, into an empty unbuffered file.

    Raises:
        OSError: the file cannot be written.
    """
    assert kv.shape == (model.num_layers, *model.layer_shape(num_tokens(key))), tuple(kv.shape)
    assert kv.dtype == model.torch_dtype, kv.dtype
    layers = [_as_bytes(layer) for layer in kv.contiguous()]
    metadata = _expected_metadata(model, key_digest(key), first_digest(key))
    header = _header(model, metadata, num_tokens(key), [_checksum(layer) for layer in layers])
    for part in (memoryview(header), memoryview(key.tokens), *layers):
        while part:
            part = part[file.write(part) :]


class EntryReader:
    """An open entry, which stays readable if its file is replaced or removed. Threads may share it.

    After `close`, every read opens the file again, and raises FileNotFoundError if the file was replaced.

    tokens        the token ids of the block, as in its key
    num_tokens    the number of its tokens
    first_digest  the digest of the key of the first block that it sees; "" if it sees itself alone
    status        of the file when it was opened

    Raises:
        FileNotFoundError: there is no entry.
        DamagedEntry: the file is not what was written for this block and model.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, model: CacheModel) -> None:
        self.path, self.model = path, model
        self._file = path.open("rb", buffering=0)
        try:
            self.status = os.fstat(self._file.fileno())
            self._header = self._read_header(self._file.fileno())
            self.tokens, self.first_digest, self._checksums = self._verify_header(self._file.fileno())
        except BaseException:
            self.close()
            raise
        self.num_tokens = len(self.tokens) // ID_BYTES
        self._layers_offset = _token_ids_offset(model) + len(self.tokens)

    def __enter__(self) -> "EntryReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def touch(self) -> None:
        """Record that the entry is used now, by the clock of the file system."""
        with self._opened() as handle:
            os.utime(handle)

    def read_layer(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the verified keys and values of a layer, (n, 2, K, D), in `out` if it is given.

        Raises:
            DamagedEntry: they are not what was written. The content of `out` is then undefined.
            OSError: they cannot be read.
        """
        shape = self.model.layer_shape(self.num_tokens)
        if out is None:
            out = torch.empty(shape, dtype=self.model.torch_dtype)
        assert out.shape == shape and out.dtype == self.model.torch_dtype and out.is_contiguous()
        content = _as_bytes(out)
        with self._opened() as handle:
            self._read(handle, content, self._layers_offset + index * len(content))
        if _checksum(content) != self._checksums[index]:
            raise DamagedEntry(f"layer {index} has changed since it was written")
        return out

    def verify(self) -> None:
        """Read and verify every layer. Raises as `read_layer` does."""
        for index in range(self.model.num_layers):
            self.read_layer(index)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Yield the file's descriptor, after opening the file again if it is closed."""
        if not self._file.closed:
            yield self._file.fileno()
            return
        with self.path.open("rb", buffering=0) as file:
            # files with the same header have the same content
            if self._read_header(file.fileno()) != self._header:
                raise FileNotFoundError(errno.ENOENT, "it was replaced", str(self.path))
            yield file.fileno()

    def _read_header(self, handle: int) -> bytes:
        header = bytearray(_token_ids_offset(self.model))
        self._read(handle, memoryview(header), 0)
        return bytes(header)

    def _verify_header(self, handle: int) -> tuple[bytes, str, list[str]]:
        """Return the block's tokens, the digest of its first block, and the checksums of its layers."""
        size, name = self.status.st_size, self.path.name.removesuffix(SUFFIX)
        metadata = _metadata(self._header)
        first = metadata.get(_FIRST_BLOCK, "")
        if _FIRST_BLOCK in metadata and not (isinstance(first, str) and _DIGEST.fullmatch(first)):
            raise DamagedEntry(f"its {_FIRST_BLOCK} is {first!r}, expected is the name of an entry")
        expected_metadata = _expected_metadata(self.model, name, first)
        for field, expected in expected_metadata.items():
            if metadata.get(field) != expected:
                raise DamagedEntry(f"its {field} is {metadata.get(field)!r}, expected is {expected!r}")
        length = self.model.num_tokens(size)
        if not length:
            raise DamagedEntry(f"no block has a file of {size} bytes")
        tokens = bytearray(length * ID_BYTES)
        self._read(handle, memoryview(tokens), len(self._header))
        checksums = str(metadata.get("checksums")).split()
        if tokens_digest(bytes(tokens), first) != name:
            raise DamagedEntry("its token ids do not match its name")
        expected_header = _header(self.model, expected_metadata, length, checksums)
        if len(checksums) != self.model.num_layers or self._header != expected_header:
            raise DamagedEntry("its header does not match its content")
        return bytes(tokens), first, checksums

    def _read(self, handle: int, buffer: memoryview, offset: int) -> None:
        while buffer:
            num_read = os.preadv(handle, [buffer], offset)
            if not num_read:
                raise DamagedEntry("it is truncated")
            buffer, offset = buffer[num_read:], offset + num_read


def find_damage(path: Path, model: CacheModel) -> str | None:
    """Read and verify a whole entry. Return why it cannot be used, or None if it can or is not there."""
    try:
        with EntryReader(path, model) as entry:
            entry.verify()
    except DamagedEntry as error:
        return str(error)
    except OSError as error:
        if error.errno not in REMOVED:
            return f"it cannot be read ({error.strerror})"
    return None


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().view(torch.uint8).reshape(-1).numpy().data


def _expected_metadata(model: CacheModel, name: str, first: str) -> dict[str, str]:
    """Return what the header says about a block. `first` is the digest of its first block, or ""."""
    metadata = {"format": f"blockft block {VERSION}", "model": model.fingerprint, "block": name}
    return metadata | ({_FIRST_BLOCK: first} if first else {})


def _metadata(header: bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(header[8:])["__metadata__"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _checksum(content: bytes | memoryview) -> str:
    """Return the checksum of a layer: 32 hexadecimal digits.

    `xxh3_128_hexdigest` would keep other threads from running meanwhile, in xxhash before 4.0.
    """
    return xxhash.xxh3_128(content).hexdigest()


def _header(model: CacheModel, metadata: dict[str, str], num_tokens: int, checksums: Sequence[str]) -> bytes:
    """Return the bytes before the token ids: the header's length and the header."""
    text = _json(model, metadata, num_tokens, checksums)
    length = _token_ids_offset(model) - 8
    return length.to_bytes(8, "little") + text.encode().ljust(length)


def _json(model: CacheModel, metadata: dict[str, str], num_tokens: int, checksums: Sequence[str]) -> str:
    dtype, shape, layer_bytes = _DTYPES[model.dtype], model.layer_shape(num_tokens), model.layer_bytes
    start, end = 0, num_tokens * ID_BYTES
    header: dict[str, Any] = {
        "__metadata__": metadata | {"checksums": " ".join(checksums)},
        "token_ids": {"dtype": "I32", "shape": [num_tokens], "data_offsets": [start, end]},
    }
    for layer in range(model.num_layers):
        start, end = end, end + num_tokens * layer_bytes
        header[f"layers.{layer}"] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return json.dumps(header, separators=(",", ":"))


@lru_cache
def _token_ids_offset(model: CacheModel) -> int:
    """Return the offset of the token ids: after the longest possible header, at the start of a page."""
    digest = _checksum(b"")
    longest = _json(model, _expected_metadata(model, digest, digest), 2**31, [digest] * model.num_layers)
    return -(-(8 + len(longest)) // _PAGE) * _PAGE
