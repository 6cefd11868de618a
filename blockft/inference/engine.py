"""Answers from blocks: greedy decoding over joined blocks, every different block of a batch encoded once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockft.data.encode import Encoder
from blockft.data.sample import Sample
from blockft.errors import UserError
from blockft.inference.keyside import Ids, JoinedPrompts, encode_blocks
from blockft.model.load import load_model, load_tokenizer, reencodes, rotations


@dataclass(frozen=True)
class Answer:
    """What the model answered to one prompt.

    ttft_ms counts from token ids on the host to the first new token of the whole batch on the host.
    """

    text: str
    ids: Ids
    num_blocks: int
    prompt_tokens: int
    ttft_ms: float


class Engine:
    """A model that answers prompts cut into blocks. The key-side path: any device, every supported family."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._rotations = rotations(model)
        self._reencoded = reencodes(model.config)
        self._encoder = Encoder(tokenizer)
        ends = model.generation_config.eos_token_id
        given = ends if isinstance(ends, list) else [ends]
        self._ends = {*given, self._encoder.end_of_turn_id} - {None}

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Engine":
        """Open an export, a model folder or a Hub id; on a GPU in bfloat16 if there is one.

        Raises:
            UserError: there is no such model, or it is not supported.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        model = load_model(path, backend="sdpa", dtype=dtype, revision=revision)
        return cls(model.to(device), load_tokenizer(path, revision))

    @property
    def block_attention(self) -> dict[str, Any] | None:
        """How the model's training cut prompts into blocks, if it is an export."""
        return getattr(self.model.config, "block_attention", None)

    def generate(
        self, prompts: Sequence[Sample], *, mode: str = "block", max_new_tokens: int = 128
    ) -> list[Answer]:
        """Greedy answers to a batch of prompts in block or full attention; responses of samples are ignored.

        Raises:
            UserError: a prompt and its answer are longer than the model's positions.
        """
        blocks = [self._encoder.encode_prompt(prompt) for prompt in prompts]
        return self.generate_ids(blocks, mode=mode, max_new_tokens=max_new_tokens)

    def generate_ids(
        self, prompts: Sequence[Sequence[Sequence[int]]], *, mode: str = "block", max_new_tokens: int = 128
    ) -> list[Answer]:
        """As `generate`, from the token ids of each prompt's blocks."""
        blocks = [[tuple(block) for block in prompt] for prompt in prompts]
        if mode == "full":
            # full attention is the layout of one block
            blocks = [[tuple(token for block in prompt for token in block)] for prompt in blocks]
        lengths = [sum(map(len, prompt)) for prompt in blocks]
        self._check_length(max(lengths) + max_new_tokens)
        start = time.perf_counter()
        encoded = encode_blocks(self.model, (block for prompt in blocks for block in prompt[:-1]))
        contexts = [prompt[:-1] for prompt in blocks]
        joined = JoinedPrompts(self.model, self._rotations, contexts, encoded, reencoded=self._reencoded)
        next_ids = joined.advance([prompt[-1] for prompt in blocks])[:, -1].argmax(dim=-1).tolist()
        ttft_ms = (time.perf_counter() - start) * 1000
        answers: list[list[int]] = [[] for _ in blocks]
        ended = [False] * len(blocks)
        for step in range(max_new_tokens):
            for row, token in enumerate(next_ids):
                ended[row] = ended[row] or token in self._ends
                if not ended[row]:
                    answers[row].append(token)
            if all(ended) or step == max_new_tokens - 1:
                break
            next_ids = joined.advance([[token] for token in next_ids])[:, -1].argmax(dim=-1).tolist()
        return [
            Answer(
                text=self.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                ids=tuple(ids),
                num_blocks=len(prompt),
                prompt_tokens=length,
                ttft_ms=ttft_ms,
            )
            for ids, prompt, length in zip(answers, blocks, lengths, strict=True)
        ]

    def _check_length(self, num_tokens: int) -> None:
        limit = self.model.config.max_position_embeddings
        if num_tokens > limit:
            raise UserError(
                f"a prompt and its answer need {num_tokens} tokens, the model has {limit} positions: "
                f"use fewer documents or fewer new tokens"
            )
