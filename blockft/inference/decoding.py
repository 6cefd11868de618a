"""Generation for a batch of prompts, step by step. Between steps the model may serve other requests."""

import time
from collections.abc import Generator, Sequence

from blockft.inference.answer import Answer, PartialAnswer, build_answer
from blockft.inference.rotate_queries import CacheInvalidated
from blockft.inference.runner import BlockRunner
from blockft.inference.sampling import Sampler


def decode_batch(
    runner: BlockRunner,
    prompts: Sequence[Sequence[Sequence[int]]],
    partial_answers: Sequence[PartialAnswer],
    num_new: int,
    sampler: Sampler,
) -> Generator[list[str], None, list[Answer]]:
    """Yield each prompt's new text after every step, and return the answers of at most `num_new` tokens.

    prompts          the token ids of each prompt's blocks; the last block is the final block
    partial_answers  an empty answer per prompt

    Between steps the runner may be used for other requests.

    Raises:
        UserError: see `BlockRunner.prefill`.
    """
    start = time.perf_counter()
    contexts = [runner.context_keys(prompt[:-1]) for prompt in prompts]
    finals = [[*prompt[-1]] for prompt in prompts]
    prefill = runner.prefill(contexts, finals, num_new)
    batch, hits, next_ids = prefill.batch, prefill.hits, sampler(prefill.logits).tolist()
    del prefill  # it would keep the memory of a batch that is replaced below
    ttft_ms, seconds = (time.perf_counter() - start) * 1000, 0.0
    for step in range(1, num_new + 1):
        yield [
            partial.append(token, seconds) for partial, token in zip(partial_answers, next_ids, strict=True)
        ]
        if all(partial.finished for partial in partial_answers) or step == num_new:
            break
        start = time.perf_counter()
        for final, token in zip(finals, next_ids, strict=True):
            final.append(token)
        try:
            logits = batch.decode_step([[token] for token in next_ids])[:, -1]
        except CacheInvalidated:
            again = runner.prefill(contexts, finals, num_new - step)
            batch, logits = again.batch, again.logits
        next_ids = sampler(logits).tolist()
        seconds += time.perf_counter() - start
    yield [partial.stream.close() for partial in partial_answers]
    return [
        build_answer(partial, context, prompt, hits, ttft_ms)
        for partial, context, prompt in zip(partial_answers, contexts, prompts, strict=True)
    ]
