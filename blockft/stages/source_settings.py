"""Settings of sources and prompts: check them, and read the samples of a source by them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, repeat, zip_longest

from blockft.config.choices import BadRecordPolicy, Format, Mode, Order, Retriever
from blockft.config.settings import DataSettings, MixtureSettings, PromptSettings, Source, SplittingSettings
from blockft.data.constructed import ConstructedSize
from blockft.data.fields import format_fields
from blockft.data.rag_prompt import RagPrompt
from blockft.data.sample import Sample
from blockft.data.sources import RecordCounts, read_samples
from blockft.errors import UserError, warn
from blockft.stages.source_kind import holds_questions, is_split, source_columns
from blockft.stages.teacher_settings import teacher_settings_without_effect


def check_wording(prompt: PromptSettings) -> None:
    """Refuse a wording with which the same document would not always become the same block.

    Only `prepare` checks this: a model that was trained with such a wording can still use it if its chat
    template leaves it unchanged.

    Raises:
        UserError: no text stands before the documents, or a document ends in white space.
    """
    if not prompt.instruction.strip():
        raise UserError(
            "data.prompt.instruction is blank: the first document would start the message, and a chat "
            "template that strips messages would change its block; write an instruction"
        )
    if prompt.document != prompt.document.rstrip():
        raise UserError(
            f"data.prompt.document ends in {prompt.document[len(prompt.document.rstrip()) :]!r}: a chat "
            "template that strips messages would change the block of the last document; write the white "
            "space before the document"
        )


def check_copies(data: DataSettings) -> None:
    """Refuse copies that would all be the same.

    Raises:
        UserError: `data.num_copies` is above 1, and nothing in the prompts of any source is random.
    """
    if data.num_copies > 1 and not any(_is_random(source, data) for source in data.sources):
        raise UserError(
            f"data.num_copies is {data.num_copies}, and all copies would be the same, because no source has "
            "documents that are drawn or ordered at random: set data.order=shuffled, or train longer with "
            "train.num_train_epochs"
        )


def sees_first_block(data: DataSettings) -> bool:
    """Return whether local blocks see the first block in training, which changes block mode alone."""
    return data.local_sees_first and Mode.block in data.modes


def settings_without_effect(data: DataSettings) -> list[str]:
    """Return one sentence for every changed setting that has no effect on `data.sources`.

    Without its columns nothing is known about a source of the format `columns`, and `prepare` stops.
    """
    if any(source.format is Format.columns and source.columns is None for source in data.sources):
        return []
    has_questions = any(map(holds_questions, data.sources))
    splits = any(map(is_split, data.sources))
    searches = any(source.retriever is Retriever.dense for source in data.sources)
    found = []
    for key in _changed_settings(data):
        section, _, name = key.rpartition(".")
        if key == "data.num_documents":
            has_effect = any(holds_questions(s) and not _is_constructed(s) for s in data.sources)
            reason = "all of them already contain their documents"
        elif section == "data.prompt" or key == "data.order":
            has_effect, reason = has_questions, "all of them already contain their documents"
        elif section == "data.splitting":
            has_effect, reason = splits, "none of them has chats or instructions to split"
        elif key == "data.mixture.temperature":
            has_effect, reason = len(data.sources) > 1, "there is only one source"
        elif name == "dense_model":
            has_effect, reason = searches, "none of them has retriever: dense"
        elif name == "max_questions_per_context":
            has_effect, reason = data.shared_context, "data.shared_context is false"
        else:
            continue
        if not has_effect:
            found.append(f"{key} has no effect on data.sources: {reason}")
    return found + teacher_settings_without_effect(data)


def _changed_settings(data: DataSettings) -> list[str]:
    """Return the settings of `data` and its sections that differ from their defaults."""
    sections = {
        "data": (data, DataSettings.model_fields),
        "data.prompt": (data.prompt, PromptSettings.model_fields),
        "data.splitting": (data.splitting, SplittingSettings.model_fields),
        "data.mixture": (data.mixture, MixtureSettings.model_fields),
    }
    return [
        f"{section}.{name}"
        for section, (settings, fields) in sections.items()
        for name, field in fields.items()
        if not field.is_required() and getattr(settings, name) != field.get_default(call_default_factory=True)
    ]


def _is_constructed(source: Source) -> bool:
    return source.format is Format.constructed


def _is_random(source: Source, data: DataSettings) -> bool:
    """Return whether the seed influences which documents a prompt of the source has, or their order."""
    if not holds_questions(source):
        return False
    has_random_order = data.order is Order.shuffled or data.shared_context and data.order is not Order.given
    # a search replaces the random choice of distractors; but sets of shared documents start at random
    has_random_choice = (
        data.num_documents is not None
        and not _is_constructed(source)
        and (source.retriever is Retriever.none or data.shared_context)
    )
    return has_random_order or has_random_choice


def rag_prompt(data: DataSettings) -> RagPrompt:
    """Return the wording of prompts and the order of their documents.

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


def warn_of_unknown_fields(source: Source, counts: RecordCounts) -> None:
    """Warn of the fields of a source that its format does not know.

    Fields that `columns` does not name give no warning, because the user has chosen the fields.
    """
    if counts.unknown_fields and source.format is not Format.columns:
        warn(
            f"{source.path} has fields that the format {source.format} does not know; they have no effect "
            f"(records): {format_fields(counts.unknown_fields)}"
        )


def read_source(
    source: Source,
    data: DataSettings,
    counts: RecordCounts,
    *,
    needs_evidence: bool = True,
    revision: str | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a source in the wording of `data.prompt`; see `blockft.data.sources.read_samples`.

    counts: records read, dropped and bad are added here, and unknown fields.
    revision: the commit of a dataset on the Hub; None is the newest one.

    Raises:
        UserError: the source does not exist, or settings contradict each other; during iteration: a record is
            bad.
    """
    prompt = rag_prompt(data)
    if _is_constructed(source):
        prompt = replace(prompt, num_documents=None)  # its own setting says how many it has
    return read_samples(
        source.format,
        source.path,
        counts,
        prompt=prompt,
        split=source.split,
        name=source.name,
        revision=revision,
        skip_samples=source.skip_samples,
        max_samples=source.max_samples,
        max_questions_per_context=data.max_questions_per_context,
        skip_bad=data.on_bad_record is BadRecordPolicy.skip,
        needs_evidence=needs_evidence,
        retriever=source.retriever,
        dense_model=data.dense_model,
        constructed=ConstructedSize(**source.constructed.model_dump()),
        columns=source_columns(source),
        corpus=source.corpus,
    )


def take_in_turn(
    sources: Sequence[Iterable[Sample]], max_samples: int | None
) -> Iterator[tuple[int, Sample]]:
    """Yield (index of the source, sample) from the sources in turn, at most `max_samples`; None takes all."""
    rounds = zip_longest(*(zip(repeat(i), source) for i, source in enumerate(sources)))
    return islice((entry for entry in chain.from_iterable(rounds) if entry), max_samples)
