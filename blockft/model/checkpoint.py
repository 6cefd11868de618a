"""Checkpoints of a run: mark, find and verify complete ones, choose the best one, store reference logits.

Tensor suffixes: T tokens of the reference text, N positions whose logits are stored, V vocabulary.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from blockft.attention.layout import Layout
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
from blockft.errors import UserError
from blockft.folder_lock import FolderInUse, lock_folder, reading_folder, remove_unused_locks
from blockft.inputs import missing_path
from blockft.model.masked_forward import masked_logits
from blockft.outputs import apply_umask, write_atomic

MARKER = "complete.json"
"""Completion marker of a checkpoint, written last: a checkpoint without it is incomplete and is ignored."""

REFERENCE_LOGITS = "reference_logits.safetensors"
"""The token ids of a fixed text and the run's logits on some of them; an export is compared with these."""

_LOGITS_STEP = 8
"""Distance of the positions whose logits are stored. All logits of a large vocabulary would take 130 MB."""

_FILES = "files"
"""Key of the marker: size and digest of every other file of the checkpoint."""

_MAX_ATTEMPTS, _RETRY_S = 100, 0.01
"""How often, and after which pause in seconds, a reader tries to lock or list checkpoints that change."""

_REMOVED = ".removed"
"""Suffix of the hidden name under which a checkpoint is deleted, so that no part of it counts as one."""

_NAME = re.compile(r"checkpoint-(\d+)")
"""Names of the checkpoints of a run: their step."""

_RANK_FILE = re.compile(r"(?:pp_rank|rng_state)_(\d+)")
"""Files that a rank writes for itself; rank 0 writes all others."""


def digest_own_files(checkpoint: Path, *, rank: int, num_ranks: int) -> dict[str, FileDigest]:
    """Return the digests of the files of a checkpoint that a rank has written, by name.

    A rank has its own files still in memory, also if the checkpoint lies on a file system of the network.

    Raises:
        UserError: a file cannot be read.
    """

    def writer(name: str) -> int:
        match = _RANK_FILE.search(Path(name).name)
        return int(match[1]) if match and int(match[1]) < num_ranks else 0

    own = [name for name in _list_content(checkpoint) if writer(name) == rank]
    try:
        return digest_files(checkpoint, own)
    except DamagedFile as error:
        raise UserError(f"{checkpoint} cannot be completed: {error}") from error


def _list_content(checkpoint: Path) -> list[str]:
    return [name for name in list_files(checkpoint) if name != MARKER]


def mark_complete(
    checkpoint: Path,
    *,
    step: int,
    run_signature: Mapping[str, Any],
    eval_losses: Mapping[str, float],
    eval_due: bool,
    answers_due: bool,
    unlogged: Mapping[str, Any],
    files: Mapping[str, FileDigest],
    metrics: Mapping[str, Any],
) -> None:
    """Write the completion marker of a checkpoint; the files get the umask's permissions.

    Args:
        checkpoint: its folder, to which no other file is added afterwards.
        step: the number of optimizer steps that are trained.
        run_signature: what a resumed run must match.
        eval_losses: the evaluation loss of this step by mode; empty if it was not evaluated.
        eval_due: whether the run stopped before the evaluation of this step.
        answers_due: whether the run stopped before the sample answers of this step.
        unlogged: the steps since the last logged one: their number (`num_steps`), the sum of their losses on
            each rank (`loss_sums`), and the same by mode and source (`loss_groups`, see `LossGroups.gather`).
            Empty if there are none.
        files: the digests of all files of the checkpoint.
        metrics: the digest of the run's metrics up to this step, see `digest_metrics`.
    """
    marker = {"step": step, "eval_losses": eval_losses, "eval_due": eval_due, "answers_due": answers_due}
    marker |= {"unlogged": unlogged}
    marker |= {"run_signature": run_signature, _FILES: files_to_record(files), "metrics": metrics}
    apply_umask(checkpoint)
    write_atomic(checkpoint / MARKER, dump_with_digest(marker))


