"""A model and its block cache: contexts are looked up or computed, then final blocks attend to them.

Two attention paths give equal results: `rotate_keys` (any device) and `rotate_queries` (made for GPUs).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import PreTrainedModel

from blockft.attention.cached_context import TILE_PADDING
from blockft.errors import UserError, check_type, list_allowed
from blockft.inference.block_cache import BlockCache, CacheHit, DamagedBlocks
from blockft.inference.block_key import BlockKey, KVShape, context_keys
from blockft.inference.device_tier import DeviceTier, free_bytes, use_device
from blockft.inference.disk_tier import CacheModel, DiskTier
from blockft.inference.host_tier import HostTier
from blockft.inference.rotate_keys import RotatedKeysBatch, prefill_blocks
from blockft.inference.rotate_queries import QueryRotationRunner, RotatedQueriesBatch
from blockft.inputs import check_folder, check_path, shorten
from blockft.model.decoder_layers import compile_layers, rotary_embeddings
from blockft.model.fingerprint import model_fingerprint
from blockft.model.fused_linear import fuse_projections
from blockft.model.supported import head_size, local_sees_first, uses_reencoded_positions

ATTENTION = "block_cached"
"""The attention backend that computes blocks and reads cached ones."""

MAX_CACHE_BYTES = 1 << 60
"""Largest size of a tier of the cache."""

Rotate = Literal["auto", "keys", "queries"]
"""The attention path: whether keys or queries are rotated. `auto` is `queries` on a GPU, otherwise `keys`."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """The folder of the block cache and the size of each tier, in bytes.

    folder        folder of the disk tier; None keeps nothing on the disk
    disk_bytes    largest size of the whole folder; None sets no limit
    host_bytes    size of the host tier; None is a quarter of the free memory
    device_bytes  size of the device tier; None is half of the GPU memory that is free after loading the
                  model (on a CPU a quarter). Only `rotate="queries"` has a device tier.

    Raises:
        TypeError, UserError: a value is no path or no size.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from blockft import CacheOptions, Engine
        >>> chat = [{"role": "user", "content": ["Dogs bark.\\n", "Cows moo.\\n", "Who barks?"]}]
        >>> with TemporaryDirectory() as folder:
        ...     cache = CacheOptions(folder=Path(folder), disk_bytes=10**9)
        ...     for _ in range(2):
        ...         with Engine.load("data/demo/model", device="cpu", cache=cache) as engine:
        ...             print(engine.generate(messages=chat, max_new_tokens=4).sources)
        {'computed': 3}
        {'disk': 3}
    """

    folder: Path | str | None = None
    disk_bytes: int | None = None
    host_bytes: int | None = None
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        check_type(self.folder, (str, Path, NoneType), "folder")
        if self.folder is not None:
            check_path(self.folder, "the cache folder")
            check_folder(Path(self.folder), "the cache folder")
        for name in ("disk_bytes", "host_bytes", "device_bytes"):
            size = getattr(self, name)
            check_type(size, (int, NoneType), name)
            if isinstance(size, bool) or (size is not None and not 0 <= size <= MAX_CACHE_BYTES):
                raise UserError(f"{name} is {shorten(repr(size))}, it should be 0 to {MAX_CACHE_BYTES} bytes")


@dataclass(frozen=True)
class Prefill:
    """A batch of prompts after the forward pass over their final blocks.

    batch   takes the generated tokens, by `decode_step`
    logits  after the last token of every prompt: (B, vocabulary)
    hits    the tier that each block of the contexts came from; blocks that were computed are missing
    """

    batch: RotatedKeysBatch | RotatedQueriesBatch
    logits: torch.Tensor
    hits: Mapping[BlockKey, CacheHit]


class BlockRunner:
    """A model with attention over cached blocks. Not safe for several threads at once.

    name       of the model; it is shown to people who look into the cache folder
    tokenizer  fingerprint of the tokenizer; a part of the fingerprint of cached blocks
    cache      the tiers of the block cache
    rotate     the attention path: "keys", "queries", or "auto"
    compile    compile the layers that CUDA graphs record: half a minute once, less time per token

    The weights of the model must not change afterwards, because blocks in memory are not checked again.

    Raises:
        UserError: `rotate` is unknown, the model uses another attention backend, the cache folder or a budget
            cannot be used, or `compile` is set without CUDA graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        tokenizer: str = "",
        cache: CacheOptions | None = None,
        rotate: Rotate = "auto",
        compile: bool = False,
    ) -> None:
        if rotate not in get_args(Rotate):
            raise UserError(f"rotate is {rotate!r} ({list_allowed(rotate, get_args(Rotate))})")
        _check_backend(model)
        self.model = model
        self._rotaries, self._reencoded = rotary_embeddings(model), uses_reencoded_positions(model.config)
        self._local_sees_first = local_sees_first(model.config)
        self._is_cuda, self._is_compiled = model.device.type == "cuda", compile
        cache = cache or CacheOptions()
        rotates_queries = rotate == "queries" or rotate == "auto" and self._is_cuda
        if compile and not (rotates_queries and self._is_cuda):
            slowed = "rotated keys" if self._is_cuda else str(model.device)
            raise UserError(f"compile is for rotated queries on a GPU and would slow {slowed}: leave it out")
        shape = kv_shape(model)
        device = None
        if rotates_queries:
            device = DeviceTier(shape, model.device, self._device_bytes(cache), TILE_PADDING)
        disk = _disk_tier(model, name, tokenizer, cache) if cache.folder else None
        host_bytes = cache.host_bytes
        if host_bytes is None:
            host_bytes = free_bytes(torch.device("cpu")) // 4
        with use_device(model.device):
            self.block_cache = BlockCache(shape, host=HostTier(host_bytes), device=device, disk=disk)
            self._query_runner = None
            if device is not None:
                self._query_runner = QueryRotationRunner(
                    model,
                    self._rotaries,
                    device,
                    use_triton=self._is_cuda,
                    use_graphs=self._is_cuda,
                    reencoded=self._reencoded,
                    eager_context=self._eager,
                )
        if self._is_cuda:
            fuse_projections(model)
        if compile:
            compile_layers(model)

    def context_keys(self, blocks: Sequence[Sequence[int] | np.ndarray]) -> list[BlockKey]:
        """Return the keys of a prompt's local blocks, given by their token ids, as the model was trained."""
        return context_keys(blocks, local_sees_first=self._local_sees_first)

    def prefill(
        self, contexts: Sequence[Sequence[BlockKey]], finals: Sequence[Sequence[int]], num_new: int
    ) -> Prefill:
        """Run each prompt's final block over its context. Up to `num_new` tokens may follow.

        Raises:
            UserError: the contexts do not fit on the device together.
        """
        keys = list(dict.fromkeys(chain.from_iterable(contexts)))
        prefill: Callable[..., Prefill]
        prefill = self._prefill_rotating_queries if self._query_runner else self._prefill_rotating_keys
        while True:
            hits = self.block_cache.lookup(keys)
            try:
                with use_device(self.model.device):
                    return prefill(keys, hits, contexts, finals, num_new)
            except DamagedBlocks:
                continue  # terminates: every retry has fewer damaged entries

    def prefill_blocks(self, keys: Sequence[BlockKey]) -> int:
        """Compute the blocks that no tier has, for the host and disk tiers. Return how many were computed."""
        hits = self.block_cache.lookup(dict.fromkeys(keys))
        for hit in hits.values():
            if hit.entry:
                hit.entry.close()
        missing = [key for key in dict.fromkeys(keys) if key not in hits]
        with use_device(self.model.device), self._eager():
            for key, kv in prefill_blocks(self.model, missing):
                self.block_cache.insert(key, kv)
        return len(missing)

    def _prefill_rotating_keys(
        self,
        keys: Sequence[BlockKey],
        hits: Mapping[BlockKey, CacheHit],
        contexts: Sequence[Sequence[BlockKey]],
        finals: Sequence[Sequence[int]],
        num_new: int,
    ) -> Prefill:
        blocks = {key: kv.to(self.model.device) for key, kv in self.block_cache.load(hits).items()}
        hits = {key: hit for key, hit in hits.items() if key in blocks}
        for key, kv in prefill_blocks(self.model, (key for key in keys if key not in blocks)):
            self.block_cache.insert(key, kv)
            blocks[key] = kv
        batch = RotatedKeysBatch(self.model, self._rotaries, contexts, blocks, reencoded=self._reencoded)
        return Prefill(batch, batch.decode_step(finals)[:, -1], hits)

    def _prefill_rotating_queries(
        self,
        keys: Sequence[BlockKey],
        hits: Mapping[BlockKey, CacheHit],
        contexts: Sequence[Sequence[BlockKey]],
        finals: Sequence[Sequence[int]],
        num_new: int,
    ) -> Prefill:
        runner, device = self._query_runner, self.block_cache.device
        assert runner is not None and device is not None
        new = [key for key in keys if key not in device]
        # the slots of the current batch may be taken, even if this batch fails
        runner.current_batch = None
        with device.add(new, keep=keys):
            # load first: computed blocks may evict the found ones from the host tier
            self.block_cache.load_layers(hits, runner.layer_loaded)
            missing = [key for key in new if key not in hits]
            if missing:
                with self._eager():
                    for key, kv in prefill_blocks(self.model, missing):
                        device.block(key).copy_(kv)
                        self.block_cache.insert(key, kv)
            batch = runner.start_batch(contexts, max(map(len, finals)) + num_new)
            logits = batch.decode_step(finals)
        return Prefill(batch, logits[:, -1], hits)

    def _eager(self) -> AbstractContextManager[Any]:
        """Return a context in which layers run uncompiled, because blocks have many different lengths."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    def _device_bytes(self, cache: CacheOptions) -> int:
        if cache.device_bytes is not None:
            return cache.device_bytes
        return free_bytes(self.model.device) // (2 if self._is_cuda else 4)


def kv_shape(model: PreTrainedModel) -> KVShape:
    """Return the shape and type of a model's keys and values."""
    config = model.config
    return KVShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _check_backend(model: PreTrainedModel) -> None:
    """Refuse a model with another attention backend, which would ignore blocks without an error."""
    found = model.config._attn_implementation
    if found != ATTENTION:
        raise UserError(
            f"{model.name_or_path or 'the model'} has the attention backend {found!r}, cached blocks need "
            f"{ATTENTION!r}: open the model with Engine.load"
        )


def _disk_tier(model: PreTrainedModel, name: str, tokenizer: str, cache: CacheOptions) -> DiskTier:
    assert cache.folder
    fingerprint = model_fingerprint(model, tokenizer)
    cache_model = CacheModel(fingerprint=fingerprint, name=name, **asdict(kv_shape(model)))
    return DiskTier(Path(cache.folder), cache_model, cache.disk_bytes)
