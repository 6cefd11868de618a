"""Prometheus counters of a server, which vLLM exports at /metrics beside its own."""

from collections.abc import Mapping
from typing import Protocol


class Counters(Protocol):
    """What the front end counts."""

    def count_answer(self, mode: str, blocks: Mapping[str, int], tokens: Mapping[str, int]) -> None:
        """Count an answered request, with the blocks and tokens of its context by source."""

    def count_failure(self, reason: str) -> None:
        """Count a request that failed: refused, missing (its blocks), or failed."""

    def count_encoded(self, num_tokens: int) -> None:
        """Count a block that vLLM computed."""


class PrometheusCounters:
    """Counters in the registry of the process."""

    def __init__(self) -> None:
        from prometheus_client import Counter  # vLLM brings it

        self._requests = Counter("blockft_requests", "Answered requests with blocks", ["mode"])
        self._blocks = Counter("blockft_blocks", "Local blocks of answered requests by source", ["source"])
        self._tokens = Counter("blockft_block_tokens", "Tokens of these blocks by source", ["source"])
        self._failures = Counter("blockft_failures", "Failed requests with blocks by reason", ["reason"])
        self._encoded = Counter("blockft_encoded_blocks", "Blocks that vLLM computed")
        self._encoded_tokens = Counter("blockft_encoded_tokens", "Tokens of the blocks that vLLM computed")

    def count_answer(self, mode: str, blocks: Mapping[str, int], tokens: Mapping[str, int]) -> None:
        self._requests.labels(mode).inc()
        for source, number in blocks.items():
            self._blocks.labels(source).inc(number)
        for source, number in tokens.items():
            self._tokens.labels(source).inc(number)

    def count_failure(self, reason: str) -> None:
        self._failures.labels(reason).inc()

    def count_encoded(self, num_tokens: int) -> None:
        self._encoded.inc()
        self._encoded_tokens.inc(num_tokens)
