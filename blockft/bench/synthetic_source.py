"""A synthetic source of questions with documents, for the benchmark of `prepare`; the seed decides its text.

The words follow Zipf's law over many invented words after the most common words of English, so that a
tokenizer meets new words all the time, as in real text. The records have the format `fid`.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_DOCUMENTS = 10
"""Number of documents of a question by default."""

DOCUMENT_WORDS = (100, 150)
"""Fewest and most words of a document."""

NUM_WORDS = 200_000
"""Number of different words."""

SENTENCE_WORDS = 18
"""Number of words of a sentence."""

VOCABULARY = 32_000
"""Number of tokens of the tokenizer of the benchmark."""

TRAINING_RECORDS = 1_000
"""Number of records on which that tokenizer is trained."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

BATCH_RECORDS = 256
"""Number of records that are drawn together."""

COMMON_WORDS = (
    "the of and in to a was is as for on by with that at from his it an were are which this be had "
    "he also or has first their its one after but who not they have new her two been other when "
    "during there into all more city time school where between years up year most would only about "
    "over world team may used state including then being these more some later made part well known "
    "three second season south north film name him until both early while such many before war "
    "called since end through no following them between under than against number group several "
    "music released series united national west album county university career became born american "
    "work life people high game played area house built family history government road east station "
    "company local club system against song year place member party day public service general town "
    "large won river village home located line set main international"
)
"""Common words of English, the most common ones first, separated by spaces."""

_SYLLABLES = (
    "ba be bi bo bra ca ce cho co cra da de di do dra el en er fa fe fi flo ga ge go gra ha he hol "
    "in ion is ja ka ke kin la le li lo lu ma me mi mo na ne ni nor o or pa pe pi plo po ra re ri "
    "ro ru sa se shi so sta ta te ter thi to tra tu u un va ve vi wa we wil y za ze"
)
_ENDINGS = "n r s t l d m ng st rd nd ck ll th ed er ing ly on"


def write_source(path: Path, num_samples: int, seed: int, num_documents: int = NUM_DOCUMENTS) -> None:
    """Write a file of JSON lines with `num_samples` records."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(num_samples, seed, num_documents))


def records(num_samples: int, seed: int, num_documents: int = NUM_DOCUMENTS) -> Iterator[dict[str, Any]]:
    """Yield records of the format `fid`. The answer stands in one of the documents."""
    rng = np.random.default_rng(seed)
    words = _invent_words()
    cumulative = np.cumsum(1 / (np.arange(len(words)) + 2.7))
    cumulative /= cumulative[-1]
    for start in range(0, num_samples, BATCH_RECORDS):
        num_records = min(BATCH_RECORDS, num_samples - start)
        num_words = rng.integers(*DOCUMENT_WORDS, size=(num_records, num_documents), endpoint=True)
        gold = rng.integers(num_documents, size=num_records)
        drawn = np.searchsorted(cumulative, rng.random(int(num_words.sum()) + 16 * num_records))
        stream = iter(words[drawn].tolist())
        for i in range(num_records):
            yield _record(f"{seed}-{start + i}", stream, num_words[i], int(gold[i]))


def _record(sample_id: str, words: Iterator[str], num_words: NDArray[np.int64], gold: int) -> dict[str, Any]:
    question = " ".join(islice(words, 10))
    texts = [[*islice(words, int(length))] for length in num_words]
    answer = " ".join(texts[gold][40:42])
    return {
        "id": sample_id,
        "question": f"{question.capitalize()}?",
        "answers": [answer],
        "ctxs": [
            {"title": " ".join(text[20:22]).title(), "text": _sentences(text), "score": float(10 - rank)}
            for rank, text in enumerate(texts)
        ],
    }


def _sentences(words: list[str]) -> str:
    sentences = (words[start : start + SENTENCE_WORDS] for start in range(0, len(words), SENTENCE_WORDS))
    return " ".join(f"{' '.join(sentence).capitalize()}." for sentence in sentences)


def _invent_words() -> NDArray[np.str_]:
    """Return all words, the most common ones first. They are the same for every seed."""
    rng = np.random.default_rng(0)
    syllables, endings = np.array(_SYLLABLES.split()), np.array(_ENDINGS.split())
    invented: dict[str, None] = dict.fromkeys(COMMON_WORDS.split())
    while len(invented) < NUM_WORDS:
        for length in rng.integers(1, 4, size=4096):
            invented["".join(rng.choice(syllables, length)) + str(rng.choice(endings))] = None
    return np.array([*islice(invented, NUM_WORDS)])


def save_tokenizer(folder: Path, source: Path, *, num_ids: int | None = None) -> None:
    """Write a tokenizer of byte-level BPE with a ChatML template, trained on records of a source.

    num_ids: the number of token ids, at least 300. Ids that no text of the source needs have a text of their
        own, so that the tokens of a random model can be decoded. None: as many as the source needs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with source.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, TRAINING_RECORDS)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(VOCABULARY, num_ids or VOCABULARY),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((passage["text"] for r in records for passage in r["ctxs"]), trainer)
    if num_ids is not None:
        state = json.loads(tokenizer.to_str())
        vocabulary = state["model"]["vocab"]
        vocabulary |= {f"unused{id}": id for id in range(len(vocabulary), num_ids)}
        tokenizer = Tokenizer.from_str(json.dumps(state))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