def add_evaluation(checkpoint: Path, *, eval_losses: Mapping[str, float], metrics: Mapping[str, Any]) -> None:
    """Add the evaluation that was due to the marker of a checkpoint."""
    marker = read_marker(checkpoint) | {"eval_losses": eval_losses, "eval_due": False, "metrics": metrics}
    write_atomic(checkpoint / MARKER, dump_with_digest(marker))


def add_answers(checkpoint: Path, *, metrics: Mapping[str, Any]) -> None:
    """Add the sample answers that were due to the marker of a checkpoint."""
    marker = read_marker(checkpoint) | {"answers_due": False, "metrics": metrics}
    write_atomic(checkpoint / MARKER, dump_with_digest(marker))


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """Return the content of the marker of a complete checkpoint, see `mark_complete`.

    Raises:
        UserError: the marker is damaged; the message names another checkpoint that is whole.
    """
    try:
        return read_with_digest(checkpoint / MARKER)
    except DamagedFile as error:
        raise _damaged(checkpoint, error) from error


def verify_checkpoint(checkpoint: Path) -> None:
    """Check that the files of a complete checkpoint are what the run wrote, before they are read.

    Raises:
        UserError: the checkpoint is damaged; the message names another checkpoint that is whole.
    """
    try:
        _verify(checkpoint)
    except DamagedFile as error:
        raise _damaged(checkpoint, error) from error


def _verify(checkpoint: Path) -> None:
    marker = read_with_digest(checkpoint / MARKER)
    _check_name(checkpoint, marker["step"])
    files = parse_files(marker.get(_FILES))
    check_no_other_files(_list_content(checkpoint), files)
    verify_files(checkpoint, files)


def _damaged(checkpoint: Path, error: DamagedFile) -> UserError:
    """Return the error about a damaged checkpoint, which offers the newest other one that is whole."""
    if isinstance(error, AddedFile):
        return UserError(f"checkpoint {checkpoint} cannot be used ({error}): move that file elsewhere")
    others = [other for other in complete_checkpoints(checkpoint.parent) if other.name != checkpoint.name]
    if whole := next(filter(_is_whole, reversed(others)), None):
        remedy = f"{whole} is undamaged: remove {checkpoint.name} to resume from it, or export it by its name"
    else:
        remedy = "the run has no undamaged checkpoint: restore this one from a copy, or start a new run"
    return UserError(f"checkpoint {checkpoint} is damaged ({error}); {remedy}")


def _is_whole(checkpoint: Path) -> bool:
    try:
        _verify(checkpoint)
    except (DamagedFile, UserError, FileNotFoundError):  # FileNotFoundError: its run removes it
        return False
    return True


def _check_name(checkpoint: Path, step: int) -> None:
    """Refuse a checkpoint under the name of another step, under which a run would continue with it."""
    if _NAME.fullmatch(checkpoint.name) and checkpoint.name != f"checkpoint-{step}":
        raise UserError(
            f"{checkpoint} holds step {step}, which is not the step of its name: rename it to "
            f"checkpoint-{step}, or remove it"
        )


def _list_checkpoints(run: Path) -> dict[Path, bool]:
    """Return all checkpoints of a run, oldest first, and whether each is complete. Files are passed over."""
    for attempt in count(1):
        matches = ((_NAME.fullmatch(path.name), path) for path in run.glob("checkpoint-*"))
        numbered = sorted((int(match[1]), path) for match, path in matches if match)
        is_complete = {path: (path / MARKER).is_file() for _, path in numbered if path.is_dir()}
        # a run that goes on removes old checkpoints, each with its marker at once, and has newer ones;
        # NFS may list for a while what another host has removed
        if all(os.path.lexists(path) for _, path in numbered) or attempt == _MAX_ATTEMPTS:
            return is_complete
        time.sleep(_RETRY_S)
    raise AssertionError


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [path for path, is_complete in _list_checkpoints(run).items() if is_complete]


