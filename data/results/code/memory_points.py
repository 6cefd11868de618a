"""Compare the memory estimate of `blockft train` with the memory that tensors take on a GPU.

usage: python data/results/code/memory_points.py OUT.json [--toy]

Each point trains three steps of random samples under DeepSpeed, ZeRO-1 and bfloat16, all in one process. The
peak is that of the steps after the first one, by `torch.cuda.max_memory_allocated`. Every point is printed when
it is measured. `--toy` runs the same code with a tiny shape on a CPU, where no peak is measured.
"""

import argparse
import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path)
parser.add_argument("--toy", action="store_true", help="a tiny shape on the CPU")
OPTIONS = parser.parse_args()
# DeepSpeed reads these when it is imported
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
if OPTIONS.toy:
    os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch

from blockft.bench.measurement import measurement_provenance
from blockft.bench.train import random_samples
from blockft.data.collate import collate_row
from blockft.model.decoder_layers import compile_layers
from blockft.model.gradient_checkpointing import checkpoint_layers
from blockft.model.load import build_meta_model
from blockft.model.lora import add_adapter
from blockft.model.random_model import build_random_model, load_shape_config
from blockft.training.layer_memory import measure_loss
from blockft.training.memory_estimate import RunMemory, estimate_memory, measure_model
from blockft.training.model_inputs import build_model_inputs
from blockft.training.objectives import label_loss

DEVICE = torch.device("cpu" if OPTIONS.toy else "cuda")
BACKEND = "block_sdpa" if OPTIONS.toy else "block_flex"
SHORT, LONG = (256, 512) if OPTIONS.toy else (8192, 16384)
SAMPLE_LEN, NUM_DOCUMENTS = (128, 2) if OPTIONS.toy else (1600, 10)
BUCKET = 1000 if OPTIONS.toy else 200_000_000
NUM_STEPS = 3
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 1,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    },
}


@dataclass(frozen=True)
class Point:
    """Tokens of a row, the kind of gradient checkpointing, and whether the layers are compiled."""

    row_len: int
    kind: str
    compiled: bool


# layers stay compiled, so that compiled points are the last ones of a model
MODELS: list[tuple[str, dict[str, Any] | None, list[Point]]] = [
    (
        "llama-3.2-1b",
        None,
        [
            Point(SHORT, "none", False),
            Point(SHORT, "full", False),
            Point(SHORT, "none", True),
            Point(SHORT, "selective", True),
            Point(SHORT, "full", True),
            Point(LONG, "none", True),
        ],
    ),
    (
        "llama-3-8b",
        {"r": 32},
        [
            Point(SHORT, "none", True),
            Point(SHORT, "selective", True),
            Point(SHORT, "full", True),
            Point(LONG, "full", True),
        ],
    ),
    (
        "llama-3-8b",
        {"r": 32, "lora_dropout": 0.05},
        [Point(SHORT, "none", True), Point(SHORT, "full", True)],
    ),
]


def main() -> None:
    deepspeed.init_distributed(dist_backend="gloo" if OPTIONS.toy else "nccl", verbose=False)
    points = [
        measured
        for shape, lora, listed in MODELS
        for measured in measure_shape("tiny" if OPTIONS.toy else shape, lora, listed)
    ]
    differences = [abs(point["ratio"] - 1) for point in points if point["ratio"]]
    result = measurement_provenance() | {
        "command": f"python data/results/code/memory_points.py {OPTIONS.out}",
        "what": "the memory estimate of blockft train against torch.cuda.max_memory_allocated and "
        "max_memory_reserved: steps of DeepSpeed ZeRO-1 in bfloat16, random rows",
        "unit": "GB, 1e9 bytes",
        "largest relative difference": max(differences, default=None),
        "points": points,
    }
    OPTIONS.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os._exit(0)  # DeepSpeed's threads may keep the process


def measure_shape(shape: str, lora: dict[str, Any] | None, points: list[Point]) -> list[dict[str, Any]]:
    """Return the figures of each point of a shape."""
    config = load_shape_config(shape)
    meta = build_meta_model(config)
    if lora:
        meta = add_adapter(meta, lora, seed=0).get_base_model()
    meta.to(torch.bfloat16)
    loss_bytes = measure_loss(
        lambda x: label_loss(SimpleNamespace(logits=x), torch.zeros(x.shape[:2], dtype=torch.long), 1),
        dtype=torch.bfloat16,
    )
    expected = {
        compiled: measure_model(meta, compiled=compiled, loss_bytes=loss_bytes)
        for compiled in {point.compiled for point in points}
    }
    base = build_random_model(config, device=DEVICE, dtype=torch.bfloat16)
    base.set_attn_implementation(BACKEND)
    model = add_adapter(base, lora, seed=0) if lora else base
    base.config.use_cache = False
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    is_compiled, measured = False, []
    for point in points:
        if point.compiled and not is_compiled:
            compile_layers(base)
            is_compiled = True
        checkpoint_layers(base, point.kind)
        row = random_row(point.row_len, config.vocab_size)
        num_labels = int((row["shift_labels"] != -100).sum())
        peak, reserved = measure_steps(engine, base, row, num_labels)
        run = RunMemory(
            deepspeed=CONFIG,
            num_processes=1,
            row_len=point.row_len,
            num_labels=num_labels,
            accumulates=False,
        )
        estimate = estimate_memory(expected[point.compiled], run, point.kind)
        measured.append(
            {
                "shape": shape,
                "lora": lora,
                "row_len": point.row_len,
                "kind": point.kind,
                "compiled": point.compiled,
                "peak_gb": round(peak / 1e9, 2) if peak else None,
                "reserved_gb": round(reserved / 1e9, 2) if reserved else None,
                "estimate_gb": round(estimate.peak_bytes / 1e9, 2),
                "ratio": round(estimate.peak_bytes / peak, 3) if peak else None,
                "components": {name: round(size / 1e9, 2) for name, size in estimate.components.items()},
            }
        )
        print(json.dumps(measured[-1]), flush=True)
    engine.destroy()
    del engine, optimizer, model, base, trained
    gc.collect()
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return measured


def random_row(row_len: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """Return a row of random samples in block mode, on the device."""
    samples = random_samples(row_len // SAMPLE_LEN, SAMPLE_LEN, NUM_DOCUMENTS, vocab_size)
    row = collate_row([(sample, "block") for sample in samples], row_len, 0)
    return {name: tensor.to(DEVICE) for name, tensor in row.items()}


def measure_steps(engine: Any, base: Any, row: dict[str, torch.Tensor], num_labels: int) -> tuple[int, int]:
    """Return the peaks of allocated and of reserved memory in bytes; 0 on a CPU or if memory runs out."""
    try:
        for step in range(NUM_STEPS):
            if step == 1 and DEVICE.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            outputs = engine(**build_model_inputs(row, base.config))
            loss = label_loss(outputs, row["shift_labels"][None], num_labels)
            del outputs
            engine.backward(loss)
            engine.step()
            del loss
    except torch.OutOfMemoryError:
        engine.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return 0, 0
    if DEVICE.type == "cpu":
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


if __name__ == "__main__":
    main()
