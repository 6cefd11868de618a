"""A tokenizer and samples that are small enough to read."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blockft.data.sample import Message, Sample

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}",
).replace("+ m['content']", "+ ('<think></think>' if m['role'] == 'assistant' else '') + m['content']")
SHOUTING = CHATML.replace("m['content']", "m['content'] | upper")
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

CORPUS = ["The quick brown fox jumps over the lazy dog. Question: Who? Answer in a few words. " * 3]


def toy_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with two special tokens and one added token that is not special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=chat_template
    )
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<think>", special=False)])
    return tokenizer


def save_toy_tokenizer(folder: Path) -> Path:
    toy_tokenizer().save_pretrained(folder)
    return folder


def rag_sample(
    question: str = "Who?", documents: tuple[str, ...] = ("One.\n\n", "Two.\n\n"), **changes: Any
) -> Sample:
    """Return a sample with instruction, documents and question in one user message."""
    last = len(documents)
    given: dict[str, Any] = {
        "id": "s",
        "source": "toy",
        "messages": (Message(role="user", content=("Answer.\n\n", *documents, question)),),
        "response": "The fox",
        "answers": ("The fox",),
        "meta": {
            "documents": list(range(1, last + 1)),
            "relevance": [int(d == last - 1) for d in range(last)],
        },
    }
    return Sample(**given | changes)


def block_texts(blocks: Any) -> list[str]:
    """Return the text of each block of a rendered prompt."""
    return ["".join(part.text for part in block) for block in blocks]
