"""Every use of private parts of transformers' Trainer, of DeepSpeed, and of torch's schedulers and compiler.

Read and tested in transformers 5.17 to 5.23, deepspeed 0.19.8 and torch 2.11 to 2.13. `pyproject.toml` bounds
transformers and deepspeed accordingly: before a bound is raised, each function of this file is compared with
the new version. Heavy imports are local, because the command line imports this module before it starts.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from blockft.errors import RankError, UserError, first_line
from blockft.training.library_warnings import library_output_on_stderr

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine
    from torch.fx import GraphModule
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import Trainer

SHARED_MEMORY = Path("/dev/shm")
"""Folder in which Linux lists shared memory."""

LOAD_UNIVERSAL = {"checkpoint": {"load_universal": True}}
"""Entry of a DeepSpeed config that makes it load universal checkpoints. DeepSpeed documents it; the Trainer
passes it through."""


# --- transformers.Trainer: the sum of losses since the last logged step


def get_unlogged_loss(trainer: Trainer) -> dict[str, Any]:
    """Return the number of steps since the last logged one (`num_steps`) and each rank's sum of their losses
    (`loss_sums`). All ranks call it."""
    import torch

    sums = torch.zeros(trainer.args.world_size, device=trainer.args.device)
    sums[trainer.args.process_index] = trainer._tr_loss
    if trainer.args.world_size > 1:
        torch.distributed.all_reduce(sums)
    num_steps = trainer.state.global_step - trainer._globalstep_last_logged
    return {"loss_sums": sums.tolist(), "num_steps": num_steps}


def restore_unlogged_loss(trainer: Trainer, unlogged: Mapping[str, Any]) -> None:
    """Make the trainer include earlier steps in the next logged loss; call it when training begins.

    With the same number of ranks each rank continues with its own sum, exact to the last bit; with another
    number each continues with the mean.
    """
    sums: list[float] = unlogged["loss_sums"]
    mean = sum(sums) / len(sums)
    same_ranks = len(sums) == trainer.args.world_size
    trainer._tr_loss += sums[trainer.args.process_index] if same_ranks else mean
    trainer._total_loss_scalar -= mean  # the final average counts only the steps of this process
    trainer._globalstep_last_logged -= unlogged["num_steps"]


# --- torch.optim.lr_scheduler: the rate that is logged


def set_base_learning_rate(schedule: LambdaLR, optimizer: Any, learning_rate: float) -> None:
    """Give a schedule another base learning rate, effective from its current step on."""
    schedule.base_lrs = [learning_rate for _ in schedule.base_lrs]
    # the Trainer logs `_last_lr`
    schedule._last_lr = [learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def show_optimizer_defaults(optimizer: Any) -> None:
    """Give the optimizer of ZeRO the attribute `defaults` of the optimizer that it wraps.

    ZeRO hides it, although schedules of transformers read it.
    """
    zero = getattr(optimizer, "optimizer", None)
    if zero is not None and not hasattr(zero, "defaults") and hasattr(zero, "optimizer"):
        zero.defaults = zero.optimizer.defaults


# --- DeepSpeed checkpoints: no code from pickles

_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of DeepSpeed in its checkpoints. They hold numbers and run no code when they are loaded."""

_NUMPY_NAMES = (
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
)
"""Names of numpy in the states of random generators, which the Trainer itself allows while it loads them."""


