"""The verbs that make a model, from text to an export."""

from pathlib import Path
from typing import Annotated

import typer

from blockft.cli.options import Overrides, RecipeName, app


@app.command()
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a prepared folder that exists.")
    ] = False,
) -> None:
    """Read the sources, cut them into blocks and encode them: text -> samples -> examples."""
    from blockft.config.recipe import load_recipe
    from blockft.stages.prepare import prepare, print_summary

    settings = load_recipe(recipe, overrides or ())
    prepare(settings, overwrite=overwrite)
    print_summary(settings)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that prepare wrote.")],
    index: Annotated[int, typer.Option(help="Which example.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the example as JSON.")] = False,
    png: Annotated[
        Path | None, typer.Option(help="Draw the example's mask into this file, or replace it.")
    ] = None,
) -> None:
    """Show an example in colour, block by block; its mask as a picture; the set's statistics."""
    from blockft.stages.inspect import inspect

    inspect(folder, index=index, as_json=as_json, png=png)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine, one per GPU or on CPUs; 1 unless given."),
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Start on the hosts of this file, of lines NAME slots=N, by pdsh.")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="The first host's address, if not its name in the hostfile.")
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The port there on which all meet; 29500 unless given."),
    ] = None,
    ssh_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The port of the hosts' ssh servers.")
    ] = None,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start this host alone; each starts its own, with --node-rank.")
    ] = False,
    node_rank: Annotated[
        int | None, typer.Option(help="With --no-ssh: this host's place in the hostfile, from 0.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run's last whole checkpoint.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run would do, and stop.")] = False,
) -> None:
    """Fine-tune under DeepSpeed; any launcher that sets RANK starts it on several processes too."""
    from blockft.config.recipe import load_recipe
    from blockft.training.hosts import resolve_hosts

    settings = load_recipe(recipe, overrides or ())  # before the slow imports: most mistakes are found here
    hosts = resolve_hosts(
        hostfile,
        num_gpus=num_gpus,
        no_ssh=no_ssh,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        ssh_port=ssh_port,
    )
    num_processes = hosts.num_processes if hosts else num_gpus or 1

    from blockft.stages import train as stage
    from blockft.training.distributed import is_worker
    from blockft.training.launch import check_num_gpus, start_workers

    if dry_run:
        stage.print_dry_run(settings, num_processes, resume=resume)
    elif hosts or (num_processes > 1 and not is_worker()):
        if not hosts:
            check_num_gpus(num_processes)
        stage.check_run(settings, resume=resume, num_processes=num_processes)
        words = ["train", recipe, *(overrides or ()), *(["--resume"] if resume else [])]
        raise typer.Exit(start_workers(words, num_gpus=num_processes, hosts=hosts))
    else:
        stage.train(settings, resume=resume, name=Path(recipe).stem)


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run, or one checkpoint of it.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="Type of the saved weights: auto, float32, bfloat16.")] = "auto",
    best: Annotated[
        bool,
        typer.Option(
            "--best", help="Not the last checkpoint, but that of the lowest evaluation loss in block view."
        ),
    ] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapter of a LoRA run, unmerged.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Weights are split into files of this size.")] = "5GB",
) -> None:
    """Write an ordinary Hugging Face checkpoint, checked against the run's own answers before it appears."""
    from blockft.stages.export import export

    export(checkpoint, out, dtype, best=best, adapter_only=adapter_only, max_shard_size=max_shard_size)


@app.command()
def recipes() -> None:
    """List the recipes that ship."""
    from blockft.stages.recipes import recipes

    recipes()
