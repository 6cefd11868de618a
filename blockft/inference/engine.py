"""Answers from blocks: what was encoded for one prompt is found again for every other that holds it."""

import threading
from collections.abc import Generator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockft.data.encoder import Encoder
from blockft.data.fit import fit_prompt
from blockft.data.rag_prompt import Document, RagPrompt, rag_prompt_of_export
from blockft.data.request import parse_request
from blockft.data.sample import RecordError, Sample
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError
from blockft.inference.answer import Answer, PartialAnswer
from blockft.inference.block_key import BlockKey, block_key
from blockft.inference.decoding import decode_batch
from blockft.inference.runner import BlockRunner, CacheOptions
from blockft.inference.sampling import Sampler
from blockft.inference.text_stream import TextStream
from blockft.model.load import block_attention_config, load_model, load_tokenizer, parse_device


class Engine:
    """A model that answers prompts cut into blocks, with its block cache.

    Any number of threads may ask it: each call waits for its turn, and a batch of prompts is one call. A
    stream takes a turn for each piece, so that others may be answered in between. On the query side it then
    reads its question and what it has written again, which costs time and changes no answer.

    prompt: how questions over documents are worded, and in what order documents stand; if it is not given, as
    an export was trained. See `BlockRunner`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        prompt: RagPrompt | None = None,
        cache: CacheOptions | None = None,
        side: str = "auto",
        compile: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._turn = threading.Lock()  # for tokenizers, too: some calls set them up anew
        self.runner = BlockRunner(
            model,
            name=name or model.name_or_path or "",
            tokenizer=tokenizer_fingerprint(tokenizer),
            cache=cache,
            side=side,
            compile=compile,
        )
        self.prompt = prompt or rag_prompt_of_export(block_attention_config(model.config))
        self._limit = model.config.max_position_embeddings
        self._encoder = Encoder(tokenizer)
        ends = model.generation_config.eos_token_id
        given = ends if isinstance(ends, list) else [ends]
        self.ends = {*given, self._encoder.eos_token_id} - {None}

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        prompt: RagPrompt | None = None,
        cache: CacheOptions | None = None,
        side: str = "auto",
        compile: bool = False,
    ) -> "Engine":
        """Open an export, a model folder or a Hub id; on a GPU in bfloat16 if there is one.

        Raises:
            UserError: there is no such device or model, or it is not supported; see `BlockRunner`.
        """
        place = parse_device(device)
        dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
        model = load_model(path, backend="cached", dtype=dtype, revision=revision)
        tokenizer = load_tokenizer(path, revision)
        model.to(place)  # type: ignore[arg-type]  # transformers annotates it as if it were unbound
        return cls(model, tokenizer, name=path, prompt=prompt, cache=cache, side=side, compile=compile)

    def generate(
        self,
        *,
        documents: Sequence[Mapping[str, Any] | str] | None = None,
        question: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        blocks: Sequence[str] | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer one request: documents and a question, or a chat, or the blocks of a templated prompt.

        The three kinds are those of `data.request.parse_request`, `settings` those of `generate_batch`.
        Documents stand in the order in which they are given, whatever their scores and the order in training,
        unless the engine was given a `prompt` that orders them.

        Raises:
            UserError: no request, or none of these kinds; see `generate_batch`.
        """
        given = {"documents": documents, "question": question, "messages": messages, "blocks": blocks}
        record = {name: value for name, value in given.items() if value is not None}
        return self.generate_batch([self.request(record)], **settings)[0]

    def request(self, record: Mapping[str, Any], id: str = "request") -> Sample:
        """The prompt that a record asks to answer; see `parse_request`.

        Raises:
            UserError: it asks nothing, or the model does not say how its questions are worded.
        """
        try:
            return parse_request(record, self._wording(), id)
        except RecordError as error:
            raise UserError(f"{id}: {error}") from error

    def generate_batch(
        self,
        prompts: Sequence[Sample | Mapping[str, Any]],
        *,
        mode: str = "block",
        max_new_tokens: int = 128,
        temperature: float = 0,
        top_p: float = 1,
        seed: int | None = 0,
        stop: Sequence[str] = (),
        trim: bool = False,
    ) -> list[Answer]:
        """Answers to a batch of prompts in block or full attention; responses of samples are ignored.

        A prompt is a request, as `generate` takes it by keywords, or a sample.
        Prompts of a batch share the blocks that they have in common. Prompt i is sampled with `seed + i`, see
        `Sampler`. An answer ends before the first text of `stop`. If `trims`, a prompt that is too long loses
        its least relevant documents, the last of equals first, down to one.

        Raises:
            UserError: a prompt and its answer are longer than the model's positions; see `Sampler`.
        """
        ids = [self.encode(self._prompt(prompt), max_new_tokens, trim=trim) for prompt in prompts]
        sampler = Sampler(temperature, top_p, seed)
        return self.generate_ids(ids, mode=mode, max_new_tokens=max_new_tokens, sampler=sampler, stop=stop)

    def forget(self) -> None:
        """Empty the cache's memory: the next request is computed as by an engine that was just loaded."""
        with self._turn:
            self.runner.store.clear()

    def close(self) -> None:
        """Wait until the cache's folder has all blocks; at the end of a process that happens by itself."""
        with self._turn:
            self.runner.store.flush()

    def document_keys(self, documents: Sequence[Document]) -> list[BlockKey]:
        """The blocks that stand before the question in a prompt over these documents, theirs among them.

        Raises:
            UserError: the model does not say how its prompts are worded, or one is too long for it.
        """
        messages, meta = self._wording().build("?", documents, "documents")
        prompt = Sample(id="documents", source="documents", messages=messages, response="", meta=meta)
        with self._turn:
            *blocks, _ = self._encoder.encode_prompt(prompt)
        if (longest := max(map(len, blocks), default=0)) >= self._limit:
            raise UserError(f"a document has {longest} tokens, the model has {self._limit} positions: cut it")
        return [block_key(block) for block in blocks]

    def generate_ids(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        *,
        mode: str = "block",
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """As `generate_batch`, from the token ids of each prompt's blocks."""
        steps = self._answer(prompts, mode, max_new_tokens, sampler or Sampler(), stop)
        with self._turn:
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return list(end.value)

    def stream(
        self,
        prompt: Sample | Mapping[str, Any],
        *,
        mode: str = "block",
        max_new_tokens: int = 128,
        temperature: float = 0,
        top_p: float = 1,
        seed: int | None = 0,
        stop: Sequence[str] = (),
        trim: bool = False,
    ) -> Generator[str, None, Answer]:
        """The answer to one prompt as it is written, in pieces that stay as they are; returns the `Answer`.

        A prompt is as in `generate_batch`. White space at the ends of an answer is streamed, and not in its
        `text`.

        Raises:
            UserError: as `generate_batch`.
        """
        ids = self.encode(self._prompt(prompt), max_new_tokens, trim=trim)
        sampler = Sampler(temperature, top_p, seed)
        answer = yield from self.stream_ids(
            ids, mode=mode, max_new_tokens=max_new_tokens, sampler=sampler, stop=stop
        )
        return answer

    def stream_ids(
        self,
        prompt: Sequence[Sequence[int]],
        *,
        mode: str = "block",
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[str, None, Answer]:
        """As `stream`, from the token ids of the prompt's blocks."""
        steps = self._answer([prompt], mode, max_new_tokens, sampler or Sampler(), stop)
        while True:
            try:
                with self._turn:
                    (piece,) = next(steps)
            except StopIteration as end:
                (answer,) = end.value
                return answer
            if piece:
                yield piece

    def encode(self, prompt: Sample, max_new_tokens: int, *, trim: bool = False) -> list[list[int]]:
        """The token ids of a prompt's blocks, few enough for an answer to fit; see `data.fit.fit_prompt`."""
        return self.fit(prompt, max_new_tokens, trim=trim)[1]

    def fit(
        self, prompt: Sample, max_new_tokens: int, *, trim: bool = False
    ) -> tuple[Sample, list[list[int]]]:
        """As `encode`, and before the ids the prompt without the documents that it lost."""
        _check_length(max_new_tokens)
        with self._turn:
            return fit_prompt(prompt, self._encoder, self._limit, max_new_tokens, trim)

    def _prompt(self, asked: Sample | Mapping[str, Any]) -> Sample:
        return asked if isinstance(asked, Sample) else self.request(asked)

    def _wording(self) -> RagPrompt:
        if self.prompt is None:
            raise UserError(
                f"{self.model.name_or_path} does not say how it is asked, as exports do: give a prompt"
            )
        return self.prompt

    def _answer(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        mode: str,
        max_new_tokens: int,
        sampler: Sampler,
        stop: Sequence[str],
    ) -> Generator[list[str], None, list[Answer]]:
        """Yields the new text of every prompt after each step, for which it is our turn; see `decode`."""
        if mode not in ("block", "full"):
            raise UserError(f"mode is {mode!r}, allowed are block and full")
        _check_length(max_new_tokens)
        if not prompts:
            return []
        for prompt in prompts:
            if not prompt or not all(len(block) for block in prompt):
                raise UserError("a prompt has no block, or an empty one: each needs at least one token")
            if (needed := sum(map(len, prompt)) + max_new_tokens) > self._limit:
                raise UserError(
                    f"a prompt and its answer need {needed} tokens, the model has {self._limit} positions"
                )
        # full attention is the layout of one block
        blocks = prompts if mode == "block" else [[[id for block in p for id in block]] for p in prompts]
        writings = [PartialAnswer(TextStream(self.tokenizer, stop), self.ends) for _ in blocks]
        answers = yield from decode_batch(self.runner, blocks, writings, max_new_tokens, sampler)
        return answers


def _check_length(max_new_tokens: Any) -> None:
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}, it should be a whole number of at least 1")
