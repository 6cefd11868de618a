"""The digests of an export's files, which every reader of the folder checks before it reads them.

::

    digests.json    {"version": 1, "files": {name: {"bytes": ..., "digest": ...}}, "digest": ...}

It lists the files that determine the model: weights, configuration, tokenizer, template, adapter. That of an
adapter also holds the digest of the weights of its base model, `base_weights`.
transformers and vLLM ignore it. A checkpoint with an adapter, which may be opened as a model, is checked by
its marker. A folder with neither, such as any other model, is not checked.
"""

from http import HTTPStatus
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from blockft.digest import (
    AddedFile,
    DamagedFile,
    FileDigest,
    check_no_other_files,
    digest_files,
    dump_with_digest,
    files_to_record,
    list_files,
    parse_files,
    read_with_digest,
    verify_files,
)
from blockft.errors import UserError, first_line, is_first_of_host
from blockft.model.checkpoint import MARKER
from blockft.model.weights import digest_weights

DIGESTS = "digests.json"

VERSION = 1
"""Version of the format of `digests.json`. Other versions are never read."""

_WEIGHTS = (".safetensors", ".bin")
"""Suffixes of files with weights."""

_NOT_READ = ("", ".md", ".png", ".jsonl", ".gguf", ".csv", ".db", ".ini", ".log", ".pdf", ".yaml", ".yml")
"""Suffixes of files that transformers reads from no model folder; they may be added and changed."""

_READ_TEXTS = ("merges.txt", "vocab.txt")
"""Texts that transformers reads from a model folder; other `.txt` files may be added and changed."""

_READ_FOLDERS = (".", "additional_chat_templates")
"""Folders of a model in which transformers looks for files."""


def write_digests(folder: Path, *, base_weights: str | None = None) -> None:
    """Write the digests of a model's files into its folder; `base_weights` is that of an adapter's base."""
    files = digest_files(folder, _list_model_files(folder))
    record = {"version": VERSION, "files": files_to_record(files)}
    if base_weights:
        record["base_weights"] = base_weights
    (folder / DIGESTS).write_text(dump_with_digest(record), encoding="utf-8")


def verify_model_files(path: str, revision: str | None = None, *, weights: bool) -> None:
    """Check the files of a model folder or Hub id that has digests; without `weights` only the small files.

    Files of the Hub are downloaded. Of several ranks of a host only the first one checks weights.

    Raises:
        UserError: a file is damaged or missing, or was added, or the Hub fails.
    """
    digests = _find_digests(path, revision)
    if digests is None:
        return
    folder = digests.parent
    try:
        files = _read_digests(digests)
        check_no_other_files(_list_model_files(folder), files)
        with_weights = weights and is_first_of_host()
        checked = {
            name: file
            for name, file in files.items()
            if _is_model_file(name) and (with_weights or not name.endswith(_WEIGHTS))
        }
        if not Path(path).is_dir():
            for name in checked:
                _download(path, name, folder.name)
        verify_files(folder, checked)
    except DamagedFile as error:
        remedy = "move that file elsewhere" if isinstance(error, AddedFile) else "restore the file"
        if digests.name == DIGESTS:
            remedy += f", or remove {DIGESTS} if the folder was changed on purpose"
        raise UserError(f"model {folder} is damaged ({error}): {remedy}") from error


def verify_base_weights(adapter: Path, base: str, revision: str | None) -> None:
    """Check that an adapter with digests was trained on the weights that its base model has now.

    Raises:
        UserError: the base model has other weights, or none.
    """
    digests = adapter / DIGESTS
    if not digests.is_file() or not (expected := read_with_digest(digests).get("base_weights")):
        return
    if digest_weights(base, revision) != expected:
        raise UserError(
            f"adapter {adapter} was trained on other weights than {base} holds now: restore them, or remove "
            f"{DIGESTS} from the adapter's folder if the base model was changed on purpose"
        )


def _list_model_files(folder: Path) -> list[str]:
    """Return the names of the files that determine what transformers reads from a folder."""
    return [name for name in list_files(folder) if _is_model_file(name)]


def _is_model_file(name: str) -> bool:
    path = Path(name)
    if name in (DIGESTS, MARKER) or str(path.parent) not in _READ_FOLDERS:
        return False
    return path.name in _READ_TEXTS if path.suffix == ".txt" else path.suffix not in _NOT_READ


def _find_digests(path: str, revision: str | None) -> Path | None:
    if Path(path).is_dir():
        found_here = [Path(path) / name for name in (DIGESTS, MARKER)]
        return next((file for file in found_here if file.exists() or file.is_symlink()), None)
    found = _download(path, DIGESTS, revision)
    return Path(found) if found else None


def _download(hub_id: str, name: str, revision: str | None) -> str | None:
    """Return the path of a file of a Hub id in the cache; None if the Hub has none, or offline its cache.

    Raises:
        UserError: the Hub does not say whether there is such a file.
    """
    try:
        return hf_hub_download(hub_id, name, revision=revision)
    except LocalEntryNotFoundError as error:
        reason = error.__cause__ or error
        # mirrors of the Hub answer so for a missing file, without the header that names the reason
        is_missing = getattr(getattr(reason, "response", None), "status_code", None) == HTTPStatus.NOT_FOUND
        if constants.HF_HUB_OFFLINE or is_missing:
            return None
        raise UserError(
            f"model {hub_id!r} cannot be verified, because the Hugging Face Hub did not say whether it has "
            f"{name} ({first_line(reason)}): try again, or set HF_HUB_OFFLINE=1 to use the Hub's cache"
        ) from error
    except (EntryNotFoundError, OSError, ValueError):
        return None  # also no such repository or revision, which opening the model reports


def _read_digests(path: Path) -> dict[str, FileDigest]:
    record = read_with_digest(path)
    if path.name == DIGESTS and record.get("version") != VERSION:
        raise DamagedFile(f"{path.name} has version {record.get('version')}, this blockft reads {VERSION}")
    return parse_files(record.get("files"))
