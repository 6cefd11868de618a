"""Fields of records: those that a format reads, those without an effect, and those that are refused.

Every format has one `FieldTable`. A field that is known to change what a record means is read, or it is
refused by name. A field that no table knows is counted and changes nothing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from blockft.data.sample import ANSWERABLE_FLAGS, EVIDENCE_MARKS, UNANSWERABLE_FLAGS, check_field, is_list

MAX_UNKNOWN_FIELDS = 100
"""Number of unknown fields of a source that are counted by name. All others are counted together."""

MAX_SHOWN_FIELDS = 8
"""Number of unknown fields that a warning names."""

OTHER_FIELDS = "(other fields)"
"""The name under which further unknown fields are counted."""

MAX_NAME_LEN = 80
"""Number of characters of an unknown field's name that are kept."""

EMPTY_TEXTS = ("", "[]", "{}", "null")
"""Texts that say, as JSON texts do, that a field holds nothing."""


@dataclass(frozen=True)
class Refusal:
    """Why a field is refused. A value that is null or empty, or one of `neutral`, means nothing.

    An object means nothing if all that it holds is empty or false, as objects of parquet files are.
    """

    rule: str
    neutral: tuple[Any, ...] = ()

    def is_neutral(self, value: Any) -> bool:
        """Return whether the value says the same as a field that is absent."""
        if _is_empty(value):
            return True
        if isinstance(value, Mapping):
            return all(_is_empty(element) or element is False for element in value.values())
        return type(value) in (bool, int, float, str) and value in self.neutral


@dataclass(frozen=True, kw_only=True)
class FieldTable:
    """What is known about the fields of a JSON object.

    Attributes:
        read: fields that the parser reads.
        harmless: fields that are known and change no sample, such as addresses, licences and scores.
        refused: fields that change what the record means and that the format does not honour.
        objects: the tables of the JSON objects that a field holds, alone or in a list.
    """

    read: frozenset[str]
    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    objects: Mapping[str, "FieldTable"] = field(default_factory=dict)

    @cached_property
    def passed(self) -> frozenset[str]:
        """The fields whose values are not looked at here."""
        return self.read | self.harmless

    def unknown_fields(self, record: Any, *, path: str = "") -> set[str]:
        """Return the fields of a record that the table does not know, as paths (`messages[].color`).

        A record that is no JSON object has none: its parser refuses the record. `path` is the place of the
        object in its record, with the dot at its end.

        Raises:
            RecordError: a refused field has a value that is not neutral.
        """
        unknown: set[str] = set()
        if isinstance(record, Mapping):
            self._collect(record, path, unknown)
        return unknown

    def _collect(self, value: Mapping[str, Any], path: str, unknown: set[str]) -> None:
        if not value.keys() <= self.passed:
            for name in value:
                if name in self.passed:
                    continue
                standard = standard_name(str(name))
                place = f"field '{path}{printable_name(name)}'"
                if refusal := self.refused.get(name) or self.refused.get(standard):
                    check_field(refusal.is_neutral(value[name]), place, value[name], refusal.rule)
                elif standard in self.read - _HARMLESS:
                    check_field(_is_empty(value[name]), place, value[name], f"be named {standard!r}")
                else:
                    unknown.add(re.sub(r"\[\d+\]", "[]", path) + printable_name(name))
        for name, table in self.objects.items():
            held: Any = value.get(name)
            if isinstance(held, Mapping):
                table._collect(held, f"{path}{name}.", unknown)
            elif is_list(held):
                for i, element in enumerate(held):
                    if isinstance(element, Mapping):
                        table._collect(element, f"{path}{name}[{i}].", unknown)


def format_fields(counts: Mapping[str, int]) -> str:
    """Return the most frequent unknown fields with their number of records, for a warning."""
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = ", ".join(f"{name} ({number:,})" for name, number in ranked[:MAX_SHOWN_FIELDS])
    num_more = len(ranked) - MAX_SHOWN_FIELDS
    return f"{shown} and {num_more:,} more" if num_more > 0 else shown


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in EMPTY_TEXTS
    return value is None or (isinstance(value, Mapping) or is_list(value)) and not value


