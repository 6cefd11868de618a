"""The bytes of tensors are counted while they exist."""

import torch

from blockft.training.tensor_memory import TensorMemory


def test_tensors_count_once_while_they_exist() -> None:
    known = torch.zeros(100)
    for device in ("cpu", "meta"):
        with TensorMemory([known]) as memory:
            first = torch.zeros(10, device=device)
            view = first.view(2, 5)
            known.add_(1)
            assert memory.live_bytes == 40
            second = first + 1
            assert memory.live_bytes == memory.peak_bytes == 80
            del first
            assert memory.live_bytes == 80, "the view keeps the storage"
            del view, second
            assert memory.live_bytes == 0 and memory.peak_bytes == 80
            memory.reset_peak()
            assert memory.peak_bytes == 0


def test_what_autograd_keeps_counts() -> None:
    weight = torch.zeros(8, 8, requires_grad=True)
    with TensorMemory([weight]) as memory:
        function = (weight * 1).exp().sum().grad_fn  # `exp` keeps its result
        assert memory.live_bytes == 8 * 8 * 4
        del function
        assert memory.live_bytes == 0
