"""Silence the warnings of libraries that do not concern a user of blockft, each by its own rule."""

import logging
import warnings

_WARNINGS = {
    # deprecated names, which blockft or another library uses to support older versions
    r"`gradient_checkpointing(_kwargs)?` is deprecated": FutureWarning,
    r"`torch\.distributed\.\w+` is deprecated": FutureWarning,
}
"""Start of a warning's message (a pattern) and its category."""

_LOG_MESSAGES = {
    # the Trainer sets the value that DeepSpeed uses
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # blockft trains on the CPU where there is no GPU, and says so
    "DeepSpeed": "Setting accelerator to CPU",
}
"""Name of a logger and text of a message."""


class _MessageFilter(logging.Filter):
    """Drops the messages that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self._text not in record.getMessage()


def silence_known_warnings() -> None:
    """Silence the listed warnings for this process. Repeated calls have no further effect."""
    for message, category in _WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, text in _LOG_MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _MessageFilter) for known in logger.filters):
            logger.addFilter(_MessageFilter(text))
