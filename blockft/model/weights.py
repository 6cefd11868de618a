"""Files of weights: find them and compare the names, shapes and types of their tensors with the model's.

transformers fills weights that a checkpoint lacks with random numbers, and passes over weights that the model
does not have. Here every difference is an error.
"""

import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from blockft.digest import DamagedFile, digest_files, digest_names
from blockft.errors import UserError, first_line
from blockft.file_content import check_content, load_json

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files that may hold or list a model's weights, in the order in which transformers looks for them."""

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors names them. Other numbers are quantised weights, or are no weights."""

_TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

_OLD_ROTARY_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Names of a buffer that old checkpoints hold; the model computes it from its configuration."""

_NUM_NAMED = 3
"""Number of names that an error lists."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its shape, its type as safetensors names it, and how to read its numbers."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "StoredTensor":
        """Describe a tensor in memory."""
        dtype = _TYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        return cls(tuple(tensor.shape), dtype, lambda: tensor)


def check_weights(path: str, revision: str | None, model: PreTrainedModel) -> dict[str, StoredTensor]:
    """Compare the weights of a model folder or Hub id with those of `model`, which may be on the meta device.

    Returns the stored tensors by the names of the model's weights.

    Raises:
        UserError: a file is missing or damaged; weights are missing, unexpected, of another shape or type;
            the model ties matrices that are stored with different numbers.
    """
    with error_prefix(f"model {path!r} cannot be opened: "):
        stored = read_tensors(find_weight_files(path, revision))
        stored = {key: tensor for key, tensor in stored.items() if not _OLD_ROTARY_BUFFER.fullmatch(key)}
        expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        if not any(key in expected for key in stored):
            # weights saved without the head of a language model
            prefix = f"{model.base_model_prefix}."
            stored = {prefix + key if prefix + key in expected else key: stored[key] for key in stored}
        _check_all(stored, expected, model.all_tied_weights_keys)
    return stored


def load_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model on the meta device its weights.

    Raises:
        UserError: weights are missing, unexpected or misshapen.
    """
    stored = {key: StoredTensor.of(tensor) for key, tensor in weights.items()}
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    _check_all(stored, expected, model.all_tied_weights_keys)
    # one name of a tied pair is enough
    model.load_state_dict(weights, assign=True, strict=not model.all_tied_weights_keys)
    model.tie_weights()


