"""A model and its block cache: contexts are found or encoded, then final blocks read them.

Two paths with equal results: the key side (any device) and the query side (made for GPUs).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from blockft.attention.rotate_queries import SLACK
from blockft.errors import UserError
from blockft.inference.block_cache import BlockCache, CacheHit, DamagedBlocks
from blockft.inference.block_key import BlockKey, KVShape
from blockft.inference.device_tier import DeviceTier, free_bytes, use_device
from blockft.inference.disk_tier import CacheModel, DiskTier
from blockft.inference.host_tier import HostTier
from blockft.inference.rotate_keys import RotatedKeysBatch, prefill_blocks
from blockft.inference.rotate_queries import QueryRotationRunner, RotatedQueriesBatch
from blockft.model.fingerprint import model_fingerprint
from blockft.model.fused_linear import fuse_projections
from blockft.model.load import compile_layers, rotary_embeddings, uses_reencoded_positions

ATTENTION = "block_cached"
"""The backend that reads cached blocks, and encodes them."""

ROTATIONS = ("auto", "key", "query")
"""Ways to read cached blocks; auto is query on a GPU and key elsewhere."""


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where blocks are kept, and how much of each tier they may take.

    folder        of the disk tier; None keeps nothing on the disk
    disk_bytes    of the whole folder; None sets no limit
    host_bytes    None is a quarter of the memory that is free
    device_bytes  None is half of the GPU memory that is free once the model is there; the key side, which
                  CPUs use, takes none
    """

    folder: Path | None = None
    disk_bytes: int | None = None
    host_bytes: int | None = None
    device_bytes: int | None = None


@dataclass(frozen=True)
class Prefill:
    """A batch of prompts whose final blocks have been read.

    prompts  takes what is generated, by `decode_step`
    logits   after the last token of every prompt: (B, vocabulary)
    found    where each block of their contexts was; those that had to be encoded are missing
    """

    prompts: RotatedKeysBatch | RotatedQueriesBatch
    logits: torch.Tensor
    found: Mapping[BlockKey, CacheHit]


