import pytest

from blockft.data.sample import Message
from blockft.data.template import Template
from blockft.errors import UserError
from tests.data.toys import (
    CHATML,
    DATED,
    SHOUTING,
    THINKING,
    TRIMMING,
    rag_sample,
    text_of_cut,
    toy_tokenizer,
)

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def cut(messages: list[Message], documents: tuple[int, ...] = (), chat_template: str = CHATML) -> list[str]:
    return text_of_cut(Template(toy_tokenizer(chat_template)).cut(messages, documents).blocks)


def user(*content: str) -> Message:
    return Message(role="user", content=content)


def test_leading_markup_is_a_block_of_its_own() -> None:
    sample = rag_sample()
    assert cut([*sample.messages], sample.documents) == [
        START,
        "Answer.\n\n",
        "One.\n\n",
        "Two.\n\n",
        f"Who?{END}",
    ]


def test_a_prompt_without_local_blocks_is_one_block() -> None:
    assert cut([user("Who?")]) == [f"{START}Who?{END}"]


def test_markup_ends_the_block_before_it() -> None:
    messages = [Message(role="system", content=("Be brief.",)), user("Hi", "Who?")]
    assert cut(messages) == ["<|im_start|>system\n", f"Be brief.<|im_end|>\n{START}", "Hi", f"Who?{END}"]


def test_markup_never_joins_a_document() -> None:
    messages = [Message(role="system", content=("Read.", "doc")), user("Who?")]
    assert cut(messages, (1,)) == [
        "<|im_start|>system\n",
        "Read.",
        "doc",
        f"<|im_end|>\n{START}",
        f"Who?{END}",
    ]


def test_a_trimming_template_trims_the_ends_of_a_message() -> None:
    messages = [Message(role="system", content=("\n", " Read.\n", "doc\n\n", " ")), user("Who? ")]
    assert cut(messages, (2,), TRIMMING) == [
        "<|im_start|>system\n",
        "Read.\n",
        "doc",
        f"<|im_end|>\n{START}",
        f"Who?{END}",
    ]


def test_a_message_whose_text_looks_like_markup() -> None:
    assert cut([user("stand-in[0]", "<|im_end|>\n", "Who?")])[1:-1] == ["stand-in[0]", "<|im_end|>\n"]


def test_what_follows_the_response() -> None:
    found = Template(toy_tokenizer()).cut([user("Who?")], (), " The fox")
    assert (found.response, found.ending) == (" The fox", "<|im_end|>\n")
    assert Template(toy_tokenizer(TRIMMING)).cut([user("Who?")], (), " The fox").response == "The fox"


def test_the_response_follows_the_generation_prompt() -> None:
    found = Template(toy_tokenizer(THINKING)).cut([user("Who?")], (), "The fox")
    assert text_of_cut(found.blocks) == [f"{START}Who?{END}<think></think>"]
    always = THINKING.replace("enable_thinking is false", "false")
    with pytest.raises(UserError, match="generation prompt"):
        Template(toy_tokenizer(always)).cut([user("Who?")], (), "The fox")


def test_a_dated_template_prints_the_same_date_every_day() -> None:
    assert cut([user("Who?")], (), DATED) == [f"26 Jul 2024{START}Who?{END}"]


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (SHOUTING, "changes the text|does not write"),
        (CHATML.replace("m['content']", "m['content'] | replace('Who', 'Which')"), "changes the text"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{{ messages[-1]['content'] * 2 }}", "does not write"),
        (None, "no chat template"),
    ],
)
def test_an_unfit_template_is_refused(chat_template: str | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Template(toy_tokenizer(chat_template)).cut([user("Who?")], ())
