"""Write the demo's model before training: the config of a tiny Llama, and a tokenizer for the demo's texts.

The tokenizer is byte-level BPE, so it encodes any text. It splits text into capitalised words and the
text between them: every name is one token at any place, and so is " is " or " mayor of ". The merges are
built from the texts of the demo.

    python blank.py OUT_FOLDER
"""

import random
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast
from world import ATTRIBUTES, ENDINGS, INSTRUCTION, NAMES, ONSETS, VOWELS, pairs, scene

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
WORD_PATTERN = Regex(r"[A-Z][a-z]*|[^A-Z]+")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    rng = random.Random(0)
    documents, questions = scene(rng, 1, ATTRIBUTES, sentences=True)
    more_documents, more_questions = pairs(rng, short_answers=True)
    texts = [INSTRUCTION, *documents, *more_documents]
    texts += [text for question in questions + more_questions for text in (question.text, question.response)]
    texts += [name for kind in NAMES for name in NAMES[kind]]
    # syllables first, so that the names share their merges
    syllables = [*ENDINGS.values(), *(onset + vowel for onset in ONSETS for vowel in VOWELS)]
    pieces = [*syllables, *map(str.capitalize, syllables), *texts]

    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(WORD_PATTERN, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    merges: dict[tuple[str, str], None] = {}
    words = dict.fromkeys(word for piece in pieces for word, _ in pre_tokenizer.pre_tokenize_str(piece))
    for word in words:
        parts = [token.value for token in BPE(vocab=vocab, merges=list(merges)).tokenize(word)]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts[:2] = [parts[0] + parts[1]]
            vocab.setdefault(parts[0], len(vocab))
    backend = Tokenizer(BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    folder = Path(sys.argv[1])
    tokenizer = build_tokenizer()
    for name in (name for kind in NAMES for name in NAMES[kind]):
        assert len(tokenizer.encode(name)) == 1, name
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