class BlockRunner:
    """A model with attention over cached blocks. Not for several threads at once.

    name: of the model, for people who look at the folder of its cache.
    tokenizer: identifies the one that makes its token ids; a part of what identifies cached blocks.
    compile: compile the layers that CUDA graphs record; half a minute once, less time for every token.

    The weights of the model must stay as they are from here on: blocks in memory are not looked at again.

    Raises:
        UserError: an unknown `side`; a model that attends otherwise; a cache folder or budget that cannot be
            used; `compile` without CUDA graphs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        tokenizer: str = "",
        cache: CacheOptions | None = None,
        side: str = "auto",
        compile: bool = False,
    ) -> None:
        if side not in ROTATIONS:
            raise UserError(f"side is {side!r}, allowed are {', '.join(ROTATIONS)}")
        _check_attends(model)
        self.model = model
        self._rotations, self._reencoded = rotary_embeddings(model), uses_reencoded_positions(model.config)
        self._is_cuda, self._is_compiled = model.device.type == "cuda", compile
        cache = cache or CacheOptions()
        uses_query_side = side == "query" or side == "auto" and self._is_cuda
        if compile and not (uses_query_side and self._is_cuda):
            where = "the key side" if self._is_cuda else str(model.device)
            raise UserError(f"compile is for the query side on a GPU and would slow {where}: leave it out")
        shape = kv_shape(model)
        device = (
            DeviceTier(shape, model.device, self._device_bytes(cache), SLACK) if uses_query_side else None
        )
        disk = _disk_tier(model, name, tokenizer, cache) if cache.folder else None
        host_bytes = cache.host_bytes
        if host_bytes is None:
            host_bytes = free_bytes(torch.device("cpu")) // 4
        with use_device(model.device):
            self.store = BlockCache(shape, host=HostTier(host_bytes), device=device, disk=disk)
            self._query_side = None
            if device is not None:
                self._query_side = QueryRotationRunner(
                    model,
                    self._rotations,
                    device,
                    use_kernel=self._is_cuda,
                    use_graphs=self._is_cuda,
                    reencoded=self._reencoded,
                    eagerly=self._eagerly,
                )
        if self._is_cuda:
            fuse_projections(model)
        if compile:
            compile_layers(model)

    def prefill(
        self, contexts: Sequence[Sequence[BlockKey]], finals: Sequence[Sequence[int]], num_new: int
    ) -> Prefill:
        """Read each prompt's final block over its context; up to `num_new` tokens may follow.

        Raises:
            UserError: the contexts do not fit on the device together.
        """
        keys = list(dict.fromkeys(chain.from_iterable(contexts)))
        begin = self._begin_query_side if self._query_side else self._begin_key_side
        while True:
            found = self.store.lookup(keys)
            try:
                with use_device(self.model.device):
                    return begin(keys, found, contexts, finals, num_new)
            except DamagedBlocks:
                continue  # an entry less that is trusted each time

    def prefill_blocks(self, keys: Sequence[BlockKey]) -> int:
        """Put blocks into the host and disk tiers that are in none; returns how many had to be encoded."""
        found = self.store.lookup(dict.fromkeys(keys))
        for at in found.values():
            if at.entry:
                at.entry.close()
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        with use_device(self.model.device), self._eagerly():
            for key, kv in prefill_blocks(self.model, missing):
                self.store.insert(key, kv)
        return len(missing)

    def _begin_key_side(
        self,
        keys: Sequence[BlockKey],
        found: Mapping[BlockKey, CacheHit],
        contexts: Sequence[Sequence[BlockKey]],
        finals: Sequence[Sequence[int]],
        num_new: int,
    ) -> Prefill:
        blocks = {key: kv.to(self.model.device) for key, kv in self.store.load(found).items()}
        found = {key: at for key, at in found.items() if key in blocks}
        for key, kv in prefill_blocks(self.model, (key for key in keys if key not in blocks)):
            self.store.insert(key, kv)
            blocks[key] = kv
        prompts = RotatedKeysBatch(self.model, self._rotations, contexts, blocks, reencoded=self._reencoded)
        return Prefill(prompts, prompts.decode_step(finals)[:, -1], found)

    def _begin_query_side(
        self,
        keys: Sequence[BlockKey],
        found: Mapping[BlockKey, CacheHit],
        contexts: Sequence[Sequence[BlockKey]],
        finals: Sequence[Sequence[int]],
        num_new: int,
    ) -> Prefill:
        side, device = self._query_side, self.store.device
        assert side is not None and device is not None
        new = [key for key in keys if key not in device]
        side.running = None  # the slots of prompts that run may be taken, even if these come to nothing
        with device.add(new, keep=keys):
            # first, for what is encoded may push what was found out of the host tier
            self.store.load_layers(found, side.arrived)
            missing = [key for key in new if key not in found]
            if missing:
                with self._eagerly():
                    for key, kv in prefill_blocks(self.model, missing):
                        device.block(key).copy_(kv)
                        self.store.insert(key, kv)
            prompts = side.prompts(contexts, max(map(len, finals)) + num_new)
            logits = prompts.decode_step(finals)
        return Prefill(prompts, logits[:, -1], found)

    def _eagerly(self) -> AbstractContextManager[Any]:
        """Layers run uncompiled within: blocks have as many lengths as there are documents."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()

    def _device_bytes(self, cache: CacheOptions) -> int:
        if cache.device_bytes is not None:
            return cache.device_bytes
        return free_bytes(self.model.device) // (2 if self._is_cuda else 4)


def _check_attends(model: PreTrainedModel) -> None:
    """Other attention would not see where blocks end, and answer all the same."""
    found = model.config._attn_implementation
    if found != ATTENTION:
        raise UserError(
            f"{model.name_or_path or 'the model'} attends by {found!r}, cached blocks need {ATTENTION!r}: "
            "open it by Engine.load"
        )


def head_size(config: PreTrainedConfig) -> int:
    """The size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_shape(model: PreTrainedModel) -> KVShape:
    """The shape and type of a model's keys and values."""
    config = model.config
    return KVShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_size=head_size(config),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _disk_tier(model: PreTrainedModel, name: str, tokenizer: str, cache: CacheOptions) -> DiskTier:
    assert cache.folder
    fingerprint = model_fingerprint(model, tokenizer)
    belongs_to = CacheModel(fingerprint=fingerprint, name=name, **asdict(kv_shape(model)))
    return DiskTier(cache.folder, belongs_to, cache.disk_bytes)