@cache
def standard_name(name: str) -> str:
    """Return a name in lower case with underscores, such as `system_prompt` for `systemPrompt`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+", "_", name).lower()


def printable_name(name: Any) -> str:
    """Return the name of a field in a form that can be printed and encoded, at most `MAX_NAME_LEN` long."""
    text = str(name)
    shown = text if text.isprintable() else repr(text)[1:-1]
    return shown if len(shown) <= MAX_NAME_LEN else f"{shown[:MAX_NAME_LEN]}..."


def _names(*groups: str | Iterable[str]) -> frozenset[str]:
    """Return the names of several groups, each a text with names between spaces, or a set of names."""
    return frozenset(
        name for group in groups for name in (group.split() if isinstance(group, str) else group)
    )


def _refused(rule: str, names: str, *neutral: Any) -> dict[str, Refusal]:
    return {name: Refusal(rule, neutral) for name in names.split()}


# fields of any record

_PREFERENCE = "be absent: the labels of preference data cannot be learned"
_MEDIA = "be absent: images, sound and video cannot be read"
_TOOLS = "be absent: tools cannot be learned"
_THOUGHT = "be absent: a thought is not learned apart from its answer; write it into the answer, or remove it"
_REFUSAL = "be absent: write a refusal into the text of the answer, or remove the record"
_MASK = "be absent: a mask cannot choose the tokens that are learned"

_CONTEXT = "be absent: write the documents into the messages, or use a format of questions"

_MEDIA_NAMES = (
    "image images image_url image_urls image_path image_paths audio audios audio_path input_audio "
    "video videos video_url video_path attachment attachments"
)
_TOOL_NAMES = "tools available_tools functions tool_calls tool_results function_call function_calls"
_THOUGHT_NAMES = "reasoning_content reasoning_details thought thoughts"
_CONTEXT_NAMES = "document documents docs context contexts ctxs passages retrieved_documents"
_PREFERENCE_NAMES = (
    "chosen rejected preferred_output non_preferred_output preference preferences chosen_response "
    "chosen_messages chosen_conversations rejected_response rejected_responses rejected_messages "
    "rejected_conversations rejected_output rejected_answer is_chosen is_rejected is_preferred"
)
_LEARN_NAMES = (
    "learn learnable trained is_trained is_train is_trainable train_on train_on_turn compute_loss "
    "calculate_loss include_in_loss supervise supervised"
)
_MASK_NAMES = "mask masks loss_mask step_loss_mask train_mask assistant_mask assistant_masks completion_mask"

SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "system_instruction")
"""The fields of a chat's record that may hold its system message."""

LEARN_FLAGS = ("weight", "train", "training", "trainable", "loss")
"""The fields of a message that say whether its text is learned: 1 or true, 0 or false."""

_HARMLESS = _names(
    "_id id idx index uid uuid guid record_id sample_id source_id dataset dataset_name dataset_id subset",
    "split version source url urls link license licence copyright language lang locale category categories",
    "subcategory topic topics tag tags domain difficulty task task_name task_type type level",
    "score scores rating ratings reward rewards quality model model_name model_id generator engine",
    "created_at created timestamp time date author annotator annotators metadata meta hash md5 sha256",
    "num_turns num_tokens token_count length embedding",
)
"""Fields that describe a record and do not change what it means, in every format."""

_ANYWHERE = {
    **_refused(_PREFERENCE, _PREFERENCE_NAMES),
    **_refused(_PREFERENCE, "kto_tag", True, 1),
    **_refused(_MEDIA, _MEDIA_NAMES),
    **_refused(_TOOLS, _TOOL_NAMES),
    **_refused(_THOUGHT, _THOUGHT_NAMES),
    # these may say whether the answer holds a thought
    **_refused(_THOUGHT, "reasoning thinking", True, False, "on", "off"),
    **_refused(_MASK, _MASK_NAMES),
    **_refused(_MASK, "masked is_masked mask_history", False),
    **_refused("be 1 or absent: records cannot be weighted", "weight sample_weight loss_weight", 1),
    **_refused(
        "be true or absent: remove a record that is not learned",
        f"train training trainable loss {_LEARN_NAMES}",
        1,
    ),
    **_refused(
        "be absent: every prompt is rendered with the same arguments",
        "chat_template_kwargs enable_thinking",
        False,
    ),
}
"""Fields that change what a record means in every format, with the reason why they are refused."""


