"""Attention backend and compilation follow from device, model and ZeRO stage, unless the recipe says them."""

import pytest

from blockft.errors import UserError
from blockft.training.plan import choose_backend, choose_compile


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


@pytest.mark.parametrize(
    ("torch_compile", "on_gpu", "zero_stage", "expected"),
    [
        (None, True, 0, True),
        (None, True, 2, True),
        (None, True, 3, False),
        (None, False, 2, False),
        (True, False, 2, True),
        (True, True, 1, True),
        (True, True, 3, True),
        (True, False, 3, True),
        (False, True, 3, False),
        (False, True, 0, False),
    ],
)
def test_layers_are_compiled_on_a_gpu_and_with_zero3_only_if_the_recipe_says_so(
    torch_compile: bool | None, on_gpu: bool, zero_stage: int, expected: bool
) -> None:
    assert choose_compile(torch_compile, zero_stage, on_gpu=on_gpu) is expected
