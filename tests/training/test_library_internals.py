"""Pickles in checkpoints never run code; the parts of libraries that checkpoints use are there.

`stages/test_checkpoint_files.py` shows what the shards of runs hold and that runs resume from them.
"""

import inspect
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockft.errors import UserError
from blockft.training.library_internals import (
    check_pickles,
    expect_no_weights,
    mapped_files,
    only_weights_loaded,
    operator_name,
    own_optimizer_states,
    read_tag,
    recompiles_limited,
    save_shards,
)
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


class Engine:
    """The parts of a DeepSpeed engine that `save_shards` uses; its disk is full from some file on."""

    def __init__(self, *, zero: bool, num_files: int = 2) -> None:
        tied, frozen = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.module = torch.nn.ModuleDict({"head": tied, "embedding": tied, "frozen": frozen})
        frozen.requires_grad_(False)
        frozen.register_buffer("scale", torch.ones(1))
        self.checkpoint_engine: Any = self
        self._zero, self._num_files = zero, num_files
        self.saved: dict[str, Any] = {}

    def zero_optimization(self) -> bool:
        return self._zero

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if len(self.saved) == self._num_files:
            raise OSError(28, "No space left on device", path)
        self.saved[path] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        os.makedirs(path, exist_ok=exist_ok)

    def _copy_recovery_script(self, save_path: str) -> None:
        raise AssertionError("not needed")

    def save_checkpoint(self, folder: str, **options: Any) -> None:
        assert options == {"tag": "global_step3", "exclude_frozen_parameters": True, "save_latest": False}
        writer = self.checkpoint_engine
        writer.makedirs(f"{folder}/global_step3", exist_ok=True)
        writer.save(
            {"module": self.module.state_dict(), "buffer_names": ["frozen.scale"], "step": 3}, "model"
        )
        writer.save({"optimizer_state_dict": {"module": 1}}, "optimizer")
        self._copy_recovery_script(folder)
        self.reached_the_barrier = True


@pytest.mark.parametrize(
    ("zero", "kept"), [(True, {"frozen.scale"}), (False, {"head.weight", "embedding.weight", "frozen.scale"})]
)
def test_shards_hold_no_weight_that_follows_from_other_files(
    tmp_path: Path, zero: bool, kept: set[str]
) -> None:
    engine = Engine(zero=zero)
    save_shards(engine, tmp_path, 3)
    assert engine.saved["model"]["module"].keys() == kept and engine.saved["model"]["step"] == 3
    assert engine.saved["optimizer"] == {"optimizer_state_dict": {"module": 1}}
    assert engine.checkpoint_engine is engine and "_copy_recovery_script" not in vars(engine)


@pytest.mark.parametrize("num_files", [0, 1])
def test_a_rank_that_cannot_write_shards_reaches_the_end(tmp_path: Path, num_files: int) -> None:
    engine = Engine(zero=True, num_files=num_files)
    with pytest.raises(OSError, match="No space left"):
        save_shards(engine, tmp_path, 3)
    assert engine.reached_the_barrier and engine.checkpoint_engine is engine


def test_the_parts_of_the_libraries_that_write_and_read_checkpoints_are_as_before() -> None:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from transformers import Trainer

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(Trainer._save_rng_state) == ["self", "output_dir"]
    arguments = ["self", "save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"]
    assert parameters(DeepSpeedEngine.save_checkpoint) == arguments
    assert parameters(DeepSpeedEngine._copy_recovery_script) == ["self", "save_path"]
    assert parameters(TorchCheckpointEngine.save) == ["self", "state_dict", "path"]
    assert parameters(TorchCheckpointEngine.makedirs) == ["self", "path", "exist_ok"]
    assert parameters(DeepSpeedZeroOptimizer.update_lp_params) == ["self"]
    # ZeRO-3 sets the weights of the model while it loads the optimizer
    assert "fp16_param.data.copy_(fp32_param.data)" in inspect.getsource(
        DeepSpeedZeroOptimizer_Stage3._rigid_load_state_dict
    )
    # what DeepSpeed itself writes between the first and the last barrier of a save
    source = inspect.getsource(DeepSpeedEngine._save_zero_checkpoint)
    assert source.count("checkpoint_engine.save(") == 1 and source.count("_copy_recovery_script(") == 1
    assert inspect.getsource(DeepSpeedEngine.save_checkpoint).count("open(") == 1


def test_only_weights_may_be_missing_when_a_run_resumes() -> None:
    model = torch.nn.BatchNorm1d(2)
    expect_no_weights(model)
    buffers = dict(model.named_buffers())
    model.load_state_dict(buffers)
    with pytest.raises(RuntimeError, match="running_mean"):
        model.load_state_dict({name: buffers[name] for name in buffers if name != "running_mean"})
    with pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**buffers, "other": torch.ones(1)})


def test_states_that_were_loaded_from_a_file_do_not_hold_it(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4)
    optimizer.step()
    path = save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with mapped_files():
        loaded = torch.load(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    optimizer.load_state_dict(loaded)
    own_optimizer_states(optimizer)
    expected = {name: value.clone() for name, value in loaded["state"][0].items()}
    del loaded
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert {name: value.tolist() for name, value in optimizer.state[weight].items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    torch.load(path)
    assert str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("fused", "expected"), [(True, "meta"), (False, "cpu")])
def test_the_steps_of_a_fused_optimizer_are_beside_the_weights(fused: bool, expected: str) -> None:
    """A universal checkpoint leaves them on the CPU. The device without data stands for a GPU."""
    weight = torch.nn.Parameter(torch.ones(4, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.param_groups[0]["fused"] = fused
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, device="meta")}
    own_optimizer_states(optimizer)
    assert optimizer.state[weight]["step"].device.type == expected


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_module_with_too_many_shapes_is_an_error() -> None:
    config: Any = torch.compiler.config
    module = Doubling()
    module.compile(backend="eager", dynamic=False)
    lengths = []
    with (
        config.patch(recompile_limit=2),
        pytest.raises(UserError, match="compiled 2 times, .*: compile less"),
        recompiles_limited("compile less"),
    ):
        for length in (2, 3, 4):
            lengths.append(len(module(torch.ones(length))))
    assert lengths == [2, 3]
    assert not config.fail_on_recompile_limit_hit


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.ops.aten.mm.default, ("aten", "mm")),
        (torch.ops.aten.add_.Tensor, ("aten", "add_")),
        (len, None),
    ],
)
def test_operators_are_named(target: Any, name: tuple[str, str] | None) -> None:
    assert operator_name(target) == name
