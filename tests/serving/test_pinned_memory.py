"""Pinned memory is taken once, given to blocks, and free again when no tensor uses it. No GPU is needed."""

import gc
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from blockft.serving import pinned_memory
from blockft.serving.pinned_memory import ALIGNMENT, PinnedMemory

CHUNK = 16 * ALIGNMENT


class Chunks:
    """Gives memory that is not pinned, and records how often. There are `number` chunks."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.number = 10

    def __call__(self, num_bytes: int) -> torch.Tensor:
        if num_bytes == CHUNK and self.sizes.count(CHUNK) == self.number:
            raise RuntimeError("no memory\nat line 5")
        self.sizes.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> Chunks:
    monkeypatch.setattr(pinned_memory, "CHUNK_BYTES", CHUNK)
    return Chunks()


@pytest.fixture
def memory(chunks: Chunks) -> PinnedMemory:
    return PinnedMemory(2 * CHUNK, chunks)


def test_memory_is_pinned_once_for_the_host_tier_and_blocks_on_their_way(
    memory: PinnedMemory, chunks: Chunks
) -> None:
    assert chunks.sizes == [CHUNK] * 3 and memory.num_bytes == 3 * CHUNK
    for _ in range(50):
        block = memory.empty((3, 5, 2, 1, 7), torch.bfloat16)
        assert block.shape == (3, 5, 2, 1, 7) and block.dtype == torch.bfloat16
        del block
    assert chunks.sizes == [CHUNK] * 3


def test_blocks_do_not_overlap_whatever_the_order_in_which_they_are_dropped(
    memory: PinnedMemory, chunks: Chunks
) -> None:
    rng, blocks = random.Random(0), dict[int, torch.Tensor]()
    for number in range(300):
        size = (rng.randint(1, 3 * ALIGNMENT),)
        blocks[number] = memory.empty(size, torch.uint8).fill_(number % 251)
        if len(blocks) > 8:
            del blocks[rng.choice([*blocks])]
        assert all(bool((block == key % 251).all()) for key, block in blocks.items())
    assert chunks.sizes == [CHUNK] * 3, "nine blocks of three pages always fit"


def test_a_view_keeps_the_memory_of_its_block(memory: PinnedMemory) -> None:
    view = memory.empty((CHUNK // 4,), torch.int32).fill_(7)[5:9].view(2, 2)
    others = [memory.empty((CHUNK,), torch.uint8).fill_(9) for _ in range(3)]
    gc.collect()
    assert view.tolist() == [[7, 7], [7, 7]] and len(others) == 3


def test_blocks_that_find_no_place_are_pinned_by_themselves(memory: PinnedMemory, chunks: Chunks) -> None:
    kept = [memory.empty((CHUNK // 2 + 1,), torch.uint8) for _ in range(3)]
    large = [memory.empty((size,), torch.uint8) for size in (CHUNK // 2 + 1, CHUNK + 1)]
    assert chunks.sizes[3:] == [CHUNK // 2 + 1, CHUNK + 1]
    del large
    kept.clear()
    assert [memory.empty((CHUNK,), torch.uint8).shape for _ in range(3)] and len(chunks.sizes) == 5


def test_there_is_memory_for_blocks_on_their_way_without_a_host_tier(chunks: Chunks) -> None:
    assert PinnedMemory(0, chunks).num_bytes == CHUNK


def test_too_little_memory_is_a_warning_and_further_blocks_are_pinned_by_themselves(
    chunks: Chunks, caplog: pytest.LogCaptureFixture
) -> None:
    chunks.number = 1
    memory = PinnedMemory(2 * CHUNK, chunks)
    assert "2 of 3 GiB for blocks could not be pinned: lower --host-bytes (no memory)" in caplog.text
    blocks = [memory.empty((size,), torch.uint8) for size in (CHUNK // 2, CHUNK - 1)]
    assert chunks.sizes == [CHUNK, CHUNK - 1] and len(blocks) == 2


def test_blocks_outlive_the_memory_object(chunks: Chunks) -> None:
    memory = PinnedMemory(CHUNK, chunks)
    block = memory.empty((CHUNK,), torch.uint8).fill_(5)
    del memory
    gc.collect()
    others = [torch.full((CHUNK,), 9, dtype=torch.uint8) for _ in range(8)]
    assert bool((block == 5).all()) and len(others) == 8


def test_several_threads_take_and_drop_memory(memory: PinnedMemory) -> None:
    def work(number: int) -> bool:
        rng = random.Random(number)
        for _ in range(200):
            block = memory.empty((rng.randint(1, ALIGNMENT),), torch.uint8).fill_(number)
            if not bool((block == number).all()):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.gpu  # pinned memory exists beside a GPU alone
def test_a_gpu_copies_from_and_to_a_part_of_pinned_memory() -> None:
    memory, stream = PinnedMemory(1 << 20), torch.cuda.Stream()
    first, second = (memory.empty((1 << 18,), torch.float32) for _ in range(2))
    assert first.is_pinned() and second.is_pinned() and second.data_ptr() != memory._chunks[0].data_ptr()
    second.copy_(torch.arange(1 << 18))
    torch.cuda._sleep(100_000_000)
    begun = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(stream):
        first.copy_(second.cuda(non_blocking=True), non_blocking=True)
    stream.synchronize()
    assert not begun.query(), "the copies have not waited for the other stream"
    assert torch.equal(first, second)
