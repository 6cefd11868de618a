"""What `blockft bench ttft` runs: full prefill, cached blocks, bare copies, and how near their logits are."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from blockft.bench.timing import measure_ms
from blockft.bench.ttft_prompt import Prompt
from blockft.inference.runner import BlockRunner
from blockft.model.masked_forward import masked_logits

PREFILLS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "default": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""The stock kernels of full attention, two for GPUs; the faster one counts."""


def measure_full_prefill(model: PreTrainedModel, prompt: Prompt, warmups: int, runs: int) -> dict[str, Any]:
    """Full prefill by the stock kernel that a few runs show to be the fastest."""

    def prefill() -> int:
        ids = torch.from_numpy(prompt.ids)[None].to(model.device)
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def measure(kernel: str, warmups: int, runs: int) -> dict[str, Any]:
        with torch.inference_mode(), sdpa_kernel(PREFILLS[kernel]):
            return measure_ms(prefill, warmups, runs)

    model.set_attn_implementation("sdpa")
    there = [name for name in PREFILLS if (name == "default") == (model.device.type != "cuda")]
    tried = {name: measure(name, 2, 3)["median"] for name in there}
    kernel = min(tried, key=tried.__getitem__)
    measured = measure(kernel, warmups, runs)
    model.set_attn_implementation("block_cached")
    return measured | {"kernel": kernel, "kernels_tried": tried}


def measure_cached(runner: BlockRunner, prompt: Prompt, tier: str, warmups: int, runs: int) -> dict[str, Any]:
    """Cached blocks of one tier; the blocks are put there first."""
    store = runner.store

    def prefill() -> int:
        begun = runner.prefill([prompt.keys()], [prompt.question], 1)
        found = [at.tier.value for at in begun.found.values()]
        assert found == ([] if tier == "none" else [tier] * len(set(prompt.keys()))), found
        return int(begun.logits[0].argmax())

    def forget() -> None:
        if store.device is not None and tier != "device":
            store.device.clear()
        if tier in ("disk", "none"):
            store.host.clear()

    forget()
    if tier != "none":
        runner.prefill_blocks(prompt.keys())
        store.flush()
        runner.prefill([prompt.keys()], [prompt.question], 1)  # what is on the disk alone comes nearer
    return measure_ms(prefill, warmups, runs, before=forget)


def measure_bare_copy(runner: BlockRunner, prompt: Prompt, warmups: int, runs: int) -> dict[str, Any]:
    """The blocks of the host tier copied to the device, each at once, and nothing else."""
    store = runner.store
    runner.prefill_blocks(prompt.keys())
    store.load({})
    blocks = [store.on_host(key) for key in dict.fromkeys(prompt.keys())]
    room = torch.empty(
        sum(map(torch.Tensor.numel, blocks)), dtype=blocks[0].dtype, device=runner.model.device
    )

    def copy() -> None:
        start = 0
        for block in blocks:
            room[start : start + block.numel()].copy_(block.view(-1), non_blocking=True)
            start += block.numel()
        torch.cuda.synchronize()

    return measure_ms(copy, warmups, runs)


@torch.inference_mode()
def masked_by_backend(model: PreTrainedModel, prompt: Prompt) -> dict[str, torch.Tensor]:
    """The logits after the question of a forward pass under the block mask, by backend: (vocabulary,)."""
    logits = {}
    for backend in ("sdpa", "flex") if model.device.type == "cuda" else ("sdpa",):
        model.set_attn_implementation(f"block_{backend}")
        logits[backend] = masked_logits(model, torch.from_numpy(prompt.ids), [prompt.layout], 1)[0].float()
    model.set_attn_implementation("block_cached")
    return logits


def agreement(runner: BlockRunner, prompt: Prompt, masked: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far logits over cached blocks are from the masked forward's, in parts of their norm.

    Two backends of the masked forward say how much of that is rounding.
    """
    want = masked["sdpa"]
    others = {"cached": runner.prefill([prompt.keys()], [prompt.question], 1).logits[0].float()}
    others |= {f"masked_{name}": logits for name, logits in masked.items() if name != "sdpa"}
    errors = {f"{name}_to_masked_sdpa": float((x - want).norm() / want.norm()) for name, x in others.items()}
    return {"length": prompt.length, **errors}
