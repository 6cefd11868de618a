"""Settings of a run as pydantic models: the type, default, bounds and description of every setting.

A recipe overrides the defaults, and `key=value` overrides a recipe (see `blockft.config.recipe`). Only `cli`
and `stages` read settings; all other code takes plain arguments.
"""

import math
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from blockft.config.bounds import (
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_CONCURRENCY,
    MAX_COPIES,
    MAX_COUNT,
    MAX_EPOCHS,
    MAX_FLOAT,
    MAX_PROCESSES,
    MAX_RUN_SEED,
    MAX_SEED,
    MAX_TOKENS,
)
from blockft.config.choices import (
    AttentionBackend,
    BadRecordPolicy,
    DType,
    Format,
    GradientCheckpointing,
    MethodName,
    Mode,
    Objective,
    Optimizer,
    Order,
    Positions,
    Quantization,
    RecomputedTokens,
    Response,
    Retriever,
    Role,
    TooLongPolicy,
    UnsplitPolicy,
    WeightInit,
)
from blockft.inputs import column_path_problem, path_problem


def _parse_int(value: Any) -> Any:
    """Refuse what pydantic would convert silently: `true`, `3.0` and the text "3.0" are not whole numbers."""
    try:
        if isinstance(value, str):
            return int(value)
    except ValueError as error:
        raise PydanticCustomError("int_parsing", "not a whole number") from error
    if isinstance(value, bool | float):
        raise PydanticCustomError("int_type", "not a whole number")
    return value


def _refuse_bool(value: Any) -> Any:
    """Refuse `true` and `false`, which pydantic would convert to 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("float_type", "not a number")
    return value


def _parse_text(value: Any) -> Any:
    """Take a whole number as the text that it was written as; refuse others, whose text YAML has changed."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _check_finite(value: Any) -> Any:
    """Refuse infinite numbers and nan anywhere in the arguments of a library, which would take them."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inner:
        _check_finite(item)
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("finite_number", "not finite")
    return value


def _check_path(value: str) -> str:
    """Refuse a text that cannot be a path."""
    if problem := path_problem(value):
        raise PydanticCustomError("path", "it {problem}", {"problem": problem})
    return value


def _check_variable(value: str) -> str:
    """Refuse a text that cannot name an environment variable. It may be a key, which no message repeats."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        raise PydanticCustomError(
            "secret", "is not the name of an environment variable: letters, digits and _, such as TEACHER_KEY"
        )
    return value


def _check_url(value: str) -> str:
    """Refuse a text that is not the address of a server. It may hold a password, which no message repeats."""
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError as error:
        raise PydanticCustomError("secret", "is not an address such as http://localhost:8000/v1") from error
    if url.scheme not in ("http", "https") or not url.hostname or port == 0 or re.search(r"\s", value):
        raise PydanticCustomError("secret", "is not an address such as http://localhost:8000/v1")
    if url.path.rstrip("/").endswith("/completions"):
        raise PydanticCustomError("secret", "is the address of one function: leave out /chat/completions")
    if url.username is not None or url.password is not None or url.query or url.fragment:
        raise PydanticCustomError(
            "secret",
            "holds a password or parameters: write http://HOST:PORT/PATH, and name the environment variable "
            "with the key in data.teacher.api_key_env",
        )
    return value


def _check_column(value: str) -> str:
    """Refuse a text that cannot be a path to a value inside a record."""
    if problem := column_path_problem(value):
        raise PydanticCustomError("path", "it {problem}", {"problem": problem})
    return value


def _listed(value: Any) -> Any:
    """Take one text as a list of one."""
    return value if isinstance(value, list) else [value]


# a bound stands before the validator: in the other order pydantic leaves it out of the JSON Schema
Count = Annotated[int, Field(ge=0, le=MAX_COUNT), BeforeValidator(_parse_int)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_COUNT), BeforeValidator(_parse_int)]
NumTokens = Annotated[int, Field(ge=1, le=MAX_TOKENS), BeforeValidator(_parse_int)]
NumBlocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS), BeforeValidator(_parse_int)]
NumDocuments = Annotated[int, Field(ge=0, le=MAX_BLOCKS), BeforeValidator(_parse_int)]
# a link of a chain needs two of the relations between people, and a label a value of an attribute
NumHops = Annotated[int, Field(ge=1, le=5), BeforeValidator(_parse_int)]
NumLabels = Annotated[int, Field(ge=2, le=12), BeforeValidator(_parse_int)]
PositiveDocuments = Annotated[int, Field(ge=1, le=1_000), BeforeValidator(_parse_int)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH), BeforeValidator(_parse_int)]
NumEpochs = Annotated[int, Field(ge=1, le=MAX_EPOCHS), BeforeValidator(_parse_int)]
NumCopies = Annotated[int, Field(ge=1, le=MAX_COPIES), BeforeValidator(_parse_int)]
NumProcesses = Annotated[int, Field(ge=0, le=MAX_PROCESSES), BeforeValidator(_parse_int)]
Seed = Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED), BeforeValidator(_parse_int)]
Concurrency = Annotated[int, Field(ge=1, le=MAX_CONCURRENCY), BeforeValidator(_parse_int)]
RunSeed = Annotated[int, Field(ge=0, le=MAX_RUN_SEED), BeforeValidator(_parse_int)]
Arguments = Annotated[dict[str, Any], AfterValidator(_check_finite)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]
Text = Annotated[str, BeforeValidator(_parse_text)]
PathText = Annotated[str, BeforeValidator(_parse_text), AfterValidator(_check_path)]
RequestRate = Annotated[float, Field(gt=0, le=MAX_FLOAT), BeforeValidator(_refuse_bool)]
VariableName = Annotated[str, AfterValidator(_check_variable)]
Url = Annotated[str, AfterValidator(_check_url)]
ColumnPath = Annotated[str, BeforeValidator(_parse_text), AfterValidator(_check_column)]
OneOrMoreTexts = WithJsonSchema({"type": ["string", "array"], "items": {"type": "string"}})
ColumnPaths = Annotated[list[ColumnPath], BeforeValidator(_listed), Field(min_length=1), OneOrMoreTexts]
Texts = Annotated[list[Text], BeforeValidator(_listed), OneOrMoreTexts]


