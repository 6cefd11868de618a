"""The cost of re-encoding positions alone, as a part of `blockft bench ttft`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from blockft.attention.cached_context import TILE_PADDING
from blockft.bench.measurement import measure_ms
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.device_tier import DeviceTier, use_device
from blockft.inference.rotate_keys import RotatedKeysBatch, prefill_blocks
from blockft.inference.rotate_queries import QueryRotationRunner
from blockft.inference.runner import kv_shape
from blockft.model.decoder_layers import rotary_embeddings

Pass = Callable[[], torch.Tensor]

LABELS = {
    "no_reencoding_ms": "none",
    "rotated_keys_ms": "rotated keys",
    "rotated_queries_ms": "rotated queries",
}
"""The ways to re-encode, in the order of the table's columns."""


@torch.inference_mode()
def reencoding_passes(
    model: PreTrainedModel, keys: Sequence[BlockKey], question: Sequence[int]
) -> dict[str, Pass]:
    """Return the first pass over a prompt, by the way in which blocks move to their positions.

    The blocks are computed here and stay in the memory of the model's device. A pass returns the logits after
    the question: (vocabulary,).

    rotated_keys_ms     the keys of the blocks are rotated and concatenated
    no_reencoding_ms    the same without the rotation. The blocks stay at positions 0..n-1, so the logits are
                        those of a model that was trained without re-encoding
    rotated_queries_ms  the blocks are read where they lie, and the queries are rotated for each block;
                        without CUDA graphs
    """
    is_cuda, shape, rotaries = model.device.type == "cuda", kv_shape(model), rotary_embeddings(model)
    with use_device(model.device):
        blocks = dict(prefill_blocks(model, keys))
        num_bytes = sum(map(num_tokens, blocks)) * shape.token_bytes
        tier = DeviceTier(shape, model.device, num_bytes, TILE_PADDING)
        with tier.add([*blocks], keep=()):
            for key, kv in blocks.items():
                tier.block(key).copy_(kv)
        runner = QueryRotationRunner(model, rotaries, tier, use_triton=is_cuda, use_graphs=False)

    def rotate_keys(reencoded: bool) -> torch.Tensor:
        with use_device(model.device):
            batch = RotatedKeysBatch(model, rotaries, [keys], blocks, reencoded=reencoded)
            return batch.decode_step([question])[0, -1]

    def rotate_queries() -> torch.Tensor:
        return runner.start_batch([keys], len(question)).decode_step([question])[0, -1]

    return {
        "no_reencoding_ms": partial(rotate_keys, False),
        "rotated_keys_ms": partial(rotate_keys, True),
        "rotated_queries_ms": rotate_queries,
    }


def measure_reencoding(
    model: PreTrainedModel, keys: Sequence[BlockKey], question: Sequence[int], warmups: int, runs: int
) -> dict[str, Any]:
    """Measure the passes of `reencoding_passes`: the times of each, as `measure_ms` returns them."""
    passes = reencoding_passes(model, keys, question)
    return {name: measure_ms(partial(_predict, run), warmups, runs) for name, run in passes.items()}


def _predict(run: Pass) -> int:
    """Return the most likely token, for which the host waits until the device has ended."""
    return int(run().argmax())
