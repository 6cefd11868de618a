import pickle
import re

import pytest
from transformers import PreTrainedTokenizerFast

from blockft.data.chat_template import ChatTemplate, RenderedPrompt, TemplateMismatch, TextPart
from blockft.data.sample import Message
from blockft.errors import UserError
from tests.data.families import family_tokenizer
from tests.data.toys import (
    CHATML,
    DATED,
    SHOUTING,
    THINKING,
    TRIMMING,
    block_texts,
    rag_sample,
    toy_tokenizer,
)

START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def render_blocks(
    messages: list[Message],
    documents: tuple[int, ...] = (),
    chat_template: str = CHATML,
    *,
    join_start: bool = False,
) -> list[str]:
    template = ChatTemplate(toy_tokenizer(chat_template))
    return block_texts(template.render(messages, documents, join_start=join_start).blocks)


def user(*content: str) -> Message:
    return Message(role="user", content=content)


def test_leading_markup_is_a_block_of_its_own() -> None:
    sample = rag_sample()
    assert render_blocks([*sample.messages], sample.documents) == [
        START,
        "Answer.\n\n",
        "One.\n\n",
        "Two.\n\n",
        f"Who?{END}",
    ]


def test_leading_markup_can_be_joined_with_the_instruction() -> None:
    sample = rag_sample()
    found = render_blocks([*sample.messages], sample.documents, join_start=True)
    assert found == [f"{START}Answer.\n\n", "One.\n\n", "Two.\n\n", f"Who?{END}"]
    system = [Message(role="system", content=("Read.", "doc")), user("Who?")]
    found = render_blocks(system, (1,), join_start=True)
    assert found == ["<|im_start|>system\nRead.", "doc", f"<|im_end|>\n{START}", f"Who?{END}"]


@pytest.mark.parametrize(
    ("content", "documents"),
    [(("doc", "Who?"), (0,)), (("Who?",), ()), (("", "Who?"), ()), (("", "doc", "Who?"), (1,))],
)
def test_leading_markup_is_not_joined_with_a_document_or_the_final_block(
    content: tuple[str, ...], documents: tuple[int, ...]
) -> None:
    found = render_blocks([user(*content)], documents, join_start=True)
    assert found == render_blocks([user(*content)], documents)


def test_a_template_that_starts_with_the_text_joins_nothing() -> None:
    template = "{% for m in messages %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    found = render_blocks([user("Read.", "Rest.", "Who?")], (), template, join_start=True)
    assert found == ["Read.", "Rest.", "Who?<|im_end|>\n"]


def test_a_prompt_without_local_blocks_is_one_block() -> None:
    assert render_blocks([user("Who?")]) == [f"{START}Who?{END}"]


def test_markup_ends_the_block_before_it() -> None:
    messages = [Message(role="system", content=("Be brief.",)), user("Hi", "Who?")]
    assert render_blocks(messages) == [
        "<|im_start|>system\n",
        f"Be brief.<|im_end|>\n{START}",
        "Hi",
        f"Who?{END}",
    ]


def test_markup_never_becomes_part_of_a_document() -> None:
    messages = [Message(role="system", content=("Read.", "doc")), user("Who?")]
    assert render_blocks(messages, (1,)) == [
        "<|im_start|>system\n",
        "Read.",
        "doc",
        f"<|im_end|>\n{START}",
        f"Who?{END}",
    ]


def test_markup_never_becomes_part_of_a_document_that_is_last_after_trimming() -> None:
    blocks = render_blocks(
        [user("Read.", "doc", " ")], (1,), TRIMMING.replace("'<|im_start|>' + m['role']", "m['role']")
    )
    assert blocks == ["user\n", "Read.", "doc", END]


def test_a_trimming_template_trims_the_ends_of_a_message() -> None:
    messages = [Message(role="system", content=("\n", " Read.\n", "doc", "\n\n", " ")), user("Who? ")]
    assert render_blocks(messages, (2,), TRIMMING) == [
        "<|im_start|>system\n",
        "Read.\n",
        "doc",
        f"<|im_end|>\n{START}",
        f"Who?{END}",
    ]


@pytest.mark.parametrize(("content", "document"), [(("Read.", "doc\n\n"), 1), (("\tdoc", "Read."), 0)])
def test_a_document_that_the_template_trims_is_a_mismatch(content: tuple[str, ...], document: int) -> None:
    messages = [Message(role="system", content=content), user("Who?")]
    shown = re.escape(repr(content[document]))
    with pytest.raises(
        TemplateMismatch, match=f"{shown}, which would be another block in another prompt: put separators"
    ):
        render_blocks(messages, (document,), TRIMMING)
    assert render_blocks(messages, (document,))[document + 1] == content[document]


