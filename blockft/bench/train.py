"""`blockft bench train`: the speed of training steps, packed rows against one sample at a time."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from blockft.bench.attention import LIMITS
from blockft.bench.target import open_target, target_config
from blockft.bench.timing import measure_ms, measurement_provenance
from blockft.data.collate import collate_row
from blockft.data.encoder import IGNORE_INDEX, Example
from blockft.errors import UserError
from blockft.model.load import compile_layers
from blockft.outputs import check_writable, write_atomic
from blockft.progress import track
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import label_loss

ANSWER_LEN = 32
"""Label tokens at the end of each sample."""


@dataclass(frozen=True, kw_only=True)
class StepVariant:
    """How a step reads its samples: packed into one row, or one after the other."""

    packed: bool
    backend: str
    checkpointing: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        words = ["packed row" if self.packed else "one sample at a time", self.backend]
        words += ["gradient checkpointing"] * self.checkpointing + ["compiled layers"] * self.compiled
        return ", ".join(words)


GPU_VARIANTS = (
    StepVariant(packed=False, backend="sdpa", checkpointing=True),
    StepVariant(packed=False, backend="sdpa"),
    StepVariant(packed=True, backend="flex", checkpointing=True),
    StepVariant(packed=True, backend="flex"),
    StepVariant(packed=True, backend="flex", compiled=True),
)
"""The first is how the trainer released with the paper runs; compiled layers come last, for they stay so."""

CPU_VARIANTS = (*GPU_VARIANTS[:2], StepVariant(packed=True, backend="sdpa"))
"""FlexAttention has no backward pass on a CPU."""


def bench_train(
    target: str,
    *,
    row_len: int,
    sample_len: int,
    num_documents: int,
    warmups: int,
    runs: int,
    out: Path | None,
) -> None:
    """Time whole steps (forward, backward, AdamW) of a model, or of random weights of a shape, side by side.

    Every way reads the same samples of random tokens, as many as fit a row, into one step. The optimizer's
    learning rate is 0, so that each must find the same loss.

    Raises:
        UserError: no such model or shape, or too little memory for it; a sample too short for its documents,
            or too long for a row or the model; a file that cannot be written.
        RuntimeError: the losses disagree.
    """
    if out:
        check_writable(out)
    if sample_len > row_len:
        raise UserError(f"--sample-len is {sample_len}, a row has {row_len}")
    if sample_len < num_documents + 2 * ANSWER_LEN:
        raise UserError(
            f"--sample-len {sample_len} is too short for {num_documents} documents, "
            f"a question and an answer of {ANSWER_LEN} tokens each"
        )
    config = target_config(target)
    if sample_len > (positions := config.max_position_embeddings):
        raise UserError(f"--sample-len is {sample_len}, {target} has {positions} positions")
    # beside each weight its gradient and AdamW's two moments
    model = open_target(target, config, copies=4).train()
    samples = _samples(row_len // sample_len, sample_len, num_documents, model.config.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    ways = GPU_VARIANTS if model.device.type == "cuda" else CPU_VARIANTS
    lines = [
        {**asdict(way), **_measure(model, optimizer, samples, way, row_len, warmups, runs)}
        for way in track(ways, "ways")
    ]
    table = Table("a step reads", "tokens/s", "ratio", "ms", "loss", "peak GiB", title=f"{target}: training")
    first = lines[0]["tokens_per_s"]
    for way, line in zip(ways, lines, strict=True):
        line["ratio"] = line["tokens_per_s"] / first
        peak = line["peak_bytes"]
        table.add_row(
            str(way),
            f"{line['tokens_per_s']:,.0f}",
            f"{line['ratio']:.2f}",
            f"{line['ms']['median']:,.1f}",
            f"{line['loss']:.4f}",
            "" if peak is None else f"{peak / 2**30:.1f}",
        )
    Console().print(table)
    if out:
        settings = {
            "model": target,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "row_len": row_len,
            "sample_len": sample_len,
            "samples": len(samples),
            "num_documents": num_documents,
            "warmups": warmups,
        }
        write_atomic(
            out, json.dumps(measurement_provenance() | settings | {"measured": lines}, indent=2) + "\n"
        )
    for way, line in zip(ways, lines, strict=True):
        # not even itself equals a loss that is no number
        if not abs(line["loss"] - lines[0]["loss"]) <= LIMITS[model.dtype] * lines[0]["loss"]:
            raise RuntimeError(f"{way}: the loss is {line['loss']}, of {ways[0]} it is {lines[0]['loss']}")


def _samples(number: int, length: int, num_documents: int, vocab_size: int) -> list[Example]:
    """Random tokens in equal documents; the final block is a question and an answer of as many tokens."""
    rng = np.random.default_rng(0)
    documents = np.diff(np.linspace(0, length - 2 * ANSWER_LEN, num_documents + 1).astype(int)).tolist()
    samples = []
    for _ in range(number):
        ids = rng.integers(vocab_size, size=length, dtype=np.int32)
        labels = np.where(np.arange(length) >= length - ANSWER_LEN, ids, np.int32(IGNORE_INDEX))
        samples.append(Example(input_ids=ids, labels=labels, block_lengths=(*documents, 2 * ANSWER_LEN)))
    return samples


def _measure(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    samples: list[Example],
    way: StepVariant,
    row_len: int,
    warmups: int,
    runs: int,
) -> dict[str, Any]:
    model.set_attn_implementation(f"block_{way.backend}")
    with warnings.catch_warnings():
        # their new names are younger than the oldest transformers that is supported
        warnings.simplefilter("ignore", FutureWarning)
        if way.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
    if way.compiled:
        compile_layers(model)
    groups = [samples] if way.packed else [[sample] for sample in samples]
    rows = [
        collate_row([(sample, "block") for sample in group], row_len if way.packed else len(group[0]), 0)
        for group in groups
    ]
    rows = [{name: tensor.to(model.device) for name, tensor in row.items()} for row in rows]
    num_labels, num_tokens = ANSWER_LEN * len(samples), sum(map(len, samples))
    loss = 0.0

    def step() -> None:
        nonlocal loss
        total = torch.zeros((), device=model.device)
        for row in rows:
            outputs = model(**build_model_inputs(row, model.config))
            part = label_loss(outputs, row["shift_labels"][None], num_labels)
            part.backward()
            total += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        loss = float(total)  # waits for the device

    is_cuda = model.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = measure_ms(step, warmups, runs)
    return {
        "ms": times,
        "tokens_per_s": 1000 * num_tokens / times["median"],
        "loss": loss,
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
    }
