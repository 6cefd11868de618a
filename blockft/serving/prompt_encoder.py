"""Prompts to the token ids of their blocks, as the engine of blockft encodes them."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from blockft.data.encoder import Encoder
from blockft.data.rag_prompt import RagPrompt, rag_prompt_of_export
from blockft.data.sample import Sample
from blockft.model.load import load_config, load_tokenizer
from blockft.model.supported import block_attention_config, check_token_ids
from blockft.serving.served_model import ServedModel

LARGE_PROMPT_CHARS = 1 << 20
"""Characters from which a prompt is large. It takes a third of a second or more, and up to half a minute."""


TOKEN_CACHE_BYTES = 256 << 20
"""Memory for the token ids of documents: of 50,000 documents of 512 tokens."""


class PromptEncoder:
    """The wording and the tokenizer of a model. Prompts are encoded by one thread, one after the other.

    Large prompts have a thread and a tokenizer of their own, so that the others do not wait for them.

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

    async def encode(self, sample: Sample) -> list[list[int]]:
        """Return the token ids of each block of a prompt.

        Raises:
            UserError: the template or the tokenizer changes a text, or the model lacks a token.
        """
        is_large = sum(map(len, sample.blocks)) >= LARGE_PROMPT_CHARS
        thread = self._large_thread if is_large else self._thread
        encoder = self._large_encoder if is_large else self._encoder
        return await asyncio.get_running_loop().run_in_executor(thread, self._encode, encoder, sample)

    def _encode(self, encoder: Encoder, sample: Sample) -> list[list[int]]:
        blocks = encoder.encode_prompt(sample)
        for ids in blocks:
            check_token_ids(ids, self._vocab_size, "the prompt")
        return blocks
