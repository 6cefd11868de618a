"""What the settings say about questions: the wording of their prompts, and where they come from."""

from collections.abc import Iterator

from blockft.config.choices import BadRecordPolicy, Order, Retriever
from blockft.config.settings import DataSettings, PromptSettings, Source
from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import Sample
from blockft.data.sources import SOURCE_FORMATS, RecordCounts, read_samples
from blockft.errors import UserError


def check_wording(prompt: PromptSettings) -> None:
    """Refuse a wording to train on that would not make the same block of a document everywhere.

    A model that was trained on such a wording is still asked in it, as long as its chat template keeps it.

    Raises:
        UserError: no text stands before the documents, or something after the last one.
    """
    if not prompt.instruction.strip():
        raise UserError(
            "data.prompt.instruction is blank: without a text before it the first document would start the "
            "message, and a chat template that trims would make another block of it; write an instruction"
        )
    if prompt.document != prompt.document.rstrip():
        raise UserError(
            f"data.prompt.document ends in {prompt.document[len(prompt.document.rstrip()) :]!r}: a chat "
            "template that trims would make another block of the last document; write it before the document"
        )


def check_effect(data: DataSettings) -> None:
    """Refuse settings that would change nothing in any source.

    Raises:
        UserError: a number of documents where no prompt is worded; copies in which nothing is drawn by lot.
    """
    if data.num_documents is not None and not any(
        SOURCE_FORMATS[s.format].parse_question for s in data.sources
    ):
        raise UserError(
            f"data.num_documents is {data.num_documents}, and all sources have their documents in place: "
            "leave it out (data.too_long=trim shortens those longer than a row)"
        )
    if data.num_copies > 1 and not any(_draws_lots(source, data) for source in data.sources):
        raise UserError(
            f"data.num_copies is {data.num_copies}, and all would be the same, for no source has documents "
            "that are drawn or put into order by lot: set data.order=shuffled, or train longer with "
            "train.num_train_epochs"
        )


def _draws_lots(source: Source, data: DataSettings) -> bool:
    """Whether the seed has a say in which documents stand in the prompts of a source, or where."""
    if not SOURCE_FORMATS[source.format].parse_question:
        return False
    is_ordered_so = data.order is Order.shuffled or data.shared_context and data.order is not Order.given
    # a search ranks what lots would choose from; sets of documents to share are begun by lot all the same
    is_chosen_so = data.num_documents is not None and (
        source.retriever is Retriever.none or data.shared_context
    )
    return is_ordered_so or is_chosen_so


def rag_prompt(data: DataSettings) -> RagPrompt:
    """How prompts are worded and which documents stand where.

    Raises:
        UserError: a template is faulty.
    """
    prompt = data.prompt
    return RagPrompt(
        instruction=prompt.instruction,
        document=prompt.document,
        question=prompt.question,
        documents_in=prompt.documents_in,
        order=data.order,
        num_documents=data.num_documents,
        shared_context=data.shared_context,
        seed=data.seed,
    )


def read_source(source: Source, data: DataSettings, tally: RecordCounts) -> Iterator[Sample]:
    """The samples of a source, lazily, in the wording of `data.prompt`; see `sources.read`.

    Raises:
        UserError: nothing is there, settings do not go together, or, later, a record is bad.
    """
    if data.max_questions_per_context and not data.shared_context:
        raise UserError(
            f"data.max_questions_per_context is {data.max_questions_per_context}, and no context is shared: "
            "set data.shared_context=true, or leave it out"
        )
    return read_samples(
        source.format,
        source.path,
        tally,
        prompt=rag_prompt(data),
        split=source.split,
        name=source.name,
        skip_samples=source.skip_samples,
        max_samples=source.max_samples,
        max_questions_per_context=data.max_questions_per_context,
        skip_bad=data.on_bad_record is BadRecordPolicy.skip,
        retriever=source.retriever,
        dense_model=data.dense_model,
    )