def incomplete_checkpoints(run: Path) -> list[Path]:
    """Return the incomplete checkpoints of a run, oldest first."""
    return [path for path, is_complete in _list_checkpoints(run).items() if not is_complete]


def _read_markers(run: Path) -> dict[Path, dict[str, Any]]:
    """Return the markers of the complete checkpoints of a run, oldest first.

    Raises:
        UserError: a marker is damaged; see `read_marker`.
    """
    for attempt in count(1):
        markers: dict[Path, dict[str, Any]] = {}
        for checkpoint in complete_checkpoints(run):
            try:
                markers[checkpoint] = read_with_digest(checkpoint / MARKER)
            except DamagedFile as error:
                if checkpoint.is_dir() or attempt == _MAX_ATTEMPTS:
                    raise _damaged(checkpoint, error) from error
                break  # the run has removed it
        else:
            return markers
    raise AssertionError


def check_markers(run: Path) -> None:
    """Check the markers of all checkpoints of a run, without reading their other files.

    Only the newest checkpoint may lack its marker: an interrupted save leaves only that one.

    Raises:
        UserError: a marker is missing or damaged, or is that of another step.
    """
    checkpoints = list(_list_checkpoints(run).items())
    if lost := [path for path, is_complete in checkpoints[:-1] if not is_complete]:
        raise UserError(
            f"{lost[0]} has lost its {MARKER}, without which it cannot be verified: restore that file, or "
            "remove the checkpoint to resume without it"
        )
    for checkpoint, marker in _read_markers(run).items():
        _check_name(checkpoint, marker["step"])


def remove_incomplete(run: Path) -> list[str]:
    """Delete the incomplete checkpoints of a run, so that no later save mixes its shards with old ones.

    The lock files that killed processes left of checkpoints are deleted, too.

    Returns the names of those that an interrupted save left.
    """
    incomplete = incomplete_checkpoints(run)
    for checkpoint in incomplete:
        _remove(checkpoint)
    for removed in run.glob(f".checkpoint-*{_REMOVED}"):
        _delete(removed)
    remove_unused_locks(run, "checkpoint-*")
    return [checkpoint.name for checkpoint in incomplete]


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint under a hidden name; `remove_incomplete` deletes what an interruption leaves."""
    _delete(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}{_REMOVED}")))


def _delete(folder: Path) -> None:
    """Delete a folder; of a link to a folder that a user has moved elsewhere only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def best_checkpoint(run: Path) -> Path | None:
    """Return the complete checkpoint with the lowest evaluation loss, or None if none was evaluated.

    The loss is that of the block mode, if the run evaluates it.
    """
    losses_by_mode = {path: marker["eval_losses"] for path, marker in _read_markers(run).items()}
    losses = {
        path: by_mode["block"] if "block" in by_mode else by_mode["full"]
        for path, by_mode in losses_by_mode.items()
        if by_mode
    }
    return min(losses, key=lambda path: losses[path], default=None)


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """Return `path` if it is a complete checkpoint, otherwise the last (or best) one of the run `path`.

    Raises:
        UserError: `path` is neither a checkpoint nor a run with such a checkpoint.
    """
    if (path / MARKER).is_file():
        return path
    if not path.is_dir():
        raise UserError(missing_path(path, f"{path} is not a folder: name a run or one of its checkpoints"))
    if not (complete := complete_checkpoints(path)):
        raise UserError(f"{path} holds no complete checkpoint (a folder checkpoint-N with {MARKER})")
    if not best:
        return complete[-1]
    if found := best_checkpoint(path):
        return found
    raise UserError(
        f"no checkpoint of {path} was evaluated, so there is no best one: set train.num_eval_examples"
    )