# questions

_QUESTION_REFUSED = {
    **_ANYWHERE,
    **_refused(
        "be absent: questions are asked in the wording of data.prompt",
        f"{' '.join(SYSTEM_FIELDS)} instruction history messages conversations",
    ),
}

_PASSAGE_HARMLESS = _names(
    _HARMLESS,
    "passage_id psg_id doc_id docid document_id page_id wikipedia_id wikipedia_title section section_title",
    "rank title_score bm25_score dense_score similarity original_retrieval_index sentences start end",
)


def _passages(*read: str) -> FieldTable:
    """Return the table of the documents of a question."""
    return FieldTable(
        read=_names("title", read),
        harmless=_PASSAGE_HARMLESS - _names(read),
        refused=_refused(_MEDIA, _MEDIA_NAMES),
    )


def _questions(
    read: str, *, harmless: str = "", objects: Mapping[str, FieldTable] | None = None
) -> FieldTable:
    """Return the table of a format of questions. Every such format reads whether there is an answer."""
    fields = _names(read, "question", ANSWERABLE_FLAGS, UNANSWERABLE_FLAGS)
    return FieldTable(
        read=fields,
        harmless=_names(_HARMLESS, harmless) - fields,
        refused={name: refusal for name, refusal in _QUESTION_REFUSED.items() if name not in fields},
        objects=objects or {},
    )


MULTI_HOP = _questions(
    "_id id answer answer_aliases supporting_facts context type level",
    harmless="evidences evidences_id answer_id entity_ids qa_pairs explanation question_decomposition",
)

MUSIQUE = _questions(
    "id answer answer_aliases paragraphs",
    harmless="question_decomposition",
    objects={"paragraphs": _passages("paragraph_text", "is_supporting")},
)

SQUAD_ANSWERS = FieldTable(
    read=_names("text"),
    harmless=_names(_HARMLESS, "answer_start answer_end answer_id answer_category"),
    refused=_ANYWHERE,
)

SQUAD_QUESTION = _questions(
    "id answers title context",
    harmless="plausible_answers detected_answers question_id document_id",
    objects={"answers": SQUAD_ANSWERS},
)
"""A question of an article, or the row of the dataset on the Hub, which repeats title and paragraph."""

SQUAD_PARAGRAPH = FieldTable(
    read=_names("context qas"), harmless=_names(_HARMLESS, "document_id"), refused=_ANYWHERE
)
SQUAD_ARTICLE = FieldTable(read=_names("title paragraphs"), harmless=_HARMLESS, refused=_ANYWHERE)
SQUAD_FILE = FieldTable(read=_names("data"), harmless=_HARMLESS, refused=_ANYWHERE)

_FID_PASSAGES = _passages("text", "score", *EVIDENCE_MARKS)

FID = _questions(
    "id _id answers answer target ctxs positive_ctxs hard_negative_ctxs negative_ctxs",
    harmless="nq_annotated_gold question_id q_id",
    objects=dict.fromkeys(("ctxs", "positive_ctxs", "hard_negative_ctxs", "negative_ctxs"), _FID_PASSAGES),
)

CONSTRUCTED = FieldTable(read=_names("id set question answer documents type level"))
"""The records of constructed sets, which come from no file."""


# chats and instructions

_LABEL = _refused(_PREFERENCE, "label", True, 1)

CHAT_COPIES = ("instruction", "instructions", "completion", "completions", "response", "output")
"""The fields of a chat's record that may repeat the text of a message, and hold nothing else."""

_OTHER_SYSTEM_FIELDS = _refused(
    "be named 'system'", "sys sys_prompt system_text system_msg preamble developer_message"
)

_CHAT_HARMLESS = _names(
    _HARMLESS,
    "prompt prompt_id conversation_id conversation_hash thread_id message_id score_chosen score_rejected",
    "tool_choice parallel_tool_calls turn toxic redacted moderation openai_moderation detoxify_moderation",
    "country state header hashed_ip",
)

