"""The top-level commands. Each command imports its stage when it is called, so that `--help` is fast."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockft.cli import bench, cache
from blockft.cli.next_command import eval_command, print_next, unused_path
from blockft.cli.options import (
    AsJson,
    BatchSize,
    CacheBytes,
    CacheFolderOption,
    DeviceBytes,
    HostBytes,
    MaxNewTokens,
    ModelName,
    Overrides,
    Png,
    RecipeName,
    SamplingSeed,
    parse_gpu_memory,
    parse_name,
    path_argument,
    path_option,
)
from blockft.config.bounds import MAX_PAGE_SAMPLES, MAX_PORT, MAX_PROCESSES, MAX_SEED
from blockft.config.choices import DType, Format, MethodName, Metric, Mode, PageWriter
from blockft.errors import INTERRUPTED, USER_ERROR, ReportedError
from blockft.printable import print_text

if TYPE_CHECKING:
    from blockft.config.settings import Recipe
    from blockft.training.hosts import Hosts


def _print_version(value: bool) -> None:
    if value:
        from blockft.version import __version__

        print_text(f"blockft {__version__}")
        raise typer.Exit


app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cache.app, name="cache")
app.add_typer(bench.app, name="bench")


@app.callback()
def blockft(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Fine-tune language models for Block-Attention, and measure the result.

    \b
    The usual order of the commands, with your own recipe.yaml:
      blockft prepare recipe.yaml
      blockft train recipe.yaml
      blockft export out/run out/model
      blockft eval out/model recipe.yaml
      blockft generate out/model --input requests.jsonl
    """


@app.command()
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing prepared folder.")
    ] = False,
) -> None:
    """Read the sources, split them into blocks and tokenize them.

    Writes the folder data.output_dir with samples, examples and a manifest. The same command continues after
    an interruption, and repeats no work for sources that did not change.

    \b
    Examples:
      blockft prepare hotpotqa
      blockft prepare recipe.yaml data.row_len=8192 data.sources.0.max_samples=1000
    """
    from blockft.config.recipe import load_recipe
    from blockft.stages.prepare import prepare
    from blockft.stages.prepare_summary import print_summary

    settings = load_recipe(recipe, overrides or ())
    out = prepare(settings, overwrite=overwrite)
    print_summary(settings)
    print_next(f"prepared data: {out}", ["train", recipe, *(overrides or ())])


