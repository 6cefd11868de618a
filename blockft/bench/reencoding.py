"""The cost of re-encoding positions alone, as a part of `blockft bench ttft`.

Shapes: T query tokens, S key tokens, N blocks, n tokens of a block, L layers, H query heads, K key/value
heads, D head size, R rotated dimensions of a head (R <= D).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import PreTrainedModel

from blockft.attention.backends import COMPILE_OPTIONS, AttentionMasks
from blockft.attention.cached_context import TILE_PADDING
from blockft.attention.layout import Layout, build_metadata
from blockft.attention.rope import RotaryEmbedding, rotate
from blockft.bench.measurement import measure_device_ms, measure_ms
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.cuda_graph import capture_graph
from blockft.inference.device_tier import DeviceTier, use_device
from blockft.inference.rotate_keys import prefill_blocks
from blockft.inference.rotate_queries import MAX_GRAPH_TOKENS, QueryRotationRunner
from blockft.inference.runner import kv_shape
from blockft.model.decoder_layers import rotary_embeddings

Pass = Callable[[], torch.Tensor]
"""Runs a forward pass and returns the logits after the question: (vocabulary,). The next run overwrites
them."""

LABELS = {
    "no_reencoding_ms": "none",
    "rotated_keys_ms": "rotated keys",
    "rotated_queries_ms": "rotated queries",
}
"""The ways to re-encode, in the order of the table's columns."""


@torch.inference_mode()
def reencoding_passes(
    model: PreTrainedModel,
    keys: Sequence[BlockKey],
    question: Sequence[int],
    *,
    use_graphs: bool,
    is_compiled: bool = False,
) -> dict[str, Pass]:
    """Return the first pass over a prompt, by the way in which blocks move to their positions.

    The blocks are computed here and stay in the memory of the model's device. The passes differ in the
    attention over them alone:

    rotated_queries_ms  as the engine: the blocks are read where they lie, and the queries are rotated for
                        each block
    no_reencoding_ms    each layer copies its blocks one after the other and attends to the copy. The blocks
                        stay at positions 0..n-1, so the logits are those of a model that was trained without
                        re-encoding
    rotated_keys_ms     the same, and the keys of the copy are rotated to their positions

    use_graphs   record each pass in a CUDA graph, as the engine does: not for questions of more than
                 `MAX_GRAPH_TOKENS` tokens
    is_compiled  the layers of the model are compiled. Then the rotation of keys is compiled, too
    """
    rotaries = rotary_embeddings(model)
    with use_device(model.device):
        tier = _filled_tier(model, keys, is_compiled)
        runner = QueryRotationRunner(
            model,
            rotaries,
            tier,
            use_triton=model.device.type == "cuda",
            use_graphs=use_graphs,
            eager_context=lambda: _eager(is_compiled),
        )
        batch = runner.start_batch([keys], len(question))
        batch.decode_step([question])
        num_queries = runner.padded_len(1, len(question))

    def rotate_queries() -> torch.Tensor:
        assert batch.inputs
        with use_device(model.device), torch.inference_mode():
            return runner.run(batch.inputs)[0, -1]

    passes: dict[str, Pass] = {"rotated_queries_ms": rotate_queries}
    for name, moves_keys in (("no_reencoding_ms", False), ("rotated_keys_ms", True)):
        copying = _CopyingPass(
            model, [tier.block(key) for key in keys], question, num_queries, moves_keys, is_compiled
        )
        is_captured = use_graphs and num_queries <= MAX_GRAPH_TOKENS
        passes[name] = copying.capture() if is_captured else copying.run_eagerly
    return {name: passes[name] for name in LABELS}


def measure_reencoding(
    model: PreTrainedModel,
    keys: Sequence[BlockKey],
    question: Sequence[int],
    warmups: int,
    runs: int,
    *,
    is_compiled: bool,
) -> dict[str, Any]:
    """Measure the passes of `reencoding_passes`: the times of each, as `measure_ms` returns them.

    On a GPU the passes are CUDA graphs, and the time is that of the device: from the first kernel to the last
    one, without the host's work before the pass and without the choice of the first token. On a CPU it is the
    time of the forward pass.
    """
    is_cuda = model.device.type == "cuda"
    passes = reencoding_passes(model, keys, question, use_graphs=is_cuda, is_compiled=is_compiled)
    measure = measure_device_ms if is_cuda else measure_ms
    with use_device(model.device):
        return {name: measure(run, warmups, runs) for name, run in passes.items()}


def describe_reencoding_times(device: torch.device) -> str:
    """Return what the measured times count, as the caption of their table."""
    times = "time of the device for the CUDA graph" if device.type == "cuda" else "time"
    return (
        f"{times} of the first pass over blocks in the device's memory. none: each layer copies its blocks "
        "into one sequence, every block at positions 0 to n-1; rotated keys: the same, and the copied keys "
        "are rotated; rotated queries: no copies, as the engine"
    )


@dataclass(frozen=True, kw_only=True)
class CopiedContextAttention:
    """Attention of one question over a copy of its context; every layer calls it (see `backends`).

    blocks           the cached blocks of the context, in its order: (L, n, 2, K, D) each
    copy_LS2KD       receives the keys and values of the context and, after them, those of the question
    layer_rotations  per layer the cosines and sines that move keys to their positions: (S, 1, R / 2) each.
                     None leaves keys at their positions in their block
    rotate_in_place  rotates keys by cosines and sines
    masks            which keys the question attends to, for layers with a sliding window
    num_padding      query tokens before the question; their output is 0
    """

    blocks: Sequence[torch.Tensor]
    copy_LS2KD: torch.Tensor
    layer_rotations: Sequence[tuple[torch.Tensor, torch.Tensor]] | None
    rotate_in_place: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    masks: AttentionMasks
    num_padding: int

    def attend(
        self,
        layer: int,
        q_BHTD: torch.Tensor,
        keys_BKTD: torch.Tensor,
        values_BKTD: torch.Tensor,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """Copy the context, append the question, then return the attention output: (1, T, H, D)."""
        copy_S2KD, q_BHTD = self.copy_LS2KD[layer], q_BHTD[:, :, self.num_padding :]
        question_len = q_BHTD.shape[2]
        context_S2KD, question_S2KD = copy_S2KD[:-question_len], copy_S2KD[-question_len:]
        torch.cat([block[layer] for block in self.blocks], out=context_S2KD)
        if self.layer_rotations:
            self.rotate_in_place(context_S2KD[:, 0], *self.layer_rotations[layer])
        for i, new_BKTD in enumerate((keys_BKTD, values_BKTD)):
            question_S2KD[:, i] = new_BKTD[0, :, self.num_padding :].transpose(0, 1)
        keys_BKSD, values_BKSD = copy_S2KD.permute(1, 2, 0, 3)[:, None]
        # FlashAttention takes no dense mask, and computes in 16 bits
        is_flash = window is None and q_BHTD.is_cuda and q_BHTD.dtype.itemsize == 2
        mask: Any = (
            causal_lower_right(question_len, len(copy_S2KD))
            if is_flash
            else self.masks.dense(window, question_len)
        )
        out_BHTD = torch.nn.functional.scaled_dot_product_attention(
            q_BHTD, keys_BKSD, values_BKSD, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return torch.nn.functional.pad(out_BHTD.transpose(1, 2), (0, 0, 0, 0, self.num_padding, 0))


class _CopyingPass:
    """A first pass over a copy of the blocks; see `reencoding_passes`."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[torch.Tensor],
        question: Sequence[int],
        num_queries: int,
        moves_keys: bool,
        is_compiled: bool,
    ) -> None:
        self._model, self._blocks, self._is_compiled = model, blocks, is_compiled
        self._moves_keys, self._rotaries = moves_keys, rotary_embeddings(model)
        device, lengths = model.device, [block.shape[1] for block in blocks]
        layout = Layout((*lengths, len(question)))
        self._num_padding = num_queries - len(question)
        self._masks = AttentionMasks(build_metadata([layout], reencoded=moves_keys).to(device))
        ids = torch.tensor([[0] * self._num_padding + list(question)])
        positions = layout.context_len - self._num_padding + torch.arange(num_queries)[None]
        self._ids, self._positions = ids.to(device), positions.clamp(min=0).to(device)
        offsets = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        self._offsets_N = offsets.to(device)
        self._block_S = torch.arange(len(blocks)).repeat_interleave(torch.tensor(lengths)).to(device)
        self._copy_LS2KD = blocks[0].new_empty((len(blocks[0]), layout.num_tokens, *blocks[0].shape[2:]))
        self._rotate_in_place = (
            torch.compile(_rotate_in_place, **COMPILE_OPTIONS) if is_compiled else _rotate_in_place
        )

    def capture(self) -> Pass:
        """Return the pass as a CUDA graph."""
        graph, logits = capture_graph(self._forward)

        def replay() -> torch.Tensor:
            with use_device(self._model.device):
                graph.replay()
            return logits

        return replay

    def run_eagerly(self) -> torch.Tensor:
        """Run the pass without a CUDA graph and without compiled layers."""
        with use_device(self._model.device), torch.inference_mode(), _eager(self._is_compiled):
            return self._forward()

    def _forward(self) -> torch.Tensor:
        layer_rotations = None
        if self._moves_keys:
            different = {id(rotary): rotary for rotary in self._rotaries}
            rotations = {key: self._rotation(rotary) for key, rotary in different.items()}
            layer_rotations = [rotations[id(rotary)] for rotary in self._rotaries]
        attention = CopiedContextAttention(
            blocks=self._blocks,
            copy_LS2KD=self._copy_LS2KD,
            layer_rotations=layer_rotations,
            rotate_in_place=self._rotate_in_place,
            masks=self._masks,
            num_padding=self._num_padding,
        )
        logits: torch.Tensor = self._model(
            input_ids=self._ids,
            position_ids=self._positions,
            cached_attention=attention,
            use_cache=False,
            logits_to_keep=1,
        ).logits
        return logits[0, -1]

    def _rotation(self, rotary: RotaryEmbedding) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cosines and sines that move keys to their positions: (S, 1, R / 2) each."""
        cos, sin = rotary.cos_sin(self._offsets_N, self._offsets_N.device)
        return cos[self._block_S, None], sin[self._block_S, None]


def _rotate_in_place(keys_SKD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    keys_SKD.copy_(rotate(keys_SKD, cos, sin))


def _filled_tier(model: PreTrainedModel, keys: Sequence[BlockKey], is_compiled: bool) -> DeviceTier:
    """Return a device tier that holds these blocks, computed now, and has no room for more."""
    shape, different = kv_shape(model), [*dict.fromkeys(keys)]
    num_bytes = sum(map(num_tokens, different)) * shape.token_bytes
    tier = DeviceTier(shape, model.device, num_bytes, TILE_PADDING)
    with tier.add(different, keep=()), _eager(is_compiled):
        for key, kv in prefill_blocks(model, different):
            tier.block(key).copy_(kv)
    return tier


def _eager(is_compiled: bool) -> AbstractContextManager[Any]:
    """Return a context in which compiled layers run uncompiled, as blocks have many different lengths."""
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
