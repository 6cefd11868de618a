"""`blockft generate`: answer requests of a JSON lines file, and report how many cached blocks were reused."""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from blockft.config.choices import Mode
from blockft.data.fields import format_fields
from blockft.data.request import unknown_document_fields
from blockft.data.sample import Sample
from blockft.errors import UserError, list_allowed, warn
from blockft.inference.answer import Answer
from blockft.inference.block_cache import Tier
from blockft.inference.engine import AttentionMode, Engine
from blockft.inference.runner import CacheOptions
from blockft.inference.sampling import Sampler
from blockft.inputs import parse_json, read_stdin, read_text
from blockft.printable import print_answer, print_text
from blockft.progress import progress
from blockft.units import format_count, parse_bytes

EMPTY_ANSWER = "(empty answer)"
"""Printed for an answer without text; JSON output has the empty text."""


@dataclass(frozen=True, kw_only=True)
class CacheArguments:
    """The block cache's options as texts of the command line, sizes such as 10GB; see `CacheOptions`."""

    folder: Path | None = None
    disk: str | None = None
    host: str | None = None
    device: str | None = None

    def options(self) -> CacheOptions:
        """Return the options with sizes in bytes.

        Raises:
            UserError: a text is not a size, or there is a size for the disk without a folder.
        """
        if self.disk is not None and not self.folder:
            raise UserError("--cache-bytes needs --cache FOLDER, the folder that it limits")
        disk, host, device = (
            None if text is None else parse_bytes(text) for text in (self.disk, self.host, self.device)
        )
        return CacheOptions(folder=self.folder, disk_bytes=disk, host_bytes=host, device_bytes=device)


class _GenerateArguments(TypedDict):
    """Keyword arguments of `Engine.generate_ids` and `Engine.stream_ids`."""

    mode: AttentionMode
    max_new_tokens: int
    sampler: Sampler
    stop: Sequence[str]


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
    """Answer every line of `source` and print the answers; a summary of reused blocks goes to stderr.

    All lines are read before the first answer. Prompt i is sampled with the seed `seed + i`.

    source: a file of requests as `blockft.data.request` reads them, or - for standard input.

    Raises:
        UserError: the mode is unknown; options do not go together; a line is not a request or is too long
            (the message has its number); see `Engine.load`.
    """
    if mode not in Mode.__members__:
        raise UserError(f"--mode is {mode!r} ({list_allowed(mode, Mode)})")
    if stream and (as_json or batch_size > 1):
        raise UserError("--stream prints one answer while it is generated: leave out --json and --batch-size")
    if mode == Mode.full and cache and cache.folder:
        raise UserError("--mode full has no blocks to store or to reuse: leave out --cache")
    Sampler(temperature, top_p, seed)  # raises its errors before the model is loaded
    lines = _read_lines(source)
    options = (cache or CacheArguments()).options()
    answers: list[Answer] = []
    with Engine.load(model, cache=options, compile=compile) as engine:
        unknown = Counter[str]()
        samples = [
            _parse_request(line, engine, f"{source}, line {number}", unknown) for number, line in lines
        ]
        if unknown:
            warn(f"{source} has fields without an effect: {format_fields(unknown)}")
        prompts = [engine.encode(sample, max_new_tokens, trim=trim) for sample in samples]
        with progress("answers", len(prompts), unit="answer", beside_results=True) as advance:
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                arguments = _GenerateArguments(
                    mode="block" if mode == Mode.block else "full",
                    max_new_tokens=max_new_tokens,
                    sampler=Sampler(temperature, top_p, seed + start),
                    stop=stop,
                )
                if stream:
                    answers.append(_print_stream(engine, batch[0], arguments))
                else:
                    batch_answers = engine.generate_ids(batch, **arguments)
                    answers += batch_answers
                    for sample, answer in zip(samples[start:], batch_answers, strict=False):
                        print_answer(_to_json(sample, answer) if as_json else answer.text or EMPTY_ANSWER)
                advance(len(batch))
    print_text(_reuse_summary(answers), file=sys.stderr)


def _print_stream(engine: Engine, prompt: Sequence[Sequence[int]], arguments: _GenerateArguments) -> Answer:
    stream = engine.stream_ids(prompt, **arguments)
    while True:
        try:
            print_answer(next(stream), end="")
        except StopIteration as stop:
            answer: Answer = stop.value
            print_answer("" if answer.text else EMPTY_ANSWER)
            return answer


def _read_lines(source: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, each with its number.

    Raises:
        UserError: the file cannot be read or is not UTF-8, or all lines are blank.
    """
    text = read_stdin("--input") if source == "-" else read_text(Path(source), "--input")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"--input {source} holds no request")
    return lines


def _parse_request(line: str, engine: Engine, location: str, unknown: Counter[str]) -> Sample:
    """Parse a line, and count the fields of its documents that are not known in `unknown`."""
    record = parse_json(line, location)
    sample = engine.parse_request(record, location)
    unknown.update(unknown_document_fields(record))
    return sample


def _to_json(sample: Sample, answer: Answer) -> str:
    fields = asdict(answer)
    first = {"id": sample.id, "answer": fields.pop("text"), "answer_ids": fields.pop("ids")}
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in fields.items()}
    return json.dumps(first | {"blocks": rounded.pop("num_blocks")} | rounded, ensure_ascii=False)


def _reuse_summary(answers: Sequence[Answer]) -> str:
    sources = Counter[str]()
    for answer in answers:
        sources.update(answer.sources)
    tiers = ", ".join(f"{sources[tier]} from the {tier}" for tier in Tier if sources[tier])
    num_tokens = sum(answer.prompt_tokens for answer in answers)
    blocks_reused = sum(answer.blocks_reused for answer in answers)
    tokens_reused = sum(answer.tokens_reused for answer in answers)
    ttft_ms = statistics.median(answer.ttft_ms for answer in answers)
    return (
        f"{format_count(len(answers), 'answer')}; "
        f"{blocks_reused} of {format_count(sources.total(), 'context block')} reused"
        f"{f' ({tiers})' if tiers else ''}, {tokens_reused:,} of {num_tokens:,} prompt tokens "
        f"({100 * tokens_reused / num_tokens:.0f} %); median time to first token {ttft_ms:.1f} ms"
    )
