"""Only the listed warnings of libraries are silenced; all others still appear."""

import logging
import warnings

import pytest

from blockft.training.library_warnings import library_output_on_stderr, silence_known_warnings


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


def test_listed_lines_of_libraries_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Other lines go to stderr, because stdout carries the results."""
    with pytest.raises(ZeroDivisionError), library_output_on_stderr():
        print("Processing zero checkpoint 'out/run/checkpoint-1/global_step1'")
        print("DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully")
        print("another", "line")
        print("a line without an end", end="")
        _ = 1 / 0
    assert capsys.readouterr() == ("", "another line\na line without an end\n")