@contextmanager
def only_weights_loaded() -> Iterator[None]:
    """Make every `torch.load` inside refuse pickles that could run code.

    DeepSpeed itself asks for unrestricted pickles. Call `check_pickles` first, whose error is a sentence.
    """
    import torch

    classes: list[Any] = [resolve_name(name) for name in _DEEPSPEED_CLASSES]
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(classes):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def check_pickles(checkpoint: Path) -> None:
    """Refuse a checkpoint with a file that `only_weights_loaded` would refuse, without loading any file.

    Raises:
        UserError: a pickle could run code, or is damaged.
    """
    import torch

    allowed = {*_DEEPSPEED_CLASSES, *_NUMPY_NAMES}
    # a search does not follow links to folders, in which DeepSpeed would find shards
    linked = [path for path in checkpoint.iterdir() if path.is_symlink() and path.is_dir()]
    for path in sorted(file for folder in (checkpoint, *linked) for file in folder.rglob("*")):
        if path.suffix not in (".pt", ".pth", ".bin"):
            continue
        try:
            unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - allowed
        # whatever its bytes mean: another format, a damaged archive, or instructions that torch never writes
        except Exception as error:
            raise UserError(
                f"{path} is damaged, or torch.save did not write it, so it is not loaded: {first_line(error)}"
            ) from error
        if unsafe:
            raise UserError(
                f"{path} could run code when it is loaded ({', '.join(sorted(unsafe))[:200]}), so it is not "
                "loaded: use a checkpoint that blockft wrote"
            )


# --- DeepSpeed checkpoints: shards without what follows from other files


_TAG = "global_step"
"""Start of the name of the folder with DeepSpeed's shards, by which the Trainer looks for it."""


def save_shards(engine: DeepSpeedEngine, checkpoint: Path, step: int) -> None:
    """Write the shards of all ranks into a folder of a checkpoint. All ranks call it.

    Under ZeRO the trained weights are those of the optimizer in float32, so DeepSpeed's second copy is left
    out. Frozen weights are those of the base model, and are left out as well. A rank that cannot write goes
    on to the end, because the others wait for it there.

    Raises:
        OSError, RuntimeError: this rank cannot write; other ranks may have succeeded.
    """
    writer = _ShardWriter(engine)
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda save_path: None  # DeepSpeed's tools are installed with it
    try:
        # `write_tag` writes "latest": rank 0 could fail to write it here, while the others wait
        engine.save_checkpoint(
            str(checkpoint), tag=f"{_TAG}{step}", exclude_frozen_parameters=True, save_latest=False
        )
    finally:
        engine.checkpoint_engine = writer.inner
        del engine._copy_recovery_script
    if writer.error:
        raise writer.error


def write_tag(checkpoint: Path, step: int) -> None:
    """Write the file that names the folder with the shards, see `read_tag`."""
    (checkpoint / "latest").write_text(f"{_TAG}{step}", encoding="utf-8")


class _ShardWriter:
    """Stands for DeepSpeed's writer of files: leaves weights out, and keeps the first error for later."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.inner: Any = engine.checkpoint_engine
        self.error: OSError | RuntimeError | None = None
        # without ZeRO the optimizer has no copy of the weights
        self._kept = set() if engine.zero_optimization() else trained_names(engine.module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if "module" in state_dict:
            kept = self._kept.union(state_dict["buffer_names"])
            module = {name: tensor for name, tensor in state_dict["module"].items() if name in kept}
            state_dict = {**state_dict, "module": module}
        self._try(self.inner.save, state_dict, path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._try(self.inner.makedirs, path, exist_ok)

    def _try(self, write: Callable[..., None], *arguments: Any) -> None:
        try:
            write(*arguments)
        except (OSError, RuntimeError) as error:
            self.error = self.error or error


def trained_names(model: torch.nn.Module) -> set[str]:
    """Return the names of the trained weights of a model, all of a tied pair's."""
    return {n for n, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}


def expect_no_weights(model: torch.nn.Module) -> None:
    """Let a model accept the shards of `save_shards`, which lack its weights; `restore_weights` sets them."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def accept(module: torch.nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in names]

    model.register_load_state_dict_post_hook(accept)


def restore_weights(engine: DeepSpeedEngine) -> None:
    """Set the trained weights of the model to those of the optimizer. All ranks call it after loading shards.

    Without ZeRO the shards hold the weights, and ZeRO-3 restores them itself.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer.update_lp_params()


