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


class PromptEncoder:
    """The wording and the tokenizer of a model. Prompts are encoded by one thread, one after the other.

    prompt: the wording of questions over documents; None if the model was trained without one.

    Raises:
        UserError: the model's configuration or its tokenizer cannot be used.
    """

    def __init__(self, served: ServedModel) -> None:
        trained = block_attention_config(load_config(served.path))
        self.prompt = rag_prompt_of_export(trained) if trained else RagPrompt(order="given")
        self._vocab_size = served.vocab_size
        self._encoder = Encoder(load_tokenizer(served.path))
        self.end_token_ids: Sequence[int] = sorted(self._encoder.end_token_ids)
        served.check_files()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="blockft-encode")

    async def encode(self, sample: Sample) -> list[list[int]]:
        """Return the token ids of each block of a prompt.

        Raises:
            UserError: the template or the tokenizer changes a text, or the model lacks a token.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, sample)

    def _encode(self, sample: Sample) -> list[list[int]]:
        blocks = self._encoder.encode_prompt(sample)
        for ids in blocks:
            check_token_ids(ids, self._vocab_size, "the prompt")
        return blocks