@contextmanager
def reading_checkpoint(path: Path, action: str, *, best: bool = False) -> Iterator[Path]:
    """Yield the checkpoint that `find_checkpoint` finds; a run that goes on keeps it meanwhile.

    `action` is what this process does, for example "blockft export".

    Raises:
        UserError: see `find_checkpoint`.
        FolderInUse: another process writes the checkpoint.
    """
    with ExitStack() as stack:
        for attempt in count(1):
            checkpoint = find_checkpoint(path, best=best)
            try:
                stack.enter_context(reading_folder(checkpoint, action))
            except FolderInUse:  # the run is removing the checkpoint, and has newer ones
                if attempt == _MAX_ATTEMPTS:
                    raise
                time.sleep(_RETRY_S)
                continue
            if (checkpoint / MARKER).is_file():
                break
            stack.close()  # the run has removed it before it was locked
        yield checkpoint


def remove_old_checkpoints(run: Path, num_kept: int, *, keep_best: bool) -> None:
    """Delete all but the newest `num_kept` complete checkpoints, and the best one if `keep_best`.

    A checkpoint that an export is reading stays until the next call.
    """
    best = best_checkpoint(run) if keep_best else None
    for checkpoint in complete_checkpoints(run)[:-num_kept]:
        if checkpoint != best:
            with suppress(FolderInUse), lock_folder(checkpoint, "blockft train"):
                _remove(checkpoint)


@torch.no_grad()
def compute_reference_logits(model: PreTrainedModel, ids_T: torch.Tensor) -> torch.Tensor:
    """Return the float32 logits (T, V) of a causal forward pass over `ids_T`. All ranks call it.

    The computation is in float32 whatever the dtype of the weights: in bfloat16 the logits of a small model
    differ by 3 % of their norm, which would hide a wrong export.
    """
    was_training, attention = model.training, model.config._attn_implementation
    model.set_attn_implementation("block_sdpa")
    # peft would cast the inputs of an adapter to the dtype that its weights have outside of the hooks
    with (
        _float32_weights(model),
        disable_input_dtype_casting(model),
        torch.compiler.set_stance("force_eager"),
    ):
        logits_TV = masked_logits(model.eval(), ids_T, [Layout((len(ids_T),))])
    model.set_attn_implementation(attention)
    model.train(was_training)
    return logits_TV.cpu()


@contextmanager
def _float32_weights(model: torch.nn.Module) -> Iterator[None]:
    """Convert each module's weights to float32 while the module computes, one module at a time."""
    original: dict[torch.nn.Parameter, torch.Tensor] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        # quantised weights are whole numbers
        for parameter in filter(torch.is_floating_point, module.parameters(recurse=False)):
            original[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for parameter in filter(torch.is_floating_point, module.parameters(recurse=False)):
            parameter.data = original.pop(parameter)

    # ZeRO-3's hooks gather a module's weights before these hooks run and free them afterwards
    hooks = [module.register_forward_pre_hook(widen) for module in model.modules()]
    hooks += [module.register_forward_hook(restore, prepend=True) for module in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_reference_logits(checkpoint: Path, ids_T: torch.Tensor, logits_TV: torch.Tensor) -> None:
    """Write the ids of the reference text and the run's logits on some of them into a checkpoint.

    Each position depends on all weights, so that a few suffice: the last one, and every eighth before it.
    """
    positions = torch.arange(len(ids_T) - 1, -1, -_LOGITS_STEP).flip(0)
    logits_NV = logits_TV[positions]
    tensors = {"input_ids": ids_T.contiguous(), "positions": positions, "logits": logits_NV.contiguous()}
    save_file(tensors, checkpoint / REFERENCE_LOGITS)


def load_reference_logits(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ids (T,) of the reference text, positions (N,) in it, and the run's logits (N, V) there."""
    tensors = load_file(checkpoint / REFERENCE_LOGITS)
    return tensors["input_ids"], tensors["positions"], tensors["logits"]
