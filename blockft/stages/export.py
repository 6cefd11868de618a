"""`blockft export`: write a plain Hugging Face model folder after checking it against the run."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from blockft.config.choices import DType, WeightInit
from blockft.config.recipe import load_recipe
from blockft.config.settings import Recipe
from blockft.console import PlainConsole
from blockft.data.encoder import Encoder
from blockft.data.prepared import FILES
from blockft.errors import UserError, check_type, list_allowed, warn
from blockft.evaluation.report import ALL
from blockft.evaluation.report_render import TITLES, format_score
from blockft.inputs import check_path
from blockft.markdown import code_span, markdown_table
from blockft.model.base_quantization import read_base_quantization, write_base_quantization
from blockft.model.checkpoint import (
    MARKER,
    incomplete_checkpoints,
    load_reference_logits,
    read_marker,
    reading_checkpoint,
    verify_checkpoint,
)
from blockft.model.hub import check_push, describe_base_model, push_folder
from blockft.model.load import (
    DTYPES,
    adapter_base_model,
    digest_base_weights,
    load_config,
    load_full_attention_model,
    load_generation_config,
    load_tokenizer,
    parse_dtype,
    write_adapter_block_attention,
)
from blockft.model.lora import load_adapter, open_adapter
from blockft.model.model_card import build_model_card
from blockft.model.model_files import write_digests
from blockft.model.weights import error_prefix, load_weights
from blockft.outputs import LockedFolder, atomic_folder, check_absent
from blockft.run_folder import RECIPE, read_data, read_metrics, read_recipe, verify_metrics
from blockft.stages.block_attention import build_block_attention
from blockft.stages.compare import read_report
from blockft.stages.output_folder import lock_output
from blockft.stages.source_settings import sees_first_block
from blockft.training.library_internals import check_pickles, consolidate_weights
from blockft.training.library_warnings import silence_known_warnings
from blockft.training.plan import BASE_WEIGHTS, QUANTIZATION, WEIGHT_DTYPE
from blockft.units import format_count, parse_bytes
from blockft.version import __version__

EXACT_TOLERANCE = 1e-5
"""Largest difference of the logits, relative to their norm, if no weight is rounded."""

ROUNDED_TOLERANCE = 2e-2
"""Largest difference, relative to the norm, if weights are rounded to 16 bits that the run had in 32 bits."""


def export(
    run: str | Path,
    output_dir: str | Path,
    *,
    dtype: str = "auto",
    best: bool = False,
    adapter_only: bool = False,
    max_shard_size: str = "5GB",
    report: Path | None = None,
    push: str | None = None,
    private: bool = True,
) -> Path:
    """Write a checkpoint as a plain Hugging Face model folder and return the folder's path.

    An adapter is merged into its base model. Before the folder appears it is opened with plain transformers,
    and its logits are compared with those of the run.

    Args:
        run: a run's folder, whose last complete checkpoint is exported, or one of its checkpoints.
        output_dir: the folder to write; it must not exist.
        dtype: dtype of the saved weights: auto (that of the run), float32 or bfloat16.
        best: export the checkpoint with the lowest evaluation loss instead of the last one.
        adapter_only: write only the adapter of a LoRA run.
        max_shard_size: largest size of a file of weights, for example "5GB".
        report: a folder of `evaluate`, whose scores the model card shows.
        push: a repository of the Hugging Face Hub (OWNER/NAME) to upload the folder to; it is created if it
            does not exist.
        private: create that repository as a private one. An existing repository keeps its visibility.

    Raises:
        UserError: there is no complete checkpoint; `output_dir` exists; the dtype or size is unknown; the run
            has no adapter; the report cannot be read; the disk is full. Nothing is left behind. Also, if the
            upload fails: then the folder is complete, and the message says how to repeat the upload.
        RuntimeError: the logits differ from those of the run.
    """
    for name, value in (("run", run), ("output_dir", output_dir)):
        check_type(value, (str, Path), name)
        check_path(value, name)
    check_type(max_shard_size, str, "max_shard_size", "write a size such as 5GB")
    silence_known_warnings()
    run, output_dir = Path(run), Path(output_dir)
    with lock_output(output_dir, "blockft export", {"the run": run}) as out:
        check_absent(output_dir, "choose another folder")
        if push is not None:
            check_push(push)
        with reading_checkpoint(run, "blockft export", best=best) as checkpoint:
            for incomplete in incomplete_checkpoints(run):
                warn(f"{incomplete} is incomplete (it has no {MARKER}) and is skipped")
            _export(
                out,
                checkpoint,
                dtype=dtype,
                adapter_only=adapter_only,
                shard_bytes=parse_bytes(max_shard_size),
                scores="" if report is None else _format_scores(read_report(Path(report))),
                repository=push,
            )
        if push is not None:
            pushed = push_folder(output_dir, push, private=private)
            PlainConsole(stderr=True).print(f"pushed to {pushed}")
    return output_dir


def _export(
    out: LockedFolder,
    checkpoint: Path,
    *,
    dtype: str,
    adapter_only: bool,
    shard_bytes: int,
    scores: str,
    repository: str | None,
) -> None:
    """Write a checkpoint as a model folder after comparing its logits with those of the run."""
    # check before the weights are gathered what the model card needs
    verify_checkpoint(checkpoint)
    check_pickles(checkpoint)
    marker = read_marker(checkpoint)
    verify_metrics(checkpoint.parent, marker["metrics"])
    read_recipe(checkpoint.parent)
    read_data(checkpoint.parent)
    run_signature = marker["run_signature"]
    has_adapter = run_signature["train.lora"] is not None
    if adapter_only and not has_adapter:
        raise UserError(f"{checkpoint} trained all weights, so there is no adapter: leave out --adapter-only")
    run_dtype = DTYPES[run_signature[WEIGHT_DTYPE]]
    export_dtype = _parse_dtype(dtype, run_dtype)
    recipe = load_recipe(str(checkpoint.parent / RECIPE))
    if has_adapter and recipe.model.init is WeightInit.random:
        raise UserError(
            f"{checkpoint} holds an adapter of a random model (model.init=random), whose weights nothing "
            "keeps: train all weights, or set model.init=pretrained, to export a run"
        )
    base_weights = run_signature.get(BASE_WEIGHTS)
    if base_weights and digest_base_weights(recipe.model.path, recipe.model.revision) != base_weights:
        raise UserError(
            f"{checkpoint} was trained on other weights than {recipe.model.path} holds now: restore the "
            "weights of the base model to export its adapter"
        )
    console = PlainConsole(stderr=True)
    console.print(f"gathering the weights of {checkpoint}")
    with atomic_folder(out) as folder:
        tokenizer = load_tokenizer(str(checkpoint))
        if adapter_only:
            _save_adapter(folder, checkpoint, recipe, export_dtype)
            if run_signature[QUANTIZATION]:
                write_base_quantization(folder, run_dtype)
        else:
            end_token_ids = Encoder(tokenizer).end_token_ids
            _save_model(folder, checkpoint, recipe, export_dtype, has_adapter, shard_bytes, end_token_ids)
        tokenizer.save_pretrained(folder)
        card = _build_card(
            checkpoint, recipe, name=repository or out.name.name, is_adapter=adapter_only, scores=scores
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_digests(folder, base_weights=base_weights if adapter_only else None)
        is_exact = export_dtype is run_dtype and (export_dtype is torch.float32 or not has_adapter)
        tolerance = EXACT_TOLERANCE if is_exact else ROUNDED_TOLERANCE
        difference = _compare_logits(folder, checkpoint)
        if not difference <= tolerance:
            raise RuntimeError(
                f"the export's logits differ from the run's by {difference:.1e}, which is more than "
                f"{tolerance:.0e}: nothing was written to {out.name}"
            )
    console.print(f"wrote {out.name}; its logits differ from the run's by {difference:.1e}")


def _parse_dtype(name: str, run_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a name; `auto` is the dtype of the run."""
    if name not in DType.__members__:
        raise UserError(f"--dtype is {name!r} ({list_allowed(name, DType)})")
    return parse_dtype(name, run_dtype)


