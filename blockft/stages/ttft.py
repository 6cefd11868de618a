"""`blockft bench ttft`: the time to the first token of full prefill against cached blocks, side by side.

L tokens are a prompt: its context in blocks, and a question at the end.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from blockft.attention.backends import BlockMasks
from blockft.attention.layout import Layout, lay_out
from blockft.errors import UserError
from blockft.inference.block import Key, key_of
from blockft.inference.runner import BlockRunner, CacheOptions, kv_shape
from blockft.model.load import load_model
from blockft.model.shape import SHAPES, random_model, shape_config
from blockft.rundir import write_whole
from blockft.stages.bench import provenance
from blockft.stages.timing import copy_bandwidth, times_of
from blockft.stages.ttft_report import draw, print_table

PREFILLS = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "default": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""The stock kernels of full attention, two for GPUs; the faster one counts."""

CHECK_LEN = 4096
"""The longest prompt that is compared with the masked forward, whose mask is dense."""


def bench_ttft(
    target: str,
    *,
    lengths: Sequence[int],
    question_len: int,
    block_len: int,
    tiers: Sequence[str],
    warmups: int,
    runs: int,
    folder: Path | None,
    compile: bool,
    out: Path | None,
    png: Path | None,
) -> None:
    """Measure a model, or random weights of a shape, and print a table; JSON to `out`, a picture to `png`.

    Tiers: device, host, disk (a temporary folder in `folder`, or where such folders go) and none, which
    encodes every block. Before each run the tiers nearer than the one measured are emptied.

    Raises:
        UserError: no such model or shape, or lengths that do not hold the question or exceed the model.
    """
    if {"none", "disk"} <= set(tiers):
        raise UserError("--tiers none encodes every block, which a disk would know: measure it without disk")
    if folder and not folder.is_dir():
        raise UserError(f"--folder {folder} is no folder")
    if lost := [file for file in (out, png) if file and not file.parent.is_dir()]:
        raise UserError(f"{lost[0]} cannot be written: there is no folder {lost[0].parent}")
    if min(lengths) <= question_len:
        raise UserError(
            f"--lengths has {min(lengths)}, which does not hold a question of {question_len} tokens"
        )
    model = _model(target)
    if max(lengths) > (limit := model.config.max_position_embeddings):
        raise UserError(f"--lengths has {max(lengths)}, the model has {limit} positions")
    is_cuda = model.device.type == "cuda"
    bandwidth = copy_bandwidth(model.device)
    stream = torch.randint(
        model.config.vocab_size, (max(lengths),), generator=torch.Generator().manual_seed(0)
    )
    prompts = [_Prompt(stream[:length].numpy(), question_len, block_len) for length in sorted(lengths)]
    with tempfile.TemporaryDirectory(dir=folder, prefix="blockft-ttft-") as disk:
        room = max(lengths) * kv_shape(model).token_bytes
        options = CacheOptions(
            folder=Path(disk) if "disk" in tiers else None, host_bytes=2 * room, device_bytes=room + 2**20
        )
        lines = [{"length": prompt.length, **_facts(prompt, model, bandwidth)} for prompt in prompts]
        # full prefill first: compiled layers and caches are none of its business
        for line, prompt in zip(lines, prompts, strict=True):
            line["full_ms"] = _full(model, prompt, warmups, runs)
            _say(line)
        short = [prompt for prompt in prompts if prompt.length <= CHECK_LEN][-1:]
        masked = [(prompt, _masked_logits(model, prompt)) for prompt in short]
        runner = BlockRunner(model, name=target, cache=options, compile=compile and is_cuda)
        agreement = [_agreement(runner, prompt, logits) for prompt, logits in masked]
        for line, prompt in zip(lines, prompts, strict=True):
            for tier in tiers:
                line[f"{tier}_ms"] = _cached(runner, prompt, tier, warmups, runs)
            if is_cuda and "host" in tiers:
                line["bare_copy_ms"] = _bare_copy(runner, prompt, warmups, runs)
            _conclude(line)
            _say(line)
        result = provenance() | {
            "model": target,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "block_len": block_len,
            "question_len": question_len,
            "warmups": warmups,
            "runs": runs,
            "compiled": compile and is_cuda,
            "copy_bandwidth_gb_s": bandwidth / 1e9,
            "agreement": agreement,
            "measured": lines,
        }
    print_table(target, lines)
    if out:
        write_whole(out, json.dumps(result, indent=2) + "\n")
    if png:
        draw(target, lines, png)


def read_lengths(text: str) -> list[int]:
    """Lengths separated by commas.

    Raises:
        UserError: one is no number.
    """
    words = [word.strip() for word in text.split(",")]
    if bad := [word for word in words if not word.isdecimal()]:
        raise UserError(f"--lengths has {bad[0]!r}, it should be numbers separated by commas")
    return [int(word) for word in words]


def read_tiers(text: str) -> list[str]:
    """Tiers separated by commas; all that there are, if there is none.

    Raises:
        UserError: an unknown one, or the device where there is no GPU.
    """
    there = ["device", "host", "disk"] if torch.cuda.is_available() else ["host", "disk"]
    tiers = [word.strip() for word in text.split(",")] if text else there
    if unknown := [tier for tier in tiers if tier not in (*there, "none")]:
        raise UserError(f"--tiers has {unknown[0]!r}, here there are {', '.join(there)} and none")
    return tiers


class _Prompt:
    """A prompt's token ids on the host: blocks of at most `block_len` tokens, then the question."""

    def __init__(self, ids: np.ndarray, question_len: int, block_len: int) -> None:
        self.ids, self.length, self.question = ids, len(ids), ids[len(ids) - question_len :].tolist()
        context = ids[: len(ids) - question_len].astype("<i4")
        self.blocks = [context[i : i + block_len] for i in range(0, len(context), block_len)]

    def keys(self) -> list[Key]:
        return [key_of(block) for block in self.blocks]

    @property
    def layout(self) -> Layout:
        return Layout((*map(len, self.blocks), len(self.question)))