@app.command()
def inspect(
    folder: Annotated[Path, path_argument(metavar="FOLDER", help="A folder that `blockft prepare` wrote.")],
    index: Annotated[
        int | None, typer.Option(help="Number of the example, from 0. Default: 0; of --html: none.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the example as JSON.")] = False,
    png: Png = None,
    html: Annotated[
        Path | None,
        path_option(
            "--html",
            metavar="FILE",
            help="Write statistics and samples as one page into this file, which is replaced.",
        ),
    ] = None,
    num_samples: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_PAGE_SAMPLES, help="With --html: number of examples. Default: 8."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_SEED, help="With --html: seed of the choice of examples. Default: 0."),
    ] = None,
) -> None:
    """Show a prepared example, its mask, and statistics of the data.

    \b
    Examples:
      blockft inspect out/data
      blockft inspect out/data --index 7 --png mask.png
      blockft inspect out/data --html data.html --num-samples 20
    """
    from blockft.stages.inspect import inspect

    inspect(folder, index=index, as_json=as_json, png=png, html=html, num_samples=num_samples, seed=seed)
    if png:
        print_next(f"picture: {png}")
    if html:
        print_next(f"page: {html}")


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_PROCESSES,
            help="Processes on this machine: one per GPU, or CPU processes. Default: 1.",
        ),
    ] = None,
    hostfile: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Start on the hosts of this file by pdsh; its lines: NAME slots=N."),
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Address of the first host. Default: its name in the hostfile.")
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_PORT, help="Port of the first host that all processes use. Default: 29500."
        ),
    ] = None,
    ssh_port: Annotated[
        int | None, typer.Option(min=1, max=MAX_PORT, help="Port of the ssh servers of the hosts.")
    ] = None,
    no_ssh: Annotated[
        bool, typer.Option("--no-ssh", help="Start only this host; run the command on each host by hand.")
    ] = False,
    node_rank: Annotated[
        int | None,
        typer.Option(help="With --no-ssh: place of this host in the hostfile, from 0."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last complete checkpoint of the run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print rows, steps and a memory estimate, and exit.")
    ] = False,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --dry-run: the memory of the GPUs of another machine, such as 80GB.",
        ),
    ] = None,
) -> None:
    """Fine-tune a model on prepared data under DeepSpeed.

    Writes checkpoints, metrics.jsonl, sample_answers.jsonl and the resolved recipe to train.output_dir.
    Ctrl-C and SIGTERM save a checkpoint and stop. A launcher that sets RANK (deepspeed, torchrun, srun)
    starts the same command.

    \b
    Examples:
      blockft train recipe.yaml --dry-run
      blockft train recipe.yaml --dry-run --gpu-memory 80GB
      blockft train recipe.yaml --num-gpus 8
      blockft train recipe.yaml --num-gpus 8 --resume
      blockft train recipe.yaml train.learning_rate=1e-5 train.output_dir=out/run2
    """
    from blockft.config.recipe import load_recipe
    from blockft.training.hosts import resolve_hosts
    from blockft.training.worker_environment import is_worker

    hosts = resolve_hosts(
        hostfile,
        num_gpus=num_gpus,
        no_ssh=no_ssh,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        ssh_port=ssh_port,
    )
    gpu_bytes = None if gpu_memory is None else parse_gpu_memory(gpu_memory, dry_run=dry_run)
    num_processes = hosts.num_processes if hosts else num_gpus or 1
    if not dry_run and (hosts or num_processes > 1) and not is_worker():
        arguments = [recipe, *(overrides or ())]
        raise typer.Exit(_launch(arguments, hosts=hosts, num_processes=num_processes, resume=resume))
    settings = load_recipe(recipe, overrides or ())  # before the slow imports: it finds most mistakes
    if dry_run:
        from blockft.stages.dry_run import print_dry_run

        print_dry_run(settings, num_processes, resume=resume, gpu_bytes=gpu_bytes)
        if hosts:
            print_next("next: the same command without --dry-run")
        else:
            options = [*(["--num-gpus", num_gpus] if num_gpus else []), *(["--resume"] if resume else [])]
            print_next("dry run: the recipe can be trained", ["train", recipe, *(overrides or ()), *options])
    else:
        from blockft.stages import train as stage

        try:
            run = stage.train(settings, resume=resume, name=Path(recipe).stem)
        except KeyboardInterrupt:
            _print_resume(Path(settings.train.output_dir), ["train", recipe, *(overrides or ()), "--resume"])
            raise
        print_next(f"run: {run}", ["export", run, unused_path(run.with_name("model"))])


def _launch(arguments: list[str], *, hosts: "Hosts | None", num_processes: int, resume: bool) -> int:
    """Check a run, start its ranks, and return the exit code. `arguments` are recipe and overrides.

    Raises:
        UserError: the run cannot start.
    """
    from blockft.config.recipe import load_recipe
    from blockft.training.rank_watch import watching_hosts

    with watching_hosts(hosts.place) if hosts and hosts.node_rank is not None else nullcontext() as watch:
        settings = load_recipe(arguments[0], arguments[1:])  # before the slow imports
        _check_before_launch(settings, hosts, num_processes=num_processes, resume=resume)

        from blockft.training.launch import start_workers

        if watch:
            watch.wait_until_ready()
            watch.leave_port(to_store=False)
        command = ["train", *arguments, *(["--resume"] if resume else [])]
        # the first rank prints the next command
        code = start_workers(command, num_gpus=num_processes, hosts=hosts, watch=watch)
        if watch and code not in (0, INTERRUPTED):
            raise ReportedError(f"its processes have ended with exit code {code}", exit_code=code)
    return code


