"""`blockft bench`: commands that measure speed and agreement."""

import time
from pathlib import Path
from typing import Annotated

import typer

from blockft.cli.next_command import print_next
from blockft.cli.options import (
    HostBytes,
    MaxNewTokens,
    ModelName,
    ModelOrShape,
    Overrides,
    Png,
    RecipeName,
    Runs,
    Warmups,
    parse_name,
    path_option,
)
from blockft.config.bounds import (
    MAX_BISECTIONS,
    MAX_BLOCKS,
    MAX_CORPUS,
    MAX_COUNT,
    MAX_FLOAT,
    MAX_RATE,
    MAX_RUN_SEED,
    MAX_RUNS,
    MAX_SERVE_SECONDS,
    MAX_TOKENS,
    MAX_ZIPF,
)
from blockft.config.choices import DType
from blockft.errors import UserError

app = typer.Typer(help="Measure speed and agreement.", rich_markup_mode=None)

Out = Annotated[
    Path | None,
    path_option("--out", metavar="FILE", help="Write the figures as JSON into this file, which is replaced."),
]
RowLen = Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of a packed row.")]


@app.command("attention")
def bench_attention(
    row_len: RowLen = 4096,
    num_layouts: Annotated[int, typer.Option(min=1, max=MAX_RUNS, help="Random layouts for each type.")] = 4,
    out: Out = None,
) -> None:
    """Compare flex attention with the reference on a GPU.

    \b
    Example:
      blockft bench attention --row-len 8192 --out flex.json
    """
    from blockft.bench.attention import bench_attention

    bench_attention(row_len=row_len, num_layouts=num_layouts, out=out)
    _print_files(out)


@app.command("ttft")
def bench_ttft(
    target: ModelOrShape,
    lengths: Annotated[
        str,
        typer.Option(
            metavar="N,N,...",
            help="Prompt lengths in tokens, question included. Default: 512 to 32768, if the model can.",
        ),
    ] = "",
    question_len: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of the question.")] = 50,
    block_len: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of a block.")] = 512,
    tiers: Annotated[
        str,
        typer.Option(
            metavar="TIER,...",
            help="Tiers that hold the blocks, or none. Default: device,host,disk; on a CPU host,disk.",
        ),
    ] = "",
    warmups: Warmups = 10,
    runs: Runs = 30,
    folder: Annotated[
        Path | None, path_option(metavar="FOLDER", help="Folder for the files of the disk tier.")
    ] = None,
    compile: Annotated[bool, typer.Option(help="Compile the layers that read cached blocks (GPU).")] = True,
    reencoding: Annotated[
        bool, typer.Option(help="Also measure what it costs to move blocks to their positions.")
    ] = False,
    out: Out = None,
    png: Png = None,
) -> None:
    """Measure time to first token with and without cached blocks.

    \b
    Example:
      blockft bench ttft out/model --lengths 2048,8192 --out ttft.json --png ttft.png
    """
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
        reencoding=reencoding,
        out=out,
        png=png,
    )
    _print_files(out, png)


@app.command("agreement")
def bench_agreement(
    model: ModelName,
    recipe: RecipeName,
    overrides: Overrides = None,
    num_prompts: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Questions of the recipe to ask.")
    ] = 100,
    max_new_tokens: MaxNewTokens = 24,
    out: Out = None,
) -> None:
    """Compare answers over cached blocks with the reference.

    \b
    Example:
      blockft bench agreement out/model recipe.yaml --num-prompts 50
    """
    from blockft.config.recipe import load_recipe
    from blockft.stages.bench import bench_agreement

    settings = load_recipe(recipe, overrides or ())
    bench_agreement(model, settings, num_prompts=num_prompts, max_new_tokens=max_new_tokens, out=out)
    _print_files(out)


