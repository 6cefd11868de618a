"""The experiments of the study by name: how a model is trained and how it is asked."""

from dataclasses import dataclass, replace

from prompts import PromptOptions
from study import Training


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation in both orders; `prompt_options` replaces the one of training.

    `recomputed` is the share of context tokens that are computed once more. `choice` selects them: the
    `first` of their blocks, or those whose values `changed` most. `best` documents are read a second time, in
    the order of the attention of the first reading (`arrange_documents`); 0 for a single reading.
    `first_stride` is the `document_stride` of the first reading alone.
    """

    mode: str
    prompt_options: PromptOptions | None = None
    recomputed: float = 0.0
    choice: str = "first"
    best: int = 0
    first_stride: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """`training` is None where the weights of an earlier experiment (`weights`) are only asked.

    `teacher` names the experiment whose weights teach; `keep_weights` says that later ones need the weights.
    """

    name: str
    description: str
    training: Training | None
    evaluations: dict[str, Evaluation]
    weights: str = ""
    teacher: str = ""
    keep_weights: bool = False


BLOCK_MODE = {"block": Evaluation(mode="block")}
BOTH_MODES = {**BLOCK_MODE, "full": Evaluation(mode="full")}
BLOCK = Training(modes="both")
FULL = Training(modes="full")


def block(
    name: str,
    description: str,
    *,
    teacher: str = "",
    keep_weights: bool = False,
    evaluations: dict[str, Evaluation] = BOTH_MODES,
    **changes: object,
) -> Experiment:
    """A block fine-tuned model that differs from the plain recipe in `changes`."""
    training = replace(BLOCK, **changes)  # type: ignore[arg-type]
    return Experiment(
        name=name,
        description=description,
        training=training,
        evaluations=evaluations,
        teacher=teacher,
        keep_weights=keep_weights,
    )


def full(name: str, description: str, *, keep_weights: bool = False, **changes: object) -> Experiment:
    """A full fine-tuned model; in block mode it shows the mask alone."""
    training = replace(FULL, **changes)  # type: ignore[arg-type]
    return Experiment(
        name=name,
        description=description,
        training=training,
        evaluations=BOTH_MODES,
        keep_weights=keep_weights,
    )
