"""What blockft adds to DeepSpeed configs so that DeepSpeed does not wait for the GPU."""

import pytest

from blockft.config.recipe import RECIPES_FOLDER
from blockft.training.deepspeed_config import load_deepspeed_config, without_overlap, zero_stage

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
