"""The command line: parses words, calls a verb, turns errors into exit codes. Heavy imports happen inside."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from blockft.errors import UserError

app = typer.Typer(
    help="Turn language models into Block-Attention models, and prove that it worked.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

bench = typer.Typer(help="Measure side by side.")
app.add_typer(bench, name="bench")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's.")
]


@app.command()
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a prepared folder that exists.")
    ] = False,
) -> None:
    """Read the sources, cut them into blocks and encode them: text -> samples -> examples."""
    from blockft.recipe import load_recipe
    from blockft.stages.prepare import prepare

    prepare(load_recipe(recipe, overrides or ()), overwrite=overwrite)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder that prepare wrote.")],
    index: Annotated[int, typer.Option(help="Which example.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the example as JSON.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the example's mask into this file.")] = None,
) -> None:
    """Show an example in colour, block by block; its mask as a picture; the set's statistics."""
    from blockft.stages.inspect import inspect

    inspect(folder, index=index, as_json=as_json, png=png)


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    num_gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one per GPU; 1 unless given.")
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
    from blockft.recipe import load_recipe
    from blockft.training.hosts import choose_hosts

    settings = load_recipe(recipe, overrides or ())  # before the slow imports: most mistakes are found here
    hosts = choose_hosts(
        hostfile,
        num_gpus=num_gpus,
        no_ssh=no_ssh,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        ssh_port=ssh_port,
    )
    num_processes = hosts.num_processes if hosts else num_gpus or 1

    from blockft.stages import plan
    from blockft.stages import train as stage
    from blockft.training.launch import is_worker, start_workers

    if dry_run:
        stage.describe(settings, num_processes)
    elif hosts or (num_processes > 1 and not is_worker()):
        plan.check_run(settings, resume=resume, num_processes=num_processes)
        words = ["train", recipe, *(overrides or ()), *(["--resume"] if resume else [])]
        raise typer.Exit(start_workers(words, num_gpus=num_processes, hosts=hosts))
    else:
        stage.train(settings, resume=resume)


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="A run, or one checkpoint of it.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    dtype: Annotated[str, typer.Option(help="Type of the saved weights: auto, float32, bfloat16.")] = "auto",
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint with the lowest evaluation loss, not the last.")
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
def generate(
    model: Annotated[str, typer.Argument(help="An export, any model folder, or a Hub id.")],
    source: Annotated[str, typer.Option("--input", help="JSON lines with prompts; - is standard input.")],
    mode: Annotated[str, typer.Option(help="block or full attention.")] = "block",
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of text.")] = False,
) -> None:
    """Answer prompts: {"documents", "question"} or {"messages"}, one JSON object a line."""
    from blockft.stages.generate import generate

    generate(model, source, mode=mode, max_new_tokens=max_new_tokens, as_json=as_json)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="An export, any model folder, or a Hub id.")],
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_DATA", help="A recipe with an eval part, or questions: a file, glob or folder."
        ),
    ],
    overrides: Overrides = None,
    modes: Annotated[str | None, typer.Option(help="block,full or one of them; as the recipe says.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Questions, and how they are laid out; samples unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report instead of a table.")] = False,
) -> None:
    """Answer held-out questions in block and full mode, and score the answers; goes on after a kill."""
    from blockft.recipe import is_recipe, load_recipe

    words = [*(overrides or ()), *([f"eval.modes=[{modes}]"] if modes else [])]
    if format is None and is_recipe(target):
        settings = load_recipe(target, words)  # before the slow imports: most mistakes are found here
    else:
        from blockft.stages.questions import recipe_for

        settings = recipe_for(model, target, words, format=format)

    from blockft.stages.evaluate import evaluate

    evaluate(model, settings, as_json=as_json)


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="Report folders or report.json files.")],
    metric: Annotated[
        str, typer.Option(help="substring_match, exact_match or token_f1.")
    ] = "substring_match",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the comparison into this file.")] = None,
) -> None:
    """Put reports of `eval` side by side."""
    from blockft.stages.compare import compare

    compare(reports, metric=metric, as_json=as_json, png=png)


@bench.command("attention")
def bench_attention(
    row_len: Annotated[int, typer.Option(help="Tokens in a row.")] = 4096,
    num_layouts: Annotated[int, typer.Option(help="Random layouts per type.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON into this file.")] = None,
) -> None:
    """Compare flex with the dense oracle on a GPU."""
    from blockft.stages.bench import bench_attention

    bench_attention(row_len=row_len, num_layouts=num_layouts, out=out)


@app.command()
def recipes() -> None:
    """List the recipes that ship."""
    from blockft.stages.recipes import recipes

    recipes()


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 our mistake, 2 the user's, 130 interrupted."""
    # the deepspeed launcher puts --local_rank=N first unless it is told not to
    words = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    if "RANK" not in os.environ:  # a worker of a launcher ends at once until it has something to save
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(app(words or ["--help"], standalone_mode=False))
    except _UsageError as error:
        _fail(f"{error.format_message()} (see blockft --help)")
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _fail(sentence: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on every host, for each may have a mistake of its own
        print("blockft:", " ".join(sentence.split()), file=sys.stderr)
    sys.exit(2)


_UsageError: Any = typer.BadParameter.__base__
"""What typer raises for unknown commands and options; it has no public name of its own."""
