"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer


def _complete_recipe(incomplete: str) -> list[str]:
    """Return the names of shipped recipes that begin like what was typed."""
    from blockft.config.recipe import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
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
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="An export, a model folder, or a Hub id.")]
CacheName = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a block cache.")]
CacheFolderOption = Annotated[
    Path | None,
    typer.Option("--cache", metavar="FOLDER", help="Folder that keeps blocks for later processes."),
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
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Png = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="Draw a picture into this file, which is replaced."),
]
