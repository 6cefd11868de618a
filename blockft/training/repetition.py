"""Find answers that repeat themselves without an end, as models do that were trained on too little data."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

MIN_REPEATED = 16
"""Number of tokens that a repetition has at least; of a shorter answer all tokens."""

SHORTEST_ANSWER = 8
"""Number of tokens below which no answer counts as a repetition."""

MIN_REPEATS = 3
"""Number of times that the repeated text occurs at least."""

MAX_DIGITS = 12
"""Number of digits that a number has at most. In a longer one, such as 0.3333..., the digits may repeat."""


def find_repetition(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the text that the end of an answer repeats, or None.

    The repetition covers at least half of the answer. Each occurrence equals the one before, or differs from
    it in a number that has grown by one: "1. Paris\\n2. Paris\\n3. Paris\\n" is a repetition. Numbers that
    count without words between them are none. Ask only about answers that the model did not end.
    """
    items = _merge_numbers(ids, tokenizer)
    size = len(items)
    needed = max(min(MIN_REPEATED, size), size / 2)
    if size < SHORTEST_ANSWER:
        return None
    for period in range(1, size // MIN_REPEATS + 1):
        repeated = 0
        while repeated < size - period and _continues(items[-1 - repeated - period], items[-1 - repeated]):
            repeated += 1
        if repeated < (MIN_REPEATS - 1) * period or repeated + period < needed:
            continue
        unit = items[-period:]
        text = str(tokenizer.decode([id for item_ids, _ in unit for id in item_ids]))
        is_equal = all(a == b for a, b in zip(items[-2 * period : -period], unit, strict=True))
        if is_equal or any(map(str.isalpha, text)):
            return text
    return None


Item = tuple[tuple[int, ...], int | None]
"""The ids of a token, or of all tokens of a number, and the value of the number."""


def _merge_numbers(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Item]:
    """Return the tokens of a text; the digits of a number become one item."""
    runs: list[list[tuple[int, str]]] = []
    is_number = False
    for id in ids:
        text = str(tokenizer.decode([id]))
        if is_number and text.isdecimal():
            runs[-1].append((id, text))
        else:
            runs.append([(id, text)])
            is_number = text.strip().isdecimal()
    items: list[Item] = []
    for run in runs:
        digits = "".join(text for _, text in run).strip()
        if digits.isdecimal() and len(digits) <= MAX_DIGITS:
            items.append((tuple(id for id, _ in run), int(digits)))
        else:
            items += [((id,), None) for id, _ in run]
    return items


def _continues(earlier: Item, later: Item) -> bool:
    """Return whether an item repeats the one a period before, or counts on from it."""
    if earlier[1] is None or later[1] is None:
        return earlier == later
    return later[1] - earlier[1] in (0, 1)
