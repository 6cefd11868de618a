"""Work on a GPU beside the forward passes: a stream of its own, and events instead of waiting.

A CPU has no streams. The same work is done at once there.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceWork:
    """Work that was started. event: recorded after it; None if it is done already."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    def is_done(self) -> bool:
        """Return whether the work has ended, without waiting."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait until the work has ended."""
        if self._event is not None:
            self._event.synchronize()

    def hold_back_stream(self) -> None:
        """Let the current stream go on after the work has ended, without waiting."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


def current_work(device: torch.device) -> DeviceWork:
    """Return the work that was enqueued on the current stream of a device until now."""
    is_cuda = device.type == "cuda"
    return DeviceWork(torch.cuda.current_stream(device).record_event() if is_cuda else None)


class BackgroundStream:
    """Runs work in the order in which it is started, while forward passes run on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def run(self) -> Iterator[None]:
        """Enqueue the work of the `with` statement's body.

        The work begins after everything that the current stream has now: a forward pass may still use pages
        that the scheduler has given to another request since.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def enqueued(self) -> DeviceWork:
        """Return the work that was enqueued until now."""
        return DeviceWork(self._stream.record_event() if self._stream else None)

    def copy_to_host(
        self, tensor: torch.Tensor, copy: torch.Tensor | None = None, *, is_written: bool = False
    ) -> tuple[torch.Tensor, DeviceWork]:
        """Return a copy of a tensor on the host, and the work that writes it.

        copy: the tensor to write, in pinned memory for a GPU. Default: a new one.
        is_written: the tensor is complete; the copy does not wait for the current stream.
        """
        if copy is None:
            is_pinned = self._stream is not None
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        if self._stream is None:
            return copy.copy_(tensor), DeviceWork()
        with torch.cuda.stream(self._stream) if is_written else self.run():
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return copy, self.enqueued()
