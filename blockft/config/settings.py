"""The settings of one run: dataclasses, overridden by a recipe (YAML), overridden by `key=value` words.

Only `cli` and `stages` read them; everything below takes plain arguments. The comment above a field is its
documentation, and a recipe need not repeat a default.
"""

from dataclasses import MISSING, dataclass, field
from enum import StrEnum
from typing import Any


def at_least(minimum: float, default: Any = MISSING, below: float | None = None) -> Any:
    """A setting with a smallest value, or one for the length of a list; `recipe` enforces both limits."""
    given = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"minimum": minimum, "below": below})


class Format(StrEnum):
    """Layouts of a source file."""

    samples = "samples"
    hotpotqa = "hotpotqa"
    two_wiki = "2wikimultihopqa"
    musique = "musique"
    squad = "squad"
    fid = "fid"
    messages = "messages"
    alpaca = "alpaca"
    blocks = "blocks"


class Retriever(StrEnum):
    """How a source's distractors are found and its documents ranked."""

    none = "none"
    bm25 = "bm25"
    dense = "dense"


class Mode(StrEnum):
    """Which layout an example is trained or evaluated in."""

    block = "block"
    full = "full"


class Order(StrEnum):
    """How the documents of a prompt are ordered by relevance."""

    ascending = "ascending"
    descending = "descending"
    shuffled = "shuffled"
    given = "given"


class Objective(StrEnum):
    """What a model learns from."""

    sft = "sft"
    distill = "distill"


class Positions(StrEnum):
    """Where the tokens of local blocks stand."""

    reencoded = "reencoded"
    local = "local"


class Role(StrEnum):
    """The message in which the documents stand."""

    system = "system"
    user = "user"


class BadRecordPolicy(StrEnum):
    """What a broken record does."""

    error = "error"
    skip = "skip"


class TooLongPolicy(StrEnum):
    """What happens to a sample longer than a row."""

    drop = "drop"
    trim = "trim"


class AttentionBackend(StrEnum):
    """Attention backends; `auto` is `flex` on a GPU and `sdpa` elsewhere."""

    auto = "auto"
    sdpa = "sdpa"
    flex = "flex"


class DType(StrEnum):
    """The type in which weights are computed with; `auto` is bfloat16 on a GPU and float32 elsewhere."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class WeightInit(StrEnum):
    """Where a run's first weights come from."""

    pretrained = "pretrained"
    random = "random"


@dataclass(kw_only=True)
class Source:
    """One file, glob, folder or Hub data set to read."""

    # the layout of its records
    format: Format
    # a file, a glob, a folder, or the id of a data set on the Hub
    path: str
    # the split, for a data set on the Hub, and its configuration if it has several
    split: str | None = None
    name: str | None = None
    # pass over so many records first, and read no more than so many: one file can train and be asked about
    skip_samples: int = at_least(0, 0)
    max_samples: int | None = at_least(1, None)
    # none takes the documents of the record (squad: of the article); bm25 and dense fill a prompt up to
    # data.num_documents with those that a search ranks best (fid: from all documents of the source, squad: of
    # the article) and that hold no answer; its relevance is then the search's score, in every format
    retriever: Retriever = Retriever.none


@dataclass(kw_only=True)
class ModelSettings:
    # a local folder or a model id on the Hub
    path: str
    # branch, tag or commit on the Hub
    revision: str | None = None
    # pretrained weights, or random ones from the folder's config.json and `train.seed`
    init: WeightInit = WeightInit.pretrained
    # the attention backend of training; answers are computed over cached blocks whatever it says: by sdpa, on
    # GPUs by a kernel of their own
    attention: AttentionBackend = AttentionBackend.auto
    # the type of weights and activations in training
    dtype: DType = DType.auto


@dataclass(kw_only=True)
class PromptSettings:
    """The wording of a RAG prompt; fields in braces are filled in.

    White space that separates stands before a document and the question: a chat template may trim the ends of
    a message, and a document has to be the same block wherever it stands.
    """

    # the block before the documents; not blank
    instruction: str = "Answer the question using the following documents."
    # one document: {title} and {text}, stripped; an empty title goes with the white space after it
    document: str = "\n\n{title}\n{text}"
    # the final block: {question}; white space before it is left out where it starts a message
    question: str = "\n\nQuestion: {question}\nAnswer in a few words."
    # the message that holds the documents
    documents_in: Role = Role.user


@dataclass(kw_only=True)
class SplittingSettings:
    """How the prompts of chats and instructions are cut into blocks."""

    # at most this many blocks in a prompt; the turns of a chat are never joined
    max_blocks: int = at_least(1, 16)
    # at least this many tokens in a block, where a message is cut
    min_block_tokens: int = at_least(1, 8)


