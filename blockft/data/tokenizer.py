"""Tokenizers: encode text from data, text that is already templated, and markup of a chat template."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from blockft.data.chat_template import TemplateMismatch
from blockft.errors import UserError

HIDDEN_PREFIX = "\uffff" * 4
"""Put before the spelling of an added token in a Unigram vocabulary, so that no text contains it."""

INSIDE_BYTE_TOKEN = {"Regex": "(?<=<)(?=0x[0-9A-F]{2}>)"}
"""Where to split text that spells a byte token such as <0x0A>, which a Unigram model would read as a byte."""


class PlainTokenizer:
    """A copy of a tokenizer without added tokens, for text from data.

    Text from data never becomes an added token. No space is put before a text, because it would be an extra
    character in every block.

    Raises:
        UserError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        state = _without_automatic_additions(tokenizer)
        markers = {
            token["content"]: token["id"]
            for token in state["added_tokens"]
            if not _is_blank(token["content"])
        }
        state["added_tokens"] = []
        model = state["model"]
        if model["type"] == "BPE":
            # some vocabularies can also merge their added tokens from smaller pieces
            model["merges"] = [pair for pair in model["merges"] if "".join(_pair(pair)) not in markers]
        elif model["type"] == "Unigram":
            ids = set(markers.values())
            model["vocab"] = [
                [HIDDEN_PREFIX + piece if id in ids else piece, score]
                for id, (piece, score) in enumerate(model["vocab"])
            ]
            split = {"type": "Split", "pattern": INSIDE_BYTE_TOKEN, "behavior": "Isolated", "invert": False}
            rules = [rule for rule in (split, state["pre_tokenizer"]) if rule]
            state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules}
        # the unknown token is listed as an added token, but stands for any unknown character
        markers.pop(model.get("unk_token"), None)
        self._markers = {id: content for content, id in markers.items() if id != model.get("unk_id")}
        self._backend = Tokenizer.from_str(json.dumps(state))
        # one entry more than the largest id: larger ids are no markers
        self._is_marker = np.zeros(max(self._markers, default=-1) + 2, np.bool_)
        self._is_marker[[*self._markers]] = True

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text.

        Raises:
            TemplateMismatch: the vocabulary itself turns a text into an added token.
        """
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the token ids of each text as an array; see `encode`."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        lists = (encoding.ids for encoding in encodings)
        all_ids = [np.fromiter(ids, np.int32, len(ids)) for ids in lists]
        for ids in all_ids:
            is_marker = self._is_marker.take(ids, mode="clip")
            if is_marker.any():
                marker = self._markers[int(ids[is_marker.argmax()])]
                raise TemplateMismatch(
                    f"the tokenizer's own vocabulary makes its added token {marker!r} of text from data: "
                    "remove it from the vocabulary, or from the data",
                    "added token spelled by a text",
                )
        return all_ids


class TemplatedTokenizer:
    """A copy of a tokenizer for text that already contains the chat template.

    Text that spells an added token becomes that token. Nothing is added: no token at the start or the end,
    and no space before a text.

    Raises:
        UserError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = Tokenizer.from_str(json.dumps(_without_automatic_additions(tokenizer)))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the token ids of each text as an array."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def encode_markup(text: str, tokenizer: PreTrainedTokenizerBase, plain: PlainTokenizer) -> list[int]:
    """Return the token ids of markup that a chat template wrote, including added tokens.

    The text before the first added token follows other text, or starts the prompt, so no space is put before
    it. The rest is encoded by the tokenizer itself.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
    )
    ids: list[int] = encoding["input_ids"]
    added = tokenizer.added_tokens_decoder
    first = next((i for i, id in enumerate(ids) if id in added), len(ids))
    head = text[: encoding["offset_mapping"][first][0]] if first < len(ids) else text
    return plain.encode([head])[0] + ids[first:]


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the added tokens, special or not, that are no white space."""
    added = tokenizer.added_tokens_decoder
    return frozenset(id for id, token in added.items() if not _is_blank(token.content))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokenizer's vocabulary, rules and chat template."""
    parts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _without_automatic_additions(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the tokenizer's `tokenizer.json` without rules that add to a text or shorten it.

    Removed are post-processor, truncation, padding and prefix-space rules; `added_tokens` is kept.

    Raises:
        UserError: the tokenizer has no `tokenizer.json`.
    """
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {tokenizer.name_or_path} has no tokenizer.json, which blockft needs")
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"post_processor": None, "truncation": None, "padding": None}
    for rules in ("normalizer", "pre_tokenizer"):
        state[rules] = _without_prefix(state[rules])
    return state


def _is_blank(content: str) -> bool:
    """Return whether an added token is white space, like Gemma's new lines. Data may contain these."""
    return not content.replace("▁", " ").strip()


def _pair(merge: Any) -> Any:
    """Return the two pieces of a BPE merge, which some files write as one text."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _without_prefix(rules: Any) -> Any:
    """Return normalizer or pre-tokenizer rules without those that put a space before a text."""
    if rules is None or rules["type"] == "Prepend":
        return None
    changed = dict(rules)
    for parts in ("normalizers", "pretokenizers"):
        if parts in rules:
            changed[parts] = [kept for part in rules[parts] if (kept := _without_prefix(part)) is not None]
    if "add_prefix_space" in rules:
        changed["add_prefix_space"] = False
    if "prepend_scheme" in rules:
        changed["prepend_scheme"] = "never"
    return changed
