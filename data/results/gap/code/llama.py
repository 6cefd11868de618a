"""A Llama whose weights are one flat buffer: masked forward passes and batched greedy decoding.

It computes what `transformers` computes with blockft's attention backends (shown by `test_gap.py`). One
compiled layer serves all layers. Training, evaluation and auxiliary losses read its tensors directly.

Shapes: T tokens of a row, C channels, H query heads, K key/value heads, G = H / K, D head size, B prompts,
S keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from blockft.attention.backends import BACKENDS, BlockMasks


@dataclass(frozen=True, kw_only=True)
class Shape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    rope_theta: float
    norm_eps: float

    def layer_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each layer: norm, query key value, output, norm, gate and up, down."""
        c, f, d = self.hidden_size, self.intermediate_size, self.head_size
        qkv = (self.num_heads + 2 * self.num_kv_heads) * d
        return (c,), (qkv, c), (c, self.num_heads * d), (c,), (2 * f, c), (c, f)

    def shapes(self) -> list[tuple[int, ...]]:
        layers = [shape for _ in range(self.num_layers) for shape in self.layer_shapes()]
        return [(self.vocab_size, self.hidden_size), (self.hidden_size,), *layers]


SMOLLM2 = Shape(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    rope_theta=100_000.0,
    norm_eps=1e-5,
)


class Weights:
    """The tensors of a model as views of one flat buffer, and of their gradients as views of another."""

    def __init__(self, shape: Shape, flat: torch.Tensor, *, trainable: bool = False) -> None:
        self.shape, self.flat = shape, flat
        self.flat_grad = torch.zeros_like(flat) if trainable else None
        tensors, start = [], 0
        for size in shape.shapes():
            numel = torch.Size(size).numel()
            tensor = flat[start : start + numel].view(size)
            if self.flat_grad is not None:
                tensor = tensor.detach().requires_grad_()
                tensor.grad = self.flat_grad[start : start + numel].view(size)
            tensors.append(tensor)
            start += numel
        assert start == flat.numel(), (start, flat.numel())
        self.embedding, self.final_norm, *rest = tensors
        per_layer = len(shape.layer_shapes())
        self.layers = [tuple(rest[i : i + per_layer]) for i in range(0, len(rest), per_layer)]

    @classmethod
    def numel(cls, shape: Shape) -> int:
        return sum(torch.Size(size).numel() for size in shape.shapes())


