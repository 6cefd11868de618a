"""Whether layers are compiled follows from the device and the ZeRO stage, unless the recipe says it."""

import pytest

from blockft.training.plan import choose_compile


@pytest.mark.parametrize(
    ("torch_compile", "on_gpu", "zero_stage", "expected"),
    [
        (None, True, 0, True),
        (None, True, 2, True),
        (None, True, 3, False),
        (None, False, 2, False),
        (True, False, 3, True),
        (True, True, 3, True),
        (False, True, 0, False),
    ],
)
def test_layers_are_compiled_on_a_gpu_except_with_zero3(
    torch_compile: bool | None, on_gpu: bool, zero_stage: int, expected: bool
) -> None:
    assert choose_compile(torch_compile, zero_stage, on_gpu=on_gpu) is expected