@app.command("prepare")
def bench_prepare(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE", parser=parse_name, help="A recipe. Default: a synthetic source of questions."
        ),
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            parser=parse_name,
            help="The tokenizer for the synthetic source. Default: one that is trained on it.",
        ),
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Samples of the synthetic source.")
    ] = 4_000,
    memory_samples: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=MAX_COUNT, help="Samples for which the memory is measured. Default: 2000 and 8000."
        ),
    ] = None,
    num_documents: Annotated[
        int, typer.Option(min=1, max=MAX_BLOCKS, help="Documents of a sample, of about 125 words each.")
    ] = 10,
    rounds: Annotated[int, typer.Option(min=1, max=MAX_RUNS, help="Measurements of each speed.")] = 3,
    out: Out = None,
) -> None:
    """Compare `prepare` with the bare tokenizer.

    Uses one process, then one per core, and prints the share of the tokenizer's speed on the same texts.
    Without a recipe it also measures the memory, the cost of one more source, and the time to plan a run. The
    prepared data are deleted.

    \b
    Example:
      blockft bench prepare --model HuggingFaceTB/SmolLM2-135M-Instruct
    """
    from blockft.config.recipe import load_recipe
    from blockft.stages.bench import bench_prepare, bench_prepare_synthetic

    if recipe is not None:
        if model is not None:
            raise UserError(f"--model is {model}, but {recipe} names its model: set model.path={model}")
        bench_prepare(load_recipe(recipe, overrides or ()), rounds=rounds, out=out)
    else:
        bench_prepare_synthetic(
            model,
            num_samples=num_samples,
            memory_samples=memory_samples or (2_000, 8_000),
            num_documents=num_documents,
            rounds=rounds,
            out=out,
        )
    _print_files(out)


@app.command("train")
def bench_train(
    target: ModelOrShape,
    row_len: RowLen = 16384,
    sample_len: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of a sample.")] = 1600,
    num_documents: Annotated[
        int, typer.Option(min=1, max=MAX_BLOCKS, help="Documents of a sample, one block each.")
    ] = 10,
    lora_r: Annotated[
        int | None,
        typer.Option(
            "--lora-r",
            min=1,
            max=MAX_COUNT,
            help="Train an adapter of this rank on every linear layer instead of all weights.",
        ),
    ] = None,
    warmups: Annotated[int, typer.Option(min=0, max=MAX_RUNS, help="Steps before the measured ones.")] = 3,
    runs: Annotated[int, typer.Option(min=1, max=MAX_RUNS, help="Measured steps.")] = 10,
    out: Out = None,
) -> None:
    """Measure training tokens per second, packed and unpacked.

    Compares packed rows with one sample at a time under a dense mask.

    \b
    Example:
      blockft bench train llama-3.2-1b --row-len 8192
      blockft bench train llama-3-8b --row-len 8192 --lora-r 32
    """
    from blockft.bench.train import bench_train

    bench_train(
        target,
        row_len=row_len,
        sample_len=sample_len,
        num_documents=num_documents,
        lora_r=lora_r,
        warmups=warmups,
        runs=runs,
        out=out,
    )
    _print_files(out)


