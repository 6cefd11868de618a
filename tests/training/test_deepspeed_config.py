"""DeepSpeed configs do not make DeepSpeed wait for the GPU, or begin with a step that trains nothing."""

import json
from pathlib import Path

import pytest
import torch

from blockft.config.recipe import RECIPES_FOLDER
from blockft.errors import UserError
from blockft.training.deepspeed_config import (
    check_deepspeed_config,
    load_deepspeed_config,
    with_prefetched_layers,
    without_overlap,
    zero_stage,
)

SHIPPED = RECIPES_FOLDER / "deepspeed"
NAMES = sorted(path.stem for path in SHIPPED.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_the_timer_of_throughput_is_off(name: str) -> None:
    assert load_deepspeed_config(name, SHIPPED)["timers"] == {"throughput": {"enabled": False}}


@pytest.mark.parametrize("name", NAMES)
def test_one_process_overlaps_no_communication_unless_weights_are_copied(name: str) -> None:
    config = load_deepspeed_config(name, SHIPPED)
    alone = without_overlap(config)
    if name in ("zero1", "zero2"):
        assert config["zero_optimization"]["overlap_comm"] is True
        assert alone["zero_optimization"] == {**config["zero_optimization"], "overlap_comm": False}
        assert zero_stage(alone) == zero_stage(config)
    else:
        assert alone == config


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [({}, 500), ({"stage3_prefetch_bucket_size": "auto"}, 500), ({"stage3_prefetch_bucket_size": 7}, 7)],
)
def test_a_layer_is_prefetched_whole_unless_the_config_says_how_much(
    bucket: dict[str, int | str], expected: int
) -> None:
    zero = {"stage": 3, "overlap_comm": True}
    changed = with_prefetched_layers({"zero_optimization": {**zero, **bucket}}, 500)
    assert changed == {"zero_optimization": {**zero, "stage3_prefetch_bucket_size": expected}}


@pytest.mark.parametrize(
    ("zero", "dtype", "is_refused"),
    [
        ({}, torch.bfloat16, True),
        ({"stage": 0}, torch.bfloat16, True),
        ({"stage": 0}, torch.float32, False),
        ({"stage": 1}, torch.bfloat16, False),
    ],
)
def test_a_section_that_would_begin_with_an_empty_step_is_refused(
    tmp_path: Path, zero: dict[str, int], dtype: torch.dtype, is_refused: bool
) -> None:
    path = tmp_path / "adam.json"
    path.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": zero}))

    def check() -> None:
        check_deepspeed_config(
            load_deepspeed_config(str(path), SHIPPED),
            str(path),
            num_processes=1,
            batch_rows=4,
            dtype=dtype,
            max_grad_norm=1.0,
            learning_rate=1e-4,
            betas=(0.9, 0.999),
            weight_decay=0.0,
            num_steps=10,
            warmup_steps=1,
        )

    if not is_refused:
        return check()
    with pytest.raises(UserError, match="adam.json: with the section optimizer under ZeRO-0 in bfloat16"):
        check()
