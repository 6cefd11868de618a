"""Only the listed warnings of libraries are silenced; all others still appear."""

import logging
import warnings

import pytest

from blockft.training.library_warnings import silence_known_warnings


def test_listed_warnings_are_silenced_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_known_warnings()
        warnings.warn(
            "`gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1
        )
        warnings.warn("`torch.distributed.foo` is deprecated. Please use", FutureWarning, stacklevel=1)
        assert not shown
        warnings.warn("`foo` is deprecated", FutureWarning, stacklevel=1)
        assert len(shown) == 1


def test_listed_log_messages_are_silenced_and_others_are_not(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        silence_known_warnings()
    logger = logging.getLogger("accelerate.accelerator")
    assert len(logger.filters) == 1
    logger.warning("[RANK 0] Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1")
    logger.warning("another message")
    assert [record.getMessage() for record in caplog.records] == ["another message"]
