"""Chat templates of real model families, each with a small tokenizer that has the family's control tokens."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.toys import CORPUS

TEMPLATES = Path(__file__).parent / "templates"
"""Templates written for these tests. Each renders plain chats as the template of its family does. Only
`smollm2.jinja` is a copy of the real template (HuggingFaceTB/SmolLM2, Apache-2.0)."""

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A chat template, the kind of its tokenizer, its control tokens, and the chats that it accepts."""

    template: str
    kind: str
    special: tuple[str, ...]
    other: tuple[str | AddedToken, ...] = ()
    bos: str | None = None
    eos: str
    end_of_turn: str
    system: str = "anywhere"
    """When a chat may start with a system message: `anywhere`, only before a `single` turn, or `never`."""
    trim: bool = False
    opening: str = ""
    loses: str = ""
    """A text that answers must not contain."""
    further_ends: tuple[str, ...] = ()
    """Tokens that the template writes after the end of the turn."""

    @property
    def controls(self) -> list[str]:
        """Return everything that a template of the family writes and a text might spell."""
        marks = ["[INST]", "[/INST]", "<<SYS>>", "<|user|>\n", "Assistant:", "<0x0A>", "▁", self.loses]
        return [str(token) for token in (*self.special, *self.other)] + [mark for mark in marks if mark]


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
THINK = ("<think>", "</think>", "<tool_call>")
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|python_tag|>",
)
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
BLANKS = ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "\t\t")
"""Gemma's added tokens that are white space, which a text may contain."""
PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")

FAMILIES = {
    "smollm2": Family(
        template="smollm2",
        kind="byte_level",
        special=IM,
        bos="<|im_start|>",
        eos="<|im_end|>",
        end_of_turn="<|im_end|>",
    ),
    "llama31": Family(
        template="llama31",
        kind="byte_level",
        special=LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        end_of_turn="<|eot_id|>",
        trim=True,
    ),
    "qwen25": Family(
        template="qwen25",
        kind="nfc",
        special=IM,
        other=("<tool_call>",),
        eos="<|im_end|>",
        end_of_turn="<|im_end|>",
    ),
    "qwen3": Family(
        template="qwen3",
        kind="nfc",
        special=IM,
        other=THINK,
        eos="<|im_end|>",
        end_of_turn="<|im_end|>",
        loses="</think>",
    ),
    "mistral_v1": Family(
        template="mistral_v1",
        kind="prepending",
        special=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        end_of_turn="</s>",
        trim=True,
        opening=" ",
    ),
    "mistral_v3": Family(
        template="mistral_v3",
        kind="metaspace",
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        end_of_turn="</s>",
        system="single",
        opening=" ",
    ),
    "llama2": Family(
        template="llama2",
        kind="prepending",
        special=("<unk>", "<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        end_of_turn="</s>",
        trim=True,
        opening=" ",
    ),
    "gemma2": Family(
        template="gemma2",
        kind="gemma",
        special=GEMMA,
        other=BLANKS,
        bos="<bos>",
        eos="<eos>",
        end_of_turn="<end_of_turn>",
        system="never",
        trim=True,
    ),
    "gemma3": Family(
        template="gemma3",
        kind="gemma",
        special=GEMMA,
        other=BLANKS,
        bos="<bos>",
        eos="<eos>",
        end_of_turn="<end_of_turn>",
        trim=True,
    ),
    "phi3": Family(
        template="phi3",
        kind="prepending",
        special=("<unk>", "<s>"),
        other=tuple(AddedToken(token, rstrip=True, normalized=False) for token in PHI),
        bos="<s>",
        eos="<|endoftext|>",
        end_of_turn="<|end|>",
        further_ends=("<|endoftext|>",),
    ),
    "phi35": Family(
        template="phi35",
        kind="unigram",
        special=("<unk>", "<s>", "</s>", *PHI),
        eos="<|endoftext|>",
        end_of_turn="<|end|>",
        further_ends=("<|endoftext|>",),
    ),
    "tulu3": Family(
        template="tulu3",
        kind="byte_level",
        special=LLAMA3,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        end_of_turn="<|end_of_text|>",
    ),
    "zephyr": Family(
        template="zephyr",
        kind="metaspace",
        special=("<unk>", "<s>", "</s>"),
        other=(AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False),),
        bos="<s>",
        eos="</s>",
        end_of_turn="</s>",
    ),
    "deepseek": Family(
        template="deepseek",
        kind="byte_level",
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        other=(AddedToken("<｜User｜>", single_word=True, lstrip=True),),
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        end_of_turn="<｜end▁of▁sentence｜>",
        opening=" ",
    ),
}


@cache
def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family with its chat template."""
    family = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(family.kind, family.special),
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=(TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8"),
    )
    special = [AddedToken(token, special=True, normalized=False) for token in family.special]
    other = [
        token if isinstance(token, AddedToken) else AddedToken(token, special=False, normalized=False)
        for token in family.other
    ]
    tokenizer.add_tokens([*special, *other])
    return tokenizer


def _backend(kind: str, special: tuple[str, ...]) -> Tokenizer:
    if kind in ("byte_level", "nfc"):
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC() if kind == "nfc" else None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
        )
        return backend
    return _with_bytes(kind, special)


def _with_bytes(kind: str, special: tuple[str, ...]) -> Tokenizer:
    """Return a tokenizer like SentencePiece's: spaces are "▁", and unknown characters become byte tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    # the vocabulary can merge the control tokens from smaller pieces, as some real ones can
    corpus = [*CORPUS, *special * 30]
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    bpe = json.loads(trained.to_str())["model"]
    pieces = list(dict.fromkeys([*special, *BYTES, *bpe["vocab"]]))
    if kind == "unigram":
        # as in real models, the control tokens have the highest scores
        scores = [(piece, 0.0 if piece in special else -float(10 - len(piece))) for piece in pieces]
        backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    else:
        merges = [tuple(pair) for pair in bpe["merges"]]
        vocabulary = {piece: id for id, piece in enumerate(pieces)}
        backend = Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
    rules: dict[str, tuple[Any, Any]] = {
        "prepending": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        "unigram": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
        "gemma": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")),
    }
    backend.normalizer, backend.pre_tokenizer = rules[kind]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend
