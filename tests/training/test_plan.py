"""Whether layers are compiled follows from the device and the ZeRO stage, unless the recipe says it."""

import pytest

from blockft.training import plan
from blockft.training.plan import choose_compile


@pytest.mark.parametrize(
    ("torch_compile", "on_cpu", "zero_stage", "expected"),
    [
        (None, False, 0, True),
        (None, False, 2, True),
        (None, False, 3, False),
        (None, True, 2, False),
        (True, True, 3, True),
        (True, False, 3, True),
        (False, False, 0, False),
    ],
)
def test_layers_are_compiled_on_a_gpu_except_with_zero3(
    monkeypatch: pytest.MonkeyPatch,
    torch_compile: bool | None,
    on_cpu: bool,
    zero_stage: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(plan, "use_cpu", lambda: on_cpu)
    assert choose_compile(torch_compile, zero_stage) is expected
