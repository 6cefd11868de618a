"""From the token ids of prompts to answers, step by step, whatever else the model is asked in between."""

import time
from collections.abc import Generator, Sequence

from blockft.inference.answer import Answer, Writing, answer_of
from blockft.inference.block_key import key_of
from blockft.inference.rotate_queries import Overtaken
from blockft.inference.runner import BlockRunner
from blockft.inference.sampling import Sampler


def decode(
    runner: BlockRunner,
    prompts: Sequence[Sequence[Sequence[int]]],
    writings: Sequence[Writing],
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
    contexts = [[key_of(block) for block in prompt[:-1]] for prompt in prompts]
    finals = [[*prompt[-1]] for prompt in prompts]
    begun = runner.begin(contexts, finals, num_new)
    running, found, next_ids = begun.prompts, begun.found, sampler(begun.logits).tolist()
    del begun  # or the memory of its prompts would stay
    ttft_ms, seconds = (time.perf_counter() - start) * 1000, 0.0
    for step in range(1, num_new + 1):
        yield [writing.take(token, seconds) for writing, token in zip(writings, next_ids, strict=True)]
        if all(writing.ended for writing in writings) or step == num_new:
            break
        start = time.perf_counter()
        for final, token in zip(finals, next_ids, strict=True):
            final.append(token)
        try:
            logits = running.advance([[token] for token in next_ids])[:, -1]
        except Overtaken:
            again = runner.begin(contexts, finals, num_new - step)
            running, logits = again.prompts, again.logits
        next_ids = sampler(logits).tolist()
        seconds += time.perf_counter() - start
    yield [writing.stream.close() for writing in writings]
    return [
        answer_of(writing, context, prompt, found, ttft_ms)
        for writing, context, prompt in zip(writings, contexts, prompts, strict=True)
    ]
