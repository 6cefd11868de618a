"""The allocator of GPUs has the options of the user, or those of blockft."""

import os

import pytest

from blockft.training.peak_memory import ALLOCATOR_VARIABLES, use_expandable_segments


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_options_of_the_user_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(other, "")
    monkeypatch.setenv(name, "max_split_size_mb:512")
    use_expandable_segments()
    environment = {other: os.environ[other] for other in ALLOCATOR_VARIABLES}
    assert environment == dict.fromkeys(ALLOCATOR_VARIABLES, "") | {name: "max_split_size_mb:512"}


def test_segments_are_expandable_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")
    use_expandable_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
