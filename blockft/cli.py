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

cache = typer.Typer(help="Keep the keys and values of blocks on a disk.")
app.add_typer(cache, name="cache")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships.")
]
CacheName = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a block cache.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that override the recipe's.")
]


CacheFolderOption = Annotated[
    Path | None, typer.Option("--cache", help="A folder that keeps blocks for later processes.")
]
CacheBytes = Annotated[str | None, typer.Option(help="What that folder may take, as 100GB; no limit.")]
HostBytes = Annotated[str | None, typer.Option(help="Memory for blocks, as 8GB; a quarter of what is free.")]
DeviceBytes = Annotated[
    str | None, typer.Option(help="GPU memory for blocks, as 20GB; half of what the model leaves free.")
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
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this probability.")] = 1,
    seed: Annotated[int, typer.Option(help="Of drawing; the next prompt has the next one.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this text; may be given several times.")
    ] = None,
    trim: Annotated[
        bool, typer.Option("--trim", help="Long prompts lose the documents of the lowest score.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is written.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: answers, blocks reused, times.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Half a minute at the start, less time for each token (GPU).")
    ] = False,
    cache: CacheFolderOption = None,
    cache_bytes: CacheBytes = None,
    host_bytes: HostBytes = None,
    device_bytes: DeviceBytes = None,
) -> None:
    """Answer requests, one JSON object a line.

    {"documents": [{"title", "text"}, ...], "question"}, {"messages": [...]}, or {"blocks": [...]} of a prompt
    that is already templated.
    """
    from blockft.stages.generate import CacheWords, generate

    generate(
        model,
        source,
        mode=mode,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        trims=trim,
        batch_size=batch_size,
        streams=stream,
        as_json=as_json,
        compile=compile,
        cache=CacheWords(folder=cache, disk=cache_bytes, host=host_bytes, device=device_bytes),
    )


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


@bench.command("ttft")
def bench_ttft(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_SHAPE", help="A model, or a shape with random weights: llama-3-8b."),
    ],
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompts, question included.")
    ] = "512,1024,2048,4096,8192,16384,32768",
    question_len: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 50,
    block_len: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 512,
    tiers: Annotated[str, typer.Option(help="Some of device,host,disk,none; on a CPU host,disk,none.")] = "",
    warmups: Annotated[int, typer.Option(min=0, help="Runs before those that count.")] = 10,
    runs: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 30,
    folder: Annotated[Path | None, typer.Option(help="Where to put the disk tier's files.")] = None,
    compile: Annotated[bool, typer.Option(help="Compile the layers that read cached blocks (GPU).")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON into this file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw them into this file.")] = None,
) -> None:
    """Time to the first token: full prefill against blocks cached on the device, the host and the disk."""
    from blockft.stages.ttft import bench_ttft, read_lengths, read_tiers

    bench_ttft(
        target,
        lengths=read_lengths(lengths),
        question_len=question_len,
        block_len=block_len,
        tiers=read_tiers(tiers),
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
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON into this file.")] = None,
) -> None:
    """Greedy answers over cached blocks against those of the masked forward."""
    from blockft.recipe import load_recipe
    from blockft.stages.agreement import bench_agreement

    settings = load_recipe(recipe, overrides or ())
    bench_agreement(model, settings, num_prompts=num_prompts, max_new_tokens=max_new_tokens, out=out)


@cache.command("build")
def cache_build(
    model: Annotated[str, typer.Argument(help="An export, any model folder, or a Hub id.")],
    corpus: Annotated[Path, typer.Argument(help='JSON lines: {"title", "text"}, or texts.')],
    folder: Annotated[Path, typer.Option("--cache", help="The folder of the cache; made if need be.")],
    cache_bytes: CacheBytes = None,
) -> None:
    """Encode the documents of a corpus before anybody asks about them; goes on after a kill."""
    from blockft.stages.build import build
    from blockft.stages.generate import CacheWords

    build(model, corpus, CacheWords(folder=folder, disk=cache_bytes, host="0", device="0"))


@cache.command("stats")
def cache_stats(
    folder: CacheName,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which models' blocks a cache holds, how many, and when they were used."""
    from blockft.stages.cache import stats

    stats(folder, as_json=as_json)


@cache.command("verify")
def cache_verify(
    folder: CacheName,
    remove: Annotated[bool, typer.Option("--remove", help="Remove damaged entries.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every entry of a cache and compare all checksums."""
    from blockft.stages.cache import verify

    verify(folder, remove=remove, as_json=as_json)


@cache.command("prune")
def cache_prune(
    folder: CacheName,
    max_bytes: Annotated[
        str | None, typer.Option(help="What may stay, as 10GB or 512MiB; least recently used entries go.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(help="Remove what was not used for so long, as 7d or 12h.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Only entries of this model: its name, or how its fingerprint begins.")
    ] = None,
) -> None:
    """Remove entries of a cache, and what killed processes left; one limit at least."""
    from blockft.stages.cache import prune

    prune(folder, max_bytes=max_bytes, older_than=older_than, model=model)


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