def _check_before_launch(
    settings: "Recipe", hosts: "Hosts | None", *, num_processes: int, resume: bool
) -> None:
    """Check a run, and the hosts that this one starts, before any rank is started.

    Raises:
        UserError: the run cannot start.
    """
    from blockft.stages import train as stage
    from blockft.stages.run_plan import check_run
    from blockft.training.launch import check_num_gpus

    if not hosts:
        check_num_gpus(num_processes)
    # on another host than the first, the lock may be held by the first rank of this very run
    is_first_host = hosts is None or not hosts.node_rank
    with stage.lock_run(settings) if is_first_host else nullcontext():
        check_run(settings, resume=resume, num_processes=num_processes)
    if hosts and hosts.node_rank is None:
        from blockft.training.host_checks import check_hosts

        model = settings.model.path if Path(settings.model.path).is_dir() else None
        check_hosts(hosts, data_dir=settings.data.output_dir, model=model)


def _print_resume(run: Path, command: list[str]) -> None:
    """Print which checkpoint an interrupted run has and how to resume."""
    from blockft.stages.train import last_checkpoint

    if checkpoint := last_checkpoint(run):
        result = f"interrupted; last complete checkpoint: {checkpoint}"
    elif run.is_dir():
        result = f"interrupted; {run} has no complete checkpoint"
    else:
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # options of the launcher are known to the process that started this one
        print_next(result)
        print_next("next: the same command with --resume")
    else:
        print_next(result, command)


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        path_argument(metavar="RUN_OR_CHECKPOINT", help="The folder of a run, or one checkpoint of it."),
    ],
    out: Annotated[Path, path_argument(metavar="OUT", help="The folder to write; it must not exist.")],
    dtype: Annotated[
        DType, typer.Option(help="Type of the saved weights; auto is the type of the run.")
    ] = DType.auto,
    best: Annotated[
        bool,
        typer.Option("--best", help="Export the checkpoint with the lowest held-out loss, not the last one."),
    ] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapter of a LoRA run without merging it.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest size of one file of weights.")
    ] = "5GB",
    report: Annotated[
        Path | None,
        path_option(metavar="FOLDER", help="Report of blockft eval whose scores the model card shows."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Also upload the model to the Hugging Face Hub.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: create a public repository. Default: private.")
    ] = False,
) -> None:
    """Write a run as an ordinary Hugging Face checkpoint.

    An adapter is merged into its base model, except with --adapter-only.
    Loads the written folder with plain transformers and compares its logits with those of the run. The folder
    appears only if they agree.

    \b
    Examples:
      blockft export out/run out/model
      blockft export out/run/checkpoint-500 out/model-500 --dtype bfloat16
      blockft export out/lora-run out/adapter --adapter-only
      blockft export out/run out/model2 --report out/eval --push OWNER/NAME
    """
    from blockft.run_folder import RECIPE
    from blockft.stages.export import export

    export(
        checkpoint,
        out,
        dtype=dtype.value,
        best=best,
        adapter_only=adapter_only,
        max_shard_size=max_shard_size,
        report=report,
        push=push,
        private=not public,
    )
    recipe = next((f / RECIPE for f in (checkpoint, checkpoint.parent) if (f / RECIPE).is_file()), None)
    evaluate = eval_command(out, recipe) if recipe else None
    generate = ["generate", out, "--input", "requests.jsonl"]
    print_next(f"model: {out}", *([evaluate] if evaluate else []), generate)


