"""What encoding needs of a tokenizer: its twin for text from data, markup's ids, and its fingerprint."""

import hashlib
import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from blockft.data.chat_template import TemplateMismatch
from blockft.errors import UserError

HIDDEN_CHARACTER = "\uffff" * 4
"""Goes before the spelling of a marker that is a piece of a vocabulary, so that no text spells it."""

INSIDE_BYTE = {"Regex": "(?<=<)(?=0x[0-9A-F]{2}>)"}
"""Where to cut a text that spells a byte token, as <0x0A>: a Unigram model would take it for that byte."""


class PlainTokenizer:
    """A tokenizer's twin without added tokens: whatever a text from data spells, it stays text (law 7).

    Nor does it put a space before a text, which would be one more character in every block.

    Raises:
        UserError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        state = _without_added_tokens(tokenizer)
        markers = {
            token["content"]: token["id"]
            for token in state["added_tokens"]
            if not _is_blank(token["content"])
        }
        state["added_tokens"] = []
        model = state["model"]
        if model["type"] == "BPE":
            # some vocabularies spell their markers out of smaller pieces as well
            model["merges"] = [pair for pair in model["merges"] if "".join(_pair(pair)) not in markers]
        elif model["type"] == "Unigram":
            ids = set(markers.values())
            model["vocab"] = [
                [HIDDEN_CHARACTER + piece if id in ids else piece, score]
                for id, (piece, score) in enumerate(model["vocab"])
            ]
            cut = {"type": "Split", "pattern": INSIDE_BYTE, "behavior": "Isolated", "invert": False}
            rules = [rule for rule in (cut, state["pre_tokenizer"]) if rule]
            state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules}
        # a character the model does not know is not a marker, though its token is listed with them
        markers.pop(model.get("unk_token"), None)
        self._markers = {id: content for content, id in markers.items() if id != model.get("unk_id")}
        self._backend = Tokenizer.from_str(json.dumps(state))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text.

        Raises:
            UnfitText: the model's own vocabulary makes an added token of a text.
        """
        all_ids = [
            encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ]
        for ids in all_ids:
            if not self._markers.keys().isdisjoint(ids):
                marker = next(self._markers[id] for id in ids if id in self._markers)
                raise TemplateMismatch(
                    f"the tokenizer's own vocabulary makes its added token {marker!r} of text from data: "
                    "remove it from the vocabulary, or from the data",
                    "added token spelled by a text",
                )
        return all_ids


class TemplatedTokenizer:
    """A tokenizer's twin for text that arrives templated: what spells an added token is one.

    It adds nothing: no token at the start or the end, no space before a text.

    Raises:
        UserError: the tokenizer has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = Tokenizer.from_str(json.dumps(_without_added_tokens(tokenizer)))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def encode_markup(text: str, tokenizer: PreTrainedTokenizerBase, plain: PlainTokenizer) -> list[int]:
    """The ids of what a template wrote, added tokens among them.

    What stands before the first added token follows another text, or nothing, and gets no space before it;
    the rest is encoded as the model knows it.
    """
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
    )
    ids: list[int] = encoding["input_ids"]
    added = tokenizer.added_tokens_decoder
    first = next((i for i, id in enumerate(ids) if id in added), len(ids))
    head = text[: encoding["offset_mapping"][first][0]] if first < len(ids) else text
    return plain.encode([head])[0] + ids[first:]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What identifies a tokenizer: a hash of its vocabulary, rules and chat template."""
    parts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _without_added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A tokenizer's `tokenizer.json` without all that is put around or before a text.

    Raises:
        UserError: it has none.
    """
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {tokenizer.name_or_path} has no tokenizer.json, which blockft needs")
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"post_processor": None, "truncation": None, "padding": None}
    for rules in ("normalizer", "pre_tokenizer"):
        state[rules] = _without_prefix(state[rules])
    return state


def _is_blank(content: str) -> bool:
    """Whether an added token is mere white space, as Gemma's runs of new lines: data may use it."""
    return not content.replace("▁", " ").strip()


def _pair(merge: Any) -> Any:
    return merge.split(" ") if isinstance(merge, str) else merge


def _without_prefix(rules: Any) -> Any:
    """Normalizer or pre-tokenizer rules without those that put a space before a text."""
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