def rotary(shape: Shape, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (1, 1, T, D) as transformers computes them."""
    exponents = torch.arange(0, shape.head_size, 2, dtype=torch.float32, device=position_ids.device)
    inv_freq = 1.0 / shape.rope_theta ** (exponents / shape.head_size)
    angles = position_ids.float()[:, None, :, None] * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def split_heads(shape: Shape, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(1, T, ...) to queries (1, H, T, D), keys and values (1, K, T, D)."""
    num, kv, d = shape.num_heads, shape.num_kv_heads, shape.head_size
    parts = qkv.split((num * d, kv * d, kv * d), dim=-1)
    return tuple(part.unflatten(-1, (-1, d)).transpose(1, 2) for part in parts)


def layer_forward(
    shape: Shape,
    attend: Callable[..., tuple[torch.Tensor, None]],
    returns_kv: bool,
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    masks: BlockMasks,
    dropout: float = 0.0,
) -> Any:
    """One decoder layer on (1, T, C); with `returns_kv` also its rotated keys and its values (1, K, T, D)."""
    norm, qkv, out, mlp_norm, gate_up, down = weights
    q, k, v = split_heads(shape, F.linear(rms_norm(x, norm, shape.norm_eps), qkv))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    attended, _ = attend(None, q, k, v, None, scaling=shape.head_size**-0.5, block_masks=masks)
    x = x + dropped(F.linear(attended.flatten(-2), out), dropout)
    gate, up = F.linear(rms_norm(x, mlp_norm, shape.norm_eps), gate_up).chunk(2, dim=-1)
    x = x + dropped(F.linear(F.silu(gate) * up, down), dropout)
    return (x, k, v) if returns_kv else x


def dropped(x: torch.Tensor, dropout: float) -> torch.Tensor:
    return F.dropout(x, dropout) if dropout else x


class Llama:
    """Forward passes of `Weights`, by `sdpa` (any device) or `flex` (compiled, GPU)."""

    def __init__(self, shape: Shape, backend: str) -> None:
        self.shape, self.backend = shape, f"block_{backend}"
        compiles = backend == "flex"
        attend = BACKENDS[self.backend]

        # two functions, or the second kind of call would recompile the first
        def plain(*args: Any) -> Any:
            return layer_forward(shape, attend, False, *args)

        def with_kv(*args: Any) -> Any:
            return layer_forward(shape, attend, True, *args)

        self._plain = torch.compile(plain, dynamic=False) if compiles else plain
        self._with_kv = torch.compile(with_kv, dynamic=False) if compiles else with_kv

    def hidden(
        self,
        weights: Weights,
        model_inputs: dict[str, Any],
        *,
        kept_layers: Sequence[int] = (),
        on_kv: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        num_layers: int | None = None,
        dropout: float = 0.0,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The output of the last layer, normed, (T, C), and the inputs of the kept layers (1, T, C)."""
        masks: BlockMasks = model_inputs["block_masks"].build(self.backend, [None])
        cos, sin = rotary(self.shape, model_inputs["position_ids"], weights.flat.dtype)
        x = F.embedding(model_inputs["input_ids"], weights.embedding)
        inputs = {}
        for index, layer in enumerate(weights.layers[:num_layers]):
            if index in kept_layers:
                inputs[index] = x
            if on_kv is None:
                x = self._plain(x, layer, cos, sin, masks, *([dropout] if dropout else []))
            else:
                x, keys, values = self._with_kv(x, layer, cos, sin, masks)
                on_kv(index, keys, values)
        return rms_norm(x, weights.final_norm, self.shape.norm_eps)[0], inputs

    def logits(self, weights: Weights, hidden_NC: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_NC, weights.embedding)

    def query(
        self, weights: Weights, layer: int, x_1NC: torch.Tensor, positions_1N: torch.Tensor
    ) -> torch.Tensor:
        """Rotated queries (1, H, N, D) of a layer's inputs."""
        norm, qkv, *_ = weights.layers[layer]
        rows = self.shape.num_heads * self.shape.head_size
        q = F.linear(rms_norm(x_1NC, norm, self.shape.norm_eps), qkv[:rows])
        q = q.unflatten(-1, (-1, self.shape.head_size)).transpose(1, 2)
        return rotate(q, *rotary(self.shape, positions_1N, q.dtype))

    def keys(
        self, weights: Weights, layer: int, x_1TC: torch.Tensor, positions_1T: torch.Tensor
    ) -> torch.Tensor:
        """Rotated keys (1, K, T, D) of a layer's inputs."""
        norm, qkv, *_ = weights.layers[layer]
        size = self.shape.head_size
        start, rows = self.shape.num_heads * size, self.shape.num_kv_heads * size
        k = F.linear(rms_norm(x_1TC, norm, self.shape.norm_eps), qkv[start : start + rows])
        k = k.unflatten(-1, (-1, size)).transpose(1, 2)
        return rotate(k, *rotary(self.shape, positions_1T, k.dtype))


class Cache:
    """Keys and values of B prompts, padded to S, for decoding with one new token a prompt and step."""

    def __init__(
        self, shape: Shape, num_prompts: int, num_keys: int, dtype: torch.dtype, device: Any
    ) -> None:
        self.shape = shape
        size = (shape.num_layers, num_prompts, num_keys, shape.num_kv_heads, shape.head_size)
        # what is never written is masked, but must not be NaN
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)

    def write(
        self,
        layer: int,
        keys_1KTD: torch.Tensor,
        values_1KTD: torch.Tensor,
        tokens: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Keys and values of a row's `tokens` to the `slots` (prompt * S + place)."""
        for cache, new in ((self.keys, keys_1KTD), (self.values, values_1KTD)):
            cache[layer].flatten(0, 1)[slots] = new[0, :, tokens].transpose(0, 1)

    @torch.no_grad()
    def decode(
        self,
        weights: Weights,
        first_ids_B: torch.Tensor,
        num_keys_B: torch.Tensor,
        positions_B: torch.Tensor,
        max_new_tokens: int,
        end_id: int,
    ) -> torch.Tensor:
        """Greedy answers (B, max_new_tokens) that go on from the first token; `end_id` after their end.

        `num_keys_B` counts the keys of each prompt, `positions_B` is where its first new token stands.
        """
        shape, device = self.shape, self.keys.device
        num_prompts, num_slots = self.keys.shape[1:3]
        group = shape.num_heads // shape.num_kv_heads
        rows = torch.arange(num_prompts, device=device)
        slots = torch.arange(num_slots, device=device)
        ids_B = first_ids_B
        answers = torch.full((num_prompts, max_new_tokens), end_id, dtype=torch.int64, device=device)
        done = torch.zeros(num_prompts, dtype=torch.bool, device=device)
        for step in range(max_new_tokens):
            answers[:, step] = torch.where(done, end_id, ids_B)
            done |= ids_B == end_id
            if step == max_new_tokens - 1 or bool(done.all()):
                break
            place = num_keys_B + step
            cos, sin = rotary(shape, (positions_B + step)[:, None], weights.flat.dtype)
            hidden = (slots[None] > place[:, None])[:, None, None]
            x = F.embedding(ids_B[:, None], weights.embedding)
            for index, (norm, qkv, out, mlp_norm, gate_up, down) in enumerate(weights.layers):
                q, k, v = split_heads(shape, F.linear(rms_norm(x, norm, shape.norm_eps), qkv))
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
                keys, values = self.keys[index], self.values[index]
                keys[rows, place], values[rows, place] = k[:, :, 0], v[:, :, 0]
                q_BKGD = q.reshape(num_prompts, shape.num_kv_heads, group, shape.head_size)
                scores = torch.matmul(q_BKGD, keys.permute(0, 2, 3, 1)).float() * shape.head_size**-0.5
                weights_BKGS = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(x.dtype)
                attended = torch.matmul(weights_BKGS, values.transpose(1, 2)).reshape(num_prompts, 1, -1)
                x = x + F.linear(attended, out)
                gate, up = F.linear(rms_norm(x, mlp_norm, shape.norm_eps), gate_up).chunk(2, dim=-1)
                x = x + F.linear(F.silu(gate) * up, down)
            hidden_BC = rms_norm(x[:, 0], weights.final_norm, shape.norm_eps)
            ids_B = F.linear(hidden_BC, weights.embedding).argmax(-1)
        return answers
