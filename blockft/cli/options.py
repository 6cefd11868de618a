"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from blockft.config.bounds import MAX_BATCH, MAX_RUNS, MAX_SEED, MAX_TOKENS
from blockft.errors import UserError
from blockft.inputs import path_problem, shorten
from blockft.units import parse_bytes


def parse_path(value: str | Path) -> Path:
    """Return a path of the command line.

    Raises:
        typer.BadParameter: no file can have this path.
    """
    if problem := path_problem(str(value)):
        raise typer.BadParameter(f"{shorten(str(value))!r} {problem}")
    return Path(value)


def parse_name(value: str) -> str:
    """Return a name that may be a path: of a model, a recipe or a shape.

    Raises:
        typer.BadParameter: no file can have this path.
    """
    parse_path(value)
    return value


def path_argument(**options: Any) -> Any:
    """Return a typer argument that takes a path."""
    return typer.Argument(parser=parse_path, **options)


def path_option(*names: str, **options: Any) -> Any:
    """Return a typer option that takes a path."""
    return typer.Option(*names, parser=parse_path, **options)


def _complete_recipe(incomplete: str) -> list[str]:
    """Return the names of shipped recipes that begin like what was typed."""
    from blockft.config.recipe import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        parser=parse_name,
        help="A YAML file, or the name of a shipped recipe (see `blockft recipes`).",
        autocompletion=_complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that override those of the recipe (see `blockft config`)."
    ),
]
ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", parser=parse_name, help="An export, a model folder, or a Hub id."),
]
ModelOrShape = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_SHAPE",
        parser=parse_name,
        help="A model, or a shape with random weights such as llama-3-8b.",
    ),
]
CacheName = Annotated[Path, path_argument(metavar="FOLDER", help="The folder of a block cache.")]
CacheFolderOption = Annotated[
    Path | None,
    path_option("--cache", metavar="FOLDER", help="Folder that keeps blocks for later processes."),
]
CacheBytes = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Limit of the cache folder, for example 100GB. Default: no limit."),
]
HostBytes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for blocks, for example 8GB. Default: a quarter of the free memory.",
    ),
]
DeviceBytes = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="GPU memory for blocks, for example 20GB. Default: half of what the model leaves free.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=MAX_TOKENS, help="Longest answer, in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Prompts answered together.")]
SamplingSeed = Annotated[
    int,
    typer.Option(
        min=-MAX_SEED - 1,
        max=MAX_SEED,
        help="Sampling seed; prompt i uses seed + i. Ignored at temperature 0.",
    ),
]
Warmups = Annotated[int, typer.Option(min=0, max=MAX_RUNS, help="Runs before the measured ones.")]
Runs = Annotated[int, typer.Option(min=1, max=MAX_RUNS, help="Measured runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Png = Annotated[
    Path | None,
    path_option("--png", metavar="FILE", help="Draw a picture into this file, which is replaced."),
]


def parse_gpu_memory(text: str, *, dry_run: bool) -> int:
    """Return the bytes of the option --gpu-memory.

    Raises:
        UserError: the text is not a size, or no GPU has so little memory; the command is no dry run.
    """
    if not dry_run:
        raise UserError("--gpu-memory plans a run for another machine: add --dry-run, or leave it out")
    num_bytes = parse_bytes(text)
    if num_bytes < 10**9:
        raise UserError(f"--gpu-memory is {shorten(text)}, it should be at least 1GB: write for example 80GB")
    return num_bytes
