"""Pickles in checkpoints never run code, and every checkpoint of a run loads without them."""

import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockft.errors import UserError
from blockft.training.library_internals import check_pickles, only_weights_loaded, read_tag
from tests.pointers import LFS_POINTER, WEB_PAGE


class Payload:
    """Unpickles as the creation of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Harmless:
    """A class that is not DeepSpeed's."""


def save(content: Any, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with the kinds of objects that DeepSpeed and the Trainer write."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    state = {
        "module": OrderedDict(weight=torch.ones(2, dtype=torch.bfloat16)),
        "loss_scaler": LossScaler(1.0),
        "zero_stage": ZeroStageEnum(2),
        "fragments": [fragment_address(start=0, numel=2)],
    }
    save(state, tmp_path / "checkpoint" / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    save(
        {"numpy": np.random.get_state(), "cpu": torch.get_rng_state()}, tmp_path / "checkpoint" / "rng_0.pth"
    )
    (tmp_path / "checkpoint" / "latest").write_text("global_step1")
    return tmp_path / "checkpoint"


def test_the_objects_of_a_checkpoint_are_loaded(checkpoint: Path) -> None:
    check_pickles(checkpoint)
    with only_weights_loaded():
        state = torch.load(next(checkpoint.rglob("*optim_states.pt")), weights_only=False)
    assert state["loss_scaler"].cur_scale == 1 and state["fragments"][0].numel == 2


@pytest.mark.parametrize("name", ["global_step1/zero_pp_rank_9_optim_states.pt", "scheduler.pt", "rng_9.pth"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_never_run(
    checkpoint: Path, tmp_path: Path, name: str, legacy: bool
) -> None:
    evil = tmp_path / "evil"
    path = save({"a": [Payload(evil)]}, checkpoint / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=f"^{path} (could run code when|is damaged, or torch.save did not write it)"
    ) as error:
        check_pickles(checkpoint)
    assert "\n" not in str(error.value)
    with only_weights_loaded(), pytest.raises(Exception, match=r"posix\.mkdir|Unsupported global"):
        torch.load(path, weights_only=False)
    assert not evil.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Harmless(), r"could run code .*test_library_internals\.Harmless"),
        (Harmless, "could run code"),
        (print, r"could run code .*builtins\.print|could run code .*print"),
        (Path("/"), "could run code"),
    ],
)
def test_other_classes_are_refused(checkpoint: Path, content: Any, message: str) -> None:
    save(content, checkpoint / "scheduler.pt")
    with pytest.raises(UserError, match=message):
        check_pickles(checkpoint)


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q\x00.", b"PK\x03\x04", LFS_POINTER, WEB_PAGE])
def test_a_file_that_is_no_checkpoint_is_refused(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "scheduler.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"scheduler\.pt is damaged, or torch\.save did not write it"):
        check_pickles(checkpoint)


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """Also where a user's variable asks for unrestricted pickles."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = save(Harmless(), checkpoint / "x.pt")
    with only_weights_loaded(), only_weights_loaded(), pytest.raises(Exception, match="Unsupported global"):
        torch.load(path)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert isinstance(torch.load(path, weights_only=False), Harmless)


@pytest.mark.parametrize("text", ["", "..", "../other", "/tmp", "missing", "a\nb", "\udc80"])
def test_the_shards_of_a_checkpoint_lie_inside_of_it(checkpoint: Path, text: str) -> None:
    assert read_tag(checkpoint) == "global_step1"
    (checkpoint.parent / "other").mkdir()
    (checkpoint / "latest").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="latest"):
        read_tag(checkpoint)
    (checkpoint / "latest").unlink()
    with pytest.raises(UserError, match="latest cannot be read"):
        read_tag(checkpoint)
    shutil.rmtree(checkpoint.parent / "other")
