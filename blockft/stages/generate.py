"""`blockft generate`: requests from JSON lines, answers as text or JSON, and what was reused for them."""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from blockft.config.choices import Mode
from blockft.config.settings import PromptSettings
from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import Sample
from blockft.errors import UserError
from blockft.inference.answer import Answer
from blockft.inference.block_cache import Tier
from blockft.inference.engine import Engine
from blockft.inference.runner import CacheOptions
from blockft.inference.sampling import Sampler
from blockft.progress import progress
from blockft.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class CacheArguments:
    """The block cache as the command line spells it; see `CacheOptions`."""

    folder: Path | None = None
    disk: str | None = None
    host: str | None = None
    device: str | None = None

    def options(self) -> CacheOptions:
        """Raises:
        UserError: one is no size, or there is a budget for a disk without a folder.
        """
        if self.disk is not None and not self.folder:
            raise UserError("--cache-bytes needs --cache FOLDER, the folder that they are for")
        disk, host, device = (
            None if text is None else parse_bytes(text) for text in (self.disk, self.host, self.device)
        )
        return CacheOptions(folder=self.folder, disk_bytes=disk, host_bytes=host, device_bytes=device)


class _Settings(TypedDict):
    """How `Engine.generate_ids` and `Engine.stream_ids` answer."""

    mode: str
    max_new_tokens: int
    sampler: Sampler
    stop: Sequence[str]


def open_engine(model: str, cache: CacheArguments, *, compile: bool = False) -> Engine:
    """A model with its block cache; one that does not say how it is asked is asked as recipes do by default.

    Raises:
        UserError: see `CacheArguments` and `Engine`.
    """
    engine = Engine.load(model, cache=cache.options(), compile=compile)
    if engine.prompt is None:
        default = PromptSettings()
        wording = {name: getattr(default, name) for name in ("instruction", "document", "question")}
        engine.prompt = RagPrompt(**wording, documents_in=default.documents_in.value, order="given")
    return engine


def generate(
    model: str,
    source: str,
    *,
    mode: str = "block",
    max_new_tokens: int = 128,
    temperature: float = 0,
    top_p: float = 1,
    seed: int = 0,
    stop: Sequence[str] = (),
    trim: bool = False,
    batch_size: int = 1,
    stream: bool = False,
    as_json: bool = False,
    compile: bool = False,
    cache: CacheArguments | None = None,
) -> None:
    """Answer every line of `source`, a request as `data.request` reads it; all are read before the first one.

    Raises:
        UserError: an unknown mode; settings that do not go together; a line that is no request, by its
            number, or is too long; see `open_engine`.
    """
    if mode not in Mode.__members__:
        raise UserError(f"--mode is {mode!r}, allowed are {', '.join(Mode.__members__)}")
    if stream and (as_json or batch_size > 1):
        raise UserError("--stream writes one text after the other: leave out --json and --batch-size")
    if mode == Mode.full and cache and cache.folder:
        raise UserError("--mode full has no blocks to keep or to reuse: leave out --cache")
    Sampler(temperature, top_p, seed)
    lines = _lines(source)
    engine = open_engine(model, cache or CacheArguments(), compile=compile)
    prompts = [_prompt(line, engine, f"{source}, line {number}") for number, line in lines]
    ids = [engine.encode(prompt, max_new_tokens, trim=trim) for prompt in prompts]
    answers: list[Answer] = []
    with progress("answers", len(prompts), beside_results=True) as advance:
        for start in range(0, len(prompts), batch_size):
            # prompt i is sampled with the seed `seed + i`, whatever the batch
            sampler = Sampler(temperature, top_p, seed + start)
            batch = ids[start : start + batch_size]
            settings = _Settings(mode=mode, max_new_tokens=max_new_tokens, sampler=sampler, stop=stop)
            if stream:
                answers.append(_stream(engine, batch[0], settings))
            else:
                new = engine.generate_ids(batch, **settings)
                answers += new
                for prompt, answer in zip(prompts[start:], new, strict=False):
                    print(_as_json(prompt, answer) if as_json else answer.text, flush=True)
            advance(len(batch))
    engine.close()
    print(_summary(answers), file=sys.stderr)


def _stream(engine: Engine, ids: Sequence[Sequence[int]], settings: _Settings) -> Answer:
    pieces = engine.stream_ids(ids, **settings)
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print(flush=True)
            answer: Answer = end.value
            return answer


def _lines(source: str) -> list[tuple[int, str]]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input {source} cannot be read: {error}") from error
    text = text.removeprefix("\ufeff")  # a byte order mark
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"--input {source} holds no prompt")
    return lines


def _prompt(line: str, engine: Engine, at: str) -> Sample:
    """The prompt of one line of input.

    Raises:
        UserError: it is none.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{at} is not JSON: {error}") from error
    return engine.request(record, at)


def _as_json(prompt: Sample, answer: Answer) -> str:
    facts = asdict(answer)
    renamed = {"id": prompt.id, "answer": facts.pop("text"), "answer_ids": facts.pop("ids")}
    rounded = {name: round(v, 2) if isinstance(v, float) else v for name, v in facts.items()}
    return json.dumps(renamed | {"blocks": rounded.pop("num_blocks")} | rounded, ensure_ascii=False)


def _summary(answers: Sequence[Answer]) -> str:
    sources = Counter[str]()
    for answer in answers:
        sources.update(answer.sources)
    tiers = ", ".join(f"{sources[tier]} from the {tier}" for tier in Tier if sources[tier])
    tokens = sum(answer.prompt_tokens for answer in answers)
    reused, saved = (sum(getattr(a, f"{name}_reused") for a in answers) for name in ("blocks", "tokens"))
    ttft = statistics.median(answer.ttft_ms for answer in answers)
    return (
        f"{len(answers)} answers; {reused} of {sources.total()} context blocks reused"
        f"{f' ({tiers})' if tiers else ''}, {saved:,} of {tokens:,} prompt tokens "
        f"({100 * saved / tokens:.0f} %); median time to first token {ttft:.1f} ms"
    )
