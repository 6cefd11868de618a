"""The values of settings that are choices.

Imports no heavy packages, so that the command line starts fast.
"""

from enum import StrEnum


class Format(StrEnum):
    """Format of the records of a source."""

    samples = "samples"
    hotpotqa = "hotpotqa"
    two_wiki = "2wikimultihopqa"
    musique = "musique"
    squad = "squad"
    fid = "fid"
    messages = "messages"
    alpaca = "alpaca"
    blocks = "blocks"
    constructed = "constructed"
    columns = "columns"


class Retriever(StrEnum):
    """Search that ranks the documents of a question and finds its distractors."""

    none = "none"
    bm25 = "bm25"
    dense = "dense"


class Response(StrEnum):
    """Where the responses of a source come from: the source, or the teacher."""

    gold = "gold"
    teacher = "teacher"
    teacher_with_gold = "teacher_with_gold"


class Mode(StrEnum):
    """Attention of a prompt: independent blocks, or one block."""

    block = "block"
    full = "full"


class MethodName(StrEnum):
    """Computation of block mode without fine-tuning."""

    mask = "mask"
    local_positions = "local-positions"
    recompute = "recompute"
    shared_start = "shared-start"
    ape = "ape"


class RecomputedTokens(StrEnum):
    """Context tokens that are recomputed: the first of each block, or those that differ most."""

    first = "first"
    deviation = "deviation"


class Order(StrEnum):
    """Order of the documents of a prompt by relevance."""

    ascending = "ascending"
    descending = "descending"
    shuffled = "shuffled"
    given = "given"


class Objective(StrEnum):
    """Training objective: cross entropy of the answers, or distillation from a teacher."""

    sft = "sft"
    distill = "distill"


class Positions(StrEnum):
    """Positions of the tokens of local blocks: their index in the prompt, or in their block."""

    reencoded = "reencoded"
    local = "local"


class Role(StrEnum):
    """Role of the message that holds the documents."""

    system = "system"
    user = "user"


class BadRecordPolicy(StrEnum):
    """Treatment of a record that cannot be read."""

    error = "error"
    skip = "skip"


class TooLongPolicy(StrEnum):
    """Treatment of a sample that is longer than a row."""

    drop = "drop"
    trim = "trim"


class UnsplitPolicy(StrEnum):
    """Treatment of a chat or an instruction that does not split into blocks."""

    keep = "keep"
    drop = "drop"


class AttentionBackend(StrEnum):
    """Attention backend; `auto` is `flex` on a GPU and `sdpa` elsewhere."""

    auto = "auto"
    sdpa = "sdpa"
    flex = "flex"


class DType(StrEnum):
    """Type of weights and activations; `auto` is `bfloat16` on a GPU and `float32` elsewhere."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class PageWriter(StrEnum):
    """What a server writes cached blocks into vLLM's pages with; `auto` is `triton` where it fits a GPU."""

    auto = "auto"
    torch = "torch"
    triton = "triton"


class WeightInit(StrEnum):
    """Origin of the weights that a run starts from."""

    pretrained = "pretrained"
    random = "random"


class GradientCheckpointing(StrEnum):
    """Decoder layers that recompute their activations; `auto` is the fewest for which the memory suffices."""

    auto = "auto"
    none = "none"
    selective = "selective"
    full = "full"


class Quantization(StrEnum):
    """Form in which the frozen weights of a LoRA run are kept."""

    nf4 = "nf4"


class Optimizer(StrEnum):
    """Optimizer of training."""

    adamw = "adamw"
    adamw_8bit = "adamw_8bit"


class Metric(StrEnum):
    """Score of an answer against the accepted answers."""

    substring_match = "substring_match"
    word_match = "word_match"
    exact_match = "exact_match"
    token_f1 = "token_f1"