@contextmanager
def mapped_files() -> Iterator[None]:
    """Make every `torch.load` inside map its file into memory instead of reading it.

    Otherwise the memory of a host would hold the states of its optimizers twice while a run is resumed.
    """
    from torch.utils import serialization

    config: Any = serialization.config  # torch adds `patch` to the module without a type
    with config.patch("load.mmap", True):
        yield


def own_optimizer_states(optimizer: Any) -> None:
    """Give the states of an optimizer memory of their own after shards were loaded from mapped files.

    States on the CPU would otherwise be part of the files, which could not be removed. When ZeRO-3 loads a
    universal checkpoint, parameter groups share one step counter, which would advance once per group. A
    universal checkpoint leaves step counters on the CPU, and a fused optimizer needs them beside the weights.
    """
    import torch

    while hasattr(optimizer, "optimizer"):  # accelerate and DeepSpeed wrap the optimizer
        optimizer = optimizer.optimizer
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and (value.device.type == "cpu" or name == "step"):
                device = parameter.device if name == "step" and is_fused else value.device
                state[name] = value.to(device, copy=True)


# --- DeepSpeed checkpoints: names of files, and another number of processes


def consolidate_weights(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the trained weights of a checkpoint, gathered from the shards of all ranks.

    For a run with an adapter these are the adapter's weights. One process suffices and no GPU is needed.
    Weights are converted one by one: besides the result, memory holds the float32 shards once.
    """
    import torch
    from deepspeed.utils import zero_to_fp32
    from tqdm import tqdm

    zero_to_fp32.tqdm = partial(tqdm, disable=True)  # its bars have no option and appear in log files, too
    shards = checkpoint / read_tag(checkpoint)
    with only_weights_loaded(), library_output_on_stderr():
        if any(shards.glob("*_optim_states.pt")):
            weights = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
        else:  # ZeRO-0 writes no shards
            path = shards / "mp_rank_00_model_states.pt"
            weights = torch.load(path, map_location="cpu", mmap=True)["module"]
    return {name: weight.contiguous().to(dtype) for name, weight in weights.items()}


def read_tag(checkpoint: Path) -> str:
    """Return the name of the folder inside a checkpoint that holds DeepSpeed's shards.

    Raises:
        UserError: there is no such folder in the checkpoint.
    """
    try:
        tag = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint / 'latest'} cannot be read: {first_line(error)}") from error
    # a path would lead out of the checkpoint
    if not re.fullmatch(r"[\w-]+", tag) or not (checkpoint / tag).is_dir():
        raise UserError(f"{checkpoint / 'latest'} should name a folder of the checkpoint, not {tag[:60]!r}")
    return tag


def convert_shards_to_universal(checkpoint: Path, out: Path) -> None:
    """Write the shards of a checkpoint to the folder `out` in DeepSpeed's universal form."""
    from deepspeed.checkpoint import ds_to_universal

    tag = read_tag(checkpoint)
    with only_weights_loaded(), library_output_on_stderr():
        ds_to_universal.main(
            Namespace(
                input_folder=str(checkpoint / tag),
                output_folder=str(out / f"{tag}_universal"),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                # transformers saves no patterns of parameter names, without which ZeRO-1 and ZeRO-2 stop
                inject_missing_state=True,
            )
        )


def undo_initial_step(optimizer: Any) -> None:
    """Undo the step with gradients of 0 that DeepSpeed takes when a ZeRO-0 run in bfloat16 starts.

    Adam counts that step, so that its first real steps would be up to 30 % too short, and weight decay would
    change the weights. Call it before the first step of a new run.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    while hasattr(optimizer, "optimizer") and not isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return
    optimizer.optimizer.state.clear()
    for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for weight, master in zip(weights, masters, strict=True):
            master.data.copy_(weight.data)


# --- DeepSpeed on CPUs: shared memory


def compile_cpu_operator() -> None:
    """Compile or load the operator with which DeepSpeed communicates on a CPU; without effect on a GPU."""
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


def unlink_shared_memory() -> None:
    """Remove the names of this rank's shared memory, which DeepSpeed never removes.

    Call it when every rank has opened the memory of every other rank. The memory is then freed with the
    processes that use it, however they end.
    """
    address = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    for buffer in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{address}"):
        buffer.unlink(missing_ok=True)


# --- DeepSpeed's process groups


def forget_process_groups() -> None:
    """Make DeepSpeed forget its process groups after they were destroyed.

    Otherwise a second run of the same process would use the groups of the first one.
    """
    from deepspeed.utils import groups

    importlib.reload(groups)  # it caches the groups in its module variables


# --- DeepSpeed's launcher: its command line, and how it quotes arguments


def launcher_pattern(master_addr: str, master_port: int) -> str:
    """Return the pattern (for `pkill -f` through pdsh) of a run's launcher on a host.

    DeepSpeed itself would end every launcher of this Python on the hosts, whichever run it belongs to.
    """
    return (
        "^[^ ]+ -u -m deepspeed.launcher.launch --world_info=[^ ]+ --node_rank=%n "
        f"--master_addr={master_addr} --master_port={master_port} "
    )


def quote_for_remote_shell(argument: str) -> str:
    """Quote an argument so that it arrives unchanged after DeepSpeed, pdsh and the remote shell read it."""
    argument = argument.replace("%", "%%")  # pdsh replaces %h by a host's name
    if " " not in argument:
        return shlex.quote(argument)
    return re.sub(r"([\\$`])", r"\\\1", argument)  # DeepSpeed puts it into double quotes and escapes these


# --- torch's compiler


def default_inductor_cache() -> str:
    """Return the folder in which PyTorch keeps compiled code if no variable names another one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return str(default_cache_dir())


@contextmanager
def traced_module(
    module: torch.nn.Module,
) -> Iterator[tuple[Callable[..., Any], list[GraphModule], list[GraphModule]]]:
    """Yield a module that is compiled without code being generated, and its forward and backward graphs.

    Calls of the module and of its backward pass fill the two lists. The graphs are partitioned as
    torch.compile does it. Code that was compiled before is compiled again at its next use.
    """
    import torch
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def keep_in(graphs: list[GraphModule]) -> Callable[[GraphModule, Any], Callable[..., Any]]:
        def compile_graph(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compile_graph

    forward_graphs: list[GraphModule] = []
    backward_graphs: list[GraphModule] = []
    backend = aot_autograd(
        fw_compiler=keep_in(forward_graphs),
        bw_compiler=keep_in(backward_graphs),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table,
    )
    torch.compiler.reset()
    yield torch.compile(module, backend=backend, dynamic=False), forward_graphs, backward_graphs
    torch.compiler.reset()


@contextmanager
def recompiles_limited(remedy: str) -> Iterator[None]:
    """Raise an error where a compiled module has too many different shapes.

    PyTorch would silently run it without compiling it, which takes more time and memory.

    Raises:
        RankError: the limit is reached; the message ends with the remedy.
    """
    import torch
    from torch._dynamo.exc import FailOnRecompileLimitHit

    config: Any = torch.compiler.config  # torch adds `patch` to the module without a type
    try:
        with config.patch(fail_on_recompile_limit_hit=True):
            yield
    except FailOnRecompileLimitHit as error:
        raise RankError(
            f"the layers were compiled {config.recompile_limit} times, and need another "
            f"version (TORCH_LOGS=recompiles says why): {remedy}"
        ) from error


def operator_name(target: Any) -> tuple[str, str] | None:
    """Return the namespace and the name of an operator in a graph, for example ("aten", "mm").

    Of another target, such as a Python function, the result is None.
    """
    import torch

    if not isinstance(target, torch._ops.OpOverload):
        return None
    namespace, name = target.name().split("::")
    return namespace, name.split(".")[0]


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that only the tensors of one storage share, also on the meta device."""
    return int(storage._cdata)