CONTENT_PART = FieldTable(
    read=_names("type text"),
    harmless=_names("index id cache_control annotations"),
    refused={
        **_refused(_MEDIA, f"{_MEDIA_NAMES} file"),
        **_refused(_TOOLS, _TOOL_NAMES),
        **_refused(_THOUGHT, f"{_THOUGHT_NAMES} reasoning thinking"),
        **_refused(_REFUSAL, "refusal"),
    },
)

_MESSAGE_REFUSED = {
    **{name: refusal for name, refusal in _ANYWHERE.items() if name not in LEARN_FLAGS},
    **_LABEL,
    **_refused("be true or absent: an answer with the weight 0 is not learned", _LEARN_NAMES, 1),
    **_refused(
        "be false or absent: an answer with the weight 0 is not learned", "ignore no_loss skip", False
    ),
    **_refused(_CONTEXT, _CONTEXT_NAMES),
    **_refused(_TOOLS, "tool_call_id tool_name tool_responses"),
    **_refused(_REFUSAL, "refusal"),
    **_refused("be absent: the prompt names no speaker other than the role", "name"),
    **_refused("be absent: an answer is learned as a whole", "train_detail training_detail"),
    **_refused("be false or absent: an answer is learned as a whole", "prefix partial", False),
}

_MESSAGE_HARMLESS = _names(
    _CHAT_HARMLESS, "parent_id parent_message_id turn_identifier cache_control status end_turn recipient"
) - _names("prompt")


CHAT_MESSAGE = FieldTable(
    read=_names("role content from value", LEARN_FLAGS),
    harmless=_MESSAGE_HARMLESS,
    refused=_MESSAGE_REFUSED,
    objects=dict.fromkeys(("content", "value"), CONTENT_PART),
)

CHAT = FieldTable(
    read=_names("id source messages conversations", SYSTEM_FIELDS, CHAT_COPIES),
    harmless=_CHAT_HARMLESS - _names("id source"),
    refused={
        **_ANYWHERE,
        **_LABEL,
        **_OTHER_SYSTEM_FIELDS,
        **_refused(_CONTEXT, _CONTEXT_NAMES),
    },
    objects={
        **dict.fromkeys(("messages", "conversations"), CHAT_MESSAGE),
        **dict.fromkeys(SYSTEM_FIELDS, CONTENT_PART),
    },
)

ALPACA = FieldTable(
    read=_names("id source instruction input output history", SYSTEM_FIELDS),
    harmless=(_CHAT_HARMLESS | _names("text")) - _names("id source"),
    refused={
        **_ANYWHERE,
        **_LABEL,
        **_OTHER_SYSTEM_FIELDS,
        **_refused("be absent: the turns stand in instruction and history", "messages conversations"),
        **_refused("be absent: write it into 'input'", _CONTEXT_NAMES),
        **_refused("be absent: the answer stands in 'output'", "completion response"),
    },
    objects=dict.fromkeys(SYSTEM_FIELDS, CONTENT_PART),
)


# prompts with marked blocks

_BLOCKS_PASSAGES = _passages("text", "score", *EVIDENCE_MARKS)

BLOCKS = FieldTable(
    read=_names("id source prompt question blocks chunks documents response generated answers train_block"),
    harmless=(_HARMLESS | _names("inputs input_ids labels attention_mask position_ids block_tokens"))
    - _names("id source"),
    refused={
        **_ANYWHERE,
        **_LABEL,
        **_refused(
            "be absent: the prompt already holds every message", f"{' '.join(SYSTEM_FIELDS)} messages"
        ),
    },
    objects={"documents": _BLOCKS_PASSAGES},
)

_SAMPLE_MESSAGE = FieldTable(
    read=_names("role content"),
    harmless=_MESSAGE_HARMLESS,
    refused={
        **_MESSAGE_REFUSED,
        **_refused("be 0 or absent: only the response is learned", " ".join(LEARN_FLAGS), False),
    },
)

SAMPLES = FieldTable(
    read=_names("id source messages blocks response answers meta"),
    harmless=_HARMLESS - _names("id source meta"),
    refused={
        **_ANYWHERE,
        **_LABEL,
        **_refused("be absent: write a system message into the messages", " ".join(SYSTEM_FIELDS)),
    },
    objects={"messages": _SAMPLE_MESSAGE},
)
"""The format of blockft itself."""

REQUEST_DOCUMENT = _passages("text", "score")
"""A document of a request to `generate`."""
