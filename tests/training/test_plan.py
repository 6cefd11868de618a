"""Attention backend and compilation follow from device, model and ZeRO stage, unless the recipe says them."""

import pytest

from blockft.errors import UserError
from blockft.training.plan import choose_backend


@pytest.mark.parametrize(
    ("backend", "on_gpu", "head_size", "expected"),
    [
        ("auto", True, 64, "flex"),
        ("auto", True, 16, "flex"),
        ("auto", True, 15, "sdpa"),
        ("auto", False, 64, "sdpa"),
        ("flex", True, 16, "flex"),
        ("sdpa", True, 64, "sdpa"),
        ("sdpa", False, 8, "sdpa"),
    ],
)
def test_flex_is_for_gpus_and_heads_of_16_dimensions(
    backend: str, on_gpu: bool, head_size: int, expected: str
) -> None:
    assert choose_backend(backend, on_gpu=on_gpu, head_size=head_size) == expected


@pytest.mark.parametrize(
    ("on_gpu", "head_size", "message"), [(False, 64, "needs a GPU"), (True, 8, "at least 16 dimensions.*8")]
)
def test_flex_is_refused_where_it_cannot_be(on_gpu: bool, head_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_backend("flex", on_gpu=on_gpu, head_size=head_size)