def _save_adapter(folder: Path, checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    """Write the adapter of a run, and its `block_attention` entry as a file of its own."""
    base = _build_empty_model(checkpoint, recipe, dtype)
    adapter = load_adapter(base, checkpoint, consolidate_weights(checkpoint, dtype))
    # peft would also save adapted embeddings of the base model, which has no weights here
    adapter.save_pretrained(str(folder), save_embedding_layers=False)
    write_adapter_block_attention(folder, _block_attention_entry(checkpoint, recipe))


def _save_model(
    folder: Path,
    checkpoint: Path,
    recipe: Recipe,
    dtype: torch.dtype,
    has_adapter: bool,
    shard_bytes: int,
    end_token_ids: Collection[int],
) -> None:
    """Write the model of a run, its adapter merged."""
    load_weights = _merge_adapter if has_adapter else _load_all_weights
    model = load_weights(checkpoint, recipe, dtype)
    model.config.block_attention = _block_attention_entry(checkpoint, recipe)
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = load_generation_config(checkpoint, model.config)
    add_end_tokens(model.generation_config, end_token_ids)
    model.save_pretrained(folder, max_shard_size=shard_bytes)


def add_end_tokens(config: GenerationConfig, end_token_ids: Collection[int]) -> None:
    """Let plain transformers stop at the tokens that end an answer, besides those of the configuration."""
    configured = config.eos_token_id
    ids = configured if isinstance(configured, list) else [] if configured is None else [configured]
    if missing := sorted({*end_token_ids} - {*ids}):
        config.eos_token_id = [*ids, *missing]


def _block_attention_entry(checkpoint: Path, recipe: Recipe) -> dict[str, Any]:
    return build_block_attention(recipe.data, read_data(checkpoint.parent))


def _load_all_weights(checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a run that trained all its weights."""
    model = _build_empty_model(checkpoint, recipe, dtype)
    weights = consolidate_weights(checkpoint, dtype)
    with error_prefix(f"{checkpoint} cannot be exported: "):
        load_weights(model, weights)
    return model


def _merge_adapter(checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model of a run with the adapter merged in float32, then converted to `dtype`."""
    signature = read_marker(checkpoint)["run_signature"]
    base = load_full_attention_model(
        recipe.model.path,
        recipe.model.revision,
        torch.float32,
        quantized_in=DTYPES[signature[WEIGHT_DTYPE]] if signature[QUANTIZATION] else None,
    )
    adapted = load_adapter(base, checkpoint, consolidate_weights(checkpoint, torch.float32))
    return adapted.merge_and_unload().to(dtype)


def _build_empty_model(checkpoint: Path, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """Return the run's model on the meta device, under the name of its base model."""
    config = load_config(str(checkpoint))
    config.name_or_path = recipe.model.path
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _format_scores(report: dict[str, Any]) -> str:
    """Return the scores of a report over all questions as Markdown: a row per metric, a column per mode."""
    modes = report["modes"]
    rows = [
        [title, *(format_score(groups[ALL], metric) for groups in modes.values())]
        for metric, title in TITLES.items()
    ]
    num_questions = next(iter(modes.values()))[ALL]["questions"]
    questions = format_count(num_questions, "question")
    table = markdown_table(["metric", *(f"{mode} mode" for mode in modes)], rows)
    return f"Evaluation of {code_span(Path(report['model']).name)} on {questions}:\n\n{table}"


def _build_card(checkpoint: Path, recipe: Recipe, *, name: str, is_adapter: bool, scores: str) -> str:
    return build_model_card(
        name=name,
        base=describe_base_model(recipe.model.path, recipe.model.revision),
        is_adapter=is_adapter,
        is_quantized=bool(read_marker(checkpoint)["run_signature"][QUANTIZATION]),
        has_wording="prompt" in _block_attention_entry(checkpoint, recipe),
        local_sees_first=sees_first_block(recipe.data),
        scores=scores,
        version=__version__,
        step=read_marker(checkpoint)["step"],
        recipe=read_recipe(checkpoint.parent),
        manifest={name: value for name, value in read_data(checkpoint.parent).items() if name != FILES},
        metrics=read_metrics(checkpoint.parent, read_marker(checkpoint)["metrics"]["bytes"]),
    )


@torch.no_grad()
def _compare_logits(folder: Path, checkpoint: Path) -> float:
    """Return the relative difference between the folder's logits on the reference text and the run's.

    The folder is opened with plain transformers. Both logits are computed in float32, whatever the dtype of
    the weights.
    """
    ids, positions, expected = load_reference_logits(checkpoint)
    if base := adapter_base_model(str(folder)):
        # transformers itself cannot open every kind of adapter (for example DoRA)
        quantized_in = read_base_quantization(folder)
        base_model = load_full_attention_model(*base, torch.float32, quantized_in=quantized_in)
        model: torch.nn.Module = open_adapter(base_model, folder)
    else:
        model = load_full_attention_model(str(folder), None, torch.float32)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, positions]
    return float((logits - expected).norm() / expected.norm())
