"""Stand-ins for vLLM: attention layers with pages, requests, and what its scheduler gives to a connector.

They have the attributes of vLLM 0.32.0 that the connector uses, and no others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from blockft.inference.block_key import BlockKey, KVShape, num_tokens, token_ids
from blockft.serving.block_request import BlockRequest, ReplyAddress, block_params, block_salt, new_secret
from blockft.serving.served_model import ServedModel, list_files

SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_size=4, dtype="float32")
PAGE_LEN = 4
SECRET = new_secret()
NOWHERE = ReplyAddress(socket="/nowhere", id="1")


def make_served(
    folder: Path,
    shape: KVShape = SHAPE,
    host_bytes: int = 1 << 20,
    device_bytes: int = 0,
    path: str = "out/model",
    local_sees_first: bool = False,
) -> ServedModel:
    """Return a model with two kinds of rotary embeddings, whose cache is in `folder`."""
    return ServedModel(
        path=path,
        files=list_files(path),
        name="toy",
        fingerprint="a1b2c3",
        shape=shape,
        frequencies=((1.0, 0.01), (0.5, 0.002)),
        layer_frequencies=(0, 1, 0),
        local_sees_first=local_sees_first,
        vocab_size=50_000,
        folder=str(folder / "cache"),
        disk_bytes=None,
        host_bytes=host_bytes,
        device_bytes=device_bytes,
        page_writer="auto",
        secret=SECRET,
        socket_folder=str(folder),
    )


class SplitPages:
    """A backend whose page has the keys of all its tokens, then the values: (pages, 2, page_len, K, D)."""

    shape = (2, PAGE_LEN, SHAPE.num_kv_heads, SHAPE.head_size)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        pages, tokens = slots // PAGE_LEN, slots % PAGE_LEN
        kv_cache[pages, 0, tokens], kv_cache[pages, 1, tokens] = key, value


class InterleavedPages:
    """A backend whose page has the heads first, and heads in reverse: (pages, K, 2 page_len, D)."""

    shape = (SHAPE.num_kv_heads, 2 * PAGE_LEN, SHAPE.head_size)

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        for index, slot in enumerate(slots.tolist()):
            page, token = divmod(slot, PAGE_LEN)
            kv_cache[page, :, 2 * token] = key[index].flip(-1)
            kv_cache[page, :, 2 * token + 1] = value[index].flip(-1)


BACKENDS = (SplitPages, InterleavedPages)


class OneHeadPages(SplitPages):
    """The pages of a worker that keeps one head."""

    shape = (2, PAGE_LEN, 1, SHAPE.head_size)


def make_layers(
    backend: type[Any] = SplitPages, num_pages: int = 16, dtype: str = SHAPE.dtype, device: str = "cpu"
) -> list[Any]:
    """Return attention layers whose pages are filled with -1."""
    size = (num_pages, *backend.shape)
    return [
        SimpleNamespace(
            impl=backend(), kv_cache=torch.full(size, -1.0, dtype=getattr(torch, dtype), device=device)
        )
        for _ in range(SHAPE.num_layers)
    ]


class FakePool:
    """vLLM's pages. evicted: those that its prefix cache has lost."""

    def __init__(self) -> None:
        self.evicted: set[int] = set()

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.evicted |= block_ids


def kv_of(key: BlockKey, shape: KVShape = SHAPE) -> torch.Tensor:
    """Return keys and values that depend on the block only: (L, n, 2, K, D)."""
    generator = torch.Generator().manual_seed(sum(token_ids(key)))
    size = (shape.num_layers, *shape.layer_shape(num_tokens(key)))
    return torch.randn(size, generator=generator).to(shape.torch_dtype)


def make_request(
    id: str,
    prompt: Sequence[int],
    params: Any,
    *,
    salt: str | None = None,
    num_computed: int = 0,
    **changes: Any,
) -> Any:
    """Return a request of vLLM's scheduler."""
    fields = {
        "request_id": id,
        "prompt_token_ids": list(prompt),
        "num_prompt_tokens": len(prompt),
        "num_computed_tokens": num_computed,
        "num_output_tokens": 0,
        "num_preemptions": 0,
        "kv_transfer_params": params,
        "cache_salt": salt,
        "lora_request": None,
        "sampling_params": SimpleNamespace(prompt_logprobs=None),
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(**fields | changes)


def block_request(
    id: str,
    prompt: Sequence[int],
    lengths: Sequence[int],
    reply_to: ReplyAddress = NOWHERE,
    **changes: Any,
) -> Any:
    """Return a request of the front end in block mode."""
    salt = block_salt(SECRET, lengths)
    params = block_params(SECRET, BlockRequest(lengths=tuple(lengths), salt=salt, reply_to=reply_to))
    return make_request(id, prompt, params, **{"salt": salt} | changes)


def step(
    scheduled: Mapping[str, int] | None = None,
    *,
    new: Mapping[str, Sequence[int]] | None = None,
    more: Mapping[str, Sequence[int]] | None = None,
    resumed: Mapping[str, Sequence[int]] | None = None,
) -> Any:
    """Return the output of vLLM's scheduler for one step.

    scheduled: tokens by request. new, more, resumed: pages of new requests, further pages of running
    requests, and the pages of requests after a preemption.
    """
    new, more, resumed = new or {}, more or {}, resumed or {}
    cached = SimpleNamespace(
        req_ids=[*more, *resumed],
        resumed_req_ids=set(resumed),
        new_block_ids=[(list(pages),) if pages else None for pages in (*more.values(), *resumed.values())],
    )
    scheduled = scheduled or {}
    return SimpleNamespace(
        num_scheduled_tokens=dict(scheduled),
        total_num_scheduled_tokens=sum(scheduled.values()),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=id, block_ids=(list(pages),)) for id, pages in new.items()
        ],
        scheduled_cached_reqs=cached,
    )
