"""The manifest of prepared data: its settings, and what each source gave."""

from collections.abc import Sequence
from typing import Any

from blockft.config.settings import Recipe, Source
from blockft.data.statistics import ExampleStatistics, SourceStatistics, histogram
from blockft.stages.source_kind import holds_questions
from blockft.stages.source_settings import sees_first_block
from blockft.stages.teacher_settings import teacher_options

NOT_IN_MANIFEST = ("output_dir", "cache_dir", "num_workers", "positions")
"""Settings of `data` that change nothing in the prepared folder, so that its bytes do not depend on them."""


def build_manifest(
    recipe: Recipe,
    tokenizer: str,
    counts: Sequence[SourceStatistics],
    statistics: ExampleStatistics,
) -> dict[str, Any]:
    """Return the settings of a prepared folder, the counts of each source, and those of all examples.

    tokenizer: its fingerprint.
    counts: the counts of each source.
    """
    options = recipe.data.model_dump(mode="json")
    for name in NOT_IN_MANIFEST:
        del options[name]
    options["local_sees_first"] = sees_first_block(recipe.data)
    if recipe.data.teacher:
        options["teacher"] = teacher_options(recipe.data.teacher)
    sources = zip(recipe.data.sources, counts, strict=True)
    return {
        "model": {"path": recipe.model.path, "revision": recipe.model.revision},
        "tokenizer": tokenizer,
        "options": options,
        "sources": [_describe_source(source, count) for source, count in sources],
        "num_samples": sum(count.kept for count in counts),
        "num_examples": statistics.num_examples,
        "num_tokens": statistics.num_tokens,
        "num_labels": statistics.num_labels,
        "blocks_per_example": histogram(statistics.num_blocks),
        # each length is rounded up to a power of two
        "tokens_per_example": histogram(statistics.lengths),
    }


def _describe_source(source: Source, count: SourceStatistics) -> dict[str, Any]:
    return {
        "path": source.path,
        "format": source.format.value,
        # whether data.prompt words the prompts
        "has_questions": holds_questions(source),
        "read": count.read,
        "samples": count.samples,
        "kept": count.kept,
        # samples whose template markup came with the data, where texts may become added tokens
        "templated": count.templated,
        "tokens": count.tokens,
        "dropped": dict(sorted(count.dropped.items())),
        # the first records and samples that were dropped for each reason
        "drop_examples": dict(sorted(count.drop_examples.items())),
        # tokens of the samples that are longer than a row, rounded up, with their number
        "too_long_lengths": {str(length): n for length, n in sorted(count.too_long_lengths.items())},
        # fields that the format does not know, with the number of records that have them
        "unknown_fields": dict(sorted(count.unknown_fields.items())),
        "bad_records": [*dict.fromkeys(count.bad_records + count.mismatched_samples)],
    }
