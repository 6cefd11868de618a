"""From the token ids of prompts to answers, step by step, whatever else the model is asked in between."""

import time
from collections.abc import Generator, Sequence

from blockft.inference.answer import Answer, PartialAnswer, build_answer
from blockft.inference.block_key import block_key
from blockft.inference.rotate_queries import CacheInvalidated
from blockft.inference.runner import BlockRunner
from blockft.inference.sampling import Sampler


def decode_batch(
    runner: BlockRunner,
    prompts: Sequence[Sequence[Sequence[int]]],
    writings: Sequence[PartialAnswer],
    num_new: int,
    sampler: Sampler,
) -> Generator[list[str], None, list[Answer]]:
    """Yields the new text of every prompt after each of at most `num_new` steps, and returns the answers.

    prompts: the token ids of each prompt's blocks. writings: the answer to each, still empty.
    Between steps the runner may be asked for anything else.

    Raises:
        UserError: see `BlockRunner.begin`.
    """
    start = time.perf_counter()
    contexts = [[block_key(block) for block in prompt[:-1]] for prompt in prompts]
    finals = [[*prompt[-1]] for prompt in prompts]
    begun = runner.prefill(contexts, finals, num_new)
    running, found, next_ids = begun.prompts, begun.found, sampler(begun.logits).tolist()
    del begun  # or the memory of its prompts would stay
    ttft_ms, seconds = (time.perf_counter() - start) * 1000, 0.0
    for step in range(1, num_new + 1):
        yield [writing.append(token, seconds) for writing, token in zip(writings, next_ids, strict=True)]
        if all(writing.ended for writing in writings) or step == num_new:
            break
        start = time.perf_counter()
        for final, token in zip(finals, next_ids, strict=True):
            final.append(token)
        try:
            logits = running.decode_step([[token] for token in next_ids])[:, -1]
        except CacheInvalidated:
            again = runner.prefill(contexts, finals, num_new - step)
            running, logits = again.prompts, again.logits
        next_ids = sampler(logits).tolist()
        seconds += time.perf_counter() - start
    yield [writing.stream.close() for writing in writings]
    return [
        build_answer(writing, context, prompt, found, ttft_ms)
        for writing, context, prompt in zip(writings, contexts, prompts, strict=True)
    ]