def _model(target: str) -> PreTrainedModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if target in SHAPES or not Path(target).exists() and "/" not in target:
        return random_model(shape_config(target), device=device, dtype=dtype)
    return load_model(target, backend="cached", dtype=dtype).to(device)  # type: ignore[arg-type]


def _facts(prompt: _Prompt, model: PreTrainedModel, bandwidth: float) -> dict[str, Any]:
    """What follows from the numbers of tokens and parameters alone (Ma et al. 2025, table 2)."""
    length, asked, config = prompt.length, len(prompt.question), model.config
    # the rows of the embedding are looked up, not read, unless they are the output's too
    num_read = model.num_parameters(exclude_embeddings=not config.tie_word_embeddings)
    weight_bytes = num_read * model.dtype.itemsize
    cache_bytes = (length - asked) * kv_shape(model).token_bytes
    # QK and PV are two products of two operations for each pair of tokens, head and dimension
    per_pair = 4 * config.num_hidden_layers * config.num_attention_heads * kv_shape(model).head_size
    own = asked * (asked + 1) / 2
    full_flops = 2 * model.num_parameters() * length + per_pair * length * (length + 1) / 2
    block_flops = 2 * model.num_parameters() * asked + per_pair * (asked * (length - asked) + own)
    return {
        "num_blocks": len(prompt.blocks),
        "flops_saved_percent": 100 * (1 - asked / length),
        "flops_saved_with_attention_percent": 100 * (1 - block_flops / full_flops),
        "bytes_moved": weight_bytes + cache_bytes,
        "floor_ms": (weight_bytes + cache_bytes) / bandwidth * 1000,
    }


def _full(model: PreTrainedModel, prompt: _Prompt, warmups: int, runs: int) -> dict[str, Any]:
    """Full prefill by the stock kernel that a few runs show to be the fastest."""

    def prefill() -> int:
        ids = torch.from_numpy(prompt.ids)[None].to(model.device)
        logits = model(input_ids=ids, use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def measure(kernel: str, warmups: int, runs: int) -> dict[str, Any]:
        with torch.inference_mode(), sdpa_kernel(PREFILLS[kernel]):
            return times_of(prefill, warmups, runs)

    model.set_attn_implementation("sdpa")
    there = [name for name in PREFILLS if (name == "default") == (model.device.type != "cuda")]
    tried = {name: measure(name, 2, 3)["median"] for name in there}
    kernel = min(tried, key=tried.__getitem__)
    measured = measure(kernel, warmups, runs)
    model.set_attn_implementation("block_cached")
    return measured | {"kernel": kernel, "kernels_tried": tried}


def _cached(runner: BlockRunner, prompt: _Prompt, tier: str, warmups: int, runs: int) -> dict[str, Any]:
    """Cached blocks of one tier; the blocks are put there first."""
    store = runner.store

    def prefill() -> int:
        begun = runner.begin([prompt.keys()], [prompt.question], 1)
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
        runner.encode(prompt.keys())
        store.flush()
        runner.begin([prompt.keys()], [prompt.question], 1)  # what is on the disk alone comes nearer
    return times_of(prefill, warmups, runs, before=forget)


def _bare_copy(runner: BlockRunner, prompt: _Prompt, warmups: int, runs: int) -> dict[str, Any]:
    """The blocks of the host tier copied to the device, each at once, and nothing else."""
    store = runner.store
    runner.encode(prompt.keys())
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

    return times_of(copy, warmups, runs)


@torch.inference_mode()
def _masked_logits(model: PreTrainedModel, prompt: _Prompt) -> dict[str, torch.Tensor]:
    """The logits after the question of a forward pass under the block mask, by backend: (vocabulary,)."""
    vectors = lay_out([prompt.layout]).to(model.device)
    ids = torch.from_numpy(prompt.ids)[None].to(model.device)
    logits = {}
    for backend in ("sdpa", "flex") if model.device.type == "cuda" else ("sdpa",):
        model.set_attn_implementation(f"block_{backend}")
        out = model(
            input_ids=ids,
            position_ids=vectors.position_ids,
            block_masks=BlockMasks(vectors),
            use_cache=False,
            logits_to_keep=1,
        )
        logits[backend] = out.logits[0, -1].float()
    model.set_attn_implementation("block_cached")
    return logits


def _agreement(runner: BlockRunner, prompt: _Prompt, masked: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far logits over cached blocks are from the masked forward's, in parts of their norm.

    Two backends of the masked forward say how much of that is rounding.
    """
    want = masked["sdpa"]
    others = {"cached": runner.begin([prompt.keys()], [prompt.question], 1).logits[0].float()}
    others |= {f"masked_{name}": logits for name, logits in masked.items() if name != "sdpa"}
    errors = {f"{name}_to_masked_sdpa": float((x - want).norm() / want.norm()) for name, x in others.items()}
    return {"length": prompt.length, **errors}


def _conclude(line: dict[str, Any]) -> None:
    nearest = line.get("device_ms") or line.get("host_ms")
    if nearest:
        line["ttft_saved_percent"] = 100 * (1 - nearest["median"] / line["full_ms"]["median"])
        line["ratio_to_floor"] = nearest["median"] / line["floor_ms"]
    if "bare_copy_ms" in line and "host_ms" in line:
        line["host_ratio_to_copy"] = line["host_ms"]["median"] / line["bare_copy_ms"]["median"]


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), file=sys.stderr, flush=True)