class Settings(BaseModel):
    """A group of settings. Unknown keys are refused, and an assignment is validated."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        allow_inf_nan=False,
    )


class ConstructedSettings(Settings):
    """The size of the questions of a constructed set (`format: constructed`).

    Sample i of a set is always the same. `max_samples` is required, and `skip_samples` keeps training and
    evaluation apart. `data.num_documents` does not apply.
    """

    num_documents: PositiveDocuments | None = Field(
        default=None,
        description=(
            "Documents of a question, each a block. null takes 24 (`related-passages`), 300 (`many-blocks`) "
            "or 32 (`in-context`)."
        ),
    )
    num_hops: NumHops | None = Field(
        default=None,
        description=(
            "Documents that an answer of `related-passages` needs. null draws 2, 3 or 4 for each question."
        ),
    )
    num_labels: NumLabels = Field(default=8, description="Different labels of the shots of `in-context`.")


class ColumnSettings(Settings):
    """The fields of the records of `format: columns`, by paths such as `passages.passage_text`.

    A record is a question (`question` with `answers` or `response`; neither with a teacher), a chat
    (`messages`), or a `prompt` with its `completion`. A path goes through objects and lists: `output.answer`
    is the field `answer` of every object in the list `output`, `output[0].answer` that of the first one. The
    star of `passage_*` stands for a number. `passages[]` reads a text in which a table holds a list. A
    backslash stands before a dot, a bracket or a star that belongs to a name.
    """

    id: ColumnPath | None = Field(
        default=None, description="Name of the record in reports. null numbers the records of the source."
    )
    question: ColumnPath | None = Field(
        default=None,
        description=(
            "The question. If the path goes through a list (`qas.question`), every element gives a "
            "question, and `answers`, `response` and `id` lie in the same list."
        ),
    )
    documents: ColumnPaths | None = Field(
        default=None,
        description=(
            "The documents, in one field or several: a text, an object, a list of them, an object of "
            "parallel lists, or numbered fields (`passage_*`). Equal documents are taken once."
        ),
    )
    title: ColumnPaths | None = Field(
        default=None,
        description=(
            "Title of a document: a field inside the document, or a list beside a list of texts. The first "
            "of several fields that a document has. null takes `title` of documents that are objects."
        ),
    )
    text: ColumnPaths | None = Field(
        default=None,
        description=(
            "Text of a document that is an object: the first of several fields that the document has. null "
            "takes `text`, `contents` or `content`."
        ),
    )
    score: ColumnPath | None = Field(
        default=None,
        description=(
            "Relevance of a document, higher is better: a field inside the document, or a list beside a "
            "list of texts. null takes the order of the record, the most relevant first."
        ),
    )
    supporting: ColumnPath | None = Field(
        default=None,
        description=(
            "Which documents support the answer: true or false inside each document, a list of true and "
            "false beside a list of texts, or titles or texts of documents. A question without a supporting "
            "document is not trained. null does not know."
        ),
    )
    supporting_indices: ColumnPath | None = Field(
        default=None,
        description=(
            "The same as numbers of documents, counted from 0; the numbers of the fields for numbered fields."
        ),
    )
    supporting_contains_answer: bool = Field(
        default=False, description="The documents whose text contains an accepted answer support it."
    )
    answers: ColumnPaths | None = Field(
        default=None,
        description=(
            "The accepted answers, in one field or several: texts or lists of texts. The first is learned, "
            "unless there is a `response`."
        ),
    )
    no_answer: Texts = Field(
        default=["No Answer Present.", "CANNOTANSWER", "<unk>"],
        description=(
            "Texts in `answers` that say that there is no answer. A question without any other is dropped."
        ),
    )
    response: ColumnPath | None = Field(
        default=None, description="The text to learn, if it is not the first of `answers`."
    )
    messages: ColumnPath | None = Field(
        default=None, description="The messages of a chat, as the format `messages` has them."
    )
    prompt: ColumnPaths | None = Field(
        default=None,
        description=(
            "The prompt before a `completion`: a text or a list of messages. Several fields are joined by "
            "blank lines."
        ),
    )
    completion: ColumnPath | None = Field(
        default=None, description="The answer to a `prompt`: a text or a list of messages, which are learned."
    )
    system: ColumnPath | None = Field(
        default=None, description="System message of a chat or a `prompt`. Optional in each record."
    )

    @model_validator(mode="after")
    def _check_kind(self) -> "ColumnSettings":
        """Refuse a mapping of no kind, of several kinds, or with parts of another kind."""
        kinds = {
            "question": ("answers", "response", *_QUESTION_COLUMNS),
            "messages": ("system",),
            "prompt": ("completion", "system"),
        }
        found = [kind for kind in kinds if getattr(self, kind)]
        if len(found) != 1:
            raise _rule(
                f"has {' and '.join(found) or 'none'}, it should have one of question, messages and prompt "
                "(with completion)"
            )
        (kind,) = found
        others = {name for names in kinds.values() for name in names} - {*kinds[kind]}
        if wrong := [name for name in ColumnSettings.model_fields if name in others and getattr(self, name)]:
            raise _rule(f"has {wrong[0]}, which does not go with {kind}")
        if kind == "prompt" and not self.completion:
            raise _rule("has a prompt and no completion: name the field of the answer")
        for name in ("score", "supporting", "supporting_indices"):
            if getattr(self, name) and not self.documents:
                raise _rule(
                    f"has {name} and no documents of the records; of a corpus, the documents that contain an "
                    "answer support it"
                )
        marks = ("supporting", "supporting_indices", "supporting_contains_answer")
        if len(given := [name for name in marks if getattr(self, name)]) > 1:
            raise _rule(f"has {given[0]} and {given[1]}, it should have one of them")
        if self.supporting_contains_answer and not self.answers:
            raise _rule("has supporting_contains_answer and no answers to search for")
        return self


_QUESTION_COLUMNS = (
    "documents",
    "title",
    "text",
    "score",
    "supporting",
    "supporting_indices",
    "supporting_contains_answer",
)
"""The columns of questions, other than the question and its answers."""


def _rule(problem: str) -> PydanticCustomError:
    """Return the error of settings that contradict each other; the name of the section stands before it."""
    return PydanticCustomError("rule", "{problem}", {"problem": problem})


class Source(Settings):
    """One file, glob, folder or Hub dataset to read, or a constructed set."""

    format: Format = Field(description="Format of the records.")
    path: PathText = Field(
        description=(
            "A file, a glob, a folder, or the id of a dataset on the Hub. `constructed`: the name of the set "
            "(`related-passages`, `many-blocks` or `in-context`)."
        )
    )
    split: Text | None = Field(
        default=None, description="Split of a Hub dataset. Required for a Hub dataset."
    )
    name: Text | None = Field(
        default=None, description="Configuration of a Hub dataset. Required if the dataset has several."
    )
    skip_samples: Count = Field(
        default=0,
        description="Samples to skip at the start, so that one file can serve training and evaluation.",
    )
    max_samples: PositiveCount | None = Field(
        default=None, description="Largest number of samples to read after the skipped ones. null reads all."
    )
    weight: Float = Field(
        default=1.0,
        gt=0,
        le=MAX_EPOCHS,
        description=(
            "How often the examples of the source occur in an epoch of training. 2.5: each example twice and "
            "half of the examples a third time; 0.3: 30 % of the examples, but at least one. The fraction "
            "is another one in each epoch, so that all examples occur equally often. `prepare` encodes "
            "nothing again if only weights change. `eval.sources` have no weight."
        ),
    )
    retriever: Retriever = Field(
        default=Retriever.none,
        description=(
            "How the distractors of a question are found. `none` takes the documents of the record (`squad`: "
            "of the article). `bm25` and `dense` search for documents without the answer until the prompt "
            "has `data.num_documents`: `fid` and `columns` search the documents of the whole source and "
            "its `corpus`, `squad` those of the article. The relevance of every document is then its score "
            "in the search."
        ),
    )
    response: Response = Field(
        default=Response.gold,
        description=(
            "The text to learn. `gold`: the answer of the source. `teacher`: the answer of `data.teacher` to "
            "the same prompt, and in a chat to its last turn. `teacher_with_gold`: the same, but a sample is "
            "dropped if its teacher answer contains none of its gold answers (substring match, as in the "
            "paper). Gold answers stay in the field `answers`. Answers that are empty, cut off or refused, "
            "or that contain their reasoning, are dropped and counted. `eval` asks for gold answers only."
        ),
    )
    columns: ColumnSettings | None = Field(
        default=None,
        description=(
            "The fields of the records, for `format: columns` alone. Without it, the command stops and "
            "suggests the columns of the first record."
        ),
    )
    corpus: PathText | None = Field(
        default=None,
        description=(
            "Documents apart from the questions of `format: columns`: a file, a glob or a folder, which a "
            "`retriever` searches and memory holds. `columns.title` and `columns.text` name its fields. A "
            "question without documents gets the best `data.num_documents`. Those that contain an answer "
            "support it; a question without one is not trained."
        ),
    )
    constructed: ConstructedSettings = Field(
        default_factory=ConstructedSettings,
        description="The size of the questions of a constructed set.",
    )

    @model_validator(mode="after")
    def _check_constructed(self) -> "Source":
        is_constructed = self.format is Format.constructed
        if is_constructed and self.max_samples is None:
            raise PydanticCustomError("constructed", "a constructed set has no end: set max_samples")
        if not is_constructed and self.constructed != ConstructedSettings():
            raise PydanticCustomError("constructed", "constructed belongs to format: constructed")
        if is_constructed and (self.split or self.name or self.retriever is not Retriever.none):
            raise PydanticCustomError(
                "constructed", "a constructed set takes neither split, name nor retriever"
            )
        return self

    @model_validator(mode="after")
    def _check_columns(self) -> "Source":
        """Refuse columns of another format, and a corpus that nothing searches."""
        if self.format is not Format.columns:
            for name in ("columns", "corpus"):
                if getattr(self, name) is not None:
                    raise _rule(f"has {name}, which only the format columns reads, not {self.format}")
        columns = self.columns
        if columns and columns.question and not columns.answers:
            if self.response is Response.teacher_with_gold:
                raise _rule("has response teacher_with_gold, but its columns have no answers")
            if self.response is Response.gold and not columns.response:
                raise _rule(
                    "has columns with a question and neither answers nor response: name the field of the "
                    "answers, or set response to teacher"
                )
        if self.corpus is not None and self.retriever is Retriever.none:
            raise _rule("has a corpus that nothing searches: set retriever to bm25 or dense")
        if self.corpus is not None and self.columns is not None and self.columns.question is None:
            raise _rule("has a corpus, but its columns have no question")
        return self


def _check_no_weight(source: Source) -> Source:
    """Refuse the weight of a source that is not trained on."""
    if source.weight != 1:
        raise PydanticCustomError(
            "weight",
            "only data.sources have weights; remove it, or ask fewer questions with max_samples",
            {"weight": source.weight},
        )
    return source


class ModelSettings(Settings):
    """The model to start from."""

    path: PathText = Field(description="A local model folder or a model id on the Hub.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    chat_template: PathText | None = Field(
        default=None,
        description=(
            "A file with a Jinja chat template. It replaces the tokenizer's template, also in the export. "
            "null keeps the tokenizer's template. `eval` reads the file only for the model at `path`."
        ),
    )
    init: WeightInit = Field(
        default=WeightInit.pretrained,
        description=(
            "`pretrained` loads the weights. `random` reads only config.json and draws the weights with "
            "`train.seed`."
        ),
    )
    attention: AttentionBackend = Field(
        default=AttentionBackend.auto,
        description=(
            "Attention backend of training. `auto` is `flex` on a GPU, except for heads below 16 "
            "dimensions, and `sdpa` elsewhere. Generation does not read this setting."
        ),
    )
    dtype: DType = Field(
        default=DType.auto,
        description=(
            "Type of weights and activations in training. `auto` is `bfloat16` on a GPU and `float32` "
            "elsewhere."
        ),
    )
    quantization: Quantization | None = Field(
        default=None,
        description=(
            "Form of the frozen weights of a LoRA run. `nf4` keeps the matrices of the decoder layers in 4 "
            "bits with double quantisation (QLoRA) and computes in `dtype`. It needs the extra "
            "`quantization`, and ZeRO-0, 1 or 2. Exports hold the quantised numbers in full size."
        ),
    )


class PromptSettings(Settings):
    """The wording of RAG prompts. Fields in braces are filled in.

    White space that separates blocks stands before a document and before the question. A chat template may
    strip the end of a message, and a document must be the same block wherever it stands.
    """

    instruction: Text = Field(
        default="Answer the question using the following documents.",
        description="The block before the documents. It must not be blank.",
    )
    document: Text = Field(
        default="\n\n{title}\n{text}",
        description=(
            "The block of one document. {title} and {text} are stripped. An empty title is left out together "
            "with the white space after it."
        ),
    )
    question: Text = Field(
        default="\n\nQuestion: {question}\nAnswer in a few words.",
        description=(
            "The final block, which contains {question}. White space before it is left out where the block "
            "starts a message."
        ),
    )
    documents_in: Role = Field(default=Role.user, description="The message that holds the documents.")


class TeacherSettings(Settings):
    """The model that answers the prompts of sources with `response: teacher` or `teacher_with_gold`.

    It reads the documents of the prompt, in their order, with full attention. It is either a local model or
    an endpoint that speaks the chat completions protocol of OpenAI (vLLM, llama.cpp, `transformers serve`, a
    cloud). Every question is asked once: answers are kept in `answers_file`, and a later or interrupted
    `prepare` asks only the questions that are not in it.
    """

    model: PathText = Field(
        description=(
            "A local model: a folder or an id on the Hub, of a supported family, held by one GPU or the CPU. "
            "With `base_url`: the name of the model at the endpoint, which together with the question "
            "identifies an answer. The address does not."
        )
    )
    revision: Text | None = Field(
        default=None, description="Branch, tag or commit of a local model on the Hub."
    )
    base_url: Url | None = Field(
        default=None,
        description=(
            "Address of the endpoint, without a key, mostly ending in /v1: http://localhost:8000/v1. null "
            "loads the model locally."
        ),
    )
    api_key_env: VariableName | None = Field(
        default=None,
        description=(
            "Name of the environment variable that holds the key of the endpoint. null sends no key. The key "
            "itself is never written anywhere."
        ),
    )
    prompt: PromptSettings | None = Field(
        default=None,
        description=(
            "Wording of RAG prompts for the teacher. null asks in the wording of `data.prompt`. The "
            "documents and their order are the same."
        ),
    )
    no_answer: Text | None = Field(
        default=None,
        description=(
            "The text that the teacher writes if the documents do not contain the answer, such as NOT FOUND. "
            "A sample whose teacher answer contains it is dropped. The question then ends in an instruction "
            "to write this text, unless the wording contains the text already. null gives no instruction."
        ),
    )
    max_new_tokens: NumTokens = Field(
        default=256,
        description="Longest answer, in tokens. A sample whose answer is cut off here is dropped.",
    )
    temperature: Float = Field(
        default=0.0, ge=0, le=2, description="Temperature of sampling. 0 takes the most likely token."
    )
    extra_body: Arguments = Field(
        default={},
        description=(
            "Further fields of the requests to an endpoint, such as chat_template_kwargs: {enable_thinking: "
            "false}. A field that is null is not sent: max_tokens: null and max_completion_tokens: 256 suit "
            "servers that refuse max_tokens. Belongs to what identifies an answer."
        ),
    )
    answers_file: PathText | None = Field(
        default=None,
        description=(
            "File of the answers, in JSON lines. Several recipes may share it, one after the other. null is "
            "OUTPUT_DIR.answers.jsonl beside `data.output_dir`."
        ),
    )
    batch_size: BatchSize = Field(
        default=16, description="Questions that a local model answers together. May change rounding."
    )
    concurrency: Concurrency = Field(
        default=16, description="Questions that an endpoint answers at the same time."
    )
    requests_per_minute: RequestRate | None = Field(
        default=None,
        description="Largest number of requests to an endpoint per minute. null sets no limit.",
    )
    timeout_s: Float = Field(
        default=300.0,
        gt=0,
        le=MAX_FLOAT,
        description="Longest time of one request to an endpoint, in seconds.",
    )
    max_retries: Count = Field(
        default=8,
        description=(
            "How often a request is repeated after an error of an endpoint that may pass: the status 408, "
            "409, 425, 429 or 5xx, a timeout, a lost connection, an incomplete or malformed answer. The "
            "waiting time doubles from half a second to 30 s, and is never shorter than the server asks for. "
            "A question that fails nevertheless is a bad record: see `data.on_bad_record`."
        ),
    )


class SplittingSettings(Settings):
    """How the prompts of chats and instructions are split into blocks."""

    max_blocks: NumBlocks = Field(
        default=16, description="Largest number of blocks of a prompt. Turns of a chat are never merged."
    )
    min_block_tokens: NumTokens = Field(
        default=8, description="Smallest number of tokens of a block that results from splitting a message."
    )
    unsplit: UnsplitPolicy = Field(
        default=UnsplitPolicy.keep,
        description=(
            "What happens to a sample whose prompt does not split. `keep` trains it in full mode. `drop` "
            "leaves it out and counts it; the paper trains only on the part of Tulu 3 that splits."
        ),
    )


class MixtureSettings(Settings):
    """How large the sources count in an epoch of training, before their `weight` multiplies the size."""

    temperature: Float = Field(
        default=1.0,
        ge=1,
        le=MAX_FLOAT,
        description=(
            "Brings the sizes of the sources closer together: a source counts as sum(sizes) * "
            "size^(1/temperature) / sum(sizes^(1/temperature)) examples, so that the sum of the sizes stays. "
            "1 keeps the sizes, a large number makes them equal (T5, mT5)."
        ),
    )
    max_examples: PositiveCount | None = Field(
        default=None,
        description=(
            "Largest size of a source: a larger source counts as this many examples, before `temperature`. "
            "All its examples are still used, other ones in each epoch. null sets no limit."
        ),
    )


class DataSettings(Settings):
    """What to train on, and how prompts are built."""

    output_dir: PathText = Field(description="Folder that `prepare` writes and `train` reads.")
    cache_dir: PathText | None = Field(
        default=None,
        description=(
            "Folder in which `prepare` keeps what each source contributes, so that an interrupted run "
            "continues and an unchanged source is neither read nor encoded again. null is the folder "
            "`OUTPUT_DIR.cache`, of which only what the last run used is kept; `prepare` removes nothing "
            "from a folder that is named here. Whoever deletes the folder loses time only."
        ),
    )
    sources: list[Source] = Field(min_length=1, description="Sources of the training data.")
    row_len: NumTokens = Field(
        default=4096,
        description="Length of a packed row in tokens. Longer examples are dropped or trimmed (`too_long`).",
    )
    modes: list[Mode] = Field(
        default=[Mode.block, Mode.full],
        min_length=1,
        description="Attention modes in which every example that splits into blocks is trained.",
    )
    positions: Positions = Field(
        default=Positions.reencoded,
        description=(
            "Positions of the tokens of local blocks. `reencoded`: their index in the prompt. `local`: "
            "0..n-1 in every block (an ablation of the paper). Only `train` reads this setting; `generate` "
            "and `eval` read it from the export."
        ),
    )
    local_sees_first: bool = Field(
        default=False,
        description=(
            "In block mode, every local block also attends to the first block of its prompt, as if it stood "
            "right after it. The first block is the instruction with the markup before it. A cached block is "
            "then reused only after the same first block. A row holds a copy of the first block before every "
            "other local block: with an instruction of 32 tokens, 10 documents add 320 tokens to an example "
            "in block mode. `generate`, `eval` and `serve` read this setting from the export."
        ),
    )
    num_documents: NumDocuments | None = Field(
        default=None,
        description=(
            "Documents of a RAG prompt. Documents that support the answer are always kept. null keeps all "
            "documents of the record, 0 asks without documents."
        ),
    )
    order: Order = Field(
        default=Order.ascending,
        description="Order of the documents. `ascending` puts the most relevant one next to the question.",
    )
    shared_context: bool = Field(
        default=False,
        description=(
            "Merge successive questions over the same documents into one example, which holds the documents "
            "once. The order of the documents is then shuffled, unless `order` is `given`. `squad` divides "
            "an article into sets of `num_documents` paragraphs: at random, or similar ones together if the "
            "source has a `retriever`."
        ),
    )
    max_questions_per_context: PositiveCount | None = Field(
        default=None,
        description=(
            "Largest number of questions that share a context. null sets no limit. `squad` draws new sets "
            "for the remaining questions if the article has more than `num_documents` paragraphs."
        ),
    )
    num_copies: NumCopies = Field(
        default=1,
        description=(
            "How often `prepare` reads the sources, with seeds `seed`, `seed + 1`, and so on. Small data "
            "teach more if the order of the documents and the sets of `squad` differ between copies. "
            "Everything else is repeated unchanged. `eval` uses one copy. Requires `train.num_eval_examples` "
            "0."
        ),
    )
    dense_model: PathText = Field(
        default="sentence-transformers/all-MiniLM-L6-v2",
        description="The sentence-transformers model of `retriever: dense`: a folder or an id on the Hub.",
    )
    on_bad_record: BadRecordPolicy = Field(
        default=BadRecordPolicy.error,
        description=(
            "`error` stops at a bad record and names file, line and field. `skip` counts and lists the "
            "record. In `eval`, a question without answers is a bad record."
        ),
    )
    too_long: TooLongPolicy = Field(
        default=TooLongPolicy.drop,
        description=(
            "What happens to a sample that is longer than a row (in `eval`: than the model's context). "
            "`drop` leaves it out. `trim` drops its least relevant documents; among equals the last one goes "
            "first."
        ),
    )
    num_workers: NumProcesses = Field(
        default=0,
        description="Worker processes of `prepare`. 0 starts one per core. Does not change the output.",
    )
    seed: Seed = Field(default=0, description="Seed of all random choices of `prepare`.")
    mixture: MixtureSettings = Field(
        default_factory=MixtureSettings,
        description="How large the sources count in an epoch of training.",
    )
    prompt: PromptSettings = Field(default_factory=PromptSettings, description="Wording of RAG prompts.")
    teacher: TeacherSettings | None = Field(
        default=None, description="The teacher of sources whose `response` is not `gold`."
    )
    splitting: SplittingSettings = Field(
        default_factory=SplittingSettings, description="How chats and instructions are split into blocks."
    )

    @model_validator(mode="after")
    def _check_positions(self) -> "DataSettings":
        """Refuse copies of the first block where no position is left for them."""
        if self.local_sees_first and self.positions is Positions.local:
            raise _rule(
                "has local_sees_first with positions local, where blocks start at 0 and no position is left "
                "before them: set positions to reencoded, or local_sees_first to false"
            )
        return self


class TrainSettings(Settings):
    """How to train."""

    output_dir: PathText = Field(
        description="Folder of the run: checkpoints, metrics and the resolved recipe."
    )
    deepspeed: PathText = Field(
        default="zero2",
        description=(
            "DeepSpeed configuration: a JSON file, or the name of a shipped one (`zero0` to `zero3`, "
            "`zero2-offload`, ...)."
        ),
    )
    lora: Arguments | None = Field(
        default=None,
        description=(
            "Arguments of peft.LoraConfig; {} takes its defaults. null trains all weights. Arguments are "
            "refused if their adapters cannot be exported exactly."
        ),
    )
    objective: Objective = Field(
        default=Objective.sft,
        description=(
            "`sft`: cross entropy of the answers (the paper). `distill`: match the answer distribution of a "
            "teacher in full mode."
        ),
    )
    teacher: PathText | None = Field(
        default=None,
        description=(
            "Teacher of `distill`: a model with the same tokenizer. It teaches every mode, is frozen, and is "
            "held whole on every GPU. null distills the full mode of the trained model into its block mode."
        ),
    )
    teacher_weight: Float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Weight of the distillation loss where the teacher teaches. `sft` has the rest.",
    )
    batch_rows: BatchSize = Field(
        default=8, description="Rows of a global batch; a multiple of the number of processes."
    )
    num_train_epochs: NumEpochs = Field(default=1, description="Passes over the training data.")
    max_steps: PositiveCount | None = Field(
        default=None,
        description=(
            "Upper limit of optimizer steps. Unlike in transformers, it does not extend `num_train_epochs`. "
            "null trains all epochs."
        ),
    )
    optimizer: Optimizer = Field(
        default=Optimizer.adamw,
        description=(
            "`adamw_8bit` keeps both moments of AdamW in 8 bits (bitsandbytes): 2 bytes per trained weight "
            "instead of 8. It needs the extra `quantization`, excludes offloading, and under ZeRO-1 to 3 is "
            "resumed by the same number of processes."
        ),
    )
    learning_rate: Float = Field(default=2e-5, ge=0, description="Peak learning rate.")
    lr_scheduler_type: Text = Field(
        default="cosine",
        description="Scheduler of transformers.Trainer. Schedulers that follow a metric are not supported.",
    )
    lr_scheduler_kwargs: Arguments = Field(default={}, description="Further arguments of the scheduler.")
    warmup_steps: Count = Field(
        default=0, description="Steps in which the learning rate rises from 0 to its peak."
    )
    weight_decay: Float = Field(default=0.0, ge=0, le=MAX_FLOAT, description="Weight decay of AdamW.")
    adam_beta1: Float = Field(default=0.9, ge=0, lt=1, description="Decay of AdamW's mean of gradients.")
    adam_beta2: Float = Field(
        default=0.95, ge=0, lt=1, description="Decay of AdamW's mean of squared gradients."
    )
    max_grad_norm: Float = Field(
        default=1.0, ge=0, le=MAX_FLOAT, description="Gradients are clipped to this norm. 0 does not clip."
    )
    torch_compile: bool | None = Field(
        default=None,
        description=(
            "Compile the model's layers. Faster steps, but the first one takes up to a minute longer. null is"
            " yes on a GPU. Compiled code is kept in `$XDG_CACHE_HOME/blockft`."
        ),
    )
    gradient_checkpointing: GradientCheckpointing = Field(
        default=GradientCheckpointing.auto,
        description=(
            "Decoder layers that recompute their activations in the backward pass, which saves memory: "
            "`none`, every second one (`selective`, about a sixth more time) or all (`full`, about a third "
            "more). `auto` is the fewest for which the smallest GPU has enough memory, as `--dry-run` "
            "estimates it; on a CPU none. Losses do not change."
        ),
    )
    logging_steps: PositiveCount = Field(default=1, description="Steps between two log entries.")
    save_steps: PositiveCount = Field(
        default=500, description="Steps between two checkpoints. The last step is always saved."
    )
    save_total_limit: PositiveCount = Field(
        default=2,
        description=(
            "Number of checkpoints kept. Each takes 12 bytes per trained parameter (6 with adamw_8bit)."
        ),
    )
    num_eval_examples: Count = Field(
        default=0, description="Examples held out of training, whose loss is logged for each mode."
    )
    eval_steps: PositiveCount | None = Field(
        default=None,
        description=(
            "Steps between two evaluations. The held-out loss is also evaluated before the first step and at "
            "every checkpoint."
        ),
    )
    sample_steps: PositiveCount | None = Field(
        default=500,
        description=(
            "Steps between two times that a few held-out prompts are answered, greedily and in each mode of "
            "`data.modes`. They are also answered after the last step. The answers are written to "
            "`sample_answers.jsonl` in the run's folder. null never answers. Needs `num_eval_examples`."
        ),
    )
    num_sample_prompts: PositiveCount = Field(
        default=4, description="Held-out prompts that are answered every `sample_steps` steps."
    )
    sample_max_new_tokens: NumTokens = Field(
        default=64,
        description=("Longest of these answers, in tokens. Each token takes a forward pass over their rows."),
    )
    keep_best: bool = Field(
        default=True,
        description=(
            "Also keep the checkpoint with the lowest held-out loss (in block mode, if `data.modes` has it)."
        ),
    )
    seed: RunSeed = Field(default=0, description="Seed of the row order and of random weights.")
    report_to: list[Text] = Field(default=["none"], description="Trackers: `none`, `wandb`, `tensorboard`.")


METHOD_OPTIONS = {
    MethodName.mask: (),
    MethodName.local_positions: (),
    MethodName.recompute: ("share", "tokens", "layer"),
    MethodName.shared_start: ("start_tokens",),
    MethodName.ape: ("temperature", "scale", "start_tokens"),
}
"""The options that each method takes."""


class MethodSettings(Settings):
    """How `blockft eval` computes block mode without the block cache: a baseline that needs no training."""

    name: MethodName = Field(
        description=(
            "`mask`: the block mask alone, positions re-encoded. `local-positions`: every block keeps the "
            "positions 0 to n - 1, as in Prompt Cache. `recompute`: some context tokens are computed again "
            "over all blocks, as in CacheBlend. `shared-start`: every block is encoded behind the first "
            "tokens of the prompt. `ape`: attention to the context with a temperature and a scale."
        )
    )
    share: Annotated[float, BeforeValidator(_refuse_bool)] = Field(
        default=0.1,
        ge=0,
        le=1,
        description=(
            "`recompute`: share of the context tokens behind the first block that are computed again. 0 is "
            "block mode, 1 is full mode."
        ),
    )
    tokens: RecomputedTokens = Field(
        default=RecomputedTokens.first,
        description=(
            "`recompute`: which tokens. `first`: the first ones of each block. `deviation`: those whose keys "
            "and values in one layer differ most between block and full mode."
        ),
    )
    layer: Annotated[int, BeforeValidator(_parse_int)] = Field(
        default=1,
        ge=1,
        le=MAX_BLOCKS,
        description=(
            "`recompute` with `tokens: deviation`: the layer, counted from 0. Layer 0 has no deviation."
        ),
    )
    start_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), BeforeValidator(_parse_int)] | None = Field(
        default=None,
        description=(
            "`shared-start`, `ape`: how many first tokens of the first block stand before every other block. "
            "The final block reads them once. null is the whole first block for `shared-start` and 0 for "
            "`ape`. A model that was trained with `data.local_sees_first` takes null alone: the whole first "
            "block stands there with every method, and `local-positions` is refused."
        ),
    )
    temperature: Annotated[float, BeforeValidator(_refuse_bool)] = Field(
        default=0.9,
        ge=0.01,
        le=100,
        description=(
            "`ape`: temperature of attention to the context, without a shared start. Choose it and the scale "
            "on held-out questions."
        ),
    )
    scale: Annotated[float, BeforeValidator(_refuse_bool)] = Field(
        default=0.9,
        ge=0,
        le=100,
        description=(
            "`ape`: factor of the logarithm of the context's weight. 1 with temperature 1 is block mode."
        ),
    )

    @model_validator(mode="after")
    def _check_options(self) -> "MethodSettings":
        """Refuse options of another method."""
        taken = METHOD_OPTIONS[self.name]
        for option in MethodSettings.model_fields:
            if option in self.model_fields_set and option not in ("name", *taken):
                takes = f"takes {', '.join(taken)}" if taken else "takes no options"
                raise _rule(f"has {option}, but the method {self.name} {takes}")
        if "layer" in self.model_fields_set and self.tokens is not RecomputedTokens.deviation:
            raise _rule("has a layer, which only tokens: deviation compares")
        return self


class EvalSettings(Settings):
    """Which questions `blockft eval` asks."""

    output_dir: PathText = Field(description="Folder of the report, the predictions and the plot.")
    sources: list[Annotated[Source, AfterValidator(_check_no_weight)]] = Field(
        description=(
            "Held-out samples with accepted answers. `prepare` reads them too, and warns of questions and "
            "sets of documents that are also in `data.sources`."
        )
    )
    modes: list[Mode] = Field(
        default=[Mode.block, Mode.full],
        min_length=1,
        description="Attention modes in which the questions are asked.",
    )
    max_new_tokens: NumTokens = Field(default=32, description="Longest answer, in tokens.")
    max_samples: PositiveCount | None = Field(
        default=None,
        description="Largest number of questions, taken from the sources in turn. null asks all.",
    )
    batch_size: BatchSize = Field(default=32, description="Questions answered together.")
    method: MethodSettings | None = Field(
        default=None,
        description="How block mode is computed. null is the block cache; other methods are baselines.",
    )

    @model_validator(mode="after")
    def _check_method(self) -> "EvalSettings":
        """Refuse a method that nothing is computed with."""
        if self.method and Mode.block not in self.modes:
            raise _rule("has a method, which computes block mode, but modes lacks block")
        return self


class Recipe(Settings):
    """All settings of a run. Each command reads the sections that it needs."""

    model: ModelSettings = Field(description="The model to start from.")
    data: DataSettings = Field(description="What to train on, and how prompts are built.")
    train: TrainSettings = Field(description="How to train.")
    eval: EvalSettings | None = Field(default=None, description="Which questions `blockft eval` asks.")
