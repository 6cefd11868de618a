"""The engine: answers prompts that consist of blocks, and reuses the blocks of earlier prompts."""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockft.data.encoder import Encoder
from blockft.data.fit import fit_prompt
from blockft.data.rag_prompt import Document, RagPrompt, rag_prompt_of_export
from blockft.data.request import OWN_WORDING, parse_request
from blockft.data.sample import RecordError, Sample
from blockft.data.tokenizer import tokenizer_fingerprint
from blockft.errors import UserError, check_type, list_allowed
from blockft.inference.answer import Answer, PartialAnswer
from blockft.inference.block_key import BlockKey, num_first, num_tokens
from blockft.inference.decoding import decode_batch
from blockft.inference.runner import BlockRunner, CacheOptions, Rotate
from blockft.inference.sampling import Sampler
from blockft.inference.text_stream import TextStream
from blockft.inputs import check_path
from blockft.model.load import load_model, load_tokenizer, parse_device
from blockft.model.supported import block_attention_config, check_token_ids, local_sees_first

AttentionMode = Literal["block", "full"]
"""`block`: local blocks attend to themselves and come from the cache. `full`: plain causal attention."""


class Engine:
    r"""A model with its block cache, which answers prompts that consist of blocks.

    Any number of threads may use an engine; their requests are answered one after the other. A batch of
    prompts is one request. Other requests may run between the tokens of a stream. With `rotate="queries"` the
    stream then recomputes its question and its answer so far, which takes time and changes no answer.

    If the model was trained with `local_sees_first`, a cached block belongs to the first block of its prompt,
    usually the instruction: prompts with another instruction compute their documents again.

    An engine is a context manager that closes itself. Most users open one with `Engine.load`.

    Args:
        model: a model with the attention backend `block_cached`.
        tokenizer: its tokenizer, with a chat template.
        name: the name of the model in the cache folder.
        prompt: wording of questions over documents, and the order of the documents. The default is the
            wording of the export's training, and for a model that is no export `RagPrompt()`; documents keep
            the given order. An export that was trained on other prompts only has no wording: it takes chats
            and blocks, but no documents.
        cache: folder and sizes of the block cache.
        rotate: attention path: "keys" (any device), "queries" (made for GPUs) or "auto".
        compile: compile the model's layers: half a minute once, less time per token. Only for rotated queries
            on a GPU.

    Raises:
        UserError: see `BlockRunner`.

    Example:
        The demo's model is not fine-tuned for blocks yet, so its answer comes from full mode.

        >>> from blockft import Engine, RagPrompt
        >>> prompt = RagPrompt(
        ...     instruction="Answer from the documents:\n",
        ...     document="{text}\n",
        ...     question="{question}",
        ...     order="given",
        ... )
        >>> documents = ["The mayor of Vithumouth is Brosuk.", "The river of Vithumouth is Leithein."]
        >>> mayor, river = "What is the mayor of Vithumouth?", "What is the river of Vithumouth?"
        >>> with Engine.load("data/demo/model", device="cpu", prompt=prompt) as engine:
        ...     full = engine.generate(documents=documents, question=mayor, mode="full", max_new_tokens=8)
        ...     first = engine.generate(documents=documents, question=mayor, max_new_tokens=8)
        ...     second = engine.generate(documents=documents, question=river, max_new_tokens=8)
        >>> full.text
        'Brosuk'
        >>> (first.blocks_reused, second.blocks_reused)
        (0, 4)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "",
        prompt: RagPrompt | None = None,
        cache: CacheOptions | None = None,
        rotate: Rotate = "auto",
        compile: bool = False,
    ) -> None:
        check_type(prompt, (RagPrompt, NoneType), "prompt")
        check_type(cache, (CacheOptions, NoneType), "cache")
        self.model, self.tokenizer = model, tokenizer
        self._lock = threading.Lock()  # also for the tokenizer, which some calls modify
        self._is_closed = False
        self.runner = BlockRunner(
            model,
            name=name or model.name_or_path or "",
            tokenizer=tokenizer_fingerprint(tokenizer),
            cache=cache,
            rotate=rotate,
            compile=compile,
        )
        trained = block_attention_config(model.config)
        default_prompt = rag_prompt_of_export(trained) if trained else RagPrompt(order="given")
        self.prompt = prompt or default_prompt
        self._num_positions = model.config.max_position_embeddings
        self._encoder = Encoder(tokenizer, local_sees_first=local_sees_first(model.config))
        configured = model.generation_config.eos_token_id
        configured_ids = configured if isinstance(configured, list) else [configured]
        self.eos_token_ids = {*configured_ids, *self._encoder.end_token_ids} - {None}

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        chat_template: str | None = None,
        prompt: RagPrompt | None = None,
        cache: CacheOptions | None = None,
        rotate: Rotate = "auto",
        compile: bool = False,
    ) -> "Engine":
        """Open an export, a model folder, an adapter folder or a Hub id.

        Args:
            path: a folder, or an id on the Hub (owner/name).
            revision: branch, tag or commit on the Hub.
            device: such as "cpu" or "cuda:1". The default is the GPU if there is one.
            dtype: type of the weights. The default is bfloat16 on a GPU and float32 on a CPU.
            chat_template: a file with the chat template that replaces that of the tokenizer.
            prompt, cache, rotate, compile: see `Engine`.

        Raises:
            UserError: there is no such device or model, or the model is not supported; see `BlockRunner`.
        """
        check_type(path, (str, Path), "path")
        check_path(path, "model")
        check_type(revision, (str, NoneType), "revision")
        check_type(chat_template, (str, NoneType), "chat_template")
        check_type(device, (str, NoneType), "device")
        check_type(dtype, (torch.dtype, NoneType), "dtype", "write a type such as torch.bfloat16")
        path = str(path)
        torch_device = parse_device(device)
        dtype = dtype or (torch.bfloat16 if torch_device.type == "cuda" else torch.float32)
        model = load_model(path, backend="cached", dtype=dtype, revision=revision)
        tokenizer = load_tokenizer(path, revision, chat_template)
        model.to(torch_device)  # type: ignore[arg-type]  # transformers annotates it as an unbound method
        return cls(model, tokenizer, name=path, prompt=prompt, cache=cache, rotate=rotate, compile=compile)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait until the cache folder has all blocks, then stop the cache's threads.

        Every later request raises a `UserError`. A second call does nothing.
        """
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self.runner.block_cache.close()

    def flush(self) -> None:
        """Wait until the cache folder has all blocks.

        Raises:
            UserError: the engine is closed.
        """
        with self._open():
            self.runner.block_cache.flush()

    def clear_cache(self) -> None:
        """Drop all blocks from device and host memory. Blocks in the cache folder stay.

        Raises:
            UserError: the engine is closed.
        """
        with self._open():
            self.runner.block_cache.clear()

    def generate(
        self,
        *,
        documents: Sequence[Mapping[str, Any] | str] | None = None,
        question: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        blocks: Sequence[str] | None = None,
        mode: AttentionMode = "block",
        max_new_tokens: int = 128,
        temperature: float = 0,
        top_p: float = 1,
        seed: int | None = 0,
        stop: Sequence[str] = (),
        trim: bool = False,
    ) -> Answer:
        """Answer one request: documents and a question, or a chat, or the blocks of a templated prompt.

        Args:
            documents: each a text, or a mapping with "text" and optionally "title" and "score". They keep the
                given order, unless the engine's `prompt` orders them.
            question: the question over the documents.
            messages: a chat that ends with the user's message. A content is a list of block texts or a text.
            blocks: the texts of the blocks of a prompt to which the chat template was already applied.
            mode, max_new_tokens, temperature, top_p, seed, stop, trim: see `generate_batch`.

        Raises:
            UserError: the request is malformed, or has several kinds of prompts or none; see
                `generate_batch`.
        """
        fields = {"documents": documents, "question": question, "messages": messages, "blocks": blocks}
        record = {name: value for name, value in fields.items() if value is not None}
        (answer,) = self.generate_batch(
            [record],
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            trim=trim,
        )
        return answer

    def generate_batch(
        self,
        prompts: Sequence[Sample | Mapping[str, Any]],
        *,
        mode: AttentionMode = "block",
        max_new_tokens: int = 128,
        temperature: float = 0,
        top_p: float = 1,
        seed: int | None = 0,
        stop: Sequence[str] = (),
        trim: bool = False,
    ) -> list[Answer]:
        """Answer a batch of prompts. The other prompts of the batch do not change an answer.

        Args:
            prompts: requests with the fields that `generate` takes, or samples, whose responses are ignored.
            mode: block attention, or full attention without the block cache.
            max_new_tokens: length of the longest answer, in tokens.
            temperature: 0 takes the most likely token; a higher one samples.
            top_p: sample from the fewest tokens that have this probability together.
            seed: prompt i is sampled with `seed + i`; None samples differently each time.
            stop: an answer ends before the first of these texts.
            trim: drop documents from a prompt that is too long: the least relevant first, among equally
                relevant ones the last, and never the only one.

        Raises:
            UserError: a request is malformed, an option is out of bounds, a prompt and its answer need more
                tokens than the model has positions, or the engine is closed.
        """
        ids = [self.encode(self._sample(prompt), max_new_tokens, trim=trim) for prompt in prompts]
        sampler = Sampler(temperature, top_p, seed)
        return self.generate_ids(ids, mode=mode, max_new_tokens=max_new_tokens, sampler=sampler, stop=stop)

    def generate_ids(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        *,
        mode: AttentionMode = "block",
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Answer a batch of prompts, each given as the token ids of its blocks; see `generate_batch`.

        Raises:
            UserError: a block is empty; see `generate_batch`.
        """
        steps = self._steps(prompts, mode, max_new_tokens, sampler or Sampler(), stop)
        with self._open():
            while True:
                try:
                    next(steps)
                except StopIteration as end:
                    return list(end.value)

    def stream(
        self,
        prompt: Sample | Mapping[str, Any],
        *,
        mode: AttentionMode = "block",
        max_new_tokens: int = 128,
        temperature: float = 0,
        top_p: float = 1,
        seed: int | None = 0,
        stop: Sequence[str] = (),
        trim: bool = False,
    ) -> Generator[str, None, Answer]:
        """Yield the answer to one prompt in pieces of text as they become certain, and return the `Answer`.

        The arguments are those of `generate_batch`. White space at the ends of the answer is yielded, and is
        not in the answer's `text`.

        Raises:
            UserError: see `generate_batch`.
        """
        ids = self.encode(self._sample(prompt), max_new_tokens, trim=trim)
        sampler = Sampler(temperature, top_p, seed)
        answer = yield from self.stream_ids(
            ids, mode=mode, max_new_tokens=max_new_tokens, sampler=sampler, stop=stop
        )
        return answer

    def stream_ids(
        self,
        prompt: Sequence[Sequence[int]],
        *,
        mode: AttentionMode = "block",
        max_new_tokens: int = 128,
        sampler: Sampler | None = None,
        stop: Sequence[str] = (),
    ) -> Generator[str, None, Answer]:
        """Yield and return as `stream` does, for a prompt given as the token ids of its blocks."""
        steps = self._steps([prompt], mode, max_new_tokens, sampler or Sampler(), stop)
        while True:
            try:
                with self._open():
                    (piece,) = next(steps)
            except StopIteration as end:
                (answer,) = end.value
                return answer
            if piece:
                yield piece

    def parse_request(self, record: Mapping[str, Any], id: str = "request") -> Sample:
        """Return the prompt of a request as a sample without a response; see `data.request.parse_request`.

        Raises:
            UserError: the request is malformed. The error names it by `id`.
        """
        try:
            return parse_request(record, self.prompt, id)
        except RecordError as error:
            raise UserError(f"{id}: {error}") from error

    def encode(self, prompt: Sample, max_new_tokens: int, *, trim: bool = False) -> list[list[int]]:
        """Return the token ids of a prompt's blocks; see `fit`."""
        return self.fit(prompt, max_new_tokens, trim=trim)[1]

    def fit(
        self, prompt: Sample, max_new_tokens: int, *, trim: bool = False
    ) -> tuple[Sample, list[list[int]]]:
        """Return a prompt without the documents that `trim` drops, and the token ids of its blocks.

        Raises:
            UserError: the prompt and its answer need more tokens than the model has positions, or
                `max_new_tokens` is not a positive whole number.
        """
        _check_max_new_tokens(max_new_tokens)
        with self._open():
            return fit_prompt(prompt, self._encoder, self._num_positions, max_new_tokens, trim)

    def document_keys(self, documents: Sequence[Document]) -> list[BlockKey]:
        """Return the keys of the local blocks of a prompt over these documents: the instruction's and theirs.

        Raises:
            UserError: a document has as many tokens as the model has positions, or more; the model has no
                wording for documents; or the keys depend on the other documents of a prompt.
        """
        if self.prompt is None:
            raise UserError(OWN_WORDING)
        if local_sees_first(self.model.config) and self._is_first_block_a_document(self.prompt):
            raise UserError(
                "the model was trained with local_sees_first, and its prompts have no instruction: every "
                "block depends on the first document of its prompt, so blocks are computed when a prompt "
                "needs them, and not in advance"
            )
        blocks = self._local_blocks(self.prompt, documents)
        self._check_ids(blocks)
        keys = self.runner.context_keys(blocks)
        for key in keys:
            if num_first(key) + num_tokens(key) >= self._num_positions:
                after = f" after a first block of {num_first(key)}" if key.first else ""
                raise UserError(
                    f"a document has {num_tokens(key)} tokens{after}, the model has {self._num_positions} "
                    "positions: shorten it"
                )
        return keys

    def _is_first_block_a_document(self, prompt: RagPrompt) -> bool:
        """Return whether a prompt has neither an instruction nor markup before its documents."""
        # the template may remove an instruction of white space
        blocks = [self._local_blocks(prompt, [Document(title="", text=text)]) for text in ("x", "y")]
        return blocks[0][:1] != blocks[1][:1]

    def _local_blocks(self, prompt: RagPrompt, documents: Sequence[Document]) -> list[list[int]]:
        """Return the token ids of the local blocks of a prompt over documents."""
        messages, meta = prompt.build("?", documents, "documents")
        sample = Sample(id="documents", source="documents", messages=messages, response="", meta=meta)
        with self._open():
            return self._encoder.encode_prompt(sample)[:-1]

    def _check_ids(self, blocks: Sequence[Sequence[int]]) -> None:
        for block in blocks:
            check_token_ids(block, self.model.config.vocab_size, "a prompt")

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Hold the engine's lock.

        Raises:
            UserError: the engine is closed.
        """
        with self._lock:
            if self._is_closed:
                raise UserError("the engine is closed: open another one")
            yield

    def _sample(self, prompt: Sample | Mapping[str, Any]) -> Sample:
        return prompt if isinstance(prompt, Sample) else self.parse_request(prompt)

    def _steps(
        self,
        prompts: Sequence[Sequence[Sequence[int]]],
        mode: AttentionMode,
        max_new_tokens: int,
        sampler: Sampler,
        stop: Sequence[str],
    ) -> Generator[list[str], None, list[Answer]]:
        """Check the arguments, then yield and return as `decode_batch` does. Each step needs the lock."""
        if mode not in get_args(AttentionMode):
            raise UserError(f"mode is {mode!r} ({list_allowed(mode, get_args(AttentionMode))})")
        _check_max_new_tokens(max_new_tokens)
        if not prompts:
            return []
        for prompt in prompts:
            if not prompt or not all(len(block) for block in prompt):
                raise UserError("a prompt has no block, or an empty one: each needs at least one token")
            self._check_ids(prompt)
            if (needed := sum(map(len, prompt)) + max_new_tokens) > self._num_positions:
                raise UserError(
                    f"a prompt and its answer need {needed} tokens, the model has {self._num_positions} "
                    "positions: shorten the prompt, or ask for fewer new tokens"
                )
        # full attention is the layout of a single block
        blocks = prompts if mode == "block" else [[[id for block in p for id in block]] for p in prompts]
        partial_answers = [
            PartialAnswer(TextStream(self.tokenizer, stop), self.eos_token_ids) for _ in blocks
        ]
        answers = yield from decode_batch(self.runner, blocks, partial_answers, max_new_tokens, sampler)
        return answers


def _check_max_new_tokens(max_new_tokens: Any) -> None:
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens!r}, it should be a whole number of at least 1")
