"""`blockft bench train`: the speed of training steps, packed rows compared with one sample at a time.

With an adapter, compiled layers are compared with and without shared products of the adapters, too.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedConfig, PreTrainedModel

from blockft.attention.pairs import LayoutArrays
from blockft.bench.attention import MAX_RELATIVE_ERROR
from blockft.bench.benchmark_model import load_benchmark_config, load_benchmark_model
from blockft.bench.measurement import measure_ms, write_measurement
from blockft.console import PlainConsole
from blockft.data.collate import collate_row
from blockft.data.encoder import Example
from blockft.errors import UserError
from blockft.model.decoder_layers import compile_layers
from blockft.model.gradient_checkpointing import checkpoint_layers
from blockft.model.lora import add_adapter
from blockft.model.shared_input import share_products
from blockft.outputs import check_writable
from blockft.progress import track
from blockft.training.flops import ModelFlops
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import label_loss
from blockft.training.peak_flops import find_peak_flops

ANSWER_LEN = 32
"""Label tokens at the end of each sample."""


@dataclass(frozen=True, kw_only=True)
class StepVariant:
    """How a training step reads its samples: packed into one row, or one after the other."""

    packed: bool
    backend: str
    checkpointing: bool = False
    compiled: bool = False
    shared_products: bool = False

    def __str__(self) -> str:
        parts = ["packed row" if self.packed else "one sample at a time", self.backend]
        parts += ["gradient checkpointing"] * self.checkpointing + ["compiled layers"] * self.compiled
        parts += ["shared products"] * self.shared_products
        return ", ".join(parts)


GPU_VARIANTS = (
    StepVariant(packed=False, backend="sdpa", checkpointing=True),
    StepVariant(packed=False, backend="sdpa"),
    StepVariant(packed=True, backend="flex", checkpointing=True),
    StepVariant(packed=True, backend="flex"),
    StepVariant(packed=True, backend="flex", checkpointing=True, compiled=True),
    StepVariant(packed=True, backend="flex", compiled=True),
)
"""The first variant is that of the trainer released with the paper. The compiled ones come last because
layers stay compiled."""

CPU_VARIANTS = (*GPU_VARIANTS[:2], StepVariant(packed=True, backend="sdpa"))
"""Without flex: FlexAttention has no backward pass on a CPU."""


def list_variants(device: torch.device, lora_r: int | None) -> tuple[StepVariant, ...]:
    """Return the variants for a device, with or without an adapter. Products that are shared stay shared."""
    variants = GPU_VARIANTS if device.type == "cuda" else CPU_VARIANTS
    if lora_r is None:
        return variants
    return (*variants, replace(variants[-1], shared_products=True))


def bench_train(
    model_or_shape: str,
    *,
    row_len: int,
    sample_len: int,
    num_documents: int,
    lora_r: int | None,
    warmups: int,
    runs: int,
    out: Path | None,
) -> None:
    """Measure whole training steps (forward, backward, AdamW) of every variant on the same samples.

    The samples are random tokens, as many samples as fit into one row. The learning rate is 0, so every
    variant must compute the same loss. With `lora_r` an adapter of this rank on every linear layer is trained
    instead of all weights. Prints a table and writes the figures to `out`.

    Raises:
        UserError: no model or shape has that name, or there is too little memory for it; a sample is too
            short for its documents, or too long for a row or the model; `out` cannot be written.
        RuntimeError: the losses differ.
    """
    if out:
        check_writable(out)
    config = load_benchmark_config(model_or_shape)
    _check_lengths(model_or_shape, config, row_len, sample_len, num_documents)
    # training stores each weight, its gradient and the two moments of AdamW; of an adapter they are small
    model = load_benchmark_model(model_or_shape, config, copies=4 if lora_r is None else 1).train()
    if lora_r is not None:
        add_adapter(model, {"r": lora_r, "lora_alpha": 2 * lora_r}, seed=0)
    samples = random_samples(row_len // sample_len, sample_len, num_documents, model.config.vocab_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    variants = list_variants(model.device, lora_r)
    measured = [
        {**asdict(variant), **_measure(model, optimizer, samples, variant, row_len, warmups, runs)}
        for variant in track(variants, "variants", unit="variant")
    ]
    flops, peak = _count_flops(model, samples), _peak_flops(model.device)
    for figures in measured:
        figures["ratio"] = figures["tokens_per_s"] / measured[0]["tokens_per_s"]
        figures["utilization"] = flops / (figures["ms"]["median"] / 1000) / peak if peak else None
    _print_table(model_or_shape, variants, measured)
    arguments = {
        "model": model_or_shape,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.num_parameters(),
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "lora_r": lora_r,
        "flops_per_step": flops,
        "row_len": row_len,
        "sample_len": sample_len,
        "samples": len(samples),
        "num_documents": num_documents,
        "warmups": warmups,
    }
    write_measurement(out, arguments | {"measured": measured})
    first_loss = measured[0]["loss"]
    for variant, figures in zip(variants, measured, strict=True):
        # `not <=` instead of `>`: a loss of NaN must fail, too
        if not abs(figures["loss"] - first_loss) <= MAX_RELATIVE_ERROR[model.dtype] * first_loss:
            raise RuntimeError(
                f"{variant}: the loss is {figures['loss']}, but that of {variants[0]} is {first_loss}"
            )


def _check_lengths(
    model_or_shape: str, config: PreTrainedConfig, row_len: int, sample_len: int, num_documents: int
) -> None:
    if sample_len > row_len:
        raise UserError(f"--sample-len is {sample_len}, but a row has only {row_len} tokens")
    if sample_len < num_documents + 2 * ANSWER_LEN:
        raise UserError(
            f"--sample-len {sample_len} is too short for {num_documents} documents, "
            f"a question and an answer of {ANSWER_LEN} tokens each"
        )
    if sample_len > (num_positions := config.max_position_embeddings):
        raise UserError(
            f"--sample-len is {sample_len}, but {model_or_shape} has only {num_positions} positions"
        )


def _print_table(
    model_or_shape: str, variants: Sequence[StepVariant], measured: Sequence[dict[str, Any]]
) -> None:
    table = Table(
        "variant",
        "tokens/s",
        "ratio",
        "ms",
        "loss",
        "peak GiB",
        "utilization",
        title=f"{model_or_shape}: speed of training steps",
    )
    for variant, figures in zip(variants, measured, strict=True):
        peak_bytes = figures["peak_bytes"]
        table.add_row(
            str(variant),
            f"{figures['tokens_per_s']:,.0f}",
            f"{figures['ratio']:.2f}",
            f"{figures['ms']['median']:,.1f}",
            f"{figures['loss']:.4f}",
            "" if peak_bytes is None else f"{peak_bytes / 2**30:.1f}",
            "" if figures["utilization"] is None else f"{figures['utilization']:.1%}",
        )
    PlainConsole().print(table)


def random_samples(num_samples: int, sample_len: int, num_documents: int, vocab_size: int) -> list[Example]:
    """Return random samples: equal documents, then a question and an answer of `ANSWER_LEN` each."""
    rng = np.random.default_rng(0)
    boundaries = np.linspace(0, sample_len - 2 * ANSWER_LEN, num_documents + 1).astype(int)
    documents = np.diff(boundaries).tolist()
    samples = []
    for _ in range(num_samples):
        ids = rng.integers(vocab_size, size=sample_len, dtype=np.int32)
        spans = ((sample_len - ANSWER_LEN, sample_len),)
        lengths = (*documents, 2 * ANSWER_LEN)
        samples.append(Example(input_ids=ids, label_spans=spans, block_lengths=lengths))
    return samples


def _count_flops(model: PreTrainedModel, samples: Sequence[Example]) -> float:
    """Return the operations that the model itself needs for a step, see `ModelFlops`."""
    layouts = LayoutArrays.of(sample.layout for sample in samples)
    block, _ = ModelFlops.of_model(model).count(layouts, np.full(len(samples), ANSWER_LEN))
    return float(block.sum())


def _peak_flops(device: torch.device) -> float | None:
    return find_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _measure(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    samples: list[Example],
    variant: StepVariant,
    row_len: int,
    warmups: int,
    runs: int,
) -> dict[str, Any]:
    """Measure the steps of one variant: times, real tokens per second, loss and peak memory."""
    _configure(model, variant)
    groups = [samples] if variant.packed else [[sample] for sample in samples]
    rows = [
        collate_row([(sample, "block") for sample in group], row_len if variant.packed else len(group[0]), 0)
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
            row_loss = label_loss(outputs, row["shift_labels"][None], num_labels)
            row_loss.backward()
            total += row_loss.detach()
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


def _configure(model: PreTrainedModel, variant: StepVariant) -> None:
    model.set_attn_implementation(f"block_{variant.backend}")
    checkpoint_layers(model, "full" if variant.checkpointing else "none")
    if variant.shared_products:
        share_products(model)
    if variant.compiled:
        compile_layers(model)
