"""Answers of the engine, complete and partial, with the source of each block of the prompt."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from blockft.inference.block_cache import CacheHit
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.text_stream import TextStream

NOT_CACHED = "computed"
"""The source of a block that no tier had and that was computed."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The model's answer to one prompt.

    text           the answer, without white space at its ends
    ids            the generated tokens, without an end-of-sequence token
    num_blocks     blocks of the prompt, the final block included
    prompt_tokens  tokens of all blocks
    sources        number of local blocks by source: the tiers "device", "host" and "disk", or "computed"
    blocks_reused  local blocks that came from a tier
    tokens_reused  tokens of these blocks
    ttft_ms        time to first token: from the batch's token ids on the host to its first new ids on the
                   host, without the time that other requests took
    tokens_per_s   speed from the first token to the last, without the time that a reader of the stream took;
                   None for fewer than two tokens
    """

    text: str
    ids: tuple[int, ...]
    num_blocks: int
    prompt_tokens: int
    sources: Mapping[str, int]
    blocks_reused: int
    tokens_reused: int
    ttft_ms: float
    tokens_per_s: float | None


@dataclass
class PartialAnswer:
    """An answer during generation. It is finished at an end-of-sequence token or a stop string.

    seconds: from its first token to its last.
    """

    stream: TextStream
    eos_token_ids: Collection[int]
    ids: list[int] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0

    def append(self, token: int, seconds: float) -> str:
        """Append a token and return the text that is now certain; it may be empty.

        A finished answer ignores the token. `seconds` is the time since the first token.
        """
        if self.finished or token in self.eos_token_ids:
            self.finished = True
            return ""
        self.ids.append(token)
        self.seconds = seconds
        text = self.stream.push(token)
        self.finished = self.stream.stopped
        return text


def build_answer(
    partial: PartialAnswer,
    context: Sequence[BlockKey],
    prompt: Sequence[Sequence[int]],
    hits: Mapping[BlockKey, CacheHit],
    ttft_ms: float,
) -> Answer:
    """Build the answer to a prompt. `hits` are the blocks of its context that a tier had."""
    reused = [key for key in context if key in hits]
    sources = Counter(hits[key].tier.value if key in hits else NOT_CACHED for key in context)
    return Answer(
        text=partial.stream.text.strip(),
        ids=tuple(partial.ids),
        num_blocks=len(context) + 1,
        prompt_tokens=sum(map(len, prompt)),
        sources=dict(sources),
        blocks_reused=len(reused),
        tokens_reused=sum(map(num_tokens, reused)),
        ttft_ms=ttft_ms,
        tokens_per_s=(len(partial.ids) - 1) / partial.seconds if len(partial.ids) > 1 else None,
    )