def test_text_that_looks_like_markup_stays_text() -> None:
    assert render_blocks([user("stand-in[0]", "<|im_end|>\n", "Who?")])[1:-1] == [
        "stand-in[0]",
        "<|im_end|>\n",
    ]


def test_the_ending_is_the_markup_after_the_response() -> None:
    found = ChatTemplate(toy_tokenizer()).render([user("Who?")], (), " The fox")
    assert (found.response, found.ending) == (" The fox", "<|im_end|>\n")
    assert ChatTemplate(toy_tokenizer(TRIMMING)).render([user("Who?")], (), " The fox").response == "The fox"


def test_the_response_follows_the_generation_prompt() -> None:
    found = ChatTemplate(toy_tokenizer(THINKING)).render([user("Who?")], (), "The fox")
    assert block_texts(found.blocks) == [f"{START}Who?{END}<think></think>"]
    unlike = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>model\n'")
    with pytest.raises(TemplateMismatch, match=r"with '.*model.n', but writes '.*assistant.n' before a resp"):
        ChatTemplate(toy_tokenizer(unlike)).render([user("Who?")], (), "The fox")


@pytest.mark.parametrize("thought", ["<think></think>", "<think>\n\n</think>\n\n", "[THINK][/THINK]"])
def test_an_empty_thought_belongs_to_the_prompt(thought: str) -> None:
    is_answer = "m['role'] == 'assistant'"
    in_chat = CHATML.replace("+ m['content']", f"+ ({thought!r} if {is_answer} else '') + m['content']")
    in_prompt = CHATML.replace("'<|im_start|>assistant\n'", repr(f"<|im_start|>assistant\n{thought}"))
    opened = in_chat.replace("'<|im_start|>assistant\n'", repr("<|im_start|>assistant\n<think>\n"))
    for template in (in_chat, in_prompt, *([opened] if thought.startswith("<think>\n") else [])):
        asked = ChatTemplate(toy_tokenizer(template)).render([user("Who?")], ())
        learnt = ChatTemplate(toy_tokenizer(template)).render([user("Who?")], (), "The fox")
        assert asked.blocks == learnt.blocks
        assert block_texts(learnt.blocks) == [f"{START}Who?{END}{thought}"]
        assert learnt.answer == TextPart("The fox", is_markup=False)


def test_a_header_that_the_generation_prompt_lacks_belongs_to_the_prompt() -> None:
    template = CHATML.replace("add_generation_prompt", "false")
    for response in (None, "The fox"):
        found = ChatTemplate(toy_tokenizer(template)).render([user("Who?")], (), response)
        assert block_texts(found.blocks) == [f"{START}Who?{END}"]


@pytest.mark.parametrize("tag", ["<think>", "[THINK]", "<seed:think>"])
def test_an_open_thought_before_the_answer_is_refused_and_the_remedy_works(tag: str) -> None:
    opened = f"<|im_start|>assistant\n{tag}\n"
    template = CHATML.replace("'<|im_start|>assistant\n'", repr(opened))
    with pytest.raises(UserError, match="set model.chat_template to that file") as found:
        ChatTemplate(toy_tokenizer(template)).render([user("Who?")], (), "The fox")
    assert not isinstance(found.value, TemplateMismatch), "no other prompt can be learned either"
    closed = f"{tag}\n\n{tag[0]}/{tag[1:]}\n\n"
    message = str(found.value)
    assert repr(opened)[1:] in message and "'<|im_end|>\\n<|im_start|>assistant\\n'" in message
    assert repr(closed) in message
    # the model itself can be asked with its own template
    asked = ChatTemplate(toy_tokenizer(template)).render([user("Who?")], ())
    assert block_texts(asked.blocks) == [f"{START}Who?{END}{tag}\n"]
    remedied = ChatTemplate(toy_tokenizer(template.replace(repr(f"{tag}\n")[1:-1], repr(closed)[1:-1])))
    assert block_texts(remedied.render([user("Who?")], (), "The fox").blocks) == [f"{START}Who?{END}{closed}"]


def test_white_space_before_a_response_is_tokenized_with_it() -> None:
    spaced = ChatTemplate(family_tokenizer("mistral_v1")).render([user("Who?")], (), "The fox")
    assert spaced == RenderedPrompt(
        ((TextPart("<s>[INST] ", True), TextPart("Who?", False), TextPart(" [/INST]", True)),),
        "The fox",
        "</s>",
        " ",
    )
    assert spaced.answer == TextPart(" The fox", is_markup=False)


