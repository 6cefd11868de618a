"""Silence warnings and printed lines of libraries that do not concern a user, each by its own rule."""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

_WARNINGS = {
    # deprecated names, which blockft or another library uses to support older versions
    r"`gradient_checkpointing(_kwargs)?` is deprecated": FutureWarning,
    r"`torch\.distributed\.\w+` is deprecated": FutureWarning,
    # each rank has set its GPU before it joins the others
    r"barrier\(\): using the device under current context": UserWarning,
}
"""Start of a warning's message (a pattern) and its category."""

_LOG_MESSAGES = (
    # the Trainer sets the value that DeepSpeed uses
    ("accelerate.accelerator", "Gradient accumulation steps mismatch"),
    # blockft trains on the CPU where there is no GPU, and says so
    ("DeepSpeed", "Setting accelerator to CPU"),
    # DeepSpeed's list has no 8-bit AdamW, for which the Trainer sets zero_allow_untested_optimizer
    ("DeepSpeed", "You are using ZeRO with an untested optimizer"),
)
"""Name of a logger and text of a message."""

_PRINTED_LINES = (
    # DeepSpeed, when it gathers the weights of a checkpoint
    "Processing zero checkpoint '",
    "Parsing checkpoint created by deepspeed==",
    "Detected checkpoint of type zero stage ",
    "Reconstructed fp32 state dict with ",
    "Reconstructed Frozen fp32 state dict with ",
    "Reconstructed Trainable fp32 state dict with ",
    # DeepSpeed on CPUs, in every process
    "DeepSpeed deepspeed.ops.comm.deepspeed_shm_comm_op built successfully",
)
"""Starts of lines that libraries print on stdout."""


class _MessageFilter(logging.Filter):
    """Drops the messages that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def silence_known_warnings() -> None:
    """Silence the listed warnings for this process. Repeated calls have no further effect."""
    for message, category in _WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, text in _LOG_MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _MessageFilter) and known.text == text for known in logger.filters):
            logger.addFilter(_MessageFilter(text))


class _LineFilter(io.TextIOBase):
    """Passes complete lines on to stderr, without the listed ones."""

    def __init__(self) -> None:
        self._line = ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if not line.startswith(_PRINTED_LINES):
                print(line, file=sys.stderr)
        return len(text)


@contextmanager
def library_output_on_stderr() -> Iterator[None]:
    """Redirect what libraries print on stdout to stderr, without the listed lines."""
    output = _LineFilter()
    try:
        with redirect_stdout(output):
            yield
    finally:
        output.write("\n" if output._line else "")
