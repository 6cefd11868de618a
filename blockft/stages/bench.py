"""`blockft bench prepare` and `blockft bench agreement`: the benchmarks that read a recipe."""

from pathlib import Path
from typing import Any

from blockft.bench import agreement as agreement_benchmark
from blockft.bench import prepare as prepare_benchmark
from blockft.config.choices import BadRecordPolicy, TooLongPolicy
from blockft.config.settings import Recipe
from blockft.data.sample_frames import FRAME_SAMPLES
from blockft.errors import UserError
from blockft.evaluation.answer_questions import encode_questions
from blockft.inference.engine import Engine
from blockft.model.load import parse_dtype
from blockft.outputs import check_writable
from blockft.progress import track
from blockft.stages.evaluate import model_revision, read_questions
from blockft.stages.prepare import prepare
from blockft.units import format_count


def bench_prepare(recipe: Recipe, *, out: Path | None) -> None:
    """Measure how fast the recipe's data are prepared; the prepared folders are temporary.

    Raises:
        UserError: see `prepare`; `out` cannot be written.
        RuntimeError: the number of processes changed the prepared data.
    """
    few = [source.model_copy(update={"max_samples": FRAME_SAMPLES}) for source in recipe.data.sources]
    few_samples = _with_data(recipe, sources=few)

    def prepare_into(recipe: Recipe, folder: Path, num_workers: int) -> None:
        prepare(_with_data(recipe, output_dir=str(folder), num_workers=num_workers))

    prepare_benchmark.bench_prepare(
        lambda folder, num_workers: prepare_into(recipe, folder, num_workers),
        warm_up=lambda folder, num_workers: prepare_into(few_samples, folder, num_workers),
        out=out,
    )


def bench_agreement(
    model: str, recipe: Recipe, *, num_prompts: int, max_new_tokens: int, out: Path | None
) -> None:
    """Compare answers over cached blocks with the masked forward pass on evenly spaced questions.

    Questions that do not fit into the model are left out and counted, after trimming if
    `data.too_long=trim`.

    Raises:
        UserError: there are fewer questions than prompts; `out` cannot be written; see `read_questions`,
            `model_revision` and `Engine.load`.
    """
    if out:
        check_writable(out)
    samples, _ = read_questions(recipe)
    if num_prompts > len(samples):
        raise UserError(
            f"the recipe has {format_count(len(samples), 'question')}, but --num-prompts is {num_prompts}"
        )
    revision, dtype = model_revision(model, recipe), parse_dtype(recipe.model.dtype, None)
    with Engine.load(model, revision=revision, dtype=dtype) as engine:
        questions = encode_questions(
            engine,
            [samples[i * len(samples) // num_prompts] for i in range(num_prompts)],
            max_new_tokens,
            trim=recipe.data.too_long is TooLongPolicy.trim,
            skip_bad=recipe.data.on_bad_record is BadRecordPolicy.skip,
        )
        agreement_benchmark.bench_agreement(
            engine,
            track(questions.samples, "answers", unit="answer"),
            questions.prompts,
            max_new_tokens=max_new_tokens,
            record={"model": model, "dropped_records": dict(questions.dropped)},
            out=out,
        )


def _with_data(recipe: Recipe, **settings: Any) -> Recipe:
    """Return a copy of the recipe with other settings of `data`."""
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=settings)})