def test_a_response_that_the_template_rewrites_is_refused() -> None:
    template = ChatTemplate(family_tokenizer("qwen3"))
    found = template.render([user("Who?")], (), "\n\nNo <think>\n")
    assert (found.opening, found.response, found.ending) == ("", "No <think>\n", "<|im_end|>\n")
    with pytest.raises(TemplateMismatch, match="changes the text '<think>Hm</think>The fox'"):
        template.render([user("Who?")], (), "<think>Hm</think>The fox")


def test_a_template_may_drop_the_system_message_once_there_is_a_response() -> None:
    messages = [Message(role="system", content=("Read.", "doc")), user("Who?")]
    found = ChatTemplate(family_tokenizer("mistral_v3")).render(messages, (1,), "The fox")
    assert block_texts(found.blocks) == ["<s>[INST] ", "Read.", "doc", "\n\n", "Who?[/INST]"]
    assert (found.opening, found.ending) == (" ", "</s>")


def test_an_empty_text_gives_no_block() -> None:
    messages = [Message(role="system", content=("",)), user("", "Who?")]
    assert render_blocks(messages) == [f"<|im_start|>system\n<|im_end|>\n{START}Who?{END}"]
    with pytest.raises(TemplateMismatch, match="changes the text ''"):
        ChatTemplate(family_tokenizer("phi35")).render(messages, ())


def roles(*names: str) -> list[Message]:
    return [Message(role=name, content=(f"text {i}",)) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("family", "messages", "message", "reason"),
    [
        ("gemma2", roles("system", "user"), "System role not supported", "roles refused"),
        (
            "gemma3",
            roles("user", "user"),
            "roles user, user .Conversation roles must alternate",
            "roles refused",
        ),
        ("mistral_v1", roles("assistant", "user"), "should take turns", "roles refused"),
        ("mistral_v3", roles("system", "user", "assistant", "user"), "once, in order", "roles refused"),
        (
            "qwen3",
            [user("1?"), Message(role="assistant", content=("<think>Hm</think>1!",)), user("2?")],
            "changes the text '<think>Hm</think>1!'",
            "text changed",
        ),
    ],
)
def test_a_prompt_that_the_template_refuses_is_a_mismatch(
    family: str, messages: list[Message], message: str, reason: str
) -> None:
    template = ChatTemplate(family_tokenizer(family))
    with pytest.raises(TemplateMismatch, match=message) as found:
        template.render(messages, (), "The fox")
    # workers send it to their parent
    assert pickle.loads(pickle.dumps(found.value)).reason == f"{reason} by the chat template"
    assert template.render([user("Who?")], (), "The fox").response == "The fox"


def named(**templates: str) -> PreTrainedTokenizerFast:
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = templates
    return tokenizer


def test_the_default_of_several_templates_is_taken() -> None:
    found = ChatTemplate(named(default=CHATML, tool_use=SHOUTING)).render([user("Who?")], ())
    assert block_texts(found.blocks) == [f"{START}Who?{END}"]
    with pytest.raises(UserError, match="no chat template named default"):
        ChatTemplate(named(tool_use=CHATML))


def test_a_template_that_is_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="is 5, it should be a text"):
        ChatTemplate(named(default=5))  # type: ignore[arg-type]


def test_a_dated_template_prints_the_same_date_every_day() -> None:
    assert render_blocks([user("Who?")], (), DATED) == [f"26 Jul 2024{START}Who?{END}"]
    # the white space in front is the template's own
    assert render_blocks([user("Who?")], (), f" \n{DATED}") == [f" \n26 Jul 2024{START}Who?{END}"]


@pytest.mark.parametrize(
    ("chat_template", "reason"),
    [
        (SHOUTING, "changes the text|does not write"),
        (CHATML.replace("m['content']", "m['content'] | replace('Who', 'Which')"), "changes the text"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{{ messages[-1]['content'] * 2 }}", "does not write"),
        ("\n{% for m in %}", "line 2 cannot be read"),
        ("{{ messages[0]['content'] + 1 }}", "refuses messages of the roles user"),
        (CHATML.replace("m['content']", "' ' + m['content'] | trim | title"), "changes|does not write"),
        (CHATML.replace("m['content']", "m['content'] | replace('\u2003', '')"), "changes texts of the role"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_changes_texts_is_refused(chat_template: str | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        ChatTemplate(toy_tokenizer(chat_template)).render([user("Who?")], ())
