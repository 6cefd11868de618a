"""`blockft bench`: what is measured side by side."""

from pathlib import Path
from typing import Annotated

import typer

from blockft.cli.options import Overrides, RecipeName, bench

Out = Annotated[Path | None, typer.Option(help="Write the figures as JSON into this file, or replace it.")]


@bench.command("attention")
def bench_attention(
    row_len: Annotated[int, typer.Option(help="Tokens in a row.")] = 4096,
    num_layouts: Annotated[int, typer.Option(help="Random layouts per type.")] = 4,
    out: Out = None,
) -> None:
    """Compare flex with the dense oracle on a GPU."""
    from blockft.bench.attention import bench_attention

    bench_attention(row_len=row_len, num_layouts=num_layouts, out=out)


@bench.command("ttft")
def bench_ttft(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_SHAPE", help="A model, or a shape with random weights: llama-3-8b."),
    ],
    lengths: Annotated[
        str,
        typer.Option(
            help="Tokens of the prompts, with the question; 512 to 32768, as far as the model goes."
        ),
    ] = "",
    question_len: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 50,
    block_len: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 512,
    tiers: Annotated[str, typer.Option(help="Some of device,host,disk,none; on a CPU host,disk,none.")] = "",
    warmups: Annotated[int, typer.Option(min=0, help="Runs before those that count.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 30,
    folder: Annotated[Path | None, typer.Option(help="Where to put the disk tier's files.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the layers that read cached blocks (GPU).")] = True,
    out: Out = None,
    png: Annotated[Path | None, typer.Option(help="Draw them into this file, or replace it.")] = None,
) -> None:
    """Time to the first token: full prefill against blocks cached on the device, the host and the disk."""
    from blockft.bench.ttft import bench_ttft, parse_lengths, parse_tiers

    bench_ttft(
        target,
        lengths=parse_lengths(lengths),
        question_len=question_len,
        block_len=block_len,
        tiers=parse_tiers(tiers),
        warmups=warmups,
        runs=runs,
        folder=folder,
        compile=compile,
        out=out,
        png=png,
    )


@bench.command("agreement")
def bench_agreement(
    model: Annotated[str, typer.Argument(help="An export, any model folder, or a Hub id.")],
    recipe: RecipeName,
    overrides: Overrides = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Questions of the recipe that are asked.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 24,
    out: Out = None,
) -> None:
    """Greedy answers over cached blocks against those of the masked forward."""
    from blockft.config.recipe import load_recipe
    from blockft.stages.bench import bench_agreement

    settings = load_recipe(recipe, overrides or ())
    bench_agreement(model, settings, num_prompts=num_prompts, max_new_tokens=max_new_tokens, out=out)


@bench.command("prepare")
def bench_prepare(recipe: RecipeName, overrides: Overrides = None, out: Out = None) -> None:
    """Examples per second of prepare, by one process and by one per core; the data are thrown away."""
    from blockft.config.recipe import load_recipe
    from blockft.stages.bench import bench_prepare

    bench_prepare(load_recipe(recipe, overrides or ()), out=out)


@bench.command("train")
def bench_train(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_SHAPE", help="A model, or a shape with random weights: llama-3.2-1b."
        ),
    ],
    row_len: Annotated[int, typer.Option(min=1, help="Tokens of a packed row.")] = 16384,
    sample_len: Annotated[int, typer.Option(min=1, help="Tokens of a sample.")] = 1600,
    num_documents: Annotated[int, typer.Option(min=1, help="Documents of a sample, a block each.")] = 10,
    warmups: Annotated[int, typer.Option(min=0, help="Steps before those that count.")] = 3,
    runs: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 10,
    out: Out = None,
) -> None:
    """Tokens per second of training: packed rows against one sample at a time under a dense mask."""
    from blockft.bench.train import bench_train

    bench_train(
        target,
        row_len=row_len,
        sample_len=sample_len,
        num_documents=num_documents,
        warmups=warmups,
        runs=runs,
        out=out,
    )