@dataclass(kw_only=True)
class DataSettings:
    # the folder that `prepare` writes and `train` reads
    output_dir: str
    # what to train on
    sources: list[Source] = at_least(1)
    # tokens in a row: the longest example that can be trained on
    row_len: int = at_least(1, 4096)
    # the views of every example that splits into blocks
    modes: list[Mode] = at_least(1, [Mode.block, Mode.full])
    # reencoded: a block's tokens stand where the prompt has them, wherever they were cached; local: they stay
    # at 0..n-1 (the paper's ablation). Training alone reads it, for prepared data serve both;
    # eval and generate go by what an export says
    positions: Positions = Positions.reencoded
    # documents in a RAG prompt, and never less than those that support the answer; null keeps all that the
    # record has, 0 asks without documents
    num_documents: int | None = at_least(0, None)
    # order of the documents: `ascending` puts the most relevant one next to the question
    order: Order = Order.ascending
    # questions in a row over the same documents share them in one example, and see them in one order: drawn
    # by lot, unless it is `given`; squad's articles are cut into sets of num_documents paragraphs, drawn by
    # lot or, if the source has `retriever`, like one another
    shared_context: bool = False
    # questions that share a context at most, null for no limit; squad's sets are drawn anew for those left,
    # if the article has more paragraphs than num_documents
    max_questions_per_context: int | None = at_least(1, None)
    # times that prepare asks every question, as by seed, seed + 1, ...: small data teach more if documents
    # come in another order and squad's sets are drawn anew (what a search finds stays the same). All else
    # comes as often; the manifest counts all copies. eval asks once, and train.num_eval_examples has to be 0
    num_copies: int = at_least(1, 1)
    # the sentence-transformers model of `retriever: dense`, a folder or an id on the Hub
    dense_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    # error names file, line and field; skip counts and lists the record; to eval a question without answers
    # is one, too
    on_bad_record: BadRecordPolicy = BadRecordPolicy.error
    # of a sample longer than a row, or in eval than the model's positions allow: drop it, or trim its least
    # relevant documents
    too_long: TooLongPolicy = TooLongPolicy.drop
    # worker processes for tokenising; 0 is one per core
    num_workers: int = at_least(0, 0)
    # seed of every shuffle in `prepare`
    seed: int = 0
    prompt: PromptSettings = field(default_factory=PromptSettings)
    splitting: SplittingSettings = field(default_factory=SplittingSettings)


@dataclass(kw_only=True)
class TrainSettings:
    # the run's folder
    output_dir: str
    # DeepSpeed settings: a JSON file, or the name of one that ships (zero0 to zero3, zero2-offload, ...)
    deepspeed: str = "zero2"
    # arguments of peft.LoraConfig, to train an adapter ({} for its defaults); null trains all weights
    lora: dict[str, Any] | None = None
    # sft: cross entropy of the answers (the paper's); distill: what a teacher with the full view would answer
    objective: Objective = Objective.sft
    # of distill: a model with the same tokenizer that teaches every view, frozen, whole on every GPU; null is
    # the model itself, whose full view teaches its block view
    teacher: str | None = None
    # of distill: the teacher's part in the loss where it teaches, above 0 and up to 1; the rest is of sft
    teacher_weight: float = 1.0
    # rows in a global batch; a multiple of the number of processes
    batch_rows: int = at_least(1, 8)
    # passes over the data
    num_train_epochs: int = at_least(1, 1)
    # stop after this many optimizer steps; null runs all epochs
    max_steps: int | None = at_least(1, None)
    learning_rate: float = at_least(0, 2e-5)
    # any scheduler of transformers.Trainer that goes by the step
    lr_scheduler_type: str = "cosine"
    # extra arguments of the scheduler
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    # steps over which the learning rate rises from 0
    warmup_steps: int = at_least(0, 0)
    weight_decay: float = at_least(0, 0.0)
    adam_beta1: float = at_least(0, 0.9, below=1)
    adam_beta2: float = at_least(0, 0.95, below=1)
    max_grad_norm: float = at_least(0, 1.0)
    # compile the model's layers: fewer, larger kernels, for a minute or more at the start of a process
    torch_compile: bool = False
    # recompute activations in the backward pass: less memory, a third more time
    gradient_checkpointing: bool = False
    # log the loss every so many steps
    logging_steps: int = at_least(1, 1)
    # save a checkpoint every so many steps, and at the end
    save_steps: int = at_least(1, 500)
    # whole checkpoints kept
    save_total_limit: int = at_least(1, 2)
    # examples held out of training: the loss over them is logged for each view
    num_eval_examples: int = at_least(0, 0)
    # evaluate every so many steps, beside before the first and at every checkpoint
    eval_steps: int | None = at_least(1, None)
    # keep the checkpoint with the lowest evaluation loss, too (in the block view, if `data.modes` has it)
    keep_best: bool = True
    # seed of the row order and of random weights
    seed: int = 0
    # trackers: none, wandb, tensorboard
    report_to: list[str] = field(default_factory=lambda: ["none"])


@dataclass(kw_only=True)
class EvalSettings:
    # the folder for the report, the predictions and the plot
    output_dir: str
    # held-out samples with answers
    sources: list[Source]
    modes: list[Mode] = at_least(1, [Mode.block, Mode.full])
    # the longest answer, in tokens
    max_new_tokens: int = at_least(1, 32)
    # evaluate no more than this many samples, one of each source in turn; null is all
    max_samples: int | None = at_least(1, None)
    # prompts decoded together
    batch_size: int = at_least(1, 32)


@dataclass(kw_only=True)
class Recipe:
    """One whole run: every verb reads the part that concerns it."""

    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    eval: EvalSettings | None = None
