"""Pages that vLLM's prefix cache knows before it is known whether their load has failed.

A request that is loaded in its step has its pages in the prefix cache as soon as vLLM plans the step. If the
load fails, vLLM fails the request and evicts its pages, but only if the request still runs. If its client has
left, or if it was preempted meanwhile, its pages would stay, and other prompts would use them.
"""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

MAX_PLANNED = 2
"""How many steps vLLM plans before it has the result of the first of them, with asynchronous scheduling."""


class PagePool(Protocol):
    """The pages of vLLM."""

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Remove pages from the prefix cache. Requests that use them keep them."""


class _Prefix(NamedTuple):
    """The tokens up to the end of the first page that a load writes, the cache salt, and the step."""

    step: int
    salt: str | None
    tokens: list[int]


class _Pages(NamedTuple):
    """The pages that a load writes, the number of pages before them, and the step."""

    step: int
    num_before: int
    written: set[int]


class UnconfirmedLoads:
    """Loads in the steps of their requests, until it is known whether they have failed.

    page_len: the number of tokens in a page of vLLM's scheduler.
    """

    def __init__(self, page_len: int) -> None:
        self._page_len, self._step = page_len, 0
        self._pool: PagePool | None = None
        self._prefixes: deque[_Prefix] = deque()
        self._pages: dict[str, _Pages] = {}

    @property
    def has_pool(self) -> bool:
        """Whether pages can be evicted. Without it no request may be loaded in its step."""
        return self._pool is not None

    def use_pool(self, pool: PagePool) -> None:
        """Take the pages of vLLM, which are made after the connector."""
        self._pool = pool

    def add(self, request: Any, pages: Sequence[int], start: int) -> None:
        """Add the load of a request. It begins with the token `start`, the first one of a page."""
        num_before = start // self._page_len
        self._pages[request.request_id] = _Pages(self._step, num_before, {*pages[num_before:]})
        tokens = request.prompt_token_ids[: start + self._page_len]
        self._prefixes.append(_Prefix(self._step, request.cache_salt, tokens))

    def may_share(self, request: Any, num_computed: int) -> bool:
        """Return whether the pages of a request's first `num_computed` tokens may be those of such a load."""
        return any(
            len(tokens) <= num_computed
            and salt == request.cache_salt
            and tokens == request.prompt_token_ids[: len(tokens)]
            for _, salt, tokens in self._prefixes
        )

    def end_step(self) -> None:
        """Record that vLLM has planned a step. It plans the next one with all results but the last."""
        self._step += 1
        while self._prefixes and self._prefixes[0].step <= self._step - MAX_PLANNED:
            self._prefixes.popleft()

    def fail(self, bad_pages: Collection[int]) -> set[str]:
        """Evict pages that could not be written, and return the requests that vLLM has not failed for it.

        They were preempted between the plan of their step and its result.
        """
        if not bad_pages or self._pool is None:
            return set()
        self._pool.evict_blocks({*bad_pages})
        oldest = self._step - MAX_PLANNED
        return {
            id
            for id, (step, _, written) in self._pages.items()
            if step >= oldest and not written.isdisjoint(bad_pages)
        }

    def finish(self, request: Any, pages: Sequence[int]) -> None:
        """Forget a request that has ended, and evict its pages if nobody knows whether they are right.

        A first token shows that they are right.
        """
        load = self._pages.pop(request.request_id, None)
        if load is not None and not request.num_output_tokens:
            assert self._pool is not None
            self._pool.evict_blocks({*pages[load.num_before :]})