@app.command()
def generate(
    model: ModelName,
    source: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="FILE",
            parser=parse_name,
            help="JSON lines with requests; - reads standard input.",
        ),
    ],
    mode: Annotated[Mode, typer.Option(help="Attention mode; full reuses no blocks.")] = Mode.block,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the most likely tokens of this total probability."),
    ] = 1,
    seed: SamplingSeed = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this text; can be repeated.")
    ] = None,
    trim: Annotated[
        bool,
        typer.Option("--trim", help="Drop the least relevant documents of a prompt that is too long."),
    ] = False,
    batch_size: BatchSize = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Print text while it is generated.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: answer, reused blocks, times.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the layers (GPU): slower start, faster tokens.")
    ] = False,
    cache: CacheFolderOption = None,
    cache_bytes: CacheBytes = None,
    host_bytes: HostBytes = None,
    device_bytes: DeviceBytes = None,
) -> None:
    """Answer requests from a JSON Lines file, reusing cached blocks.

    \b
    A request has one of three forms:
      {"documents": [{"title": "...", "text": "..."}], "question": "..."}
      {"messages": [{"role": "user", "content": "..."}]}
      {"blocks": ["...", "..."]}    text that already contains the chat template

    \b
    Examples:
      blockft generate out/model --input requests.jsonl
      blockft generate out/model --input requests.jsonl --cache out/cache --json
    """
    from blockft.stages.generate import CacheArguments, generate

    generate(
        model,
        source,
        mode=mode.value,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        trim=trim,
        batch_size=batch_size,
        stream=stream,
        as_json=as_json,
        compile=compile,
        cache=CacheArguments(folder=cache, disk=cache_bytes, host=host_bytes, device=device_bytes),
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: ModelName,
    cache: Annotated[
        Path, path_option("--cache", metavar="FOLDER", help="Folder of the block cache; created if missing.")
    ],
    cache_bytes: CacheBytes = None,
    host_bytes: HostBytes = None,
    device_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="GPU memory for blocks, beside vLLM's pages. Default: none."),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Type of weights and blocks; auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = DType.auto,
    page_writer: Annotated[
        PageWriter,
        typer.Option(
            envvar="BLOCKFT_PAGE_WRITER",
            help="Writes blocks into vLLM's pages; auto: triton on a GPU whose pages suit it, or torch.",
        ),
    ] = PageWriter.auto,
) -> None:
    """Serve a model with vLLM, reusing cached blocks.

    Further options go to vLLM's server. MODEL comes first. vLLM and blockft need an environment of their own:
    see blockft/serving/README.md.

    \b
    Examples:
      blockft serve out/model --cache out/cache
      blockft serve out/model --cache out/cache --cache-bytes 100GB --port 8000 --max-model-len 8192
    """
    from blockft.stages.generate import CacheArguments
    from blockft.stages.serve import serve

    arguments = CacheArguments(folder=cache, disk=cache_bytes, host=host_bytes, device=device_bytes)
    code = serve(
        model, cache=arguments, dtype=dtype.value, page_writer=page_writer.value, options=context.args
    )
    raise typer.Exit(code)


