"""The verbs that ask a model, and judge what it answers."""

from pathlib import Path
from typing import Annotated

import typer

from blockft.cli.options import CacheBytes, CacheFolderOption, DeviceBytes, HostBytes, Overrides, app


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="An export, any model folder, or a Hub id.")],
    source: Annotated[str, typer.Option("--input", help="JSON lines with prompts; - is standard input.")],
    mode: Annotated[str, typer.Option(help="block or full attention; full reuses nothing.")] = "block",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens of this probability; needs a temperature.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(help="Of drawing, at any temperature but 0; the next prompt has the next one.")
    ] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this text; may be given several times.")
    ] = None,
    trim: Annotated[
        bool,
        typer.Option(
            "--trim", help="Long prompts lose the documents of the lowest score, the last of equals first."
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 1,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is written.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON lines: answers, blocks reused, times.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="A slower start, and less time for each token; GPUs only.")
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
    from blockft.stages.generate import CacheArguments, generate

    generate(
        model,
        source,
        mode=mode,
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
    from blockft.config.recipe import is_recipe, load_recipe

    words = [*(overrides or ()), *([f"eval.modes=[{modes}]"] if modes is not None else [])]
    if format is None and is_recipe(target):
        settings = load_recipe(target, words)  # before the slow imports: most mistakes are found here
    else:
        from blockft.stages.evaluate import evaluation_recipe

        settings = evaluation_recipe(model, target, overrides=words, format=format)

    from blockft.stages.evaluate import evaluate, print_report

    print_report(evaluate(model, settings), as_json=as_json)


@app.command()
def compare(
    reports: Annotated[list[Path], typer.Argument(help="Report folders or report.json files.")],
    metric: Annotated[
        str, typer.Option(help="substring_match, word_match, exact_match or token_f1.")
    ] = "substring_match",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    png: Annotated[
        Path | None, typer.Option(help="Draw the comparison into this file, or replace it.")
    ] = None,
) -> None:
    """Put reports of `eval` side by side."""
    from blockft.stages.compare import compare, print_comparison

    print_comparison(compare(reports, metric=metric, png=png), as_json=as_json)
