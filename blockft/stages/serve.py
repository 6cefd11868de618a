"""`blockft serve`: serve a model with vLLM, with cached blocks."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError, notify
from blockft.inference.device_tier import free_bytes
from blockft.inference.runner import CacheOptions, kv_shape
from blockft.model.decoder_layers import attention_windows, rotary_embeddings
from blockft.model.fingerprint import model_fingerprint
from blockft.model.load import adapter_base_model, load_model, load_tokenizer, parse_dtype
from blockft.model.supported import local_sees_first, uses_reencoded_positions
from blockft.serving.block_request import new_secret
from blockft.serving.launch import check_options, run_server
from blockft.serving.served_model import ServedModel, list_files
from blockft.serving.supported_engine import check_version
from blockft.stages.generate import CacheArguments
from blockft.units import format_count


def serve(
    model: str,
    *,
    cache: CacheArguments,
    dtype: str = "auto",
    page_writer: str = "auto",
    options: Sequence[str] = (),
) -> int:
    """Start vLLM's server, wait for its end, and return its exit code.

    options: of vLLM's server.

    Raises:
        UserError: vLLM is missing or has an untested version; an option or the model is not supported; the
            cache folder cannot be used.
    """
    cache_options = cache.options()
    torch_dtype = parse_dtype(dtype, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    if page_writer == "triton" and not torch.cuda.is_available():
        raise UserError("--page-writer triton needs a GPU, and there is none here: use auto or torch")
    check_options(options)
    check_version()
    with TemporaryDirectory(prefix="blockft-serve-") as folder:
        served = describe_model(
            model, cache_options, torch_dtype, socket_folder=folder, page_writer=page_writer
        )
        for tier, kind in zip(served.open_disk_tiers(), ("blockft", "vLLM"), strict=True):
            notify(f"{format_count(len(tier.digests()), 'block')} by {kind} in {served.folder}")
        return run_server(served, Path(folder), options)


def describe_model(
    model: str,
    cache: CacheOptions,
    dtype: torch.dtype,
    *,
    socket_folder: str,
    page_writer: str = "auto",
) -> ServedModel:
    """Load a model on the CPU once, and return what its server must know about it.

    Raises:
        UserError: the model is not supported by blockft or by its server.
    """
    if adapter_base_model(model):
        raise UserError(f"{model} is an adapter, whose blocks are not served: export the merged model")
    files = list_files(model)
    loaded = load_model(model, backend="cached", dtype=dtype)
    if not uses_reencoded_positions(loaded.config):
        raise UserError(
            f"{model} was trained with position_scheme local, blockft serve supports reencoded: use blockft "
            "generate, or train with reencoded positions"
        )
    if None not in attention_windows(loaded.config):
        raise UserError(
            f"all layers of {model} have a sliding window, for which vLLM drops cached blocks: use blockft "
            "generate"
        )
    rotaries = rotary_embeddings(loaded)
    frequencies = [tuple(rotary.inv_freq.tolist()) for rotary in rotaries]
    distinct = list(dict.fromkeys(frequencies))
    return ServedModel(
        path=model,
        files=files,
        name=model,
        fingerprint=model_fingerprint(loaded, tokenizer_fingerprint(load_tokenizer(model))),
        shape=kv_shape(loaded),
        frequencies=tuple(distinct),
        layer_frequencies=tuple(map(distinct.index, frequencies)),
        local_sees_first=local_sees_first(loaded.config),
        vocab_size=loaded.config.vocab_size,
        folder=str(Path(str(cache.folder)).absolute()),
        disk_bytes=cache.disk_bytes,
        host_bytes=free_bytes(torch.device("cpu")) // 4 if cache.host_bytes is None else cache.host_bytes,
        device_bytes=cache.device_bytes or 0,
        page_writer=page_writer,
        secret=new_secret(),
        socket_folder=socket_folder,
    )