@app.command("eval")
def evaluate(
    model: ModelName,
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_DATA",
            parser=parse_name,
            help="A recipe with an eval section, or questions: a file, a glob, a folder or a Hub dataset.",
        ),
    ],
    overrides: Overrides = None,
    modes: Annotated[
        str | None,
        typer.Option(
            metavar="<block|full|block,full>", help="Attention modes. Default: those of the recipe."
        ),
    ] = None,
    format: Annotated[
        Format | None, typer.Option(help="RECIPE_OR_DATA is data of this format. Default: samples.")
    ] = None,
    method: Annotated[
        MethodName | None,
        typer.Option(help="Compute block mode by this method instead of the block cache."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report instead of a table.")] = False,
) -> None:
    """Answer held-out questions in both modes and score the answers.

    Writes a report, the predictions and a plot to eval.output_dir. The same command resumes an interrupted
    evaluation.

    \b
    Methods are baselines that need no training. They read and write no cached
    block, and take options as settings:
      mask             the block mask alone; positions are re-encoded
      local-positions  every block keeps the positions 0 to n - 1
      recompute        a share of the context tokens is computed again over all
                       blocks: eval.method.share (0 to 1), .tokens (first,
                       deviation), .layer (of the deviation)
      shared-start     every block is encoded behind the first tokens of the
                       prompt: eval.method.start_tokens
      ape              temperature and scale of attention to the context:
                       eval.method.temperature, .scale, .start_tokens

    \b
    Examples:
      blockft eval out/model recipe.yaml
      blockft eval out/model hotpotqa eval.max_samples=100 --modes block
      blockft eval out/model questions.jsonl --format musique
      blockft eval out/model recipe.yaml --method recompute eval.method.share=0.2
    """
    from blockft.config.recipe import is_recipe, load_recipe

    changes = [*(overrides or ()), *([f"eval.modes=[{modes}]"] if modes is not None else [])]
    changes += [f"eval.method.name={method}"] if method is not None else []
    if format is None and is_recipe(target):
        settings = load_recipe(target, changes)  # before the slow imports: it finds most mistakes
    else:
        from blockft.stages.evaluate import evaluation_recipe

        settings = evaluation_recipe(model, target, overrides=changes, format=format and format.value)

    from blockft.stages.evaluate import evaluate, print_report

    print_report(evaluate(model, settings), as_json=as_json)
    assert settings.eval
    out = settings.eval.output_dir
    print_next(f"report: {out}", ["compare", out, "OTHER_REPORT"])


@app.command()
def compare(
    reports: Annotated[
        list[Path], path_argument(metavar="REPORT", help="Folders of reports, or report.json files.")
    ],
    metric: Annotated[Metric, typer.Option(help="The score to compare.")] = Metric.substring_match,
    as_json: AsJson = False,
    png: Png = None,
) -> None:
    """Compare reports of `blockft eval` side by side.

    \b
    Examples:
      blockft compare out/eval out/other/eval
      blockft compare out/eval out/other/eval --metric token_f1 --png scores.png
    """
    from blockft.stages.compare import compare, print_comparison

    print_comparison(compare(reports, metric=metric.value, png=png), as_json=as_json)
    if png:
        print_next(f"picture: {png}")


@app.command()
def doctor(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE",
            parser=parse_name,
            help="Also check the data, model and folders of this recipe.",
        ),
    ] = None,
    overrides: Overrides = None,
    num_gpus: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_PROCESSES, help="Processes on this machine. Default: one per GPU."),
    ] = None,
    hostfile: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Also check the hosts of this file; its lines: NAME slots=N."),
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="Address of the first host. Default: its name in the hostfile.")
    ] = None,
    master_port: Annotated[
        int | None, typer.Option(min=1, max=MAX_PORT, help="Port of the first host. Default: 29500.")
    ] = None,
    ssh_port: Annotated[
        int | None, typer.Option(min=1, max=MAX_PORT, help="Port of the ssh servers of the hosts.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the environment before a run, and say what to do.

    One line per check: packages, GPUs, compiler, folders, the hosts and the network between them, and an
    all-reduce over all processes with its bandwidth. Exit code 0 if all checks pass, otherwise 2.

    \b
    Examples:
      blockft doctor
      blockft doctor recipe.yaml --num-gpus 8
      blockft doctor recipe.yaml --hostfile hosts
    """
    from blockft.config.recipe import load_recipe
    from blockft.training.hosts import resolve_hosts

    settings = load_recipe(recipe, overrides or ()) if recipe is not None else None
    hosts = resolve_hosts(
        hostfile,
        num_gpus=num_gpus,
        no_ssh=False,
        node_rank=None,
        master_addr=master_addr,
        master_port=master_port,
        ssh_port=ssh_port,
    )
    from blockft.stages.doctor import doctor
    from blockft.training.launch import check_num_gpus, count_gpus

    check_num_gpus(num_gpus or 1)
    if not doctor(settings, hosts=hosts, num_gpus=num_gpus or count_gpus(), as_json=as_json):
        raise typer.Exit(USER_ERROR)


@app.command()
def recipes() -> None:
    """List the shipped recipes."""
    from blockft.stages.recipes import recipes

    recipes()


@app.command()
def config(
    recipe_or_section: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE_OR_SECTION",
            parser=parse_name,
            help="A recipe to print with all its settings, or a section whose settings are listed.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a recipe.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference of formats and settings as Markdown.")
    ] = False,
) -> None:
    """List settings, or print a recipe with all its settings.

    \b
    Examples:
      blockft config
      blockft config train
      blockft config hotpotqa train.learning_rate=1e-5
      blockft config --schema > recipe.schema.json
    """
    from blockft.stages.config import print_config

    print_config(recipe_or_section, overrides or (), as_json=as_json, schema=schema, markdown=markdown)


def parse_and_run(arguments: list[str]) -> int:
    """Run the command that the arguments name, and return its exit code."""
    return app(arguments or ["--help"], prog_name="blockft", standalone_mode=False) or 0
