"""Prompts to the token ids of their blocks, as the engine of blockft encodes them."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from blockft.data.encoder import Encoder
from blockft.data.rag_prompt import RagPrompt, rag_prompt_of_export
from blockft.data.sample import Sample
from blockft.model.load import load_config, load_tokenizer
from blockft.model.supported import block_attention_config, check_token_ids
from blockft.serving.served_model import ServedModel

LARGE_PROMPT_CHARS = 1 << 20
"""Characters from which a prompt is large. It takes a third of a second or more, and up to half a minute."""

SHORT_PROMPT_CHARS = 2_000
"""Characters to which a prompt is short, without documents whose token ids are known: about a millisecond."""

SHORT_PROMPT_BLOCKS, SHORT_PROMPT_MESSAGES, KNOWN_CHARS = 200, 20, 100_000
"""What else a short prompt has at most: blocks, messages, and characters with its known documents."""

TOKEN_CACHE_BYTES = 256 << 20
"""Memory for the token ids of documents: of 50,000 documents of 512 tokens."""


class PromptEncoder:
    """The wording and the tokenizer of a model. Prompts are encoded by one thread, one after the other.

    Large prompts have a thread and a tokenizer of their own, so that the others do not wait for them. Short
    prompts are encoded at once, unless the thread works: it would take longer to start it.

    prompt: the wording of questions over documents; None if the model was trained without one.

    Raises:
        UserError: the model's configuration or its tokenizer cannot be used.
    """

    def __init__(self, served: ServedModel) -> None:
        trained = block_attention_config(load_config(served.path))
        self.prompt = rag_prompt_of_export(trained) if trained else RagPrompt(order="given")
        self._vocab_size = served.vocab_size
        self._encoder, self._large_encoder = (
            Encoder(
                load_tokenizer(served.path), local_sees_first=served.local_sees_first, cache_bytes=cache_bytes
            )
            for cache_bytes in (TOKEN_CACHE_BYTES, 0)
        )
        self.end_token_ids: Sequence[int] = sorted(self._encoder.end_token_ids)
        served.check_files()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockft-encode")
        self._large_thread = ThreadPoolExecutor(1, thread_name_prefix="blockft-encode-large")
        self._in_use = Lock()

    async def encode(self, sample: Sample) -> list[NDArray[np.int32]]:
        """Return the token ids of each block of a prompt. They may be read only.

        Raises:
            UserError: the template or the tokenizer changes a text, or the model lacks a token.
        """
        loop = asyncio.get_running_loop()
        if sum(map(len, sample.blocks)) >= LARGE_PROMPT_CHARS:
            return await loop.run_in_executor(self._large_thread, self._encode, self._large_encoder, sample)
        if self._in_use.acquire(blocking=False):
            try:
                if self._is_short(sample):
                    return self._encode(self._encoder, sample)
            finally:
                self._in_use.release()
        return await loop.run_in_executor(self._thread, self._encode_in_turn, sample)

    def _is_short(self, sample: Sample) -> bool:
        """Return whether a prompt takes so little time that the event loop may wait for it."""
        blocks = sample.blocks
        if len(blocks) > SHORT_PROMPT_BLOCKS or len(sample.messages) > SHORT_PROMPT_MESSAGES:
            return False
        if sum(map(len, blocks)) > KNOWN_CHARS:
            return False
        return self._encoder.num_new_chars(sample) <= SHORT_PROMPT_CHARS

    def _encode_in_turn(self, sample: Sample) -> list[NDArray[np.int32]]:
        with self._in_use:
            return self._encode(self._encoder, sample)

    def _encode(self, encoder: Encoder, sample: Sample) -> list[NDArray[np.int32]]:
        blocks = encoder.encode_prompt_arrays(sample)
        for ids in blocks:
            check_token_ids([int(ids.min()), int(ids.max())], self._vocab_size, "the prompt")
        return blocks
