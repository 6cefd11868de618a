"""Engines over tiny models, and the answers that they should give."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from blockft.attention.layout import Layout
from blockft.data.rag_prompt import RagPrompt
from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions, Rotate
from tests.inference.test_rotate_keys import masked_logits
from tests.run import save_tokenizer

MIB = 2**20
ROTATE = ("keys", "queries")
PROMPT = RagPrompt(
    instruction="Read.\n",
    document="{title} {text}\n",
    question="{question}",
    documents_in="user",
    order="given",
)

Prompt = list[list[int]]
"""The token ids of a prompt's blocks."""


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    with TemporaryDirectory() as folder:
        return save_tokenizer(Path(folder))


def options(
    folder: Path | None = None, *, host: int = MIB, device: int = MIB, disk: int | None = None
) -> CacheOptions:
    return CacheOptions(folder=folder, disk_bytes=disk, host_bytes=host, device_bytes=device)


def load_engine(path: Path, rotate: Rotate = "keys", cache: CacheOptions | None = None) -> Engine:
    return Engine.load(str(path), device="cpu", prompt=PROMPT, cache=cache or options(), rotate=rotate)


def make_engine(model: PreTrainedModel, rotate: Rotate, cache: CacheOptions | None = None) -> Engine:
    return Engine(model, byte_tokenizer(), name="tiny", cache=cache or options(), rotate=rotate)


def keep_only_disk(engine: Engine) -> None:
    """Drop all blocks that are not on the disk."""
    engine.flush()
    engine.clear_cache()


def greedy(model: PreTrainedModel, prompt: Sequence[Sequence[int]], num_new: int) -> tuple[int, ...]:
    """Return the reference answer: each token from a masked forward pass over all tokens before it."""
    blocks = [list(block) for block in prompt]
    for _ in range(num_new):
        layout = Layout(tuple(map(len, blocks)))
        ids = torch.tensor([token for block in blocks for token in block])
        blocks[-1].append(int(masked_logits(model, ids, layout)[-1].argmax()))
    return tuple(blocks[-1][-num_new:])
