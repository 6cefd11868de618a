"""`blockft bench prepare` and `blockft bench agreement`: the benchmarks that read a recipe."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from blockft.bench import agreement as agreement_benchmark
from blockft.bench import prepare as prepare_benchmark
from blockft.bench.planning import measure_planning
from blockft.bench.synthetic_source import save_tokenizer, write_source
from blockft.config.choices import BadRecordPolicy, Response, TooLongPolicy
from blockft.config.recipe import build_recipe
from blockft.config.settings import Recipe
from blockft.data.encoder import Encoder
from blockft.data.sample_frames import FRAME_SAMPLES
from blockft.errors import UserError
from blockft.evaluation.answer_questions import encode_questions
from blockft.inference.engine import Engine
from blockft.model.load import load_tokenizer, parse_dtype
from blockft.outputs import check_writable
from blockft.progress import track
from blockft.stages.evaluate import model_revision, read_questions
from blockft.stages.prepare import prepare
from blockft.units import format_count


def bench_prepare(recipe: Recipe, *, rounds: int, out: Path | None) -> None:
    """Measure how fast the recipe's data are prepared; the prepared folders are temporary.

    No teacher is asked: all sources learn their gold responses.

    Raises:
        UserError: see `prepare`; `out` cannot be written.
        RuntimeError: the number of processes changed the prepared data.
    """
    prepare_benchmark.bench_prepare(
        partial(_prepare_into, recipe), _backend(recipe), warm_up=_warm_up(recipe), rounds=rounds, out=out
    )


def bench_prepare_synthetic(
    model: str | None,
    *,
    num_samples: int,
    memory_samples: Sequence[int],
    num_documents: int,
    rounds: int,
    out: Path | None,
) -> None:
    """Measure the preparation of a synthetic source: speed, memory, growth, and planning.

    model: the folder or id of the tokenizer; None trains one on the source.
    num_samples: the number of samples for the speed; a quarter of them is the added source.
    memory_samples: the numbers of samples for which the memory is measured.
    num_documents: the number of documents of a sample, of about 125 words each.

    Raises:
        UserError: the tokenizer cannot be loaded; `out` cannot be written.
        RuntimeError: the number of processes changed the prepared data.
    """
    if out:
        check_writable(out)
    with tempfile.TemporaryDirectory(prefix="blockft-source-") as temporary:
        folder = Path(temporary)
        first, added = folder / "first.jsonl", folder / "added.jsonl"
        write_source(first, num_samples, 0, num_documents)
        write_source(added, max(1, num_samples // 4), 1, num_documents)
        if model is None:
            save_tokenizer(folder / "tokenizer", first)
        recipe = _synthetic_recipe(model or str(folder / "tokenizer"), [first], folder)
        other = _synthetic_recipe(recipe.model.path, [added], folder)
        both = _synthetic_recipe(recipe.model.path, [first, added], folder)

        def measure_more() -> dict[str, Any]:
            return {
                "tokenizer": model or "trained on the source",
                "documents": num_documents,
                "memory": [
                    _measure_memory(recipe, number, num_documents, folder) for number in memory_samples
                ],
                "growth": prepare_benchmark.measure_growth(
                    partial(_prepare_into, recipe),
                    partial(_prepare_into, other),
                    partial(_prepare_into, both),
                ),
                "planning": measure_planning(),
            }

        prepare_benchmark.bench_prepare(
            partial(_prepare_into, recipe),
            _backend(recipe),
            warm_up=_warm_up(recipe),
            rounds=rounds,
            out=out,
            more=measure_more,
        )


def _prepare_into(recipe: Recipe, folder: Path, num_workers: int) -> None:
    sources = [source.model_copy(update={"response": Response.gold}) for source in recipe.data.sources]
    settings = {"output_dir": str(folder), "cache_dir": None, "num_workers": num_workers, "teacher": None}
    prepare(_with_data(recipe, sources=sources, **settings), overwrite=True)


def _warm_up(recipe: Recipe) -> prepare_benchmark.Prepare:
    few = [source.model_copy(update={"max_samples": FRAME_SAMPLES}) for source in recipe.data.sources]
    return partial(_prepare_into, _with_data(recipe, sources=few))


def _backend(recipe: Recipe) -> Tokenizer:
    """Return a copy of the recipe's tokenizer without the layer of transformers."""
    settings = recipe.model
    tokenizer = load_tokenizer(settings.path, settings.revision, settings.chat_template)
    Encoder(tokenizer)  # refuses a tokenizer without a backend
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def _synthetic_recipe(model: str, sources: Sequence[Path], folder: Path) -> Recipe:
    settings: dict[str, Any] = {
        "output_dir": str(folder / "data"),
        "sources": [{"format": "fid", "path": str(path)} for path in sources],
        "row_len": 16384,
    }
    run = {"output_dir": str(folder / "run")}
    return build_recipe({"model": {"path": model}, "data": settings, "train": run}, (), "the benchmark")


def _measure_memory(recipe: Recipe, num_samples: int, num_documents: int, folder: Path) -> dict[str, Any]:
    """Measure the memory of `blockft prepare` for a source of this many samples."""
    with tempfile.TemporaryDirectory(prefix="blockft-memory-", dir=folder) as temporary:
        source = Path(temporary) / "source.jsonl"
        write_source(source, num_samples, 2, num_documents)
        sized = _synthetic_recipe(recipe.model.path, [source], Path(temporary))
        file = Path(temporary) / "recipe.yaml"
        file.write_text(yaml.safe_dump(sized.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
        return prepare_benchmark.measure_memory(prepare_benchmark.prepare_command(file), num_samples)


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