def _check_all(
    stored: dict[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], tied: Mapping[str, str]
) -> None:
    """Compare all weights of a model; `tied` maps names to other names of the same weights: one suffices."""
    for pair in tied.items():
        if len(found := [key for key in pair if key in stored]) == 1:
            stored |= dict.fromkeys(pair, stored[found[0]])
    check_tensors(stored, expected)
    for first, second in tied.items():
        if not _are_equal(stored[first], stored[second]):
            raise UserError(
                f"its config.json ties {first} to {second}, but the stored weights differ: set "
                "tie_word_embeddings to false in config.json"
            )


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put a text before the message of every `UserError` that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def check_tensors(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare stored tensors with the names and shapes that are expected.

    Raises:
        UserError: tensors are missing, unexpected, of another shape or of a type that is no weight's.
    """
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(expected)} weights are missing ({_list_names(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected)} weights are unexpected ({_list_names(unexpected)})")
    if faults:
        raise UserError(f"{' and '.join(faults)}{_describe_prefix(stored, expected)}")
    if misshapen := sorted(key for key, shape in expected.items() if stored[key].shape != shape):
        key = misshapen[0]
        raise UserError(
            f"{len(misshapen)} of {len(expected)} weights have another shape than its configuration "
            f"says ({_printable(key)} has {stored[key].shape}, it should have {expected[key]})"
        )
    if mistyped := sorted(key for key in expected if stored[key].dtype not in FLOAT_TYPES):
        raise UserError(
            f"{len(mistyped)} of {len(expected)} weights are not floating point numbers of 16, 32 or "
            f"64 bits ({_printable(mistyped[0])} has type {stored[mistyped[0]].dtype})"
        )


def find_weight_files(path: str, revision: str | None) -> list[Path]:
    """Return the files that hold the weights of a model folder or Hub id, which are downloaded first.

    Raises:
        UserError: there are no weights, a listed file is missing, or the list of files is malformed.
    """
    for name in WEIGHT_FILES:
        if file := find_file(path, name, revision):
            if name.endswith(".index.json"):
                return _find_shards(path, file, revision)
            return [file]
    raise UserError(f"it holds no weights ({' or '.join(WEIGHT_FILES)})")


def digest_weights(path: str, revision: str | None) -> str:
    """Return one digest of the files that hold the weights of a model folder or Hub id.

    Raises:
        UserError: see `find_weight_files`; a file cannot be read.
    """
    with error_prefix(f"model {path!r} cannot be opened: "):
        files = find_weight_files(path, revision)
        try:
            digests = digest_files(files[0].parent, [file.name for file in files])
        except DamagedFile as error:
            raise UserError(str(error)) from error
    return digest_names(digests, sorted(digests))


def read_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files and PyTorch files by name, without reading their numbers.

    Raises:
        UserError: a file is damaged, or two files hold a tensor of the same name.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        check_content(file)
        read_file = _read_safetensors if file.suffix == ".safetensors" else _read_pytorch
        tensors = read_file(file)
        if twice := sorted(stored.keys() & tensors.keys()):
            raise UserError(f"{file}: {len(twice)} weights are also in another file ({_list_names(twice)})")
        stored |= tensors
    return stored


def find_file(path: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a model folder or Hub id, or None if there is no such file."""
    if Path(path).is_dir():
        file = Path(path) / name
        # a link without a target is a file that is missing, not a file that the folder never had
        return file if file.is_file() or file.is_symlink() else None
    found = cached_file(path, name, revision=revision or "main", _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _find_shards(path: str, index: Path, revision: str | None) -> list[Path]:
    """Return the files that an index of weights lists."""
    try:
        content = load_json(index)
        names = content["weight_map"].values()
        dict(content["metadata"])  # which transformers needs as well
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is not a list of weights (metadata and weight_map): fetch the file again"
        ) from error
    # a name with folders could lead out of the model's folder
    if not all(isinstance(name, str) and name == PurePath(name).name for name in names):
        raise UserError(f"{index} lists a file that is not in its own folder")
    shards = {name: find_file(path, name, revision) for name in sorted(set(names))}
    if missing := [name for name, file in shards.items() if file is None]:
        raise UserError(
            f"{len(missing)} of {len(shards)} files with weights are "
            f"missing ({_list_names(missing)}): fetch them again"
        )
    return [file for file in shards.values() if file]


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    def reader(key: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safe_open(path, "pt") as file:
                tensor: torch.Tensor = file.get_tensor(key)
                return tensor

        return read

    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  the file is no mapping
                part = file.get_slice(key)
                tensors[key] = StoredTensor(tuple(part.get_shape()), str(part.get_dtype()), reader(key))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or truncated: {first_line(error)}") from error
    return tensors


def _read_pytorch(path: Path) -> dict[str, StoredTensor]:
    """Read a pickled file of weights, which must not hold anything but tensors."""
    try:
        # only files in PyTorch's present format can be mapped into memory
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds other objects than weights, which are never loaded: use a "
            "safetensors file"
        ) from error
    # the format has no checksum, so that a damaged file raises whatever its bytes happen to mean
    except Exception as error:
        raise UserError(f"{path} is damaged or truncated: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold weights by name, not a {type(content).__name__}")

    def describe(key: str, value: Any) -> StoredTensor:
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {key!r} is not a tensor, but a {type(value).__name__}")
        return StoredTensor.of(value)

    return {str(key): describe(str(key), value) for key, value in content.items()}


def _are_equal(first: StoredTensor, second: StoredTensor) -> bool:
    return first is second or torch.equal(first.read(), second.read())


def _list_names(names: list[str]) -> str:
    """Return the first names as text, which comes from the file and may hold any characters."""
    more = f", and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(map(_printable, names[:_NUM_NAMED])) + more


def _printable(name: str) -> str:
    return name[:100] if name.isprintable() else repr(name[:100])


def _describe_prefix(stored: Collection[str], expected: Collection[str]) -> str:
    """Return the end of an error if every stored name starts with a text that the expected names lack."""
    parts = os.path.commonprefix(list(stored)).split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if any(name.removeprefix(prefix) in expected for name in stored):
            return f": every name starts with {_printable(prefix)}"
    return ""