@app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_serve(
    context: typer.Context,
    target: ModelOrShape,
    blocks_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A running server of `blockft serve`, with /v1. None is started."),
    ] = None,
    plain_url: Annotated[
        str | None, typer.Option(metavar="URL", help="A running server of vLLM alone, with /v1.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variable with the key of running servers.")
    ] = None,
    python: Annotated[
        Path | None,
        path_option(
            metavar="FILE", help="Python of an environment with vLLM and blockft. Default: this one."
        ),
    ] = None,
    num_documents: Annotated[
        int, typer.Option(min=1, max=MAX_BLOCKS, help="Documents of a prompt, one block each.")
    ] = 10,
    document_len: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of a document.")] = 512,
    question_len: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of a question.")] = 50,
    answer_len: Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Tokens of an answer.")] = 32,
    corpus_size: Annotated[int, typer.Option(min=1, max=MAX_CORPUS, help="Documents of the corpus.")] = 200,
    zipf: Annotated[
        float, typer.Option(min=0, max=MAX_ZIPF, help="Exponent of Zipf's law: 0 draws all documents alike.")
    ] = 1.0,
    rates: Annotated[
        str,
        typer.Option(
            metavar="R,R,...",
            help="Requests per second. Default: a search for the largest rate within the limit.",
        ),
    ] = "",
    first_rate: Annotated[
        float, typer.Option(min=0.01, max=MAX_RATE, help="Rate at which the search begins.")
    ] = 1.0,
    bisections: Annotated[
        int, typer.Option(min=0, max=MAX_BISECTIONS, help="Rates between the last two of the search.")
    ] = 3,
    seconds: Annotated[
        float,
        typer.Option(
            min=1, max=MAX_SERVE_SECONDS, help="Time of each rate, in seconds; more below 21 requests."
        ),
    ] = 20.0,
    ttft_limit_ms: Annotated[
        float, typer.Option(min=1, max=MAX_FLOAT, help="Limit for p95 of the time to first token.")
    ] = 500.0,
    warmups: Annotated[
        int | None,
        typer.Option(
            min=0, max=MAX_RUNS, help="Requests before the measurement. Default: the corpus once, twice that."
        ),
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, max=MAX_RUNS, help="Requests over the corpus, one at a time.")
    ] = 20,
    reuse_prompts: Annotated[
        int,
        typer.Option(
            min=0,
            max=MAX_RUNS,
            help="Prompts over new documents, as many over the same ones, and in another order. 0: none.",
        ),
    ] = 15,
    timeout: Annotated[
        float, typer.Option(min=1, max=MAX_SERVE_SECONDS, help="Seconds after which a request has failed.")
    ] = 60.0,
    start_timeout: Annotated[
        float, typer.Option(min=1, max=MAX_SERVE_SECONDS, help="Longest start of a server, in seconds.")
    ] = 600.0,
    limit_s: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=MAX_SERVE_SECONDS,
            help="Longest time of the command, in seconds. No rate starts that might not end. Default: none.",
        ),
    ] = None,
    servers_together: Annotated[
        bool | None,
        typer.Option(
            "--servers-together/--servers-in-turn",
            help="Start both servers at once; each is idle while the other is asked. Default: with "
            "--kv-cache-memory-bytes, vLLM's size of its pages.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_RUN_SEED, help="Seed of prompts and arrivals.")] = 0,
    dtype: Annotated[
        DType, typer.Option(help="Type of weights and blocks; auto: bfloat16 on a GPU, float32 on a CPU.")
    ] = DType.auto,
    host_bytes: HostBytes = None,
    device_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="GPU memory for blocks. Default: none.")
    ] = None,
    folder: Annotated[
        Path | None, path_option(metavar="FOLDER", help="Folder for the cache and for random weights.")
    ] = None,
    model_folder: Annotated[
        Path | None,
        path_option(metavar="FOLDER", help="Keep random weights here, or take those that are here."),
    ] = None,
    log_folder: Annotated[
        Path | None, path_option(metavar="FOLDER", help="Keep the logs of the servers in this folder.")
    ] = None,
    out: Out = None,
    png: Png = None,
) -> None:
    """Compare vLLM with cached blocks with vLLM alone.

    Measures new documents, known ones and known ones in another order, one request at a time. Then requests
    arrive by a Poisson process. A request that fails counts as slower than every other one. The JSON file is
    written again with each figure and says what is missing. Further options go to both of vLLM's servers.

    With --kv-cache-memory-bytes both servers share a GPU. --device-bytes keeps blocks in GPU memory. A small
    --timeout lets more rates fit into --limit-s.

    \b
    Examples:
      blockft bench serve llama-3.2-1b --out serve.json --png serve.png
      blockft bench serve llama-3-8b --limit-s 330 --device-bytes 16GB --out s.json
      blockft bench serve out/model --rates 1,2,4 --blocks-url http://localhost:8000/v1
    """
    begun = time.monotonic()
    from blockft.bench.serve import ServePlan
    from blockft.bench.serve_workload import WorkloadOptions
    from blockft.bench.time_limit import TimeLimit
    from blockft.stages.bench_serve import ServerArguments, bench_serve, default_warmups, parse_rates

    if warmups is None:
        warmups = default_warmups(corpus_size, num_documents)
    bench_serve(
        target,
        workload=WorkloadOptions(
            num_documents=num_documents,
            document_len=document_len,
            question_len=question_len,
            answer_len=answer_len,
            corpus_size=corpus_size,
            zipf=zipf,
            seed=seed,
        ),
        plan=ServePlan(
            rates=parse_rates(rates),
            first_rate=first_rate,
            num_bisections=bisections,
            seconds=seconds,
            ttft_limit_ms=ttft_limit_ms,
            num_reuse=reuse_prompts,
            num_warmups=warmups,
            num_single=runs,
            timeout_s=timeout,
        ),
        servers=ServerArguments(
            blocks_url=blocks_url,
            plain_url=plain_url,
            api_key_env=api_key_env,
            python=python,
            folder=folder,
            dtype=dtype.value,
            start_timeout_s=start_timeout,
            host_bytes=host_bytes,
            device_bytes=device_bytes,
            options=context.args,
            together=servers_together,
            model_folder=model_folder,
            log_folder=log_folder,
        ),
        limit=TimeLimit(limit_s=limit_s, begun=begun),
        out=out,
        png=png,
    )
    _print_files(out, png)


def _print_files(out: Path | None, png: Path | None = None) -> None:
    """Print where a benchmark wrote its figures and its picture."""
    if out:
        print_next(f"figures: {out}")
    if png:
        print_next(f"picture: {png}")
