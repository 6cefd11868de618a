"""SmolLM2's GGUF file in two parts for a machine that takes few bytes a call, and back to one flat tensor.

python model_file.py MODEL.gguf OUT     writes OUT/part1/weights.pt and OUT/part2/weights.pt

The quantised blocks travel as they are (Q4_1: 20 bytes for 32 weights, Q8_0: 34) and are dequantised on the
device to exactly the bfloat16 weights that `transformers` reads from the file (shown by `test_gap.py`).
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama import SMOLLM2, Shape

PART_BYTES = 48_000_000


def main(gguf: Path, out: Path) -> None:
    from gguf import GGUFReader

    tensors = {t.name: (t.tensor_type.name, np.array(t.data)) for t in GGUFReader(str(gguf)).tensors}
    names = ["token_embd.weight", "output_norm.weight"]
    for layer in range(SMOLLM2.num_layers):
        for name in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm"):
            names.append(f"blk.{layer}.{name}.weight")
        names += [f"blk.{layer}.{name}.weight" for name in ("ffn_gate", "ffn_up", "ffn_down")]
    entries = []
    for name in names:
        kind, values = tensors[name]
        for part, num_heads in (("attn_q", SMOLLM2.num_heads), ("attn_k", SMOLLM2.num_kv_heads)):
            if part in name:
                # llama.cpp interleaves the halves of a head that RoPE turns together
                values = (
                    values.reshape(num_heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
                )
        entries.append((kind, torch.from_numpy(np.ascontiguousarray(values))))
    sizes = np.cumsum([values.nbytes for _, values in entries])
    cut = int(np.searchsorted(sizes, PART_BYTES))
    for part, some in (("part1", entries[:cut]), ("part2", entries[cut:])):
        (out / part).mkdir(parents=True, exist_ok=True)
        torch.save(some, out / part / "weights.pt")


def load_flat(folder: Path, device: torch.device) -> torch.Tensor:
    """The weights of SmolLM2 as `Weights` has them, in bfloat16."""
    entries: list[Any] = torch.load(folder / "part1/weights.pt") + torch.load(folder / "part2/weights.pt")
    flat = torch.cat([dequantised(kind, values.to(device)).flatten() for kind, values in entries])
    return flat.to(torch.bfloat16)


def dequantised(kind: str, values: torch.Tensor) -> torch.Tensor:
    if kind == "F32":
        return values
    if kind == "Q8_0":
        blocks = values.view(-1, 34)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        return blocks[:, 2:].contiguous().view(torch.int8).float() * scale
    assert kind == "Q4_1", kind
    blocks = values.view(-1, 20)
    scale, minimum = (blocks[:, i : i + 2].contiguous().view(torch.float16).float() for i in (0, 2))
    packed = blocks[:, 4:]
    return torch.cat([packed & 15, packed >> 4], dim=1).float() * scale + minimum


def random_flat(shape: Shape, seed: int = 0) -> torch.Tensor:
    """Weights for a rehearsal."""
    from llama import Weights

    generator = torch.Generator().manual_seed(seed)
    weights = Weights(shape, torch.randn(Weights.numel(shape), generator=generator) * 0.05)
    for norm in (weights.final_norm, *(layer[i] for layer in weights.layers for i in (0, 3))):
        norm.fill_(1.0)
    return weights.flat


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
