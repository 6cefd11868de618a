"""What an engine answers, and where the blocks of the prompt came from."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from blockft.inference.block_cache import CacheHit
from blockft.inference.block_key import BlockKey, num_tokens
from blockft.inference.text_stream import TextStream

NOT_CACHED = "encoded"
"""Where a block came from that no tier had."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model answered to one prompt.

    ids              the tokens that it wrote, without one that ends a turn
    num_blocks       blocks of the prompt, the final one among them; prompt_tokens are theirs
    sources          how many local blocks came from the tiers device, host and disk, or were encoded
    blocks_reused    local blocks that needed not be encoded, of tokens_reused tokens
    ttft_ms          from token ids on the host to the first new id of the whole batch on the host, without
                     what others' requests took before
    tokens_per_s     after the first one and up to its last, without what a stream's reader took; None if
                     there is none
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
    """An answer that is being written, token by token, up to one of `ends` or a stop string.

    seconds: from its first token to its last.
    """

    stream: TextStream
    ends: Collection[int]
    ids: list[int] = field(default_factory=list)
    ended: bool = False
    seconds: float = 0

    def append(self, token: int, seconds: float) -> str:
        """The text that is now certain, perhaps none; after the end always none.

        `seconds` have passed since the first token.
        """
        if self.ended or token in self.ends:
            self.ended = True
            return ""
        self.ids.append(token)
        self.seconds = seconds
        piece = self.stream.push(token)
        self.ended = self.stream.stopped
        return piece


def build_answer(
    writing: PartialAnswer,
    context: Sequence[BlockKey],
    prompt: Sequence[Sequence[int]],
    found: Mapping[BlockKey, CacheHit],
    ttft_ms: float,
) -> Answer:
    """The answer to a prompt over a context whose blocks were `found`, but for those that were encoded."""
    reused = [key for key in context if key in found]
    sources = Counter(found[key].tier.value if key in found else NOT_CACHED for key in context)
    return Answer(
        text=writing.stream.text.strip(),
        ids=tuple(writing.ids),
        num_blocks=len(context) + 1,
        prompt_tokens=sum(map(len, prompt)),
        sources=dict(sources),
        blocks_reused=len(reused),
        tokens_reused=sum(map(num_tokens, reused)),
        ttft_ms=ttft_ms,
        tokens_per_s=(len(writing.ids) - 1) / writing.seconds if len(writing.ids) > 1 else None,
    )
