"""Endless repetition is found in any script, and answers that only look repetitive are none."""

import pytest
from transformers import PreTrainedTokenizerFast

from blockft.training.repetition import find_repetition
from tests.run import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: a character of another script is several tokens."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def repetition_of(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    return find_repetition(tokenizer.encode(text, add_special_tokens=False), tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        " the the the the the the the the",
        "The answer is Paris. " * 6,
        "The answer is Paris. The answer is Par" + "is. The answer is Par" * 2,
        "It was built in 1889 by Eiffel. I do not know. I do not know. I do not know. I do not know.",
        "1. Paris\n2. Paris\n3. Paris\n4. Paris\n",
        "Step 8: go on.\nStep 9: go on.\nStep 10: go on.\nStep 11: go on.\n",
        "return x\n    return x\n    return x\n    return x\n    return x",
        "好的好的好的好的好的好的",
        "да да да да да да да да да",
        "نعم نعم نعم نعم نعم نعم",
        "🙂🙂🙂🙂🙂🙂🙂",
        "0 0 0 0 0 0 0 0 0 0 0 0",
        "0" * 64,
        "One third is 0." + "3" * 49,
        "142857" * 1000,  # more digits than Python makes a number of
        "!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!",
    ],
)
def test_an_answer_that_repeats_itself_is_found(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    unit = repetition_of(text, tokenizer)
    assert unit, text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "7",
        "no no no",
        "The Eiffel Tower was built between 1887 and 1889 and stands in Paris, the capital of France.",
        "1. Paris\n2. London\n3. Rome\n4. Berlin\n5. Madrid\n6. Lisbon\n7. Vienna\n",
        "- red\n- green\n- blue\n- yellow\n- black\n- white\n",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16",
        "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43",
        "0.12, 0.57, 0.33, 0.98, 0.41, 0.77, 0.05, 0.63",
        "Pi is 3.14159265358979323846264338327950288",
        '[{"id": 7, "age": 31}, {"id": 12, "age": 28}, {"id": 40, "age": 55}, {"id": 3, "age": 19}]',
        "for i in range(10):\n    for j in range(10):\n        grid[i][j] = 0\n    print(grid[i])\n",
        "def f(x):\n    return x + 1\n\ndef g(x):\n    return x + 2\n\ndef h(x):\n    return x * 3\n",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 9 |\n| 5 | 4 |\n",
        "好的，我明白了。埃菲尔铁塔位于法国首都巴黎。",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, life is but a dream.",
        "ATGGCCATTGTAATGGGCCGCTGAAAGGGTGCCCGATAG",
    ],
)
def test_other_answers_are_no_repetition(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert repetition_of(text, tokenizer) is None


def test_a_repetition_after_a_longer_text_is_not_yet_one(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The Eiffel Tower stands in Paris, the capital of France, and attracts many visitors."
    assert repetition_of(text + " yes yes yes yes", tokenizer) is None
    assert repetition_of(text + " yes" * 30, tokenizer) is not None
